"""Compares the config of a run that resumes with the config of its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vilam3_jax.errors import UserError, listed
from vilam3_jax.runtime.settings import flatten
from vilam3_jax.training.run_config import RunConfig

# Sections and keys that decide which arrays a state has.
_SHAPING = ("task", "model", "trainable", "optimizer", "ema_decay", "skip", "quantization")


def changes(stored: Mapping[str, Any], config: RunConfig) -> dict[str, str]:
    """Dotted key → "old → new" of the settings that differ from `stored`, the config in the checkpoint.

    Keys that only one of both has are left out.
    """
    before, now = flatten(stored), flatten(json.loads(config.to_json()))
    return {
        key: f"{json.dumps(before[key])} → {json.dumps(now[key])}"
        for key in sorted(before.keys() & now.keys())
        if before[key] != now[key]
    }


def changes_of_state(run: Mapping[str, Any], config: RunConfig) -> list[str]:
    """The settings that differ from the record `run` of a checkpoint and shape the state of a run."""
    found = changes(run.get("config", {}), config)
    return [f"{key}: {change}" for key, change in found.items() if key.split(".")[0] in _SHAPING]


def check_init(changed: Mapping[str, str]) -> None:
    """Raises `UserError` if keys of `init` differ: a resumed run would ignore them."""
    if found := [f"{key}: {change}" for key, change in changed.items() if key.startswith("init.")]:
        raise UserError(
            f"config {listed(found)}, but a run that resumes has its weights already; set "
            f"{'it' if len(found) == 1 else 'them'} back, or use another --workdir"
        )
