"""The questions and answers that dialogues are made of: data, `questions/*.json`.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
from typing import Any

_NAMES = ("brain", "counts", "films", "follow_ups", "groups", "lesions", "negatives", "presence", "what")


@functools.cache
def pool(name: str) -> dict[str, Any]:
    """One file of questions and answers; texts hold `{placeholders}`."""
    return json.loads(_read(name))


@functools.cache
def pools_digest() -> str:
    """sha256 (hex) of all pools: what a place in a stream of dialogues depends on."""
    digest = hashlib.sha256()
    for name in _NAMES:
        digest.update(_read(name))
    return digest.hexdigest()


def _read(name: str) -> bytes:
    return (
        importlib.resources.files("vilam3_jax.data.experts.dialogues") / "questions" / f"{name}.json"
    ).read_bytes()
