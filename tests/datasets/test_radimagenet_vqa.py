"""RadImageNet-VQA's benchmark: multiple-choice, closed and open questions in parquet."""

import pyarrow
import pyarrow.parquet
import pytest
from twins import made, picture

from vilam3_jax.datasets.radimagenet_vqa import RadImageNetVqa
from vilam3_jax.errors import UserError

TYPES = {
    "image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]),
    "choices": pyarrow.list_(pyarrow.string()),
    "metadata": pyarrow.struct([(key, pyarrow.string()) for key in ("modality", "pathology", "location")]),
}


def row(number, answer, choices=None, kind="open", modality="CT"):
    return {
        "question": f"What is shown in {number}?",
        "answer": answer,
        "choices": choices,
        "question_type": kind,
        "image": {"bytes": picture(number), "path": "x.jpg"},
        "metadata": {"modality": modality, "pathology": "cyst", "location": None},
    }


def write_part(folder, rows, name="test-00000-of-00001.parquet", left_out=()):
    columns = [column for column in row(0, "") if column not in left_out]
    table = {
        name: pyarrow.array([one[name] for one in rows], TYPES.get(name, pyarrow.string()))
        for name in columns
    }
    (folder / "benchmark").mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "benchmark" / name, row_group_size=2)


def test_questions(tmp_path):
    rows = [
        row(0, "B", ["cyst", "mass"], "multiple_choice"),
        row(1, "Mass.", ["cyst", "mass"], "multiple_choice", "MRI"),
        row(2, "yes", None, "closed"),
        row(3, "A cyst of the liver", []),
    ]
    write_part(tmp_path, rows)
    examples, skipped = made(RadImageNetVqa, tmp_path)
    assert list(examples) == ["test"] and not skipped["test"]
    found = examples["test"]
    assert [one.id for one in found] == ["test/0", "test/1", "test/2", "test/3"]
    assert found[0].turns[0].text.startswith("<image>\nWhat is shown in 0?\nA. cyst\nB. mass\n")
    assert [one.turns[1].text for one in found] == ["B. mass", "B. mass", "yes", "A cyst of the liver"]
    assert [one.meta["modality"] for one in found] == ["CT", "MR", "CT", "CT"]
    assert found[0].meta["pathology"] == "cyst" and "location" not in found[0].meta
    assert [(q["answer"], q["options"], q["type"]) for one in found for q in one.meta["qa"]][1:3] == [
        ("mass", ["cyst", "mass"], "multiple_choice"),
        ("yes", ["yes", "no"], "closed"),
    ]
    assert found[3].images[0].data == picture(3)


def test_rows_that_cannot_be_used(tmp_path):
    without_image = row(4, "x") | {"image": None}
    rows = [
        row(0, "lung", ["cyst", "mass"]),
        row(1, None),
        row(2, "x", ["x"]),
        row(3, "x", ["x", None]),
        without_image,
    ]
    write_part(tmp_path, [*rows, row(5, "fine") | {"metadata": None}])
    examples, skipped = made(RadImageNetVqa, tmp_path)
    assert [one.id for one in examples["test"]] == ["test/5"]
    assert [one.record for one in skipped["test"]] == [
        f"benchmark/test-00000-of-00001.parquet row {n}" for n in range(1, 6)
    ]
    words = ["none of the options", "answer is missing", "fewer than two", "option B is missing", "no bytes"]
    assert all(word in one.reason for word, one in zip(words, skipped["test"], strict=True))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match=r"benchmark/test-\*\.parquet .*missing\. Ask for access"):
        made(RadImageNetVqa, tmp_path)
    write_part(tmp_path, [row(0, "x")], left_out=("choices", "question_type"))
    with pytest.raises(UserError, match="no column choices, question_type; it has question, answer"):
        made(RadImageNetVqa, tmp_path)
    write_part(tmp_path, [row(0, "x")], "test-00000-of-00002.parquet")
    (tmp_path / "benchmark" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="missing: 00001-of-00002"):
        made(RadImageNetVqa, tmp_path)
