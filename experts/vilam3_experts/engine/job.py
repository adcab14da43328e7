"""The description of a run, and the messages to and from workers."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from vilam3_experts.calibrate import Calibration
from vilam3_experts.descriptors import Descriptor
from vilam3_experts.inputs import Input
from vilam3_jax.errors import UnavailableError, UserError

ATTEMPTS = 3  # crashes of its process after which an input is given up

Status = Literal["annotated", "skipped", "failed", "unreadable", "unavailable", "planned"]


@dataclasses.dataclass(frozen=True)
class Job:
    """A run, as each of its processes sees it; `annotate` documents the fields.

    `args` are validated, `weights_sha256` is the digest of the model files, and `keep_records` makes outcomes
    carry their records. The audit log has the answers before their calibration.
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

    def is_done(self, status: str | None) -> bool:
        """Whether an input with this `AnnotationWriter.status` needs no run."""
        return status == "ok" or (status == "failed" and not self.retry_failed)


class Item(NamedTuple):
    """One input, with its number in the run."""

    number: int
    input: Input


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result of one input.

    `status` is `annotated`; `skipped` (already stored); `failed` (stored with its reason); `unreadable` (not
    stored, because it has no content key); `unavailable` (a transient read error, the next run may succeed);
    or `planned` (would run). `record` is the serialised `Annotation`. `key` and `fingerprint` are for the key
    cache, and empty if the input is not cached.
    """

    number: int
    name: str
    status: Status
    reason: str = ""
    notes: tuple[str, ...] = ()
    record: bytes | None = None
    key: str = ""
    fingerprint: bytes = b""


def run_error(code: int, message: str) -> UserError:
    """The error that ends a run, from the exit code and message that a worker sent."""
    return (UnavailableError if code == UnavailableError.exit_code else UserError)(message)


def in_shard(name: str, shard: tuple[int, int]) -> bool:
    """Whether an input belongs to shard i (from 1) of n.

    Depends on the name alone, so the shards stay disjoint and complete when other files come and go.
    """
    index, count = shard
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") % count == index - 1


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of at most `size`; `itertools.batched` needs Python 3.12."""
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk
