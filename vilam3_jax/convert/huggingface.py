"""Hugging Face folders (config.json and safetensors) of any model family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vilam3_jax.convert.safetensors_files import SafetensorsFolder, read_config
from vilam3_jax.convert.sources import Checkpoint, Source
from vilam3_jax.data.tokenizer import Tokenizer, load_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.models import families, siglip
from vilam3_jax.models.hugging_face import layer_count
from vilam3_jax.runtime.paths import read_bytes
from vilam3_jax.runtime.settings import Section

_EQUAL_ROWS = 4096  # compared at a time
_MAX_LICENCE_BYTES = 1 << 20
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")


class _Renamed:
    """A folder's tensors under the names that a family's rules use."""

    def __init__(self, weights: SafetensorsFolder, names: Mapping[str, str]) -> None:
        self._weights = weights
        self._stored = {ours: stored for stored, ours in names.items()}
        self.shapes = {ours: weights.shapes[stored] for ours, stored in self._stored.items()}

    def __call__(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._weights(self._stored[name], start, stop)


def open_folder(folder: Path) -> Source:
    """Opens a folder of a language model or a vision tower; of both towers of a SigLIP, the vision tower.

    Raises:
      UserError: no family reads it, a setting is not supported, or files are broken.
    """
    config_file = folder / "config.json"
    values = read_config(config_file)
    family = _family(values, config_file)
    layout = family.hugging_face
    weights = SafetensorsFolder(folder)
    try:
        reader = _Renamed(weights, layout.rename(list(weights.shapes)))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    config = layout.read_config(values, config_file, reader.shapes)
    layer_count(config["num_layers"], reader.shapes, f"{config_file}: num_hidden_layers")
    unused = layout.unused(list(reader.shapes))
    has_tokenizer = False
    if family.component == "llm":
        config, more = _check_embedding(config, reader, config_file)
        unused |= more
        has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    section = families.config_of(family.component, config)
    return Source(
        component=family.component,
        config=section.to_dict(),
        tensors=reader.shapes,
        rules=layout.tensors(section),
        reader=reader,
        files=[config_file, *weights.files],
        unused=unused,
        licence=licence(folder),
        dtypes=weights.dtypes,
        tokenizer=(lambda: load_tokenizer(folder)) if has_tokenizer else None,
    )


def _family(values: Mapping[str, Any], where: Path) -> families.ModelFamily:
    model_type = values.get("model_type", "llama")
    family = families.of_model_type(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(families.model_types())
        raise UserError(f"{where}: model_type {model_type!r} is not supported, only {known}")
    if values.get("quantization_config") is not None:
        raise UserError(f"{where}: quantization_config is not supported; import the unquantised model")
    return family


def llm_config(values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Translates a language model's config.json into our `llm` section.

    Raises:
      UserError: no family reads it, or it asks for what the family does not do.
    """
    family = _family(values, where)
    config = family.hugging_face.read_config(values, where, {})
    return families.config_of(family.component, config).to_dict()


def _check_embedding(
    config: dict[str, Any], reader: _Renamed, where: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Takes the vocabulary's size from the weights, and checks a tied head.

    VILA grows vocabularies without always stating it (128,257 for Llama 3's 128,256).
    """
    rows = reader.shapes.get(_EMBEDDING, ())
    if len(rows) == 2:
        config = {**config, "vocab_size": rows[0]}
    unused = {
        name: "recomputed from rope_theta" for name in reader.shapes if name.endswith("rotary_emb.inv_freq")
    }
    if config["tie_embeddings"] and _HEAD in reader.shapes:
        if not _equal(reader, _HEAD, _EMBEDDING):
            raise UserError(
                f"{where}: says tie_word_embeddings, but {_HEAD} differs from the embedding; set "
                "tie_word_embeddings to false"
            )
        unused[_HEAD] = "the same as the embedding"
    return config, unused


def _equal(reader: _Renamed, one: str, other: str) -> bool:
    if reader.shapes[one] != reader.shapes.get(other):
        return False
    rows = reader.shapes[one][0]
    starts = range(0, rows, _EQUAL_ROWS)
    return all(
        np.array_equal(reader(one, start, stop), reader(other, start, stop))
        for start, stop in ((start, min(start + _EQUAL_ROWS, rows)) for start in starts)
    )


def open_siglip_pair(folder: Path) -> Checkpoint:
    """Opens a SigLIP folder with both towers: the model of stage 1.

    Raises:
      UserError: a setting that these towers do not have, or broken files.
    """
    config_file = folder / "config.json"
    vision = open_folder(folder)
    text = siglip.read_text_config(read_config(config_file), config_file, vision.tensors)
    # The vision tower's names lose their prefix; the text tower keeps its own.
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
      tokenizer: supplies the control tokens.
      dtype: of the weights.

    Raises:
      UserError: no Hugging Face model has these settings.
    """
    config = families.get("llm", str(llm.get("type"))).hugging_face.write_config(llm, dtype)
    if tokenizer is not None:
        config |= {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }
    return config


def licence(folder: Path) -> dict[str, str]:
    """Name and text of the licence file in a folder; empty if there is none."""
    for name in LICENCE_FILES:
        if (folder / name).is_file():
            text = read_bytes(folder / name, _MAX_LICENCE_BYTES).decode(errors="replace")
            return {"name": name, "text": text}
    return {}
