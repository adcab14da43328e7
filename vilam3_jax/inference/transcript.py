"""The record of a dialogue: its turns, the experts' calls and results, probabilities and times."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import math
from typing import Any

import numpy as np

from vilam3_jax.data.experts.exchange import Result
from vilam3_jax.data.experts.grammar import Call
from vilam3_jax.data.experts.record import Annotation, LabelMap, Verdict
from vilam3_jax.data.experts.store import content_sha256
from vilam3_jax.inference.images import Scan

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Generated:
    """How the model wrote a turn.

    Attributes:
      tokens: number of tokens, without the one that ended the turn.
      log_prob: sum of their natural log-probabilities; None if unknown.
      seconds: from the end of the turn before, waiting for a free row included.
    """

    tokens: int
    log_prob: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class Message:
    """A turn of a finished dialogue, with the images of its markers.

    Attributes:
      role: `system`, `user`, `assistant` or `expert`.
      text: with one `<image>` per image.
      images: uint8 [H, W, 3], as shown to the model.
      time: Unix time at which the turn was complete; 0.0 if unknown, as in a dialogue that a client sent.
      generated: of a turn that the model wrote; None otherwise.
    """

    role: str
    text: str
    images: tuple[np.ndarray, ...] = dataclasses.field(default=(), repr=False)
    time: float = dataclasses.field(default=0.0, compare=False)
    generated: Generated | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class ExpertCall:
    """A call that was executed, or refused.

    Attributes:
      call: the call, with the argument as on the expert's card.
      annotation: the result; a failed one if the call was refused.
      accepted: whether the cards list the expert with this argument.
      known: whether the result is that of an earlier call in the dialogue, so that the expert did not run.
      turn: index of the expert's turn in `Transcript.turns`.
      time: Unix time of the result.
      seconds: from the call to the result.
    """

    call: Call
    annotation: Annotation
    accepted: bool
    known: bool
    turn: int
    time: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Transcript:
    """A finished dialogue.

    Attributes:
      turns: in order.
      answer: the last turn of the model.
      annotations: the expert results in the order of the calls, failed ones included.
      trigger_text: the last turn of the model whose calls were executed, or None.
      truncated: whether the answer ended at the token limit.
      cut: text after expert calls, which was removed from the dialogue.
      unexecuted_calls: calls in removed text, in the answer, or without experts.
      first_turn: index of the user's last question; the turns before it are those of an earlier transcript.
      scans: what the questions are about.
      results: calls and results of the whole dialogue, which a follow-up question knows.
      cards: text of the experts' cards, with which the first turn begins; "" without experts.
      calls: the executed and refused calls since the last question, in order.
      asked_at: Unix time of the last question; 0.0 if unknown.
      seconds: from the last question to the answer.
    """

    turns: tuple[Message, ...]
    answer: str
    annotations: tuple[Annotation, ...] = dataclasses.field(default=(), repr=False)
    trigger_text: str | None = None
    truncated: bool = False
    cut: tuple[str, ...] = ()
    unexecuted_calls: tuple[Call, ...] = ()
    first_turn: int = 0
    scans: tuple[Scan, ...] = dataclasses.field(default=(), repr=False)
    results: tuple[tuple[Call, Result], ...] = dataclasses.field(default=(), repr=False)
    cards: str = dataclasses.field(default="", repr=False)
    calls: tuple[ExpertCall, ...] = dataclasses.field(default=(), compare=False, repr=False)
    asked_at: float = dataclasses.field(default=0.0, compare=False)
    seconds: float = dataclasses.field(default=0.0, compare=False)

    @property
    def asked(self) -> str:
        """The user's last turn, without cards."""
        return self.turns[self.first_turn].text.removeprefix(self.cards)

    @property
    def annotation(self) -> Annotation | None:
        """The last expert result, a failure included, or None."""
        return self.annotations[-1] if self.annotations else None

    @property
    def trigger(self) -> tuple[str, str] | None:
        """(expert, arguments) of the last executed call, or None."""
        last = self.annotation
        return None if last is None else (last.expert, last.args)

    @property
    def prompt(self) -> str:
        """Text of the first turn, cards included."""
        return self.turns[0].text

    @property
    def expert_text(self) -> str | None:
        """The last expert turn, which ends with the question, or None."""
        return next((turn.text for turn in reversed(self.turns) if turn.role == "expert"), None)

    @property
    def overlay_result(self) -> Result | None:
        """The last result about the scans that is shown as an overlay, or None."""
        shown = [result for _, result in self.results if result.shows_overlay]
        return shown[-1] if shown else None

    @property
    def overlay(self) -> np.ndarray | None:
        """The overlay of `overlay_result`, uint8 [H, W, 3], or None."""
        if self.overlay_result is None:
            return None
        return [image for turn in self.turns if turn.role == "expert" for image in turn.images][-1]

    def to_dict(self, *, content: bool = True) -> dict[str, Any]:
        """The dialogue since the last question as JSON values; `docs/asking.md` describes the keys.

        Numbers that are not finite become None, and times ISO 8601 in UTC. Images and label maps are
        represented by their SHA-256.

        Args:
          content: whether the texts of turns, messages and reasons are included. Without them, what remains
            are numbers, digests, the experts' names for labels and classes, and names and arguments of calls
            that the cards list.
        """
        turns = self.turns[self.first_turn :]
        values = {
            "schema_version": SCHEMA_VERSION,
            "asked_at": iso(self.asked_at),
            "seconds": _number(self.seconds),
            "truncated": self.truncated,
            "earlier_turns": self.first_turn,
            "scans": [_scan(scan, content) for scan in self.scans],
            "turns": [_turn(turn, content) for turn in turns],
            "calls": [_call(one, self.first_turn, content) for one in self.calls],
        }
        if not content:
            removed = sum(map(len, self.cut))
            return {**values, "cut_characters": removed, "unexecuted_calls": len(self.unexecuted_calls)}
        not_made = [str(call) for call in self.unexecuted_calls]
        return {**values, "answer": self.answer, "cut": list(self.cut), "unexecuted_calls": not_made}


def _scan(scan: Scan, content: bool) -> dict[str, Any]:
    # The role of a sequence and the description of a slice hold nothing of a header.
    values = {
        "input_key": scan.input_key,
        "role": scan.role,
        "modality": scan.modality,
        "description": scan.description,
    }
    return {**values, "notes": list(scan.notes)} if content else values


def _turn(turn: Message, content: bool) -> dict[str, Any]:
    made = turn.generated
    return {
        "role": turn.role,
        "text" if content else "characters": turn.text if content else len(turn.text),
        "images": [_image(image) for image in turn.images],
        "time": iso(turn.time),
        "tokens": None if made is None else made.tokens,
        "log_prob": None if made is None else _number(made.log_prob),
        "seconds": None if made is None else _number(made.seconds),
    }


def _image(image: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()
    return {"height": image.shape[0], "width": image.shape[1], "sha256": digest}


def _call(made: ExpertCall, first_turn: int, content: bool) -> dict[str, Any]:
    head = {
        "accepted": made.accepted,
        "known": made.known,
        "turn": made.turn - first_turn,
        "time": iso(made.time),
        "seconds": _number(made.seconds),
    }
    # A call that was refused may be any text of the model.
    named = content or made.accepted
    values = call_values(made.annotation, content=content)
    return {**head, **values, **({} if named else {"expert": None, "args": None, "record_sha256": None})}


def call_values(found: Annotation, *, content: bool) -> dict[str, Any]:
    """An expert's result as JSON values; see `Transcript.to_dict`."""
    values = {
        "expert": found.expert,
        "args": found.args,
        "status": found.status,
        "input_key": found.input_key,
        "version": found.version,
        "weights_sha256": found.weights_sha256,
        "record_sha256": content_sha256(found),
        "expert_seconds": _number(found.seconds),
        "probabilities": {name: _number(value) for name, value in found.probabilities.items()},
        "calibrated": {name: _number(value) for name, value in found.calibrated.items()},
        "segments": [
            {
                "label": one.label_id,
                "name": one.name,
                "voxels": one.voxels,
                "volume_ml": _number(one.volume_ml),
                "components": one.components,
            }
            for one in found.segments
        ],
        "mask": None if found.labels is None else _mask(found.labels, found),
        "verdicts": [_verdict(one, content) for one in found.verdicts],
    }
    return {**values, "reason": found.reason} if content else values


def _mask(labels: LabelMap, found: Annotation) -> dict[str, Any]:
    return {
        "shape": list(labels.shape),
        "labelled_voxels": sum(one.voxels for one in found.segments),
        "sha256": hashlib.sha256(labels.blob).hexdigest(),
    }


def _verdict(verdict: Verdict, content: bool) -> dict[str, Any]:
    values = {
        "check": verdict.check,
        "status": verdict.status,
        "stage": verdict.stage,
        "subject": verdict.subject,
        "value": _number(verdict.value),
        "low": _number(verdict.low),
        "high": _number(verdict.high),
    }
    return {**values, "message": verdict.message} if content else values


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def iso(time: float) -> str | None:
    """A Unix time as ISO 8601 in UTC; None for 0.0, which is unknown."""
    if not time:
        return None
    return datetime.datetime.fromtimestamp(time, datetime.UTC).isoformat(timespec="milliseconds")
