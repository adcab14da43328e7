"""What a metric cannot show: repeated reports, a constant report, and empty predictions."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from vilam3_jax.evals.reports.ptb import joined


@dataclasses.dataclass(frozen=True)
class Properties:
    """Properties of a corpus of predictions.

    Attributes:
      n: number of items, the denominator of every score. Empty predictions are among them, and score 0.
      empty: indices of predictions without a token.
      distinct: number of different predictions that are not empty.
      distinct_ratio: `distinct` per item that is not empty; 0 if all are empty.
      most_frequent: the prediction that occurs most often, the first of equal ones.
      most_frequent_share: its share of the n items.
    """

    n: int
    empty: tuple[int, ...]
    distinct: int
    distinct_ratio: float
    most_frequent: str
    most_frequent_share: float


def properties(hypotheses: Sequence[str]) -> Properties:
    """Predictions are equal if their tokens are (`ptb.tokenize`).

    Raises:
      ValueError: no predictions.
    """
    if not hypotheses:
        raise ValueError("no predictions")
    tokens = [joined(one) for one in hypotheses]
    filled = [one for one in tokens if one]
    commonest, times = Counter(tokens).most_common(1)[0]
    return Properties(
        n=len(hypotheses),
        empty=tuple(index for index, one in enumerate(tokens) if not one),
        distinct=len(set(filled)),
        distinct_ratio=len(set(filled)) / len(filled) if filled else 0.0,
        most_frequent=hypotheses[tokens.index(commonest)],
        most_frequent_share=times / len(tokens),
    )


def constant_report(training: Sequence[str]) -> str:
    """The most frequent training reference: the baseline that every item answers with this report.

    Reports are equal if their tokens are; of equally frequent ones, the first counts. Empty ones do not.

    Raises:
      ValueError: no report with a token.
    """
    tokens = [joined(one) for one in training]
    counts = Counter(one for one in tokens if one)
    if not counts:
        raise ValueError("no training report has a token")
    return training[tokens.index(counts.most_common(1)[0][0])]
