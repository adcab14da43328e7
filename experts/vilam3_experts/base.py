"""From an expert's raw output to an `Annotation`."""

from __future__ import annotations

import dataclasses
import time
from typing import Any, Protocol, cast

import numpy as np
from scipy import ndimage

from vilam3_experts.descriptors import Descriptor
from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.experts.store import Annotation, LabelMap, Segment, failed
from vilam3_jax.data.volumes import Volume
from vilam3_jax.errors import UserError

Data = Volume | np.ndarray
_MAX_REASON = 500


class ExpertFailure(Exception):
    """The expert has no answer for this input; the message says why."""


@dataclasses.dataclass(frozen=True)
class Output:
    """What an expert returns.

    Attributes:
      probabilities: class name to probability.
      labels: integers [X, Y, Z] on the grid of the input volume, 0 is background.
      label_names: label id to name, for every id in `labels`.
      weights_sha256: instead of the digest of the expert's files.
    """

    probabilities: dict[str, float] = dataclasses.field(default_factory=dict)
    labels: np.ndarray | None = None
    label_names: dict[int, str] = dataclasses.field(default_factory=dict)
    weights_sha256: str | None = None


class Expert(Protocol):
    """What a descriptor's factory builds."""

    def run(self, data: Data, args: str) -> Output:
        """Analyses one volume or image ([H, W, 3] uint8).

        Raises:
          ExpertFailure: no answer for this input.
        """
        ...


def content_key(data: Data) -> str:
    """The key under which the annotation of `data` is stored."""
    return data.content_key if isinstance(data, Volume) else image_key(data)


def measure(labels: np.ndarray, names: dict[int, str], affine: np.ndarray) -> tuple[Segment, ...]:
    """Counts voxels, volume, components and bounding box of every label.

    Args:
      labels: integers [X, Y, Z].
      names: label id to name.
      affine: [4, 4], voxel index to millimetres.

    Returns:
      One segment for each label present, by label id. Components are 26-connected.

    Raises:
      ValueError: a label without a name.
    """
    voxel_ml = abs(float(np.linalg.det(np.asarray(affine, np.float64)[:3, :3]))) / 1000.0
    neighbours = np.ones((3, 3, 3), bool)
    segments = []
    for label_id, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        if label_id not in names:
            raise ValueError(f"label {label_id} has no name")
        mask = labels[box] == label_id
        voxels = int(mask.sum())
        _, components = cast(tuple[np.ndarray, int], ndimage.label(mask, neighbours))
        bbox = (*(s.start for s in box), *(s.stop for s in box))
        segments.append(Segment(label_id, names[label_id], voxels, voxels * voxel_ml, int(components), bbox))
    return tuple(segments)


def annotate_one(
    expert: Expert,
    descriptor: Descriptor,
    data: Data,
    args: str,
    *,
    weights_sha256: str,
    key: str | None = None,
) -> Annotation:
    """Runs an expert on one input. Whatever goes wrong becomes a failed annotation with its reason.

    Args:
      expert: built by `descriptor.create`.
      descriptor: its descriptor.
      data: a `Volume`, or an image uint8 [H, W, 3].
      args: already checked arguments.
      weights_sha256: digest of the expert's files.
      key: content key of `data`, if already known.
    """
    key = key or content_key(data)
    start = time.perf_counter()

    def fields() -> dict[str, Any]:
        seconds = time.perf_counter() - start
        return {"version": descriptor.version, "weights_sha256": weights_sha256, "seconds": seconds}

    try:
        if isinstance(data, Volume) != (descriptor.input == "volume"):
            raise ExpertFailure(f"{descriptor.name} reads {descriptor.input}s, and this is none")
        output = expert.run(data, args)
        segments: tuple[Segment, ...] = ()
        labels = None
        if output.labels is not None:
            if not isinstance(data, Volume) or output.labels.shape != data.voxels.shape:
                raise ValueError(f"label map of shape {output.labels.shape} is not on the grid of the input")
            segments = measure(output.labels, output.label_names, data.affine)
            labels = LabelMap.encode(output.labels, data.affine)
        known = fields()
        if output.weights_sha256 is not None:
            known["weights_sha256"] = output.weights_sha256
        return Annotation(
            key,
            descriptor.name,
            args,
            probabilities={name: float(p) for name, p in output.probabilities.items()},
            segments=segments,
            labels=labels,
            **known,
        )
    except (ExpertFailure, UserError) as error:
        reason = str(error)
    except Exception as error:  # a third party's model may raise anything; the loop must go on
        reason = f"{type(error).__name__}: {error}"
    return failed(key, descriptor.name, args, " ".join(reason.split())[:_MAX_REASON], **fields())
