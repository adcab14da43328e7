"""Dialogues from annotations: goldens of every rule, properties, and use in the stream."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

import numpy as np
import pytest
from data_worlds import annotate, build, config, ct_volume, same, take, write
from dialogue_worlds import (
    BAD,
    BRAIN,
    CARDS,
    CLEAN,
    FILM,
    GOLDENS,
    STUDIES,
    TUMOR,
    annotation_of,
    annotations,
    brain_key,
    brain_study,
    golden_files,
    scene,
    setting,
    shown,
    slice_study,
    store_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax.data import stream
from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.dialogues.phrases import plural, pool, said
from vilam3_jax.data.experts.dialogues.rules import RULES, split_row
from vilam3_jax.data.experts.dialogues.scene import Unfit
from vilam3_jax.data.experts.dialogues.source import DialogueSource, under_rules
from vilam3_jax.data.experts.grammar import parse_turn
from vilam3_jax.data.experts.labels import label_table, label_universe
from vilam3_jax.data.experts.record import Annotation, Disagreement, LabelMap, Segment, Verdict, failed
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.experts.wording import question_of
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.data.show import main as show
from vilam3_jax.errors import InputWarning, UserError

GROUPS = next(card.args for card in CARDS if card.name == "VISTA3D")


def test_golden_dialogues() -> None:
    """Every rule on every study: with experts, without experts, and with the reference's wording."""
    made = golden_files()
    assert made.keys() == {path.name for path in GOLDENS.iterdir()}
    for name, text in made.items():
        assert text == (GOLDENS / name).read_text(), f"{name}: regenerate it and review the changes"


def test_pools_are_as_large_as_promised_and_repeat_nothing() -> None:
    groups = pool("groups")
    assert groups.keys() == set(GROUPS) and all(len(rows) >= 16 for rows in groups.values())
    for rows in groups.values():
        assert len({row["question"] for row in rows}) == len(rows)
        assert all(row["answer"].count("{found}") == 1 for row in rows)
    assert len(set(pool("counts")["questions"])) >= 15 and len(set(pool("what")["questions"])) >= 20
    lesions = {group for group in GROUPS if "tumor" in group or "lesion" in group}
    assert pool("lesions").keys() == lesions
    for kinds in pool("lesions").values():
        assert kinds.keys() == {"polite", "command", "synonym"}
        assert all(len(set(questions)) >= 6 for questions in kinds.values())


@pytest.mark.parametrize("rule", [r for r in RULES.values() if r.parity], ids=lambda rule: rule.name)
def test_reference_words(rule) -> None:
    """The exact strings of the reference's dialogues around a question (spec 5.3, 5.7, 5.8)."""
    store, made = annotations(), setting(parity=True)
    study = next(s for s in STUDIES if rule.unfit(scene(s, made)) is None)
    text = shown(rule.make(scene(study, made, 1)), made, store)
    ct_call = "This looks like a CT image. Let me trigger <VISTA3D({})>. |\n"
    asked = "Use this result to respond to this prompt:\n"
    expected = {
        "ct_tumor": [
            "{CARDS}\n <image>This is a CT image.\n",
            ct_call.format("hepatic tumor"),
            "[expert]\nThe results are <image>. The colors in this image describe red: liver, blue: hepatic "
            "tumor. " + asked,
            "]\nyes|\n",
            "]\nThere are 3 hepatic tumors.|\n",
        ],
        "ct_segment": ["{CARDS}\n <image>This is a CT image.\n", "]\nI segmented the ", " using <VISTA3D("],
        "ct_what": [
            "]\nThis a CT image. It contains several anatomical structures such as identified by VISTA3D: "
            "red: "
        ],
        "mri_what": ["[user]\n<image>\n", "]\nThis is a brain MRI scan.|\n"],
        "mri_grade": [
            "{CARDS}\nT1(contrast enhanced): <image>, T1: <image>, T2: <image>, FLAIR: <image> These are "
            "different MRI modalities.\nWhat glioma grade is shown in the image?|\n",
            "]\nThis looks like an MRI image sequence. Let me first trigger <BRATS()>.|\n",
            "The results are <image>. The colors in this image describe\nyellow and red: tumor core, only "
            f"yellow: enhancing tumor, all colors: whole tumor\n{asked}What glioma grade is shown in the "
            "image?.|\n",
            "]\nThe scan indicates high grade glioma.|\n",
        ],
        "mri_segment": [
            "\nSegment any tumors in the image|\n",
            "]\nI segmented any brain tumors using <BRATS()>.|\n",
            "]\nAll tumors were segmented|\n",
        ],
        "cxr": [
            "{CARDS}\n<image> This is a CXR image.\nIs the heart large?|\n",
            "]\nThis looks like an chest x-ray. Let me first trigger <CXR()>.|\n",
            "[expert]\nThe resulting predictions are:\ncardiomegaly: yes\n",
            "edema: no\n. Analyze the image and take these predictions into account when responding to this "
            "prompt:\nIs the heart large?|\n",
        ],
    }
    for part in expected[rule.name]:
        assert part in text, part
    if rule.name == "mri_what":
        assert "{CARDS}" not in text
    if rule.name == "ct_segment":
        assert "[expert]" not in text


def test_reference_plural_of_one_and_of_several() -> None:
    key = "key of tumor"
    one = annotation_of(key, "VISTA3D", "lung tumor", {23: ("lung tumor", 8, 1)})
    made = setting(store_of(one), parity=True)
    example = RULES["ct_tumor"].make(scene(TUMOR, made))
    assert example.turns[-1].text == "There are 1 lung tumor."
    plain = RULES["ct_tumor"].make(scene(TUMOR, setting(store_of(one)), 3))
    assert "1 lung tumor" in plain.turns[3].text or "single lung tumor" in plain.turns[3].text


def labels(expert: str, args: str) -> st.SearchStrategy:
    universe = label_universe(expert, args) or {1: "core", 2: "edema", 4: "enhancing tumor"}
    boxes = st.tuples(st.integers(1, 10), st.integers(1, 9))
    chosen = st.dictionaries(st.sampled_from(sorted(universe)), boxes, max_size=12)
    return chosen.map(lambda d: {i: (universe[i], side, parts) for i, (side, parts) in d.items()})


VERDICTS = st.lists(
    st.builds(
        Verdict,
        check=st.just("volume_ml"),
        status=st.sampled_from(["pass", "warn", "fail", "unknown"]),
        message=st.sampled_from(["", "too <image> large", "touches the border"]),
    ),
    max_size=2,
).map(tuple)


@st.composite
def stores(draw):
    """Random results of every expert on every study, some of them failures."""
    made: list[Annotation] = []
    for key in ("key of tumor", "key of clean"):
        for expert, args in (
            *(("VISTA3D", a) for a in draw(st.sets(st.sampled_from(GROUPS)))),
            ("ORGANS", "organs"),
        ):
            if draw(st.booleans()):
                made.append(failed(key, expert, args, "no memory for patient Smith", verdicts=draw(VERDICTS)))
            else:
                found = draw(labels(expert, args))
                made.append(annotation_of(key, expert, args, found, verdicts=draw(VERDICTS)))
    made.append(annotation_of(brain_key(BRAIN), "BRATS", "", draw(labels("BRATS", ""))))
    names = st.sampled_from(["Cardiomegaly", "Effusion", "Lung_Opacity", "Pneumonia", "No Finding"])
    for expert in ("CXR", "PNEUMONIA"):
        found = draw(st.dictionaries(names, st.floats(0, 1), min_size=1))
        made.append(Annotation("key of film", expert, probabilities=found))
    return store_of(*made)


@settings(max_examples=25, deadline=None)
@given(stores(), st.integers(0, 10_000), st.booleans())
def test_any_annotation_gives_a_valid_dialogue_or_a_reason(store, seed, experts_on) -> None:
    for parity in (False, True):
        made = setting(store, parity)
        for study in STUDIES:
            for rule in RULES.values():
                if (parity and rule.parity is None) or rule.unfit(scene(study, made)) is not None:
                    continue
                try:
                    example = rule.make(scene(study, made, seed, experts_on))
                except Unfit as reason:
                    assert "too few" in str(reason)
                    continue
                text = shown(example, made, store, experts_on)  # validates, counts markers and images
                assert "{" not in text.replace("{CARDS}", "") and "Smith" not in text
                assert "[expert]" not in text or experts_on
                if not parity:
                    answers = [t for t in example.turns if t.supervised]
                    assert not any(parse_turn(t.text).calls for t in answers)
                again = rule.make(scene(study, made, seed, experts_on))
                assert example == again


def test_names_that_an_expert_brings_are_no_markers_and_no_calls() -> None:
    card = Card("MYTOOL", (), "CT", "segmentation", "anything", "unknown")
    names = {1: ("<image>", 8, 1), 2: ("{found} <MYTOOL()> lesion", 7, 2), 3: ("[INST] a\nb", 6, 1)}
    store = store_of(annotation_of("key of tumor", "MYTOOL", "", names))
    made = dataclasses.replace(setting(store), cards=(card,))
    for rule in ("ct_tumor", "ct_segment", "ct_what"):
        for seed in range(20):
            example = RULES[rule].make(scene(TUMOR, made, seed)).validate()
            for turn in example.turns[1:]:
                assert not re.search(r"[<>\[\]]", turn.text) and "\n" not in turn.text


def test_the_answer_is_what_the_annotation_says() -> None:
    """Presence and counts over many dialogues, read back from the text."""
    made = setting()
    for seed in range(200):
        turns = RULES["ct_tumor"].make(scene(TUMOR, made, seed)).turns
        assert turns[1].text.startswith("Yes") and re.search(r"\b3\b", turns[3].text)
        assert "hepatic tumors" in turns[3].text
        assert RULES["ct_tumor"].make(scene(CLEAN, made, seed)).turns[1].text.startswith("No")
        example = RULES["cxr_finding"].make(scene(FILM, made, seed))
        yes = example.meta["finding"] == "cardiomegaly"
        assert example.meta["finding"] in ("cardiomegaly", "effusion", "pleural thickening")
        assert example.turns[1].text.startswith("Yes" if yes else "No")


def test_specks_are_not_counted_and_doubtful_slices_not_asked_about() -> None:
    key = "key of tumor"
    specks = annotation_of(key, "VISTA3D", "hepatic tumor", {26: ("hepatic tumor", 6, 200)})
    made = setting(store_of(specks))
    texts = [t.text for s in range(30) for t in RULES["ct_tumor"].make(scene(TUMOR, made, s)).turns]
    assert not any("200" in text for text in texts)
    counted = setting(store_of(specks), min_lesion_ml=0.001)
    assert "200" in RULES["ct_tumor"].make(scene(TUMOR, counted, 0)).turns[3].text
    tiny = annotation_of(key, "VISTA3D", "hepatic tumor", {26: ("hepatic tumor", 2, 1)})
    with pytest.raises(Unfit, match="covers 4 pixels of the slice, too few"):
        RULES["ct_tumor"].make(scene(TUMOR, setting(store_of(tiny))))


def test_follow_ups_make_no_second_call_and_tell_what_was_told() -> None:
    made, store = setting(), annotations()
    kinds = collections.Counter()
    for seed in range(120):
        example = RULES["ct_what"].make(scene(TUMOR, made, seed))
        assert [r.before_turn for r in example.expert_requests] == [1]
        text = shown(example, made, store)
        assert text.count("[expert]") == 1
        told = re.search(r"describe (.*?)\. Volumes in ml: (.*?)\. ", text)
        for question, answer in zip(example.turns[2::2], example.turns[3::2], strict=True):
            volume = re.search(r"(\d+(?:\.\d)?) ml", answer.text)
            colour = re.search(r"\b(red|blue|yellow)\b", answer.text)
            kinds["volume" if volume else "colour" if colour else "absent"] += 1
            if volume:
                assert volume[1] in told[2]
            elif colour:
                name = next(n for n in ("liver", "spleen", "pancreas", "gallbladder", "vertebra")
                            if n in question.text)  # fmt: skip
                assert re.search(rf"{colour[1]}: {name}", told[1])
            else:
                assert answer.text.startswith("No,")
    assert min(kinds[kind] for kind in ("volume", "colour", "absent")) > 5


def test_rules_with_no_call_make_none_and_negatives_call_as_they_should() -> None:
    made = setting()
    calls = {
        rule: {
            tuple(r.expert for r in RULES[rule].make(scene(study, made, seed)).expert_requests)
            for seed in range(40)
        }
        for rule, study in (
            ("no_expert", TUMOR),
            ("wrong_modality", TUMOR),
            ("expert_failed", BAD),
            ("expert_doubted", BAD),
            ("experts_disagree", FILM),
            ("several_calls", TUMOR),
        )
    }
    assert calls["no_expert"] == calls["wrong_modality"] == {()}
    assert calls["expert_failed"] == calls["expert_doubted"] == {("VISTA3D",)}
    assert calls["experts_disagree"] == {("CXR", "PNEUMONIA")}
    assert all(len(made_calls) == 2 for made_calls in calls["several_calls"])


def test_wrong_modality_names_an_expert_of_another_one() -> None:
    made = setting()
    for study, own in ((TUMOR, "CT image"), (BRAIN, "MRI image"), (FILM, "chest X-ray")):
        named = set()
        for seed in range(60):
            answer = RULES["wrong_modality"].make(scene(study, made, seed)).turns[1].text
            assert own in answer
            named |= {card.name for card in CARDS if re.search(rf"\b{card.name}\b", answer)}
        reads = {
            "CT image": {"VISTA3D", "ORGANS"},
            "MRI image": {"BRATS"},
            "chest X-ray": {"CXR", "PNEUMONIA"},
        }
        assert named == {card.name for card in CARDS} - reads[own]


def test_doubts_are_passed_on_only_where_the_model_is_told() -> None:
    made = setting()
    quiet = dataclasses.replace(made, style=dataclasses.replace(made.style, verdicts=False))
    assert "not told of doubts" in RULES["expert_doubted"].unfit(scene(BAD, quiet))
    assert RULES["ct_segment"].unfit(scene(BAD, quiet)) is None
    assert "no usable annotation" in RULES["ct_segment"].unfit(scene(BAD, made))
    for seed in range(20):
        answer = RULES["expert_doubted"].make(scene(BAD, made, seed)).turns[1].text
        assert "a spleen of 900 ml is very large" in answer and "spleen (blue)" in answer


def test_an_implausible_result_is_nobodys_truth() -> None:
    wrong = annotation_of(
        "key of tumor", "VISTA3D", "organs", {1: ("liver", 9, 1)}, verdicts=(Verdict("modality", "fail"),)
    )
    assert "no usable" in RULES["ct_what"].unfit(scene(TUMOR, setting(store_of(wrong))))


def test_disagreement_by_volume_and_as_the_record_reports_it() -> None:
    key = "key of tumor"
    small = annotation_of(key, "ORGANS", "organs", {1: ("liver", 5, 1)})
    large = annotation_of(key, "VISTA3D", "organs", {1: ("liver", 9, 1)})
    answer = RULES["experts_disagree"].make(scene(TUMOR, setting(store_of(small, large)))).turns[1].text
    assert "3.2 ml" in answer and "1.0 ml" in answer and "ORGANS" in answer
    alike = annotation_of(key, "ORGANS", "organs", {1: ("liver", 9, 1)})
    assert RULES["experts_disagree"].unfit(scene(TUMOR, setting(store_of(alike, large)))) is not None
    reported = Disagreement("ORGANS", "organs", "1", "liver", "dice", 0.3)
    large = dataclasses.replace(large, disagreements=(reported,))
    answer = RULES["experts_disagree"].make(scene(TUMOR, setting(store_of(alike, large)))).turns[1].text
    assert "outline" in answer


def test_records_that_do_not_fit_say_why() -> None:
    made = setting()
    reasons = {
        "ct_tumor": (slice_study("other"), "no usable annotation of an expert for lesions"),
        "mri_grade": (brain_study(grade=None), "meta.grade is None, none of LGG, HGG"),
        "mri_segment": (TUMOR, "is of modality CT, the rule is for MRI"),
        "cxr": (dataclasses.replace(FILM, format="study", turns=()), "is a study, not a conversation"),
        "no_expert": (dataclasses.replace(TUMOR, images=()), "has no images"),
        "wrong_modality": (slice_study("tumor", "US"), "modality 'US' is none of CT, MRI, CXR"),
        "experts_disagree": (CLEAN, "no two experts disagree"),
        "several_calls": (BAD, "no usable annotation of a segmentation expert"),
    }
    for rule, (study, reason) in reasons.items():
        assert reason in RULES[rule].unfit(scene(study, made)), rule
    keyless = dataclasses.replace(TUMOR, meta={"modality": "CT"})
    assert "no meta.input_key" in RULES["ct_what"].unfit(scene(keyless, made))
    unnamed = dataclasses.replace(BRAIN, meta={**BRAIN.meta, "roles": None})
    assert "no meta.roles that tell them apart" in RULES["mri_what"].unfit(scene(unnamed, made))


def test_words() -> None:
    assert plural("bone lesion") == "bone lesions" and said("vertebrae T12") == "vertebra T12"
    assert split_row("slices:ct_tumor") == ("slices", RULES["ct_tumor"]) and split_row("films") == (
        "films",
        None,
    )
    with pytest.raises(
        UserError, match="'slices:tumours' names no rule of dialogues; use NAME:RULE with one of ct_tumor"
    ):
        split_row("slices:tumours")


# The stream and the loader


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Fourteen slices of a CT, two of them without annotations."""
    root = tmp_path_factory.mktemp("dialogues")
    key = ct_volume(root / "slices")
    names = {name: number for number, name in label_table("VISTA3D").items()}
    labels_map = np.zeros((10, 12, 14), np.uint8)
    labels_map[1:6, 1:9] = names["liver"]
    labels_map[6:9, 2:12, 7:] = names["hepatic tumor"]
    parts = [
        Segment(names[n], n, 500, 50.0, c, (0, 0, 0, 9, 9, 9))
        for n, c in (("liver", 1), ("hepatic tumor", 2))
    ]
    encoded = LabelMap.encode(labels_map, np.eye(4))
    results = [
        Annotation(key, "VISTA3D", args, segments=tuple(parts), labels=encoded)
        for args in ("hepatic tumor", "organs")
    ]
    annotate(root / "said", results)
    examples = [
        Example(
            f"slice{i}",
            "study",
            (ImageRef(path="ct.nii.gz", axis=2, index=i, modality="CT"),),
            meta={"modality": "CT", "input_key": key if i < 12 else "unknown", "patient": f"p{i}"},
        )
        for i in range(14)
    ]
    write(root / "slices", examples)
    write(root / "slices", examples[:4], "heldout")
    return root


MIXTURE = (("slices:ct_tumor", 0.5), ("slices:ct_segment", 0.3), ("slices:wrong_modality", 0.2))


def loader(world, mixture=MIXTURE, split="train", **data):
    cfg = config(world, mixture, annotations=str(world / "said"), experts="on", seq_len=2048, **data)
    cfg.model.cards, cfg.model.expert_verdicts = "experts", False
    return build(cfg, split)


@pytest.mark.filterwarnings("ignore::vilam3_jax.errors.InputWarning")
def test_batches_are_the_same_again_and_resume_exactly(world) -> None:
    first = loader(world)
    batches = take(first, 2)
    assert first.stats.skipped == []
    assert same(batches, take(loader(world), 2))
    resumed = loader(world)
    state = None
    for _ in zip(range(1), resumed, strict=False):
        state = resumed.get_state()
    again = loader(world)
    again.set_state(state)
    assert same(take(again, 1), batches[1:])
    other = loader(world, MIXTURE[:2])
    with pytest.raises(UserError, match="other data"):
        other.set_state(state)
    for one in (first, resumed, again, other):
        one.close()


@pytest.mark.filterwarnings("ignore::vilam3_jax.errors.InputWarning")
def test_a_record_is_met_differently_in_every_epoch_and_the_same_at_a_position(world) -> None:
    source = ExampleSource(world / "slices", "train")
    made = setting(AnnotationStore(world / "said"))
    (ruled,) = under_rules(source, [RULES["ct_segment"]], made, seed=3)
    texts = [ruled.dialogue(2, position, True).turns for position in range(0, 120, 12)]
    assert len(set(texts)) > 6
    assert texts == [ruled.dialogue(2, position, True).turns for position in range(0, 120, 12)]
    (other,) = under_rules(source, [RULES["ct_segment"]], made, seed=4)
    assert [other.dialogue(2, position, True).turns for position in range(0, 120, 12)] != texts


def test_left_out_records_are_counted_and_named_before_training(world) -> None:
    with pytest.warns(
        InputWarning, match=r"slices:ct_tumor: left out 2 records: no usable annotation of an"
    ) as warned:
        one = loader(world)
    assert len(warned) == 2  # wrong_modality fits all
    made = one.provenance[0]
    assert made["name"] == "slices:ct_tumor" and made["records"] == 12
    ((reason, count),) = made["provenance"]["dialogues"]["left_out"].items()
    assert count == 2 and reason.endswith("(first: slice12)")
    one.close()
    with pytest.raises(
        UserError, match=r"slices:mri_grade has no record that its rule fits \(14 records: is of mod"
    ):
        loader(world, (("slices:mri_grade", 1.0),))
    with pytest.raises(UserError, match="no dataset of the mixture"):
        loader(world, (("slices:mri_grade", 1.0),), "heldout")
    with pytest.raises(UserError, match=r"annotations is empty, but data\.mixture has rules"):
        build(config(world, MIXTURE))
    with pytest.raises(UserError, match=r"set model\.expert_wording='vila_m3'"):
        loader(world, MIXTURE, dialogue_parity=True)


@pytest.mark.filterwarnings("ignore::vilam3_jax.errors.InputWarning")
def test_the_mixture_keeps_its_weights(world) -> None:
    """A weight counts epochs of the records that a rule fits; each prefix is off by at most one draw."""
    sources = stream.open_sources(world, MIXTURE, "train", setting(_store(world)), 0)
    order = stream.SampleStream(sources, 0, endless=True)
    shares = [weight * len(source) for source, weight in sources]
    counts: collections.Counter[int] = collections.Counter()
    for position in range(200):
        for number, share in enumerate(shares):
            assert math.isclose(counts[number], position * share / sum(shares), abs_tol=1)
        counts[order.address(position)[0]] += 1
    assert [type(source) for source in order.sources] == [DialogueSource] * 3


@pytest.mark.filterwarnings("ignore::vilam3_jax.errors.InputWarning")
@pytest.mark.parametrize("mode", ["off", "falsified", "mixed"])
def test_modes(world, mode) -> None:
    cfg = config(world, MIXTURE, annotations=str(world / "said"), experts=mode, seq_len=2048)
    cfg.model.cards = "experts"
    one = build(cfg)
    take(one, 2)
    assert one.stats.skipped == [] and one.stats.samples > 0
    one.close()
    heldout = build(cfg, "heldout")
    assert sum(1 for _ in heldout) > 0 and heldout.stats.samples == 12
    heldout.close()


def test_show_prints_a_dialogue_and_says_what_is_wrong(world, capsys) -> None:
    common = ["--data", str(world / "slices"), "--annotations", str(world / "said"), "--cards", "experts"]
    ruled = [*common, "--dataset", "slices:ct_tumor", "--size", "16", "--index", "8"]
    assert show([*ruled, "--experts", "on"]) == 0
    first = capsys.readouterr().out
    assert "Let me trigger <VISTA3D(hepatic tumor)>." in first and "<image 2>" in first and "> Yes" in first
    assert show([*ruled, "--experts", "on", "--position", "1"]) == 0
    assert capsys.readouterr().out != first
    assert show(ruled) == 0
    assert "trigger" not in capsys.readouterr().out
    assert show([*ruled, "--experts", "on", "--parity"]) == 0
    assert "> yes\n" in capsys.readouterr().out
    for arguments, reason in (
        (
            [*ruled[:-1], "13"],
            "example slice13: rule ct_tumor: no usable annotation of an expert for lesions",
        ),
        (
            [*common, "--dataset", "slices:no_expert", "--parity"],
            "the reference has no dialogues of the rule",
        ),
        ([*common, "--dataset", "slices:none"], "names no rule of dialogues"),
        ([*common[:2], "--dataset", "slices:ct_what"], "--dataset slices:ct_what: requires --annotations"),
        (common, "contains only images; name a rule"),
    ):
        with pytest.raises(UserError, match=re.escape(reason)):
            show(arguments)


def test_a_study_without_a_rule_is_named(world) -> None:
    with pytest.raises(UserError, match=r"contains only images; name a rule in data\.mixture"):
        take(build(config(world, (("slices", 1.0),))), 1)


def test_what_the_expert_repeats_is_what_inference_repeats() -> None:
    """The question of a request equals the question parsed from the turn, as at inference."""
    for made in (setting(), setting(parity=True)):
        for study in (TUMOR, BRAIN, FILM):
            for rule in RULES.values():
                if rule.unfit(scene(study, made)) is None:
                    example = rule.make(scene(study, made, 5))
                    for request in example.expert_requests:
                        user = example.turns[request.before_turn - 1]
                        assert request.question == question_of(user.text)


def _store(world):
    return AnnotationStore(world / "said")
