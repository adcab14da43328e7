"""Orbax checkpoints of runs; `exports` has those of models. No other module uses Orbax.

A *run checkpoint* is one step directory with `state` (parameters, optimizer, step, rng), `data` (one JSON
state per loader shard) and `run` (resolved config, versions, provenance). When it is complete, `files.json`
lists its files and their sizes, so that a torn checkpoint is detected before it is read.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from vilam3_jax.errors import UnavailableError, UserError, listed
from vilam3_jax.runtime import paths, processes

logger = logging.getLogger(__name__)

FILES = "files.json"
_FILES_BYTES = 2**28
_POLL_SECONDS = 0.1
_SEAL_SECONDS = 60
_MARKER = "commit_success.txt"  # written by Orbax
_UNFINISHED = "orbax-checkpoint-tmp"


def versions() -> dict[str, str]:
    """Versions of the packages that affect a run's numbers."""
    names = ("vilam3-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "qwix")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class Restored(NamedTuple):
    """Content of a checkpoint; see `RunCheckpoints.save`."""

    step: int
    state: Any
    data: dict[str, Any]
    run: dict[str, Any]


class RunCheckpoints:
    """Step directories of one run under `<workdir>/checkpoints`; all processes must call every method."""

    def __init__(self, workdir: paths.PathLike, kept: int = 2, kept_every: int = 0) -> None:
        """Opens or creates the folder.

        Args:
          workdir: folder of the run.
          kept: how many of the newest checkpoints to keep.
          kept_every: also keep checkpoints of steps that are multiples of this; 0 keeps none.
        """
        self._root = paths.as_path(workdir) / "checkpoints"
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise paths.write_error(self._root, error) from error
        policies: list[Any] = [ocp.training.preservation_policies.LatestN(kept)]
        if kept_every:
            policies.append(ocp.training.preservation_policies.EveryNSteps(kept_every))
        self._manager = ocp.training.Checkpointer(
            self._root,
            # Orbax's own policies do not satisfy its protocols.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyright: ignore[reportArgumentType]
            preservation_policy=ocp.training.preservation_policies.AnyPreservationPolicy(policies),  # pyright: ignore[reportArgumentType]
        )
        self._closed = threading.Event()
        self._sealing: threading.Thread | None = None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that Orbax considers complete, in ascending order."""
        return sorted(checkpoint.step for checkpoint in self._manager.checkpoints)

    def save(self, step: int, state: Any, data: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Starts an asynchronous save unless the step has one; `state` may be donated afterwards.

        Args:
          step: finished optimizer steps.
          state: arrays.
          data: states of the loader shards of this process; those of all processes are saved.
          run: config, versions, clock, provenance.

        Raises:
          UserError: the disk is full or not writable.
          UnavailableError: the disk or the network fails.
        """
        if step in self.steps():  # SIGTERM arrived right after this step was saved
            return
        everywhere = {shard: state for part in processes.gather(dict(data)) for shard, state in part.items()}
        if self._sealing is not None:
            # A save deletes old steps, which must not race with the seal being written there. The timeout is
            # for a failed save, which is never sealed; Orbax then reports why it failed.
            self._sealing.join(_SEAL_SECONDS)
        items = {"state": state, "data": {"json": json.dumps(everywhere)}, "run": {"json": json.dumps(run)}}
        try:
            with saving_uncompressed():
                self._manager.save_checkpointables_async(step, items, force=True)
        except (OSError, ValueError) as error:
            raise paths.write_error(self._root, error) from error
        if processes.is_primary_process():
            self._sealing = threading.Thread(
                target=self._seal_when_complete, args=(step,), name="vilam3-seal", daemon=True
            )
            self._sealing.start()

    def _seal_when_complete(self, step: int) -> None:
        while not _complete(self._root / str(step)):
            if self._closed.wait(_POLL_SECONDS):
                return
        _seal(self._root / str(step))

    def wait(self) -> None:
        """Blocks until the save in progress is complete, and closes the checkpoints."""
        try:
            self._manager.close()
        except (OSError, ValueError) as error:
            raise paths.write_error(self._root, error) from error
        finally:
            if self._sealing is not None:
                self._closed.set()
                self._sealing.join()
        for step in self.steps() if processes.is_primary_process() else ():
            if not (self._root / str(step) / FILES).exists():
                _seal(self._root / str(step))

    def restore(
        self, abstract: Any, changed_settings: Callable[[dict[str, Any]], Sequence[str]] = lambda run: ()
    ) -> Restored | None:
        """Loads the newest intact checkpoint onto the shardings of `abstract`; None if there is none.

        Torn checkpoints (files missing or too short) are skipped, moved to `<workdir>/checkpoints_damaged`
        and logged. Unfinished saves are removed.

        Args:
          abstract: shapes, dtypes and shardings of the state.
          changed_settings: the record `run` ↦ settings that explain other shapes, to be listed first.

        Raises:
          UserError: the checkpoint has another model or optimizer, or all checkpoints are damaged.
          UnavailableError: the disk or the network fails; nothing is moved.
        """
        self._remove_unfinished()
        damaged: dict[int, str] = {}
        for step in reversed(processes.from_primary_process(self.steps())):
            primary = processes.is_primary_process()
            problem = processes.from_primary_process(_damage(self._root / str(step)) if primary else None)
            restored = problem or self._load(step, abstract, changed_settings)
            if isinstance(restored, Restored):
                self._move_damaged(damaged, step)
                return restored
            damaged[step] = restored
        if damaged:
            problems = "; ".join(f"{step}: {problem}" for step, problem in damaged.items())
            raise UserError(
                f"{self._root}: no checkpoint is intact ({problems}); restore one from a copy, or start over "
                "in another --workdir"
            )
        return None

    def _load(
        self, step: int, abstract: Any, changed_settings: Callable[[dict[str, Any]], Sequence[str]]
    ) -> Restored | str:
        """Returns the content of a checkpoint, or the error of a damaged one."""
        folder = self._root / str(step)
        # Before loading: TensorStore logs thousands of lines for arrays of other shapes.
        differences = next(filter(None, processes.gather(self._differences(step, abstract))), [])
        if differences:
            settings = changed_settings(read_run(folder))
            raise UserError(
                f"{folder}: does not fit this config ({listed([*settings, *differences])}); it was saved "
                "with another model, optimizer, ema_decay or skip.window: restore them, or use another "
                "--workdir"
            )
        items, error, transient = None, None, False
        try:
            items = self._manager.load_checkpointables(step, {"state": abstract, "data": None, "run": None})
        except Exception as caught:  # damaged files raise arbitrary errors in Orbax and TensorStore
            error, transient = first_line(caught), paths.passes(caught)
        errors = [found for found in processes.gather([error, transient]) if found[0] is not None]
        if unavailable := [message for message, transient in errors if transient]:
            raise UnavailableError(
                f"{folder}: cannot be read now ({unavailable[0]}); check the disk or the "
                "network and start again"
            )
        if items is not None and not errors:
            data, run = json.loads(items["data"]["json"]), json.loads(items["run"]["json"])
            return Restored(step, items["state"], data, run)
        return errors[0][0]

    def _differences(self, step: int, abstract: Any) -> list[str]:
        """The names and shapes that differ from `abstract`; none if it is unreadable."""
        try:
            stored = _shapes(self._manager.checkpointables_metadata(step).metadata["state"])
        except Exception:  # see `_load`
            return []
        wanted = _shapes(abstract)
        names = sorted(stored.keys() ^ wanted.keys())
        return [f"{name} is {'not in this model' if name in stored else 'missing'}" for name in names] + [
            f"{name} has shape {stored[name]}, this model needs {shape}"
            for name, shape in wanted.items()
            if name in stored and stored[name] != shape
        ]

    def _remove_unfinished(self) -> None:
        """Removes interrupted saves; raises UserError for a complete one that Orbax would overlook."""
        for folder in paths.children(self._root) if processes.is_primary_process() else ():
            unmarked = folder.name.isdigit() and not _complete(folder)
            if unmarked and (folder / FILES).exists():
                raise UserError(
                    f"{folder}: is complete but has no {_MARKER}, so it was copied here from a disk; to "
                    "resume from it, put an empty file of that name into it and its state, data and run; or "
                    "remove the folder"
                )
            if unmarked or _UNFINISHED in folder.name:
                try:
                    folder.rmtree(missing_ok=True)
                except OSError as error:
                    raise UserError(
                        f"{folder}: an unfinished save that cannot be removed ({error}); does another run "
                        "write into this workdir?"
                    ) from error
                logger.warning("checkpoints: %s: an unfinished save, removed", folder)
        processes.barrier(f"unfinished {self._root}")

    def _move_damaged(self, damaged: Mapping[int, str], used: int) -> None:
        if not damaged:
            return
        if processes.is_primary_process():
            for step, problem in damaged.items():
                target = self._root.parent / "checkpoints_damaged" / f"{step}.{int(time.time())}"
                # Written first: an object store renames only into folders that are not empty.
                paths.write_text_atomic(target.parent / f"{target.name}.txt", f"{problem}\n")
                source = self._root / str(step)
                source.rename(target)
                notice = "checkpoints: %s: damaged (%s), moved to %s; resuming from step %s"
                logger.warning(notice, source, problem, target, used)
        processes.barrier(f"aside {self._root}")
        self._manager.reload()


def find(workdir: paths.PathLike, step: int | None = None) -> tuple[epath.Path, int]:
    """Folder and step of an intact checkpoint of a run, the newest without `step`; changes nothing.

    Raises:
      UserError: the checkpoint does not exist or is damaged.
    """
    root = paths.as_path(workdir) / "checkpoints"
    folders = paths.children(root)
    known = sorted(int(one.name) for one in folders if one.name.isdigit() and _complete(one))
    if not known:
        raise UserError(f"{root}: holds no checkpoint; give a training run that has saved one")
    if step is None:
        step = known[-1]
    if step not in known:
        raise UserError(f"{root}: has no step {step}; it has {', '.join(map(str, known))}")
    if problem := _damage(root / str(step)):
        raise UserError(f"{root / str(step)}: is damaged ({problem}); use another step")
    return root / str(step), step


def read_run(folder: epath.Path) -> dict[str, Any]:
    """The record `run` of a checkpoint.

    Raises:
      UserError: it is damaged.
    """
    return json.loads(_read(folder, {"run": None})["run"]["json"])


def saving_uncompressed() -> ocp.Context:
    """A context for saving arrays without compression.

    Trained weights hardly compress; uncompressed they are written six times and read twice as fast.
    """
    context = ocp.Context()
    context.array.saving.use_compression = False
    return context


def loading_a_part() -> ocp.Context:
    """A context for loading some of the arrays of a checkpoint."""
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    return context


def read_state(folder: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Loads the part of a checkpoint's state that `wanted` names, onto its shardings.

    Raises:
      UserError: it is damaged, or lacks a name.
    """
    with loading_a_part():
        return _read(folder, {"state": wanted})["state"]


def _read(folder: epath.Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return ocp.load_checkpointables(folder, dict(wanted))
    except Exception as error:  # damaged files raise arbitrary errors in Orbax and TensorStore
        raise UserError(f"{folder}: cannot be read ({first_line(error)}); use another step") from error


def _complete(folder: epath.Path) -> bool:
    """Orbax renames a finished save; in gs://, where renaming is not atomic, it writes a marker."""
    return (folder / _MARKER).exists() if str(folder).startswith("gs://") else folder.exists()


def _sizes(folder: epath.Path) -> dict[str, int]:
    """Returns path in `folder` → bytes; without the empty markers of a finished save."""
    sizes = {}
    for path in paths.children(folder):
        if path.is_dir():
            sizes |= {f"{path.name}/{name}": size for name, size in _sizes(path).items()}
        elif path.name != _MARKER:
            sizes[path.name] = paths.file_size(path)
    return sizes


def _seal(folder: epath.Path) -> None:
    """Writes `FILES` into a complete checkpoint."""
    try:
        sizes = {name: size for name, size in _sizes(folder).items() if "/" in name}
        paths.write_text_atomic(folder / FILES, json.dumps(sizes))
    except (OSError, UserError):
        return  # superseded and removed, or the disk is full: a checkpoint without a seal is still valid


def _damage(folder: epath.Path) -> str | None:
    """The first difference from a checkpoint's seal; None if it is intact or has no seal."""
    if not (folder / FILES).exists():
        return None
    try:
        expected = json.loads(paths.read_bytes(folder / FILES, _FILES_BYTES))
    except ValueError:
        return f"{FILES} is torn"
    found = _sizes(folder)
    for name, size in sorted(expected.items()):
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} of {size} bytes"
    return None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {"/".join(_key(entry) for entry in path): tuple(leaf.shape) for path, leaf in leaves}


def _key(entry: Any) -> str:
    """Orbax stores named tuples and lists as dicts of names and numbers."""
    return str(next((getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name)), entry))


def first_line(error: Exception) -> str:
    """First line of an error message, cut to 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
