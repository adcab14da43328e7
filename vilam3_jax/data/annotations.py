"""What an expert said of one image or volume, and the store it is kept in.

An `Annotation` is a typed, schema-versioned record: probabilities, the lossless label map, and the figures of
every segment. Texts and overlays are rendered from it when an example is loaded, never stored.

This module imports neither jax nor flax nor torch: the expert processes write it, the training hosts read it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vilam3_jax import paths
from vilam3_jax.errors import UserError

SCHEMA_VERSION = 1
MAX_RECORD_BYTES = 1 << 30
MAX_LABEL_VOXELS = 1 << 29
_INDEX_SUFFIX = ".index.json"
_SHARD_SUFFIX = ".array_record"
_LABEL_DTYPES = ("uint8", "uint16")

Key = tuple[str, str, str]
"""(content key of the input, expert name, expert arguments)."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """One label of a label map, measured over the whole volume.

    Attributes:
      label_id: value in the label map, > 0.
      name: the expert's own name of the label.
      voxels: number of voxels.
      volume_ml: volume in millilitres.
      components: number of 26-connected components.
      bbox: (x0, y0, z0, x1, y1, z1) in voxels, upper ends excluded.
    """

    label_id: int
    name: str
    voxels: int
    volume_ml: float
    components: int
    bbox: tuple[int, int, int, int, int, int]


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """A label volume compressed plane by plane along axis 2.

    Attributes:
      shape: (X, Y, Z), the grid of the canonical (RAS) volume it belongs to.
      dtype: 'uint8' or 'uint16'.
      affine: 16 floats, row by row: voxel index to RAS millimetres.
      offsets: Z + 1 positions in `blob`; plane z is `blob[offsets[z]:offsets[z + 1]]`.
      blob: zlib streams, one a plane, C order of [X, Y], little endian.
    """

    shape: tuple[int, int, int]
    dtype: str
    affine: tuple[float, ...]
    offsets: tuple[int, ...]
    blob: bytes

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1 or math.prod(self.shape) > MAX_LABEL_VOXELS:
            raise ValueError(f"label map of shape {self.shape}")
        if self.dtype not in _LABEL_DTYPES:
            raise ValueError(f"label map of dtype {self.dtype!r}, expected one of {_LABEL_DTYPES}")
        if len(self.affine) != 16 or not all(math.isfinite(v) for v in self.affine):
            raise ValueError("label map affine must be 16 finite numbers")
        ends = self.offsets
        if len(ends) != self.shape[2] + 1 or ends[0] != 0 or ends[-1] != len(self.blob):
            raise ValueError("label map offsets do not fit its planes")
        if any(a > b for a, b in zip(ends, ends[1:], strict=False)):
            raise ValueError("label map offsets are not in order")

    @classmethod
    def encode(cls, labels: np.ndarray, affine: np.ndarray) -> LabelMap:
        """Compresses `labels` ([X, Y, Z], any integer dtype, values 0..65535).

        Raises:
          ValueError: not three-dimensional, not integer, or values out of range.
        """
        if labels.ndim != 3 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"label map must be a 3-D integer array, got {labels.dtype} {labels.shape}")
        low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
        if low < 0 or high > 65535:
            raise ValueError(f"label values {low}..{high} do not fit 0..65535")
        dtype = "uint8" if high < 256 else "uint16"
        little = np.dtype(dtype).newbyteorder("<")
        planes = [
            zlib.compress(np.ascontiguousarray(labels[:, :, z], dtype=little).tobytes(), 6)
            for z in range(labels.shape[2])
        ]
        offsets = (0, *np.cumsum([len(p) for p in planes]).tolist())
        flat = tuple(float(v) for v in np.asarray(affine, np.float64).reshape(16))
        return cls(tuple(int(n) for n in labels.shape), dtype, flat, offsets, b"".join(planes))

    def plane(self, z: int) -> np.ndarray:
        """Returns plane `z` along axis 2, [X, Y]; touches no other plane.

        Raises:
          IndexError: `z` outside the map.
          ValueError: the stored bytes are damaged.
        """
        if not 0 <= z < self.shape[2]:
            raise IndexError(f"plane {z} of a label map with {self.shape[2]} planes")
        size = self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize
        stream = zlib.decompressobj()
        try:
            # The bound keeps a hostile record from inflating without end.
            raw = stream.decompress(self.blob[self.offsets[z] : self.offsets[z + 1]], size + 1)
        except zlib.error as error:
            raise ValueError(f"plane {z} of the label map is damaged: {error}") from error
        if len(raw) != size:
            raise ValueError(f"plane {z} of the label map holds {len(raw)} bytes, expected {size}")
        little = np.dtype(self.dtype).newbyteorder("<")
        return np.frombuffer(raw, little).reshape(self.shape[:2]).astype(self.dtype)

    def decode(self) -> np.ndarray:
        """Returns the whole map, [X, Y, Z], uint8 or uint16."""
        out = np.empty(self.shape, self.dtype)
        for z in range(self.shape[2]):
            out[:, :, z] = self.plane(z)
        return out


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One expert's result on one input.

    Attributes:
      input_key: content key of the decoded image or volume (sha256, hex).
      expert: expert name as in its card.
      args: expert arguments, '' for none.
      status: 'ok' or 'failed'.
      reason: why it failed; '' when ok.
      version: expert version.
      weights_sha256: what the expert's weights hash to, '' if it has none.
      probabilities: class name to probability.
      segments: the labels found in the whole volume.
      labels: the compressed label map, or None.
      seconds: time the expert took.
      schema_version: version of this record type.
    """

    input_key: str
    expert: str
    args: str = ""
    status: str = "ok"
    reason: str = ""
    version: str = ""
    weights_sha256: str = ""
    probabilities: dict[str, float] = dataclasses.field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    labels: LabelMap | None = None
    seconds: float = 0.0
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.status not in ("ok", "failed"):
            raise ValueError(f"status {self.status!r}, expected 'ok' or 'failed'")
        if self.status == "failed" and not self.reason:
            raise ValueError("a failed annotation needs its reason")
        if not self.input_key or not self.expert:
            raise ValueError("input_key and expert must not be empty")
        for name, value in self.probabilities.items():
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"probability of {name!r} is {value}")
        ids = [s.label_id for s in self.segments]
        if len(set(ids)) != len(ids) or any(i < 1 for i in ids):
            raise ValueError(f"segment label ids must be distinct and positive, got {ids}")

    @property
    def key(self) -> Key:
        return (self.input_key, self.expert, self.args)

    @property
    def label_shape(self) -> tuple[int, int, int] | None:
        """(X, Y, Z) of the label map, None without one."""
        return self.labels.shape if self.labels else None

    @property
    def label_affine(self) -> np.ndarray | None:
        """float64 [4, 4], voxel index to RAS millimetres, None without a label map."""
        return np.array(self.labels.affine).reshape(4, 4) if self.labels else None

    @property
    def label_names(self) -> dict[int, str]:
        """Label id to name, of the labels present in the volume."""
        return {s.label_id: s.name for s in self.segments}

    def label_map(self) -> np.ndarray:
        """Returns the label map, uint8 or uint16 [X, Y, Z].

        Raises:
          ValueError: this annotation has none.
        """
        return self._need_labels().decode()

    def label_slice(self, axis: int, index: int) -> np.ndarray:
        """Returns one plane of the label map in voxel order (not turned for display).

        Axis 2 decompresses that plane alone; axes 0 and 1 need the whole map.

        Raises:
          ValueError: no label map, or a wrong axis.
          IndexError: `index` outside the map.
        """
        labels = self._need_labels()
        if axis == 2:
            return labels.plane(index)
        if axis not in (0, 1):
            raise ValueError(f"axis {axis}, expected 0, 1 or 2")
        if not 0 <= index < labels.shape[axis]:
            raise IndexError(f"slice {index} of axis {axis}, which has {labels.shape[axis]}")
        return np.take(labels.decode(), index, axis=axis)

    def _need_labels(self) -> LabelMap:
        if self.labels is None:
            raise ValueError(f"annotation of {self.expert} on {self.input_key[:12]} has no label map")
        return self.labels

    def to_bytes(self) -> bytes:
        """Serialises to msgpack."""
        return msgpack.packb(dataclasses.asdict(self), use_bin_type=True)

    @classmethod
    def from_bytes(cls, data: bytes) -> Annotation:
        """Reads `to_bytes` output.

        Raises:
          UserError: damaged, or written by a newer schema.
        """
        try:
            fields = msgpack.unpackb(data, raw=False, max_buffer_size=MAX_RECORD_BYTES)
            found = fields["schema_version"]
            if found != SCHEMA_VERSION:
                raise UserError(
                    f"annotation record has schema {found}, this version reads {SCHEMA_VERSION}; "
                    "annotate again or upgrade vilam3-jax"
                )
            fields["segments"] = tuple(
                Segment(**{**s, "bbox": tuple(s["bbox"])}) for s in fields["segments"]
            )
            if fields["labels"] is not None:
                labels = fields["labels"]
                for name in ("shape", "affine", "offsets"):
                    labels[name] = tuple(labels[name])
                fields["labels"] = LabelMap(**labels)
            return cls(**fields)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise UserError(f"annotation record is damaged ({error}); annotate this input again") from error


def failed(input_key: str, expert: str, args: str, reason: str, **fields: Any) -> Annotation:
    """Returns the annotation that stands for an expert that could not answer."""
    return Annotation(input_key, expert, args, status="failed", reason=reason or "no reason given", **fields)


def segments_on_slice(annotation: Annotation, axis: int, index: int) -> list[tuple[int, str, int]]:
    """Returns (label id, name, voxels on that slice) of every named label there, by label id.

    Args:
      annotation: a record with a label map.
      axis: 0, 1 or 2 of the canonical volume.
      index: slice along `axis`.

    Raises:
      ValueError, IndexError: as `Annotation.label_slice`.
    """
    names = annotation.label_names
    ids, counts = np.unique(annotation.label_slice(axis, index), return_counts=True)
    return [(int(i), names[int(i)], int(n)) for i, n in zip(ids, counts, strict=True) if int(i) in names]


class AnnotationWriter:
    """Adds annotations to a folder; may be killed at any moment and started again.

    Every run writes its own shards: records go to a hidden temporary file, which is renamed when the shard is
    full, and only then its index is written. A shard without index does not exist for readers, so nothing
    half-written is ever seen, and several writers may share a folder.
    """

    def __init__(
        self,
        directory: paths.PathLike,
        *,
        records_per_shard: int = 256,
        seconds_per_shard: float = 30.0,
        bytes_per_shard: int = 256 << 20,
    ) -> None:
        """Opens (or creates) the store and reads which keys it has.

        Args:
          directory: local or `gs://` folder.
          records_per_shard, seconds_per_shard, bytes_per_shard: a shard is committed when one of them is
            reached, so a kill loses at most that much work.

        Raises:
          UserError: the folder cannot be made or an index in it is damaged.
        """
        self.directory = paths.as_path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot be created ({error}); choose another folder") from error
        self._present = {key: entry["status"] for key, entry in _read_indexes(self.directory).items()}
        self._limits = (records_per_shard, seconds_per_shard, bytes_per_shard)
        self._run = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._shards = 0
        self._pending: list[tuple[Annotation, bytes]] = []
        self._bytes = 0
        self._started = time.monotonic()

    def has(self, input_key: str, expert: str, args: str = "") -> bool:
        """Whether the key is already stored (as a success or as a failure)."""
        return (input_key, expert, args) in self._present

    def status(self, input_key: str, expert: str, args: str = "") -> str | None:
        """'ok', 'failed', or None when the key is not stored."""
        return self._present.get((input_key, expert, args))

    def write(self, annotation: Annotation) -> bool:
        """Adds one record.

        A key already stored is skipped, except that a success replaces a failure.

        Returns:
          Whether it was added.
        """
        present = self._present.get(annotation.key)
        if present == "ok" or (present == "failed" and annotation.status == "failed"):
            return False
        if not self._pending:
            self._started = time.monotonic()
        data = annotation.to_bytes()
        self._pending.append((annotation, data))
        self._bytes += len(data)
        self._present[annotation.key] = annotation.status
        records, seconds, size = self._limits
        elapsed = time.monotonic() - self._started
        if len(self._pending) >= records or self._bytes >= size or elapsed >= seconds:
            self.flush()
        return True

    def flush(self) -> None:
        """Commits what is pending: shard, rename, index.

        Raises:
          UserError: the folder cannot be written; what is pending stays pending.
        """
        if not self._pending:
            return
        name = f"annotations-{self._run}-{self._shards:05d}"
        entries = [
            {
                "input_key": a.input_key,
                "expert": a.expert,
                "args": a.args,
                "record": i,
                "status": a.status,
                "version": a.version,
            }
            for i, (a, _) in enumerate(self._pending)
        ]
        index = {"schema_version": SCHEMA_VERSION, "shard": name + _SHARD_SUFFIX, "entries": entries}
        _write_shard(self.directory, name + _SHARD_SUFFIX, [data for _, data in self._pending])
        paths.write_text_atomic(self.directory / (name + _INDEX_SUFFIX), json.dumps(index, indent=1) + "\n")
        self._shards += 1
        self._pending, self._bytes = [], 0

    def close(self) -> None:
        """Commits what is pending."""
        self.flush()

    def __enter__(self) -> AnnotationWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Also after an error: every pending record is complete by itself.
        self.flush()


class AnnotationStore:
    """Random access to the annotations of a folder, whatever number of runs wrote it."""

    def __init__(self, directory: paths.PathLike) -> None:
        """Reads the indexes; opens no shard yet.

        Raises:
          UserError: no such folder, or a damaged index.
        """
        self.directory = paths.as_path(directory)
        if not self.directory.is_dir():
            raise UserError(f"{directory}: no such annotation store; run `vilam3-experts annotate` first")
        self._entries = _read_indexes(self.directory)
        self._reset()

    @classmethod
    def open(cls, directory: paths.PathLike) -> AnnotationStore:
        """Same as the constructor."""
        return cls(directory)

    def _reset(self) -> None:
        self._readers: dict[str, ArrayRecordReader] = {}
        self._cache: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # Readers, locks and the download folder belong to one process.
        return {"directory": os.fspath(self.directory), "_entries": self._entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.directory = paths.as_path(state["directory"])
        self._entries = state["_entries"]
        self._reset()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def keys(self) -> Iterator[Key]:
        """Yields every key, in sorted order."""
        return iter(sorted(self._entries))

    def get(self, input_key: str, expert: str, args: str = "") -> Annotation | None:
        """Returns the annotation, or None when there is none.

        Raises:
          UserError: the shard is missing or damaged.
        """
        entry = self._entries.get((input_key, expert, args))
        if entry is None:
            return None
        shard = entry["shard"]
        try:
            with self._lock:
                reader = self._readers.get(shard) or self._open_shard(shard)
                (data,) = reader.read([entry["record"]])
        except (OSError, ValueError, IndexError, RuntimeError) as error:
            raise UserError(
                f"{self.directory / shard}: cannot be read ({error}); delete it with its index and annotate again"
            ) from error
        annotation = Annotation.from_bytes(data)
        if annotation.key != (input_key, expert, args):
            raise UserError(f"{self.directory / shard}: record {entry['record']} is not what its index says")
        return annotation

    def _open_shard(self, shard: str) -> ArrayRecordReader:
        path = self.directory / shard
        if not path.exists():
            raise OSError("no such file")
        local = os.fspath(path)
        if "://" in local:
            # ArrayRecord reads local files only; a shard is fetched once a process.
            self._cache = self._cache or tempfile.TemporaryDirectory(prefix="vilam3-annotations-")
            local = os.path.join(self._cache.name, shard)
            path.copy(local, overwrite=True)
        reader = ArrayRecordReader(local, options="readahead_buffer_size:0,max_parallelism:0")
        self._readers[shard] = reader
        return reader


def _write_shard(directory: Any, name: str, records: Sequence[bytes]) -> None:
    remote = "://" in os.fspath(directory)
    with tempfile.TemporaryDirectory(prefix="vilam3-shard-") as scratch:
        temporary = os.path.join(scratch, name) if remote else os.fspath(directory / f".{name}.partial")
        try:
            # One record a group: looking one up reads nothing else. Planes are compressed already.
            writer = ArrayRecordWriter(temporary, "group_size:1,uncompressed")
            for data in records:
                writer.write(data)
            writer.close()
            if remote:
                paths.as_path(temporary).copy(directory / name, overwrite=True)
            else:
                os.replace(temporary, directory / name)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{directory / name}: cannot be written ({error}); free space or choose another folder"
            ) from error
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)


def _read_indexes(directory: Any) -> dict[Key, dict[str, Any]]:
    """Merges every index of the folder: successes win over failures, later runs over earlier ones."""
    merged: dict[Key, dict[str, Any]] = {}
    names = sorted(p.name for p in directory.iterdir() if p.name.endswith(_INDEX_SUFFIX))
    for name in names:
        if name.startswith("."):
            continue
        path = directory / name
        try:
            index: Mapping[str, Any] = json.loads(paths.read_bytes(path, MAX_RECORD_BYTES))
            if index["schema_version"] != SCHEMA_VERSION:
                raise UserError(
                    f"{path}: schema {index['schema_version']}, this version reads {SCHEMA_VERSION}; "
                    "annotate into a new folder"
                )
            shard = index["shard"]
            if os.path.basename(shard) != shard:
                raise ValueError(f"shard name {shard!r}")
            for e in index["entries"]:
                key = (str(e["input_key"]), str(e["expert"]), str(e["args"]))
                if key in merged and merged[key]["status"] == "ok" and e["status"] != "ok":
                    continue
                merged[key] = {"shard": shard, "record": int(e["record"]), "status": str(e["status"])}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: damaged index ({error}); delete it and annotate again") from error
    return merged
