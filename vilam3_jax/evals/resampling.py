"""Resampling of patients: percentile intervals and paired randomisation tests of any metric.

Questions about one patient are not independent, so patients are drawn, never questions (Davison and Hinkley,
1997, section 3.8). docs/evaluation.md states how often such an interval covers the truth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from vilam3_jax.evals.metrics.base import Resampled

_FEW_CLUSTERS = 1000  # up to which a multinomial draw is faster than one index per cluster
_REPETITIONS, _REPETITIONS_OF_MANY = 10_000, 2_000
_BLOCK = 1 << 22  # counts of one block of resamples: 32 MB


def default_repetitions(clusters: int) -> int:
    """10,000, or 2,000 of more than 1,000 clusters."""
    return _REPETITIONS if clusters <= _FEW_CLUSTERS else _REPETITIONS_OF_MANY


def counts(clusters: int, *, repetitions: int | None = None, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each cluster is drawn, in blocks of resamples.

    Args:
      clusters: C, how many there are, and how many are drawn in each resample.
      repetitions: number of resamples; by default `default_repetitions`.
      seed: of the draws.

    Yields:
      float64 [R, C]; the R add up to `repetitions`.
    """
    few = clusters <= _FEW_CLUSTERS
    left = repetitions or default_repetitions(clusters)
    rng, block = np.random.default_rng(seed), max(1, _BLOCK // clusters)
    while left > 0:
        size = min(left, block)
        if few:
            yield rng.multinomial(clusters, np.full(clusters, 1 / clusters), size=size).astype(np.float64)
        else:
            drawn = rng.integers(clusters, size=(size, clusters))
            drawn += np.arange(size)[:, None] * clusters
            yield (
                np.bincount(drawn.ravel(), minlength=size * clusters)
                .reshape(size, clusters)
                .astype(np.float64)
            )
        left -= size


def percentile_interval(
    evaluate: Resampled,
    clusters: int,
    *,
    repetitions: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a metric.

    Resamples in which the metric is undefined, such as an AUROC of one class, are left out.

    Args:
      evaluate: the metric, of `Metric.resampled`.
      clusters: number of clusters.
      repetitions, seed: see `counts`.
      confidence: probability mass of the interval.

    Returns:
      (low, high), or None if the metric is undefined in more than half of the resamples.
    """
    values = np.concatenate(
        [evaluate(draws) for draws in counts(clusters, repetitions=repetitions, seed=seed)]
    )
    defined = values[np.isfinite(values)]
    if 2 * len(defined) < len(values):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def randomisation_p_value(
    evaluate: Resampled, clusters: int, *, repetitions: int | None = None, seed: int = 0
) -> float | None:
    """Two-sided p-value of a paired approximate randomisation test (Noreen, 1989, chapter 2).

    Under the hypothesis that both arms are alike, all answers of a patient may be exchanged between them.

    Args:
      evaluate: the metric over the answers of both arms: clusters 0 to C - 1 are patients with the answers of
        the first arm, C to 2C - 1 the same patients with those of the second.
      clusters: C.
      repetitions: number of random exchanges; by default `default_repetitions` less one.
      seed: of the exchanges.

    Returns:
      (1 + exchanges with a difference at least as large) / (1 + exchanges); None if the metric is undefined.
    """
    rng = np.random.default_rng(seed)

    def differences(kept: np.ndarray) -> np.ndarray:
        return evaluate(np.hstack([kept, 1 - kept])) - evaluate(np.hstack([1 - kept, kept]))

    observed = float(differences(np.ones((1, clusters)))[0])
    if not math.isfinite(observed):
        return None
    repetitions = repetitions or default_repetitions(clusters) - 1
    block, extreme, counted = max(1, _BLOCK // (2 * clusters)), 0, 0
    for start in range(0, repetitions, block):
        size = min(block, repetitions - start)
        found = differences(rng.integers(2, size=(size, clusters)).astype(np.float64))
        found = found[np.isfinite(found)]
        # Equal differences may differ in their last bits, as their sums have other orders.
        extreme += int(np.count_nonzero(np.abs(found) >= abs(observed) - 1e-12))
        counted += len(found)
    return (1 + extreme) / (1 + counted)
