"""The live expert host: answers requests over a pipe, so that the model's process needs no torch.

The frame format and the client are in `vilam3_jax.data.experts.host_client`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import BinaryIO

from vilam3_experts import descriptors as registry
from vilam3_experts.audit import AuditLog
from vilam3_experts.base import Data, Expert, ExpertInputs, annotate_one
from vilam3_experts.calibrate import Calibration
from vilam3_experts.engine.memory import RetrySmaller
from vilam3_experts.engine.worker import create_expert
from vilam3_experts.weights import Weights, load_weights
from vilam3_jax.data.experts.host_client import FrameError, Message, read_frame, write_frame
from vilam3_jax.data.experts.store import Annotation
from vilam3_jax.data.images import decode_image
from vilam3_jax.data.volumes import VolumeSource
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths


class Host:
    """Builds each expert at its first request and keeps it."""

    def __init__(
        self,
        weights: paths.PathLike | None,
        audit: AuditLog | None = None,
        calibrations: Sequence[Calibration] = (),
    ) -> None:
        """Takes the folder of the model files, the audit log, and at most one calibration per expert."""
        self._folder, self._audit = weights, audit
        self._calibrations = {one.expert: one for one in calibrations}
        if len(self._calibrations) != len(calibrations):
            raise UserError("two calibrations are for the same expert; give one of them")
        self._experts: dict[str, tuple[Expert, Weights]] = {}

    def answer(self, request: Message) -> Message:
        """Turns a request {id, expert, args, inputs} into {id, annotation | error}."""
        number = request.get("id")
        try:
            return {"id": number, "annotation": self._annotate(request).to_bytes()}
        except UserError as error:
            return {"id": number, "error": str(error)}
        except Exception as error:  # no request may end the host
            return {"id": number, "error": f"{type(error).__name__}: {error}"}

    def _annotate(self, request: Message) -> Annotation:
        descriptor = registry.get(str(request.get("expert")))
        args = descriptor.check_args(request.get("args"))
        inputs = ExpertInputs(tuple(map(_read, request.get("inputs") or ())))
        if not inputs.items:
            raise UserError("a request without inputs; give a volume or image_bytes")
        if descriptor.name not in self._experts:
            weights = load_weights(descriptor, self._folder)
            self._experts[descriptor.name] = (RetrySmaller(create_expert(descriptor, weights)), weights)
        expert, weights = self._experts[descriptor.name]
        annotation = annotate_one(expert, descriptor, inputs, args, weights_sha256=weights.sha256)
        if self._audit is not None:
            self._audit.append(annotation)  # raises before an unlogged answer is returned
        calibration = self._calibrations.get(descriptor.name)
        if calibration is None or annotation.status == "failed":
            return annotation
        return calibration.apply(annotation)


def _read(item: Message) -> tuple[str, Data]:
    """Reads one input of a request, {role, volume | image_bytes}."""
    volume, image = item.get("volume"), item.get("image_bytes")
    if (volume is None) == (image is None):
        raise UserError("an input needs either volume or image_bytes")
    data = VolumeSource(**volume).read() if volume is not None else decode_image(item["image_bytes"])
    return str(item.get("role", "")), data


def serve(
    weights: paths.PathLike | None,
    source: BinaryIO,
    sink: BinaryIO,
    audit: paths.PathLike | None = None,
    calibrations: Sequence[Calibration] = (),
) -> int:
    """Answers frames from `source` on `sink` until `source` ends; logs the calls in the folder `audit`.

    Returns 0, or 1 after a malformed frame, because the following frames cannot be located.
    """
    with contextlib.nullcontext() if audit is None else AuditLog(audit) as log:
        host = Host(weights, log, calibrations)
        while True:
            try:
                request = read_frame(source)
            except FrameError as error:
                write_frame(sink, {"id": None, "error": str(error)})
                return 1
            if request is None:
                return 0
            write_frame(sink, host.answer(request))
