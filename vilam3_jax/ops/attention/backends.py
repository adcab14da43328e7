"""The registry of attention backends, and the choice among them.

Other packages add backends with `register`, or with an entry point of the group `vilam3.attention_backends`;
see docs/add_your_own_attention.md.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import importlib.metadata
import logging
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import jax

from vilam3_jax.errors import UserError
from vilam3_jax.ops.attention.mask_info import MaskInfo
from vilam3_jax.sharding import logical_axes

ENTRY_POINTS = "vilam3.attention_backends"
AUTO = "auto"
RING = "ring"  # `auto`, but the keys of rows that are split over devices travel around a ring
# Kernels pad to whole blocks, which costs more than it saves for few queries (pooling probe, short texts).
MIN_KERNEL_QUERIES = 128

logger = logging.getLogger(__name__)


class Support(NamedTuple):
    """Whether a backend supports a call, also as truth value; `reason` completes "BACKEND ..." if not."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclasses.dataclass(frozen=True)
class AttentionCall:
    """A call, for the choice of a backend.

    Attributes:
      platform: 'cpu', 'gpu' or 'tpu'.
      q: shape [B, Lq, H, hd] and dtype of the queries.
      kv_len: number of keys, Lk.
      query_shards: devices that share the queries of a row.
      automatic: whether the backend may decline for speed; False if the user named it.
    """

    platform: str
    q: jax.ShapeDtypeStruct
    kv_len: int
    mask: MaskInfo
    query_shards: int
    automatic: bool


class Backend(Protocol):
    """An implementation of attention."""

    @property
    def name(self) -> str:
        """Value of `config.attention` that selects it."""
        ...

    def supports(self, call: AttentionCall) -> Support:
        """Whether it computes this call."""
        ...

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: MaskInfo, sharded: bool) -> jax.Array:
        """Attention of whole rows.

        Args:
          q: [B, Lq, H, hd], already scaled.
          k: [B, Lk, K, hd]; query head h reads key head h // (H // K).
          v: [B, Lk, K, hd].
          mask: which keys a query attends to.
          sharded: whether to spread the work over the mesh of the step; False inside `shard_map`.

        Returns:
          [B, Lq, H, hd] in the type of `q`; zeros for queries without a key.
        """
        ...


_registry: dict[str, Backend] = {}
_choice: contextvars.ContextVar[str] = contextvars.ContextVar("attention_backend", default=AUTO)


def register(backend: Backend) -> None:
    """Adds a backend, which is then tried before those registered earlier."""
    _registry[backend.name] = backend


def names() -> tuple[str, ...]:
    """Values of `config.attention`."""
    return (AUTO, RING, *sorted(_loaded()))


def check_choice(choice: str) -> None:
    """Raises UserError for an unknown `config.attention`."""
    if choice not in (AUTO, RING) and choice not in _loaded():
        raise UserError(f"config attention={choice!r}: must be one of {', '.join(names())}")


@contextlib.contextmanager
def use(choice: str) -> Iterator[None]:
    """Context in which attention is traced with `config.attention`."""
    token = _choice.set(choice)
    try:
        yield
    finally:
        _choice.reset(token)


def choice() -> str:
    """`config.attention` of the step being traced; 'auto' outside one."""
    return _choice.get()


def call_of(q: jax.Array, kv_len: int, mask: MaskInfo, sharded: bool) -> AttentionCall:
    """Describes a call to the backends."""
    return AttentionCall(
        platform=logical_axes.platform(),
        q=jax.ShapeDtypeStruct(q.shape, q.dtype),
        kv_len=kv_len,
        mask=mask,
        query_shards=logical_axes.axis_size("queries") if sharded else 1,
        automatic=choice() in (AUTO, RING),
    )


def select(call: AttentionCall) -> Backend:
    """The first registered backend that supports a call, or the one that the user named.

    Calls with explicit positions, those of cached generation, always go to XLA.

    Raises:
      UserError: the named backend does not support the call.
    """
    if call.mask.q_positions is not None:
        return _loaded()["xla"]
    if not call.automatic:
        backend = _loaded()[choice()]
        if not (support := backend.supports(call)):
            raise UserError(
                f"config attention={backend.name!r} {support.reason}; or set attention to 'auto' or 'xla'"
            )
        return backend
    for backend in reversed(_loaded().values()):
        if support := backend.supports(call):
            return backend
        logger.debug("attention of %s %s: %s %s", call.q.dtype, call.q.shape, backend.name, support.reason)
    raise AssertionError("XLA supports every call")


def explain(call: AttentionCall) -> list[str]:
    """One line per backend in the order tried: whether it supports a call, or why not."""
    supports = [(backend.name, backend.supports(call)) for backend in reversed(_loaded().values())]
    return [f"{name}: {'supported' if found else found.reason}" for name, found in supports]


def _loaded() -> dict[str, Backend]:
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if entry.name not in _registry:
            register(entry.load())
    return _registry
