"""Orbax checkpoints of runs; `exports` has those of models. No other module knows Orbax.

A *run checkpoint* is one step directory with `state` (parameters, optimizer, step, rng), `data` (one JSON
state per loader shard) and `run` (resolved config, versions, provenance).
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
from collections.abc import Mapping
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp

from vilam3_jax import paths
from vilam3_jax.errors import UserError

# Orbax logs every error that it also raises, with the stacks of all its threads.
logging.getLogger("absl").setLevel(logging.CRITICAL)

# Trained weights hardly compress; writing them takes a sixth of the time without, reading them half.
UNCOMPRESSED = ocp.options.ArrayOptions(saving=ocp.options.ArrayOptions.Saving(use_compression=False))


def versions() -> dict[str, str]:
    """Versions of what can change a run's numbers."""
    names = ("vilam3-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class RunCheckpoints:
    """Step directories of one run under `<workdir>/checkpoints`; newest kept, older removed."""

    def __init__(self, workdir: paths.PathLike, kept: int = 1) -> None:
        self._root = paths.as_path(workdir) / "checkpoints"
        self._root.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.training.Checkpointer(
            self._root,
            # Orbax's own policies, which its protocols do not admit.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyright: ignore[reportArgumentType]
            preservation_policy=ocp.training.preservation_policies.LatestN(kept),  # pyright: ignore[reportArgumentType]
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; an unfinished save does not count."""
        latest = self._manager.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, data: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Starts an asynchronous save; `state` may be donated right after.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        items = {
            "state": state,
            "data": {"json": json.dumps(data)},
            "run": {"json": json.dumps(run)},
        }
        try:
            with ocp.Context(array_options=UNCOMPRESSED):
                self._manager.save_checkpointables_async(step, items, force=True)
        except (OSError, ValueError) as error:
            raise UserError(disk_message(self._root, error)) from error

    def wait(self) -> None:
        """Blocks until the save in flight is complete."""
        try:
            self._manager.close()
        except (OSError, ValueError) as error:
            raise UserError(disk_message(self._root, error)) from error

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Loads a step onto the shardings of `abstract`.

        Returns:
          state, data, run.

        Raises:
          UserError: it is a checkpoint of another model or optimizer.
        """
        try:
            items = self._manager.load_checkpointables(step, {"state": abstract, "data": None, "run": None})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._root / str(step)}: does not fit this config ({first_line(error)}); it is "
                "a checkpoint of another model, use another --workdir"
            ) from error
        return items["state"], json.loads(items["data"]["json"]), json.loads(items["run"]["json"])


def first_line(error: Exception) -> str:
    """The part of a message that a person reads."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def disk_message(path: epath.Path, error: Exception) -> str:
    """What to tell a user whose disk did not take it."""
    return f"{path}: cannot be written ({first_line(error)}); free space or choose another folder"
