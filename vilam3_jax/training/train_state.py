"""The training state: its fields, shapes and shardings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import step_guard


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Input and output of a step, besides the batch.

    Attributes:
      step: int32, number of steps, skipped ones included.
      rng: key data of the run.
      trainable: path → parameter.
      frozen: path → parameter or `QuantizedKernel`.
      opt_state: state of the optimizer; covers `trainable`.
      guard: counters of skipped steps.
      ema: path → float32 moving average of the trainable parameters; None without `config.ema_decay`.
    """

    step: Any
    rng: Any
    trainable: dict[str, Any]
    frozen: dict[str, Any]
    opt_state: Any
    guard: step_guard.Guard
    ema: dict[str, Any] | None = None

    def params(self) -> dict[str, Any]:
        """Path → parameter for evaluation and export: the moving average if there is one."""
        average = {path: x.astype(self.trainable[path].dtype) for path, x in (self.ema or {}).items()}
        return {**self.frozen, **self.trainable, **average}

    def all_params(self) -> dict[str, Any]:
        """Path → parameter in training."""
        return {**self.frozen, **self.trainable}

    def to_tree(self) -> dict[str, Any]:
        """Nested dicts, the layout of checkpoints."""
        tree = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tree["guard"] = {f.name: getattr(self.guard, f.name) for f in dataclasses.fields(self.guard)}
        return {name: value for name, value in tree.items() if value is not None}

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> TrainState:
        """The inverse of `to_tree`."""
        return cls(**{**tree, "guard": step_guard.Guard(**tree["guard"])})


def abstract_state(
    params: Mapping[str, Any],
    frozen: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    skip: step_guard.SkipConfig,
    mesh: Mesh,
    with_ema: bool,
) -> TrainState:
    """The state as ShapeDtypeStructs with shardings; optimizer state is sharded like its parameter.

    Args:
      params: path → ShapeDtypeStruct with sharding of the trainable parameters.
      frozen: path → the same, or a `QuantizedKernel` of them, of the frozen parameters.
      optimizer: optimizer of the trainable parameters.
      skip: settings of the guard.
      mesh: mesh of the run.
      with_ema: whether there is a moving average.
    """
    replicated = mesh_lib.replicated(mesh)

    def on_mesh(leaf: Any, sharding: Any = replicated) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def like_parameter(keys: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        like = next((params[k.key] for k in keys if getattr(k, "key", None) in params), None)
        return on_mesh(leaf, like.sharding if like is not None and like.shape == leaf.shape else replicated)

    counters = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "rng": jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))),
        "guard": jax.eval_shape(lambda: step_guard.fresh(skip)),
    }
    opt_state = jax.eval_shape(optimizer.init, dict(params))
    return TrainState(
        **jax.tree.map(on_mesh, counters),
        trainable=dict(params),
        frozen=dict(frozen),
        opt_state=jax.tree_util.tree_map_with_path(like_parameter, opt_state),
        ema={path: leaf.update(dtype=jnp.float32) for path, leaf in params.items()} if with_ema else None,
    )


def shardings(abstract: Any) -> Any:
    """The sharding of every leaf of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
