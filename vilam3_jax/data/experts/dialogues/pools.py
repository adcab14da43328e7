"""The question and answer pools of dialogues, `questions/*.json`."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
from typing import Any

_NAMES = ("brain", "counts", "films", "follow_ups", "groups", "lesions", "negatives", "presence", "what")


@functools.cache
def pool(name: str) -> dict[str, Any]:
    """The questions and answers of one file; texts contain `{placeholders}`."""
    return json.loads(_read(name))


@functools.cache
def pools_digest() -> str:
    """SHA-256 (hex) of all pools; part of the fingerprint of a stream of dialogues."""
    return hashlib.sha256(b"".join(map(_read, _NAMES))).hexdigest()


def _read(name: str) -> bytes:
    folder = importlib.resources.files("vilam3_jax.data.experts.dialogues") / "questions"
    return (folder / f"{name}.json").read_bytes()
