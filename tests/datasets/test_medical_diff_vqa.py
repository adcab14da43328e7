"""Medical-Diff-VQA from synthetic copies of its two tables."""

import argparse

import pytest

from tests.datasets.mimic_twin import FILMS, release
from tests.datasets.twins import made
from vilam3_jax.datasets.medical_diff_vqa import MedicalDiffVqa
from vilam3_jax.errors import UserError

TABLE = "mimic_pair_questions.csv"
ALL = [
    ["subject_id", "study_id", "Edema", "dicom_id", "view", "split", "study_date", "study_order"],
    ["90000001", "80000001", "1", "a2", "lateral", "train", "21800101", "1.0"],
    ["90000001", "80000001", "1", "a1", "postero-anterior", "train", "21800101", "1.0"],
    ["90000001", "80000002", "", "a3", "antero-posterior", "train", "21800102", "2.0"],
    ["90000002", "80000003", "", "b1", "left lateral", "train", "21800103", "1.0"],
    ["90000003", "80000004", "", "c1", "AP", "validate", "21800103", "1.0"],
    ["91000004", "80000005", "", "d1", "PA", "test", "21800103", "1.0"],
    ["91000004", "80000006", "", "d2", "PA", "test", "21800104", "2.0"],
]
HEADER = ["study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split"]
FIRST = [
    [
        "80000001",
        "90000001",
        "80000002",
        "abnormality",
        "what abnormalities are seen?",
        "edema, nodule",
        "train",
    ],
    ["80000001", "90000001", "80000002", "presence", "is there edema?", "yes", "test"],
    ["80000001", "90000001", "", "abnormality", "what abnormalities are seen?", "nodule, edema", "train"],
    ["80000003", "90000002", "0", "view", "which view is this image taken?", "nodule view", "val"],
    ["80000004", "90000003", "", "presence", "is there edema?", "no", "train"],
    ["80000005", "91000004", "80000006", "level", "what level is the edema?", "mild", "train"],
    ["80000002", "90000001", "80000001", "difference", "what has changed?", "less edema", "train"],
]


def source(folder, rows=FIRST, films=ALL, **changes):
    tables = {TABLE: [HEADER, *rows], "mimic_all.csv": films}
    return release(folder, FILMS, {**tables, **changes})


def by_id(examples):
    return {example.id: example for split in examples.values() for example in split}


def test_a_conversation_for_each_film_split_by_patients(tmp_path):
    examples, skipped = made(MedicalDiffVqa, source(tmp_path))
    assert not any(skipped.values())
    # A study is represented by its first frontal film, otherwise by its first film.
    assert {name: [e.id for e in es] for name, es in examples.items()} == {
        "train": ["a1", "b1"],
        "validation": ["c1"],
        "test": ["d1"],
    }
    example = by_id(examples)["a1"]
    assert [(t.role, t.text) for t in example.turns] == [
        ("user", "what abnormalities are seen?\n<image>"),
        ("assistant", "edema, nodule"),
        ("user", "is there edema?"),
        ("assistant", "yes"),
    ]
    assert [(q["type"], q["answer_type"], q["options"]) for q in example.meta["qa"]] == [
        ("abnormality", "open", []),
        ("presence", "closed", ["yes", "no"]),
    ]
    assert [r.policy for r in example.expert_requests] == ["optional"]
    assert not by_id(examples)["b1"].expert_requests  # a lateral film
    assert MedicalDiffVqa().shared_images == ""


def test_no_patient_is_in_two_splits_by_default(tmp_path):
    films = [*ALL[:-1], [*ALL[-1][:5], "train", *ALL[-1][6:]]]  # one patient in test and train
    rows = [*FIRST, ["80000006", "91000004", "", "level", "what level?", "mild", "train"]]
    examples, skipped = made(MedicalDiffVqa, source(tmp_path, rows, films))
    patients = {name: {e.meta["patient"] for e in es} for name, es in examples.items()}
    assert not patients["train"] & patients["test"] and not patients["train"] & patients["validation"]
    assert [(s.record, s.reason) for s in skipped["train"]] == [
        (f"{TABLE} row 8", "its patient is in the test split too")
    ]


def test_the_files_own_split_shares_patients_and_says_so(tmp_path):
    argv = ["--split-by", "file"]
    examples, _ = made(MedicalDiffVqa, source(tmp_path), argv=argv)
    assert {name: [e.id for e in es] for name, es in examples.items()} == {
        "train": ["train/a1", "train/c1", "train/d1"],
        "test": ["test/a1"],
        "validation": ["validation/b1"],
    }
    options = argparse.Namespace(split_by="file")
    assert "patients" in MedicalDiffVqa(options).shared_images


def test_differences_have_the_reference_first(tmp_path):
    examples, skipped = made(MedicalDiffVqa, source(tmp_path), "difference")
    assert not any(skipped.values()) and list(by_id(examples)) == ["a3-a1"]
    example = by_id(examples)["a3-a1"]
    assert example.turns[0].text == (
        "The first image is the reference, the second one the current image.\n"
        "what has changed?\n<image>\n<image>"
    )
    films = by_id(made(MedicalDiffVqa, tmp_path)[0])
    assert example.images[0] == films["a1"].images[0]
    assert example.meta["qa"][0]["image"] == 1
    assert [[i.image for i in r.images] for r in example.expert_requests] == [[1]]


def test_parity_calls_a_nodule_closed(tmp_path):
    examples, _ = made(MedicalDiffVqa, source(tmp_path), parity=True)
    found = by_id(examples)
    assert found["b1"].meta["qa"][0]["answer_type"] == "closed"
    assert found["d1"].meta["qa"][0]["answer_type"] == "open"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["80000001", "90000001", "", "presence", "", "yes", "train"], "the question is empty"),
        (["80000001", "90000001", "", "presence", "is it?", "nan", "train"], "the answer is empty"),
        (["80000001", "90000001", "", "presence", "is it?"], "the answer is empty"),
        (["80000001", "90000001", "", "presence", "is it?", "\0 ", "train"], "the answer is empty"),
        (
            ["80000001", "90000001", "", "presence", "is it?", "a" * 10_001, "train"],
            "the answer has 10001 characters; up to 10000 are read",
        ),
        (
            ["80000001", "90000001", "", "size", "how large?", "5", "train"],
            "its question_type is none of the seven",
        ),
        (["1", "90000001", "", "presence", "is it?", "no", "train"], "its study is not in mimic_all.csv"),
        (["", "", "", "presence", "is it?", "no", "train"], "its study is not in mimic_all.csv"),
        (
            ["80000001", "90000002", "", "presence", "is it?", "no", "train"],
            "its patient differs from mimic_all.csv",
        ),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, row, reason):
    examples, skipped = made(MedicalDiffVqa, source(tmp_path, [*FIRST, row]))
    assert [(s.record, s.reason) for s in skipped["train"]] == [(f"{TABLE} row 8", reason)]
    assert len(by_id(examples)) == 4 and len(by_id(examples)["a1"].turns) == 4


def test_a_question_answered_in_two_ways_is_left_out(tmp_path):
    row = ["80000001", "90000001", "", "presence", "Is there  edema?", "no", "train"]
    examples, skipped = made(MedicalDiffVqa, source(tmp_path, [*FIRST, row]))
    assert [(s.record, s.reason) for s in skipped["train"]] == [
        (f"{TABLE} row {n}", "its question has different answers for the same film") for n in (2, 8)
    ]
    assert len(by_id(examples)["a1"].turns) == 2


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("", "it has no reference study"),
        ("0", "it has no reference study"),
        ("nan", "it has no reference study"),
        ("7777", "its reference study is not in mimic_all.csv"),
        ("80000003", "its reference study is of another patient"),
        ("80000002", "it is its own reference study"),
    ],
)
def test_differences_without_a_reference(tmp_path, reference, reason):
    row = ["80000002.0", "90000001", reference, "difference", "what has changed?", "nothing", "train"]
    examples, skipped = made(MedicalDiffVqa, source(tmp_path, [row, *FIRST]), "difference")
    assert [(s.record, s.reason) for s in skipped["train"]] == [(f"{TABLE} row 1", reason)]
    assert len(examples["train"]) == 1


def test_columns_in_another_order_and_missing_ones(tmp_path):
    first, _ = made(MedicalDiffVqa, source(tmp_path / "a"))
    turned = {TABLE: [r[::-1] for r in [HEADER, *FIRST]], "mimic_all.csv": [r[::-1] for r in ALL]}
    second, _ = made(MedicalDiffVqa, source(tmp_path / "b", **turned))
    assert by_id(first) == by_id(second)
    with pytest.raises(UserError, match="no column ref_id, question_type"):
        made(
            MedicalDiffVqa,
            source(tmp_path / "c", **{TABLE: [["study_id", "subject_id", "question", "answer"]]}),
        )
    with pytest.raises(UserError, match=r"mimic_pair_questions.*mimic_all.*missing.*physionet"):
        made(MedicalDiffVqa, source(tmp_path / "d", **{TABLE: None, "mimic_all.csv": None}))


def test_a_missing_image_is_named_by_the_row(tmp_path):
    folder = source(tmp_path)
    next(folder.glob("files/**/b1.jpg")).unlink()
    _, skipped = made(MedicalDiffVqa, folder)
    assert [(s.record, s.reason) for s in skipped["train"]] == [(f"{TABLE} row 4", "its image is missing")]
