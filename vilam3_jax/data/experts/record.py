"""The record of an expert's result on one image or volume.

An `Annotation` is a typed record with a schema version. It holds probabilities, the lossless label map and
the measurements of every segment. Texts and overlays are rendered from it at load time, never stored.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import numbers
import zlib
from typing import Any, cast

import msgpack
import numpy as np

from vilam3_jax.data import content_keys
from vilam3_jax.errors import UserError

SCHEMA_VERSION = 3
MAX_RECORD_BYTES = 1 << 30
MAX_LABEL_VOXELS = 1 << 29
VERDICTS = ("pass", "warn", "fail", "unknown")
_MAX_ML = 1e9  # a cube of 10 m
THRESHOLD = 0.5  # a class with a higher probability counts as present
_LABEL_DTYPES = ("uint8", "uint16")

Key = tuple[str, str, str]
"""(input key, see `content_keys.inputs_key`; expert name; expert arguments)."""


def _check_types(record: Any, kinds: type | tuple[type, ...], *names: str) -> None:
    """Raises `ValueError` if a field has another type: records may come from other programs."""
    for name in names:
        if not isinstance(getattr(record, name), kinds):
            raise ValueError(f"{name} of the type {type(getattr(record, name)).__name__}")


@dataclasses.dataclass(frozen=True)
class Segment:
    """One label of a label map, measured over the whole volume.

    `label_id` is the label's value, > 0, and `name` the expert's name for it. `components` is the number of
    26-connected components. `bbox` is (x0, y0, z0, x1, y1, z1) in voxels, upper bounds exclusive.
    """

    label_id: int
    name: str
    voxels: int
    volume_ml: float
    components: int
    bbox: tuple[int, int, int, int, int, int]

    def __post_init__(self) -> None:
        _check_types(self, str, "name")
        counts = (self.label_id, self.voxels, self.components, *self.bbox)
        if len(self.bbox) != 6 or any(not isinstance(n, numbers.Integral) or n < 0 for n in counts):
            raise ValueError(f"segment {self.label_id!r}: its counts must be integers from 0")
        _check_types(self, numbers.Real, "volume_ml")
        if not 0 <= self.volume_ml <= _MAX_ML:
            raise ValueError(f"segment {self.label_id}: its volume is {self.volume_ml} ml")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of one check."""

    check: str  # kind of the check, such as `modality` or `volume_ml`
    status: str  # 'pass', 'warn' (doubtful), 'fail' (implausible) or 'unknown' (no evidence)
    stage: str = "after"  # 'before' for checks of the input, 'after' for checks of the result
    subject: str = ""  # label or class that was checked; '' for the whole
    value: float | None = None  # measured value in the unit of the check; None if nothing was measured
    low: float | None = None  # plausible range, with high; None for no bound
    high: float | None = None
    message: str = ""  # a sentence for people and the model, without identifiers

    def __post_init__(self) -> None:
        if self.status not in VERDICTS:
            raise ValueError(f"verdict {self.status!r}, expected one of {VERDICTS}")
        if self.stage not in ("before", "after"):
            raise ValueError(f"stage {self.stage!r}, expected 'before' or 'after'")
        _check_types(self, str, "check", "subject", "message")
        _check_types(self, (numbers.Real, type(None)), "value", "low", "high")


@dataclasses.dataclass(frozen=True)
class Disagreement:
    """A contradiction by another expert (`expert`, `args`, `version`) on the same input."""

    expert: str
    args: str
    version: str
    subject: str  # label or class that both report
    measure: str  # `dice` or `probability difference`
    value: float

    def __post_init__(self) -> None:
        _check_types(self, str, "expert", "args", "version", "subject", "measure")
        _check_types(self, numbers.Real, "value")


@dataclasses.dataclass(frozen=True)
class LabelMap:
    """A label volume compressed plane by plane along axis 2.

    Attributes:
      shape: (X, Y, Z), the grid of the canonical (RAS) volume.
      dtype: 'uint8' or 'uint16'.
      affine: 16 floats in row-major order, voxel index to RAS millimetres.
      offsets: Z + 1 positions in `blob`; plane z is `blob[offsets[z]:offsets[z + 1]]`.
      blob: one zlib stream per plane, C order of [X, Y], little endian.
    """

    shape: tuple[int, int, int]
    dtype: str
    affine: tuple[float, ...]
    offsets: tuple[int, ...]
    blob: bytes

    def __post_init__(self) -> None:
        _check_types(self, bytes, "blob")
        if not all(isinstance(n, numbers.Integral) for n in (*self.shape, *self.offsets)):
            raise ValueError("label map with a shape or offsets that are no integers")
        if len(self.shape) != 3 or min(self.shape) < 1 or math.prod(self.shape) > MAX_LABEL_VOXELS:
            raise ValueError(f"label map of shape {self.shape}")
        if self.dtype not in _LABEL_DTYPES:
            raise ValueError(f"label map of dtype {self.dtype!r}, expected one of {_LABEL_DTYPES}")
        if len(self.affine) != 16 or not all(math.isfinite(v) for v in self.affine):
            raise ValueError("label map affine must be 16 finite numbers")
        ends = self.offsets
        if len(ends) != self.shape[2] + 1 or ends[0] != 0 or ends[-1] != len(self.blob):
            raise ValueError("label map offsets do not fit its planes")
        if any(a > b for a, b in itertools.pairwise(ends)):
            raise ValueError("label map offsets are not in order")

    @classmethod
    def encode(cls, labels: np.ndarray, affine: np.ndarray) -> LabelMap:
        """Compresses `labels`, [X, Y, Z] integers from 0 to 65535; raises `ValueError` for anything else."""
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
        x, y, z = labels.shape
        return cls((int(x), int(y), int(z)), dtype, flat, offsets, b"".join(planes))

    def plane(self, z: int) -> np.ndarray:
        """Decodes plane `z` along axis 2, [X, Y], and no other plane.

        Raises `IndexError` outside the map, `ValueError` for damaged bytes.
        """
        if not 0 <= z < self.shape[2]:
            raise IndexError(f"plane {z} of a label map with {self.shape[2]} planes")
        size = self.shape[0] * self.shape[1] * np.dtype(self.dtype).itemsize
        stream = zlib.decompressobj()
        try:
            # The bound protects against decompression bombs.
            raw = stream.decompress(self.blob[self.offsets[z] : self.offsets[z + 1]], size + 1)
        except zlib.error as error:
            raise ValueError(f"plane {z} of the label map is damaged: {error}") from error
        if len(raw) != size:
            raise ValueError(f"plane {z} of the label map holds {len(raw)} bytes, expected {size}")
        little = np.dtype(self.dtype).newbyteorder("<")
        return np.frombuffer(raw, little).reshape(self.shape[:2]).astype(self.dtype)

    def decode(self) -> np.ndarray:
        """Decodes the whole map, [X, Y, Z], uint8 or uint16."""
        out = np.empty(self.shape, self.dtype)
        for z in range(self.shape[2]):
            out[:, :, z] = self.plane(z)
        return out


@dataclasses.dataclass(frozen=True)
class Annotation:
    """One expert's result on one input.

    Attributes:
      input_key: `content_keys.inputs_key` of the input (SHA-256, hex): the content key of one decoded image
        or volume, or the combined key of several.
      expert: expert name as on its card.
      args: expert arguments, '' for none.
      status: 'ok' or 'failed'.
      reason: reason of the failure; '' when ok.
      version: expert version.
      weights_sha256: hash of the expert's weights, '' if it has none.
      probabilities: class name to probability.
      segments: labels found in the whole volume.
      labels: compressed label map, or None.
      seconds: run time of the expert.
      verdicts: outcomes of the checks of input and result.
      calibrated: class name to calibrated probability; empty without a calibration.
      calibration: method and digest of the calibration, '' for none.
      disagreements: contradictions by other experts on the same input.
      inputs: ordered (role, content key) pairs of several inputs; empty for a single one.
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
    verdicts: tuple[Verdict, ...] = ()
    calibrated: dict[str, float] = dataclasses.field(default_factory=dict)
    calibration: str = ""
    disagreements: tuple[Disagreement, ...] = ()
    inputs: tuple[tuple[str, str], ...] = ()
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        texts = ("input_key", "expert", "args", "reason", "version", "weights_sha256", "calibration")
        _check_types(self, str, *texts)
        _check_types(self, numbers.Real, "seconds")
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"run time of {self.seconds} s")
        if self.status not in ("ok", "failed"):
            raise ValueError(f"status {self.status!r}, expected 'ok' or 'failed'")
        if self.status == "failed" and not self.reason:
            raise ValueError("a failed annotation needs its reason")
        if not self.input_key or not self.expert:
            raise ValueError("input_key and expert must not be empty")
        if self.inputs and content_keys.inputs_key(self.inputs) != self.input_key:
            raise ValueError("input_key is not the key of the inputs")
        for name, value in (*self.probabilities.items(), *self.calibrated.items()):
            if not isinstance(name, str) or not 0.0 <= value <= 1.0:
                raise ValueError(f"probability of {name!r} is {value}")
        ids = [s.label_id for s in self.segments]
        if len(set(ids)) != len(ids) or any(i < 1 for i in ids):
            raise ValueError(f"segment label ids must be distinct and positive, got {ids}")

    @property
    def key(self) -> Key:
        return (self.input_key, self.expert, self.args)

    @property
    def label_shape(self) -> tuple[int, int, int] | None:
        """(X, Y, Z) of the label map, or None."""
        return self.labels.shape if self.labels else None

    @property
    def label_affine(self) -> np.ndarray | None:
        """float64 [4, 4], voxel index to RAS millimetres; None without a label map."""
        return np.array(self.labels.affine).reshape(4, 4) if self.labels else None

    @property
    def label_names(self) -> dict[int, str]:
        """Label id to name of the labels found in the volume."""
        return {s.label_id: s.name for s in self.segments}

    def label_map(self) -> np.ndarray:
        """Decodes the label map, uint8 or uint16 [X, Y, Z]; raises `ValueError` if there is none."""
        return self._need_labels().decode()

    def label_slice(self, axis: int, index: int) -> np.ndarray:
        """Decodes one plane of the label map, in voxel order (not display orientation).

        Axis 2 decompresses a single plane; axes 0 and 1 decompress the whole map. Raises `ValueError`
        without a label map or for a wrong axis, `IndexError` outside the map.
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
        return cast(bytes, msgpack.packb(dataclasses.asdict(self)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Annotation:
        """Reads the output of `to_bytes`; raises `UserError` for damaged bytes or another schema."""
        if len(data) > MAX_RECORD_BYTES:
            raise UserError(f"annotation record of {len(data)} bytes, the limit is {MAX_RECORD_BYTES}")
        try:
            fields = msgpack.unpackb(data, raw=False)
            found = fields["schema_version"]
            if found != SCHEMA_VERSION:
                raise UserError(
                    f"annotation record has schema {found}, this version reads {SCHEMA_VERSION}; "
                    "annotate again or upgrade vilam3-jax"
                )
            fields["segments"] = tuple(Segment(**{**s, "bbox": tuple(s["bbox"])}) for s in fields["segments"])
            fields["verdicts"] = tuple(Verdict(**v) for v in fields["verdicts"])
            fields["disagreements"] = tuple(Disagreement(**d) for d in fields["disagreements"])
            fields["inputs"] = tuple((role, key) for role, key in fields["inputs"])
            if fields["labels"] is not None:
                labels = fields["labels"]
                for name in ("shape", "affine", "offsets"):
                    labels[name] = tuple(labels[name])
                fields["labels"] = LabelMap(**labels)
            return cls(**fields)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
            raise UserError(f"annotation record is damaged ({error}); annotate this input again") from error


def failed(input_key: str, expert: str, args: str, reason: str, **fields: Any) -> Annotation:
    """Returns a failed annotation."""
    return Annotation(input_key, expert, args, status="failed", reason=reason or "no reason given", **fields)


def memory_bytes(annotation: Annotation | None) -> int:
    """Approximate size of a record in memory, for caches."""
    return 1024 + (len(annotation.labels.blob) if annotation and annotation.labels else 0)


def segments_on_slice(annotation: Annotation, axis: int, index: int) -> list[tuple[int, str, int]]:
    """(label id, name, voxels on the slice) of the named labels; raises as `Annotation.label_slice`."""
    names = annotation.label_names
    counts = np.bincount(annotation.label_slice(axis, index).ravel())  # at most 65536, so no sort is needed
    return [(int(i), names[int(i)], int(counts[i])) for i in np.flatnonzero(counts) if int(i) in names]
