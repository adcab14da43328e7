"""SLAKE from a synthetic copy of its layout."""

import pytest
from twins import made, picture, write

from vilam3_jax.datasets.slake import Slake
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError


def row(qid, image=0, language="en", **values):
    return {
        "img_id": image,
        "img_name": f"xmlab{image}/source.jpg",
        "question": f"Made-up question {qid}?",
        "answer": "Yes",
        "q_lang": language,
        "location": "Lung",
        "modality": "X-Ray",
        "answer_type": "CLOSED",
        "base_type": "vqa",
        "content_type": "Abnormality",
        "triple": ["vhead", "_", "_"],
        "qid": qid,
        **values,
    }


def twin(folder, train=None, validation=None, test=None, name="validate.json"):
    tables = {
        "train.json": train
        if train is not None
        else [row(0), row(1, language="zh", question="左肺？", answer="是"), row(2, 1, answer="Brain")],
        name: validation if validation is not None else [row(3, 2)],
        "test.json": test if test is not None else [row(4, 3, answer_type="OPEN", answer="Two")],
    }
    images = {f"imgs/xmlab{number}/source.jpg": picture(number) for number in range(4)}
    return write(folder, {**tables, **images})


@pytest.mark.parametrize("name", ["validate.json", "validation.json"])
def test_golden_examples(tmp_path, name):
    examples, skipped = made(Slake, twin(tmp_path, name=name))
    assert not any(skipped.values())
    assert {split: [e.id for e in found] for split, found in examples.items()} == {
        "train": ["0", "2"],
        "validation": ["3"],
        "test": ["4"],
    }
    first = examples["train"][0]
    assert first.turns[0].text in (
        "<image>\nMade-up question 0?",
        "Made-up question 0?\n<image>",
    )
    assert (first.turns[1].text, first.turns[1].supervised) == ("Yes", True)
    assert first.images[0].data == picture(0)
    assert first.meta["modality"] == "CXR" and first.meta["language"] == "en"
    assert first.meta["qa"][0]["type"] == "closed" and first.meta["qa"][0]["options"] == ["yes", "no"]
    assert examples["train"][1].meta["qa"][0]["options"] == []  # closed, but not yes/no
    assert examples["test"][0].meta["qa"][0]["type"] == "open"
    groups = [{e.meta["group"] for e in found} for found in examples.values()]
    assert sum(map(len, groups)) == len(set().union(*groups))


def test_languages_are_built_apart(tmp_path):
    folder = twin(tmp_path)
    examples, _ = made(Slake, folder, "zh")
    assert [e.id for e in examples["train"]] == ["1"]
    assert (examples["train"][0].turns[1].text, examples["validation"]) == ("是", [])
    for config in ("all", "en+zh"):
        with pytest.raises(UserError, match=r"no variant .* en, zh\. The two languages split the images"):
            Slake(config=config)


@pytest.mark.parametrize(("config", "counts"), [("en", (4919, 1053, 1061)), ("zh", (4916, 1046, 1033))])
def test_counts_are_of_the_language(tmp_path, config, counts):
    splits = Slake(config=config).splits(SourceFolder(twin(tmp_path)))
    assert tuple(split.expected for split in splits.values()) == counts


def test_paper_trains_on_validation(tmp_path):
    examples, _ = made(Slake, twin(tmp_path), argv=["--train-on-validation"])
    assert {split: [e.id for e in found] for split, found in examples.items()} == {
        "train": ["0", "2", "3"],
        "test": ["4"],
    }
    assert {e.meta["split"] for e in examples["train"]} == {"train"}


def test_markers_fall_on_both_sides_and_repeat(tmp_path):
    folder = twin(tmp_path, train=[row(number) for number in range(400)])
    before = [e.turns[0].text.startswith("<image>") for e in made(Slake, folder)[0]["train"]]
    assert 150 < sum(before) < 250
    assert before == [e.turns[0].text.startswith("<image>") for e in made(Slake, folder)[0]["train"]]


def test_parity_ids_count_rows_of_both_languages(tmp_path):
    examples, _ = made(Slake, twin(tmp_path), parity=True)
    assert [e.meta["reference_id"] for found in examples.values() for e in found] == ["1", "3", "1", "1"]


@pytest.mark.parametrize(
    ("modality", "location", "word"),
    [
        ("CT", "Abdomen", "CT"),
        ("MRI", "Brain_Tissue", "MR"),
        ("X-Ray", "Chest_heart", "CXR"),
        ("X-Ray", "Neck", "XR"),
    ],
)
def test_modalities(tmp_path, modality, location, word):
    folder = twin(tmp_path, train=[row(0, modality=modality, location=location)])
    assert made(Slake, folder)[0]["train"][0].meta["modality"] == word


BAD = {
    "null": None,
    "text": "row",
    "language": {**row(9), "q_lang": None},
    "other language": row(9, language="fr"),
    "answer": row(9, answer=None),
    "answer list": row(9, answer=["Yes"]),
    "question": row(9, question=""),
    "answer type": row(9, answer_type=1),
    "modality": row(9, modality="PET"),
    "modality null": row(9, modality=None),
    "missing image": row(9, 8),
    "outside": row(9, img_name="../../secret.jpg"),
    "image list": row(9, img_name=["a"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_and_skipped(tmp_path, name):
    examples, skipped = made(Slake, twin(tmp_path, train=[row(0), BAD[name]]))
    assert [e.id for e in examples["train"]] == ["0"]
    assert [one.record for one in skipped["train"]] == ["train.json row 2"]


def test_missing_files_are_all_named(tmp_path):
    write(tmp_path, {"train.json": []})
    with pytest.raises(
        UserError, match=r"validate\.json or validation\.json, test\.json, imgs missing\..*med-vqa"
    ):
        Slake().splits(SourceFolder(tmp_path, Slake.instructions))
