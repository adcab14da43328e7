"""What happens every n steps: a run is a loop with a list of hooks."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Hook:
    """An action of the loop.

    Attributes:
      action: called as `action(step, value)`; the value is what the caller of `run_hooks` passes on.
      every: at steps that this divides; 0 for never.
      final: also at this step; None for no other.
      around: makes a context around the action, such as one that pauses the clock.
    """

    action: Callable[[int, Any], None]
    every: int = 1
    final: int | None = None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def due(self, step: int) -> bool:
        """Whether the action belongs to a step."""
        return bool(self.every) and (step % self.every == 0 or step == self.final)


def run_hooks(hooks: Iterable[Hook], step: int, value: Any) -> None:
    """Runs the hooks that are due, in order."""
    for hook in hooks:
        if hook.due(step):
            with hook.around():
                hook.action(step, value)
