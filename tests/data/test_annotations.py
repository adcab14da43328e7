"""Annotations: lossless, readable slice by slice, resumable, never partially written."""

import copy
import dataclasses
import errno
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax.data.experts import store as annotations
from vilam3_jax.data.experts.falsify import falsify
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment, failed, segments_on_slice
from vilam3_jax.data.experts.store import AnnotationStore, AnnotationWriter
from vilam3_jax.errors import UserError

AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])
NAMES = {1: "liver", 3: "spleen", 300: "left kidney"}
UNIVERSE = {**NAMES, 4: "pancreas", 6: "aorta", 12: "stomach", 62: "colon"}


def volume_annotation(labels, names=None, key="a" * 64, **fields):
    names = names or NAMES
    segments = tuple(
        Segment(int(i), names[int(i)], int((labels == i).sum()), float((labels == i).sum()) * 0.012, 1,
                (0, 0, 0, *labels.shape))
        for i in np.unique(labels)
        if i
    )  # fmt: skip
    return Annotation(
        key, "VISTA3D", "organs", version="1", weights_sha256="f" * 64, segments=segments,
        labels=LabelMap.encode(labels, AFFINE), seconds=1.5, **fields,
    )  # fmt: skip


def block_labels():
    labels = np.zeros((6, 5, 4), np.int32)
    labels[:3, :2, :3] = 1
    labels[4:, 3:, 1:] = 300
    return labels


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7)),
    values=st.lists(st.integers(0, 65535), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_label_map_is_lossless_in_bytes_and_by_slice(shape, values, seed):
    labels = np.random.default_rng(seed).choice(np.array(values), size=shape)
    names = {int(v): f"label {v}" for v in values}
    read = Annotation.from_bytes(volume_annotation(labels, names).to_bytes())
    np.testing.assert_array_equal(read.label_map(), labels)
    assert read.label_map().dtype == (np.uint8 if labels.max() < 256 else np.uint16)
    for axis in range(3):
        for index in range(shape[axis]):
            np.testing.assert_array_equal(read.label_slice(axis, index), np.take(labels, index, axis=axis))
    np.testing.assert_array_equal(read.label_affine, AFFINE)


def test_record_survives_bytes_with_every_field():
    record = volume_annotation(block_labels(), probabilities={"tumour": 0.25})
    assert Annotation.from_bytes(record.to_bytes()) == record
    bad = failed("k", "CXR", "", "out of memory")
    assert Annotation.from_bytes(bad.to_bytes()) == bad


def test_one_axial_slice_needs_no_other_plane():
    record = volume_annotation(block_labels())
    blob = bytearray(record.labels.blob)
    end = record.labels.offsets[3]
    blob[: record.labels.offsets[2]] = b"\0" * record.labels.offsets[2]
    blob[end:] = b"\0" * (len(blob) - end)
    damaged = dataclasses.replace(record, labels=dataclasses.replace(record.labels, blob=bytes(blob)))
    np.testing.assert_array_equal(damaged.label_slice(2, 2), block_labels()[:, :, 2])
    with pytest.raises(ValueError, match="damaged"):
        damaged.label_slice(2, 0)


def test_inflating_plane_is_bounded():
    import zlib

    bomb = zlib.compress(b"\0" * (50 << 20))
    labels = LabelMap((2, 2, 1), "uint8", tuple(np.eye(4).ravel()), (0, len(bomb)), bomb)
    with pytest.raises(ValueError, match="expected 4"):
        labels.plane(0)


def test_segments_on_slice_names_and_counts():
    record = volume_annotation(block_labels())
    assert segments_on_slice(record, 2, 0) == [(1, "liver", 6)]
    assert segments_on_slice(record, 2, 2) == [(1, "liver", 6), (300, "left kidney", 4)]
    assert segments_on_slice(record, 0, 5) == [(300, "left kidney", 6)]
    with pytest.raises(IndexError):
        segments_on_slice(record, 2, 4)


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "maybe"},
        {"status": "failed"},
        {"input_key": ""},
        {"probabilities": {"a": 1.5}},
        {"probabilities": {"a": float("nan")}},
        {"segments": (Segment(0, "x", 1, 1.0, 1, (0,) * 6),)},
    ],
)
def test_impossible_records_are_refused(fields):
    with pytest.raises(ValueError):
        Annotation(**{"input_key": "k", "expert": "CXR", **fields})


@pytest.mark.parametrize("damage", [b"", b"\xc1", b"\x80", b"not msgpack at all"])
def test_damaged_bytes_are_a_user_error(damage):
    with pytest.raises(UserError):
        Annotation.from_bytes(damage)


def test_newer_schema_is_named():
    newer = dataclasses.replace(failed("k", "CXR", "", "r"), schema_version=99)
    with pytest.raises(UserError, match="schema 99"):
        Annotation.from_bytes(newer.to_bytes())


def make(i, status="ok", **fields):
    if status == "failed":
        return failed(f"key{i}", "CXR", "", fields.get("reason", "broken"))
    return Annotation(f"key{i}", "CXR", probabilities={"pneumonia": i / 100}, **fields)


def test_store_merges_runs_and_resume_skips(tmp_path):
    with AnnotationWriter(tmp_path, records_per_shard=2) as writer:
        assert [writer.write(make(i)) for i in range(5)] == [True] * 5
    with AnnotationWriter(tmp_path) as writer:
        assert writer.status("key4", "CXR") == "ok" and writer.status("key5", "CXR") is None
        assert [writer.write(make(i)) for i in range(3, 7)] == [False, False, True, True]
    store = AnnotationStore(tmp_path)
    assert len(store) == 7
    assert [key for key, _, _ in sorted(store.keys())] == [f"key{i}" for i in range(7)]
    for i in range(7):
        assert store.get(f"key{i}", "CXR") == make(i)
    assert store.get("key1", "CXR", "other args") is None
    assert store.get("key1", "VISTA3D") is None


def test_success_replaces_failure_but_not_the_other_way(tmp_path):
    for record, added in [
        (make(1, "failed"), True),
        (make(1, "failed", reason="again"), False),
        (make(1), True),
        (make(1, "failed"), False),
    ]:
        with AnnotationWriter(tmp_path) as writer:
            assert writer.write(record) is added
    assert AnnotationStore(tmp_path).get("key1", "CXR") == make(1)


def test_shard_without_index_does_not_exist(tmp_path, monkeypatch):
    writer = AnnotationWriter(tmp_path)
    writer.write(make(1))

    def full(path, _):
        raise OSError(errno.ENOSPC, "no space left", str(path))

    monkeypatch.setattr(annotations.epath.Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"index: cannot be written \(no space left\); free space"):
        writer.flush()
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".array_record"]
    assert len(AnnotationStore(tmp_path)) == 0
    monkeypatch.undo()
    writer.flush()  # the record is still pending
    assert AnnotationStore(tmp_path).get("key1", "CXR") == make(1)


def test_killed_writer_loses_only_the_open_shard(tmp_path):
    code = f"""
import os, signal
from vilam3_jax.data.experts.store import Annotation, AnnotationWriter
w = AnnotationWriter({str(tmp_path)!r}, records_per_shard=3)
for i in range(8):
    w.write(Annotation(f"key{{i}}", "CXR"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert len(AnnotationStore(tmp_path)) == 6
    with AnnotationWriter(tmp_path) as writer:
        assert [writer.write(make(i)) for i in range(8)] == [False] * 6 + [True] * 2
    assert len(AnnotationStore(tmp_path)) == 8


def test_damaged_stores_name_the_file(tmp_path):
    with pytest.raises(UserError, match="no such annotation store"):
        AnnotationStore(tmp_path / "missing")
    with AnnotationWriter(tmp_path) as writer:
        writer.write(make(1))
    store = AnnotationStore(tmp_path)
    (shard,) = tmp_path.glob("*.array_record")
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        store.get("key1", "CXR")
    (index,) = tmp_path.glob("*.index")
    whole = index.read_bytes()
    for damaged in (b"", b"{}", whole[:-1], whole[:200] + b"?" + whole[201:]):
        index.write_bytes(damaged)
        for opened in (AnnotationStore, AnnotationWriter):
            with pytest.raises(
                UserError, match=rf"{index.name}: damaged index .*; delete it and annotate again"
            ):
                opened(tmp_path)


def test_store_crosses_processes(tmp_path):
    with AnnotationWriter(tmp_path) as writer:
        writer.write(make(7))
    store = AnnotationStore(tmp_path)
    store.get("key7", "CXR")
    assert copy.deepcopy(store).get("key7", "CXR") == make(7)


def test_store_in_a_bucket(bucket):
    with AnnotationWriter("gs://bucket/store", records_per_shard=1) as writer:
        writer.write(make(1))
        writer.write(make(2))
    assert len(list((bucket / "store").glob("*.array_record"))) == 2
    with AnnotationWriter("gs://bucket/store") as writer:
        assert not writer.write(make(1))
    store = AnnotationStore("gs://bucket/store")
    assert [store.get(f"key{i}", "CXR") for i in (1, 2, 1)] == [make(1), make(2), make(1)]
    assert not [p for p in (bucket / "store").iterdir() if p.name.startswith(".")]


def test_import_brings_neither_jax_nor_torch():
    code = (
        "import sys, vilam3_jax.data.experts.store, vilam3_jax.data.experts.cards;"
        "print([m for m in ('jax', 'flax', 'torch') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Falsification


def answers(record):
    """The facts that determine an answer."""
    top = max(sorted(record.probabilities), key=record.probabilities.get, default=None)
    positive = frozenset(n for n, p in record.probabilities.items() if p > 0.5)
    return top, positive, frozenset(s.label_id for s in record.segments)


probabilities = st.dictionaries(
    st.sampled_from("abcdef"), st.floats(0, 1, allow_nan=False), min_size=1, max_size=6
)


@settings(max_examples=300)
@given(probabilities, st.integers(0, 2**32), st.booleans())
def test_falsified_probabilities_answer_otherwise(values, seed, exclusive):
    if exclusive:
        total = sum(values.values())
        values = {n: (p / total if total > 1e-6 else 1 / len(values)) for n, p in values.items()}
        values = {n: min(1.0, p) for n, p in values.items()}
    record = Annotation("k", "CXR", probabilities=values)
    wrong = falsify(record, seed)
    assert set(wrong.probabilities) == set(values)
    assert all(0 <= p <= 1 for p in wrong.probabilities.values())
    assert answers(wrong)[:2] != answers(record)[:2]
    assert wrong == falsify(record, seed)
    if exclusive and len(values) > 1:
        assert answers(wrong)[0] != answers(record)[0]
        assert sum(wrong.probabilities.values()) == pytest.approx(1.0, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    st.sets(st.sampled_from(sorted(UNIVERSE))),
    st.sets(st.sampled_from(sorted(UNIVERSE)), min_size=1),
    st.integers(0, 1000),
)
def test_falsified_segments_answer_otherwise(present, universe, seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, *present]), size=(5, 4, 6))
    record = volume_annotation(labels, UNIVERSE)
    present = {s.label_id for s in record.segments}
    wrong = falsify(record, seed, {i: UNIVERSE[i] for i in universe})
    found = {s.label_id for s in wrong.segments}
    assert found != present
    assert found - universe == present - universe  # labels outside the universe stay
    if (universe & present) and (universe - present):
        assert not (found & present & universe)
    assert {int(i) for i in np.unique(wrong.label_map()) if i} == found
    assert all(s.name == UNIVERSE[s.label_id] for s in wrong.segments)
    assert wrong == falsify(record, seed, {i: UNIVERSE[i] for i in universe})


def test_falsified_volumes_leave_the_range_of_the_truth():
    record = volume_annotation(block_labels())
    wrong = falsify(record, 3, UNIVERSE)
    true_ml = sorted(s.volume_ml for s in record.segments)
    assert len(wrong.segments) == 2
    for segment in wrong.segments:
        voxels = int((wrong.label_map() == segment.label_id).sum()) * 0.012
        assert voxels == pytest.approx(true_ml[0]) or voxels == pytest.approx(true_ml[1])
        assert not 0.5 <= segment.volume_ml / voxels <= 2


def test_seeds_differ_and_failures_stay():
    record = volume_annotation(block_labels())
    assert len({answers(falsify(record, s, UNIVERSE))[2] for s in range(20)}) > 1
    assert falsify(make(1, "failed"), 0) == make(1, "failed")
    with pytest.raises(ValueError, match="nothing to falsify"):
        falsify(Annotation("k", "CXR"), 0)
