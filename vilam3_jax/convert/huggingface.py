"""Hugging Face folders (config.json and safetensors) of any model family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vilam3_jax.convert.config_checks import (
    RecordedKeys,
    check_preprocessor,
    check_quantisation,
    check_unread,
)
from vilam3_jax.convert.safetensors_files import SafetensorsFolder, read_config
from vilam3_jax.convert.sources import Checkpoint, Reader, Source, section_of
from vilam3_jax.data.tokenizer import Tokenizer, load_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.models import families, siglip
from vilam3_jax.models.hugging_face import layer_count
from vilam3_jax.runtime.paths import read_bytes
from vilam3_jax.runtime.settings import Section

_EQUAL_ROWS = 4096  # per comparison
_MAX_LICENCE_BYTES = 1 << 20
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


def open_folder(folder: Path) -> Source:
    """Opens a folder of a language model or a vision tower; of a two-tower SigLIP, the vision tower.

    Raises:
      UserError: no family reads it, a setting is not supported, or files are broken.
    """
    config_file = folder / "config.json"
    values = read_config(config_file)
    family = _family(values, config_file)
    values = RecordedKeys(values)
    layout = family.hugging_face
    weights = SafetensorsFolder(folder)
    check_quantisation({}, [*weights.shapes, *weights.unlisted], weights.files[0])
    try:
        stored = {ours: name for name, ours in layout.rename(list(weights.shapes)).items()}
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    if len(stored) < len(weights.shapes):
        twice = sorted(weights.shapes.keys() - stored.values())
        raise UserError(f"{folder}: holds {twice[0]!r} (of {len(twice)}) under two prefixes; remove one")
    shapes = {ours: weights.shapes[name] for ours, name in stored.items()}

    def reader(name: str, start: int, stop: int) -> np.ndarray:
        return weights(stored[name], start, stop)

    config = layout.read_config(values, config_file, shapes)
    check_unread(values, config_file)
    layer_count(config["num_layers"], shapes, f"{config_file}: num_hidden_layers")
    unused = layout.unused(list(shapes))
    has_tokenizer = False
    if family.component == "llm":
        config, tied = _check_embedding(config, shapes, reader, config_file)
        unused |= tied
        has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    section = section_of(family.component, config, config_file)
    if family.component == "vision_tower":
        check_preprocessor(folder, section)
    return Source(
        component=family.component,
        config=section.to_dict(),
        tensors=shapes,
        rules=layout.tensors(section),
        reader=reader,
        files=[config_file, *weights.files],
        unused=unused,
        licence=licence(folder),
        dtypes=weights.dtypes,
        tokenizer=(lambda: load_tokenizer(folder)) if has_tokenizer else None,
    )


def _family(values: Mapping[str, Any], where: Path) -> families.ModelFamily:
    model_type = values.get("model_type")
    model_type = "llama" if model_type is None else model_type
    family = families.of_model_type(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(families.model_types())
        raise UserError(f"{where}: model_type {model_type!r} is not supported, only {known}")
    check_quantisation(values, (), where)
    return family


def llm_config(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Translates the content of a language model's config.json, `where`, into an `llm` section.

    Raises:
      UserError: no family reads it, or a setting is not supported.
    """
    family, recorded = _family(values, where), RecordedKeys(values)
    config = family.hugging_face.read_config(recorded, where, {})
    check_unread(recorded, where)
    return section_of(family.component, config, where).to_dict()


def _check_embedding(
    config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], reader: Reader, where: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Takes the vocabulary size from the weights, and checks a tied head.

    VILA extends vocabularies without always updating config.json (128,257 rows for Llama 3's 128,256).
    """
    shape = shapes.get(_EMBEDDING, ())
    if len(shape) == 2:
        config = {**config, "vocab_size": shape[0]}
    unused = {name: "recomputed from rope_theta" for name in shapes if name.endswith("rotary_emb.inv_freq")}
    if config["tie_embeddings"] and _HEAD in shapes:
        blocks = ((i, min(i + _EQUAL_ROWS, shape[0])) for i in range(0, (shape or (0,))[0], _EQUAL_ROWS))
        if shapes[_HEAD] != shape or not all(
            np.array_equal(reader(_HEAD, *rows), reader(_EMBEDDING, *rows)) for rows in blocks
        ):
            raise UserError(
                f"{where}: tie_word_embeddings is true, but {_HEAD} differs from the embedding; set it to "
                "false"
            )
        unused[_HEAD] = "equal to the embedding"
    return config, unused


def open_siglip_pair(folder: Path) -> Checkpoint:
    """Opens a SigLIP folder with both towers, the model of stage 1.

    Raises:
      UserError: a setting is not supported, or files are broken.
    """
    config_file = folder / "config.json"
    vision = open_folder(folder)
    text = siglip.read_text_config(read_config(config_file), config_file, vision.tensors)
    # `rename` has stripped the vision tower's prefix; the text tower's names are unchanged.
    both = dataclasses.replace(
        vision,
        component="contrastive",
        rules=[*vision.rules, *siglip.text_tensors(siglip.SiglipTextConfig(**text))],
        unused={name: why for name, why in vision.unused.items() if name.endswith("position_ids")},
        tokenizer=(lambda: load_tokenizer(folder)) if (folder / "tokenizer.json").exists() else None,
    )
    config = {
        "image_size": vision.config["image_size"],
        "dtype": "bfloat16",
        "remat": "none",
        "vision_tower": vision.config,
        "text_tower": text,
    }
    return Checkpoint("contrastive", config, [both])


def llm_folder_config(llm: Section, tokenizer: Tokenizer | None, dtype: str) -> dict[str, Any]:
    """The config.json of an `llm` section; `llm_config` reads it back.

    Args:
      llm: section of a family.
      tokenizer: supplies the ids of control tokens.
      dtype: dtype of the weights.

    Raises:
      UserError: no Hugging Face model has these settings.
    """
    config = families.get("llm", str(llm.get("type"))).hugging_face.write_config(llm, dtype)
    if tokenizer is None:
        return config
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    return config | ids


def licence(folder: Path) -> dict[str, str]:
    """Name and text of the licence file in a folder; empty if there is none."""
    for name in LICENCE_FILES:
        if (folder / name).is_file():
            text = read_bytes(folder / name, _MAX_LICENCE_BYTES).decode(errors="replace")
            return {"name": name, "text": text}
    return {}
