"""Structure, random parameters and sharding rules of models."""

from __future__ import annotations

import collections
import math
from typing import Any

import jax
from flax import nnx

from vilam3_jax.errors import UserError
from vilam3_jax.models import families, param_paths, projector, siglip
from vilam3_jax.models.contrastive import TwoTower
from vilam3_jax.models.families import ParameterRules
from vilam3_jax.models.model_config import resolve
from vilam3_jax.models.vila import Vila
from vilam3_jax.runtime import compat

MODELS = {"generative": Vila, "contrastive": TwoTower}  # by task


def build(cfg: Any, task: str, key: jax.Array) -> nnx.Module:
    """Makes a model with random parameters; LoRA has its own stream, so the others do not depend on its rank.

    Args:
      cfg: `config.model`: a `ModelConfig`, ConfigDict or JSON.
      task: a key of `MODELS`.
      key: random key.

    Raises:
      UserError: unknown task or family, or incompatible sizes.
    """
    if task not in MODELS:
        raise UserError(f"task {task!r} is unknown; choose from {sorted(MODELS)}")
    return MODELS[task](resolve(cfg), rngs=nnx.Rngs(params=key, lora=jax.random.fold_in(key, 1)))


def abstract_model(cfg: Any, task: str) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Structure and parameter shapes (nested dict of ShapeDtypeStruct) of a model; allocates nothing."""
    return compat.split(nnx.eval_shape(lambda: build(cfg, task, jax.random.key(0))))


def parameter_counts(cfg: Any, task: str = "generative") -> dict[str, int]:
    """Component, such as "llm", → number of its parameters; allocates nothing. Raises as `build`."""
    counts: collections.Counter[str] = collections.Counter()
    for path, leaf in param_paths.flatten(abstract_model(cfg, task)[1]).items():
        counts[path.partition("/")[0]] += math.prod(leaf.shape)
    return dict(counts)


def init_params(cfg: Any, task: str, key: jax.Array) -> dict[str, Any]:
    """Random parameters as a nested dict; under jit with `out_shardings` each device makes only its part."""
    return compat.split(build(cfg, task, key))[1]


merge = compat.merge  # (graphdef, params) → model; both as `abstract_model` and `init_params` return them


def parameter_rules(cfg: Any, task: str) -> ParameterRules:
    """The sharding rules of a model's families, for `sharding.mesh.parameter_shardings`."""
    model = resolve(cfg)
    tower = families.get("vision_tower", model.vision_tower.type).parameter_rules
    parts: dict[str, ParameterRules] = {"vision_tower": tower}
    if task == "contrastive":
        parts["text_tower"] = siglip.TEXT_TOWER_RULES
    else:
        parts["projector"] = projector.PARAMETER_RULES
        parts["llm"] = families.get("llm", model.llm.type).parameter_rules
    rules = [(f"{part}/(?:{regex})", *specs) for part, rows in parts.items() for regex, *specs in rows]
    return (*rules, (r"logit_\w+", ()))
