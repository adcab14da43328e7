"""Charts as inline SVG, drawn with matplotlib.

Colours and font are CSS variables of the page, so charts follow its light and dark themes. Series also differ
in dash pattern or marker: no chart needs colour to be read.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 380, 228  # CSS pixels
_DPI = 72  # of matplotlib's SVG backend: one point is one CSS pixel of the view box

# matplotlib draws with these; the output has variables of report.css in their place.
_INK, _SOFT, _LINE, _ACCENT, _WARM, _PAPER = "#1d2126", "#5b6470", "#dcd9d1", "#0067a5", "#b84a00", "#fbfaf7"
_VARIABLES = {
    "ink": _INK,
    "soft": _SOFT,
    "line": _LINE,
    "accent": _ACCENT,
    "warm": _WARM,
    "paper": _PAPER,
    "sans": "'DejaVu Sans'",
}
_SETTINGS: dict[Any, Any] = {
    "axes.autolimit_mode": "round_numbers",
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": _SOFT,
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    **{f"axes.spines.{side}": False for side in ("left", "right", "top", "bottom")},
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "grid.color": _LINE,
    "grid.linewidth": 1,
    "lines.linewidth": 1.6,
    "lines.scale_dashes": False,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "text.color": _SOFT,
    "text.parse_math": False,
    "xtick.bottom": False,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "ytick.left": False,
}
_STYLES: dict[str, dict[str, Any]] = {
    "raw": {"color": _SOFT, "linewidth": 1, "alpha": 0.38},
    "train": {"color": _SOFT, "linewidth": 2},
    "part1": {"color": _ACCENT},
    "part2": {"color": _WARM, "dashes": (7, 3)},
    "part3": {"color": _INK, "dashes": (2, 3)},
    "part4": {"color": _ACCENT, "dashes": (9, 3, 2, 3)},
    "true": {"color": _ACCENT, "marker": "o", "markersize": 7, "markeredgecolor": _PAPER},
    "swapped": {
        "color": _WARM,
        "dashes": (4, 3),
        "marker": "D",
        "markersize": 6.5,
        "markerfacecolor": _PAPER,
        "markeredgewidth": 1.8,
    },
}


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
      name: part of the tooltip of its markers.
      xs: steps.
      ys: values; must be finite.
      style: `raw` (faint), `train`, `part1` to `part4` (differ in colour and dashes), `true` (discs) or
        `swapped` (dashes and diamonds).
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str


@dataclasses.dataclass(frozen=True)
class Dot:
    """One row of a dot chart.

    Attributes:
      label: at the left.
      value: between 0 and 1.
      interval: its ends, or None.
      parts: values of single volumes, drawn as open rings.
      strong: use the accent colour.
    """

    label: str
    value: float
    interval: tuple[float, float] | None = None
    parts: Sequence[float] = ()
    strong: bool = False


def short(value: float) -> str:
    """Formats a tick: `15000` as `15k`, without trailing zeros."""
    for scale, unit, limit in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4)):
        if abs(value) >= limit:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.4g}"


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving mean over a tenth of the values; the window narrows at the ends."""
    sums = np.cumsum([0.0, *values])
    i = np.arange(len(values))
    reach = np.minimum(max(len(values) // 20, 1), np.minimum(i, i[::-1]))
    return ((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)).tolist()


def line_chart(
    series: Sequence[Series], *, title: str, y_label: str, from_zero: bool = False, height: int = HEIGHT
) -> Markup:
    """Draws series over a common step axis.

    Args:
      series: drawn in this order, the last on top; empty ones are skipped.
      title: accessible name.
      y_label: above the y axis, with its unit.
      from_zero: start the y axis at 0.
      height: in CSS pixels; the width is `WIDTH`.

    Returns:
      An `<svg>` element, or a note if no series has a value.
    """
    series = [one for one in series if len(one.xs)]
    if not series:
        return Markup('<p class="empty">Nothing was logged.</p>')
    hints = {}
    with _drawing(WIDTH, height, title) as figure:
        ax = figure.add_subplot()
        if from_zero:
            top = 0 if any(any(one.ys) for one in series) else 1
            ax.update_datalim([(series[0].xs[0], 0), (series[0].xs[0], top)])
        for number, one in enumerate(series):
            gid = f"series{number}"
            ax.plot(one.xs, one.ys, clip_on=False, gid=gid, **_STYLES[one.style])
            hints[gid] = [
                f"{one.name}, step {short(x)}: {y:.4g}" for x, y in zip(one.xs, one.ys, strict=True)
            ]
        for axis, bins in ((ax.xaxis, 5), (ax.yaxis, 5 if height > 180 else 3)):
            axis.set_major_locator(MaxNLocator(bins, steps=[1, 2, 2.5, 5, 10], integer=axis is ax.xaxis))
            axis.set_major_formatter(lambda value, _: short(value))
        ax.autoscale_view()
        last = max(max(one.xs) for one in series)
        if ax.get_xlim()[0] < last:
            ax.set_xlim(right=last)
        ax.grid(axis="x", visible=False)
        ax.grid(axis="y", clip_on=False)
        ax.set_xlabel("step")
        figure.suptitle(y_label, x=0.005, horizontalalignment="left", fontsize=11)
        return _svg(figure, title, hints)


def dot_chart(dots: Sequence[Dot], *, title: str, x_label: str) -> Markup:
    """Draws shares between 0 and 1, one row each, with intervals or the values of single volumes."""
    with _drawing(400, 28 * len(dots) + 46, title) as figure:
        ax = figure.add_subplot()
        for row, dot in enumerate(dots):
            color = _ACCENT if dot.strong else _SOFT
            common = {"clip_on": False, "color": color, "in_layout": False}
            if dot.interval:
                ax.plot(dot.interval, [row, row], marker="|", markersize=8, markeredgewidth=1.5, **common)
            rings = {"markersize": 6, "markerfacecolor": "none", "alpha": 0.8}
            ax.plot(dot.parts, [row] * len(dot.parts), "o", **common, **rings)
            ax.plot([dot.value], [row], "o", gid=f"value{row}", markersize=11, **common)
        ax.set_xlim(0, 1)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
        ax.set_xlabel(x_label)
        ax.set_ylim(len(dots) - 0.5, -0.5)
        ax.set_yticks(range(len(dots)), [dot.label for dot in dots], fontsize=12.5, color=_INK)
        for label, dot in zip(ax.get_yticklabels(), dots, strict=True):
            if dot.strong:
                label.set(color=_ACCENT, fontweight="bold")
        ax.grid(axis="y", visible=False)
        ax.grid(axis="x", clip_on=False)
        hints = {f"value{row}": [f"{dot.label}: {100 * dot.value:.0f} %"] for row, dot in enumerate(dots)}
        return _svg(figure, title, hints)


@functools.cache
def key_mark(style: str) -> Markup:
    """Sample of a line style for a legend."""
    with _drawing(26, 14, style) as figure:
        figure.add_artist(Line2D([1 / 26, 0.5, 25 / 26], [0.5] * 3, markevery=[1], **_STYLES[style]))
        return _svg(figure, "", {})


@contextmanager
def _drawing(width: float, height: float, salt: str) -> Iterator[Figure]:
    # Salted by chart, marker ids are unique on the page and reproducible.
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt}):
        yield Figure(figsize=(width / _DPI, height / _DPI))


def _svg(figure: Figure, label: str, hints: Mapping[str, Sequence[str]]) -> Markup:
    """Renders a figure for inlining in HTML.

    Args:
      figure: drawn with `_SETTINGS`.
      label: accessible name; without one, screen readers skip the figure.
      hints: artist's gid -> tooltips of its markers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", buffer.getvalue()).replace("xlink:href", "href")
    for variable, drawn in _VARIABLES.items():
        text = text.replace(drawn, f"var(--{variable})")
    root = ElementTree.fromstring(text)
    root[:] = root.findall("g")  # Drops the <style>, which would apply to the whole page.
    for group in root.iter("g"):
        for mark, hint in zip(group.iter("use"), hints.get(group.attrib.pop("id", ""), ()), strict=False):
            ElementTree.SubElement(mark, "title").text = hint
    access = {"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}
    root.attrib = {"class": "chart" if label else "key", "viewBox": root.attrib["viewBox"], **access}
    return Markup(ElementTree.tostring(root, encoding="unicode"))
