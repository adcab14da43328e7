"""Any row becomes a storable example or is skipped by name; no row ends a build."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st
from twins import picture, write

from vilam3_jax.data import example_features
from vilam3_jax.datasets.dataset import Skipped, examples_of
from vilam3_jax.datasets.flare_mllm_2d import FlareMllm2d
from vilam3_jax.datasets.medxpert_qa import MedXpertQa
from vilam3_jax.datasets.omni_med_vqa import OmniMedVqa
from vilam3_jax.datasets.pmc_oa import PmcOa
from vilam3_jax.datasets.pmc_vqa import PmcVqa
from vilam3_jax.datasets.source_files import SourceFolder

ROWS = {
    OmniMedVqa: {
        "dataset": "Chest",
        "question_id": "Chest_1",
        "question_type": "Anatomy Identification",
        "question": "What?",
        "gt_answer": "liver",
        "image_path": "Images/1.png",
        "option_A": "liver",
        "option_B": "lung",
        "option_C": "heart",
        "modality_type": "X-Ray",
    },
    MedXpertQa: {
        "id": "MM-1",
        "question": "What?\nAnswer Choices: (A) liver (B) lung",
        "options": {"A": "liver", "B": "lung"},
        "label": "A",
        "images": ["1.png"],
        "medical_task": "Diagnosis",
        "question_type": "Reasoning",
    },
    FlareMllm2d: {
        "ID": "1",
        "TaskType": "Multi-label Classification",
        "ImageName": ["1.png"],
        "Question": "What?",
        "Answer": ["liver"],
        "Options": ["liver", "lung"],
        "Split": "train",
    },
    PmcOa: {"image": "1.png", "caption": "A liver.", "alignment_score": 0.5},
}
FILES = {
    OmniMedVqa: ("QA_information/Open-access/Chest.json", "Images/1.png"),
    MedXpertQa: ("MM/test.jsonl", "images/1.png"),
    FlareMllm2d: ("training/Xray/dental/dental_questions_train.json", "training/Xray/dental/imagesTr/1.png"),
    PmcOa: ("pmc_oa.jsonl", "images/1.png"),
}
# Includes unpaired surrogates, which JSON can contain.
TEXT = st.text(st.characters(), max_size=12)
ATOMS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.sampled_from(["A", "liver", "1.png", "<image>"])
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.sampled_from("ABC"), inner, max_size=3)
    ),
    max_leaves=5,
)


SETTINGS = hypothesis.settings(max_examples=30, deadline=None, derandomize=True)


def check_build(dataset, folder, rows_file, count):
    """All rows of a file become storable records or are named; the last row is valid."""
    source = SourceFolder(folder)
    splits = dataset.splits(source)
    name = next(name for name, split in splits.items() if split.items and split.items[0].file == rows_file)
    found = list(examples_of(splits[name], dataset.context(source, name)))
    assert len(found) == count and not isinstance(found[-1], Skipped)
    stored = [one for one in found if not isinstance(one, Skipped)]
    assert len({one.id for one in stored}) == len(stored)
    for one in stored:
        assert example_features.decode(example_features.encode(one)).turns == one.turns
    for one in found:
        if isinstance(one, Skipped):
            assert one.record.startswith(rows_file) and 0 < len(one.reason) < 2000


@pytest.mark.parametrize("dataset", ROWS, ids=lambda dataset: dataset.name)
def test_any_value_in_any_field(dataset, tmp_path):
    rows_file, image = FILES[dataset]
    good = ROWS[dataset]
    write(tmp_path, {image: picture(1, kind="PNG"), "MM/dev.jsonl": []})

    @SETTINGS
    @hypothesis.given(
        st.lists(
            VALUES | st.dictionaries(st.sampled_from(list(good)), VALUES).map(lambda new: good | new),
            max_size=4,
        )
    )
    def check(rows):
        lines = [*rows, good]
        encoded = "\n".join(map(json.dumps, lines)) if rows_file.endswith("l") else json.dumps(lines)
        write(tmp_path, {rows_file: encoded})
        check_build(dataset(), tmp_path, rows_file, len(lines))

    check()


HEADER = ["index", "Figure_path", "Question", "Choice A", "Choice B", "Choice C", "Choice D", "Answer"]
GOOD = ["1", "1.png", "What?", "A: liver", "B: lung", "C: heart", "D: skin", "B"]


def test_any_text_in_any_cell(tmp_path):
    """Includes rows that are too short or too long, and texts that look like a header or a quote."""
    write(tmp_path, {"figures/1.png": picture(1, kind="PNG"), "test_2.csv": [HEADER, GOOD]})
    cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(GOOD + HEADER)

    @SETTINGS
    @hypothesis.given(
        st.lists(st.lists(cells, min_size=1, max_size=10), max_size=4), st.integers(0, 7), cells
    )
    def check(rows, place, cell):
        rows = [*rows, [*GOOD[:place], cell, *GOOD[place + 1 :]], GOOD]
        write(tmp_path, {"train_2.csv": [HEADER, *rows]})
        check_build(PmcVqa(config="v2"), tmp_path, "train_2.csv", len(rows))

    check()
