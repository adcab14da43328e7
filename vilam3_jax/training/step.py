"""The train step, a pure function (state, batch) → (state, metrics)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vilam3_jax.data.batches import SEQUENCE_FIELDS, Batch, PackedBatch, map_fields
from vilam3_jax.tasks.task import LossSums, Work
from vilam3_jax.training import step_guard
from vilam3_jax.training.step_guard import SkipConfig
from vilam3_jax.training.train_state import TrainState

Flat = dict[str, jax.Array]
LossFn = Callable[[Flat, Any], LossSums]  # of parameters by path and a batch
Metrics = dict[str, jax.Array]


def make_train_step(
    loss_fn: LossFn,
    work: Callable[[Any], Work],
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    skip: SkipConfig,
    *,
    grad_accum: int,
    ema_decay: float,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the train step.

    Gradients are summed over tokens and, in float32, over `grad_accum` micro-batches. They are then divided
    by the global number of supervised tokens, so accumulation does not change the result. A skipped step
    changes `step` and the guard's counters only; the schedule does not advance.

    Args:
      loss_fn: sums over a batch.
      work: counts the work in a batch.
      optimizer: optimizer of the trainable parameters.
      schedule: learning-rate schedule.
      skip: which steps are skipped.
      grad_accum: number of micro-batches.
      ema_decay: decay of the moving average; 0 for none.
    """

    def gradients(trainable: Flat, frozen: Flat, batch: Batch) -> tuple[Flat, LossSums]:
        def summed(part: Flat) -> tuple[jax.Array, LossSums]:
            sums = loss_fn({**frozen, **part}, batch)
            return sums.loss, sums

        (_, sums), grads = jax.value_and_grad(summed, has_aux=True)(trainable)
        return grads, sums

    def average(old: jax.Array, parameter: jax.Array) -> jax.Array:
        return ema_decay * old + (1 - ema_decay) * parameter.astype(jnp.float32)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def compute(part: Batch) -> tuple[Flat, LossSums]:
            return gradients(state.trainable, state.frozen, part)

        grads, sums = accumulated(compute, batch, grad_accum)
        weight = jnp.maximum(sums.weight, 1.0)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads)
        loss, norm = sums.loss / weight, optax.tree.norm(grads)
        take, guard = step_guard.judge(skip, state.guard, norm, loss)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        ema = None if state.ema is None else jax.tree.map(average, state.ema, trainable)
        new, old = (trainable, opt_state, ema), (state.trainable, state.opt_state, state.ema)
        trainable, opt_state, ema = jax.tree.map(lambda a, b: jnp.where(take, a, b), new, old)
        metrics = {
            "loss": loss,
            "accuracy": sums.correct / weight,
            "supervised": sums.weight,
            "grad_norm": norm,
            "learning_rate": schedule(state.step - state.guard.skipped),
            "skipped": guard.skipped,
            "skipped_in_row": guard.skipped_in_row,
            **component_norms(grads),
            **work(batch)._asdict(),
        }
        state = dataclasses.replace(
            state, step=state.step + 1, trainable=trainable, opt_state=opt_state, ema=ema, guard=guard
        )
        return state, metrics

    return train_step


def make_eval_step(loss_fn: LossFn, grad_accum: int) -> Callable[[TrainState, Batch], LossSums]:
    """Returns `eval_step(state, batch) -> sums`.

    It uses the moving average if there is one, and the micro-batches of training, so that it fits into memory
    if training does.
    """

    def eval_step(state: TrainState, batch: Batch) -> LossSums:
        return accumulated(lambda part: loss_fn(state.params(), part), batch, grad_accum)

    return eval_step


def component_norms(grads: Mapping[str, jax.Array]) -> Metrics:
    """`grad_norm/<component>`: norm of each component's gradient, scalars.

    Args:
      grads: path → gradient; the first name of a path is the component.
    """
    parts: dict[str, Flat] = {}
    for path, grad in grads.items():
        parts.setdefault(path.split("/")[0], {})[path] = grad
    return {f"grad_norm/{name}": optax.tree.norm(part) for name, part in parts.items()}


def accumulated(compute: Callable[[Batch], Any], batch: Batch, count: int) -> Any:
    """Results of `compute` for `count` micro-batches, summed in float32."""
    if count == 1:
        return compute(batch)
    micro = _split(batch, count)
    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(compute, first))

    def body(carry: Any, part: Batch) -> tuple[Any, None]:
        # Without the barrier, XLA for TPUs tries to move bfloat16 all-reduces out of the loop and fails
        # (libtpu 0.0.42, "while_loop_all_reduce_code_motion").
        return jax.tree.map(jnp.add, carry, jax.lax.optimization_barrier(compute(part))), None

    return jax.lax.scan(body, zeros, micro)[0]


def _split(batch: Batch, count: int) -> Batch:
    """Splits a batch into micro-batches of whole groups, on a new leading axis.

    Consecutive groups go to different micro-batches, so that no data moves between devices.
    """
    assert isinstance(batch, PackedBatch)
    groups = batch.images.shape[0]

    def split(name: str, x: jax.Array) -> jax.Array:
        rows = x.shape[0] // groups if name in SEQUENCE_FIELDS else 1
        parts = x.reshape(groups // count, count, rows, *x.shape[1:])
        return jnp.moveaxis(parts, 1, 0).reshape(count, -1, *x.shape[1:])

    return map_fields(split, batch)
