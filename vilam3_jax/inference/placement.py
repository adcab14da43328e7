"""Parameters as generation reads them: split over `tensor`, never gathered for a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vilam3_jax.models import build, param_paths
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.sharding import weights
from vilam3_jax.sharding.matmul import LANES
from vilam3_jax.sharding.weights import Weight, as_weight


def abstract_params(model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Nested parameters of a generative model as `Generator` holds them on a mesh, as ShapeDtypeStructs.

    Raises:
      UserError: the model cannot be split over the mesh.
    """
    shapes = param_paths.flatten(build.abstract_model(model, "generative")[1])
    rules = build.parameter_rules(model, "generative")
    shardings = mesh_lib.parameter_shardings(shapes, (), rules, mesh)
    placed = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in shapes.items()
    }
    return split_head(param_paths.unflatten(weights.annotate(placed, shardings)), mesh)


def head_columns(params: Mapping[str, Any]) -> int:
    """V', columns of the head."""
    llm = params["llm"]
    if "lm_head" in llm:
        return as_weight(llm["lm_head"]["kernel"]).value.shape[1]
    return as_weight(llm["embed"]["embedding"]).value.shape[0]


def split_head(params: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Pads the vocabulary of an untied head, so that its columns are split over `tensor`.

    A head of an odd vocabulary is split along its rows instead, so that every device would receive the sums
    of the logits of all tokens.

    Args:
      params: nested parameters, arrays or ShapeDtypeStructs.
      mesh: their mesh.
    """
    parts, llm = mesh.shape["tensor"], params["llm"]
    columns = head_columns(params)
    if "lm_head" not in llm or columns % parts == 0:
        return dict(params)
    extra = -columns % (parts * LANES)
    sharding = NamedSharding(mesh, PartitionSpec(None, "tensor"))

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, extra)))

    def placed(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((x.shape[0], columns + extra), x.dtype, sharding=sharding)
        return jax.jit(padded, out_shardings=sharding)(x)

    kernel: Weight = as_weight(llm["lm_head"]["kernel"])
    specs = tuple((None, "tensor") for _ in jax.tree.leaves(kernel.value))
    split = dataclasses.replace(kernel, value=jax.tree.map(placed, kernel.value), specs=specs)
    return {**params, "llm": {**llm, "lm_head": {**llm["lm_head"], "kernel": split}}}
