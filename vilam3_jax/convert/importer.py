"""Foreign checkpoint → export folder: which format it is, filling every parameter, writing.

Memory: one stored leaf in its final dtype (see `exports`) and a few blocks of the source.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from vilam3_jax.checkpoints.exports import Leaf, host_sharding, stored_leaves, write_export
from vilam3_jax.convert.gguf import open_gguf
from vilam3_jax.convert.huggingface import open_folder, open_siglip_pair
from vilam3_jax.convert.safetensors_files import copy_into, read_config
from vilam3_jax.convert.source_checks import check_folder, check_weights, refuse_file
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
_BLOCK_BYTES = 64 << 20  # read at a time by each of them
_ALIGNMENT = 64
_CARRIED = ("tokenizer.model", "special_tokens_map.json", "added_tokens.json")
_MAX_CARRIED = 64 << 20

Progress = Callable[[int, int], None]


def silent(written: int, total: int) -> None:
    """Reports to nobody."""


@dataclass(frozen=True)
class ImportSummary:
    """What an import did.

    Attributes:
      component: 'llm' or 'vision_tower'; 'generative' or 'contrastive' for a whole model.
      tensors: tensors read from the source.
      parameters: numbers in the result.
      bytes: size of the result.
      dtype: of the result.
      seconds: wall time.
      dtypes: storage types of the source.
      unused: tensors left out, with the reason.
      tokenizer: a tokenizer was written.
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
    """Tells a source's format from its content.

    Args:
      source: GGUF file or model folder.

    Returns:
      A key of `FORMATS`.

    Raises:
      UserError: nothing that can be imported.
    """
    if not source.exists():
        raise UserError(f"{source}: no such file or folder; check --source")
    if source.is_file():
        with source.open("rb") as handle:
            magic = handle.read(4)
        if magic == b"GGUF":
            return "gguf"
        raise refuse_file(source)
    if (source / "config.json").exists():
        if any((source / name).is_dir() for name in PARTS.values()):
            return "vila"
        model_type = read_config(source / "config.json").get("model_type")
        return "siglip_pair" if model_type == "siglip" else "hugging_face"
    if list(source.glob("*.gguf")):
        return "gguf"
    raise UserError(f"{source}: neither config.json nor a .gguf file is here; check --source")


def open_source(
    source: PathLike, source_format: str = "auto", tokenizer: Tokenizer | None = None
) -> Checkpoint:
    """Opens a checkpoint without reading its weights.

    Args:
      source: GGUF file, folder with one GGUF file, or Hugging Face model folder; on a local disk.
      source_format: a key of `FORMATS`, or 'auto'.
      tokenizer: used instead of the source's own.

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
    if chosen == "gguf":
        path = _single_gguf(path)
    elif not path.is_dir():
        raise UserError(f"{path}: --format {chosen} needs a model folder")
    for part in {"gguf": (), "vila": PARTS.values()}.get(chosen, (".",)):
        check_weights(path / part)
    opened = open_vila(path, tokenizer) if chosen == "vila" else OPENERS[chosen](path)
    return opened if isinstance(opened, Checkpoint) else Checkpoint.of(opened)


def target_shapes(kind: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Path → shape of every parameter that this package's model has.

    Args:
      kind: 'generative', 'contrastive', 'llm' or 'vision_tower'.
      config: the `model` section, or as much of it as this kind needs.
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
    """Checks, before anything is read, that every parameter is filled and every tensor used or excused.

    Returns:
      Path → shape of every parameter.

    Raises:
      UserError: a tensor is left over, a parameter is left empty, or a shape differs.
    """
    expected = target_shapes(checkpoint.kind, checkpoint.config)
    for part in checkpoint.parts:
        alone = len(checkpoint.parts) == 1
        own = {path for path in expected if alone or path.split("/")[0] == part.component}
        _check_coverage(part, own)
        for rule in part.rules:
            needed = expected[rule.target][1:] if rule.stacked else expected[rule.target]
            for name in rule.sources:
                if rule.layout.ours(part.tensors[name]) != needed:
                    raise UserError(
                        f"{part.files[-1]}: {name} is {part.tensors[name]}, which does not give the {needed} "
                        f"of {rule.target}; config and weights are of different models"
                    )
    return expected


def fill(checkpoint: Checkpoint, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Reads every parameter of the target model into memory: path → array.

    Raises:
      UserError: see `check_rules` and `read_leaf`.
    """
    rules = {rule.target: (part, rule) for part in checkpoint.parts for rule in part.rules}
    return {
        path: np.asarray(read_leaf(*rules[path], Leaf(path, path, 0, shape, dtype)))
        for path, shape in check_rules(checkpoint).items()
    }


def read_leaf(part: Source, rule: TensorRule, leaf: Leaf) -> jax.Array:
    """Reads a stored leaf onto the hosts' memory, each process its own share of it.

    Raises:
      UserError: a value is not finite in the dtype of `leaf`.
    """
    sharding = leaf_sharding(rule, leaf)
    blocks = []
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        where = tuple(
            slice(*axis.indices(size)[:2]) for axis, size in zip(index or (), leaf.shape, strict=True)
        )
        block = _aligned([axis.stop - axis.start for axis in where], leaf.dtype)
        with _cancelled_on_error(ThreadPoolExecutor(_READERS)) as pool:
            for _ in pool.map(
                lambda job: _read_block(part, rule, *job), _jobs(part, rule, leaf, where, block)
            ):
                pass
        # The memory of `block` becomes that of the array: nothing is held twice.
        blocks.append(jax.device_put(block, device, may_alias=True))
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, blocks)


def leaf_sharding(rule: TensorRule, leaf: Leaf) -> jax.sharding.Sharding:
    """Over processes so that each reads its own rows of the source, where they divide."""
    rows = rule.layout.axes.index(0) if rule.layout.axes else 0
    return host_sharding(leaf.shape, (0, 1 + rows) if rule.stacked else (rows,) * bool(leaf.shape))


def _jobs(
    part: Source, rule: TensorRule, leaf: Leaf, where: Index, block: np.ndarray
) -> Iterator[tuple[str, Index, np.ndarray]]:
    """Yields tensor name, what is wanted of it (in our layout), and the place for it in `block`."""
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
    part: Source, rule: TensorRule, name: str, where: Index, place: np.ndarray
) -> Iterator[tuple[str, Index, np.ndarray]]:
    """Cuts a tensor into blocks of foreign rows of at most `_BLOCK_BYTES`."""
    axis = rule.layout.axes.index(0) if rule.layout.axes else 0
    shape = part.tensors[name]
    rows = shape[0] if rule.layout.leading else max(1, _BLOCK_BYTES // (8 * math.prod(shape[1:])))
    wanted = where[axis]
    for start in range(wanted.start, wanted.stop, rows):
        piece = slice(start, min(start + rows, wanted.stop))
        inside = (*(slice(None),) * axis, slice(piece.start - wanted.start, piece.stop - wanted.start))
        yield name, (*where[:axis], piece, *where[axis + 1 :]), place[inside]


def _read_block(part: Source, rule: TensorRule, name: str, where: Index, place: np.ndarray) -> None:
    shape = rule.layout.ours(part.tensors[name])
    assert shape is not None  # `check_rules` saw to it
    copy_into(place, rule.layout.read(functools.partial(part.reader, name), shape, where))
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(place).all()
    if not finite:
        raise UserError(
            f"{part.files[-1]}: {name} holds values that are not finite as {place.dtype}; "
            "the file is damaged, download it again"
        )


def _aligned(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array at an address that XLA can use without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


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
    """Imports a checkpoint into a new export folder, complete or not at all.

    Holds one stored leaf at a time (at most 1.2 GB, see `exports`). An interrupted import goes on where it
    was when it is called again in the same way.

    Args:
      source: see `open_source`.
      out: folder to create; must not exist or be empty.
      source_format: see `open_source`.
      dtype: a key of `DTYPES`, or 'auto': bfloat16 where all of the source is, else float32.
      tokenizer: Hugging Face tokenizer folder to use instead of the one in the source.
      torch_files: read weights pickled by PyTorch, in another process; see `torch_files`.
      verify: hash the source's files and every leaf, and read the leaves again at the end.
      progress: told of the bytes written so far, and of all bytes.

    Raises:
      UserError: bad source, `out` in use, or disk full.
    """
    target = free_place(out)
    check_dtype(dtype)
    if torch_files:
        # Beside the result, where there is room for the weights.
        with tempfile.TemporaryDirectory(dir=_nearest(Path(target)), prefix=".torch_files.") as scratch:
            mirror = with_safetensors(Path(as_path(source)), Path(scratch))
            options: dict[str, Any] = dict(dtype=dtype, tokenizer=tokenizer, verify=verify, progress=progress)
            return import_model(mirror, target, source_format=source_format, **options)
    start = time.perf_counter()
    words = load_tokenizer(tokenizer) if tokenizer else None
    opened = open_source(source, source_format, words)
    words = words or (opened.tokenizer() if opened.tokenizer else None)
    reader = opened.config.get("llm") or opened.config.get("text_tower")
    if words is not None and reader is not None and words.vocab_size > reader["vocab_size"]:
        try:
            words = words.limited_to(reader["vocab_size"])
        except UserError as error:
            raise UserError(f"{tokenizer or source}: {error}") from error
    shapes = check_rules(opened)
    stored = sorted({dtype for part in opened.parts for dtype in part.dtypes})
    if dtype == "auto":
        dtype = "bfloat16" if stored == ["BF16"] else "float32"
    abstract = {path: jax.ShapeDtypeStruct(shape, DTYPES[dtype]) for path, shape in shapes.items()}
    name = Path(as_path(source)).name
    model_config = {
        "name": name.removesuffix(".gguf"),
        "kind": opened.kind,
        "param_dtype": dtype,
        **opened.config,
    }
    rules = {rule.target: (part, rule) for part in opened.parts for rule in part.rules}
    total = sum(leaf.bytes for leaf in stored_leaves(abstract))
    written = 0

    def make(leaf: Leaf) -> jax.Array:
        nonlocal written
        array = read_leaf(*rules[leaf.path], leaf)
        written += leaf.bytes
        progress(written, total)
        return array

    with tempfile.TemporaryDirectory() as folder, _cancelled_on_error(ThreadPoolExecutor(1)) as pool:
        files = [file for part in opened.parts for file in part.files]
        facts = [pool.submit(_file_facts, file, verify) for file in files]
        if words is not None:
            words.save(folder)
            if came_from := tokenizer or opened.tokenizer_folder:
                carry(came_from, Path(folder))
        write_export(
            target,
            abstract,
            make,
            model_config,
            folder if words is not None else None,
            lambda: {"parts": _provenance(opened.parts, [fact.result() for fact in facts])},
            resume={
                "source": _stamps(opened.parts),
                "model": model_config,
                "tokenizer": str(tokenizer),
                "verify": verify,
            },
            verify=(lambda leaf: leaf_sharding(rules[leaf.path][1], leaf)) if verify else None,
        )
    return ImportSummary(
        component=opened.kind,
        tensors=len({(part.component, name) for part, rule in rules.values() for name in rule.sources}),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        bytes=total,
        dtype=dtype,
        seconds=time.perf_counter() - start,
        dtypes=tuple(stored),
        unused={name: reason for part in opened.parts for name, reason in part.unused.items()},
        tokenizer=words is not None,
    )


def _nearest(folder: Path) -> Path:
    """The first of a folder and its parents that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


@contextlib.contextmanager
def _cancelled_on_error(pool: ThreadPoolExecutor) -> Iterator[ThreadPoolExecutor]:
    """Who waits for an error message should not wait for the hashes of files."""
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def free_place(out: PathLike) -> epath.Path:
    """Where a conversion may write.

    Raises:
      UserError: something is there.
    """
    target = as_path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already exists; choose another --out or remove it")
    return target


def check_dtype(name: str) -> None:
    """Raises UserError if --dtype is neither 'auto' nor a key of `DTYPES`."""
    if name != "auto" and name not in DTYPES:
        raise UserError(f"--dtype {name}: unknown; choose from auto, {', '.join(DTYPES)}")


def carry(source: PathLike, out: Path) -> None:
    """Takes along what other tools read of a tokenizer beside `tokenizer.json` (VILA-1.5 the slow one)."""
    for name in _CARRIED:
        if (as_path(source) / name).exists():
            (out / name).write_bytes(read_bytes(as_path(source) / name, _MAX_CARRIED))


def _stamps(parts: Sequence[Source]) -> list[list[Any]]:
    """Tells whether the source's files are still those of an interrupted import."""
    found = []
    for file in (file for part in parts for file in part.files):
        status = file.stat()
        found.append([str(file), status.st_size, status.st_mtime_ns])
    return found


def _file_facts(file: Path, verify: bool) -> dict[str, Any]:
    known = {"file": file.name, "bytes": file.stat().st_size}
    return {**known, "sha256": sha256(file)} if verify else known


def _provenance(parts: Sequence[Source], facts: list[dict[str, Any]]) -> dict[str, Any]:
    left = iter(facts)
    return {
        part.component: {
            "source": list(itertools.islice(left, len(part.files))),
            "storage": list(part.dtypes),
            "licence": part.licence,
            "unused_tensors": part.unused,
        }
        for part in parts
    }


def sha256(path: Path) -> str:
    """Returns the hash of a file as hex, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check_coverage(source: Source, expected: Set[str]) -> None:
    wanted = {name for rule in source.rules for name in rule.sources}
    missing = wanted - set(source.tensors)
    made = {rule.target for rule in source.rules if missing.isdisjoint(rule.sources)}
    empty = expected - made
    left_over = set(source.tensors) - wanted - set(source.unused)
    if empty or left_over or missing:
        raise UserError(
            f"{source.files[-1]}: does not fit this package's {source.component}; parameters not filled: "
            f"{_names(empty)}; tensors missing: {_names(missing)}; tensors not used: {_names(left_over)}"
        )


def _names(names: Set[str]) -> str:
    # A damaged file may name its tensors with line breaks or terminal codes.
    shown = [name if name.isprintable() else repr(name) for name in sorted(names)[:_NAMES_SHOWN]]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return (", ".join(shown) or "none") + more


def _single_gguf(path: Path) -> Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{path}: holds {len(files)} .gguf files; give one of them as --source")
    return files[0]
