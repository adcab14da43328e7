"""Charts of a run: loss, throughput and other logged metrics by step, accuracy by arm."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from vilam3_jax.report import formatting, plots, runs
from vilam3_jax.report.plots import Series

Rows = Sequence[Mapping[str, Any]]


class Panel(NamedTuple):
    """A chart with its heading; `legend` lists (line style, name)."""

    title: str
    chart: Markup
    legend: Sequence[tuple[str, str]] = ()


@dataclasses.dataclass(frozen=True)
class MetricChart:
    """Metrics drawn in one chart.

    Attributes:
      title: above the chart.
      unit: label of its y axis.
      keys: metrics; one that ends with '/' is a prefix.
      scale: factor applied to the values.
    """

    title: str
    unit: str
    keys: tuple[str, ...]
    scale: float = 1.0


THROUGHPUT = MetricChart("Throughput", "tokens per second", ("tokens_per_second",))
METRIC_CHARTS = (
    THROUGHPUT,
    MetricChart("Model FLOP/s utilization (MFU)", "percent of peak", ("mfu",), 100),
    MetricChart("Model FLOP/s", "TFLOP/s per device", ("tflops_per_device",)),
    MetricChart("Input wait", "percent of step time", ("input_wait",), 100),
    MetricChart("Packing efficiency", "percent filled", ("token_fill", "image_fill"), 100),
    MetricChart("Goodput", "percent of time since first start", ("goodput",), 100),
    MetricChart("Learning rate", "× 10⁻⁶", ("learning_rate/",), 1e6),
    MetricChart("Gradient norm", "L2 norm", ("grad_norm", "grad_norm/")),
    MetricChart("Held-out answers", "percent", ("generate_exact_match", "generate_token_f1"), 100),
)
_METRIC_NAMES = {
    "token_fill": "token positions",
    "image_fill": "image slots",
    "grad_norm": "all",
    "generate_exact_match": "exact match",
    "generate_token_f1": "token F1",
}
_STYLES = ("train", "part1", "part2", "part3", "part4")


def loss_panel(stage: runs.Stage) -> Panel:
    """Training loss, raw and smoothed, and held-out losses."""
    raw = _series(stage.metrics, "loss", "training", "raw")
    series = [
        raw,
        dataclasses.replace(raw, name="training, smoothed", ys=plots.smooth(raw.ys), style="train"),
        _series(stage.metrics, "heldout_swapped", "held-out, swapped images", "swapped"),
        _series(stage.metrics, "heldout_true", "held-out, true images", "true"),
    ]
    unit = "loss (nats per pair)" if "vision" in stage.name else "loss (nats per token)"
    chart = plots.line_chart(series, title=f"Loss of {stage.name}", y_label=unit)
    return Panel(formatting.stage_title(stage.name), chart)


def throughput_panel(stage: runs.Stage) -> Panel:
    """Tokens per second, titled with the name of the run."""
    series = [_series(stage.metrics, key, key, "train") for key in THROUGHPUT.keys]
    title = f"Throughput of {stage.name}"
    chart = plots.line_chart(series, title=title, y_label=THROUGHPUT.unit, from_zero=True, height=140)
    return Panel(formatting.stage_title(stage.name), chart)


def metric_panels(stage: runs.Stage) -> list[Panel]:
    """`METRIC_CHARTS`, except those of which the run logged nothing."""
    logged = sorted(
        {key for row in stage.metrics for key, value in row.items() if formatting.is_number(value)}
    )
    panels = []
    for one in METRIC_CHARTS:
        keys = [k for key in one.keys for k in logged if k == key or (key[-1] == "/" and k.startswith(key))]
        series = [
            _series(stage.metrics, key, _METRIC_NAMES.get(key, key.rsplit("/", 1)[-1]), style, one.scale)
            for key, style in zip(keys, _STYLES, strict=False)
        ]
        if series:
            title = f"{one.title} by step"
            chart = plots.line_chart(series, title=title, y_label=one.unit, from_zero=True, height=170)
            legend = [(line.style, line.name) for line in series] if len(series) > 1 else []
            panels.append(Panel(one.title, chart, legend))
    return panels


def arms_panel(totals: Mapping[str, Mapping[str, Any]], name: str) -> Panel:
    """Accuracy of every arm over all question types.

    Args:
      totals: arm -> its summary, at least one.
      name: of the questions.
    """
    dots = [
        plots.Dot(
            formatting.arm_title(arm),
            one["accuracy"],
            tuple(one["interval"]) if one["interval"] else None,
            tuple(one.get("per_cluster", {}).values()),
            strong=arm == formatting.HIGHLIGHTED_ARM,
        )
        for arm, one in totals.items()
    ]
    chart = plots.dot_chart(dots, title=f"{name}: accuracy by arm", x_label="accuracy, percent")
    return Panel(f"{name} ({next(iter(totals.values()))['n']})", chart)


def _series(rows: Rows, key: str, name: str, style: str, scale: float = 1.0) -> Series:
    points = [(row["step"], row[key] * scale) for row in rows if formatting.is_number(row.get(key))]
    return Series(name, [step for step, _ in points], [value for _, value in points], style)
