"""The train step: pure, from (state, batch) to (state, metrics)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vilam3_jax.config import ConfigDict
from vilam3_jax.data.batches import ROW_FIELDS, Batch, PackedBatch, PairBatch, arrays, of_arrays
from vilam3_jax.models import layers, param_paths, vila
from vilam3_jax.ops import losses, quantized
from vilam3_jax.training import batch_trees, measures, step_guard  # noqa: F401 (makes pytrees of batches)
from vilam3_jax.training.state import model_params

Flat = dict[str, jax.Array]
State = dict[str, Any]
LossFn = Callable[[Flat, Any], tuple[jax.Array, dict[str, jax.Array]]]  # of parameters and a batch


def make_loss(config: ConfigDict, graphdef: Any) -> LossFn:
    """Returns `loss(flat params, batch) -> (summed loss, {'weight', 'correct'})`.

    Generative: cross entropy summed over supervised tokens; `weight` is their number, `correct` the number
    predicted by arg max. Contrastive: sigmoid loss summed over pairs; `correct` counts images whose own
    text, or an equal one, scores highest. Dividing sums by `weight` gives the global mean whatever the
    packing.
    """

    def generative(params: Flat, batch: PackedBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = _merge(config, graphdef, params)
        hidden = model(
            batch.tokens,
            batch.segment_ids,
            batch.positions,
            batch.images,
            batch.image_valid,
            batch.visual_index,
            batch.image_tiles,
        )
        total, weight, correct = losses.chunked_cross_entropy(
            hidden,
            model.head_kernel(),
            batch.tokens,
            batch.loss_weights,
            batch.segment_ids,
            chunk=config.loss_chunk,
            kernel_stored=model.head_stored(),
        )
        return total, {"weight": weight, "correct": correct}

    def contrastive(params: Flat, batch: PairBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        model = _merge(config, graphdef, params)
        image, text = model(batch.images, batch.text_tokens, batch.text_valid)
        # Reports and captions repeat each other word for word; a text is right for all images that have it.
        total, weight, correct = losses.sigmoid_contrastive_loss(
            image,
            text,
            model.logit_scale[...],
            model.logit_bias[...],
            valid=batch.text_valid.any(axis=1),
            labels=batch.text_tokens,
        )
        return total, {"weight": weight, "correct": correct}

    return generative if config.kind == "generative" else contrastive


def check_quantization(config: ConfigDict, graphdef: Any, nested: dict[str, Any]) -> None:
    """Looks for the package and the modules that `config.quantization` needs.

    Raises:
      UserError: Qwix is not installed, or no module matches.
    """
    if config.quantization.matmul:
        quantized.check_installed("quantization.matmul")
        _merge(config, graphdef, param_paths.flatten(nested))


def _merge(config: ConfigDict, graphdef: Any, params: Flat) -> Any:
    """The model as training computes it: with quantised products where the config has them."""
    model = vila.merge(graphdef, param_paths.unflatten(params))
    settings = config.quantization
    if settings.matmul:
        how = quantized.QuantizedMatmul(settings.matmul, settings.gradients)
        layers.quantize_products(model, how, settings.modules)
    return model


def make_train_step(
    config: ConfigDict, loss_fn: LossFn, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """Returns the step. State: `step`, `trainable` and `frozen` (flat parameters), `opt_state`, `rng`,
    `guard`, and with `config.ema_decay` also `ema`.

    Gradients are sums over tokens, accumulated in float32 over `grad_accum` micro-batches and divided once by
    the global number of supervised tokens, so accumulation does not change the result. A step that the guard
    refuses changes only `step` and the guard's counters; the schedule does not move on.
    """

    def gradients(trainable: Flat, frozen: Flat, batch: Batch) -> tuple[Flat, dict[str, jax.Array]]:
        def summed(part: Flat) -> tuple[jax.Array, dict[str, jax.Array]]:
            return loss_fn({**frozen, **part}, batch)

        (loss, sums), grads = jax.value_and_grad(summed, has_aux=True)(trainable)
        return grads, {"loss": loss, **sums}

    def average(old: jax.Array, parameter: jax.Array) -> jax.Array:
        return config.ema_decay * old + (1 - config.ema_decay) * parameter.astype(jnp.float32)

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        grads, sums = _accumulated(
            config, lambda part: gradients(state["trainable"], state["frozen"], part), batch
        )
        weight = jnp.maximum(sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads)
        loss, norm = sums["loss"] / weight, optax.tree.norm(grads)
        take, guard = step_guard.judge(config, state["guard"], norm, loss)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["trainable"])
        new = {"trainable": optax.apply_updates(state["trainable"], updates), "opt_state": opt_state}
        if config.ema_decay:
            new["ema"] = jax.tree.map(average, state["ema"], new["trainable"])
        old = {name: state[name] for name in new}
        new = jax.tree.map(lambda after, before: jnp.where(take, after, before), new, old)
        metrics = {
            "loss": loss,
            "accuracy": sums["correct"] / weight,
            "supervised": sums["weight"],
            "grad_norm": norm,
            "learning_rate": schedule(state["step"] - state["guard"]["skipped"]),
            "skipped": guard["skipped"],
            "skipped_in_row": guard["skipped_in_row"],
            **measures.component_norms(grads),
            **measures.batch_counts(batch),
        }
        return {**state, **new, "step": state["step"] + 1, "guard": guard}, metrics

    return train_step


def make_eval_step(config: ConfigDict, loss_fn: LossFn) -> Callable[[State, Batch], dict[str, jax.Array]]:
    """Returns `eval_step(state, batch) -> {'loss', 'weight', 'correct'}`, all sums.

    If the state has a moving average, that is evaluated. As many micro-batches as in training, so that a step
    that fits only with them is followed by an evaluation that fits.
    """

    def eval_step(state: State, batch: Batch) -> dict[str, jax.Array]:
        def sums(part: Batch) -> dict[str, jax.Array]:
            loss, others = loss_fn(model_params(state), part)
            return {"loss": loss, **others}

        return _accumulated(config, sums, batch)

    return eval_step


def _accumulated(config: ConfigDict, compute: Callable[[Batch], Any], batch: Batch) -> Any:
    """What `compute` gives for `config.grad_accum` micro-batches, one after the other, summed in float32."""
    if config.grad_accum == 1:
        return compute(batch)
    micro = _split(batch, config.grad_accum, config.data.rows_per_group)
    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), jax.eval_shape(compute, first))

    def body(carry: Any, part: Batch) -> tuple[Any, None]:
        # The barrier keeps XLA for TPUs from moving sums over devices out of the loop: it fails to where they
        # are of bfloat16 (libtpu 0.0.42, "while_loop_all_reduce_code_motion").
        return jax.tree.map(jnp.add, carry, jax.lax.optimization_barrier(compute(part))), None

    return jax.lax.scan(body, zeros, micro)[0]


def _split(batch: Batch, parts: int, rows_per_group: int) -> Batch:
    """Splits leading axes into micro-batches of whole groups.

    Consecutive groups go to different micro-batches, so that each device's share of every micro-batch is
    rows it already holds.
    """

    def split(name: str, x: jax.Array) -> jax.Array:
        rows = rows_per_group if name in ROW_FIELDS else 1
        groups = x.reshape(x.shape[0] // (rows * parts), parts, rows, *x.shape[1:])
        return jnp.moveaxis(groups, 1, 0).reshape(parts, -1, *x.shape[1:])

    return of_arrays({name: split(name, x) for name, x in arrays(batch).items()})
