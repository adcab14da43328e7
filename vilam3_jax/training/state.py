"""The state of a run: fresh, from earlier exports, placed on the mesh from the start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vilam3_jax.checkpoints import exports
from vilam3_jax.config import ConfigDict
from vilam3_jax.errors import UserError
from vilam3_jax.models import param_paths, vila
from vilam3_jax.ops.quantized import QuantizedKernel, quantize_kernel
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import frozen_kernels, step_guard

State = dict[str, Any]
_LORA = "/lora_"
_NO_ARCHITECTURE = "max_positions"  # a setting with which the same weights still are the same model


def abstract_state(
    config: ConfigDict, mesh: Mesh, optimizer: optax.GradientTransformation, rates: Mapping[str, float]
) -> State:
    """Shapes, dtypes and shardings of the whole state, without memory.

    `trainable` and `frozen` are flat (path → leaf), so is `ema` (if `config.ema_decay`): the moving average
    of the trainable ones, float32. A frozen leaf may be a `QuantizedKernel`. Optimizer state follows the
    sharding of the parameter it belongs to.
    """
    graphdef, nested = vila.abstract_model(config.model, config.kind)
    shapes = param_paths.flatten(nested)
    placed = mesh_lib.parameter_shardings(shapes, config.parameter_rules, mesh)
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[path])
        for path, leaf in shapes.items()
    }
    trainable = {path: leaf for path, leaf in params.items() if rates[path]}
    quantized = frozen_kernels.abstract(config, graphdef, params, rates)
    whole = mesh_lib.replicated(mesh)

    def beside_parameter(keys: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        like = next((trainable[k.key] for k in keys if getattr(k, "key", None) in trainable), None)
        own = like.sharding if like is not None and like.shape == leaf.shape else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own)

    opt_state = jax.tree_util.tree_map_with_path(beside_parameter, jax.eval_shape(optimizer.init, trainable))
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    guard = jax.eval_shape(lambda: step_guard.fresh(config))
    state = {
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
        "rng": jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole),
        "trainable": trainable,
        "frozen": {path: quantized.get(path, leaf) for path, leaf in params.items() if not rates[path]},
        "opt_state": opt_state,
        "guard": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), guard),
    }
    if config.ema_decay:
        state["ema"] = {
            path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
            for path, leaf in trainable.items()
        }
    return state


def shardings(abstract: State) -> State:
    """The sharding of every leaf of an abstract state."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)


def initial_state(
    config: ConfigDict, abstract: State, optimizer: optax.GradientTransformation
) -> tuple[State, dict[str, str]]:
    """Initialises on the mesh, then takes over the components named in `config.init`.

    Returns:
      The state, and component → the export it came from ('fresh' if initialised here).

    Raises:
      UserError: an export lacks a component, or holds one of other shapes or with other adapters.
    """
    origin = dict.fromkeys(_components(abstract), "fresh")
    loaded: dict[str, Any] = {}
    wanted = {**abstract["frozen"], **abstract["trainable"]}
    quantized = {path: leaf for path, leaf in wanted.items() if isinstance(leaf, QuantizedKernel)}
    for component, source in config.init.items():
        if not source:
            continue
        prefix = "" if component == "everything" else component + "/"
        part = {path: leaf for path, leaf in wanted.items() if path.startswith(prefix)}
        if not part:
            raise UserError(f"config init.{component}: this model has no {component}")
        taken = {path.split("/")[0] for path in part}
        if component == "everything":
            taken -= {name for name, own in config.init.items() if own}
        adapters = any(_LORA in path and path.split("/")[0] in taken for path in exports.stored_rows(source))
        check_architecture(source, exports.load_model_config(source), config.model, taken, adapters)
        optional = {path for path in part if _LORA in path} | set(_fresh_ok(config, part))
        read = partial(exports.load_params, source, optional=optional)
        found = read({path: leaf for path, leaf in part.items() if path not in quantized})
        found |= frozen_kernels.load({path: quantized[path] for path in part if path in quantized}, read)
        loaded.update(found)
        for path in found:
            origin[path.split("/")[0]] = source

    # Only what no export gave is initialised; the rest is never materialised twice.
    def fresh(key: jax.Array) -> dict[str, Any]:
        params = param_paths.flatten(vila.init_params(config.model, config.kind, key))
        return {
            path: quantize_kernel(leaf, quantized[path].kind) if path in quantized else leaf
            for path, leaf in params.items()
            if path not in loaded
        }

    missing = shardings({path: leaf for path, leaf in wanted.items() if path not in loaded})
    key = jax.random.key(config.seed)
    params = {**loaded, **jax.jit(fresh, out_shardings=missing)(key)}
    trainable = {path: params[path] for path in abstract["trainable"]}
    opt_state = jax.jit(
        optimizer.init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract["opt_state"])
    )(trainable)
    state = {
        "step": jnp.zeros((), jnp.int32),
        "rng": jax.random.key_data(key),
        "trainable": trainable,
        "frozen": {path: params[path] for path in abstract["frozen"]},
        "opt_state": opt_state,
        "guard": step_guard.fresh(config),
    }
    if config.ema_decay:
        # A copy, because the step gives each buffer of its old state away.
        copied = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), tree))
        state["ema"] = copied(trainable)
    return jax.device_put(state, shardings(abstract)), origin


def model_params(state: State) -> dict[str, Any]:
    """The parameters to evaluate and to export, flat: the moving average where there is one.

    Kernels that are stored quantised stay so.
    """
    average = {path: x.astype(state["trainable"][path].dtype) for path, x in state.get("ema", {}).items()}
    return {**state["frozen"], **state["trainable"], **average}


def check_architecture(
    source: str, stored: Any, model: ConfigDict, components: set[str], adapters: bool
) -> None:
    """Same shapes do not make the same model: a rotary base or a norm's epsilon has none.

    Args:
      source: of the parameters, for the message.
      stored: the model's config there.
      model: the run's.
      components: those that are taken over.
      adapters: whether there are LoRA adapters among their parameters. They are taken over whole: with other
        targets some would be lost, with another alpha all would count for more or less.

    Raises:
      UserError: a setting differs.
    """
    for component in sorted(components & set(stored)):
        for key, value in stored[component].items():
            held, wanted = _plain(value), _plain(model[component].get(key, value))
            lora = key.startswith("lora_")
            if key == _NO_ARCHITECTURE or (lora and not adapters) or wanted == held:
                continue
            mend = (
                "set it so, or merge the adapters by `vilam3 convert export` and import the result"
                if lora
                else "it holds another model"
            )
            raise UserError(f"{source}: its {component} has {key}={held}, this config {wanted}; {mend}")


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back: lists for tuples, dicts for configs."""
    return json.loads(json.dumps(value, default=lambda config: config.to_dict()))


def _components(abstract: State) -> list[str]:
    return sorted({path.split("/")[0] for path in (*abstract["frozen"], *abstract["trainable"])})


def _fresh_ok(config: ConfigDict, part: Mapping[str, Any]) -> list[str]:
    """A component that has an export of its own need not be in the one for `everything`."""
    return [path for path in part if config.init.get(path.split("/")[0])]
