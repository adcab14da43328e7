"""Optimizers over the trainable parameters only: a flat dict path → array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import optax

from vilam3_jax.config import ConfigDict
from vilam3_jax.training import tables


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up to `schedule.peak`, then cosine to `end_fraction` of it, or constant."""
    schedule = config.schedule
    warmup = max(1, round(schedule.warmup_fraction * config.num_steps))
    if schedule.name == "constant":
        return optax.join_schedules(
            [optax.linear_schedule(0.0, schedule.peak, warmup), optax.constant_schedule(schedule.peak)],
            [warmup],
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=schedule.peak,
        warmup_steps=warmup,
        decay_steps=max(config.num_steps, warmup + 1),
        end_value=schedule.peak * schedule.end_fraction,
    )


def multipliers(config: ConfigDict, paths: list[str]) -> dict[str, float]:
    """Learning-rate multiplier of every parameter by `config.trainable`; 0 means frozen."""
    resolved = tables.resolve(config.trainable, paths, "trainable", unused_ok=False)
    return {path: float(value) for path, value in resolved.items()}


def make_optimizer(config: ConfigDict, rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Clip → scale → decoupled decay (matrices only) → schedule × the group's multiplier.

    Args:
      config: the run's config.
      rates: path → learning-rate multiplier of the trainable parameters.
    """
    settings = config.optimizer
    if settings.name == "adamw":
        scale = optax.scale_by_adam(settings.b1, settings.b2, settings.eps)
    elif settings.name == "lion":
        scale = optax.scale_by_lion(settings.b1, settings.b2)
    else:
        scale = optax.scale_by_factored_rms()
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    decay = optax.add_decayed_weights(settings.weight_decay, mask=_matrices)
    return optax.chain(
        clip,
        scale,
        decay,
        optax.scale_by_learning_rate(learning_rate(config)),
        _scale_by_group(rates),
    )


def _matrices(params: dict[str, jax.Array]) -> dict[str, bool]:
    return {path: path.endswith(("kernel", "embedding", "lora_a", "lora_b")) for path in params}


def _scale_by_group(rates: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        flat = cast(dict[str, jax.Array], updates)
        return {path: value * jnp.asarray(rates[path], value.dtype) for path, value in flat.items()}

    return optax.stateless(update)
