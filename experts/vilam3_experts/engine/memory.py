"""Experts that ran out of memory: recognised, and tried again with less."""

from __future__ import annotations

import gc
import sys
from typing import Any, cast

from vilam3_experts.base import Expert, ExpertFailure, Output

_STEPS = 8  # of `smaller()`, so that an expert that never ends offering does not hold up the run
# What libraries say with an exception of no type of its own.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of host or device did not suffice; `torch.OutOfMemoryError` is one of its forms."""
    if isinstance(error, MemoryError):
        return True
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def release() -> None:
    """Gives back what is not in use, on the device too."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class Shrinking:
    """An expert that is run again with less memory when there was not enough.

    An expert may offer `smaller() -> Expert | None`: the same network in smaller pieces, or None if it has no
    smaller form. Where its answer may differ, its verdicts say so. Every input begins with the expert as it
    is: the answer to a scan does not depend on the scans before it.
    """

    def __init__(self, expert: Expert, *, smallest: bool = False) -> None:
        """Wraps `expert`; `smallest`: begins with its smallest form, after processes were ended."""
        self._expert = expert
        for _ in range(_STEPS if smallest else 0):
            if (less := _smaller(self._expert)) is None:
                break
            self._expert = less

    def run(self, data: Any, args: str) -> Output:
        """As `Expert.run`."""
        expert: Expert | None = self._expert
        for _ in range(_STEPS):
            try:
                return expert.run(data, args)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # After the handler: the traceback holds the arrays that did not fit.
            release()
            expert = _smaller(expert)
            if expert is None:
                break
        raise ExpertFailure("out of memory, also in its smallest form; use a larger device")


def _smaller(expert: Expert) -> Expert | None:
    offer = getattr(expert, "smaller", None)
    return cast(Expert | None, offer()) if callable(offer) else None
