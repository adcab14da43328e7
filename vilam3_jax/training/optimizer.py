"""Optimizers over the trainable parameters only: a flat dict path → array."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import optax

from vilam3_jax.config import ConfigDict
from vilam3_jax.training import tables

_NOT_DECAYED = re.compile(r".*(norm\d*/scale|bias|logit_scale)")


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """Linear warm-up to `schedule.peak`, then cosine to `end_fraction` of it, or constant.

    As in Hugging Face's Trainer, warm-up takes `warmup_fraction` of the steps, rounded up, and the first of
    them has rate 0; a fraction of 0 starts at the peak.
    """
    schedule = config.schedule
    warmup = math.ceil(schedule.warmup_fraction * config.num_steps)
    if schedule.name == "constant":
        after = optax.constant_schedule(schedule.peak)
    else:
        steps = max(1, config.num_steps - warmup)
        after = optax.cosine_decay_schedule(schedule.peak, steps, alpha=schedule.end_fraction)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, schedule.peak, warmup), after], [warmup])


def multipliers(config: ConfigDict, paths: list[str]) -> dict[str, float]:
    """Learning-rate multiplier of every parameter by `config.trainable`; 0 means frozen."""
    resolved = tables.resolve(config.trainable, paths, "trainable", unused_ok=False)
    return {path: float(value) for path, value in resolved.items()}


def make_optimizer(config: ConfigDict, rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Clip → scale → decoupled decay → schedule × the group's multiplier.

    Decay leaves out biases and the scales of norms, as Hugging Face's Trainer does, and the temperature of
    the contrastive loss.

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
    decay = optax.add_decayed_weights(settings.weight_decay, mask=_decayed)
    return optax.chain(
        clip,
        scale,
        decay,
        optax.scale_by_learning_rate(learning_rate(config)),
        _scale_by_group(rates),
    )


def _decayed(params: dict[str, jax.Array]) -> dict[str, bool]:
    return {path: not _NOT_DECAYED.fullmatch(path) for path in params}


def _scale_by_group(rates: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        flat = cast(dict[str, jax.Array], updates)
        return {path: value * jnp.asarray(rates[path], value.dtype) for path, value in flat.items()}

    return optax.stateless(update)
