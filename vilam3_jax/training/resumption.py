"""Compares the config of a run that resumes with the config of its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.settings import flatten
from vilam3_jax.training.run_config import RunConfig


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


def check_init(changed: Mapping[str, str]) -> None:
    """Raises `UserError` if a key of `init` differs: a resumed run would ignore it."""
    for key, change in changed.items():
        if key.startswith("init."):
            raise UserError(
                f"config {key}: {change}, but a run that resumes has its weights already; set it back, or "
                "use another --workdir"
            )
