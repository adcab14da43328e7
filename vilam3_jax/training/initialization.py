"""The initial state of a run: random or from earlier exports, sharded from the start."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from vilam3_jax.checkpoints import exports
from vilam3_jax.errors import UserError, listed
from vilam3_jax.models import param_paths
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.ops import quantized_loading
from vilam3_jax.ops.quantized import QuantizedKernel, quantize_kernel
from vilam3_jax.runtime.settings import Section
from vilam3_jax.training import step_guard
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
    parts: dict[str, dict[str, Any]] = {}
    problems = []
    others = origin.keys() - sources.keys()
    for name, source in sources.items():
        components = others if name == "everything" else {name} & origin.keys()
        if not components:
            what = "every part has its own export" if name == "everything" else f"this model has no {name}"
            raise UserError(f"config init.{name}: {what}; leave it out")
        parts[name] = {path: leaf for path, leaf in wanted.items() if _component(path) in components}
        if found := _differences(source, model, parts[name], components):
            problems.append(mismatch(source, found))
    if problems:
        raise UserError("; ".join(problems))
    loaded: dict[str, Any] = {}
    for name, source in sources.items():
        part = parts[name]
        read = partial(exports.load_params, source, optional=_adapters(part))
        found = read({path: leaf for path, leaf in part.items() if path not in quantized})
        found |= quantized_loading.load({path: quantized[path] for path in part if path in quantized}, read)
        loaded.update(found)
        origin |= dict.fromkeys(map(_component, found), source)
    return loaded, origin


def _component(path: str) -> str:
    return path.split("/")[0]


def _adapters(paths: Iterable[str]) -> set[str]:
    """Those that may be absent from an export: adapters of an LLM that had none."""
    return {path for path in paths if _LORA in path}


def _differences(source: str, model: ModelConfig, part: Mapping[str, Any], components: Set[str]) -> list[str]:
    """Settings, and then parameters, in which the export `source` differs from this run."""
    rows = exports.stored_rows(source)
    adapters = any(_component(path) in components for path in _adapters(rows))
    stored = exports.load_model_config(source).to_dict()
    found = architecture_differences(stored, model, components, adapters)
    absent = sorted(components - set(map(_component, rows)))
    # Other settings have other shapes; only those that no setting explains are worth a line.
    explained = {difference.split(".")[0] for difference in found} | set(absent)
    unexplained = {path: leaf for path, leaf in part.items() if _component(path) not in explained}
    found = [*(f"has no {name}" for name in absent), *found]
    return found + exports.parameter_differences(rows, unexplained, _adapters(part))


def mismatch(source: str, differences: Sequence[str]) -> str:
    """The message for parameters of another model; `differences` are those of `architecture_differences`."""
    if all(".lora_" in difference for difference in differences):
        fix = "set them so, or merge the adapters by `vilam3 convert export` and import the result"
    else:
        fix = "it is another model: set config model to its values, or choose another source"
    return f"{source}: does not fit this config ({listed(differences)}); {fix}"


def architecture_differences(
    stored: Mapping[str, Any], model: ModelConfig, components: Collection[str], adapters: bool
) -> list[str]:
    """Compares all settings, also those that shapes do not show, such as a rotary base or a norm's epsilon.

    Args:
      stored: the model's config at the source of the parameters.
      model: section of this run's config.
      components: those that are loaded.
      adapters: whether they include LoRA adapters, whose targets and alpha must then agree.

    Returns:
      One text per setting that differs, such as `llm.num_layers=2, this config 4`.
    """
    own = model.to_dict()
    differences = []
    sections = {name: part for name, part in stored.items() if name in components and part}
    for component, section in sorted(sections.items()):
        for key, value in section.items():
            theirs, ours = _plain(value), _plain((own.get(component) or {}).get(key, value))
            lora = key.startswith("lora_")
            if key == _NOT_ARCHITECTURE or (lora and not adapters) or ours == theirs:
                continue
            differences.append(f"{component}.{key}={theirs}, this config {ours}")
    return differences


def _plain(value: Any) -> Any:
    """A setting as JSON stores it, with lists for tuples."""
    return json.loads(json.dumps(value, default=lambda config: config.to_dict()))
