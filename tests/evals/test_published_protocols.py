"""Protocols of published evaluators: their items, prompts and scores on records of our own."""

from __future__ import annotations

import numpy as np
import pytest

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.data.experts.record import Annotation, failed
from vilam3_jax.datasets import chest_findings, chest_xray14, chexpert, medical_diff_vqa
from vilam3_jax.errors import UserError
from vilam3_jax.evals import protocol as protocol_lib
from vilam3_jax.evals import protocols
from vilam3_jax.evals.items import ITEM_RULES, items_of
from vilam3_jax.evals.metrics.base import metric
from vilam3_jax.evals.parsers import PARSERS
from vilam3_jax.evals.prompts import PROMPTS
from vilam3_jax.evals.protocols import flare, llava_med, medevalkit, medgemma_card, vila_m3

YES_NO = ("yes", "no")
PUBLISHED = {
    one.name: one
    for module in (flare, llava_med, medevalkit, medgemma_card, vila_m3)
    for one in module.PROTOCOLS
}


class Context:
    """Stored results of the CXR expert."""

    def __init__(self, **probabilities):
        self.probabilities = probabilities

    def annotation(self, item, expert, args=""):
        if not self.probabilities:
            return failed("key", expert, args, "not computed")
        return Annotation("0" * 64, expert, args, probabilities=self.probabilities)

    def neighbours(self, item, count):
        return ()


def qa(question, answer, kind, options=(), **more):
    return {
        "question": question, "answer": answer, "type": kind, "label_source": "x", "options": list(options),
        "expert": None, "args": "", "oracle": False, "image": 0, **more,
    }  # fmt: skip


def record(name, dataset, *questions, split="test", images=1, **meta):
    shown = tuple(ImageRef(path=f"{name}-{number}.png") for number in range(images))
    known = {"dataset": dataset, "split": split, "modality": "CXR", "qa": list(questions), **meta}
    return Example(name, "conversation", shown, meta=known)


def protocol(name):
    return PUBLISHED[f"{name}@1"]


def rows_of(name, examples, outputs):
    """Rows of `rows.jsonl`, with one output per item, in the order of the items."""
    asked = protocol(name)
    rows = []
    for item, output in zip(items_of(examples, asked), outputs, strict=True):
        found = protocol_lib.score(asked, item, output)
        rows.append(
            {
                "item": item.id, "cluster": item.cluster, "question_type": item.question_type,
                "options": list(item.options), "output": output, "parsed": found.parsed, "gold": found.gold,
                "correct": found.correct, "unparsed": found.unparsed, "answer_spec": dict(item.answer_spec),
            }
        )  # fmt: skip
    return rows


def value(name, rows):
    return float(metric(name).resampled(rows, np.arange(len(rows)))(np.ones((1, len(rows))))[0])


def request(name, example, context=None):
    asked = protocol(name)
    (item,) = items_of([example], asked)
    return PROMPTS[asked.prompt](item, context or Context()).question


@pytest.mark.parametrize("one", PUBLISHED.values(), ids=list(PUBLISHED))
def test_a_protocol_names_what_exists(one):
    assert one.items in ITEM_RULES and one.prompt in PROMPTS and one.parser in PARSERS
    assert all(metric(name).name == name for name in (one.metric, *one.metrics))


def test_every_published_module_is_listed_and_hashes_differ():
    assert {"flare", "llava_med", "medevalkit", "medgemma_card", "vila_m3"} <= set(protocols.MODULES)
    assert len({one.hash for one in PUBLISHED.values()}) == len(PUBLISHED) == 36


def test_names_of_findings_and_kinds_are_those_of_the_datasets():
    assert vila_m3.FINDINGS_14 == chest_xray14.REFERENCE_FINDINGS
    assert vila_m3.FINDINGS_CHEXPERT == chexpert.REFERENCE_FINDINGS
    assert sorted(vila_m3.KINDS) == sorted(medical_diff_vqa.KINDS)


# --- VILA-M3


def vqa_rad(name, answer="yes", kind="closed", reference="0", **more):
    question = qa(f" Is it {name}? ", answer, kind, YES_NO if answer in YES_NO else ())
    return record(name, "vqa_rad", question, reference_id=reference, **more)


def test_questions_have_the_suffix_of_the_released_command():
    suffix = "\nAnswer with the option's letter from the given choices directly."
    for name in ("vqa-rad", "slake", "path-vqa"):
        example = record(
            "a", name.replace("-", "_"), qa(" Is it? ", "yes", "closed", YES_NO), reference_id="1"
        )
        assert request(f"vila-m3/parity/{name}", example) == "Is it?" + suffix
    example = record("a", "medical_diff_vqa", qa(" Is it? ", "yes", "presence", YES_NO, answer_type="closed"))
    assert request("vila-m3/parity/mimic-vqa", example) == "Is it?"
    example = record("a", "mimic_cxr_reports", qa("What do you see?", "The lungs are clear.", "report"))
    assert request("vila-m3/parity/mimic-cxr-report", example) == "Describe the image in detail."


def test_equal_reference_ids_collapse_to_the_last_and_the_denominator_shrinks():
    examples = [vqa_rad("a"), vqa_rad("b", reference="1"), vqa_rad("c", "no"), vqa_rad("d", split="train")]
    found = items_of(examples, protocol("vila-m3/parity/vqa-rad"))
    assert [item.example for item in found] == ["c", "b"]
    assert [item.example for item in items_of(examples, protocol("vila-m3/strict/vqa-rad"))] == ["c", "b"]


def test_without_reference_ids_the_data_is_refused():
    with pytest.raises(UserError, match=r"'a/q0': no reference id; prepare vqa_rad with --parity"):
        items_of([vqa_rad("a", reference="")], protocol("vila-m3/parity/vqa-rad"))


def test_open_questions_of_vqa_rad_are_not_asked_but_rephrased_ones_are():
    examples = [
        vqa_rad("a", "liver", "open"),
        vqa_rad("b", kind="closed_rephrased", reference="1"),
        vqa_rad("c", "liver", "open_rephrased", "2"),
    ]
    found = items_of(examples, protocol("vila-m3/parity/vqa-rad"))
    assert [item.example for item in found] == ["b"]


def test_a_full_stop_is_an_error_of_parity_only():
    examples = [vqa_rad(name, reference=name) for name in "abc"]
    said = ["Yes.", " YES ", "Yes, it is"]
    assert [row["correct"] for row in rows_of("vila-m3/parity/vqa-rad", examples, said)] == [0, 1, 0]
    assert [row["correct"] for row in rows_of("vila-m3/strict/vqa-rad", examples, said)] == [1, 1, 1]


def test_whitespace_is_an_error_of_path_vqa():
    examples = [record(name, "path_vqa", qa("Is it?", "yes", "closed", YES_NO)) for name in "ab"]
    assert [row["correct"] for row in rows_of("vila-m3/parity/path-vqa", examples, ["Yes", "yes "])] == [1, 0]


def test_mimic_vqa_counts_closed_answers_over_all_types_and_leaves_differences_out():
    closed, opened = {"answer_type": "closed"}, {"answer_type": "open"}
    questions = [
        qa("Is there edema?", "yes", "presence", YES_NO, **closed),
        qa("Is there a nodule?", "no", "presence", YES_NO, **closed),
        qa("Is it PA?", "yes", "view", YES_NO, **closed),
        qa("Where?", "left lower lobe", "location", **opened),
        qa("What changed?", "nothing", "difference", **opened),
    ]
    said = ["Human: Is it? Assistant: Yes.", "yes", "yes", "the left lobe"]
    rows = rows_of("vila-m3/parity/mimic-vqa", [record("a", "medical_diff_vqa", *questions)], said)
    assert value("closed_accuracy", rows) == pytest.approx(2 / 3)
    assert value("macro_closed_accuracy", rows) == pytest.approx(3 / 4)
    assert value("open_recall", rows) == pytest.approx(2 / 3)


def test_an_answer_that_is_neither_open_nor_closed_is_refused():
    example = record("a", "medical_diff_vqa", qa("Is it?", "yes", "presence", YES_NO))
    with pytest.raises(UserError, match="neither open nor closed; prepare medical_diff_vqa again"):
        items_of([example], protocol("vila-m3/parity/mimic-vqa"))


def film(name, dataset, **answers):
    findings = [qa("?", answer, finding, YES_NO) for finding, answer in answers.items()]
    return record(name, dataset, *findings)


@pytest.mark.parametrize("finding", [*vila_m3.FINDINGS_14, *vila_m3.FINDINGS_CHEXPERT])
def test_questions_about_findings_have_the_wording_of_the_datasets_parity(finding):
    name = "chestxray14" if finding in vila_m3.FINDINGS_14 else "chexpert"
    dataset = "chest_xray14" if finding in vila_m3.FINDINGS_14 else "chexpert"
    example = film("a", dataset, **{finding: "yes"})
    assert request(f"vila-m3/parity/{name}", example) == chest_findings.reference_question(finding)


def test_the_prompt_with_expert():
    example = film("a", "chest_xray14", airspace_opacity="yes")
    context = Context(Atelectasis=0.51, Lung_Opacity=0.5)
    assert request("vila-m3/parity/chestxray14-expert", example, context) == (
        "The following is a question about findings in chest X-ray in the frontal view. When answering the "
        "question, please analyze the image and incorporate the additional results generated by an expert "
        "classification model:\n atelectasis: yes\n lung opacity: no\n"
        "Question: is there lung opacity according to the provided X-ray image?\n"
        "Please reply with yes or no.\n"
    )
    with pytest.raises(UserError, match=r"no result of CXR \(not computed\); give --annotations"):
        request("vila-m3/parity/chestxray14-expert", example)


def test_the_dialogue_about_a_report_with_expert():
    example = record("a", "mimic_cxr_reports", qa("?", "The lungs are clear.", "report"))
    asked = protocol("vila-m3/parity/mimic-cxr-report-expert")
    (item,) = items_of([example], asked)
    found = PROMPTS[asked.prompt](item, Context(Atelectasis=0.51, Lung_Opacity=0.5))
    assert found.question == (
        "The resulting predictions are:\natelectasis: yes\nlung opacity: no\n. Analyze the image and take "
        "these predictions into account when responding to this prompt.\nDescribe the image in detail."
    )
    ((first, call),) = found.history
    assert first.startswith("Here is a list of available expert models:\n<BRATS(args)> Modality: MRI,")
    assert first.endswith("expert model.\n This is a CXR image.\nDescribe the image in detail.")
    assert call == "This looks like an chest x-ray. Let me first trigger <CXR()>."
    with pytest.raises(UserError, match=r"no result of CXR \(not computed\); give --annotations"):
        PROMPTS[asked.prompt](item, Context())


def test_choices_ask_once_about_every_film_whose_findings_are_known():
    name = "vila-m3/strict/chestxray14-choices"
    examples = [
        film("a", "chest_xray14", fracture="yes", pneumothorax="no", airspace_opacity="yes", nodule="yes"),
        film("b", "chest_xray14", fracture="no", pneumothorax="no", airspace_opacity="no"),
        film("c", "chest_xray14", fracture="no", pneumothorax="no"),
    ]
    rows = rows_of(name, examples, ["(A),(B)", "(D) None of the Above"])
    assert [row["item"] for row in rows] == ["a/findings", "b/findings"]
    assert [row["gold"] for row in rows] == [["Fracture", "Lung Opacity"], ["None of the Above"]]
    assert value("label_f1", rows) == pytest.approx((1 / 2 + 1) / 2)
    assert request(name, examples[0]) == (
        "The following is a multiple-choice question about findings in chest X-ray in the frontal view. "
        "Please reply with the corresponding answer choice letter(s).\n"
        "Question: What are the potential abnormalities according to the provided X-ray image?\n"
        "(A) Fracture\n(B) Pneumothorax\n(C) Lung Opacity\n(D) None of the Above\n"
    )
    five = dict.fromkeys(vila_m3.FINDINGS_CHEXPERT, "no") | {"pleural_effusion": "yes"}
    (row,) = rows_of("vila-m3/strict/chexpert-choices", [film("a", "chexpert", **five)], ["E"])
    assert row["correct"] and row["gold"] == ["Pleural effusion"]


def test_a_nodule_is_a_no_in_parity_and_unparsed_in_strict():
    examples = [film(name, "chest_xray14", fracture="yes") for name in "abc"]
    said = ["A lung nodule is present", "There is an abnormal opacity", "Yes, a fracture"]
    parity = rows_of("vila-m3/parity/chestxray14", examples, said)
    strict = rows_of("vila-m3/strict/chestxray14", examples, said)
    assert [row["parsed"] for row in parity] == ["no", "no", "yes"]
    assert [row["parsed"] for row in strict] == [None, None, "yes"]
    assert value("vila_m3_f1", parity) == value("macro_positive_f1", strict) == pytest.approx(1 / 2)


def test_the_headline_is_the_mean_of_the_findings_and_another_letter_makes_one_zero():
    examples = [film(name, "chest_xray14", fracture="yes", pneumothorax="yes") for name in "ab"]
    assert value("vila_m3_f1", rows_of("vila-m3/parity/chestxray14", examples, ["yes"] * 4)) == 1
    rows = rows_of("vila-m3/parity/chestxray14", examples, ["yes", "yes", "(C)", "yes"])
    assert value("vila_m3_f1", rows) == pytest.approx(1 / 2)


def test_an_empty_answer_is_no_for_chestxray14_and_unparsed_for_chexpert():
    (first,) = rows_of("vila-m3/parity/chestxray14", [film("a", "chest_xray14", fracture="no")], [""])
    (second,) = rows_of("vila-m3/parity/chexpert", [film("a", "chexpert", edema="no")], [""])
    assert (first["parsed"], first["correct"]) == ("no", True)
    assert (second["parsed"], second["unparsed"], second["correct"]) == (None, True, False)


def test_reports_are_cleaned_and_those_without_a_sentence_are_left_out():
    examples = [
        record("a", "mimic_cxr_reports", qa("?", "The lungs are clear. The lungs are clear.", "report")),
        record("b", "mimic_cxr_reports", qa("?", "Clear.", "report")),
    ]
    (row,) = rows_of("vila-m3/parity/mimic-cxr-report", examples, ["findings: the lungs are clear"])
    assert row["gold"] == row["parsed"] == "The lungs are clear."
    assert protocol("vila-m3/parity/mimic-cxr-report").temperature == 0.2


# --- MedEvalKit


def test_medevalkit_asks_by_the_right_answer():
    closed = record("a", "vqa_rad", qa("Is it?", "yes", "closed", YES_NO))
    stated = record("a", "vqa_rad", qa("Left or right?", "left", "closed"))
    assert request("medevalkit/vqa-rad", closed) == "Is it?\nPlease output 'yes' or 'no'(no extra output)."
    assert request("medevalkit/vqa-rad", stated) == "Left or right?\nPlease answer the question concisely."
    closed = record("a", "slake", qa("Is it?", "yes", "closed", YES_NO))
    assert request("medevalkit/slake", closed) == "Is it?\nAnswer the question using a single word or phrase."


def test_medevalkit_reads_yes_and_no_as_parts_of_words_but_not_in_slake():
    said = ["Yes, it is", "Yes, nothing else", "\\boxed{yes}", "Yes."]
    examples = [record(name, "vqa_rad", qa("Is it?", "yes", "closed", YES_NO)) for name in "abcd"]
    rows = rows_of("medevalkit/vqa-rad", examples, said)
    assert [row["correct"] for row in rows] == [True, False, True, True]
    examples = [record(name, "slake", qa("Is it?", "yes", "closed", YES_NO)) for name in "abcd"]
    rows = rows_of("medevalkit/slake", examples, said)
    assert [row["correct"] for row in rows] == [False, False, True, True]
    assert value("closed_accuracy", rows) == 1 / 2


# --- MedGemma and LLaVA-Med


def test_medgemma_counts_words_of_all_questions():
    examples = [
        record("a", "slake", qa("Which organ?", "The left lung", "open")),
        record("b", "slake", qa("Is it?", "yes", "closed", YES_NO)),
        record("c", "slake", qa("Left or right?", "left", "closed")),
    ]
    rows = rows_of("medgemma-card/slake", examples, ["A lung.", "Yes!", "right"])
    assert value("token_f1", rows) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert value("yes_no_accuracy", rows) == 1
    assert value("open_recall", rows) == 1 / 2


def test_llava_med_finds_the_answer_in_a_sentence():
    examples = [
        record("a", "vqa_rad", qa("Is it?", "yes", "closed", YES_NO)),
        record("b", "vqa_rad", qa("Is it?", "no", "closed", YES_NO)),
        record("c", "vqa_rad", qa("Which organ?", "left lung", "open")),
    ]
    rows = rows_of("llava-med/vqa-rad", examples, ["I think yes", "yes", "It is the lung."])
    assert value("llava_med_closed_accuracy", rows) == 1 / 2
    assert value("llava_med_closed_accuracy_as_released", rows) == 1
    assert value("open_recall", rows) == 1 / 2


# --- FLARE


def flare_row(name, family, answer, options=(), images=1):
    return record(name, "flare_mllm_2d", qa("What?", answer, family, options), images=images)


def test_flare_leaves_out_images_without_labels_and_shows_all_images():
    examples = [
        flare_row("a", flare.LABELS, "Caries; crown", images=3),
        flare_row("b", flare.LABELS, "none"),
        flare_row("c", "regression", "12.5"),
    ]
    asked = protocol(f"flare26/{flare.LABELS}")
    assert [(item.example, len(item.images)) for item in items_of(examples, asked)] == [("a", 3)]
    (row,) = rows_of(asked.id, examples, ["crown, root"])
    assert value("label_f1", [row]) == 1 / 2


def test_flare_lists_options_that_the_question_lacks():
    example = flare_row("a", "disease_diagnosis_classification", "two", ("one", "two"))
    name = "flare26/disease_diagnosis_classification"
    assert request(name, example) == "What?\nA. one\nB. two\nAnswer with the text of the right option."
    assert request(name, flare_row("a", "disease_diagnosis_classification", "B")) == "What?"


@pytest.mark.parametrize(
    ("family", "answers", "outputs", "expected"),
    [
        ("disease_diagnosis_classification", ["A", "A", "B"], ["a", " b", "B "], 3 / 4),
        ("detection", ["[0, 0, 10, 10]", "[[0, 0, 4, 4], [5, 5, 9, 9]]"], ["[1, 0, 10, 10]", "?"], 1 / 2),
        ("cell_counting", ["1200", "5"], ["1,200 cells", "none"], 5 / 2),
        ("regression", ["12.5", "3"], ["about 12 mg/dL", "3 or 4"], 1 / 4),
        ("report_generation", ["The lungs are clear."], ["The lungs\nare clear."], 1.0),
    ],
)
def test_flare_families(family, answers, outputs, expected):
    examples = [flare_row(str(number), family, answer) for number, answer in enumerate(answers)]
    rows = rows_of(f"flare26/{family}", examples, outputs)
    assert value(protocol(f"flare26/{family}").metric, rows) == pytest.approx(expected)
