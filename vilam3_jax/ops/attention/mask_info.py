"""Which keys a query may attend to."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskInfo:
    """Mask of an attention call, in a form that lets kernels skip excluded blocks.

    A query attends to a key iff their segment ids are equal and not 0 and, if `causal`, the key's position is
    at most the query's and, with `window`, less than `window` before it. The output of a query without a key
    (padding) is 0. Arrays may have a batch of 1, for all rows. Inside backends the arrays of queries are
    [B, blocks, block].

    Attributes:
      segment_ids_q: int [B, Lq], 0 for padding; None if every query is real.
      segment_ids_kv: int [B, Lk]; given exactly if `segment_ids_q` is.
      q_positions: int [B, Lq], positions for `causal` and `window`; None for the index in the row.
      kv_positions: int [B, Lk]; given exactly if `q_positions` is.
      causal: whether keys after the query are masked.
      window: keys that a query attends to, itself included; None for all. Needs `causal`.
    """

    segment_ids_q: Any = None
    segment_ids_kv: Any = None
    q_positions: Any = None
    kv_positions: Any = None
    causal: bool = dataclasses.field(default=False, metadata=dict(static=True))
    window: int | None = dataclasses.field(default=None, metadata=dict(static=True))

    def check(self, q_len: int, kv_len: int) -> None:
        """Raises ValueError if fields contradict each other or the lengths."""
        if (self.segment_ids_q is None) != (self.segment_ids_kv is None):
            raise ValueError("give segment ids of both queries and keys, or of neither")
        if (self.q_positions is None) != (self.kv_positions is None):
            raise ValueError("give positions of both queries and keys, or of neither")
        if self.causal and self.q_positions is None and q_len != kv_len:
            raise ValueError(f"causal attention of {q_len} queries over {kv_len} keys needs positions")
        if self.window is not None and (self.window < 1 or not self.causal):
            raise ValueError(f"window={self.window} must be positive and needs causal=True")

    def with_segment_ids(self, q_len: int, kv_len: int) -> MaskInfo:
        """The same mask with segment ids, all 1 if there were none."""
        if self.segment_ids_q is not None:
            return self
        ones = [jnp.ones((1, length), jnp.int32) for length in (q_len, kv_len)]
        return dataclasses.replace(self, segment_ids_q=ones[0], segment_ids_kv=ones[1])

    def with_positions(self, q_len: int, kv_len: int) -> MaskInfo:
        """The same mask with positions: indices in the row, or zeros if not causal."""
        if self.causal and self.q_positions is not None:
            return self
        positions = [jnp.zeros((1, length), jnp.int32) for length in (q_len, kv_len)]
        if self.causal:
            positions = [jnp.arange(q_len, dtype=jnp.int32)[None]] * 2
        return dataclasses.replace(self, q_positions=positions[0], kv_positions=positions[1])

    def allowed(self, q_positions: jax.Array, kv_positions: jax.Array) -> jax.Array:
        """Bool [B, Lq, Lk] from positions [B, Lq] and [B, Lk]: what `causal` and `window` allow."""
        distance = q_positions[:, :, None] - kv_positions[:, None]
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)
