"""Metrics of expert calls: rows with `expert` (that could answer, or None), `expert_called`, `expert_right`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vilam3_jax.evals.metrics.base import AdditiveMetric, Row, ratio, register


def _share(name: str, counted: Callable[[Row], bool], hit: Callable[[Row], bool]) -> AdditiveMetric:
    """Hits among the counted rows."""

    def statistics(rows: Sequence[Row]) -> np.ndarray:
        return np.asarray([(float(counted(row) and hit(row)), float(counted(row))) for row in rows])

    return AdditiveMetric(name, statistics, ratio)


def _called(row: Row) -> bool:
    return bool(row.get("expert_called"))


register(
    _share("call_recall", lambda row: row["expert"] is not None, lambda row: bool(row.get("expert_right")))
)
register(_share("call_precision", _called, lambda row: bool(row.get("expert_right"))))
register(_share("calls_without_need", lambda row: row["expert"] is None, _called))
register(
    _share(
        "calls_of_the_asked_kind",
        lambda row: row["expert"] is not None,
        lambda row: row.get("expert_called") == row["expert"],
    )
)
