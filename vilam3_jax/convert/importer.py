"""Imports a foreign checkpoint into an export folder.

Memory: one stored leaf in its final dtype (see `exports`) and a few blocks of the source.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from vilam3_jax.checkpoints.exports import (
    Abstract,
    Flat,
    Leaf,
    assemble,
    host_sharding,
    stored_leaves,
    write_export,
)
from vilam3_jax.convert.gguf import open_gguf
from vilam3_jax.convert.huggingface import open_folder, open_siglip_pair
from vilam3_jax.convert.safetensors_files import copy_into, read_config
from vilam3_jax.convert.source_checks import check_folder, check_weights, listed, refuse_file
from vilam3_jax.convert.sources import Checkpoint, Source
from vilam3_jax.convert.torch_files import with_safetensors
from vilam3_jax.convert.vila import PARTS, open_vila
from vilam3_jax.data.tokenizer import Tokenizer, load_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.models import families
from vilam3_jax.models.hugging_face import Index, TensorRule
from vilam3_jax.runtime.paths import PathLike, as_path, read_bytes

OPENERS: dict[str, Callable[[Path], Source | Checkpoint]] = {
    "gguf": open_gguf,
    "hugging_face": open_folder,
    "siglip_pair": open_siglip_pair,
}
FORMATS = (*OPENERS, "vila")
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
_NAMES_SHOWN = 12

_READERS = 2
_BLOCK_BYTES = 64 << 20  # read at a time by each reader
_ALIGNMENT = 64
# Files beside `tokenizer.json` that other tools read; VILA-1.5 reads tokenizer.model.
_TOKENIZER_EXTRAS = ("tokenizer.model", "special_tokens_map.json", "added_tokens.json")
_MAX_EXTRA = 64 << 20

Progress = Callable[[int, int], None]  # (bytes written, bytes in all)


def silent(written: int, total: int) -> None:
    """Reports no progress."""


@dataclass(frozen=True)
class ImportSummary:
    """Result of an import.

    Attributes:
      component: 'llm' or 'vision_tower'; 'generative' or 'contrastive' for a whole model.
      tensors: number of tensors read.
      parameters: number of scalars written.
      bytes: size of the parameters.
      dtype: dtype of the parameters.
      seconds: wall time.
      dtypes: storage types of the source.
      unused: tensor name → reason why it was not imported.
      tokenizer: whether a tokenizer was written.
    """

    component: str
    tensors: int
    parameters: int
    bytes: int
    dtype: str
    seconds: float
    dtypes: tuple[str, ...]
    unused: dict[str, str]
    tokenizer: bool


def detect_format(source: Path) -> str:
    """The format of a GGUF file or model folder, one of `FORMATS`.

    Raises:
      UserError: it cannot be imported.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; check --source")
    if source.is_file():
        with source.open("rb") as handle:
            if handle.read(4) == b"GGUF":
                return "gguf"
        raise refuse_file(source)
    if (source / "config.json").exists():
        if any((source / name).is_dir() for name in PARTS.values()):
            return "vila"
        model_type = read_config(source / "config.json").get("model_type")
        return "siglip_pair" if model_type == "siglip" else "hugging_face"
    if list(source.glob("*.gguf")):
        return "gguf"
    raise UserError(f"{source}: holds neither config.json nor a .gguf file; check --source")


def open_source(
    source: PathLike, source_format: str = "auto", tokenizer: Tokenizer | None = None
) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    Args:
      source: GGUF file, folder with one GGUF file, or Hugging Face model folder; on a local disk.
      source_format: one of `FORMATS`, or 'auto'.
      tokenizer: replaces the source's.

    Raises:
      UserError: missing, damaged, or an architecture that is not supported.
    """
    if "://" in str(source):
        raise UserError(f"{source}: weights are read in place; copy them to a local disk first")
    path = Path(as_path(source))
    if path.is_dir():
        check_folder(path)
    chosen = detect_format(path) if source_format == "auto" else source_format
    if chosen not in FORMATS:
        raise UserError(f"--format {chosen}: unknown; choose from auto, {', '.join(FORMATS)}")
    if chosen == "gguf" and path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise UserError(f"{path}: holds {len(files)} .gguf files; give one of them as --source")
        path = files[0]
    elif chosen != "gguf" and not path.is_dir():
        raise UserError(f"{path}: --format {chosen} needs a model folder")
    for part in {"gguf": (), "vila": PARTS.values()}.get(chosen, (".",)):
        check_weights(path / part)
    opened = open_vila(path, tokenizer) if chosen == "vila" else OPENERS[chosen](path)
    return opened if isinstance(opened, Checkpoint) else Checkpoint.of(opened)


def target_shapes(kind: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Path → shape of every parameter of our model.

    Args:
      kind: 'generative', 'contrastive', 'llm' or 'vision_tower'.
      config: the `model` section, or the part of it that this kind needs.
    """
    from flax import nnx

    from vilam3_jax.models import build, param_paths
    from vilam3_jax.runtime import compat

    if kind in build.MODELS:
        shapes = build.abstract_model({**config, "param_dtype": "float32"}, kind)[1]
        return {path: tuple(leaf.shape) for path, leaf in param_paths.flatten(shapes).items()}
    section = families.config_of(kind, config[kind])
    module = families.get(kind, str(section.get("type"))).module
    settings = dict(dtype="float32", param_dtype="float32", remat="none")
    model = nnx.eval_shape(lambda: module(section, rngs=nnx.Rngs(0), **settings))
    _, shapes = compat.split(model)
    return {f"{kind}/{path}": tuple(leaf.shape) for path, leaf in param_paths.flatten(shapes).items()}


def check_rules(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Checks, without reading weights, that tensors and parameters match one to one.

    Returns:
      Path → shape of every parameter.

    Raises:
      UserError: a tensor is neither used nor listed as unused, a parameter has no source, or a shape differs.
    """
    expected = target_shapes(checkpoint.kind, checkpoint.config)
    for part in checkpoint.parts:
        single = len(checkpoint.parts) == 1
        _check_coverage(part, {path for path in expected if single or path.split("/")[0] == part.component})
        for rule in part.rules:
            needed = expected[rule.target][1:] if rule.stacked else expected[rule.target]
            for name in rule.sources:
                if rule.layout.ours(part.tensors[name]) != needed:
                    raise UserError(
                        f"{part.files[-1]}: {name} is {part.tensors[name]}, which does not give the {needed} "
                        f"of {rule.target}; config and weights are of different models"
                    )
    return expected


def read_leaf(part: Source, rule: TensorRule, leaf: Leaf) -> jax.Array:
    """Reads a stored leaf into host memory, sharded over processes.

    Raises:
      UserError: a value is not finite in the dtype of `leaf`.
    """
    sharding = leaf_sharding(rule, leaf)
    blocks = [
        # The array aliases the block, which avoids a copy.
        jax.device_put(_read_part(part, rule, leaf, index or ()), device, may_alias=True)
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, blocks)


def _read_part(part: Source, rule: TensorRule, leaf: Leaf, index: Index) -> np.ndarray:
    """Reads `leaf[index]`."""
    where = tuple(slice(*axis.indices(size)[:2]) for axis, size in zip(index, leaf.shape, strict=True))
    block = _aligned([axis.stop - axis.start for axis in where], leaf.dtype)
    with _cancelled_on_error(ThreadPoolExecutor(_READERS)) as pool:
        for _ in pool.map(lambda job: _read_block(part, rule, *job), _jobs(part, rule, leaf, where, block)):
            pass
    return block


def leaf_sharding(rule: TensorRule, leaf: Leaf) -> jax.sharding.Sharding:
    """Sharding over processes, along the axis of the source's rows if divisible."""
    rows = rule.layout.axes.index(0) if rule.layout.axes else 0
    return host_sharding(leaf.shape, (0, 1 + rows) if rule.stacked else (rows,) * bool(leaf.shape))


def _jobs(
    part: Source, rule: TensorRule, leaf: Leaf, where: Index, block: np.ndarray
) -> Iterator[tuple[str, Index, np.ndarray]]:
    """Yields (tensor name, index in our layout, view of `block` to fill)."""
    if not leaf.shape:
        yield rule.sources[0], (), block
        return
    first = slice(leaf.start + where[0].start, leaf.start + where[0].stop)
    if not rule.stacked:
        yield from _cut(part, rule, rule.sources[0], (first, *where[1:]), block)
        return
    for row in range(first.start, first.stop):
        yield from _cut(part, rule, rule.sources[row], where[1:], block[row - first.start])


def _cut(
    part: Source, rule: TensorRule, name: str, where: Index, out: np.ndarray
) -> Iterator[tuple[str, Index, np.ndarray]]:
    """Splits a tensor into blocks of foreign rows of at most `_BLOCK_BYTES`."""
    axis = rule.layout.axes.index(0) if rule.layout.axes else 0
    shape = part.tensors[name]
    rows = shape[0] if rule.layout.leading else max(1, _BLOCK_BYTES // (8 * math.prod(shape[1:])))
    wanted = where[axis]
    for start in range(wanted.start, wanted.stop, rows):
        piece = slice(start, min(start + rows, wanted.stop))
        inside = (*(slice(None),) * axis, slice(piece.start - wanted.start, piece.stop - wanted.start))
        yield name, (*where[:axis], piece, *where[axis + 1 :]), out[inside]


def _read_block(part: Source, rule: TensorRule, name: str, where: Index, out: np.ndarray) -> None:
    shape = rule.layout.ours(part.tensors[name])
    assert shape is not None  # see `check_rules`
    copy_into(out, rule.layout.read(functools.partial(part.reader, name), shape, where))
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(out).all()
    if not finite:
        raise UserError(
            f"{part.files[-1]}: {name} holds values that are not finite as {out.dtype}; "
            "the file is damaged, download it again"
        )


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An empty array at an address that XLA can alias."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class ForeignModel:
    """An opened source, and the model that it becomes.

    Attributes:
      checkpoint: the source.
      config: model config with `kind`, as an export has it.
      tokenizer: without the ids that the model has no embeddings for; None if there is none.
      shapes: path → ShapeDtypeStruct of every parameter.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    tokenizer: Tokenizer | None
    shapes: Abstract

    @functools.cached_property
    def rules(self) -> dict[str, tuple[Source, TensorRule]]:
        """Path → the part that holds the parameter, and where."""
        return {rule.target: (part, rule) for part in self.checkpoint.parts for rule in part.rules}

    def read(self, wanted: Abstract) -> Flat:
        """Reads parameters straight onto their devices; every process reads its own blocks.

        Args:
          wanted: path → ShapeDtypeStruct with sharding; dtypes are converted.

        Raises:
          UserError: a value is not finite.
        """
        found = {}
        for path, parameter in wanted.items():
            read = functools.partial(_read_onto, *self.rules[path])
            ranges = stored_leaves({path: parameter})
            whole = len(ranges) == 1
            found[path] = read(ranges[0], parameter) if whole else assemble(parameter, ranges, read)
        return found


def _read_onto(part: Source, rule: TensorRule, leaf: Leaf, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    """Reads a leaf onto the sharding of `wanted`."""
    assert wanted.sharding is not None
    read = functools.partial(_read_part, part, rule, leaf)
    return jax.make_array_from_callback(leaf.shape, wanted.sharding, lambda index: read(index or ()))


def open_foreign(
    source: PathLike,
    *,
    source_format: str = "auto",
    dtype: str = "auto",
    tokenizer: PathLike | None = None,
) -> ForeignModel:
    """Opens a checkpoint and checks that it fits our model, without reading its weights.

    Args:
      source, source_format, dtype, tokenizer: see `import_model`.

    Raises:
      UserError: bad source.
    """
    check_dtype(dtype)
    found = load_tokenizer(tokenizer) if tokenizer else None
    opened = open_source(source, source_format, found)
    found = found or (opened.tokenizer() if opened.tokenizer else None)
    text_model = opened.config.get("llm") or opened.config.get("text_tower")
    if found is not None and text_model is not None and found.vocab_size > text_model["vocab_size"]:
        try:
            found = found.limited_to(text_model["vocab_size"])
        except UserError as error:
            raise UserError(f"{tokenizer or source}: {error}") from error
    shapes = check_rules(opened)
    if dtype == "auto":
        dtype = "bfloat16" if opened.dtypes == ("BF16",) else "float32"
    name = Path(as_path(source)).name.removesuffix(".gguf")
    return ForeignModel(
        opened,
        {"name": name, "kind": opened.kind, "param_dtype": dtype, **opened.config},
        found,
        {path: jax.ShapeDtypeStruct(shape, DTYPES[dtype]) for path, shape in shapes.items()},
    )


def import_model(
    source: PathLike,
    out: PathLike,
    *,
    source_format: str = "auto",
    dtype: str = "auto",
    tokenizer: PathLike | None = None,
    torch_files: bool = False,
    verify: bool = True,
    progress: Progress = silent,
) -> ImportSummary:
    """Imports a checkpoint into a new export folder, atomically.

    Holds one stored leaf at a time (at most 1.2 GB, see `exports`). Repeating the call after an interruption
    resumes the import.

    Args:
      source: see `open_source`.
      out: folder to create; must be absent or empty.
      source_format: see `open_source`.
      dtype: a key of `DTYPES`, or 'auto': bfloat16 if all of the source is, else float32.
      tokenizer: Hugging Face tokenizer folder that replaces the source's.
      torch_files: read weights pickled by PyTorch, in another process; see `torch_files`.
      verify: hash the source's files and every leaf, and read the leaves back at the end.
      progress: called after each leaf.

    Raises:
      UserError: bad source, `out` in use, or disk full.
    """
    target = unused_folder(out)
    check_dtype(dtype)
    if torch_files:
        # Next to the result, where the disk has room for the weights.
        parent = next(folder for folder in (Path(target), *Path(target).parents) if folder.is_dir())
        with tempfile.TemporaryDirectory(dir=parent, prefix=".torch_files.") as scratch:
            mirror = with_safetensors(Path(as_path(source)), Path(scratch))
            options: dict[str, Any] = dict(dtype=dtype, tokenizer=tokenizer, verify=verify, progress=progress)
            return import_model(mirror, target, source_format=source_format, **options)
    start = time.perf_counter()
    model = open_foreign(source, source_format=source_format, dtype=dtype, tokenizer=tokenizer)
    opened, rules, found = model.checkpoint, model.rules, model.tokenizer
    total = sum(leaf.bytes for leaf in stored_leaves(model.shapes))
    written = 0

    def make(leaf: Leaf) -> jax.Array:
        nonlocal written
        array = read_leaf(*rules[leaf.path], leaf)
        written += leaf.bytes
        progress(written, total)
        return array

    with tempfile.TemporaryDirectory() as folder, _cancelled_on_error(ThreadPoolExecutor(1)) as pool:
        files = [file for part in opened.parts for file in part.files]
        facts = {file: pool.submit(_file_facts, file, verify) for file in files}
        if found is not None:
            found.save(folder)
            if tokenizer_folder := tokenizer or opened.tokenizer_folder:
                copy_tokenizer_extras(tokenizer_folder, Path(folder))
        write_export(
            target,
            model.shapes,
            make,
            model.config,
            folder if found is not None else None,
            lambda: {"parts": {part.component: _provenance(part, facts) for part in opened.parts}},
            resume={
                "source": [[str(file), (s := file.stat()).st_size, s.st_mtime_ns] for file in files],
                "model": model.config,
                "tokenizer": str(tokenizer),
                "verify": verify,
            },
            verify=(lambda leaf: leaf_sharding(rules[leaf.path][1], leaf)) if verify else None,
        )
    return ImportSummary(
        component=opened.kind,
        tensors=len({(part.component, name) for part, rule in rules.values() for name in rule.sources}),
        parameters=sum(math.prod(leaf.shape) for leaf in model.shapes.values()),
        bytes=total,
        dtype=model.config["param_dtype"],
        seconds=time.perf_counter() - start,
        dtypes=opened.dtypes,
        unused={name: reason for part in opened.parts for name, reason in part.unused.items()},
        tokenizer=found is not None,
    )


@contextlib.contextmanager
def _cancelled_on_error(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Cancels pending jobs on an error."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def unused_folder(out: PathLike) -> epath.Path:
    """The path of a folder to create.

    Raises:
      UserError: it exists and is not empty.
    """
    target = as_path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already exists; choose another --out or remove it")
    return target


def check_dtype(name: str) -> None:
    """Raises UserError if --dtype is neither 'auto' nor a key of `DTYPES`."""
    if name != "auto" and name not in DTYPES:
        raise UserError(f"--dtype {name}: unknown; choose from auto, {', '.join(DTYPES)}")


def copy_tokenizer_extras(source: PathLike, out: Path) -> None:
    """Copies tokenizer files that this package does not read."""
    for name in _TOKENIZER_EXTRAS:
        if (as_path(source) / name).exists():
            (out / name).write_bytes(read_bytes(as_path(source) / name, _MAX_EXTRA))


def _file_facts(file: Path, verify: bool) -> dict[str, Any]:
    facts = {"file": file.name, "bytes": file.stat().st_size}
    if not verify:
        return facts
    with file.open("rb") as handle:
        return {**facts, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _provenance(part: Source, facts: Mapping[Path, Future[dict[str, Any]]]) -> dict[str, Any]:
    return {
        "source": [facts[file].result() for file in part.files],
        "storage": list(part.dtypes),
        "licence": part.licence,
        "unused_tensors": part.unused,
    }


def _check_coverage(source: Source, expected: Set[str]) -> None:
    wanted = {name for rule in source.rules for name in rule.sources}
    missing = wanted - set(source.tensors)
    empty = expected - {rule.target for rule in source.rules if missing.isdisjoint(rule.sources)}
    left_over = set(source.tensors) - wanted - set(source.unused)
    if empty or left_over or missing:
        names = [listed(sorted(group), _NAMES_SHOWN) or "none" for group in (empty, missing, left_over)]
        raise UserError(
            f"{source.files[-1]}: does not fit this package's {source.component}; parameters not filled: "
            f"{names[0]}; tensors missing: {names[1]}; tensors not used: {names[2]}"
        )
