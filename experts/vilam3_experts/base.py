"""From an expert's raw output to an `Annotation`."""

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


class Stated(NamedTuple):
    """What the file of a picture states: DICOM's code and the body part, or "unknown"."""

    modality: str = UNKNOWN
    body_part: str = UNKNOWN


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertInputs:
    """What one call looks at.

    Attributes:
      items: (role, `Volume` or image uint8 [H, W, 3]) in the order of the expert's roles; the role of a
        single input is "".
      stated: of each picture, in the order of `items`; empty where no file states anything. A volume has its
        own statements.
    """

    items: tuple[tuple[str, Data], ...]
    stated: tuple[Stated, ...] = ()

    @classmethod
    def of(cls, data: Data, stated: Stated | None = None) -> ExpertInputs:
        """A single input."""
        return cls((("", data),), () if stated is None else (stated,))

    @functools.cached_property
    def evidence(self) -> tuple[Evidence, ...]:
        """What speaks for the modality and the body region of each."""
        stated = self.stated or (Stated(),) * len(self.items)
        return tuple(
            Evidence.of(role, data, *said) for (role, data), said in zip(self.items, stated, strict=True)
        )

    @functools.cached_property
    def keys(self) -> tuple[tuple[str, str], ...]:
        """(role, content key) of each."""
        return tuple((role, content_key(data)) for role, data in self.items)

    @property
    def roles(self) -> tuple[str, ...]:
        """Their roles."""
        return tuple(role for role, _ in self.items)

    @property
    def first(self) -> Data:
        """The first input: a label map lies on its grid."""
        return self.items[0][1]

    @property
    def data(self) -> Data | dict[str, Data]:
        """What `Expert.run` is given: the only input, or role to input."""
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
    """The expert has no answer for this input; the message says why."""


@dataclasses.dataclass(frozen=True)
class Output:
    """What an expert returns.

    Attributes:
      probabilities: class name to probability.
      labels: integers [X, Y, Z] on the grid of the input volume, 0 is background.
      label_names: label id to name, for every id in `labels`.
      weights_sha256: instead of the digest of the expert's files.
      verdicts: what the expert itself doubts.
    """

    probabilities: dict[str, float] = dataclasses.field(default_factory=dict)
    labels: np.ndarray | None = None
    label_names: dict[int, str] = dataclasses.field(default_factory=dict)
    weights_sha256: str | None = None
    verdicts: tuple[Verdict, ...] = ()


class Expert(Protocol):
    """What a descriptor's factory builds."""

    def run(self, data: Any, args: str) -> Output:
        """Analyses one volume, one image (uint8 [H, W, 3]), or a dict of roles to volumes.

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


def is_refused(descriptor: Descriptor, inputs: ExpertInputs) -> bool:
    """Whether `annotate_one` would refuse the inputs for what they show, before the expert runs."""
    return refusal(descriptor.card, check_input(descriptor.card, inputs.evidence)) is not None


def annotate_one(
    expert: Expert,
    descriptor: Descriptor,
    inputs: ExpertInputs,
    args: str,
    *,
    weights_sha256: str,
) -> Annotation:
    """Runs an expert on one input. Whatever goes wrong becomes a failed annotation with its reason.

    What the card requires of the input is checked first: the expert is not run where that fails. What it
    requires of the result is checked last. The record holds every verdict.

    Args:
      expert: built by `descriptor.create`.
      descriptor: its descriptor.
      inputs: what it looks at.
      args: already checked arguments.
      weights_sha256: digest of the expert's files.
    """
    keys = inputs.keys
    key = inputs_key(keys)
    start = time.perf_counter()

    def fields() -> dict[str, Any]:
        seconds = time.perf_counter() - start
        return {
            "version": descriptor.version,
            "weights_sha256": weights_sha256,
            "seconds": seconds,
            "inputs": () if inputs.roles == ("",) else keys,
            "verdicts": verdicts,
        }

    verdicts: tuple[Verdict, ...] = ()
    try:
        for _, data in inputs.items:
            if isinstance(data, Volume) != (descriptor.input == "volume"):
                raise ExpertFailure(f"{descriptor.name} reads {descriptor.input}s, and this is none")
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
            key,
            descriptor.name,
            args,
            probabilities=probabilities,
            segments=segments,
            labels=labels,
            **known,
        )
    except (ExpertFailure, UserError) as error:
        reason = str(error)
    except Exception as error:  # a third party's model may raise anything; the loop must go on
        reason = f"{type(error).__name__}: {error}"
    return failed(key, descriptor.name, args, " ".join(reason.split())[:_MAX_REASON], **fields())
