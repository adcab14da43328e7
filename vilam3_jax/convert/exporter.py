"""Writes an export folder as the folders that transformers and VILA read, leaf by leaf."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vilam3_jax.checkpoints.exports import (
    StoredModel,
    StoredRows,
    load_model_config,
    parameter_shape,
    stored_rows,
)
from vilam3_jax.convert.huggingface import LICENCE_FILES, llm_folder_config
from vilam3_jax.convert.importer import (
    DTYPES,
    Progress,
    check_dtype,
    copy_tokenizer_extras,
    silent,
    unused_folder,
)
from vilam3_jax.convert.safetensors_files import SafetensorsFolder, SafetensorsWriter, contiguous
from vilam3_jax.convert.vila import PARTS, vila_folder_config
from vilam3_jax.data.tokenizer import Tokenizer, load_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.models import families, projector, siglip
from vilam3_jax.models.hugging_face import TensorRule
from vilam3_jax.runtime.paths import PathLike, as_path, read_bytes, write_text_atomic
from vilam3_jax.runtime.settings import Section

_SECTIONS = {
    "llm": ("llm",),
    "vision_tower": ("vision_tower",),
    "contrastive": ("vision_tower", "text_tower"),
    "generative": ("vision_tower", "projector", "llm"),
}
FILE_BYTES = 5_000_000_000  # transformers' default
_MAX_PROVENANCE = 64 << 20
_BLOCK_BYTES = 64 << 20

Stored = Mapping[str, Sequence[StoredRows]]
_Job = tuple[str, int, Callable[[], np.ndarray]]  # tensor name, first row, function that makes the rows
_LowRank = Callable[[int], np.ndarray]  # layer → float32 update of its kernel


@dataclasses.dataclass(frozen=True)
class ExportSummary:
    """Result of an export.

    Attributes:
      folders: Hugging Face folders, relative to the result.
      tensors: number of tensors written.
      bytes: size of the tensors.
      dtype: dtype of the tensors.
      merged: number of parameters with a merged LoRA.
      seconds: wall time.
    """

    folders: tuple[str, ...]
    tensors: int
    bytes: int
    dtype: str
    merged: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Part:
    """A Hugging Face folder to write."""

    folder: str
    rules: list[TensorRule]
    config: dict[str, Any]
    preprocessor: dict[str, Any] | None = None


def export_folder(
    source: PathLike,
    out: PathLike,
    *,
    dtype: str = "auto",
    verify: bool = True,
    file_bytes: int = FILE_BYTES,
    progress: Progress = silent,
) -> ExportSummary:
    """Writes a whole model as a VILA folder, a component or two-tower model as a Hugging Face folder.

    Merges LoRAs into their kernels. Holds one stored leaf at a time. Atomic.

    Args:
      source: export folder of a run or of an import.
      out: folder to create on a local disk; must be absent or empty.
      dtype: a key of `DTYPES`, or 'auto': that of the export.
      verify: hash every tensor when it is written, read all files back at the end, and compare.
      file_bytes: maximum size of a safetensors file.
      progress: called after each write.

    Raises:
      UserError: `source` is not an export, `out` is in use, or the disk is full.
    """
    start = time.perf_counter()
    if "://" in str(out):
        raise UserError(f"{out}: object stores are not supported; give a folder on a local disk")
    target = Path(unused_folder(out))
    check_dtype(dtype)
    model = load_model_config(source)
    sections = {key: getattr(model, key) for key in _SECTIONS.get(model.kind, ())}
    if missing := [key for key, section in sections.items() if not isinstance(section, Section)]:
        raise UserError(f"{source}: its model.json has no {missing[0]}; export the model again")
    dtype = model.param_dtype if dtype == "auto" else dtype
    tokenizer_folder = as_path(source) / "tokenizer"
    tokenizer = load_tokenizer(tokenizer_folder) if tokenizer_folder.exists() else None
    parts = _layout(source, model, tokenizer, dtype)
    stored = stored_rows(source)
    _check_coverage(source, parts, stored)

    temporary = target.parent / f".{target.name}.exporting"
    shutil.rmtree(temporary, ignore_errors=True)
    count = sum(math.prod(parameter_shape(stored[rule.target])) for part in parts for rule in part.rules)
    total, written, tensors = count * np.dtype(DTYPES[dtype]).itemsize, 0, 0
    try:
        for part in parts:
            folder = temporary / part.folder
            folder.mkdir(parents=True)
            writer = _writer(folder, part, stored, DTYPES[dtype], file_bytes)
            tensors += len(writer.shapes)
            for size in _write_weights(folder, part, model, stored, writer, verify):
                written += size
                progress(written, total)
            _write_json(folder / "config.json", part.config)
            if part.preprocessor is not None:
                _write_json(folder / "preprocessor_config.json", part.preprocessor)
        llm_folder = temporary
        if model.kind == "generative":
            configs = {part.folder: part.config for part in parts}
            _write_json(temporary / "config.json", vila_folder_config(model, dtype, configs))
            llm_folder = temporary / PARTS["llm"]
        if tokenizer is not None:
            tokenizer.save(llm_folder)
            copy_tokenizer_extras(tokenizer_folder, llm_folder)
        _write_licences(source, temporary, parts)
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{target}: cannot be written ({reason}); free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ExportSummary(
        folders=tuple(part.folder for part in parts),
        tensors=tensors,
        bytes=total,
        dtype=dtype,
        merged=sum(path.endswith("/lora_a") for path in stored),
        seconds=time.perf_counter() - start,
    )


def _layout(source: PathLike, model: StoredModel, tokenizer: Tokenizer | None, dtype: str) -> list[_Part]:
    """The folders to write: one at '.', or those of a VILA folder."""
    if model.kind not in _SECTIONS:
        raise UserError(f"{source}: kind {model.kind!r} is unknown; export the model again")
    parts = []
    folders = PARTS if model.kind == "generative" else {}
    if "vision_tower" in _SECTIONS[model.kind]:
        tower = model.vision_tower
        layout = families.get("vision_tower", tower.type).hugging_face
        rules = [
            dataclasses.replace(rule, sources=tuple(layout.prefix + name for name in rule.sources))
            for rule in layout.tensors(tower)
        ]
        config = layout.write_config(tower, dtype)
        if model.kind == "contrastive":
            assert model.text_tower is not None
            rules += siglip.text_tensors(model.text_tower)
            config = siglip.write_pair_config(tower, model.text_tower, dtype)
        preprocessor = layout.preprocessor(tower) if layout.preprocessor else None
        parts.append(_Part(folders.get("vision_tower", "."), rules, config, preprocessor))
    if model.kind == "generative":
        assert model.projector is not None
        kind = model.projector.type
        layers = projector.layers_of(kind, model.projector_width, model.llm.hidden_size)
        config = {
            "architectures": ["MultimodalProjector"],
            "model_type": "v2l_projector",
            "mm_projector_type": kind,
            "torch_dtype": dtype,
        }
        parts.append(_Part(folders["projector"], projector.tensors(kind, layers), config))
    if "llm" in _SECTIONS[model.kind]:
        rules = families.get("llm", model.llm.type).hugging_face.tensors(model.llm)
        config = llm_folder_config(model.llm, tokenizer, dtype)
        parts.append(_Part(folders.get("llm", "."), rules, config))
    return parts


def _check_coverage(source: PathLike, parts: Sequence[_Part], stored: Stored) -> None:
    wanted = {rule.target for part in parts for rule in part.rules}
    found = {path for path in stored if not path.endswith(("/lora_a", "/lora_b"))}
    if wanted != found:
        raise UserError(
            f"{source}: does not fit its model.json; parameters missing: {sorted(wanted - found)[:12]}; "
            f"parameters not exported: {sorted(found - wanted)[:12]}; export the model again"
        )


def _writer(folder: Path, part: _Part, stored: Stored, dtype: Any, file_bytes: int) -> SafetensorsWriter:
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in part.rules:
        shape = parameter_shape(stored[rule.target])
        shapes |= dict.fromkeys(rule.sources, rule.layout.foreign(shape[1:] if rule.stacked else shape))
    ordered = {name: shapes[name] for name in sorted(shapes, key=_natural)}
    return SafetensorsWriter(folder, ordered, dtype, file_bytes)


def _write_weights(
    folder: Path, part: _Part, model: StoredModel, stored: Stored, writer: SafetensorsWriter, verify: bool
) -> Iterator[int]:
    """Writes the tensors of a folder; yields the number of bytes of each write."""
    digests: dict[tuple[str, int, int], str] = {}

    def write(job: _Job) -> int:
        name, row, make = job
        rows = contiguous(make(), writer.dtype)
        writer.write(name, row, rows)
        if verify:
            digests[name, row, row + rows.shape[0]] = _digest(rows)
        return rows.nbytes

    with ThreadPoolExecutor(2) as pool:
        for rule in part.rules:
            low_rank = _low_rank(rule.target, model, stored)
            for first, array in _arrays(rule, stored):
                yield from pool.map(write, _jobs(rule, first, array, low_rank))
                del array  # free it before the next is read
    if verify:
        read = SafetensorsFolder(folder)
        for (name, start, stop), digest in digests.items():
            if _digest(read(name, start, stop)) != digest:
                raise UserError(
                    f"{folder}: {name} reads back as other bytes than were written; check the disk"
                )


def _arrays(rule: TensorRule, stored: Stored) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first layer, layers) of a stack, leaf by leaf; or (0, whole array) of another parameter."""
    ranges = stored[rule.target]
    if rule.stacked or len(ranges) == 1:
        yield from ((rows.start, rows.read()) for rows in ranges)
    else:
        yield 0, np.concatenate([rows.read() for rows in ranges])


def _jobs(rule: TensorRule, first: int, array: np.ndarray, low_rank: _LowRank | None) -> Iterator[_Job]:
    """Yields the jobs of an array; only the rows being written are held."""

    def layer(index: int) -> np.ndarray:
        kernel = array[index]
        if low_rank is not None:
            kernel = kernel.astype(np.float32) + low_rank(first + index)
        return rule.layout.write(kernel)[0]

    if rule.stacked:
        row = rule.layout.write(array[0])[1]
        for index in range(len(array)):
            yield rule.sources[first + index], row, functools.partial(layer, index)
        return
    rows, row = rule.layout.write(array)
    step = max(1, _BLOCK_BYTES // max(1, rows[0].nbytes))
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        yield rule.sources[0], row + start, functools.partial(rows.__getitem__, block)


def _low_rank(path: str, model: StoredModel, stored: Stored) -> _LowRank | None:
    """The LoRA update of a stack of kernels; None without LoRA."""
    factors = [f"{path.removesuffix('/kernel')}/lora_{name}" for name in "ab"]
    if factors[0] not in stored:
        return None
    a, b = (np.concatenate([rows.read() for rows in stored[name]]).astype(np.float32) for name in factors)
    scale = model.llm.lora_alpha / model.llm.lora_rank
    return lambda layer: scale * (a[layer] @ b[layer])


def _write_licences(source: PathLike, out: Path, parts: Sequence[_Part]) -> None:
    """Writes the licences of imported weights into the folders made from them."""
    file = as_path(source) / "provenance.json"
    imported = json.loads(read_bytes(file, _MAX_PROVENANCE)).get("parts", {}) if file.exists() else {}
    by_folder = {folder: imported.get(component) for component, folder in PARTS.items()}
    by_folder["."] = next(iter(imported.values()), None)
    for part in parts:
        licence = (by_folder[part.folder] or {}).get("licence", {})
        if licence.get("name") in LICENCE_FILES:
            (out / part.folder / licence["name"]).write_text(licence["text"])


def _natural(name: str) -> list[Any]:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.reshape(-1).view(np.uint8).data).hexdigest()


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    write_text_atomic(file, json.dumps(value, indent=2, sort_keys=True) + "\n")
