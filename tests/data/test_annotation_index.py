"""The index against a dictionary; compaction with concurrent writers and readers; kills and full disks."""

import collections
import errno
import hashlib
import os
import pathlib
import pickle
import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax.data import shards as shards_lib
from vilam3_jax.data.experts import index as index_lib
from vilam3_jax.data.experts import store as store_lib
from vilam3_jax.data.experts.index import Entry, Index, Shard, read_index
from vilam3_jax.data.experts.record import Annotation, failed
from vilam3_jax.data.experts.store import (
    AnnotationStore,
    AnnotationWriter,
    compact,
    content_sha256,
    store_info,
)
from vilam3_jax.errors import UnavailableError, UserError


def key(number):
    return hashlib.sha256(str(number).encode()).hexdigest()


def make(number, *, expert="CXR", status="ok", **fields):
    if status == "failed":
        return failed(key(number), expert, "", "broken", version="1", **fields)
    return Annotation(key(number), expert, version="1", probabilities={"effusion": number % 7 / 7}, **fields)


def write(folder, annotations, records_per_shard=2):
    with AnnotationWriter(folder, records_per_shard=records_per_shard) as writer:
        for annotation in annotations:
            writer.write(annotation)


def answers(folder):
    store = AnnotationStore(folder)
    return {found: store.get(*found) for found in sorted(store.keys())}


# The index alone

# Keys with equal first 8 bytes, by which the index sorts first.
INPUTS = ("0" * 64, "0" * 63 + "1", "0" * 15 + "1" + "0" * 48, "f" * 64, key(1), key(2), "scan 7", "scan 8")
entries = st.builds(
    lambda name, expert, args, version, status, content: Entry(
        (name, expert, args), version, status, bytes([content]) * 32, 0
    ),
    st.sampled_from(INPUTS),
    st.sampled_from(["CXR", "VISTA3D"]),
    st.sampled_from(["", "organs"]),
    st.sampled_from(["1", "2"]),
    st.sampled_from(["ok", "failed"]),
    st.integers(0, 255),
)


def shards_of(lists):
    """Shards of entries with distinct stamps."""
    stamp = 0
    for number, listed in enumerate(lists):
        stamped = []
        for entry in listed:
            stamp += 1
            stamped.append(entry._replace(stamp=stamp))
        yield Shard(f"annotations-{number}.array_record", len(listed), 10 * len(listed)), stamped


def model_of(shards):
    """Key to (shard, record, status, version) of the best record, by a plain loop."""
    model = {}
    for shard, listed in shards:
        for record, entry in enumerate(listed):
            if entry.key in model and model[entry.key][2] == "ok" and entry.status != "ok":
                continue
            model[entry.key] = (shard.name, record, entry.status, entry.version)
    return model


def content_of(index):
    return {
        found: (place.shard, place.record, place.outcome.status, place.outcome.version)
        for found in list(index.keys())
        if (place := index.find(found)) is not None
    }


@settings(max_examples=80, deadline=None)
@given(lists=st.lists(st.lists(entries, max_size=8), max_size=8), data=st.data())
def test_merging_in_any_order_and_grouping_equals_a_dictionary(lists, data):
    shards = list(shards_of(lists))
    model = model_of(shards)
    files = []
    for shard, listed in shards:
        one = Index()
        one.add_shard(shard, listed)
        files.append((shard.name, one.to_bytes()))
    # Some files were merged earlier, and may still be present.
    files = data.draw(st.permutations(files))
    count = data.draw(st.integers(0, len(files)))
    merged = ("merged", read_index(files[:count]).to_bytes())
    index = read_index([merged, *files[data.draw(st.integers(0, count)) :]])
    assert content_of(index) == model and len(index) == len(model)
    assert list(index.keys()) == list(read_index(files).keys())
    assert all(index.find((name, "CXR", "other")) is None for name in INPUTS)
    # The index of a writer grows shard by shard.
    grown = Index()
    for shard, listed in shards:
        grown.add_shard(shard, listed)
        grown.merge_similar_layers()
    assert content_of(grown) == model
    assert index.digest() == grown.digest() == read_index(files).digest()
    assert sum(index.counts().values()) == len(model)
    assert collections.Counter(status for _, _, status, _ in model.values()) == collections.Counter(
        {s: sum(n for call, n in index.counts().items() if call.status == s) for s in ("ok", "failed")}
    )


@settings(max_examples=40, deadline=None)
@given(lists=st.lists(st.lists(entries, min_size=1, max_size=4), min_size=1, max_size=3), data=st.data())
def test_a_damaged_file_is_told(lists, data):
    index = Index()
    for shard, listed in shards_of(lists):
        index.add_shard(shard, listed)
    whole = index.to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = [whole[:at], whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]]
    for content in damaged:
        with pytest.raises(UserError, match=r"^here: damaged index \(.*\); delete it and annotate again$"):
            read_index([("here", content)])


def test_digest_is_of_the_answers_and_of_nothing_else(tmp_path):
    numbers = list(range(12))
    write(tmp_path / "a", [make(n, seconds=1.0) for n in numbers], 3)
    random.Random(0).shuffle(numbers)
    write(tmp_path / "b", [make(n, seconds=2.0) for n in numbers], 5)
    a, b = AnnotationStore(tmp_path / "a"), AnnotationStore(tmp_path / "b")
    assert a.digest() == b.digest() and len(a.digest()) == 64
    write(tmp_path / "b", [make(1, expert="BRATS")])
    assert AnnotationStore(tmp_path / "b").digest() != a.digest()
    assert AnnotationStore(tmp_path / "b").digest("CXR") == a.digest("CXR")
    other = Annotation(key(0), "CXR", version="1", probabilities={"effusion": 0.99})
    write(tmp_path / "c", [other, *(make(n) for n in range(1, 12))])
    assert AnnotationStore(tmp_path / "c").digest() != a.digest()


def test_content_leaves_out_the_time():
    assert content_sha256(make(1, seconds=1.0)) == content_sha256(make(1)) != content_sha256(make(2))


# Stores on a disk


def test_compaction_keeps_every_answer(tmp_path):
    for run in range(3):
        records = [make(n, status="failed" if n % 5 == run else "ok") for n in range(40)]
        write(tmp_path, [*records, make(run, expert="VISTA3D")])
    known, before = answers(tmp_path), store_info(tmp_path)
    told, after = compact(tmp_path)
    assert told == before and after.digest == before.digest and after.calls == before.calls
    assert answers(tmp_path) == known and len(known) == 43
    assert sum(before.calls.values()) == after.records == after.stored == 43 < before.stored
    assert (after.shards, after.indexes) == (1, 1) and before.shards > 20
    assert len(list(tmp_path.glob("*.array_record"))) == len(list(tmp_path.glob("*.index"))) == 1
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    compact(tmp_path)  # nothing to do
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files
    write(tmp_path, [make(99), make(0)])
    assert len(AnnotationStore(tmp_path)) == 44
    assert compact(tmp_path)[1].shards == 1 and answers(tmp_path) == {**known, make(99).key: make(99)}


def test_large_shards_stay(tmp_path):
    write(tmp_path, [make(n) for n in range(20)], 10)
    large = {path.name for path in tmp_path.glob("*.array_record")}
    write(tmp_path, [make(n) for n in range(20, 26)])
    size = min(path.stat().st_size for path in tmp_path.glob("*.array_record"))
    _, after = compact(tmp_path, bytes_per_shard=size)
    assert after.indexes == 1 and after.records == 26 and len(answers(tmp_path)) == 26
    left = {path.name for path in tmp_path.glob("*.array_record")}
    assert after.shards == len(left) and left & large == large


def test_readers_go_on_while_a_store_is_compacted(tmp_path):
    write(tmp_path, [make(n) for n in range(8)])
    store, state = AnnotationStore(tmp_path), pickle.dumps(AnnotationStore(tmp_path))
    assert store.get(*make(0).key) == make(0)  # opens this shard alone
    compact(tmp_path)
    write(tmp_path, [make(n) for n in range(8, 12)])
    compact(tmp_path)
    assert [store.get(*make(n).key) for n in range(8)] == [make(n) for n in range(8)]
    assert len(store) == 8 and store.get(*make(9).key) is None  # the state when it was opened
    with pytest.raises(UnavailableError, match="has other answers than when it was opened"):
        pickle.loads(state)  # noqa: S301 (pickled by this test)


def test_a_replaced_answer_is_not_given_for_the_one_that_was_there(tmp_path):
    write(tmp_path, [make(1, status="failed"), make(2)], 1)
    store = AnnotationStore(tmp_path)
    write(tmp_path, [make(1)])
    compact(tmp_path)
    assert store.get(*make(2).key) == make(2)
    with pytest.raises(UnavailableError, match="was replaced since this store was opened; start again"):
        store.get(*make(1).key)
    assert AnnotationStore(tmp_path).get(*make(1).key) == make(1)


def test_pickles_are_small_and_open_the_same_store(tmp_path):
    write(tmp_path, [make(n) for n in range(300)], 100)
    compact(tmp_path)
    store = AnnotationStore(tmp_path)
    state = pickle.dumps(store)
    assert len(state) < 1000
    write(tmp_path, [make(300)])
    copy = pickle.loads(state)  # noqa: S301 (pickled by this test)
    assert len(copy) == 300 and copy.digest() == store.digest() and make(300).key not in copy
    assert copy.get(*make(7).key) == make(7)


def test_a_large_index_is_mapped_and_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(index_lib, "_MIN_MAPPED_BYTES", 0)
    write(tmp_path, [make(n) for n in range(50)], 10)
    compact(tmp_path)
    write(tmp_path, [make(n) for n in range(50, 53)])
    store = AnnotationStore(tmp_path)
    (index,) = tmp_path.glob("merged-*.index")
    assert str(index) in pathlib.Path("/proc/self/maps").read_text()
    assert [store.get(*make(n).key) for n in (3, 51)] == [make(3), make(51)] and len(store) == 53


def test_only_one_compaction_at_a_time(tmp_path):
    write(tmp_path, [make(1)])
    with (
        store_lib._compaction_lock(store_lib.paths.as_path(tmp_path)),
        pytest.raises(UserError, match="another compaction"),
    ):
        compact(tmp_path)
    compact(tmp_path)
    with pytest.raises(UserError, match="no such annotation store"):
        compact(tmp_path / "missing")


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path):
    write(tmp_path, [make(1)])
    names = ("annotations-1-00000.array_record", ".annotations-2-00000.array_record.partial")
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    compact(tmp_path)
    assert all((tmp_path / name).exists() for name in names)
    for name in names:
        os.utime(tmp_path / name, (0, 0))
    compact(tmp_path)
    assert not any((tmp_path / name).exists() for name in names) and len(answers(tmp_path)) == 1


def test_old_stores_are_refused(tmp_path):
    (tmp_path / "annotations-1-00000.index.json").write_text('{"schema_version": 2, "entries": []}')
    for opened in (AnnotationStore, AnnotationWriter, compact, store_info):
        with pytest.raises(UserError, match=r"schema 2, this version reads \d; annotate into a new folder"):
            opened(tmp_path)


def test_a_listing_that_falls_into_a_compaction_is_made_again(tmp_path, monkeypatch):
    write(tmp_path, [make(n) for n in range(6)])
    old = set(os.listdir(tmp_path))
    compact(tmp_path)
    new, listings = os.listdir(tmp_path), []

    def torn(_):  # lists neither the removed old indexes nor the new one
        listings.append(1)
        return [] if len(listings) == 1 else sorted(old) if len(listings) == 2 else new

    monkeypatch.setattr(store_lib.os, "listdir", torn)
    assert len(AnnotationStore(tmp_path)) == 6


def test_unreadable_and_swapped_records_name_shard_and_record(tmp_path):
    write(tmp_path, [make(1), make(2)])
    (shard,) = tmp_path.glob("*.array_record")
    whole = shard.read_bytes()
    place = whole.index(key(2).encode())
    shard.write_bytes(whole[:place] + b"0" + whole[place + 1 :])
    store = AnnotationStore(tmp_path)
    assert store.get(*make(1).key) == make(1)
    with pytest.raises(UserError, match=rf"{shard.name}, record 1: cannot be read"):
        store.get(*make(2).key)
    write(tmp_path, [make(3)])
    with pytest.raises(UserError, match=rf"{shard.name}, record 1: cannot be read"):
        compact(tmp_path)
    assert shard.exists() and len(AnnotationStore(tmp_path)) == 3  # nothing was removed


# Kills and full disks

RUN = """
import sys
from vilam3_jax.data.experts.store import Annotation, AnnotationWriter, compact
import hashlib
folder, what, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
if what == "compact":
    while True:
        compact(folder)
writer = AnnotationWriter(folder, records_per_shard=3)
for number in range(first, first + 100_000):
    name = hashlib.sha256(str(number).encode()).hexdigest()
    writer.write(Annotation(name, "CXR", version="1", probabilities={"effusion": number % 7 / 7}))
    if not writer._pending:
        print(number, flush=True)
"""


def start(folder, what, first=0):
    command = [sys.executable, "-c", RUN, str(folder), what, str(first)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process):
    process.send_signal(signal.SIGKILL)
    lines = process.stdout.read().splitlines()
    process.wait()
    return [int(line) for line in lines if line.isdecimal()]


def test_writers_and_compactions_that_are_killed_lose_nothing(tmp_path):
    """Two writers and a compaction are killed repeatedly while this process reads."""
    write(tmp_path, [make(-1)])
    rng = random.Random(5)
    committed = {-1}
    for turn in range(2):
        firsts = [(2 * turn + i) * 100_000 for i in range(2)]
        writers = [start(tmp_path, "write", first) for first in firsts]
        compaction = start(tmp_path, "compact")
        until = time.monotonic() + rng.uniform(0.3, 0.7)
        while time.monotonic() < until:
            store = AnnotationStore(tmp_path)
            for found in rng.sample(list(store.keys()), min(5, len(store))):
                assert store.get(*found).key == found
        kill(compaction)
        for first, writer in zip(firsts, writers, strict=True):
            committed |= {number for last in kill(writer) for number in range(first, last + 1)}
        assert {make(number).key for number in committed} <= set(AnnotationStore(tmp_path).keys())
    compact(tmp_path)
    store = AnnotationStore(tmp_path)
    assert len(committed) > 20
    assert all(store.get(*make(number).key) == make(number) for number in committed)
    assert store_info(tmp_path).indexes == 1


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path):
    """A limit on file sizes simulates the full disk."""
    write(tmp_path, [make(n) for n in range(5)])
    code = f"""
import resource, signal
from vilam3_jax.data.experts.store import Annotation, AnnotationWriter, compact
from vilam3_jax.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = AnnotationWriter({str(tmp_path)!r})
for number in range(200):
    writer.write(Annotation(f"{{number:064x}}", "CXR"))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
for action in (writer.flush, lambda: compact({str(tmp_path)!r})):
    try:
        action()
        print("done")
    except UserError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
writer.flush()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert "cannot be written" in said[0] and "free space or choose another folder" in said[0], done.stdout
    assert len(AnnotationStore(tmp_path)) == 205
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    compact(tmp_path)
    assert len(answers(tmp_path)) == 205


def test_a_failing_disk_is_told_from_a_full_one(tmp_path, monkeypatch):
    writer = AnnotationWriter(tmp_path)
    writer.write(make(1))

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(store_lib.os, "replace", fails)
    with pytest.raises(UnavailableError, match="check the disk or the network"):
        writer.flush()


# Object stores


def test_a_store_in_a_bucket_is_compacted(bucket):
    folder = "gs://bucket/store"
    write(folder, [make(n) for n in range(9)])
    store = AnnotationStore(folder)
    assert store.get(*make(0).key) == make(0)
    before, after = compact(folder)
    assert (before.shards, after.shards, after.indexes) == (5, 1, 1) and before.digest == after.digest
    assert [store.get(*make(n).key) for n in range(9)] == [make(n) for n in range(9)]
    assert sorted(path.suffix for path in (bucket / "store").iterdir()) == [".array_record", ".index"]
    lease = bucket / "store" / store_lib._LEASE
    lease.write_text(f"{time.time_ns()} somebody")
    with pytest.raises(UserError, match="another compaction is running"):
        compact(folder)
    lease.write_text("5 somebody long ago")
    compact(folder)
    assert not lease.exists()


def test_many_shards_need_few_open_files(tmp_path, monkeypatch, bucket):
    monkeypatch.setattr(shards_lib, "_MAX_OPEN", 4)
    for folder in (tmp_path / "disk", "gs://bucket/store"):
        write(folder, [make(n) for n in range(12)], 1)
        store = AnnotationStore(folder)
        used = len(os.listdir("/proc/self/fd"))
        assert all(store.get(*make(n).key) == make(n) for n in (*range(12), *range(12)))
        assert len(os.listdir("/proc/self/fd")) <= used + 5
    for shard in (bucket / "store").glob("*.array_record"):
        shard.unlink()  # the copies are used
    assert all(store.get(*make(n).key) == make(n) for n in range(12))


@pytest.mark.slow
def test_a_store_behind_the_protocol_of_cloud_storage():
    from tests.training.bucket_server import serve

    with serve("bucket"):
        folder = "gs://bucket/store"
        write(folder, [make(n) for n in range(5)])
        write(folder, [make(n) for n in range(3, 8)])
        store, state = AnnotationStore(folder), pickle.dumps(AnnotationStore(folder))
        assert len(pickle.loads(state)) == 8  # noqa: S301 (pickled by this test)
        before, after = compact(folder)
        assert (before.shards, after.shards, after.indexes) == (5, 1, 1)
        assert [store.get(*make(n).key) for n in range(8)] == [make(n) for n in range(8)]
        assert len(pickle.loads(state)) == 8  # noqa: S301 (pickled by this test)
        assert not AnnotationWriter(folder).write(make(1))
        assert sorted(path.suffix for path in store_lib.paths.children(folder)) == [".array_record", ".index"]
        assert not store_lib.paths.exists(f"{folder}/{store_lib._LEASE}")
