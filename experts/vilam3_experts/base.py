"""The interface of experts, and the conversion of their output to an `Annotation`."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from scipy import ndimage

from vilam3_experts.descriptors import Descriptor
from vilam3_jax.data.content_keys import image_key, inputs_key
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment, Verdict, failed
from vilam3_jax.data.experts.verify import Evidence, Finding, check_input, check_result, refusal
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.volumes import Volume
from vilam3_jax.errors import UserError

Data = Volume | np.ndarray
_MAX_REASON = 500


class ImageMetadata(NamedTuple):
    """Metadata of an image file: DICOM's modality code and the body part, or "unknown"."""

    modality: str = UNKNOWN
    body_part: str = UNKNOWN


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertInputs:
    """The inputs of one call.

    `items` are (role, `Volume` or image uint8 [H, W, 3]) in the order of the expert's roles, with role '' for
    a single input. `metadata` is that of each image, or empty; a `Volume` has its own.
    """

    items: tuple[tuple[str, Data], ...]
    metadata: tuple[ImageMetadata, ...] = ()

    @classmethod
    def of(cls, data: Data, metadata: ImageMetadata | None = None) -> ExpertInputs:
        """A single input."""
        return cls((("", data),), () if metadata is None else (metadata,))

    @functools.cached_property
    def evidence(self) -> tuple[Evidence, ...]:
        """Evidence for the modality and body region of each input."""
        metadata = self.metadata or (ImageMetadata(),) * len(self.items)
        return tuple(
            Evidence.of(role, data, *stated)
            for (role, data), stated in zip(self.items, metadata, strict=True)
        )

    @functools.cached_property
    def keys(self) -> tuple[tuple[str, str], ...]:
        """(role, content key) of each input."""
        return tuple(
            (role, data.content_key if isinstance(data, Volume) else image_key(data))
            for role, data in self.items
        )

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for role, _ in self.items)

    @property
    def first(self) -> Data:
        """The first input, whose grid is that of the label map."""
        return self.items[0][1]

    @property
    def data(self) -> Data | dict[str, Data]:
        """Argument of `Expert.run`, either the single input or a dict of role to input."""
        return self.first if self.roles == ("",) else dict(self.items)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the readers assumed, repaired or skipped."""
        return tuple(
            f"{role}: {note}" if role else note
            for role, data in self.items
            if isinstance(data, Volume)
            for note in data.notes
        )


class ExpertFailure(Exception):
    """The expert has no answer for this input; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Output:
    """The answer of an expert.

    `probabilities` are by class name. `labels` are integers [X, Y, Z] on the grid of the input volume, 0 is
    background, and `label_names` has a name for every id in them. `weights_sha256` overrides the digest of
    the expert's files. `verdicts` are doubts of the expert itself.
    """

    probabilities: dict[str, float] = dataclasses.field(default_factory=dict)
    labels: np.ndarray | None = None
    label_names: dict[int, str] = dataclasses.field(default_factory=dict)
    weights_sha256: str | None = None
    verdicts: tuple[Verdict, ...] = ()


class Expert(Protocol):
    """The object that a descriptor's factory builds."""

    def run(self, data: Any, args: str) -> Output:
        """Analyses one volume, one image (uint8 [H, W, 3]), or a dict of roles to volumes.

        Raises `ExpertFailure` if there is no answer for this input.
        """
        ...


@dataclasses.dataclass(frozen=True)
class KnownAnswer:
    """Stands in for an expert whose answer is known, to turn that into a record."""

    answer: Output | ExpertFailure

    def run(self, data: Any, args: str) -> Output:
        """See `Expert.run`."""
        del data, args
        if isinstance(self.answer, ExpertFailure):
            raise self.answer
        return self.answer


def measure(labels: np.ndarray, names: dict[int, str], affine: np.ndarray) -> tuple[Segment, ...]:
    """Voxel count, volume, components and bounding box of every label in integers [X, Y, Z], by label id.

    `affine` is [4, 4], voxel index to millimetres. Components are 26-connected. Raises `ValueError` for a
    label without a name.
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


def is_refused(descriptor: Descriptor, inputs: ExpertInputs) -> bool:
    """Whether the input checks of the card fail, so that `annotate_one` would not run the expert."""
    return refusal(descriptor.card, check_input(descriptor.card, inputs.evidence)) is not None


def annotate_one(
    expert: Expert, descriptor: Descriptor, inputs: ExpertInputs, args: str, *, weights_sha256: str
) -> Annotation:
    """Runs an expert on one input. Any error becomes a failed annotation with its reason.

    The card's input checks run before the expert, which is not called if they fail; its result checks run
    after. The record holds every verdict. `args` are validated, and `weights_sha256` is the digest of the
    expert's files unless the expert returns one.
    """
    keys = inputs.keys
    key = inputs_key(keys)
    start = time.perf_counter()

    def fields() -> dict[str, Any]:
        return {
            "version": descriptor.version,
            "weights_sha256": weights_sha256,
            "seconds": time.perf_counter() - start,
            "inputs": () if inputs.roles == ("",) else keys,
            "verdicts": verdicts,
        }

    verdicts: tuple[Verdict, ...] = ()
    try:
        for _, data in inputs.items:
            if isinstance(data, Volume) != (descriptor.input == "volume"):
                other = "image" if descriptor.input == "volume" else "volume"
                raise ExpertFailure(f"{descriptor.name} reads {descriptor.input}s, not {other}s")
        if inputs.roles != descriptor.card.roles:
            wanted = ", ".join(descriptor.card.roles) or "one scan"
            raise ExpertFailure(f"{descriptor.name} reads {wanted}, and was given {', '.join(inputs.roles)}")
        verdicts = check_input(descriptor.card, inputs.evidence)
        if reason := refusal(descriptor.card, verdicts):
            raise ExpertFailure(reason)
        output = expert.run(inputs.data, args)
        segments: tuple[Segment, ...] = ()
        labels = affine = None
        if output.labels is not None:
            first = inputs.first
            if not isinstance(first, Volume) or output.labels.shape != first.voxels.shape:
                raise ValueError(f"label map of shape {output.labels.shape} is not on the grid of the input")
            affine = first.affine
            segments = measure(output.labels, output.label_names, affine)
            labels = LabelMap.encode(output.labels, affine)
        probabilities = {name: float(p) for name, p in output.probabilities.items()}
        finding = Finding(
            descriptor.name, args, inputs.evidence[0], probabilities, segments, output.labels, affine
        )
        verdicts += output.verdicts + check_result(descriptor.card.checks, finding)
        known = fields()
        if output.weights_sha256 is not None:
            known["weights_sha256"] = output.weights_sha256
        return Annotation(
            key, descriptor.name, args, probabilities=probabilities, segments=segments, labels=labels, **known
        )
    except (ExpertFailure, UserError) as error:
        reason = str(error)
    except Exception as error:  # third-party models may raise anything
        reason = f"{type(error).__name__}: {error}"
    return failed(key, descriptor.name, args, " ".join(reason.split())[:_MAX_REASON], **fields())
