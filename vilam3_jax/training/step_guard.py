"""Steps that are not taken: gradients that are not finite, or far longer than those before.

The guard's part of the state counts what was skipped and remembers the gradient norms of steps taken.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from vilam3_jax.config import ConfigDict
from vilam3_jax.errors import UserError

Guard = dict[str, jax.Array]


def fresh(config: ConfigDict) -> Guard:
    """A guard that has seen nothing.

    Returns:
      `norms`: float32 [skip.window], those of the last steps taken, a ring. `taken`, `skipped`,
      `skipped_in_row`: int32 scalars.
    """
    # One array each: the step gives its old state away, and one buffer cannot be given away twice.
    counters = {name: jnp.zeros((), jnp.int32) for name in ("taken", "skipped", "skipped_in_row")}
    return {"norms": jnp.zeros(config.skip.window, jnp.float32), **counters}


def judge(config: ConfigDict, guard: Guard, norm: jax.Array, loss: jax.Array) -> tuple[jax.Array, Guard]:
    """Whether to take a step.

    Args:
      config: `skip.spike` and `skip.window` are read. Spikes are looked for once the window is full.
      guard: the state so far.
      norm: global norm of the gradient, before clipping.
      loss: mean loss of the step.

    Returns:
      (bool scalar: take it; the guard after it).
    """
    window = config.skip.window
    take = jnp.isfinite(norm) & jnp.isfinite(loss)
    if config.skip.spike:
        usual = norm <= config.skip.spike * jnp.median(guard["norms"])
        take &= usual | (guard["taken"] < window)
    remembered = guard["norms"].at[guard["taken"] % window].set(norm.astype(jnp.float32))
    return take, {
        "norms": jnp.where(take, remembered, guard["norms"]),
        "taken": guard["taken"] + take,
        "skipped": guard["skipped"] + ~take,
        "skipped_in_row": jnp.where(take, 0, guard["skipped_in_row"] + 1),
    }


def check_limit(config: ConfigDict, step: int, metrics: Mapping[str, float]) -> None:
    """Ends a run that no longer learns.

    Args:
      config: `skip.limit` is read.
      step: number of the last step.
      metrics: its metrics.

    Raises:
      UserError: the last `skip.limit` steps were all skipped.
    """
    if metrics["skipped_in_row"] >= config.skip.limit:
        raise UserError(
            f"step {step}: the last {metrics['skipped_in_row']:.0f} steps were skipped, their gradients not "
            f"finite or too long (last norm {metrics['grad_norm']:.3g}, loss {metrics['loss']:.3g}); lower "
            "schedule.peak, look at the data, or raise skip.spike or skip.limit"
        )
