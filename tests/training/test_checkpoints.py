"""Run checkpoints: what is kept, and what a torn or unfinished one leads to."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vilam3_jax.checkpoints import run_checkpoints
from vilam3_jax.errors import UnavailableError, UserError


def state(step: int) -> dict[str, jax.Array]:
    return {"w": jnp.arange(40_000, dtype=jnp.float32) + step, "step": jnp.asarray(step, jnp.int32)}


def abstract() -> dict[str, jax.ShapeDtypeStruct]:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place) for k, v in state(0).items()}


def save(workdir: Path, *steps: int, **keep: int) -> run_checkpoints.RunCheckpoints:
    saved = run_checkpoints.RunCheckpoints(workdir, **keep)
    for step in steps:
        saved.save(step, state(step), {"0": {"next": step}}, {"clock": {"tokens": step}})
    saved.wait()
    return saved


def restore(workdir: Path) -> int:
    """Loads; returns the step, of which all parts must be."""
    found = run_checkpoints.RunCheckpoints(workdir).restore(abstract())
    assert found is not None
    np.testing.assert_array_equal(found.state["w"], state(found.step)["w"])
    assert found.data == {"0": {"next": found.step}} and found.run["clock"]["tokens"] == found.step
    return found.step


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def on_disk(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "keep,left", [({"kept": 1}, [5]), ({"kept": 2}, [4, 5]), ({"kept": 1, "kept_every": 2}, [2, 4, 5])]
)
def test_what_is_kept(tmp_path, keep, left):
    save(tmp_path, 1, 2, 3, 4, 5, **keep)
    assert on_disk(tmp_path) == left and restore(tmp_path) == 5


def test_a_step_is_saved_once(tmp_path):
    save(tmp_path, 1, 2, 2)
    assert restore(tmp_path) == 2
    save(tmp_path, 2, 3)
    assert restore(tmp_path) == 3


def test_nothing_to_restore(tmp_path):
    assert run_checkpoints.RunCheckpoints(tmp_path).restore(abstract()) is None


def truncate(folder: Path) -> None:
    file = largest(folder)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def remove_file(folder: Path) -> None:
    largest(folder).unlink()


def remove_item(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def tear_seal(folder: Path) -> None:
    (folder / run_checkpoints.FILES).write_text('{"state/')


def unsealed(tear):
    def both(folder: Path) -> None:
        (folder / run_checkpoints.FILES).unlink(missing_ok=True)
        tear(folder)

    both.__name__ = f"unsealed_{tear.__name__}"
    return both


@pytest.mark.parametrize(
    "tear",
    [truncate, remove_file, remove_item, empty, tear_seal]
    + [unsealed(tear) for tear in (truncate, remove_file, remove_item, empty)],
)
def test_a_torn_checkpoint_falls_back_and_is_kept_as_evidence(tmp_path, caplog, tear):
    save(tmp_path, 1, 2)
    newest = tmp_path / "checkpoints" / "2"
    assert (newest / run_checkpoints.FILES).exists()
    tear(newest)
    left = sorted(path.name for path in newest.rglob("*"))
    assert restore(tmp_path) == 1
    said = caplog.text
    assert "checkpoints/2: damaged (" in said and "resuming from step 1" in said
    aside, why = sorted((tmp_path / "checkpoints_damaged").iterdir())
    assert why.name == f"{aside.name}.txt" and why.read_text().strip() in said
    assert aside.name.startswith("2.") and sorted(path.name for path in aside.rglob("*")) == left
    save(tmp_path, 2)  # the same step again
    assert restore(tmp_path) == 2


def test_no_seal_is_no_damage(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "2" / run_checkpoints.FILES).unlink()
    assert restore(tmp_path) == 2


def test_unfinished_saves_do_not_count(tmp_path, caplog):
    save(tmp_path, 1)
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", unfinished)
    assert restore(tmp_path) == 1
    assert f"{unfinished}: an unfinished save, removed" in caplog.text
    assert on_disk(tmp_path) == [1]


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "I/O"), ValueError("UNAVAILABLE: no answer"), RuntimeError("of a thread")]
)
def test_a_disk_or_network_that_fails_is_no_damage(tmp_path, monkeypatch, error):
    saved = save(tmp_path, 1, 2)
    if isinstance(error, RuntimeError):
        error.__cause__ = OSError(errno.ESTALE, "Stale file handle")

    def fail(*_):
        raise error

    monkeypatch.setattr(type(saved._manager), "load_checkpointables", fail)
    with pytest.raises(UnavailableError, match=r"checkpoints/2: cannot be read now .*start again"):
        restore(tmp_path)
    monkeypatch.undo()
    assert on_disk(tmp_path) == [1, 2] and restore(tmp_path) == 2


def test_without_a_whole_checkpoint_nothing_starts_and_nothing_is_touched(tmp_path):
    save(tmp_path, 1, 2)
    for step in ("1", "2"):
        truncate(tmp_path / "checkpoints" / step)
    with pytest.raises(UserError, match=r"no checkpoint is intact \(2: .* bytes; 1: .* bytes\)"):
        restore(tmp_path)
    assert on_disk(tmp_path) == [1, 2] and not (tmp_path / "checkpoints_damaged").exists()


@pytest.mark.parametrize(
    "change,message",
    [
        ({"w": jax.ShapeDtypeStruct((7,), np.float32)}, r"w has shape \(40000,\), this model needs \(7,\)"),
        ({"v": jax.ShapeDtypeStruct((7,), np.float32)}, r"v is missing"),
    ],
)
def test_another_model_is_no_damage(tmp_path, change, message):
    save(tmp_path, 1)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = abstract() | {k: v.update(sharding=place) for k, v in change.items()}
    with pytest.raises(UserError, match=message + ".*another model"):
        run_checkpoints.RunCheckpoints(tmp_path).restore(wanted)
    assert on_disk(tmp_path) == [1]
