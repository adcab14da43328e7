"""Display names and number formats of the report; the templates use them as filters."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from vilam3_jax.evals.statistics import TOO_FEW

NONE = "–"
FEW = Markup('<span class="few" title="{}">†</span>').format(TOO_FEW)
HIGHLIGHTED_ARM = "stage4_experts"
_MAX_TEXT = 4000
_NARROW = "\u202f"  # narrow no-break space
_STAGES = {
    "stage1_vision": "Stage 1, vision",
    "stage2a_align": "Stage 2a, align",
    "stage2b_pretrain": "Stage 2b, pre-train",
    "stage3_instruct": "Stage 3, instruct",
    "stage4_expert": "Stage 4, experts",
}
_ARMS = {
    "stage3": "Stage 3",
    "stage4_no_experts": "Stage 4, no experts",
    "stage4_experts": "Stage 4, experts",
    "stage4_falsified": "Stage 4, falsified",
    "stage4_blank": "Stage 4, blank images",
    "majority": "Majority answer",
}


def is_number(value: Any) -> bool:
    """A finite number, not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def stage_title(name: str) -> str:
    """Display name of a stage."""
    return _STAGES.get(name, name)


def arm_title(name: str) -> str:
    """Display name of an arm."""
    return _ARMS.get(name, name)


def type_title(name: str) -> str:
    """Display name of a question type."""
    return "All types" if name == "all" else name.replace("_", " ").capitalize()


def whole(value: Any) -> str:
    """A rounded number with thousands separators."""
    return f"{round(value):,}".replace(",", _NARROW) if is_number(value) else NONE


def loss(value: Any) -> str:
    """A loss with three decimals."""
    return f"{value:.3f}" if is_number(value) else NONE


def percent(value: Any) -> str:
    """A share as whole percent."""
    return f"{100 * value:.0f}{_NARROW}%" if is_number(value) else NONE


def points(value: float) -> str:
    """A difference of shares in percentage points, with its sign."""
    return f"{100 * value:+.0f}".replace("-", "−")


def interval(ends: Sequence[float] | None) -> str:
    """The 95 % interval of a share, in percent. Without an interval, the footnote mark."""
    return f"{100 * ends[0]:.0f} to {100 * ends[1]:.0f}" if ends else FEW


def points_interval(ends: Sequence[float] | None) -> str:
    """The 95 % interval of a difference, in percentage points. Without an interval, the footnote mark."""
    return " to ".join(map(points, ends)) if ends else FEW


def duration(seconds: Any) -> str:
    """`48 s`, `12 min 5 s`, `1 h 3 min`."""
    if not is_number(seconds):
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s" if seconds < 10 else f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def size(n_bytes: Any) -> str:
    """Bytes as `1.4 GiB`."""
    if not is_number(n_bytes):
        return NONE
    for limit, unit in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if n_bytes >= limit:
            return f"{n_bytes / limit:.1f} {unit}"
    return f"{n_bytes / 1024:.1f} KiB"


def data_uri(image: bytes) -> str:
    """A PNG or JPEG as a data URI."""
    kind = "jpeg" if image.startswith(b"\xff\xd8") else "png"
    return f"data:image/{kind};base64," + base64.b64encode(image).decode("ascii")


def shortened(text: Any) -> str:
    """A text without what exceeds `_MAX_TEXT` characters."""
    text = str(text)
    more = len(text) - _MAX_TEXT
    return text if more <= 0 else f"{text[:_MAX_TEXT]} … ({whole(more)} more characters)"
