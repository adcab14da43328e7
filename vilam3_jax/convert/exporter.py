"""Export folder → the folders that transformers and VILA read, written leaf by leaf."""

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
from vilam3_jax.convert.importer import DTYPES, Progress, carry, check_dtype, free_place, silent
from vilam3_jax.convert.safetensors_files import SafetensorsFolder, SafetensorsWriter, contiguous
from vilam3_jax.convert.vila import PARTS, vila_folder_config
from vilam3_jax.data.tokenizer import Tokenizer, load_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.models import families, projector, siglip
from vilam3_jax.models.hugging_face import TensorRule
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.runtime.paths import PathLike, as_path, read_bytes, write_text_atomic

_SECTIONS = {
    "llm": ("llm",),
    "vision_tower": ("vision_tower",),
    "contrastive": ("vision_tower", "text_tower"),
    "generative": ("vision_tower", "projector", "llm"),
}
FILE_BYTES = 5_000_000_000  # transformers' own default
_MAX_PROVENANCE = 64 << 20
_BLOCK_BYTES = 64 << 20

Stored = Mapping[str, Sequence[StoredRows]]
_Job = tuple[str, int, Callable[[], np.ndarray]]
_LowRank = Callable[[int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class ExportSummary:
    """What an export did.

    Attributes:
      folders: of Hugging Face's layout, relative to the result.
      tensors: written.
      bytes: of them.
      dtype: of them.
      merged: kernels into which a LoRA was merged.
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
    """One Hugging Face folder to be written."""

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
    """Writes an export as a VILA folder, or as one Hugging Face folder where it holds one component.

    LoRAs are merged into their kernels. Holds one stored leaf at a time. Complete or not at all.

    Args:
      source: export folder of a run or of an import.
      out: folder to create on a local disk; must not exist or be empty.
      dtype: a key of `DTYPES`, or 'auto': that of the export.
      verify: hash every tensor on its way out, read all files again at the end, and compare.
      file_bytes: a new safetensors file begins where this would be exceeded.
      progress: told of the bytes written so far, and of all bytes.

    Raises:
      UserError: `source` is no export, `out` is in use, or the disk is full.
    """
    start = time.perf_counter()
    if "://" in str(out):
        raise UserError(f"{out}: files are written in any order; give a folder on a local disk")
    target = Path(free_place(out))
    check_dtype(dtype)
    model = load_model_config(source)
    if missing := [key for key in _SECTIONS.get(model.kind, ()) if getattr(model, key) is None]:
        raise UserError(f"{source}: its model.json has no {missing[0]}; export the model again")
    dtype = model.param_dtype if dtype == "auto" else dtype
    tokenizer_folder = as_path(source) / "tokenizer"
    tokenizer = load_tokenizer(tokenizer_folder) if tokenizer_folder.exists() else None
    parts, root = _layout(source, model, tokenizer, dtype)
    stored = stored_rows(source)
    _check_coverage(source, parts, stored)

    temporary = target.parent / f".{target.name}.exporting"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        total = sum(math.prod(parameter_shape(stored[rule.target])) for part in parts for rule in part.rules)
        written = _Counter(total * np.dtype(DTYPES[dtype]).itemsize, progress)
        tensors = 0
        for part in parts:
            folder = temporary / part.folder
            folder.mkdir(parents=True)
            tensors += _write_part(folder, part, model, stored, DTYPES[dtype], file_bytes, verify, written)
        if root is not None:
            _write_json(temporary / "config.json", root)
        if tokenizer is not None:
            place = temporary / (PARTS["llm"] if root else ".")
            tokenizer.save(place)
            carry(tokenizer_folder, place)
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
        bytes=written.total,
        dtype=dtype,
        merged=sum(path.endswith("/lora_a") for path in stored),
        seconds=time.perf_counter() - start,
    )


def _layout(
    source: PathLike, model: StoredModel, tokenizer: Tokenizer | None, dtype: str
) -> tuple[list[_Part], dict[str, Any] | None]:
    """The folders to write, and the root's config if they are parts of a VILA folder."""
    if model.kind == "llm":
        return [_llm(".", model, tokenizer, dtype)], None
    if model.kind == "vision_tower":
        return [_vision_tower(".", model, dtype)], None
    if model.kind == "contrastive":
        tower = _vision_tower(".", model, dtype)
        assert model.text_tower is not None
        rules = [*tower.rules, *siglip.text_tensors(model.text_tower)]
        config = siglip.write_pair_config(model.vision_tower, model.text_tower, dtype)
        return [_Part(".", rules, config, tower.preprocessor)], None
    if model.kind != "generative":
        raise UserError(f"{source}: an export of unknown kind {model.kind!r}; export the model again")
    parts = [
        _vision_tower(PARTS["vision_tower"], model, dtype),
        _projector(PARTS["projector"], model, dtype),
        _llm(PARTS["llm"], model, tokenizer, dtype),
    ]
    return parts, vila_folder_config(model, dtype, {part.folder: part.config for part in parts})


def _llm(folder: str, model: ModelConfig, tokenizer: Tokenizer | None, dtype: str) -> _Part:
    layout = families.get("llm", model.llm.type).hugging_face
    return _Part(folder, layout.tensors(model.llm), llm_folder_config(model.llm, tokenizer, dtype))


def _vision_tower(folder: str, model: ModelConfig, dtype: str) -> _Part:
    tower = model.vision_tower
    layout = families.get("vision_tower", tower.type).hugging_face
    rules = [
        dataclasses.replace(rule, sources=tuple(layout.prefix + name for name in rule.sources))
        for rule in layout.tensors(tower)
    ]
    preprocessor = layout.preprocessor(tower) if layout.preprocessor else None
    return _Part(folder, rules, layout.write_config(tower, dtype), preprocessor)


def _projector(folder: str, model: ModelConfig, dtype: str) -> _Part:
    assert model.projector is not None
    kind = model.projector.type
    layers = projector.layers_of(kind, model.projector_width, model.llm.hidden_size)
    config = {
        "architectures": ["MultimodalProjector"],
        "model_type": "v2l_projector",
        "mm_projector_type": kind,
        "torch_dtype": dtype,
    }
    return _Part(folder, projector.tensors(kind, layers), config)


def _check_coverage(source: PathLike, parts: Sequence[_Part], stored: Stored) -> None:
    wanted = {rule.target for part in parts for rule in part.rules}
    found = {path for path in stored if not path.endswith(("/lora_a", "/lora_b"))}
    if wanted != found:
        raise UserError(
            f"{source}: does not fit its model.json; parameters missing: {sorted(wanted - found)[:12]}; "
            f"parameters not exported: {sorted(found - wanted)[:12]}; export the model again"
        )


class _Counter:
    def __init__(self, total: int, progress: Progress) -> None:
        self.total = total
        self._done = 0
        self._progress = progress

    def add(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self.total)


def _write_part(
    folder: Path,
    part: _Part,
    model: ModelConfig,
    stored: Stored,
    dtype: Any,
    file_bytes: int,
    verify: bool,
    written: _Counter,
) -> int:
    """Writes weights and configs of one folder; returns the number of tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    for rule in part.rules:
        shape = parameter_shape(stored[rule.target])
        for name in rule.sources:
            shapes[name] = rule.layout.foreign(shape[1:] if rule.stacked else shape)
    writer = SafetensorsWriter(
        folder, {name: shapes[name] for name in sorted(shapes, key=_natural)}, dtype, file_bytes
    )
    digests: dict[tuple[str, int, int], str] = {}

    def write(job: _Job) -> int:
        name, row, make = job
        rows = contiguous(make(), dtype)
        writer.write(name, row, rows)
        if verify:
            digests[name, row, row + rows.shape[0]] = _digest(rows)
        return rows.nbytes

    with ThreadPoolExecutor(2) as pool:
        for rule in part.rules:
            low_rank = _low_rank(rule.target, model, stored)
            for first, array in _arrays(rule, stored):
                for count in pool.map(write, _jobs(rule, first, array, low_rank)):
                    written.add(count)
                del array  # before the next is read
    if verify:
        read = SafetensorsFolder(folder)
        for (name, start, stop), digest in digests.items():
            if _digest(read(name, start, stop)) != digest:
                raise UserError(
                    f"{folder}: {name} reads back as other bytes than were written; check the disk"
                )
    _write_json(folder / "config.json", part.config)
    if part.preprocessor is not None:
        _write_json(folder / "preprocessor_config.json", part.preprocessor)
    return len(shapes)


def _arrays(rule: TensorRule, stored: Stored) -> Iterator[tuple[int, np.ndarray]]:
    """Yields first layer and layers of a stack, leaf by leaf; or 0 and the one array of another parameter."""
    ranges = stored[rule.target]
    if rule.stacked:
        for rows in ranges:
            yield rows.start, rows.read()
    else:
        yield 0, np.concatenate([rows.read() for rows in ranges]) if len(ranges) > 1 else ranges[0].read()


def _jobs(rule: TensorRule, first: int, array: np.ndarray, low_rank: _LowRank | None) -> Iterator[_Job]:
    """Yields tensor name, first row, and what makes the rows: no more is held than is being written."""

    def layer(index: int) -> np.ndarray:
        kernel = array[index]
        if low_rank is not None:
            kernel = kernel.astype(np.float32) + low_rank(first + index)
        return rule.layout.write(kernel)[0]

    if not rule.stacked:
        rows, row = rule.layout.write(array)
        step = max(1, _BLOCK_BYTES // max(1, rows[0].nbytes))
        for start in range(0, len(rows), step):
            yield (
                rule.sources[0],
                row + start,
                functools.partial(rows.__getitem__, slice(start, start + step)),
            )
        return
    row = rule.layout.write(array[0])[1]
    for index in range(len(array)):
        yield rule.sources[first + index], row, functools.partial(layer, index)


def _low_rank(path: str, model: ModelConfig, stored: Stored) -> _LowRank | None:
    """What the LoRA of a stack of kernels adds to layer i, in float32; None if it has none."""
    stem = path.removesuffix("/kernel")
    if f"{stem}/lora_a" not in stored:
        return None
    a, b = (
        np.concatenate([rows.read() for rows in stored[f"{stem}/lora_{name}"]]).astype(np.float32)
        for name in "ab"
    )
    scale = model.llm.lora_alpha / model.llm.lora_rank
    return lambda layer: scale * (a[layer] @ b[layer])


def _write_licences(source: PathLike, out: Path, parts: Sequence[_Part]) -> None:
    """Puts the licences that came with imported weights beside what is made of them."""
    file = as_path(source) / "provenance.json"
    said = json.loads(read_bytes(file, _MAX_PROVENANCE)) if file.exists() else {}
    components = {folder: component for component, folder in PARTS.items()}
    for part in parts:
        found = said.get("parts", {})
        own = (
            found.get(components[part.folder])
            if part.folder in components
            else next(iter(found.values()), {})
        )
        licence = (own or {}).get("licence", {})
        if licence.get("name") in LICENCE_FILES:
            (out / part.folder / licence["name"]).write_text(licence["text"])


def _natural(name: str) -> list[Any]:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.reshape(-1).view(np.uint8).data).hexdigest()


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    write_text_atomic(file, json.dumps(value, indent=2, sort_keys=True) + "\n")
