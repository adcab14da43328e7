"""Out-of-memory errors: detection, and retries with a smaller form of the expert."""

from __future__ import annotations

import gc
import sys
from typing import Any, cast

from vilam3_experts.base import Expert, ExpertFailure, Output

_MAX_STEPS = 8  # bounds an expert whose `smaller()` never returns None
# Messages of libraries that raise a plain RuntimeError.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out, `torch.OutOfMemoryError` included."""
    if isinstance(error, MemoryError):
        return True
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def free_memory() -> None:
    """Frees unused memory on host and device."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class RetrySmaller:
    """Wraps an expert; when memory runs out, runs the input again with `expert.smaller()`.

    `smaller() -> Expert | None` returns the same network in smaller pieces, or None if there is no smaller
    form. If its answer may differ, its verdicts say so. Every input starts with the full expert, so an answer
    does not depend on earlier inputs.
    """

    def __init__(self, expert: Expert, *, smallest: bool = False) -> None:
        """Wraps `expert`; with `smallest`, starts at its smallest form, as after crashes of the process."""
        self._expert = expert
        for _ in range(_MAX_STEPS if smallest else 0):
            if (less := _smaller(self._expert)) is None:
                break
            self._expert = less

    def run(self, data: Any, args: str) -> Output:
        """See `Expert.run`."""
        expert: Expert | None = self._expert
        for _ in range(_MAX_STEPS):
            try:
                return expert.run(data, args)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler: the traceback references the arrays that did not fit.
            free_memory()
            expert = _smaller(expert)
            if expert is None:
                break
        raise ExpertFailure("out of memory, also in its smallest form; use a larger device")


def _smaller(expert: Expert) -> Expert | None:
    smaller = getattr(expert, "smaller", None)
    return cast(Expert | None, smaller()) if callable(smaller) else None
