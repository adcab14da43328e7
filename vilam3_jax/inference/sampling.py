"""How the next token is chosen: settings of a row, and their arrays on the device.

All settings are arrays with one entry per row, so rows with different settings share one program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vilam3_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is sampled.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: sample from this many of the most probable tokens; 0 is all.
      top_p: sample from the most probable of these that together reach this probability.
      repetition_penalty: divides positive logits of the tokens that the dialogue holds already, and
        multiplies negative ones (arXiv:1909.05858, section 4.1); applies to greedy decoding, too.
      seed: the same seed and dialogue give the same text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `UserError` for a setting out of its range."""
        for name, valid, range_ in (
            ("temperature", 0 <= self.temperature < np.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "above 0"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
        ):
            if not valid:
                raise UserError(f"{name} {getattr(self, name)}: must be {range_}")


GREEDY = Sampling()


class RowSampling(NamedTuple):
    """Settings of the rows of a batch: float32 [B], except int32 `top_k` and uint32 `seed`."""

    temperature: Any
    top_p: Any
    top_k: Any
    repetition_penalty: Any
    seed: Any

    @classmethod
    def of(cls, rows: Sequence[Sampling]) -> RowSampling:
        """NumPy arrays of the settings of each row."""
        types = dict(top_k=np.int32, seed=np.uint32)
        return cls(
            **{
                name: np.asarray([getattr(row, name) for row in rows], types.get(name, np.float32))
                for name in cls._fields
            }
        )


def choose(
    logits: jax.Array, held: jax.Array, positions: jax.Array, rows: RowSampling
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row.

    Args:
      logits: float32 [B, V].
      held: bool [B, V], tokens that each dialogue holds.
      positions: int32 [B], position of the token; with the seed it determines the random numbers, so that
        neither other rows nor the number of tokens decoded at a time change a text.
      rows: settings.

    Returns:
      int32 [B] tokens, and float32 [B] their log-probabilities under the unchanged logits.
    """
    penalty = rows.repetition_penalty[:, None]
    penalised = jnp.where(held, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    greedy = jnp.argmax(penalised, axis=-1).astype(jnp.int32)
    sampled = rows.temperature > 0
    token = jax.lax.cond(
        sampled.any(),
        lambda: jnp.where(sampled, _draw(penalised, positions, rows), greedy),
        lambda: greedy,
    )
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)


def _draw(logits: jax.Array, positions: jax.Array, rows: RowSampling) -> jax.Array:
    """Int32 [B] sampled tokens; arbitrary in greedy rows."""
    scaled = logits / jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    values, order = jax.lax.top_k(scaled, scaled.shape[-1])
    ranks = jnp.arange(values.shape[-1])[None]
    top_k = jnp.where(rows.top_k > 0, rows.top_k, values.shape[-1])[:, None]
    values = jnp.where(ranks < top_k, values, -jnp.inf)
    probability = jax.nn.softmax(values, axis=-1)  # of the `top_k` tokens, as in transformers
    before = jnp.cumsum(probability, axis=-1) - probability
    kept = (before < rows.top_p[:, None]) | (ranks == 0)  # the most probable token always remains

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), values.shape[-1:])

    picked = jnp.argmax(jnp.where(kept, values, -jnp.inf) + jax.vmap(noise)(rows.seed, positions), axis=-1)
    return jnp.take_along_axis(order, picked[:, None], axis=-1)[:, 0].astype(jnp.int32)
