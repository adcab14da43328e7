"""The initial state of a run: random or from earlier exports, sharded from the start."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vilam3_jax.checkpoints import exports
from vilam3_jax.errors import UserError
from vilam3_jax.models import param_paths
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.ops.quantized import QuantizedKernel, quantize_kernel
from vilam3_jax.runtime.settings import Section
from vilam3_jax.training import frozen_kernels, step_guard
from vilam3_jax.training.train_state import TrainState, shardings

_LORA = "/lora_"
_NOT_ARCHITECTURE = "max_positions"  # may differ without changing the model


@dataclasses.dataclass(frozen=True)
class InitConfig(Section):
    """The section `init`: the exports that components are loaded from; '' for random parameters.

    Attributes:
      vision_tower, text_tower, projector, llm: export of one component.
      everything: export of all other components.
    """

    key = "init"
    vision_tower: str = ""
    text_tower: str = ""
    projector: str = ""
    llm: str = ""
    everything: str = ""


def initial_state(
    init: InitConfig,
    model: ModelConfig,
    make_params: Callable[[jax.Array], dict[str, Any]],
    seed: int,
    skip: step_guard.SkipConfig,
    abstract: TrainState,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, str]]:
    """Initialises on the mesh and loads the components named in `init`.

    Args:
      init, model: sections of the config.
      make_params: random key → nested parameters.
      seed: seed of the run.
      skip: settings of the guard.
      abstract: shapes and shardings of the state.
      optimizer: over the trainable parameters.

    Returns:
      The state, and component → the export it was loaded from ('fresh' if random).

    Raises:
      UserError: an export lacks a component, or has different shapes or adapters.
    """
    wanted = abstract.all_params()
    quantized = {path: leaf for path, leaf in wanted.items() if isinstance(leaf, QuantizedKernel)}
    loaded, origin = _load(init, model, wanted, quantized)

    # Initialise only what no export has, so that nothing is materialised twice.
    def fresh(key: jax.Array) -> dict[str, Any]:
        return {
            path: quantize_kernel(leaf, quantized[path].kind) if path in quantized else leaf
            for path, leaf in param_paths.flatten(make_params(key)).items()
            if path not in loaded
        }

    missing = shardings({path: leaf for path, leaf in wanted.items() if path not in loaded})
    key = jax.random.key(seed)
    params = {**loaded, **jax.jit(fresh, out_shardings=missing)(key)}
    trainable = {path: params[path] for path in abstract.trainable}
    ema = None
    if abstract.ema is not None:
        # Copied, because the step donates every buffer of the state.
        copied = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), tree))
        ema = copied(trainable)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        rng=jax.random.key_data(key),
        trainable=trainable,
        frozen={path: params[path] for path in abstract.frozen},
        opt_state=jax.jit(optimizer.init, out_shardings=shardings(abstract.opt_state))(trainable),
        guard=step_guard.fresh(skip),
        ema=ema,
    )
    return jax.device_put(state, shardings(abstract)), origin


def _load(
    init: InitConfig, model: ModelConfig, wanted: Mapping[str, Any], quantized: Mapping[str, QuantizedKernel]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Parameters from exports by path, and component → origin."""
    origin = dict.fromkeys(sorted(map(_component, wanted)), "fresh")
    sources: dict[str, str] = {name: source for name, source in init.to_dict().items() if source}
    loaded: dict[str, Any] = {}
    for name, source in sources.items():
        part = {path: x for path, x in wanted.items() if name in ("everything", _component(path))}
        if not part:
            raise UserError(f"config init.{name}: this model has no {name}")
        others = sources.keys() - {name}
        components = set(map(_component, part)) - others
        adapters = any(
            _LORA in path and _component(path) in components for path in exports.stored_rows(source)
        )
        stored = exports.load_model_config(source).to_dict()
        check_architecture(source, stored, model, components, adapters)
        # A component with its own export may be absent from the one for `everything`.
        optional = {path for path in part if _LORA in path or _component(path) in others}
        read = partial(exports.load_params, source, optional=optional)
        found = read({path: leaf for path, leaf in part.items() if path not in quantized})
        found |= frozen_kernels.load({path: quantized[path] for path in part if path in quantized}, read)
        loaded.update(found)
        origin |= dict.fromkeys(map(_component, found), source)
    return loaded, origin


def _component(path: str) -> str:
    return path.split("/")[0]


def check_architecture(
    source: str, stored: Mapping[str, Any], model: ModelConfig, components: set[str], adapters: bool
) -> None:
    """Compares settings that shapes do not show, such as a rotary base or the epsilon of a norm.

    Args:
      source: source of the parameters, for the message.
      stored: the model's config there.
      model: section of this run's config.
      components: those that are loaded.
      adapters: whether they include LoRA adapters, whose targets and alpha must then agree.

    Raises:
      UserError: a setting differs.
    """
    own = model.to_dict()
    sections = {name: part for name, part in stored.items() if name in components and part}
    for component, section in sorted(sections.items()):
        for key, value in section.items():
            theirs, ours = _plain(value), _plain((own.get(component) or {}).get(key, value))
            lora = key.startswith("lora_")
            if key == _NOT_ARCHITECTURE or (lora and not adapters) or ours == theirs:
                continue
            fix = (
                "set it so, or merge the adapters by `vilam3 convert export` and import the result"
                if lora
                else "it is another model"
            )
            raise UserError(f"{source}: its {component} has {key}={theirs}, this config {ours}; {fix}")


def _plain(value: Any) -> Any:
    """A setting as JSON stores it, with lists for tuples."""
    return json.loads(json.dumps(value, default=lambda config: config.to_dict()))
