"""Reads and writes rows of the tensors in a safetensors folder: one file, or shards with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import read_bytes, write_text_atomic

STORED_DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_JSON_BYTES = 64 << 20
_CACHED_COLUMNS = 128


class SafetensorsFolder:
    """The tensors of a model folder; reads only the rows asked for.

    With shards, the index decides which tensors exist and which shard is read for each.

    Attributes:
      shapes: tensor name → shape.
      files: the safetensors files, sorted.
      dtypes: storage types of the tensors.
      unlisted: names of tensors that are in a shard but not in the index.
    """

    def __init__(self, folder: Path) -> None:
        """Opens every shard and checks its header against its length.

        Raises:
          UserError: no weights, a missing or truncated shard, an index that does not fit its shards, or a
            single file beside an index of others.
        """
        index = folder / INDEX
        if index.exists():
            expected = read_config(index).get("weight_map")
            if not isinstance(expected, dict):
                raise UserError(f"{index}: has no weight_map; download it again")
            if not all(isinstance(name, str) for name in expected.values()):
                raise UserError(f"{index}: weight_map must map names to file names; download it again")
            names = sorted(set(expected.values()))
            if SINGLE not in names and (folder / SINGLE).exists():
                raise UserError(f"{folder}: holds {SINGLE} and an {INDEX} of other files; remove one of them")
        else:
            expected, names = None, [SINGLE]
        self.files = [_existing(folder, name) for name in names]
        self._entries: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
        self.unlisted: set[str] = set()
        for file in self.files:
            self._open(file, expected)
        if missing := sorted(set(expected or ()) - set(self._entries)):
            raise UserError(
                f"{index}: tensor {missing[0]!r} (of {len(missing)}) is not in its shard; download it again"
            )
        self.shapes = {name: tuple(entry["shape"]) for name, (_, _, entry) in self._entries.items()}
        self.dtypes = tuple(sorted({entry["dtype"] for _, _, entry in self._entries.values()}))

    def _open(self, file: Path, expected: Mapping[str, str] | None) -> None:
        """Reads the header of a file."""
        try:
            # The library checks that the header is sane and covers the file exactly. It has no bfloat16 for
            # NumPy, so this class reads the bytes.
            with safe_open(file, framework="numpy"):
                pass
            with file.open("rb") as handle:
                size = int.from_bytes(handle.read(8), "little")
                header = json.loads(handle.read(size))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{file}: truncated or damaged ({error}); download it again") from error
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if expected is None or expected.get(name) == file.name:
                self._entries[name] = (file, 8 + size, entry)
            elif name not in expected:
                self.unlisted.add(name)

    def __call__(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns rows `start` to `stop` of a tensor in its stored dtype.

        Raises:
          UserError: stored as integers or in an unknown type; or the file shrank or cannot be read.
        """
        file, data, entry = self._entries[name]
        dtype = STORED_DTYPES.get(entry["dtype"])
        if dtype is None:
            raise UserError(
                f"{file}: {name!r} is stored as {entry['dtype']}, not as floating point; import the "
                "unquantised model"
            )
        shape = (stop - start, *entry["shape"][1:])
        rows = np.empty(shape, dtype)
        wanted = rows.reshape(-1).view(np.uint8).data
        row_bytes = math.prod(shape[1:]) * rows.itemsize
        try:
            with file.open("rb", buffering=0) as handle:
                handle.seek(data + entry["data_offsets"][0] + start * row_bytes)
                while wanted:
                    count = handle.readinto(wanted)
                    if not count:
                        raise OSError("unexpected end of file")
                    wanted = wanted[count:]
        except OSError as error:
            raise UserError(f"{file}: {name!r} cannot be read ({error}); download it again") from error
        return rows


class SafetensorsWriter:
    """Writes a model folder's tensors by rows, in any order."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: Any, file_bytes: int):
        """Creates the files at their final size, named as by transformers, with headers and index.

        Args:
          folder: an existing folder.
          shapes: tensor name → shape, in file order.
          dtype: dtype of all tensors.
          file_bytes: maximum size of a file's tensors; a larger tensor gets a file to itself.
        """
        self.dtype = np.dtype(dtype)
        self._kind = next(kind for kind, dtype in STORED_DTYPES.items() if np.dtype(dtype) == self.dtype)
        self.shapes = dict(shapes)
        self._places: dict[str, tuple[Path, int]] = {}
        groups: list[dict[str, int]] = [{}]
        for name, shape in self.shapes.items():
            size = math.prod(shape) * self.dtype.itemsize
            if groups[-1] and sum(groups[-1].values()) + size > file_bytes:
                groups.append({})
            groups[-1][name] = size
        for index, group in enumerate(groups, 1):
            name = SINGLE if len(groups) == 1 else f"model-{index:05}-of-{len(groups):05}.safetensors"
            self._lay_out(folder / name, group)
        if len(groups) > 1:
            total = sum(sum(group.values()) for group in groups)
            where = {name: file.name for name, (file, _) in self._places.items()}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            write_text_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _lay_out(self, file: Path, group: Mapping[str, int]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, size in group.items():
            shape = list(self.shapes[name])
            header[name] = {"dtype": self._kind, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for name in group:
            self._places[name] = (file, start + header[name]["data_offsets"][0])
        with file.open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(start + end)

    def write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Writes rows of a tensor from row `start`, cast to the files' dtype."""
        file, offset = self._places[name]
        row_bytes = math.prod(self.shapes[name][1:]) * self.dtype.itemsize
        with file.open("r+b", buffering=0) as handle:
            handle.seek(offset + start * row_bytes)
            left = contiguous(rows, self.dtype).reshape(-1).view(np.uint8).data
            while left:
                left = left[handle.write(left) :]


def contiguous(block: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns `block` in row-major order with this dtype; copies only if needed."""
    if block.dtype == dtype and block.flags.c_contiguous:
        return block
    out = np.empty(block.shape, dtype)
    copy_into(out, block)
    return out


def copy_into(out: np.ndarray, block: np.ndarray) -> None:
    """Copies with a cast.

    A transposed `block` is copied a few columns at a time, as many as fit into a cache: four times as fast.
    Without a cast the bits are copied, because NumPy copies bfloat16 value by value.
    """
    if out.dtype == block.dtype:
        bits = np.dtype(f"u{out.itemsize}")
        out, block = out.view(bits), block.view(bits)
    if not block.ndim:
        out[()] = block
        return
    step = block.shape[-1] if block.ndim == 1 or block.flags.c_contiguous else _CACHED_COLUMNS
    # Values beyond the range of the new dtype become infinite; callers check the result.
    with np.errstate(over="ignore"):
        for start in range(0, block.shape[-1], step):
            columns = (..., slice(start, start + step))
            out[columns] = block[columns].astype(out.dtype, order="K", copy=False)


def read_config(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: missing or not a JSON object.
    """
    try:
        value = json.loads(read_bytes(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected; download it again")
    return value


def _existing(folder: Path, name: str) -> Path:
    """A file of weights.

    Raises:
      UserError: it is outside the folder or missing.
    """
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise UserError(f"{folder / INDEX}: shard {name!r} is outside the folder; download it again")
    try:
        found = (folder / name).is_file()
    except OSError:  # the name is too long for a file
        found = False
    if found:
        return folder / name
    if name != SINGLE:
        raise UserError(f"{folder}: shard {name} is missing; download it into the folder")
    raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} is here; download the weights")
