"""Metrics of closed and open questions, their means over groups, F1 of yes, and sets of labels.

An unparsed answer is wrong: it is never a class, and for F1 it misses a positive question and is a false
alarm on a negative one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from vilam3_jax.errors import UserError
from vilam3_jax.evals.metrics.base import (
    AdditiveMetric,
    Resampled,
    Row,
    mean_of,
    ratio,
    register,
)
from vilam3_jax.evals.parsers.anchored import normalise

YES, NO = "yes", "no"


def is_closed(row: Row) -> bool:
    """Whether a question is closed: by its `answer_type`, or else because its options are yes and no."""
    stated = (row.get("answer_spec") or {}).get("answer_type")
    return stated == "closed" if stated else {normalise(one) for one in row.get("options") or ()} == {YES, NO}


def is_open(row: Row) -> bool:
    """Whether a question is not closed."""
    return not is_closed(row)


def question_type(row: Row) -> str:
    """The type of the question."""
    return str(row["question_type"])


def mean_where(
    name: str, number: Callable[[Row], float], where: Callable[[Row], bool], *, higher_is_better: bool = True
) -> AdditiveMetric:
    """The mean of a number over the rows for which `where` holds; NaN if there are none."""
    return AdditiveMetric(name, numbers_where(number, where), ratio, higher_is_better)


def numbers_where(
    number: Callable[[Row], float], where: Callable[[Row], bool]
) -> Callable[[Sequence[Row]], np.ndarray]:
    def statistics(rows: Sequence[Row]) -> np.ndarray:
        pairs = [(float(number(row)), 1.0) if where(row) else (0.0, 0.0) for row in rows]
        return np.asarray(pairs, np.float64).reshape(len(rows), 2)

    return statistics


def mean_over_groups(
    name: str,
    key: Callable[[Row], Hashable],
    statistics: Callable[[Sequence[Row]], np.ndarray],
    value: Resampled,
    *,
    size: int,
) -> AdditiveMetric:
    """The unweighted mean of an additive metric over groups of rows.

    A group that no resampled row belongs to, or where the metric is undefined, does not count.

    Args:
      name: unique name.
      key: row ↦ its group.
      statistics, value: of the metric in a group, see `AdditiveMetric`.
      size: the number of its statistics.
    """

    def of_groups(rows: Sequence[Row]) -> np.ndarray:
        keys = [key(row) for row in rows]
        places = {one: place for place, one in enumerate(sorted(set(keys), key=repr))}
        own = np.concatenate([statistics(rows), np.ones((len(rows), 1))], axis=1)  # [n, size + 1]
        found = np.zeros((len(rows), len(places), size + 1))
        found[np.arange(len(rows)), [places[one] for one in keys]] = own
        return found.reshape(len(rows), -1)

    def mean(sums: np.ndarray) -> np.ndarray:
        own = sums.reshape(*sums.shape[:-1], -1, size + 1)  # [..., G, size + 1]
        values = value(own[..., :-1])
        counted = (own[..., -1] > 0) & ~np.isnan(values)
        return np.where(counted, values, 0).sum(-1) / counted.sum(-1)

    return AdditiveMetric(name, of_groups, mean)


# --- accuracy


def _correct(row: Row) -> float:
    return float(row["correct"])


register(mean_over_groups("macro_accuracy", question_type, mean_of("", "correct").statistics, ratio, size=2))
register(mean_where("closed_accuracy", _correct, is_closed))
register(mean_where("open_accuracy", _correct, is_open))
register(
    mean_over_groups(
        "macro_closed_accuracy", question_type, numbers_where(_correct, is_closed), ratio, size=2
    )
)

# --- F1 of yes


def _confusions(rows: Sequence[Row]) -> np.ndarray:
    """float64 [n, 4]: true positive, false positive, false negative, neither yes nor no (nor unparsed)."""
    found = np.zeros((len(rows), 4))
    for place, row in enumerate(rows):
        parsed, is_yes = row["parsed"], row["gold"] == YES
        if not isinstance(row["gold"], str) or row["gold"] not in (YES, NO):
            raise UserError(
                f"item {row.get('item')!r}: its answer is {row['gold']!r}; F1 needs questions for yes or no"
            )
        says_yes = not is_yes if parsed is None else parsed == YES
        found[place] = (says_yes and is_yes, says_yes and not is_yes, not says_yes and is_yes, 0)
        found[place, 3] = parsed not in (None, YES, NO)
    return found


def _f1(sums: np.ndarray) -> np.ndarray:
    """F1 of yes, 0 where nothing is yes: float64 [..., 4] ↦ [...]."""
    total = 2 * sums[..., 0] + sums[..., 1] + sums[..., 2]
    return np.where(total > 0, 2 * sums[..., 0] / np.where(total > 0, total, 1), 0)


def _f1_of_binary(sums: np.ndarray) -> np.ndarray:
    return np.where(sums[..., 3] > 0, 0, _f1(sums))


register(AdditiveMetric("positive_f1", _confusions, _f1))
register(mean_over_groups("macro_positive_f1", question_type, _confusions, _f1, size=4))
# As VILA-M3 computes it: scikit-learn refuses predictions that are not binary, and the script counts 0 for
# the class.
register(mean_over_groups("vila_m3_f1", question_type, _confusions, _f1_of_binary, size=4))

# --- sets of labels


def label_scores(parsed: Sequence[str] | None, gold: Sequence[str]) -> tuple[float, float, float]:
    """(F1, precision, recall) of a set of labels; 1 if both sets are empty, 0 for an unparsed answer."""
    if parsed is None:
        return 0.0, 0.0, 0.0
    said, right = set(parsed), set(gold)
    if not said and not right:
        return 1.0, 1.0, 1.0
    both = len(said & right)
    return (
        2 * both / (len(said) + len(right)),
        both / len(said) if said else 0.0,
        both / len(right) if right else 0.0,
    )


def _label_metric(name: str, place: int) -> AdditiveMetric:
    return mean_where(name, lambda row: label_scores(row["parsed"], row["gold"])[place], lambda row: True)


register(_label_metric("label_f1", 0))
register(_label_metric("label_precision", 1))
register(_label_metric("label_recall", 2))
