"""Tests of TFDS storage: the codec agrees with TFDS's, and TFDS reads our folders without this package."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilam3_jax.data import example_features, tfds_folder
from vilam3_jax.data.examples import Example, ExpertRequest, ImageRef, RequestImage, Turn
from vilam3_jax.data.records import ExampleSource, ExampleWriter
from vilam3_jax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
NAME = TEXT.filter(bool)
NUMBER = st.integers(0, 2**62)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
PICTURES = st.one_of(
    st.builds(ImageRef, data=st.binary(min_size=1, max_size=20)),
    st.builds(
        ImageRef,
        path=NAME,
        axis=st.integers(0, 2),
        index=NUMBER,
        window=st.none() | st.tuples(FINITE, FINITE),
        modality=st.none() | NAME,
    ),
    st.builds(ImageRef, path=NAME),
)
REQUESTS = st.builds(
    ExpertRequest,
    expert=TEXT,
    args=TEXT,
    images=st.lists(st.builds(RequestImage, NUMBER, TEXT), max_size=3).map(tuple),
    before_turn=NUMBER,
    policy=TEXT,
    question=TEXT,
    call=TEXT,
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | FINITE | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=5,
)
EXAMPLES = st.builds(
    Example,
    id=NAME,
    format=TEXT,
    images=st.lists(PICTURES, max_size=3),
    turns=st.lists(st.builds(Turn, TEXT, TEXT, st.booleans()), max_size=3),
    expert_requests=st.lists(REQUESTS, max_size=2),
    meta=st.dictionaries(TEXT, PLAIN, max_size=3),
)


@given(EXAMPLES)
def test_what_is_encoded_is_decoded(example) -> None:
    assert example_features.decode(example_features.encode(example)) == example


@given(EXAMPLES)
def test_the_codec_agrees_with_that_of_tfds(example) -> None:
    features = example_features.features_dict()
    values = example_features.values(example)
    theirs = features.serialize_example(features.encode_example(values))
    assert example_features.decode(theirs) == example
    read = features.deserialize_example_np(example_features.encode(example))
    assert read["id"].decode() == example.id and json.loads(read["meta"].decode()) == example.meta
    assert [text.decode() for text in read["turns"]["text"]] == [turn.text for turn in example.turns]
    assert [bool(one) for one in read["turns"]["supervised"]] == [turn.supervised for turn in example.turns]
    assert [bytes(one) for one in read["images"]["bytes"]] == [image.data or b"" for image in example.images]
    assert [int(one) for one in read["images"]["axis"]] == values["images"]["axis"]


@given(st.binary(max_size=200))
def test_other_bytes_are_refused_in_one_sentence(data) -> None:
    with pytest.raises(UserError):
        example_features.decode(data)


@pytest.mark.parametrize("meta", [{"x": float("nan")}, {"x": b"bytes"}, {"x": "\ud800"}, {"x": {1, 2}}])
def test_what_has_no_stored_form_is_refused_without_quoting_it(meta) -> None:
    with pytest.raises(UserError, match="example 'a': cannot be stored") as caught:
        example_features.encode(Example("a", "conversation", (), (Turn("user", "secret"),), meta=meta))
    assert "secret" not in str(caught.value)


def film(number: int) -> Example:
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", f"Film {number}.", True))
    return Example(f"f{number}", "conversation", (ImageRef(data=b"x" * 100),), turns, meta={"licence": "CC0"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A version of a dataset, with two splits and several shards."""
    version = tmp_path_factory.mktemp("data") / "films" / "1.0.0"
    for split, count in (("train", 7), ("test", 2)):
        with ExampleWriter(version, split, name="films", bytes_per_shard=800) as writer:
            for number in range(count):
                writer.write(film(number))
    return version.parent


def test_tfds_reads_it_without_this_package(folder) -> None:
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"for source in (tfds.data_source('films', data_dir={str(folder.parent)!r}, split='train'),\n"
        f"               tfds.builder_from_directory({str(folder / '1.0.0')!r}).as_data_source('train')):\n"
        "    read = [one['turns']['text'][1].decode() for one in source]\n"
        "    assert read == [f'Film {n}.' for n in range(7)], read\n"
        "assert not {'tensorflow', 'vilam3_jax'} & set(sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr


def test_the_newest_version_is_read(folder, tmp_path) -> None:
    assert ExampleSource(folder, "train").directory.name == "1.0.0"
    for version in ("1.0.0", "1.9.0", "1.10.0"):
        with ExampleWriter(tmp_path / "films" / version, "train", name="films") as writer:
            writer.write(film(int(version.split(".")[1])))
    assert ExampleSource(tmp_path / "films", "train")[0] == film(10)
    assert tfds_folder.datasets_in(tmp_path) == [tmp_path / "films"]


def test_other_folders_are_refused(folder, tmp_path) -> None:
    with pytest.raises(UserError, match="contains no dataset"):
        ExampleSource(tmp_path, "train")
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="older version of this package"):
        ExampleSource(tmp_path, "train")
    with pytest.raises(UserError, match="no dataset"):
        tfds_folder.datasets_in(tmp_path)


def test_two_descriptions_that_disagree_are_refused(tmp_path) -> None:
    with ExampleWriter(tmp_path, "train") as writer:
        writer.write(film(0))
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["2"]
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="does not agree"):
        ExampleSource(tmp_path, "train")


def test_a_source_travels_to_other_processes(folder) -> None:
    source = ExampleSource(folder, "test")
    assert source[1] == film(1)
    assert list(pickle.loads(pickle.dumps(source))) == [film(0), film(1)]  # noqa: S301 (our own object)
