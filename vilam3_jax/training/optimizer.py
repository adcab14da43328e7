"""Optimizers over the trainable parameters only: a flat dict path → array."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from vilam3_jax.config import ConfigDict
from vilam3_jax.errors import UserError
from vilam3_jax.sharding import path_rules

_NOT_DECAYED = re.compile(r".*(norm\d*/scale|bias|logit_scale)")
_STACKED = re.compile(r".*/(layers|blocks)/.*")  # the first axis counts layers
# Muon is for the matrices between a model's ends; the ends, adapters and vectors are AdamW's.
_MUON = re.compile(r"(?!llm/lm_head/|vision_tower/patch_embed/).*/kernel")
_MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
# Root mean square of AdamW's updates, which Muon's are scaled to, so that one rate and decay serve both
# (arXiv:2502.16982).
_MUON_RMS = 0.2
_ADAFACTOR_CLIP = 1.0  # arXiv:1804.04235, section 6


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


@dataclasses.dataclass(frozen=True)
class Group:
    """How a parameter learns, a row of `config.trainable`.

    Attributes:
      rate: times the schedule's learning rate; 0 freezes.
      decay: times `optimizer.weight_decay`.
    """

    rate: float = 1.0
    decay: float = 1.0


def groups(config: ConfigDict, paths: list[str]) -> dict[str, Group]:
    """The group of every parameter by `config.trainable`.

    A row is (regex, rate) or (regex, {"rate": ..., "decay": ...}); what the mapping leaves out is 1.

    Raises:
      UserError: a parameter without a row, a row without a parameter, or a setting of another form.
    """
    resolved = path_rules.resolve(config.trainable, paths, "trainable")
    return {path: _group(setting) for path, setting in resolved.items()}


def multipliers(config: ConfigDict, paths: list[str]) -> dict[str, float]:
    """Learning-rate multiplier of every parameter by `config.trainable`; 0 means frozen.

    Raises:
      UserError: as `groups`, or nothing would learn.
    """
    rates = {path: group.rate for path, group in groups(config, paths).items()}
    if not any(rates.values()):
        raise UserError("config trainable: every row has rate 0, so nothing would learn")
    return rates


def make_optimizer(config: ConfigDict, rates: Mapping[str, float]) -> optax.GradientTransformation:
    """Clip → scale → decoupled decay × the group's → schedule × the group's multiplier.

    Computes in float32 whatever the parameters' type; moments are stored as `optimizer.mu_dtype` and
    `nu_dtype`. Layers stacked in one array are scaled one by one. Decay leaves out biases and the scales of
    norms, as Hugging Face's Trainer does, and the temperature of the contrastive loss.

    Args:
      config: the run's config.
      rates: path → learning-rate multiplier of the trainable parameters.
    """
    settings = config.optimizer
    of_frozen_parts_too = [row[0] for row in config.trainable]
    rows = path_rules.resolve(config.trainable, rates, "trainable", optional=of_frozen_parts_too)
    decays = {
        path: 0.0 if _NOT_DECAYED.fullmatch(path) else settings.weight_decay * _group(row).decay
        for path, row in rows.items()
    }
    chain = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity(),
        _scaling(settings, rates),
        _decay(decays),
        optax.scale_by_learning_rate(learning_rate(config)),
        _scale_by_group(rates),
    )
    return _in_float32(chain, settings.nu_dtype)


def _group(setting: Any) -> Group:
    values = dict(setting) if isinstance(setting, Mapping) else {"rate": setting}
    unknown = sorted(set(values) - {"rate", "decay"})
    numbers = all(isinstance(value, (int, float)) and value >= 0 for value in values.values())
    if unknown or not numbers:
        raise UserError(
            f"config trainable: {setting!r} is no setting; write a rate such as 0.3, or "
            '{"rate": 0.3, "decay": 0.0}'
        )
    return Group(**{key: float(value) for key, value in values.items()})


def _scaling(settings: ConfigDict, paths: Mapping[str, Any]) -> optax.GradientTransformation:
    """Gradients → steps of about unit size."""
    mu_dtype = settings.mu_dtype or None
    adam = optax.scale_by_adam(settings.b1, settings.b2, settings.eps, mu_dtype=mu_dtype)
    if settings.name == "adamw":
        return adam
    if settings.name == "lion":
        return optax.scale_by_lion(settings.b1, settings.b2, mu_dtype=mu_dtype)
    if settings.name == "adafactor":
        # It factors the two largest axes of 128 or more; layers are fewer than that.
        return optax.chain(optax.scale_by_factored_rms(), _clip_by_layer(_ADAFACTOR_CLIP))
    labels = {path: "muon" if _MUON.fullmatch(path) else "adam" for path in paths}
    return optax.partition({"muon": _muon(settings.muon_momentum, mu_dtype), "adam": adam}, labels)


def _muon(momentum: float, mu_dtype: Any) -> optax.GradientTransformation:
    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda _: _MATRIX, params)

    def as_large_as_adamw(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda x: x * (_MUON_RMS * math.sqrt(max(x.shape[-2:]))), updates)

    orthogonal = optax.contrib.scale_by_muon(
        beta=momentum, mu_dtype=mu_dtype, weight_dimension_numbers=cast(Any, matrices)
    )
    return optax.chain(orthogonal, optax.stateless(as_large_as_adamw))


def _clip_by_layer(limit: float) -> optax.GradientTransformation:
    """Limits the root mean square of each layer's update; optax's own does not know stacked layers."""

    def clip(path: str, x: jax.Array) -> jax.Array:
        axes = tuple(range(1 if _STACKED.fullmatch(path) else 0, x.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))
        return x / jnp.maximum(1.0, rms / limit)

    return optax.stateless(lambda updates, _: {path: clip(path, x) for path, x in _flat(updates).items()})


def _decay(decays: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        weights = _flat(params)
        return {path: x + decays[path] * weights[path] for path, x in _flat(updates).items()}

    return optax.stateless(update)


def _scale_by_group(rates: Mapping[str, float]) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: {path: x * rates[path] for path, x in _flat(updates).items()})


def _in_float32(inner: optax.GradientTransformation, nu_dtype: str) -> optax.GradientTransformation:
    """`inner` on float32 copies of gradients and parameters; second moments are kept as `nu_dtype`."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def second_moments_as(dtype: Any, state: Any) -> Any:
        def cast_leaf(keys: Any, x: jax.Array) -> jax.Array:
            return x.astype(dtype) if any(getattr(key, "name", "") == "nu" for key in keys) else x

        return jax.tree_util.tree_map_with_path(cast_leaf, state)

    kept = nu_dtype or jnp.float32

    def init(params: optax.Params) -> optax.OptState:
        return second_moments_as(kept, inner.init(wide(params)))

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None) -> Any:
        state = second_moments_as(jnp.float32, state)
        updates, state = inner.update(wide(updates), state, wide(params))
        return updates, second_moments_as(kept, state)

    return optax.GradientTransformation(init, update)


def _flat(tree: Any) -> dict[str, jax.Array]:
    return cast(dict[str, jax.Array], tree)
