"""Metrics of classes, sets of labels and probabilities.

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
    WeightedMetric,
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
    return AdditiveMetric(name, _where(number, where), ratio, higher_is_better)


def _where(
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


# --- classes


def _correct(row: Row) -> float:
    return float(row["correct"])


def _gold_class(row: Row) -> str:
    return normalise(str(row["gold"]))


BALANCED_ACCURACY = register(
    mean_over_groups("balanced_accuracy", _gold_class, mean_of("", "correct").statistics, ratio, size=2)
)
MACRO_ACCURACY = register(
    mean_over_groups("macro_accuracy", question_type, mean_of("", "correct").statistics, ratio, size=2)
)
CLOSED_ACCURACY = register(mean_where("closed_accuracy", _correct, is_closed))
OPEN_ACCURACY = register(mean_where("open_accuracy", _correct, is_open))
MACRO_CLOSED_ACCURACY = register(
    mean_over_groups("macro_closed_accuracy", question_type, _where(_correct, is_closed), ratio, size=2)
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


POSITIVE_F1 = register(AdditiveMetric("positive_f1", _confusions, _f1))
MACRO_POSITIVE_F1 = register(mean_over_groups("macro_positive_f1", question_type, _confusions, _f1, size=4))
# As VILA-M3 computes it: scikit-learn refuses predictions that are not binary, and the script counts 0 for
# the class.
VILA_M3_F1 = register(mean_over_groups("vila_m3_f1", question_type, _confusions, _f1_of_binary, size=4))

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


LABEL_F1 = register(_label_metric("label_f1", 0))
LABEL_PRECISION = register(_label_metric("label_precision", 1))
LABEL_RECALL = register(_label_metric("label_recall", 2))

# --- probabilities


def yes_probability(row: Row) -> float:
    """The probability of yes.

    Raises:
      UserError: the row has none.
    """
    found = {normalise(option): value for option, value in (row.get("probabilities") or {}).items()}
    if YES not in found:
        raise UserError(f"item {row.get('item')!r}: has no probability of yes; answer with probabilities")
    return float(found[YES])


def _is_positive(row: Row) -> bool:
    return row["gold"] == YES


def _sums_of_ties(rows: Sequence[Row], *, descending: bool) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    """Weights [R, n] ↦ those of positive and of negative rows, [R, U] each, by rising (or falling) score."""
    scores = np.asarray([yes_probability(row) for row in rows])
    positive = np.asarray([_is_positive(row) for row in rows], np.float64)
    order = np.argsort(-scores if descending else scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)

    def sums(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        ordered, is_positive = weights[:, order], positive[order]
        return (
            np.add.reduceat(ordered * is_positive, starts, axis=1),
            np.add.reduceat(ordered * (1 - is_positive), starts, axis=1),
        )

    return sums


def _auroc(rows: Sequence[Row]) -> Resampled:
    sums = _sums_of_ties(rows, descending=False)

    def value(weights: np.ndarray) -> np.ndarray:
        positive, negative = sums(weights)
        below = np.cumsum(negative, axis=1) - negative / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))

    return value


def _average_precision(rows: Sequence[Row]) -> Resampled:
    sums = _sums_of_ties(rows, descending=True)

    def value(weights: np.ndarray) -> np.ndarray:
        positive, negative = sums(weights)
        found, all_above = np.cumsum(positive, axis=1), np.cumsum(positive + negative, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.where(all_above > 0, found / all_above, 0)
            return (positive * precision).sum(1) / positive.sum(1)

    return value


def _macro(prepare: Callable[[Sequence[Row]], Resampled]) -> Callable[[Sequence[Row]], Resampled]:
    """The unweighted mean over question types, of those where the metric is defined."""

    def of_types(rows: Sequence[Row]) -> Resampled:
        places: dict[str, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(question_type(row), []).append(place)
        parts = [(own, prepare([rows[place] for place in own])) for own in places.values()]

        def value(weights: np.ndarray) -> np.ndarray:
            values = np.stack([of_weights(weights[:, own]) for own, of_weights in parts], axis=1)
            counted = ~np.isnan(values)
            with np.errstate(invalid="ignore"):
                return np.where(counted, values, 0).sum(1) / counted.sum(1)

        return value

    return of_types


# Probability that a positive question has a higher probability of yes than a negative one; ties count half
# (Hanley and McNeil, 1982).
AUROC = register(WeightedMetric("auroc", _auroc))
MACRO_AUROC = register(WeightedMetric("macro_auroc", _macro(_auroc)))
# Sum over thresholds of the precision, weighted by the gain in recall; tied questions have one threshold.
AVERAGE_PRECISION = register(WeightedMetric("average_precision", _average_precision))
MACRO_AVERAGE_PRECISION = register(WeightedMetric("macro_average_precision", _macro(_average_precision)))
# Brier, 1950, for one event: the mean of (probability of yes - [answer is yes])².
BRIER = register(
    mean_where(
        "brier",
        lambda row: (yes_probability(row) - _is_positive(row)) ** 2,
        lambda row: True,
        higher_is_better=False,
    )
)
