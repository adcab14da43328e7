"""Parameter trees as flat dicts with paths such as `llm/layers/attn/q/kernel`, for tables and checkpoints."""

from __future__ import annotations

from typing import Any

from flax import traverse_util


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested dict → {'llm/layers/attn/q/kernel': leaf}."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")
