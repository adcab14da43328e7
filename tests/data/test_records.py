"""Tests of datasets on disk: round trip, counts, and atomic writes."""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import threading

import pytest

from vilam3_jax.data import shards
from vilam3_jax.data.examples import Example, ExpertRequest, ImageRef, Turn
from vilam3_jax.data.records import ExampleSource, ExampleWriter
from vilam3_jax.data.shards import ShardReaders, open_reader
from vilam3_jax.data.tfds_folder import read_info
from vilam3_jax.errors import UnavailableError, UserError


def example(number: int) -> Example:
    return Example(
        f"e{number}",
        "conversation",
        (ImageRef(data=b"x" * 100),),
        (Turn("user", "<image>\nWhat?"), Turn("assistant", f"Number {number}.", True)),
        (ExpertRequest("CXR"),),
        {"licence": "CC0", "modality": "chest X-ray", "question_types": ["yes_no"]},
    )


def test_round_trip_over_several_shards(tmp_path) -> None:
    with ExampleWriter(
        tmp_path / "d", "train", name="films", provenance={"a": 1}, bytes_per_shard=500
    ) as writer:
        for number in range(10):
            writer.write(example(number))
    with ExampleWriter(tmp_path / "d", "heldout", provenance={"b": 2}) as writer:
        writer.write(example(99))
    source = ExampleSource(tmp_path / "d", "train")
    assert [source[i] for i in range(len(source))] == [example(i) for i in range(10)]
    assert len(source.info["splits"]["train"]["shards"]) > 2
    assert ExampleSource(tmp_path / "d", "heldout")[0] == example(99)
    assert source.info["provenance"] == {"a": 1, "b": 2} and source.info["licences"] == ["CC0"]
    assert source.info["splits"]["train"]["counts"]["experts"] == {"CXR": 10}
    assert source.find("e7") == 7 and source.data_root == tmp_path / "d"
    with pytest.raises(UserError, match="no example 'e10'"):
        source.find("e10")
    with pytest.raises(IndexError):
        source[10]
    with pytest.raises(UserError, match="no split 'test'; it has heldout, train"):
        ExampleSource(tmp_path / "d", "test")


def test_dataset_in_a_bucket(bucket) -> None:
    with ExampleWriter("gs://bucket/films", "train", bytes_per_shard=300) as writer:
        for number in range(6):
            writer.write(example(number))
    assert len(list((bucket / "films").glob("*.array_record-*"))) == len(writer._shards) > 2
    source = ExampleSource("gs://bucket/films", "train")
    assert source.name == "films"
    assert [source[i] for i in (5, 0, 1, 2, 3, 4, 5)] == [example(i) for i in (5, 0, 1, 2, 3, 4, 5)]
    again = ExampleSource("gs://bucket/films", "train")
    (bucket / "films" / writer._shards[1]["file"]).unlink()
    assert source[2] == example(2)  # fetched earlier
    assert again[0] == example(0)
    with pytest.raises(UserError, match=r"array_record-00001-of-0000\d: cannot be read \(no such file\)"):
        again[writer._shards[0]["records"]]
    with pytest.raises(UserError, match=r"array_record-00001-of-0000\d: No such file"):
        ExampleSource("gs://bucket/films", "train")
    with pytest.raises(UserError, match="no example for split"), ExampleWriter("gs://bucket/none", "train"):
        pass
    assert not list((bucket / "none").glob("*"))


def test_a_shard_under_way_does_not_hold_up_others(bucket, monkeypatch) -> None:
    with ExampleWriter("gs://bucket/films", "train", bytes_per_shard=1) as writer:
        writer.write(example(0))
        writer.write(example(1))
    source = ExampleSource("gs://bucket/films", "train")
    fetch, slow, fetched = ShardReaders._fetch, threading.Event(), []

    def fetched_in_time(self, path):
        fetched.append(path.name)
        assert "-00000-" not in path.name or slow.wait(60)
        return fetch(self, path)

    monkeypatch.setattr(ShardReaders, "_fetch", fetched_in_time)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(source.__getitem__, 0) for _ in range(2)]
        try:
            assert pool.submit(source.__getitem__, 1).result(60) == example(1)
            assert not any(future.done() for future in waiting)
        finally:
            slow.set()
        assert [future.result(60) for future in waiting] == [example(0)] * 2
    assert sorted(fetched) == [shard["file"] for shard in writer._shards]  # once each


def test_refusals(tmp_path) -> None:
    with pytest.raises(UserError, match="no example for split"), ExampleWriter(tmp_path, "train"):
        pass
    with pytest.raises(UserError, match="written twice"), ExampleWriter(tmp_path, "train") as writer:
        writer.write(example(0))
        writer.write(example(0))
    with ExampleWriter(tmp_path, "train") as writer:
        writer.write(example(0))
    with pytest.raises(UserError, match="already has a split"):
        ExampleWriter(tmp_path, "train")
    with pytest.raises(UserError, match="lower-case"):
        ExampleWriter(tmp_path, "../train")


def test_an_interrupted_split_does_not_exist(tmp_path) -> None:
    with pytest.raises(RuntimeError), ExampleWriter(tmp_path, "train", bytes_per_shard=300) as writer:
        for number in range(4):
            writer.write(example(number))
        raise RuntimeError("stop")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="vilam3 prepare"):
        ExampleSource(tmp_path, "train")


def test_damage_is_named(tmp_path) -> None:
    with ExampleWriter(tmp_path, "train") as writer:
        writer.write(example(0))
    (shard,) = tmp_path.glob("*-train.array_record-00000-of-00001")
    whole = shard.read_bytes()
    shard.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match=r"train\.array_record-00000-of-00001: cannot be read"):
        ExampleSource(tmp_path, "train")[0]
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"00000-of-00001: has {len(whole) // 2} bytes, {len(whole)} were"):
        ExampleSource(tmp_path, "train")
    shard.unlink()
    with pytest.raises(UserError, match="No such file"):
        ExampleSource(tmp_path, "train")
    info = read_info(tmp_path)
    info["splits"]["train"]["shards"][0]["file"] = "../x"
    (tmp_path / "metadata.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="damaged"):
        read_info(tmp_path)


def test_a_shard_cut_off_while_it_is_read_is_no_bad_record(tmp_path) -> None:
    with ExampleWriter(tmp_path, "train") as writer:
        for number in range(200):
            writer.write(example(number))
    source = ExampleSource(tmp_path, "train")
    assert source[0].id
    (shard,) = tmp_path.glob("*array_record*")
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UnavailableError, match=r"bytes, \d+ were written"):
        list(source)


def test_a_shard_that_its_file_server_forgot_is_opened_again(tmp_path, monkeypatch) -> None:
    with ExampleWriter(tmp_path, "train") as writer:
        for number in range(3):
            writer.write(example(number))

    class Stale:
        def __init__(self, path: str) -> None:
            self.reader = open_reader(path)

        def num_records(self) -> int:
            return self.reader.num_records()

        def read(self, *_: int) -> list[bytes]:
            raise RuntimeError("Stale file handle")

    source = ExampleSource(tmp_path, "train")
    monkeypatch.setattr(shards, "open_reader", Stale)
    with pytest.raises(UserError, match=r"-00000-of-00001, record 1: cannot be read \(Stale file handle"):
        source[1]
    opened: list[str] = []

    def first_stale(path: str) -> object:
        opened.append(path)
        return Stale(path) if len(opened) == 1 else open_reader(path)

    source = ExampleSource(tmp_path, "train")
    monkeypatch.setattr(shards, "open_reader", first_stale)
    assert [source[i] for i in (1, 2, 0)] == [example(i) for i in (1, 2, 0)] and len(opened) == 2


def test_reading_and_showing_examples_needs_no_jax() -> None:
    code = (
        "import sys, vilam3_jax.data.records, vilam3_jax.data.show, vilam3_jax.data.packing\n"
        "assert not {'jax', 'flax', 'torch', 'tensorflow'} & set(sys.modules), 'imported too much'\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
