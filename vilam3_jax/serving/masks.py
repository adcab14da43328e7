"""Label maps of experts that an answer offers: their legend, slices and files, kept for a while."""

from __future__ import annotations

import collections
import dataclasses
import secrets
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from vilam3_jax.data.experts.labels import apply_group, component_counts, label_group, merged_volumes
from vilam3_jax.data.experts.overlays import PALETTE
from vilam3_jax.data.experts.record import Annotation, memory_bytes
from vilam3_jax.data.images import encode_png
from vilam3_jax.data.volumes import AXES, slice_2d
from vilam3_jax.serving.errors import bad_request
from vilam3_jax.serving.kept import Kept
from vilam3_jax.serving.viewing import SliceQuery, nifti_bytes

_MAX_BYTES = 1 << 28  # of compressed maps
_DECODED = 2  # maps that stay decompressed


@dataclasses.dataclass(frozen=True, eq=False)
class Mask:
    """A label map of an expert.

    Attributes:
      id: what clients call it.
      annotation: with the label map.
    """

    id: str
    annotation: Annotation


class MaskStore:
    """Label maps of answers, in memory; thread-safe."""

    def __init__(self, *, seconds: float = 3600.0, max_bytes: int = _MAX_BYTES):
        """Maps are forgotten after `seconds`, and the oldest ones beyond `max_bytes`."""
        self._masks = Kept[Mask](
            "mask",
            "it expired, ask again",
            seconds=seconds,
            max_bytes=max_bytes,
            size=lambda mask: memory_bytes(mask.annotation),
        )
        self._decoded: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._masks)

    def add(self, annotation: Annotation, owner: str) -> dict[str, Any] | None:
        """Keeps the map of a result; returns what clients learn of it, or None if it has none.

        Raises `ValueError` for a damaged map.
        """
        if annotation.status != "ok" or annotation.labels is None:
            return None
        name = f"mask-{secrets.token_urlsafe(24)}"
        mask = Mask(name, annotation)
        labels = self._labels(mask)
        self._masks.add(name, mask, owner)
        return {
            "id": name,
            "shape": list(labels.shape),
            "labels": list(_legend(annotation, labels)),
            "largest": {plane: _largest(labels, axis) for plane, axis in AXES.items()},
        }

    def get(self, name: str, owner: str) -> Mask:
        """A mask of an owner; raises `ApiError` (404) without one."""
        return self._masks.get(name, owner)

    def png(self, mask: Mask, query: SliceQuery) -> bytes:
        """A slice in the colours of the legend, RGBA, transparent without a label."""
        labels, axis = self._labels(mask), query.axis or "axial"
        count = labels.shape[AXES[axis]]
        index = count // 2 if query.index is None else query.index
        if index >= count:
            raise bad_request(f"index: there are {axis} slices 0 to {count - 1}", "index")
        plane = slice_2d(labels, AXES[axis], index)
        ids = _ids(mask.annotation)
        table = np.zeros((65536, 4), np.uint8)
        for place, label in enumerate(ids):
            table[label] = (*_colour(place), 255)
        return encode_png(table[plane])

    def nifti(self, mask: Mask) -> bytes:
        """The map as a gzipped NIfTI file."""
        affine = mask.annotation.label_affine
        assert affine is not None  # see add
        labels = self._labels(mask)
        kind = np.uint8 if int(labels.max(initial=0)) < 256 else np.uint16
        return nifti_bytes(labels.astype(kind), affine, packed=True)

    def sweep(self) -> None:
        """Forgets what expired."""
        self._masks.sweep()
        with self._lock:
            for name in [name for name in self._decoded if name not in self._masks]:
                del self._decoded[name]

    def _labels(self, mask: Mask) -> np.ndarray:
        """The labels that the expert's argument selects, [X, Y, Z]."""
        with self._lock:
            if (found := self._decoded.get(mask.id)) is not None:
                self._decoded.move_to_end(mask.id)
                return found
        annotation = mask.annotation
        labels = apply_group(label_group(annotation.expert, annotation.args), annotation.label_map())
        with self._lock:
            self._decoded[mask.id] = labels
            while len(self._decoded) > _DECODED:
                self._decoded.popitem(last=False)
        return labels


def _names(annotation: Annotation) -> dict[int, str]:
    group = label_group(annotation.expert, annotation.args)
    return dict(group.names) if group else annotation.label_names


def _ids(annotation: Annotation) -> list[int]:
    """The labels of a result in the order of their colours."""
    return sorted(merged_volumes(annotation))


def _colour(place: int) -> tuple[int, int, int]:
    red, green, blue = (round(255 * part) for part in PALETTE[place % len(PALETTE)][1])
    return red, green, blue


def _legend(annotation: Annotation, labels: np.ndarray) -> Iterator[dict[str, Any]]:
    """The labels with their colours. Unlike in the model's overlay, a label has one colour on all slices."""
    names, volumes, components = (
        _names(annotation),
        merged_volumes(annotation),
        component_counts(annotation),
    )
    size = max(volumes, default=0) + 1
    # By planes: counting converts to 8 bytes a voxel.
    voxels = np.sum([np.bincount(plane.ravel(), minlength=size)[:size] for plane in labels], axis=0)
    for place, label in enumerate(_ids(annotation)):
        yield {
            "id": label,
            "name": names.get(label, f"label {label}"),
            "colour": "#{:02x}{:02x}{:02x}".format(*_colour(place)),
            "volume_ml": volumes[label] if np.isfinite(volumes[label]) else None,
            "components": components[label],
            "voxels": int(voxels[label]),
        }


def _largest(labels: np.ndarray, axis: int) -> int:
    """The slice with the most labelled voxels."""
    others = tuple(other for other in range(3) if other != axis)
    return int(np.argmax(np.count_nonzero(labels, axis=others)))
