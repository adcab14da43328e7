"""What the step measures on the device: sums over the gradients and over the global batch."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from vilam3_jax.data.batches import Batch, PackedBatch

# Sums over a batch, as `flops.Work` has them; the loop adds them up over all steps, logged or not.
COUNTS = ("tokens", "targets", "images", "attended")


def component_norms(grads: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """`grad_norm/<component>`: the length of each component's part of the gradient, scalars.

    Args:
      grads: path → gradient; the component is the path's first name.
    """
    parts: dict[str, dict[str, jax.Array]] = {}
    for path, grad in grads.items():
        parts.setdefault(path.split("/")[0], {})[path] = grad
    return {f"grad_norm/{name}": optax.tree.norm(part) for name, part in parts.items()}


def batch_counts(batch: Batch) -> dict[str, jax.Array]:
    """`flops.batch_work` on the device, over all hosts.

    Returns:
      float32 scalars: `tokens`, positions that are no padding, image tokens included; `targets`; `images`,
      filled image slots; `attended`.
    """
    if isinstance(batch, PackedBatch):
        real = batch.segment_ids > 0
        images, targets = batch.image_valid, batch.loss_weights != 0
        # Positions count from 0 in every sample of n tokens: their sum and n / 2 are n**2 / 2.
        attended = jnp.where(real, batch.positions + 0.5, 0.0)
    else:
        real = batch.text_valid
        images, targets = real.any(axis=1), jnp.zeros((), bool)
        attended = jnp.square(real.sum(axis=1, dtype=jnp.float32))
    found = {"tokens": real, "targets": targets, "images": images, "attended": attended}
    return {name: jnp.sum(value, dtype=jnp.float32) for name, value in found.items()}


def slots(batch: Batch) -> tuple[int, int]:
    """Token positions and image slots of a global batch, filled or not."""
    if isinstance(batch, PackedBatch):
        return batch.segment_ids.size, batch.image_valid.size
    return batch.text_valid.size, batch.text_valid.shape[0]
