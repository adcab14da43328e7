"""The registry of model families: language models and vision towers, one file each.

Other packages add families with `register`, or with an entry point of the group `vilam3.model_families`; see
docs/add_your_own_model.md.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from vilam3_jax.errors import UserError
from vilam3_jax.models.hugging_face import TensorRule
from vilam3_jax.runtime.settings import Section, from_mapping

ENTRY_POINTS = "vilam3.model_families"
_BUILT_IN = ("llama", "mistral", "gemma3", "siglip", "intern_vit")  # modules that define `FAMILY`

# Rows of (regular expression over the path inside the component, mesh axes per dimension, fallbacks ...).
ParameterRules = tuple[tuple[Any, ...], ...]


@dataclasses.dataclass(frozen=True)
class HuggingFaceLayout:
    """A family's layout on the Hugging Face hub, for import and export.

    Attributes:
      model_types: values of `model_type` in config.json.
      read_config: (content of config.json, its path, tensor name → shape) → the family's section.
      write_config: (section, dtype of the weights) → config.json, which `read_config` reads back.
      tensors: section → rules of all parameters; paths start with the component.
      unused: names of a checkpoint's tensors → {name of a tensor that is not read: reason}.
      preprocessor: section → preprocessor_config.json; None for a language model.
      rename: tensor names of a folder → the names in `tensors`.
      prefix: prefix of exported tensor names.
    """

    model_types: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any], Path, Mapping[str, Any]], dict[str, Any]]
    write_config: Callable[[Any, str], dict[str, Any]]
    tensors: Callable[[Any], list[TensorRule]]
    unused: Callable[[Collection[str]], dict[str, str]] = lambda names: {}
    preprocessor: Callable[[Any], dict[str, Any]] | None = None
    rename: Callable[[Collection[str]], Mapping[str, str]] = lambda names: {name: name for name in names}
    prefix: str = ""


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """A language model or a vision tower.

    Attributes:
      name: `type` of its section.
      component: 'llm' or 'vision_tower': the model's attribute, and the first element of its parameter paths.
      config: class of its section.
      module: class of the model: `module(config, rngs=, dtype=, param_dtype=, remat=)`.
      patches: for a tower: config → positions in its blocks, class token included.
      attention_windows: for an LLM: config → window of every layer, None for full attention.
    """

    name: str
    component: str
    config: type[Section]
    module: Callable[..., nnx.Module]
    parameter_rules: ParameterRules
    hugging_face: HuggingFaceLayout
    patches: Callable[[Any], int] | None = None
    attention_windows: Callable[[Any], Sequence[int | None]] = lambda config: (None,) * config.num_layers


_registry: dict[tuple[str, str], ModelFamily] = {}


def register(family: ModelFamily) -> ModelFamily:
    """Adds a family, or replaces the one of the same name."""
    _registry[family.component, family.name] = family
    return family


def get(component: str, name: str) -> ModelFamily:
    """Returns the family that a section's `type` names; raises UserError with the known names if none."""
    _load(name)
    if (component, name) not in _registry:
        raise UserError(f"model.{component}.type={name!r} is unknown; choose from {names(component)}")
    return _registry[component, name]


def names(component: str) -> list[str]:
    """The registered families of a component."""
    _load()
    return sorted(name for kind, name in _registry if kind == component)


def of_model_type(model_type: str) -> ModelFamily | None:
    """The family that reads a config.json with this `model_type`."""
    _load()
    return next((f for f in _registry.values() if model_type in f.hugging_face.model_types), None)


def model_types() -> list[str]:
    """All values of `model_type` that some family reads."""
    _load()
    return sorted(kind for family in _registry.values() for kind in family.hugging_face.model_types)


def config_of(component: str, section: Mapping[str, Any]) -> Section:
    """A typed section of the family that its `type` names."""
    return from_mapping(get(component, str(section.get("type"))).config, section)


def _load(name: str = "") -> None:
    """Imports built-in families and entry points, or only the built-in family `name`."""
    if any(known == name for _, known in _registry):
        return
    for module in (name,) if name in _BUILT_IN else _BUILT_IN:
        register(importlib.import_module(f"vilam3_jax.models.{module}").FAMILY)
    if name not in _BUILT_IN:
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
            if not any(known == entry.name for _, known in _registry):
                register(entry.load())
