"""Charts of one training run's figures beside its loss: rates, norms, speed, waits and fill."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vilam3_jax.report import captions, html, plots, runs
from vilam3_jax.report.plots import Series

_HEIGHT = 170
_KINDS = ("train", "part1", "part2", "part3", "part4")  # a line style each


@dataclasses.dataclass(frozen=True)
class Chart:
    """What is drawn together.

    Attributes:
      title: above the chart.
      unit: beside its axis.
      keys: of the metrics; one that ends with '/' takes all that begin with it.
      scale: times the value.
    """

    title: str
    unit: str
    keys: tuple[str, ...]
    scale: float = 1.0


CHARTS = (
    Chart("Speed", "tokens per second", ("tokens_per_second",)),
    Chart("Share of peak speed (MFU)", "percent", ("mfu",), 100),
    Chart("Speed of the model's products", "TFLOP/s of a device", ("tflops_per_device",)),
    Chart("Waiting for input", "percent of the time of steps", ("input_wait",), 100),
    Chart("Filled by packing", "percent", ("token_fill", "image_fill"), 100),
    Chart("Goodput", "percent of the time since the first start", ("goodput",), 100),
    Chart("Learning rate", "millionths", ("learning_rate/",), 1e6),
    Chart("Gradient norm", "", ("grad_norm", "grad_norm/")),
    Chart("Held-out answers", "percent", ("generate_exact_match", "generate_token_f1"), 100),
)


def panels(stage: runs.Stage) -> str:
    """All charts for which the run logged something, as one figure."""
    drawn = [_panel(chart, stage.metrics) for chart in CHARTS]
    return html.figure(f'<div class="panels">{"".join(drawn)}</div>', captions.TELEMETRY_CAPTION)


def asides(stage: runs.Stage) -> list[tuple[str, str]]:
    """(what, how often and how long) of what the run did beside its steps."""
    found = []
    for key, name in captions.ASIDES.items():
        seconds = [row[key] for row in stage.metrics if captions.is_number(row.get(key))]
        if seconds:
            found.append((name, f"{len(seconds)} ×, {captions.duration(sum(seconds))} in all"))
    return found


def _panel(chart: Chart, rows: Sequence[dict[str, Any]]) -> str:
    series = [
        _series(chart, key, kind, rows) for key, kind in zip(_logged(chart, rows), _KINDS, strict=False)
    ]
    if not series:
        return ""
    drawn = plots.line_chart(
        series,
        title=f"{chart.title} by step",
        x_label="step",
        y_label=chart.unit,
        from_zero=True,
        height=_HEIGHT,
    )
    names = "".join(f"<li>{plots.key_mark(one.kind)}{html.text(one.name)}</li>" for one in series)
    legend = f'<ul class="legend">{names}</ul>' if len(series) > 1 else ""
    return f"<div><h4>{html.text(chart.title)}</h4>{drawn}{legend}</div>"


def _logged(chart: Chart, rows: Sequence[dict[str, Any]]) -> list[str]:
    logged = {key for row in rows for key, value in row.items() if captions.is_number(value)}
    out: list[str] = []
    for key in chart.keys:
        wanted = (k for k in logged if k == key or (key.endswith("/") and k.startswith(key)))
        out += sorted(wanted)
    return out


def _series(chart: Chart, key: str, kind: str, rows: Sequence[dict[str, Any]]) -> Series:
    points = [(row["step"], row[key]) for row in rows if captions.is_number(row.get(key))]
    name = captions.FIGURES.get(key, key.rsplit("/", 1)[-1])
    return Series(name, [step for step, _ in points], [value * chart.scale for _, value in points], kind)
