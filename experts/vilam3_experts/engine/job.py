"""What a run is, what goes to a worker and what comes back."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from vilam3_experts.calibrate import Calibration
from vilam3_experts.descriptors import Descriptor
from vilam3_experts.inputs import Input
from vilam3_jax.errors import UnavailableError, UserError

ATTEMPTS = 3  # how often one input may end its process before it is given up

Status = Literal["annotated", "skipped", "failed", "unreadable", "unavailable", "planned"]


@dataclasses.dataclass(frozen=True)
class Work:
    """A run, as every process of it knows it.

    Attributes:
      descriptor: the expert.
      args: its arguments, already checked.
      weights: folder of the model files.
      weights_sha256: their digest.
      out: the annotation store.
      audit: folder of the audit log.
      retry_failed: run again where the store holds a failure.
      batch: how many inputs an expert that offers `run_batch` is given at once.
      timeout: seconds that one input may take, decoding included; None for no limit.
      dry_run: tell what would be run; call nothing, write nothing.
      keep_records: outcomes carry their records.
      calibration: what records are calibrated with before they are stored; the audit log has what the expert
        said.
    """

    descriptor: Descriptor
    args: str
    weights: str | None
    weights_sha256: str
    out: str
    audit: str | None = None
    retry_failed: bool = False
    batch: int = 1
    timeout: float | None = None
    dry_run: bool = False
    keep_records: bool = False
    calibration: Calibration | None = None


class Item(NamedTuple):
    """One input, with its number in the run."""

    number: int
    input: Input


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one input.

    Attributes:
      number: of the item.
      name: of the input.
      status: `annotated`; `skipped`: stored already; `failed`: stored with its reason; `unreadable`: has no
        content key, so nothing can be stored; `unavailable`: could not be read now, the next run may;
        `planned`: would be run.
      reason: why it is not annotated.
      notes: what the readers assumed, repaired or skipped.
      record: serialised `Annotation`, or None.
      key: of the input, '' if it is not to be remembered for its files.
      mark: `known.fingerprint` of its files, b'' likewise.
    """

    number: int
    name: str
    status: Status
    reason: str = ""
    notes: tuple[str, ...] = ()
    record: bytes | None = None
    key: str = ""
    mark: bytes = b""


def fatal(code: int, message: str) -> UserError:
    """The error that ends a run, from what a worker told of it."""
    return (UnavailableError if code == UnavailableError.exit_code else UserError)(message)


def in_part(name: str, part: tuple[int, int]) -> bool:
    """Whether an input belongs to part i (from 1) of n.

    By its name alone: the parts are disjoint and complete, whatever else lies in the folder.
    """
    index, count = part
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % count == index - 1


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of at most `size`."""
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
