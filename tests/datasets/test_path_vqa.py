"""PathVQA from synthetic copies of both releases, and the Hugging Face copy of VQA-RAD."""

import os
import pickle
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from twins import made, picture, write

from vilam3_jax.data.images import decode_image
from vilam3_jax.datasets import parquet
from vilam3_jax.datasets.path_vqa import PathVqa
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.vqa_rad import VqaRad
from vilam3_jax.errors import UserError

IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def image(number, mode="RGB"):
    return {"bytes": picture(number, mode=mode), "path": f"image_{number}.jpg"}


def write_parquet(path, rows, group=2, columns=("image", "question", "answer"), types=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {"image": IMAGE, **(types or {})}
    table = pyarrow.table(
        {
            name: pyarrow.array([row[name] for row in rows], kinds.get(name, pyarrow.string()))
            for name in columns
        }
    )
    pyarrow.parquet.write_table(table, path, row_group_size=group)


def row(number, question="what is shown?", answer="made-up cells", mode="RGB"):
    return {"image": image(number, mode), "question": f"{question} {number}", "answer": answer}


def copy(folder, files=None):
    files = files or {
        "train": [[row(0), row(1), row(1)], [row(2)]],
        "validation": [[row(3)]],
        "test": [[row(4)]],
    }
    for split, parts in files.items():
        for number, rows in enumerate(parts):
            name = f"{split}-{number:05d}-of-{len(parts):05d}-0123456789abcdef.parquet"
            write_parquet(folder / "data" / name, rows)
    return folder


def test_copy(tmp_path):
    examples, skipped = made(PathVqa, copy(tmp_path))
    assert not any(skipped.values())
    assert {split: [e.id for e in found] for split, found in examples.items()} == {
        "train": ["train/0", "train/1", "train/2", "train/3"],
        "validation": ["validation/0"],
        "test": ["test/0"],
    }
    first, second, third, last = examples["train"]
    assert first.images[0].data == picture(0) and last.images[0].data == picture(2)
    assert first.turns[0].text in ("<image>\nwhat is shown? 0", "what is shown? 0\n<image>")
    assert first.meta["qa"][0]["type"] == "open" and first.meta["modality"] == "PATHOLOGY"
    assert second.meta["group"] == third.meta["group"] != first.meta["group"]


def test_copy_of_vqa_rad(tmp_path):
    files = {"train": [[row(0, answer="Yes")]], "test": [[row(1, answer="left lung")]]}
    examples, _ = made(VqaRad, copy(tmp_path, files), "hf")
    assert [e.id for found in examples.values() for e in found] == ["train/0", "test/0"]
    assert examples["train"][0].turns[0].text == "what is shown? 0\n<image>"
    assert examples["train"][0].meta["qa"][0]["type"] == "closed"
    splits = VqaRad(config="hf").splits(SourceFolder(tmp_path))
    assert [split.expected for split in splits.values()] == [1793, 451]


def test_cmyk_images_decode(tmp_path):
    files = {"train": [[row(5, mode="CMYK")]], "validation": [[row(3)]], "test": [[row(4)]]}
    examples, _ = made(PathVqa, copy(tmp_path, files))
    data = examples["train"][0].images[0].data
    assert data
    pixels = decode_image(data)
    plain = decode_image(picture(5)).astype(float)
    assert np.abs(pixels - plain).mean() < 10


def test_columns_are_found_by_name(tmp_path):
    copy(tmp_path)
    (part,) = (tmp_path / "data").glob("test-*")
    write_parquet(part, [{**row(4), "extra": "x"}], columns=("answer", "extra", "image", "question"))
    examples, _ = made(PathVqa, tmp_path)
    assert examples["test"][0].turns[1].text == "made-up cells"
    write_parquet(part, [row(4)], columns=("image", "question"))
    with pytest.raises(UserError, match="no column answer; it has image, question"):
        made(PathVqa, tmp_path)


def test_missing_parts_are_named(tmp_path):
    copy(tmp_path)
    (part,) = (tmp_path / "data").glob("train-00000*")
    part.unlink()
    with pytest.raises(UserError, match=r"1 files match.*of 2 parts; missing: 00000-of-00002"):
        made(PathVqa, tmp_path)
    for part in (tmp_path / "data").glob("train-*"):
        part.unlink()
    with pytest.raises(UserError, match=r"data/train-\*\.parquet or train-\*\.parquet missing"):
        made(PathVqa, tmp_path)


def test_damaged_parquet(tmp_path):
    copy(tmp_path)
    (part,) = (tmp_path / "data").glob("train-00000*")
    whole = part.read_bytes()
    part.write_bytes(b"not a parquet file")
    with pytest.raises(UserError, match="is not a parquet file"):
        made(PathVqa, tmp_path)
    part.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    examples, skipped = made(PathVqa, tmp_path)
    assert len(examples["train"]) + len(skipped["train"]) == 4 and skipped["train"]
    assert all(re.search("row group . is damaged|value|row", one.reason) for one in skipped["train"])


def test_bad_rows_of_the_copy(tmp_path):
    bad = [
        {**row(0), "image": {"bytes": None, "path": "/etc/hostname"}},
        {**row(0), "image": None},
        {**row(0), "image": {"bytes": b"", "path": None}},
        {**row(0), "answer": None},
        {**row(0), "question": " "},
        row(1),
    ]
    folder = copy(tmp_path, {"train": [bad], "validation": [[row(3)]], "test": [[row(4)]]})
    examples, skipped = made(PathVqa, folder)
    assert [e.id for e in examples["train"]] == ["train/5"]
    assert [one.record.rsplit(" ", 2)[-2:] for one in skipped["train"]] == [
        ["row", str(n)] for n in range(1, 6)
    ]
    assert [one.reason for one in skipped["train"]][:3] == ["the image column holds no bytes"] * 3


def test_rows_are_read_by_group(tmp_path, monkeypatch):
    folder = copy(
        tmp_path, {"train": [[row(n) for n in range(6)]], "validation": [[row(7)]], "test": [[row(8)]]}
    )
    splits = PathVqa().splits(SourceFolder(folder))
    assert [place.group for place in splits["train"].items] == [0, 0, 1, 1, 2, 2]
    read = []
    original = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile,
        "read_row_group",
        lambda self, group, **more: read.append(group) or original(self, group, **more),
    )
    for place in splits["train"].items:
        assert parquet.read(str(folder), place)["question"].endswith(str(place.number - 1))
    assert read == [0, 1, 2]


# --- the original release


def datum(number, split="train", **values):
    return {
        "img_id": f"{split}_{number:04d}",
        "question_id": number,
        "sent": f"what is shown in made-up figure {number}?",
        "label": {"cells": 1},
        "answer_type": "other",
        "question_type": "what",
        **values,
    }


def original(folder, train=None, base="pvqa/", protocol=4):
    tables = {
        "train": train or [datum(0), datum(1, answer_type="yes/no", label={"yes": 1})],
        "val": [datum(2, "val")],
        "test": [datum(3, "test")],
    }
    files = {f"{base}qas/{name}_vqa.pkl": pickle.dumps(rows, protocol) for name, rows in tables.items()}
    for number, split in enumerate(("train", "train", "val", "test")):
        files[f"{base}images/{split}/{split}_{number:04d}.jpg"] = picture(number)
    return write(folder, files)


@pytest.mark.parametrize(("base", "protocol"), [("pvqa/", 0), ("", 2), ("pvqa/", 5)])
def test_original(tmp_path, base, protocol):
    examples, skipped = made(PathVqa, original(tmp_path, base=base, protocol=protocol), "original")
    assert not any(skipped.values())
    assert {split: [e.id for e in found] for split, found in examples.items()} == {
        "train": ["train/0", "train/1"],
        "validation": ["validation/2"],
        "test": ["test/3"],
    }
    first, closed = examples["train"]
    assert first.turns[1].text == "cells" and first.images[0].data == picture(0)
    assert [e.meta["qa"][0]["type"] for e in (first, closed)] == ["open", "closed"]
    assert closed.meta["qa"][0]["options"] == ["yes", "no"] and closed.meta["answer_type"] == "yes/no"
    expected = [
        split.expected for split in PathVqa(config="original").splits(SourceFolder(tmp_path)).values()
    ]
    assert expected == [19755, 6279, 6761]


def test_answers_by_score_or_as_the_reference(tmp_path):
    rows = [datum(0, label={"first": 0.3, "best": 1.0}), datum(1, label={"a": 1, "b": 1})]
    folder = original(tmp_path, rows)
    answers = [e.turns[1].text for e in made(PathVqa, folder, "original")[0]["train"]]
    parity = [e.turns[1].text for e in made(PathVqa, folder, "original", parity=True)[0]["train"]]
    assert (answers, parity) == (["best", "a"], ["first", "a"])


@pytest.mark.parametrize("config", ["hf", "original"])
def test_paper_trains_on_validation(tmp_path, config):
    folder = copy(tmp_path) if config == "hf" else original(tmp_path)
    examples, _ = made(PathVqa, folder, config, ["--train-on-validation"])
    assert list(examples) == ["train", "test"]
    ids = [e.id for e in examples["train"]]
    assert len(ids) == len(set(ids)) and ids[-1].startswith("validation/")


BAD = {
    "null": None,
    "list": [],
    "no keys": {},
    "label": datum(1, label={}),
    "label list": datum(1, label=["yes"]),
    "score": datum(1, label={"yes": "1"}),
    "score NaN": datum(1, label={"yes": float("nan")}),
    "answer number list": datum(1, label={("a", "b"): 1}),
    "question": datum(1, sent=None),
    "image": datum(1, img_id="../val/val_0002"),
    "image missing": datum(9),
    "image number": datum(1, img_id=None),
    "answer type": datum(1, answer_type=None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_of_the_original(tmp_path, name):
    examples, skipped = made(PathVqa, original(tmp_path, [datum(0), BAD[name]]), "original")
    assert [e.id for e in examples["train"]] == ["train/0"]
    assert [one.record for one in skipped["train"]] == ["pvqa/qas/train_vqa.pkl row 2"]


class Calls:
    def __reduce__(self):
        return os.system, ("echo called",)


def test_pickles_run_nothing(tmp_path, capfd):
    folder = original(tmp_path)
    write(folder, {"pvqa/qas/val_vqa.pkl": pickle.dumps([Calls()])})
    with pytest.raises(UserError, match=r"val_vqa\.pkl: opcode [A-Z_]+ at byte"):
        made(PathVqa, folder, "original")
    assert "called" not in capfd.readouterr().out


def test_missing_files_of_the_original(tmp_path):
    write(tmp_path, {"pvqa/qas/train_vqa.pkl": pickle.dumps([])})
    with pytest.raises(UserError, match=r"val_vqa\.pkl, pvqa/qas/test_vqa\.pkl, pvqa/images/train"):
        made(PathVqa, tmp_path, "original")
    write(original(tmp_path), {"pvqa/qas/train_vqa.pkl": pickle.dumps({"a": 1})})
    with pytest.raises(UserError, match="not a list of questions"):
        made(PathVqa, tmp_path, "original")
