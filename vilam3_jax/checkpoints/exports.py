"""Exports of models: parameters, config and tokenizer in one folder, which `vilam3_jax.load(path)` opens.

`params/00000`, `params/00001`, ... are Orbax checkpoints, each a flat dict of stored leaves. A parameter of
more than 1.2 GB is cut along its first axis into leaves `path@row`, so that no host needs to hold it whole.
Orbax's `MemoryOptions` do not replace this: they bound memory besides the tree that is saved, and an import
never has the tree.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from vilam3_jax.checkpoints.run_checkpoints import (
    first_line,
    loading_a_part,
    saving_uncompressed,
    versions,
)
from vilam3_jax.errors import UserError, listed
from vilam3_jax.models import build, param_paths
from vilam3_jax.models.model_config import DTYPES, ModelConfig
from vilam3_jax.ops import quantized, quantized_loading
from vilam3_jax.ops.quantized import QuantizedKernel
from vilam3_jax.runtime import locks, paths, processes
from vilam3_jax.runtime.settings import from_mapping
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.sharding import weights

LOADED_DTYPES = (*DTYPES, "int8")  # of `load_export`
EXPORT_FILES = ("model.json", "params")
# Orbax keeps two copies of what it reads; 1.2 GB keep a host below 1.5 leaves and a gigabyte.
LEAF_BYTES = 1_200_000_000
# Leaves are saved together up to this size, or that of the largest leaf.
_PART_BYTES = 1 << 29
_MAX_JSON = 64 << 20
_COLLECTED_BYTES = 1 << 24

Flat = dict[str, jax.Array]
Abstract = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One stored array: a parameter, or the range of its rows from `start`; `key` names it on disk."""

    key: str
    path: str
    start: int
    shape: tuple[int, ...]
    dtype: Any

    @property
    def bytes(self) -> int:
        """Size of the array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


Placement = Callable[[Leaf], jax.sharding.Sharding]
AnyLeaf = TypeVar("AnyLeaf", bound=Leaf)


def stored_leaves(abstract: Abstract) -> list[Leaf]:
    """Cuts parameters (path → shape and dtype) over `LEAF_BYTES` into ranges of rows of about equal size."""
    leaves = []
    for path, parameter in sorted(abstract.items()):
        whole = Leaf(path, path, 0, tuple(parameter.shape), parameter.dtype)
        if whole.bytes <= LEAF_BYTES:
            leaves.append(whole)
            continue
        count = whole.shape[0]
        most = max(1, LEAF_BYTES * count // whole.bytes)  # rows in a leaf
        rows = -(-count // -(-count // most))
        for start in range(0, count, rows):
            shape = (min(rows, count - start), *whole.shape[1:])
            leaves.append(dataclasses.replace(whole, key=f"{path}@{start}", start=start, shape=shape))
    return leaves


def export_model(
    out: paths.PathLike,
    params: Mapping[str, Any],
    model_config: Mapping[str, Any],
    tokenizer_dir: paths.PathLike | None,
    extra: Mapping[str, Any],
) -> None:
    """Writes an export of parameters in memory; arguments and errors are those of `write_export`.

    Args:
      params: nested or flat dict of arrays; quantised kernels are written dequantised.
      extra: provenance (sources, licences, data).
    """
    flat = dict(params)
    if any(isinstance(value, Mapping) for value in flat.values()):
        flat = param_paths.flatten(flat)

    def make(leaf: Leaf) -> Any:
        value = flat[leaf.path]
        if leaf.key != leaf.path:
            value = value[leaf.start : leaf.start + leaf.shape[0]]
        return _dequantize(value) if isinstance(value, QuantizedKernel) else value

    abstract = {path: jax.ShapeDtypeStruct(value.shape, value.dtype) for path, value in flat.items()}
    write_export(out, abstract, make, model_config, tokenizer_dir, lambda: extra)


_dequantize = jax.jit(QuantizedKernel.dequantize)


def write_export(
    out: paths.PathLike,
    abstract: Abstract,
    make: Callable[[Leaf], Any],
    model_config: Mapping[str, Any],
    tokenizer_dir: paths.PathLike | None,
    extra: Callable[[], Mapping[str, Any]],
    *,
    resume: Mapping[str, Any] | None = None,
    verify: Placement | None = None,
) -> None:
    """Writes an export part by part into `.<name>.partial` beside `out`, then renames it.

    All processes call it together. After an error nothing is left; the next call clears what an interrupted
    one left, or continues it if `resume` is the same.

    Args:
      out: folder to create; an earlier export there is replaced only once the new one is complete.
      abstract: path → shape and dtype of every parameter.
      make: returns a leaf; only those of one part are in memory at a time.
      model_config: the `model` section of a config, plus `kind`.
      tokenizer_dir: Hugging Face tokenizer folder to copy, or None.
      extra: returns the provenance; called after the last part.
      resume: JSON that identifies this export.
      verify: sharding of the leaves that `make` returns; if given, all leaves are hashed while they are
        written, then read back and compared.

    Raises:
      UserError: `out` is not an export, the disk is full, or the bytes read back differ.
    """
    out = paths.as_path(out)
    if out.exists() and not (out / "model.json").exists() and (not out.is_dir() or paths.children(out)):
        raise UserError(f"{out}: exists and is not an export; choose another folder")
    temporary = out.parent / f".{out.name}.partial"
    parts = _parts(stored_leaves(abstract))
    lock = None
    try:
        lock = _begin(temporary, None if resume is None else _fingerprint(parts, resume))
        digests: dict[str, str] = {}
        for index, part in enumerate(parts):
            digests |= _write_part(temporary, index, part, make, verify is not None)
        if verify is not None:
            for index, part in enumerate(parts):
                _verify_part(out, temporary / "params" / f"{index:05}", part, verify, digests)
            processes.barrier(f"verified {temporary}")
        if processes.is_primary_process():
            _finish(temporary, model_config, tokenizer_dir, {**extra(), "sha256": digests})
            _replace_folder(temporary, out)
        processes.barrier(f"export {out}")
    except _InUseError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if resume is None or isinstance(error, Exception):
            temporary.rmtree(missing_ok=True)
        if isinstance(error, OSError | ValueError):
            raise paths.write_error(out, error) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _parts(leaves: Sequence[Leaf]) -> list[list[Leaf]]:
    limit = max(_PART_BYTES, max((leaf.bytes for leaf in leaves), default=0))
    parts: list[list[Leaf]] = []
    for leaf in leaves:
        if not parts or sum(other.bytes for other in parts[-1]) + leaf.bytes > limit:
            parts.append([])
        parts[-1].append(leaf)
    return parts


def _fingerprint(parts: Sequence[Sequence[Leaf]], resume: Mapping[str, Any]) -> str:
    leaves = [[(leaf.key, leaf.shape, np.dtype(leaf.dtype).name) for leaf in part] for part in parts]
    described = {"versions": versions(), "processes": jax.process_count(), "leaves": leaves, "resume": resume}
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


class _InUseError(UserError):
    """Another process writes the same export."""


def _begin(temporary: epath.Path, fingerprint: str | None) -> int | None:
    """Keeps the parts of an interrupted export with the same fingerprint; clears anything else.

    Returns:
      File descriptor that locks the folder; None in object stores and other processes.
    """
    lock = None
    if processes.is_primary_process():
        local = "://" not in str(temporary)
        if local and temporary.exists():
            os.close(_locked(temporary))  # raises if in use
        file = temporary / "journal" / "mark"
        if fingerprint is None or not file.exists() or file.read_text() != fingerprint:
            temporary.rmtree(missing_ok=True)
            (temporary / "journal").mkdir(parents=True)
            (temporary / "params").mkdir()
            if fingerprint is not None:
                paths.write_text_atomic(file, fingerprint)
        lock = _locked(temporary) if local else None
    processes.barrier(f"begin {temporary}")
    return lock


def _locked(folder: epath.Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    if not locks.try_lock(descriptor):
        os.close(descriptor)
        raise _InUseError(f"{folder}: another process is writing here; give each its own --out")
    return descriptor


def _write_part(
    temporary: epath.Path, index: int, part: list[Leaf], make: Callable[[Leaf], Any], verify: bool
) -> dict[str, str]:
    """Saves one part unless all processes have journaled it; returns key → digest."""
    journals = [temporary / "journal" / f"{index:05}.{p}.json" for p in range(jax.process_count())]
    journal = journals[jax.process_index()]
    if all(other.exists() for other in journals):
        return json.loads(journal.read_text())
    folder = temporary / "params" / f"{index:05}"
    if processes.is_primary_process():
        folder.rmtree(missing_ok=True)
    processes.barrier(f"part {folder}")
    arrays = {leaf.key: make(leaf) for leaf in part}
    with ThreadPoolExecutor(1) as pool, saving_uncompressed():
        hashing = {key: pool.submit(_digest, array) for key, array in arrays.items() if verify}
        ocp.save(folder, arrays)
        digests = {key: digest.result() for key, digest in hashing.items()}
    del arrays, hashing
    _free(sum(leaf.bytes for leaf in part))
    paths.write_text_atomic(journal, json.dumps(digests))
    return digests


def _free(size: int) -> None:
    """Collects large arrays at once; Orbax leaves them in reference cycles."""
    if size > _COLLECTED_BYTES:
        gc.collect()


def _digest(array: Any) -> str:
    """SHA-256 of the shards on this process, without duplicates."""
    found = hashlib.sha256()
    own = {str(shard.index): shard for shard in array.addressable_shards}
    for _, shard in sorted(own.items()):
        found.update(np.ascontiguousarray(shard.data).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _verify_part(
    out: epath.Path, folder: epath.Path, part: list[Leaf], placement: Placement, digests: Mapping[str, str]
) -> None:
    for leaf in part:
        _free(leaf.bytes)
        wanted = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement(leaf))
        if _digest(_load(folder, {leaf.key: wanted})[leaf.key]) != digests[leaf.key]:
            raise UserError(f"{out}: {leaf.key} reads back as other bytes than were written; check the disk")


def host_sharding(shape: Sequence[int], axes: Sequence[int] = ()) -> jax.sharding.Sharding:
    """Host memory, split over all processes along the first divisible axis (`axes` first), or replicated."""
    count = jax.process_count()
    if count == 1:
        return jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    first = {device.process_index: device for device in reversed(jax.devices("cpu"))}
    mesh = jax.sharding.Mesh(np.array([first[index] for index in range(count)]), ("hosts",))
    divided = next((axis for axis in (*axes, *range(len(shape))) if not shape[axis] % count), None)
    spec = () if divided is None else (*(None,) * divided, "hosts")
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def _finish(
    temporary: epath.Path,
    model_config: Mapping[str, Any],
    tokenizer_dir: paths.PathLike | None,
    provenance: Mapping[str, Any],
) -> None:
    (temporary / "model.json").write_text(json.dumps(model_config, indent=1, sort_keys=True))
    (temporary / "provenance.json").write_text(
        json.dumps({"versions": versions(), **provenance}, indent=1, sort_keys=True)
    )
    if tokenizer_dir:
        (temporary / "tokenizer").rmtree(missing_ok=True)
        (temporary / "tokenizer").mkdir()
        for file in paths.as_path(tokenizer_dir).iterdir():
            if not file.is_dir():
                file.copy(temporary / "tokenizer" / file.name, overwrite=True)
    (temporary / "journal").rmtree()


def _replace_folder(new: epath.Path, out: epath.Path) -> None:
    old = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.old"
    if replaced := out.exists():
        out.rename(old)
    new.rename(out)
    if replaced:
        shutil.rmtree(old) if "://" not in str(old) else old.rmtree()


@dataclasses.dataclass(frozen=True)
class StoredModel(ModelConfig):
    """The config of an exported model or component."""

    kind: str = ""  # 'generative' or 'contrastive', or the component in the export


def locate(path: paths.PathLike) -> epath.Path | None:
    """The export in a folder, or None: the folder itself, or the export of a training or quickstart run."""
    folder = paths.as_path(path)
    made = sorted(folder.glob("export_step_*"), key=lambda one: int("0" + one.name.rpartition("_")[2]))
    quickstart = folder / "stages" / "stage4_expert" / "export"
    candidates = (folder, folder / "export", quickstart, *reversed(made))
    return next((one for one in candidates if (one / "model.json").exists()), None)


def load_model_config(export: paths.PathLike) -> StoredModel:
    """Reads the model config of an export.

    Raises:
      UserError: `export` is not an export, or is damaged.
    """
    export = paths.as_path(export)
    for name in EXPORT_FILES:
        if not (export / name).exists():
            raise UserError(
                f"{export}: {name} is missing, so this is not an export; give the `export` folder of a run "
                "or the --out folder of `vilam3 convert import`"
            )
    text = paths.read_bytes(export / "model.json", _MAX_JSON)
    try:
        config = json.loads(text)
        if not isinstance(config, dict) or not isinstance(config.get("kind"), str):
            raise UserError("does not state the kind of model")
        return from_mapping(StoredModel, config)
    except (ValueError, RecursionError, UserError) as error:
        problem = error if isinstance(error, UserError) else f"is damaged ({error})"
        raise UserError(f"{export / 'model.json'}: {problem}; export the model again") from error


@dataclasses.dataclass(frozen=True)
class StoredRows(Leaf):
    """A leaf on disk, in the Orbax checkpoint `folder`."""

    folder: epath.Path

    def read(self) -> np.ndarray:
        """Reads the rows into memory; the result is not cached."""
        _free(self.bytes)
        wanted = jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=host_sharding(()))
        return np.asarray(_load(self.folder, {self.key: wanted})[self.key])


def stored_rows(export: paths.PathLike) -> dict[str, list[StoredRows]]:
    """Returns path → leaves of this parameter in an export, by row.

    Raises:
      UserError: `export` is not an export, or its parameters are damaged.
    """
    load_model_config(export)
    found: dict[str, list[StoredRows]] = {}
    try:
        for folder in sorted((paths.as_path(export) / "params").iterdir()):
            for key, leaf in ocp.metadata(folder).metadata.items():
                path, _, start = key.partition("@")
                rows = StoredRows(key, path, int(start or 0), tuple(leaf.shape), leaf.dtype, folder)
                found.setdefault(path, []).append(rows)
    except Exception as error:  # damaged files raise arbitrary errors in Orbax and TensorStore
        raise UserError(f"{export}: its params are damaged ({first_line(error)}); export it again") from error
    for ranges in found.values():
        ranges.sort(key=lambda part: part.start)
    return found


def parameter_shape(ranges: Sequence[StoredRows]) -> tuple[int, ...]:
    """Shape of the whole parameter."""
    last = ranges[-1]
    return (last.start + last.shape[0], *last.shape[1:]) if last.start else last.shape


def parameter_differences(
    stored: Mapping[str, Sequence[StoredRows]], wanted: Mapping[str, Any], optional: Collection[str] = ()
) -> list[str]:
    """One text per parameter that is missing, or has another shape than wanted.

    Args:
      stored: of `stored_rows`.
      wanted: path → anything with a shape.
      optional: paths that may be missing.
    """
    found = []
    for path, leaf in wanted.items():
        if path not in stored:
            found += [] if path in optional else [f"has no {path}"]
        elif (shape := parameter_shape(stored[path])) != tuple(leaf.shape):
            found.append(f"{path} has shape {shape}, this model needs {tuple(leaf.shape)}")
    return found


def load_params(export: paths.PathLike, wanted: Abstract, optional: Collection[str] = ()) -> Flat:
    """Reads the `wanted` parameters only, each straight onto its sharding.

    Args:
      export: export folder.
      wanted: path → ShapeDtypeStruct; dtypes are converted, shapes must agree.
      optional: paths that are left out of the result if the export lacks them.

    Raises:
      UserError: a wanted parameter is missing or has another shape.
    """
    stored = stored_rows(export)
    if differences := parameter_differences(stored, wanted, optional):
        raise UserError(f"{export}: is an export of another model ({listed(differences)})")
    together: dict[epath.Path, dict[str, jax.ShapeDtypeStruct]] = {}
    in_ranges = {}
    for path, leaf in wanted.items():
        if path not in stored:
            continue
        if len(stored[path]) == 1:
            together.setdefault(stored[path][0].folder, {})[path] = leaf
        else:
            in_ranges[path] = leaf
    found: Flat = {}
    for folder, leaves in together.items():
        found |= _load(folder, leaves)
    return found | {path: assemble(leaf, stored[path], _load_rows) for path, leaf in in_ranges.items()}


def _load(folder: epath.Path, leaves: dict[str, jax.ShapeDtypeStruct]) -> Flat:
    try:
        with loading_a_part():
            return dict(ocp.load(folder, leaves))
    except Exception as error:  # see `stored_rows`
        raise UserError(f"{folder}: is damaged ({first_line(error)}); export the model again") from error


def _load_rows(part: StoredRows, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    return _load(part.folder, {part.key: wanted})[part.key]


def assemble(
    leaf: jax.ShapeDtypeStruct,
    ranges: Sequence[AnyLeaf],
    read: Callable[[AnyLeaf, jax.ShapeDtypeStruct], jax.Array],
) -> jax.Array:
    """Fills a parameter range by range; only one range is in memory besides it.

    Args:
      leaf: the whole parameter, with its sharding.
      ranges: its rows, see `stored_leaves`.
      read: (range, its shape, dtype and sharding) ↦ array.
    """
    sharding = rows_sharding = leaf.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):  # the rows of a range may not be divisible
        rows_sharding = sharding.update(spec=jax.sharding.PartitionSpec(None, *sharding.spec[1:]))
    whole = jax.jit(functools.partial(jnp.zeros, leaf.shape, leaf.dtype), out_shardings=sharding)()
    put = jax.jit(
        lambda whole, rows, start: jax.lax.dynamic_update_slice_in_dim(whole, rows, start, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
    for part in ranges:
        wanted = jax.ShapeDtypeStruct(part.shape, leaf.dtype, sharding=rows_sharding)
        whole = put(whole, read(part, wanted), part.start)
    return whole


def read_model(
    config: StoredModel,
    read: Callable[[Abstract], Flat],
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
) -> tuple[dict[str, Any], StoredModel]:
    """Reads a whole model.

    Args:
      config: config of the model.
      read: (path → ShapeDtypeStruct with sharding) ↦ (path → array).
      mesh: if given, parameters are sharded by the rules of their model family, and every matrix is wrapped
        in a `Weight`; by default they are on the first device.
      dtype: one of `LOADED_DTYPES`: type of parameters and activations, by default that of the config. With
        'int8', each matrix of the LLM is a `QuantizedKernel`, and other parameters have the type of the
        config's activations. So do products, whose other factor is not quantised.

    Returns:
      Nested parameters, and the config with `dtype`.

    Raises:
      UserError: an unknown type, a mesh over which the model cannot be split, or an error of `read`.
    """
    if dtype is not None:
        if dtype not in LOADED_DTYPES:
            raise UserError(f"dtype {dtype!r}: must be {', '.join(DTYPES)} or int8")
        unquantized = config.dtype if dtype == "int8" else dtype
        config = dataclasses.replace(config, dtype=unquantized, param_dtype=unquantized)
    _, nested = build.abstract_model(config, config.kind)
    shapes = param_paths.flatten(nested)
    if mesh is None:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings: dict[str, Any] = dict.fromkeys(shapes, place)
    else:
        rules = build.parameter_rules(config, config.kind)
        shardings = dict(mesh_lib.parameter_shardings(shapes, (), rules, mesh))
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in shapes.items()
    }
    in_int8 = _in_int8(config, wanted) if dtype == "int8" else {}
    params = read({path: leaf for path, leaf in wanted.items() if path not in in_int8})
    params |= quantized_loading.load(in_int8, read)
    einsums = dict.fromkeys(in_int8, quantized.scaled_einsum)
    if mesh is not None:
        shardings |= {path: jax.tree.map(lambda x: x.sharding, leaf) for path, leaf in in_int8.items()}
        params = weights.annotate(params, shardings, einsums)
    else:
        params |= {path: weights.Weight(params[path], einsum=how) for path, how in einsums.items()}
    return param_paths.unflatten(params), config


def _in_int8(config: StoredModel, wanted: Abstract) -> dict[str, quantized.QuantizedKernel]:
    """The matrices of the LLM; its embedding table only if it is the head, too: look-ups read few rows."""
    quantized.check_installed("dtype 'int8'", "choose another type")
    if config.kind != "generative":
        raise UserError(f"dtype 'int8': a {config.kind} model has no LLM; choose {' or '.join(DTYPES)}")
    assert config.llm is not None
    paths = [path for path in wanted if path.startswith("llm/") and path.endswith("/kernel")]
    if config.llm.tie_embeddings:
        paths.append("llm/embed/embedding")
    return {path: quantized_loading.abstract(path, wanted[path], "int8") for path in paths}


def load_export(export: paths.PathLike) -> tuple[dict[str, Any], StoredModel, epath.Path]:
    """Reads a whole export onto the first device.

    Returns:
      Nested parameters, the model config, and the tokenizer's folder.

    Raises:
      UserError: no export.
    """
    params, config = read_model(load_model_config(export), functools.partial(load_params, export))
    return params, config, paths.as_path(export) / "tokenizer"
