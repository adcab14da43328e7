"""Optimizers of the trainable parameters, a flat dict path → array."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.settings import Section, setting
from vilam3_jax.sharding import path_rules

# Name → dtype settings of its moments.
OPTIMIZERS = {
    "adamw": ("mu_dtype", "nu_dtype"),
    "adafactor": (),
    "lion": ("mu_dtype",),
    "muon": ("mu_dtype", "nu_dtype"),
}
_MOMENT_DTYPES = ("", "float32", "bfloat16")
_NOT_DECAYED = re.compile(r".*(norm\d*/scale|bias|logit_scale)")
_STACKED = re.compile(r".*/(layers|blocks)/.*")  # the first axis counts layers
# Updated by Muon; AdamW updates the first and last layers, adapters and vectors.
_MUON = re.compile(r"(?!llm/lm_head/|vision_tower/patch_embed/).*/kernel")
_MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
_MUON_RMS = 0.2  # of AdamW's updates, so that both share learning rate and decay (arXiv:2502.16982)
_ADAFACTOR_CLIP = 1.0  # arXiv:1804.04235, section 6


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Section):
    """The section `optimizer`.

    Attributes:
      name: 'adamw', 'adafactor', 'lion' or 'muon'.
      b1, b2, eps: of Adam and Lion.
      weight_decay: decoupled weight decay.
      clip_norm: largest global norm of the gradient; 0 for no clipping.
      muon_momentum: momentum of Muon.
      mu_dtype, nu_dtype: storage dtypes of the first and second moments; '' for float32.
    """

    key = "optimizer"
    name: str = setting(default="adamw", choices=tuple(OPTIMIZERS))
    b1: float = setting(default=0.9, at_least=0, at_most=0.9999999)
    b2: float = setting(default=0.98, at_least=0, at_most=0.9999999)
    eps: float = setting(default=1e-8, at_least=0)
    weight_decay: float = setting(default=0.0, at_least=0)
    clip_norm: float = setting(default=1.0, at_least=0)
    muon_momentum: float = 0.95
    mu_dtype: str = setting(default="", choices=_MOMENT_DTYPES)
    nu_dtype: str = setting(default="", choices=_MOMENT_DTYPES)

    def validate(self) -> None:
        """Checks the dtypes of the moments."""
        for key in ("mu_dtype", "nu_dtype"):
            if getattr(self, key) and key not in OPTIMIZERS[self.name]:
                raise UserError(
                    f"config optimizer.{key}: {self.name} does not keep this moment; leave it empty"
                )
        if self.nu_dtype == "bfloat16" and self.b2 > 0.99:
            raise UserError(
                f"config optimizer.nu_dtype='bfloat16' with b2={self.b2}: the change of one step is below "
                "the resolution of bfloat16, so the second moment would never change; set b2 to 0.99 or "
                "less, or nu_dtype to ''"
            )


@dataclasses.dataclass(frozen=True)
class ScheduleConfig(Section):
    """The section `schedule`, of the learning rate.

    Attributes:
      name: 'cosine' or 'constant', after the warm-up.
      peak: highest learning rate.
      warmup_fraction: share of the steps with a linear warm-up.
      end_fraction: final rate of the cosine, as a share of the peak.
    """

    key = "schedule"
    name: str = setting(default="cosine", choices=("cosine", "constant"))
    peak: float = setting(default=1e-4, at_least=0)
    warmup_fraction: float = setting(default=0.03, at_least=0, at_most=1)
    end_fraction: float = setting(default=0.1, at_least=0, at_most=1)


def learning_rate(schedule: ScheduleConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up to `peak`, then cosine decay to `end_fraction` of it, or constant.

    As in Hugging Face's Trainer, the warm-up starts at 0 and takes `warmup_fraction` of the steps (rounded
    up). Without one the rate starts at the peak.
    """
    warmup = math.ceil(schedule.warmup_fraction * num_steps)
    if schedule.name == "constant":
        after = optax.constant_schedule(schedule.peak)
    else:
        steps = max(1, num_steps - warmup)
        after = optax.cosine_decay_schedule(schedule.peak, steps, alpha=schedule.end_fraction)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, schedule.peak, warmup), after], [warmup])


@dataclasses.dataclass(frozen=True)
class LrGroup:
    """Multipliers of learning rate and weight decay, from a row of `config.trainable`.

    Attributes:
      rate: multiplies the scheduled learning rate; 0 freezes.
      decay: multiplies `optimizer.weight_decay`.
    """

    rate: float = 1.0
    decay: float = 1.0


def lr_groups(trainable: Sequence[Any], paths: Iterable[str]) -> dict[str, LrGroup]:
    """Returns the group of every parameter.

    Args:
      trainable: rows (regex, rate) or (regex, {"rate": ..., "decay": ...}); missing values are 1.
      paths: paths of all parameters.

    Raises:
      UserError: a parameter without a row, a row without a parameter, a malformed setting, or all frozen.
    """
    resolved = path_rules.resolve(trainable, paths, "trainable")
    groups = {path: _group(setting) for path, setting in resolved.items()}
    if not any(group.rate for group in groups.values()):
        raise UserError("config trainable: every row has rate 0, so nothing would be trained")
    return groups


def make_optimizer(
    settings: OptimizerConfig, schedule: optax.Schedule, groups: Mapping[str, LrGroup]
) -> optax.GradientTransformation:
    """Chain: clip → precondition → weight decay (× the group's) → learning rate (× the group's).

    Computes in float32; moments are stored as `mu_dtype` and `nu_dtype`. Layers stacked in one array are
    scaled one by one. Biases, scales of norms and the temperature of the contrastive loss are not decayed, as
    in Hugging Face's Trainer.

    Args:
      settings: section `optimizer`.
      schedule: learning-rate schedule.
      groups: path → group of the trainable parameters.
    """
    lr_multipliers = {path: group.rate for path, group in groups.items()}
    decays = {
        path: 0.0 if _NOT_DECAYED.fullmatch(path) else settings.weight_decay * group.decay
        for path, group in groups.items()
    }
    chain = optax.chain(
        optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity(),
        _scaling(settings, groups),
        _by_path(lambda path, x, parameter: x + decays[path] * parameter),
        optax.scale_by_learning_rate(schedule),
        _by_path(lambda path, x, _: x * lr_multipliers[path]),
    )
    return _in_float32(chain, settings.nu_dtype)


def _group(setting: Any) -> LrGroup:
    values = dict(setting) if isinstance(setting, Mapping) else {"rate": setting}
    unknown = sorted(set(values) - {"rate", "decay"})
    numbers = all(isinstance(value, (int, float)) and value >= 0 for value in values.values())
    if unknown or not numbers:
        raise UserError(
            f"config trainable: {setting!r} is not a setting; write a rate such as 0.3, or "
            '{"rate": 0.3, "decay": 0.0}'
        )
    return LrGroup(**{key: float(value) for key, value in values.items()})


def _scaling(settings: OptimizerConfig, paths: Mapping[str, Any]) -> optax.GradientTransformation:
    """Scales gradients to updates of about unit size."""
    mu_dtype = settings.mu_dtype or None
    adam = optax.scale_by_adam(settings.b1, settings.b2, settings.eps, mu_dtype=mu_dtype)
    if settings.name == "adamw":
        return adam
    if settings.name == "lion":
        return optax.scale_by_lion(settings.b1, settings.b2, mu_dtype=mu_dtype)
    if settings.name == "adafactor":
        # Factors the two largest axes (128 or more), which are never the stacked layer axis.
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
    """Clips the RMS of each layer's update; optax's own clips whole arrays, not stacked layers."""

    def clip(path: str, x: jax.Array, _: jax.Array) -> jax.Array:
        axes = tuple(range(1 if _STACKED.fullmatch(path) else 0, x.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))
        return x / jnp.maximum(1.0, rms / limit)

    return _by_path(clip)


def _by_path(function: Callable[[str, jax.Array, jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Applies `function(path, update, parameter)` to each parameter."""

    def update(updates: Any, params: Any) -> Any:
        return {path: function(path, x, params[path]) for path, x in updates.items()}

    return optax.stateless(update)


def _in_float32(inner: optax.GradientTransformation, nu_dtype: str) -> optax.GradientTransformation:
    """`inner` on float32 copies of gradients and parameters; second moments are stored as `nu_dtype`."""

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
