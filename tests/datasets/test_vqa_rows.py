"""Any row of a question-answering dataset gives examples or is skipped by name."""

import pickle

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_path_vqa import datum
from test_slake import row as slake_row
from test_vqa_rad import row as rad_row
from twins import made, picture, write

from vilam3_jax.data import example_features
from vilam3_jax.datasets.path_vqa import PathVqa
from vilam3_jax.datasets.slake import Slake
from vilam3_jax.datasets.vqa_rad import VqaRad

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ODD = PLAIN | st.sampled_from(["NULL", "../x.jpg", "/etc/hostname", "a\0b", "<image>", "\ud800", "x" * 5000])
VALUES = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def rad(folder, rows):
    images = {f"VQA_RAD Image Folder/synpic{number}.jpg": picture(number) for number in (1, 2)}
    return write(folder, {"VQA_RAD Dataset Public.json": rows, **images})


def slake(folder, rows):
    tables = {"train.json": rows, "validate.json": [], "test.json": []}
    return write(folder, {**tables, "imgs/xmlab0/source.jpg": picture(0)})


def path(folder, rows):
    tables = {f"qas/{name}_vqa.pkl": pickle.dumps([]) for name in ("val", "test")}
    images = {f"images/{name}/{name}_0000.jpg": picture(0) for name in ("train", "val", "test")}
    return write(folder, {**tables, **images, "qas/train_vqa.pkl": pickle.dumps(rows)})


SETS = {
    "vqa_rad": (VqaRad, "osf", rad, rad_row("1", question_rephrase="Seen?")),
    "slake": (Slake, "en", slake, slake_row(1)),
    "path_vqa": (PathVqa, "original", path, datum(0)),
}


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("name", SETS)
@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_odd_rows(tmp_path, name, parity, data):
    dataset, config, twin, good = SETS[name]
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(good)), VALUES, min_size=1, max_size=3))
    dropped = data.draw(st.sets(st.sampled_from(sorted(good)), max_size=2))
    odd = {key: value for key, value in {**good, **changed}.items() if key not in dropped}
    rows = [good, data.draw(st.just(odd) | VALUES)]
    examples, skipped = made(dataset, twin(tmp_path, rows), config, parity=parity)
    found = [example for split in examples.values() for example in split]
    ids = [example.id for example in found]
    assert ids and len(ids) == len(set(ids))
    assert all(example_features.encode(example) for example in found)
    for one in (skip for split in skipped.values() for skip in split):
        assert " row " in one.record and one.reason and "\n" not in one.reason
        assert len(one.reason) < 400
