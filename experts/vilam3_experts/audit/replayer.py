"""Making the calls of an audit log again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from vilam3_experts.audit.chain import (
    Call,
    calls,
)
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import content_sha256
from vilam3_jax.runtime import paths


@dataclasses.dataclass(frozen=True)
class Replayed:
    """What `replay` found.

    Attributes:
      same: number of calls that gave the same answer.
      different: calls that gave another, each with the hash of that answer.
      missing: calls whose input, expert, version or weights were not at hand.
    """

    same: int
    different: tuple[tuple[Call, str], ...]
    missing: tuple[Call, ...]

    @property
    def ok(self) -> bool:
        return not self.different and not self.missing


def replay(folder: paths.PathLike, answer: Callable[[Call], Annotation | None]) -> Replayed:
    """Makes the logged calls again and compares the answers. Equal calls with equal answers are made once.

    Args:
      folder: of the log.
      answer: makes one call; None where its input, expert, version or weights are not at hand.
    """
    same, different, missing = 0, [], []
    seen: set[tuple[str, ...]] = set()
    for call in calls(folder):
        identity = (call.input, call.expert, call.version, call.weights, call.args, call.output)
        if identity in seen:
            continue
        seen.add(identity)
        annotation = answer(call)
        if annotation is None:
            missing.append(call)
            continue
        output = content_sha256(annotation)
        if output == call.output:
            same += 1
        else:
            different.append((call, output))
    return Replayed(same, tuple(different), tuple(missing))
