"""PMC-VQA, OmniMedVQA and MedXpertQA, with lettered options and named rows."""

import random
import re
from typing import Any

import pytest
from twins import made, picture, write

from vilam3_jax.datasets import multiple_choice, rows
from vilam3_jax.datasets.dataset import SkipItem
from vilam3_jax.datasets.medxpert_qa import MedXpertQa
from vilam3_jax.datasets.omni_med_vqa import OmniMedVqa, modality_of
from vilam3_jax.datasets.pmc_vqa import PmcVqa
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

ASK = "Answer with the letter and the text of the right option."


def texts(example):
    return [turn.text for turn in example.turns]


def reasons(skipped):
    return {one.record: one.reason for one in skipped}


# --- options


def test_options_lose_their_own_letter_only():
    found = multiple_choice.lettered_options({"B": " B: B cells", "A": "A. baumannii", "C": "A: x", "D": 4})
    assert found == {"A": "A. baumannii", "B": "B cells", "C": "A: x", "D": "4"}


def test_options_lose_letters_that_all_of_them_have():
    found = multiple_choice.lettered_options({"A": "A. liver", "B": "(B) spleen", "C": "C) heart"})
    assert found == {"A": "liver", "B": "spleen", "C": "heart"}
    assert multiple_choice.right_letter(found, text="B. Spleen") == "B"
    with pytest.raises(SkipItem, match="none of the options"):
        multiple_choice.right_letter(found, text="A. spleen")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"A": "x"}, "fewer than two"),
        ({"A": "x", "B": ["y"]}, "option B is a list"),
        ({"A": "x", "B": None}, "option B is missing"),
        ({"A": "x", "B": " B: "}, "option B is empty"),
        ({"1": "x", "2": "y"}, "not named by letters"),
    ],
)
def test_options_that_cannot_be_used(options, reason):
    with pytest.raises(SkipItem, match=reason):
        multiple_choice.lettered_options(options)


@pytest.mark.parametrize("text", ["Left lung", "Left lung.", " left  LUNG ", "'Left lung'"])
def test_answer_is_the_option_of_equal_text(text):
    assert multiple_choice.right_letter({"A": "Lung", "B": "Left lung"}, text=text) == "B"


def test_exact_text_comes_before_text_without_punctuation():
    assert multiple_choice.right_letter({"A": "T1.", "B": "T1"}, text="T1") == "B"
    assert multiple_choice.right_letter({"A": "+", "B": "..."}, text="...") == "B"
    with pytest.raises(SkipItem, match="several of the options"):
        multiple_choice.right_letter({"A": "t1.", "B": "T1"}, text="T1:")
    with pytest.raises(SkipItem, match="none of the options"):
        multiple_choice.right_letter({"A": "t1", "B": "t2"}, text="t")


def test_letter_and_text_must_agree():
    options = {"A": "liver", "B": "spleen"}
    assert multiple_choice.right_letter(options, letter="(b)", text="the spleen") == "B"
    with pytest.raises(SkipItem, match="different options"):
        multiple_choice.right_letter(options, letter="B", text="liver")
    with pytest.raises(SkipItem, match="letter is not an option"):
        multiple_choice.right_letter(options, letter="E")


def test_shuffling_keeps_the_answer_and_depends_on_the_generator():
    asked = multiple_choice.Choice("Which?", ("one", "two", "three", "four"), 2)
    orders = {asked.shuffled(random.Random(seed)) for seed in range(50)}
    assert len(orders) > 10 and {one.answer for one in orders} == {"three"}
    assert asked.shuffled(random.Random(1)) == asked.shuffled(random.Random(1))


@pytest.mark.parametrize("last", ["None of the above", "Both A and B", "A and C", "All of these", "Option B"])
def test_options_that_speak_of_others_stay_where_they_are(last):
    asked = multiple_choice.Choice("Which?", ("one", "two", "three", last), 0)
    assert all(asked.shuffled(random.Random(seed)) == asked for seed in range(20))


def test_rows_have_ids_of_their_own_whatever_the_source_says():
    values = [
        {"id": "a"},
        {"id": "a"},
        {"id": "a/2"},
        {"id": None},
        {"id": "x\ny"},
        [],
        {"id": 7},
        {"id": True},
    ]
    found = rows.rows_of("t.json", enumerate(values, 1), lambda row: row["id"], prefix="test")
    assert [row.id for row in found] == [
        "test/a", "test/a/2", "test/a/2/2", "test/row-4", "test/row-5", "test/row-6", "test/7", "test/row-8",
    ]  # fmt: skip


# --- PMC-VQA

V1 = [
    "Figure_path",
    "Caption",
    "Question",
    "Anwser",
    "Choice A",
    "Choice B",
    "Choice C",
    "Choice D",
    "Answer_label",
]
V2 = [
    "index",
    "Figure_path",
    "Caption",
    "Question",
    "Choice A",
    "Choice B",
    "Choice C",
    "Choice D",
    "Answer",
    "split",
]


def pmc_v1(figure, answer, label, *, options=("kidney", "liver", "spleen", "heart")):
    letters = [f" {letter}:{text}" for letter, text in zip("ABCD", options, strict=True)]
    return [figure, "a caption", f"Which organ is in {figure}?", answer, *letters, label]


def pmc_v2(index, figure, answer, split="train"):
    return [
        index,
        figure,
        "a caption",
        "Which organ?",
        "A: kidney",
        "B: liver",
        "C: spleen",
        "D: heart",
        answer,
        split,
    ]


@pytest.fixture
def pmc(tmp_path):
    return write(
        tmp_path,
        {
            "train.csv": [V1, pmc_v1("PMC1_F1.jpg", "liver", "B"), pmc_v1("PMC2_F1.jpg", "heart", "D")],
            "test.csv": [V1, pmc_v1("PMC3_F1.jpg", "spleen", "C"), pmc_v1("PMC4_F1.jpg", "kidney", "A")],
            "test_clean.csv": [V1, pmc_v1("PMC3_F1.jpg", "spleen", "C")],
            **{f"images/PMC{n}_F1.jpg": picture(n) for n in range(1, 5)},
            "train_2.csv": [V2, pmc_v2(4, "PMC1_F1.jpg", "B"), pmc_v2(9, "PMC5_F1_2.jpg", "A")],
            "test_2.csv": [V2, pmc_v2(4, "PMC6_F1_1.jpg", "D", "test")],
            **{
                f"figures/{name}.jpg": picture(n)
                for n, name in enumerate(["PMC1_F1", "PMC5_F1_2", "PMC6_F1_1"], 10)
            },
        },
    )


def test_pmc_vqa_v1(pmc):
    examples, skipped = made(PmcVqa, pmc)
    assert not any(skipped.values())
    assert {name: [one.id for one in found] for name, found in examples.items()} == {
        "train": ["train/row-1", "train/row-2"],
        "test": ["test/row-1", "test/row-2"],
        "test_clean": ["test_clean/row-1"],
    }
    first = examples["test"][0]
    assert texts(first) == [
        "<image>\nWhich organ is in PMC3_F1.jpg?\nA. kidney\nB. liver\nC. spleen\nD. heart\n" + ASK,
        "C. spleen",
    ]
    assert [turn.supervised for turn in first.turns] == [False, True]
    assert first.images[0].data == picture(3)
    assert first.meta["article"] == "PMC3" and first.meta["split"] == "test"
    assert first.meta["licence"] == "CC-BY-SA-4.0" and "caption" not in str(first.meta)
    (qa,) = first.meta["qa"]
    assert (qa["answer"], qa["options"]) == ("spleen", ["kidney", "liver", "spleen", "heart"])
    assert qa["question"] == "Which organ is in PMC3_F1.jpg?" and qa["label_source"] == "generated"
    train = {one.meta["group"] for one in examples["train"]}
    assert not train & {one.meta["group"] for one in examples["test"]}


def test_pmc_vqa_shuffles_training_questions_only(pmc):
    count = 40
    lines = [pmc_v1("PMC1_F1.jpg", "liver", "B") for _ in range(count)]
    write(pmc, {"train.csv": [V1, *lines], "test.csv": [V1, *lines]})
    examples, _ = made(PmcVqa, pmc)
    letters = [texts(one)[1][0] for one in examples["train"]]
    assert set(letters) == set("ABCD")
    assert letters == [texts(one)[1][0] for one in made(PmcVqa, pmc)[0]["train"]]
    assert {texts(one)[1] for one in examples["test"]} == {"B. liver"}
    for one in examples["train"]:
        assert one.meta["qa"][0]["answer"] == "liver" and texts(one)[1][3:] == "liver"
        assert f"\n{texts(one)[1]}\n" in texts(one)[0]


def test_pmc_vqa_v2_looks_in_its_own_folder(pmc):
    examples, skipped = made(PmcVqa, pmc, "v2")
    assert not any(skipped.values())
    assert [one.id for one in examples["train"]] == ["train/4", "train/9"]
    assert [one.id for one in examples["test"]] == ["test/4"]
    assert examples["train"][0].images[0].data == picture(10) != picture(1)
    assert texts(examples["test"][0])[1] == "D. heart"
    assert examples["test"][0].meta["source_split"] == "test"
    with pytest.raises(UserError, match=r"figures missing\. Fetch from https") as caught:
        (pmc / "figures").rename(pmc / "elsewhere")
        made(PmcVqa, pmc, "v2")
    assert "train_2.csv missing" not in str(caught.value)


def test_pmc_vqa_reads_columns_by_name(pmc):
    """The answer may be a text or a letter; columns vary in spelling, order and presence."""
    header = ["Choice D", "Question", "Answer", "Choice B", "Choice C", "Choice A", "Figure_path"]
    row = ["D:heart", "Which?", "Spleen.", " B:liver", " C:spleen", " A:kidney", "PMC1_F1.jpg"]
    write(pmc, {"test.csv": [header, row, [*row[:2], "C", *row[3:]], [*row[:2], " C:spleen", *row[3:]]]})
    examples, skipped = made(PmcVqa, pmc)
    assert [texts(one)[1] for one in examples["test"]] == ["C. spleen"] * 3 and not skipped["test"]
    write(pmc, {"test.csv": [["Figure_path", "Question"], ["PMC1_F1.jpg", "Which?"]]})
    with pytest.raises(
        UserError, match=r"test\.csv: no column Choice A.*Choice D.*, Answer or Anwser; it has"
    ):
        made(PmcVqa, pmc)


def test_pmc_vqa_letters_that_are_texts_too(pmc):
    options = ("B", "A", "AB", "O")
    write(pmc, {"test.csv": [V1[:-1], pmc_v1("PMC1_F1.jpg", "A", "", options=options)[:-1]]})
    assert texts(made(PmcVqa, pmc)[0]["test"][0])[1] == "B. A"
    row = pmc_v2(1, "PMC1_F1.jpg", "A")
    row[4:8] = [f"{letter}: {text}" for letter, text in zip("ABCD", options, strict=True)]
    write(pmc, {"test_2.csv": [V2, row]})
    assert texts(made(PmcVqa, pmc, "v2")[0]["test"][0])[1] == "A. B"


def test_pmc_vqa_rows_that_cannot_be_used(pmc):
    bad = [
        pmc_v1("PMC9_F1.jpg", "liver", "B"),
        pmc_v1("../train.csv", "liver", "B"),
        pmc_v1("", "liver", "B"),
        pmc_v1("PMC1_F1.jpg", "liver", "C"),
        pmc_v1("PMC1_F1.jpg", "lung", ""),
        pmc_v1("PMC1_F1.jpg", "", ""),
        pmc_v1("PMC1_F1.jpg", "liver", "B", options=("", "liver", "x", "y")),
        ["PMC1_F1.jpg"],
        pmc_v1("PMC1_F1.jpg", "liver", "B"),
    ]
    write(pmc, {"train.csv": [V1, *bad]})
    examples, skipped = made(PmcVqa, pmc)
    assert [one.id for one in examples["train"]] == ["train/row-9"]
    found = reasons(skipped["train"])
    assert list(found) == [f"train.csv row {n}" for n in range(1, 9)]
    expected = [
        "is missing",
        "leaves",
        "is empty",
        "different",
        "none of",
        "answer is empty",
        "A is empty",
        "empty",
    ]
    for reason, words in zip(found.values(), expected, strict=True):
        assert words in reason


def test_pmc_vqa_names_all_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"images, train\.csv, test\.csv, test_clean\.csv missing\. Fetch"):
        made(PmcVqa, tmp_path)


# --- OmniMedVQA


def omni(number, answer: Any = "Left lung", **more):
    row = {
        "dataset": "Chest CT Scan",
        "question_id": f"Chest CT Scan_{number:04d}",
        "question_type": "Anatomy Identification",
        "question": "What is shown?",
        "gt_answer": answer,
        "image_path": f"Images/Chest CT Scan/test/{number}.png",
        "option_A": "Liver",
        "option_B": "Left lung",
        "option_C": "Right lung",
        "option_D": "Brain",
        "modality_type": "CT(Computed Tomography)",
    } | more
    return {key: value for key, value in row.items() if value != "absent"}


def write_omni(folder, rows, name="Chest CT Scan", base=""):
    return write(
        folder,
        {
            f"{base}QA_information/Open-access/{name}.json": rows,
            **{f"{base}Images/Chest CT Scan/test/{n}.png": picture(n, kind="PNG") for n in range(8)},
        },
    )


@pytest.mark.parametrize("base", ["", "OmniMedVQA/"])
def test_omni_med_vqa(tmp_path, base):
    two = omni(2, "liver.", option_C="absent", option_D="absent", modality_type="absent", modality="X-Ray")
    write_omni(tmp_path, [omni(1), two], base=base)
    write_omni(tmp_path, [omni(3, "Brain", question_id="Knee_0001", dataset="Knee")], "Knee", base)
    write(tmp_path, {f"{base}QA_information/Restricted-access/Other.json": [omni(4)]})
    examples, skipped = made(OmniMedVqa, tmp_path)
    assert list(examples) == ["test"] and not skipped["test"]
    first, second, third = examples["test"]
    assert [one.id for one in examples["test"]] == ["Chest CT Scan_0001", "Chest CT Scan_0002", "Knee_0001"]
    assert texts(first) == [
        "<image>\nWhat is shown?\nA. Liver\nB. Left lung\nC. Right lung\nD. Brain\n" + ASK,
        "B. Left lung",
    ]
    assert texts(second) == ["<image>\nWhat is shown?\nA. Liver\nB. Left lung\n" + ASK, "A. Liver"]
    assert first.images[0].data == picture(1, kind="PNG")
    assert (first.meta["modality"], second.meta["modality"]) == ("CT", "CXR")
    assert third.meta["source"] == "Knee"
    assert first.meta["qa"][0]["type"] == "Anatomy Identification"
    assert second.meta["qa"][0]["answer"] == "Liver" and second.meta["qa"][0]["options"] == [
        "Liver",
        "Left lung",
    ]


def test_omni_med_vqa_refuses_the_restricted_part(tmp_path):
    with pytest.raises(UserError, match="restricted part of omni_med_vqa is not supported"):
        OmniMedVqa(config="restricted")
    write(tmp_path, {"QA_information/Restricted-access/Other.json": [omni(1)]})
    with pytest.raises(UserError, match="restricted part of omni_med_vqa is not supported"):
        made(OmniMedVqa, tmp_path)
    (tmp_path / "QA_information/Open-access").mkdir()
    with pytest.raises(UserError, match="Images missing"):
        made(OmniMedVqa, tmp_path)
    (tmp_path / "Images").mkdir()
    with pytest.raises(UserError, match="has no JSON files"):
        made(OmniMedVqa, tmp_path)


@pytest.mark.parametrize(
    "row, reason",
    [
        (omni(1, "Heart"), "none of the options"),
        (omni(1, ["Liver"]), "answer is a list"),
        (omni(1, None), "answer is missing"),
        (omni(1, option_D="Left lung"), "several of the options"),
        (omni(1, option_A=None), "option A is missing"),
        (omni(1, question=7.5), None),
        (omni(1, question={}), "question is a dict"),
        (omni(1, image_path=None), "image name is missing"),
        (omni(1, image_path="Images/none.png"), "image Images/none.png is missing"),
        (omni(1, image_path="../../etc/passwd"), "leaves"),
        ("text", "the row is a str"),
        (None, "the row is a NoneType"),
        (omni(1, modality_type=None, question_type=[], dataset=None), None),
    ],
)
def test_omni_med_vqa_rows_that_cannot_be_used(tmp_path, row, reason):
    write_omni(tmp_path, [row, omni(2)])
    examples, skipped = made(OmniMedVqa, tmp_path)
    if reason is None:
        assert len(examples["test"]) == 2
    else:
        (one,) = skipped["test"]
        assert re.search(reason, one.reason) and one.record.endswith("Chest CT Scan.json row 1")
        assert [one.id for one in examples["test"]] == ["Chest CT Scan_0002"]


def test_omni_med_vqa_repeated_question_ids_and_damaged_files(tmp_path):
    write_omni(tmp_path, [omni(1), omni(1)])
    examples, _ = made(OmniMedVqa, tmp_path)
    assert [one.id for one in examples["test"]] == ["Chest CT Scan_0001", "Chest CT Scan_0001/2"]
    write(tmp_path, {"QA_information/Open-access/Bad.json": "[{"})
    with pytest.raises(UserError, match=r"Bad\.json: is not JSON"):
        made(OmniMedVqa, tmp_path)


@pytest.mark.parametrize(
    "stated, source, word",
    [
        ("MR (Mag-netic Resonance Imaging)", "Brain", "MR"),
        ("OCT (Optical Coherence Tomography", "Retina", "OCT"),
        ("X-Ray", "CoronaHack", "CXR"),
        ("X-Ray", "Mura", "XR"),
        ("Fundus Photography", "x", "FUNDUS"),
        ("ultrasound", "x", "US"),
        ("Microscopy Images", "x", "MICROSCOPY"),
        ("Infrared Reflectance Imaging", "x", "INFRARED REFLECTANCE IMAGING"),
        ("", "x", ""),
    ],
)
def test_omni_med_vqa_modalities(stated, source, word):
    assert modality_of(stated, source) == word


# --- MedXpertQA


def expert_question(number, label, images, folder="MM", letters="ABCDE"):
    options = {letter: f"option {letter.lower()}" for letter in reversed(letters)}
    listed = " ".join(f"({letter}) option {letter.lower()}" for letter in letters)
    row = {
        "id": f"{folder}-{number}",
        "question": f"A patient has a cough.\nWhat next?\nAnswer Choices: {listed}",
        "options": options,
        "label": label,
        "medical_task": "Diagnosis",
        "body_system": "Respiratory",
        "question_type": "Reasoning",
    }
    return row if images is None else row | {"images": images}


@pytest.fixture
def medxpert(tmp_path):
    ten = "ABCDEFGHIJ"
    return write(
        tmp_path,
        {
            "MM/dev.jsonl": [expert_question(1, "A", ["MM-1-a.jpeg"])],
            "MM/test.jsonl": [
                expert_question(2, "E", ["MM-2-a.png", "MM-2-b.JPG"]),
                expert_question(3, "B", ["images/MM-3-a.jpeg"]),
            ],
            "Text/dev.jsonl": [expert_question(1, "J", None, "Text", ten)],
            "Text/test.jsonl": [expert_question(2, "C", None, "Text", ten)],
            "images/MM-1-a.jpeg": picture(1),
            "images/MM-2-a.png": picture(2, kind="PNG"),
            "images/MM-2-b.JPG": picture(3),
            "images/MM-3-a.jpeg": picture(4),
        },
    )


def test_medxpert_qa_mm(medxpert):
    examples, skipped = made(MedXpertQa, medxpert)
    assert not any(skipped.values())
    assert [one.id for one in examples["validation"]] == ["MM-1"]
    first, second = examples["test"]
    assert texts(first) == [
        "<image>\n<image>\nA patient has a cough.\nWhat next?\nA. option a\nB. option b\nC. option c\n"
        "D. option d\nE. option e\n" + ASK,
        "E. option e",
    ]
    assert [image.data for image in first.images] == [picture(2, kind="PNG"), picture(3)]
    assert texts(second)[1] == "B. option b" and second.images[0].data == picture(4)
    (qa,) = first.meta["qa"]
    assert qa["question"] == "A patient has a cough.\nWhat next?" and qa["type"] == "Reasoning"
    assert qa["answer"] == "option e" and len(qa["options"]) == 5
    assert first.meta["medical_task"] == "Diagnosis" and first.meta["body_system"] == "Respiratory"


def test_medxpert_qa_text(medxpert):
    examples, skipped = made(MedXpertQa, medxpert, "text")
    assert not any(skipped.values())
    (one,) = examples["validation"]
    assert one.id == "Text-1" and not one.images
    assert texts(one)[1] == "J. option j" and "<image>" not in texts(one)[0]
    assert [turn.text.count("option") for turn in one.turns] == [11, 1]  # ten options and the request


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"options": [{"letter": "A", "content": "x"}]}, "not an object of letter and text"),
        ({"options": {"A": "x", "B": None}}, "option B is missing"),
        ({"label": ["A"]}, "label is a list"),
        ({"label": "F"}, "letter is not an option"),
        ({"label": None}, "label is missing"),
        ({"question": "Answer Choices: (A) x (B) y"}, "question before its options is empty"),
        ({"question": None}, "question is missing"),
        ({"images": []}, "names no images"),
        ({"images": "MM-2-a.png"}, "names no images"),
        ({"images": [{"image_path": "MM-2-a.png"}]}, "image name is a dict"),
        ({"images": ["MM-2-a.png", "gone.png"]}, "gone.png is missing"),
        ({"images": ["../MM/dev.jsonl"]}, "leaves"),
    ],
)
def test_medxpert_qa_rows_that_cannot_be_used(medxpert, change, reason):
    row = expert_question(9, "A", ["MM-2-a.png"])
    write(medxpert, {"MM/test.jsonl": [row | change, row]})
    examples, skipped = made(MedXpertQa, medxpert)
    (one,) = skipped["test"]
    assert one.record == "MM/test.jsonl row 1" and re.search(reason, one.reason)
    assert [one.id for one in examples["test"]] == ["MM-9/2"]


def test_medxpert_qa_lines_that_are_no_json(medxpert):
    good = (medxpert / "MM/test.jsonl").read_bytes()
    write(medxpert, {"MM/test.jsonl": b"{\n[1]\n\xff\xfe{}\n" + good})
    examples, skipped = made(MedXpertQa, medxpert)
    assert [one.id for one in examples["test"]] == ["MM-2", "MM-3"]
    assert [one.record for one in skipped["test"]] == [f"MM/test.jsonl row {n}" for n in (1, 2, 3)]


def test_medxpert_qa_question_without_a_list_of_options(medxpert):
    row = expert_question(9, "A", ["MM-2-a.png"]) | {"question": "Which Answer Choices: apply? "}
    write(medxpert, {"MM/test.jsonl": [row]})
    (one,) = made(MedXpertQa, medxpert)[0]["test"]
    assert one.meta["qa"][0]["question"] == "Which Answer Choices: apply?"


def test_expected_counts_are_the_official_ones(medxpert):
    split = MedXpertQa().splits(SourceFolder(medxpert))["test"]
    assert split.expected == 2_000
    assert MedXpertQa(config="text").splits(SourceFolder(medxpert))["test"].expected == 2_450
