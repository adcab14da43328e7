"""Hooks of the training loop: actions every n steps."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Hook:
    """An action of the loop.

    Attributes:
      action: called as `action(step, value)`, with the value given to `run_hooks`.
      every: runs at multiples of this step; 0 for never.
      final: also runs at this step.
      around: makes a context for the action, such as one that pauses the clock.
    """

    action: Callable[[int, Any], object]
    every: int = 1
    final: int | None = None
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    def due(self, step: int) -> bool:
        """Whether the action runs at a step."""
        return bool(self.every) and (step % self.every == 0 or step == self.final)


def run_hooks(hooks: Iterable[Hook], step: int, value: Any) -> None:
    """Runs the hooks that are due, in order."""
    for hook in hooks:
        if hook.due(step):
            with hook.around():
                hook.action(step, value)
