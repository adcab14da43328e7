"""Opens models to ask: exports, checkpoints of training runs, and Hugging Face folders."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

from etils import epath
from jax.sharding import Mesh

from vilam3_jax.checkpoints import exports
from vilam3_jax.checkpoints.exports import Abstract, Flat, StoredModel
from vilam3_jax.data.templates import Template, model_template
from vilam3_jax.data.tokenizer import Tokenizer, load_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.inference.generate import Generator
from vilam3_jax.runtime import paths
from vilam3_jax.runtime.settings import from_mapping
from vilam3_jax.sharding.mesh import decoding_mesh

_ACCEPTED = (
    "give a training run, one of its checkpoints (RUN/checkpoints/STEP), an export, or a Hugging Face folder "
    "of VILA, VILA-M3 or NVILA"
)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model on disk, opened without reading its parameters.

    Attributes:
      name: its path, for messages.
      config: its config.
      tokenizer: loads its tokenizer; raises `UserError` if there is none.
      read: (path → ShapeDtypeStruct with sharding) ↦ (path → array), straight onto the devices. With several
        processes, all call it.
    """

    name: str
    config: StoredModel
    tokenizer: Callable[[], Tokenizer]
    read: Callable[[Abstract], Flat]


def open_model(path: paths.PathLike) -> ModelSource:
    """Opens a model, whatever it is stored as.

    Args:
      path: an export, or a folder that `exports.locate` finds one in; a training run without an export, for
        its newest checkpoint; `RUN/checkpoints/STEP`; or a Hugging Face folder, see `convert.importer`.

    Raises:
      UserError: none of these, or damaged.
    """
    folder = paths.as_path(path)
    if (export := exports.locate(folder)) is not None:
        return _export(export)
    if (place := _checkpoint_of(folder)) is not None:
        return _checkpoint(*place)
    if (folder / "config.json").exists():
        return _foreign(folder)
    if not folder.exists():
        raise UserError(f"{path}: no such folder; {_ACCEPTED}")
    raise UserError(f"{path}: {'holds no model' if folder.is_dir() else 'is a file'}; {_ACCEPTED}")


def _export(folder: epath.Path) -> ModelSource:
    return ModelSource(
        str(folder),
        exports.load_model_config(folder),
        functools.partial(load_tokenizer, folder / "tokenizer"),
        functools.partial(exports.load_params, folder),
    )


def _checkpoint_of(folder: epath.Path) -> tuple[epath.Path, int | None] | None:
    """(run, step) of a run, its folder of checkpoints, or one of these."""
    if (folder / "checkpoints").is_dir():
        return folder, None
    if folder.is_dir() and folder.name == "checkpoints":
        return folder.parent, None
    if folder.parent.name == "checkpoints" and folder.name.isdecimal():
        return folder.parent.parent, int(folder.name)
    return None


def _checkpoint(workdir: epath.Path, step: int | None) -> ModelSource:
    from vilam3_jax.training.checkpoint_model import open_checkpoint  # the optimizer behind it is slow

    model = open_checkpoint(workdir, step)
    return ModelSource(
        str(model.folder),
        _as_stored(model.config),
        functools.partial(load_tokenizer, model.tokenizer),
        model.read,
    )


def _foreign(folder: epath.Path) -> ModelSource:
    from vilam3_jax.convert.importer import open_foreign

    model = open_foreign(folder)

    def tokenizer() -> Tokenizer:
        if model.tokenizer is None:
            raise UserError(f"{folder}: has no tokenizer; download the whole model folder")
        return model.tokenizer

    return ModelSource(str(folder), _as_stored(model.config), tokenizer, model.read)


def _as_stored(config: dict[str, Any]) -> StoredModel:
    """A config as it is read from an export."""
    return from_mapping(StoredModel, json.loads(json.dumps(config)))


def load_generator(
    source: paths.PathLike | ModelSource,
    *,
    max_length: int = 2048,
    batch_size: int = 16,
    text: str = "",
    mesh: Mesh | str | int | None = None,
    dtype: str | None = None,
    cache_dtype: str | None = None,
) -> tuple[Generator, Template]:
    """Loads a generative model.

    Args:
      source: see `open_model`.
      max_length: maximum positions of a dialogue.
      batch_size: maximum dialogues of a batch.
      text: changes of the model's text rules, see `TextRules.changed`.
      mesh: devices that share the heads and hidden units, see `decoding_mesh`. With several processes, all
        call this.
      dtype: "float32" or "bfloat16": type of weights and activations; "int8": matrices of the LLM in int8,
        the rest in the type of the model's activations. By default that of the source.
      cache_dtype: type of cached keys and values: "float32", "bfloat16" or "int8"; by default that of
        activations.

    Raises:
      UserError: no generative model with a tokenizer, an unknown text rule or type, or a model that cannot be
        split over so many devices.
    """
    if not isinstance(source, ModelSource):
        source = open_model(source)
    check_kind(source, "generative", "which generates no text; give the export of a later stage")
    template = model_template(source.config, text)
    tokenizer = source.tokenizer()
    devices = decoding_mesh(mesh)
    params, config = exports.read_model(source.config, source.read, mesh=devices, dtype=dtype)
    generator = Generator(
        config,
        params,
        tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        mesh=devices,
        cache_dtype=cache_dtype,
    )
    return generator, template


def check_kind(source: ModelSource, kind: str, otherwise: str) -> None:
    """Raises UserError if a model is not of this kind; `otherwise` ends the sentence about another one."""
    found = source.config.kind
    if found in ("generative", "contrastive"):
        if found != kind:
            raise UserError(f"{source.name}: holds a {found} model, {otherwise}")
    else:
        raise UserError(
            f"{source.name}: holds only a {found}, a part of a model that reads images and text; train one "
            "from it, or give a whole model"
        )
