"""What the step measures on the device: sums over the gradients and over the global batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

# Sums over a batch; the loop adds them up over all steps, logged or not.
COUNTS = ("tokens", "images", "attended")


def component_norms(grads: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`grad_norm/<component>`: the length of each component's part of the gradient, scalars.

    Args:
      grads: path → gradient; the component is the path's first name.
    """
    parts: dict[str, dict[str, jax.Array]] = {}
    for path, grad in grads.items():
        parts.setdefault(path.split("/")[0], {})[path] = grad
    return {f"grad_norm/{name}": optax.global_norm(part) for name, part in parts.items()}


def batch_counts(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What a batch really holds, over all hosts.

    Returns:
      `tokens`: int32, positions that are no padding, image tokens included; `images`: int32, filled image
      slots; `attended`: float32, pairs of a query and a key that causal attention within samples has (in a
      batch of pairs: without the mask, a text attends to all of itself).
    """
    if "segment_ids" in batch:
        real = batch["segment_ids"] > 0
        images = batch["image_valid"]
        # Positions count from 0 in every sample, and a token sees itself and all before it.
        attended = jnp.sum(jnp.where(real, batch["positions"] + 1, 0), dtype=jnp.float32)
    else:
        real = batch["text_valid"]
        images = real.any(axis=1)
        attended = jnp.sum(jnp.square(real.sum(axis=1, dtype=jnp.float32)))
    return {
        "tokens": jnp.sum(real, dtype=jnp.int32),
        "images": jnp.sum(images, dtype=jnp.int32),
        "attended": attended,
    }


def slots(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Token positions and image slots of a global batch, filled or not."""
    if "segment_ids" in batch:
        return batch["segment_ids"].size, batch["image_valid"].size
    return batch["text_valid"].size, batch["text_valid"].shape[0]
