"""Skips steps whose gradient is not finite, or whose norm is much larger than usual.

We do not use `optax.conditionally_mask`. It guards only the optimizer, but the moving average must not
advance either, and its `lax.cond` prevents XLA from fusing the choice into the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.settings import Section, setting


@dataclasses.dataclass(frozen=True)
class SkipConfig(Section):
    """The section `skip`: a step whose gradient is not finite, or has too large a norm, changes nothing.

    Attributes:
      spike: largest norm, as a multiple of the median of the last `window` ones; 0 for no limit.
      window: number of norms remembered.
      limit: this many skipped steps in a row end the run.
    """

    key = "skip"
    spike: float = 0.0
    window: int = setting(default=64, at_least=1)
    limit: int = setting(default=20, at_least=1)

    def validate(self) -> None:
        """Checks the spike factor."""
        if self.spike and self.spike <= 1:
            raise self.error("spike", "must be 0 (off) or more than 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """State of the guard.

    Attributes:
      norms: float32 [window], ring buffer of the norms of the last applied steps.
      taken: int32, steps applied.
      skipped: int32, steps skipped.
      skipped_in_row: int32, steps skipped since the last one applied.
    """

    norms: jax.Array
    taken: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array


def fresh(skip: SkipConfig) -> Guard:
    """The guard of a new run."""
    # Separate buffers, because the step donates its old state.
    counters = (jnp.zeros((), jnp.int32) for _ in range(3))
    return Guard(jnp.zeros(skip.window, jnp.float32), *counters)


def judge(skip: SkipConfig, guard: Guard, norm: jax.Array, loss: jax.Array) -> tuple[jax.Array, Guard]:
    """Decides whether to apply a step.

    Args:
      skip: settings. Spikes are detected once the window is full.
      guard: the state so far.
      norm: global norm of the gradient, before clipping.
      loss: mean loss of the step.

    Returns:
      (bool scalar: apply it; the new state).
    """
    take = jnp.isfinite(norm) & jnp.isfinite(loss)
    if skip.spike:
        take &= (norm <= skip.spike * jnp.median(guard.norms)) | (guard.taken < skip.window)
    remembered = guard.norms.at[guard.taken % skip.window].set(norm.astype(jnp.float32))
    return take, Guard(
        norms=jnp.where(take, remembered, guard.norms),
        taken=guard.taken + take,
        skipped=guard.skipped + ~take,
        skipped_in_row=jnp.where(take, 0, guard.skipped_in_row + 1),
    )


def check_limit(skip: SkipConfig, step: int, metrics: Mapping[str, float]) -> None:
    """Ends a run that no longer learns; `metrics` are those of the last step, `step`.

    Raises:
      UserError: the last `skip.limit` steps were all skipped.
    """
    if metrics["skipped_in_row"] >= skip.limit:
        raise UserError(
            f"step {step}: the last {metrics['skipped_in_row']:.0f} steps were skipped, their gradients not "
            f"finite or too long (last norm {metrics['grad_norm']:.3g}, loss {metrics['loss']:.3g}); lower "
            "schedule.peak, check the data, or raise skip.spike or skip.limit"
        )
