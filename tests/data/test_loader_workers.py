"""The loader in worker processes: the same batches as with threads, states for any number of workers."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from data_worlds import (
    annotate,
    build,
    config,
    ct_annotation,
    ct_example,
    ct_volume,
    film,
    pair,
    picture,
    report,
    same,
    take,
    write,
)

from vilam3_jax.data import loader as loader_lib
from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.errors import UnavailableError, UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Films as bytes, one of them broken; reports without images; slices of a volume with an expert."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    films = [film(i, rng) for i in range(37)]
    broken = Example("broken", "conversation", (ImageRef(data=b"\x89PNG junk"),), films[0].turns)
    write(folder / "films", [*films[:9], broken, *films[9:]])
    write(folder / "reports", [report(i, rng) for i in range(23)])
    write(folder / "pairs", [pair(i) for i in range(20)])
    key = ct_volume(folder / "slices")
    write(folder / "slices", [ct_example(key, i, axis=i % 3, index=3 + i % 5) for i in range(12)])
    annotate(folder / "said", [ct_annotation(key)])
    return folder


def config_of(root, kind="generative", **data):
    if kind == "contrastive":
        cfg = config(root, (("pairs", 1.0),), global_pairs=8, loader_shards=4, **data)
        cfg.task = kind
        return cfg
    mixture = (("films", 1.0), ("reports", 1.0), ("slices", 2.0))
    return config(
        root, mixture, seq_len=900, annotations=str(root / "said"), experts="mixed", loader_shards=6, **data
    )


def run(cfg, count, state=None, **settings):
    loader = build(cfg, **settings)
    if state is not None:
        loader.set_state(json.loads(json.dumps(state)))
    batches = take(loader, count)
    place = loader.get_state()
    loader.close()
    assert not multiprocessing.active_children()
    return batches, place, loader.stats


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["generative", "contrastive"])
def test_any_number_of_workers_gives_the_same_batches_and_goes_on_from_any_other(root, kind) -> None:
    whole, end, stats = run(config_of(root, kind), 7)
    assert kind == "contrastive" or stats.skipped_total
    middles = {}
    for workers in (1, 3, 4, 9):
        cfg = config_of(root, kind, workers=workers)
        found, middles[workers], counted = run(cfg, 3)
        assert same(found, whole[:3])
        rest, place, more = run(cfg, 4, middles[workers])
        assert same(rest, whole[3:]) and place == end
        assert counted.skipped_total + more.skipped_total == stats.skipped_total
        assert counted.samples + more.samples == stats.samples
    assert len({json.dumps(state) for state in middles.values()}) == 1
    rest, place, _ = run(config_of(root, kind), 4, middles[3])
    assert same(rest, whole[3:]) and place == end


def test_workers_give_the_batches_of_threads_and_resume_threads(root) -> None:
    whole, end, stats = run(config_of(root), 5)
    _, middle, _ = run(config_of(root), 2)
    rest, place, _ = run(config_of(root, workers=2), 3, middle)
    assert same(rest, whole[2:]) and place == end and stats.skipped_total


@pytest.mark.slow
def test_a_run_goes_on_with_other_hosts_and_workers(root) -> None:
    """One host, then two with workers, then one again."""
    cfg = config_of(root, global_rows=12)
    whole, end, _ = run(cfg, 6)
    begun, state, _ = run(config_of(root, global_rows=12, workers=3), 2)
    assert same(begun, whole[:2])
    parts, joined = [range(3), range(3, 6)], {}
    for part in parts:
        batches, place, _ = run(config_of(root, global_rows=12, workers=2), 2, state, local_units=part)
        joined |= place
        rows = slice(part[0] * 2, part[-1] * 2 + 2)
        for batch, expected in zip(batches, whole[2:4], strict=True):
            assert np.array_equal(batch.tokens, expected.tokens[rows])
            assert np.array_equal(batch.images, expected.images[part[0] : part[-1] + 1])
    rest, place, _ = run(cfg, 2, joined)
    assert same(rest, whole[4:]) and place == end


def test_errors_of_workers_are_those_of_threads(tmp_path, root) -> None:
    turns = film(0, np.random.default_rng(0)).turns
    write(tmp_path / "films", [Example("b", "conversation", (ImageRef(data=b"junk"),), turns)])
    messages = []
    for workers in (0, 1):
        loader = build(config(tmp_path, workers=workers))
        with pytest.raises(UserError, match=r"no usable record of films in 16 tried.*example b") as error:
            take(loader, 3)
        loader.close()
        messages.append((str(error.value), type(error.value), getattr(error.value, "__notes__", None)))
    assert messages[0] == messages[1] and "\n" not in messages[0][0]


@pytest.mark.slow
def test_a_worker_that_dies_is_named(root) -> None:
    loader = build(config_of(root, workers=1))
    batches = iter(loader)
    next(batches)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(
        UnavailableError, match=r"worker process of the data loader died .*lower data\.workers"
    ):
        for _ in range(50):
            next(batches)
    loader.close()


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from data_worlds import build, config
if __name__ == "__main__":
    next(iter(build(config(sys.argv[2], (("films", 1.0),), workers=2))))
    print("killed", flush=True)
    os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_worker(root, tmp_path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    # The workers write to the same pipe, so this returns when all have ended.
    ended = subprocess.run(
        [sys.executable, str(script), os.path.dirname(__file__), str(root)],
        stdout=subprocess.PIPE,
        timeout=120,
        check=False,
    )
    assert ended.returncode == -signal.SIGKILL and b"killed" in ended.stdout


def test_too_little_shared_memory_is_refused(root, monkeypatch, tmp_path) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(loader_lib.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"data\.workers=2: /dev/shm has 0 MiB.*--shm-size"):
        build(config_of(root, workers=2))
    build(config_of(root)).close()


def by_path(folder, names, kind="conversation"):
    """A dataset of 12 records with image files."""
    folder.mkdir(parents=True, exist_ok=True)
    turns = pair(0).turns if kind == "pair" else film(0, np.random.default_rng(0)).turns
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))
    images = [ImageRef(path=names[number % len(names)]) for number in range(12)]
    write(folder, [Example(f"e{number}", kind, (image,), turns) for number, image in enumerate(images)])
    return folder


@pytest.mark.parametrize("kind", ["conversation", "pair"])
@pytest.mark.parametrize("change", ["other", "gone", "copied"])
def test_a_state_is_of_the_images_behind_its_paths(tmp_path, kind, change) -> None:
    file = by_path(tmp_path / "films", ["a.png"], kind) / "a.png"
    cfg = config(tmp_path, global_pairs=4)
    cfg.task = "contrastive" if kind == "pair" else cfg.task
    _, state, _ = run(cfg, 2)
    assert all(value["pictures"] for value in state.values())
    assert "a.png" not in json.dumps(state)  # paths may name patients
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(picture(9 if change == "other" else 0))  # a copy has another time
    loader = build(cfg)
    if change == "copied":
        loader.set_state(state)
        take(loader, 1)
    else:
        reason = "has changed since the data state was saved; restore"
        if change == "gone":
            reason = "(is missing since the data state was saved; restore|no such file.*restore the data)"
        with pytest.raises(UserError, match=rf"a\.png: {reason}"):
            loader.set_state(state)
    loader.close()


def test_a_state_names_the_one_image_that_changed(tmp_path) -> None:
    names = [f"{i}.png" for i in range(12)]
    folder = by_path(tmp_path / "films", names)
    cfg = config(tmp_path, loader_shards=1, global_rows=2)
    _, state, _ = run(cfg, 1)
    bound = [int(index) for index in state["0"]["pictures"]]
    loader = build(cfg)
    record = loader.samples.address(state["0"]["pending"][0])[1]
    assert state["0"]["pending"][0] in bound
    (folder / names[record]).write_bytes(picture(99))
    with pytest.raises(UserError, match=rf"films/{record}\.png: has changed"):
        loader.set_state(state)
    # Older states have no image files.
    loader.set_state({n: {k: v for k, v in of.items() if k != "pictures"} for n, of in state.items()})
    loader.close()


def test_an_image_that_cannot_be_read_now_is_no_other_image(tmp_path, monkeypatch) -> None:
    by_path(tmp_path / "films", ["a.png"])
    cfg = config(tmp_path)
    _, state, _ = run(cfg, 1)
    loader = build(cfg)

    def fail(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(loader_lib.stream.paths, "file_size", fail)
    with pytest.raises(UnavailableError, match=r"a\.png: cannot be read now"):
        loader.set_state(state)
    loader.close()


def test_what_is_read_ahead_is_bounded(root) -> None:
    """At most two batches are made ahead of the consumer."""
    loader = build(config_of(root))
    batches = iter(loader)
    next(batches)
    (running,) = loader._running
    for _ in range(100):
        if running._buffer.full():
            break
        import time

        time.sleep(0.05)
    assert running._buffer.qsize() == running._buffer.maxsize == 8
    assert list(itertools.islice(batches, 1))
    loader.close()
