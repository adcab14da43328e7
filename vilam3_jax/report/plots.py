"""Charts as inline SVG, drawn here so that they follow the page's light and dark colours.

Nothing in an SVG has a colour of its own: shapes carry CSS classes, the style sheet of the page colours them.
Every series differs in shape too, so that no chart needs colour to be read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 380, 228
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 24, 36


@dataclasses.dataclass(frozen=True)
class Series:
    """One line or one set of points.

    Attributes:
      name: in words, shown when a point is hovered over.
      xs: positions on the x axis.
      ys: values; must be finite.
      kind: CSS class and shape: `raw` (faint line), `train` (line), `part1` to `part4` (lines of other colour
        and dash), `true` (discs), `swapped` (diamonds).
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str


@dataclasses.dataclass(frozen=True)
class Dot:
    """One row of a dot chart.

    Attributes:
      label: at the left.
      value: between 0 and 1.
      interval: ends of its interval, or None.
      parts: values of the single volumes, drawn faintly where there is no interval.
      strong: drawn in the accent colour.
    """

    label: str
    value: float
    interval: tuple[float, float] | None = None
    parts: Sequence[float] = ()
    strong: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high], about `count` of them."""
    if not high > low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: `1500` as `1.5k`, no needless zeros."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = 1e3 if unit == "k" else limit
            return f"{value / scale:.3g}{unit}"
    return f"{value:.4g}"


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving mean over a tenth of the values, narrower at the ends."""
    half = max(len(values) // 20, 1)
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        out.append((sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1))
    return out


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    height: int = HEIGHT,
) -> str:
    """Draws lines and points over common axes.

    Args:
      series: drawn in this order, the last on top; empty ones are left out.
      title: what a screen reader says of the picture.
      x_label: below the x axis.
      y_label: above the y axis, with its unit.
      from_zero: start the y axis at 0.
      height: of the picture; its width is `WIDTH`.

    Returns:
      An `<svg>` element; a note in words when no series has a value.
    """
    series = [s for s in series if len(s.xs)]
    if not series:
        return '<p class="empty">Nothing was logged.</p>'
    xs = [x for s in series for x in s.xs]
    ys = [y for s in series for y in s.ys]
    low, high = (0.0, max(ys) or 1.0) if from_zero else (min(ys), max(ys))
    y_ticks = ticks(low, high, 5 if height > 160 else 3)
    x_ticks = [t for t in ticks(min(xs), max(xs)) if t <= max(xs) * 1.001]
    x_low, x_high = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at_x(x: float) -> float:
        return _LEFT + (x - x_low) / ((x_high - x_low) or 1.0) * (WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        return height - _BOTTOM - (y - y_low) / (y_high - y_low) * (height - _TOP - _BOTTOM)

    out = [_open(WIDTH, height, title)]
    out.append(f'<text class="axis-name" x="2" y="12">{escape(y_label)}</text>')
    for tick in y_ticks:
        y = at_y(tick)
        out.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}"/>')
        out.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    for tick in x_ticks:
        out.append(
            f'<text class="tick" x="{at_x(tick):.1f}" y="{height - _BOTTOM + 16}" '
            f'text-anchor="middle">{short(tick)}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    out.append(
        f'<text class="axis-name" x="{middle}" y="{height - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for one in series:
        points = [(at_x(x), at_y(y)) for x, y in zip(one.xs, one.ys, strict=True)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        out.append(f'<path class="line {one.kind}" d="{path}"/>')
        if one.kind in ("true", "swapped"):
            for (x, y), step, value in zip(points, one.xs, one.ys, strict=True):
                said = f"<title>{escape(one.name)}, step {short(step)}: {value:.4g}</title>"
                out.append(_mark(one.kind, x, y, said))
    return "".join(out) + "</svg>"


def _open(width: int, height: int, title: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}">'
    )


def _mark(kind: str, x: float, y: float, inner: str = "") -> str:
    if kind == "swapped":
        d = f"M{x:.1f} {y - 4.8:.1f}l4.8 4.8l-4.8 4.8l-4.8 -4.8z"
        return f'<path class="mark swapped" d="{d}">{inner}</path>'
    return f'<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.6">{inner}</circle>'


def key_mark(kind: str) -> str:
    """The small picture of a series for a legend."""
    line = f'<path class="line {kind}" d="M1 7H25"/>'
    mark = _mark(kind, 13, 7) if kind in ("true", "swapped") else ""
    return (
        f'<svg class="key" viewBox="0 0 26 14" width="26" height="14" aria-hidden="true">{line}{mark}</svg>'
    )


def dot_chart(dots: Sequence[Dot], *, title: str, x_label: str) -> str:
    """Draws shares between 0 and 1, one row each, with intervals or the values of single volumes.

    Returns:
      An `<svg>` element.
    """
    left, row, width = 162, 28, 400
    height = len(dots) * row + 46
    bottom = height - 38

    def at(value: float) -> float:
        return left + value * (width - left - 16)

    out = [_open(width, height, title)]
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        out.append(f'<path class="grid" d="M{at(tick):.1f} 4V{bottom}"/>')
        out.append(
            f'<text class="tick" x="{at(tick):.1f}" y="{bottom + 15}" text-anchor="middle">'
            f"{tick * 100:.0f}</text>"
        )
    middle = (at(0) + at(1)) / 2
    out.append(
        f'<text class="axis-name" x="{middle:.1f}" y="{height - 5}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    for position, dot in enumerate(dots):
        y = 4 + row * (position + 0.5)
        strong = " strong" if dot.strong else ""
        said = f"<title>{escape(dot.label)}: {100 * dot.value:.0f} %</title>"
        out.append(
            f'<text class="name{strong}" x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">'
            f"{escape(dot.label)}</text>"
        )
        if dot.interval:
            low, high = (at(end) for end in dot.interval)
            out.append(f'<path class="whisker{strong}" d="M{low:.1f} {y - 4:.1f}v8m0 -4H{high:.1f}m0 -4v8"/>')
        out += [f'<circle class="part" cx="{at(part):.1f}" cy="{y:.1f}" r="3"/>' for part in dot.parts]
        out.append(
            f'<circle class="value{strong}" cx="{at(dot.value):.1f}" cy="{y:.1f}" r="5.5">{said}</circle>'
        )
    return "".join(out) + "</svg>"


# --- the pipeline picture

_BOXES: tuple[tuple[str, str, str], ...] = (
    ("Samples", "real CT, MRI and X-ray,", "from pinned packages"),
    ("Experts, offline", "PyTorch networks write", "annotations once"),
    ("Data", "questions from labels,", "split by volume"),
    ("Five runs", "each starts from", "the one before"),
    ("Evaluation", "held-out volumes,", "six arms"),
)
_RUNS = ("1 vision", "2a align", "2b pretrain", "3 instruct", "4 experts")


def pipeline(*, vertical: bool) -> str:
    """The way from samples to the evaluation, in one row or, for a narrow screen, in one column."""
    box_w, box_h, gap = (216, 66, 26) if vertical else (158, 70, 32)
    runs_h = 26
    out = []
    if vertical:
        width, height = 330, len(_BOXES) * box_h + (len(_BOXES) - 1) * gap + 2 + len(_RUNS) * runs_h + 12
    else:
        width, height = len(_BOXES) * box_w + (len(_BOXES) - 1) * gap + 2, box_h + len(_RUNS) * runs_h + 12
    title = (
        "Pipeline: samples go to experts, which run offline and write annotations; annotations and questions "
        "make the data; five runs train on it, one after the other; the evaluation follows."
    )
    out.append(_open(width, height, title).replace('class="chart"', 'class="pipeline"'))
    x, y = 1.0, 1.0
    for number, (name, first, second) in enumerate(_BOXES):
        runs = name == "Five runs"
        tall = box_h + (len(_RUNS) * runs_h + 8 if runs else 0)
        left = (width - box_w) / 2 if vertical else x
        strong = " strong" if name == "Experts, offline" else ""
        out.append(f'<rect class="box{strong}" x="{left}" y="{y}" width="{box_w}" height="{tall}" rx="8"/>')
        centre = left + box_w / 2
        for line, (text, kind) in enumerate(((name, "head"), (first, "small"), (second, "small"))):
            out.append(
                f'<text class="{kind}" x="{centre}" y="{y + 22 + line * 17}" text-anchor="middle">'
                f"{escape(text)}</text>"
            )
        if runs:
            for k, run in enumerate(_RUNS):
                top = y + box_h + k * runs_h
                out.append(
                    f'<rect class="inner" x="{left + 20}" y="{top}" width="{box_w - 40}" height="20" rx="4"/>'
                    f'<text class="small" x="{centre}" y="{top + 14}" text-anchor="middle">{run}</text>'
                )
                if k:
                    out.append(f'<path class="wire" d="M{centre} {top - 6}v6"/>')
        if number + 1 < len(_BOXES):
            if vertical:
                out.append(_arrow(centre, y + tall, centre, y + tall + gap))
                y += tall + gap
            else:
                middle = y + box_h / 2
                out.append(_arrow(x + box_w, middle, x + box_w + gap, middle))
                x += box_w + gap

    if not vertical:
        # What experts said is looked up again and again: by the last run and by the evaluation.
        step = box_w + gap
        middle, runs, last = 1 + step + box_w / 2, 1 + 3 * step, 1 + 4 * step + box_w / 2
        low = 1 + box_h + (len(_RUNS) - 1) * runs_h + 10
        out.append(f'<path class="wire dashed" d="M{middle} {1 + box_h}V{low}H{runs + 14}"/>')
        out.append(f'<path class="head-of-wire" d="M{runs + 11} {low - 4}l7 4l-7 4z"/>')
        out.append(f'<path class="wire dashed" d="M{runs + box_w} {low}H{last}V{box_h + 8}"/>')
        out.append(f'<path class="head-of-wire" d="M{last - 4} {box_h + 9}l4 -7l4 7z"/>')
        words = "looked up when a question is loaded"
        out.append(f'<text class="small" x="{middle + 12}" y="{low - 8}">{words}</text>')
    return "".join(out) + "</svg>"


def _arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    if x0 == x1:
        head = f"M{x1 - 4} {y1 - 8}L{x1} {y1 - 1}L{x1 + 4} {y1 - 8}z"
        return f'<path class="wire" d="M{x0} {y0}V{y1 - 6}"/><path class="head-of-wire" d="{head}"/>'
    head = f"M{x1 - 8} {y1 - 4}L{x1 - 1} {y1}L{x1 - 8} {y1 + 4}z"
    return f'<path class="wire" d="M{x0} {y0}H{x1 - 6}"/><path class="head-of-wire" d="{head}"/>'
