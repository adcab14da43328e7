"""Accuracies, cluster bootstrap and paired differences against hand-computed values and scipy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.stats

from benchmarks import interval_coverage
from vilam3_jax.evals import statistics


def row(
    item, cluster, correct, *, arm="a", question_type="organ", source="mask", oracle=False, unparsed=False
):
    return {
        "item": item,
        "cluster": cluster,
        "correct": correct,
        "arm": arm,
        "question_type": "organ",
        "label_source": source,
        "oracle": oracle,
        "unparsed": unparsed,
    }


def test_interval_of_singleton_clusters_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(3).random(40)
    reference = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(4)
    ).confidence_interval
    low, high = statistics.cluster_interval(values, [f"p{i}" for i in range(40)], repetitions=20_000)
    assert abs(low - reference.low) < 0.01
    assert abs(high - reference.high) < 0.01


def test_interval_resamples_clusters_not_questions():
    """Ten equal questions per patient have the spread of 12 values, not of 120."""
    patient = np.asarray([0, 1] * 6, np.float64)
    values, clusters = np.repeat(patient, 10), np.repeat([f"p{i}" for i in range(12)], 10)
    by_patient = statistics.cluster_interval(values, clusters)
    by_question = statistics.cluster_interval(values, [str(i) for i in range(120)])
    assert by_patient == statistics.cluster_interval(patient, [f"p{i}" for i in range(12)])
    assert by_patient[1] - by_patient[0] > 2.5 * (by_question[1] - by_question[0])


def test_two_clusters_by_hand():
    """Draws are AA, AB, BB with 1/4, 1/2, 1/4: the 95 % ends are the pure ones; sizes weigh the middle."""
    low, high = statistics.cluster_interval([1, 1, 1, 0], list("AAAB"), repetitions=4000)
    assert (low, high) == (0.0, 1.0)
    low, high = statistics.cluster_interval(
        [1, 1, 1, 0], ["A", "A", "A", "B"], repetitions=4000, confidence=0.4
    )
    assert (low, high) == (0.75, 0.75)


def test_interval_is_seeded():
    values, clusters = list(np.random.default_rng(0).random(30)), [f"p{i % 15}" for i in range(30)]
    first = statistics.cluster_interval(values, clusters, seed=1)
    assert first == statistics.cluster_interval(values, clusters, seed=1)
    assert first != statistics.cluster_interval(values, clusters, seed=2)


def test_interval_refuses_nothing_and_unequal_lengths():
    with pytest.raises(ValueError, match="at least one"):
        statistics.cluster_interval([], [])
    with pytest.raises(ValueError, match="2 values for 1"):
        statistics.cluster_interval([1, 2], ["a"])


def test_few_clusters_get_values_and_the_words():
    rows = [row("1", "p1", True), row("2", "p1", False), row("3", "p2", True, unparsed=False)]
    overall, organ = statistics.summarise(rows)
    assert overall.question_type == "all"
    assert organ.accuracy == pytest.approx(2 / 3)
    assert organ.interval is None
    assert organ.note == "too few patients for an interval"
    assert organ.per_cluster == {"p1": 0.5, "p2": 1.0}
    assert (organ.n, organ.clusters) == (3, 2)
    assert dataclasses.asdict(organ)["interval"] is None


def test_ten_clusters_get_an_interval_around_the_mean():
    rows = [row(str(i), f"p{i % 10}", i % 7 != 0, unparsed=i == 0) for i in range(60)]
    summary = statistics.summarise(rows)[1]
    assert summary.clusters == 10
    low, high = summary.interval
    assert low < summary.accuracy < high
    assert summary.per_cluster == {}
    assert summary.unparsed == 1
    assert dataclasses.asdict(summary)["interval"] == [low, high]


def test_alike_clusters_are_marked():
    rows = [row(str(i), f"p{i}", True) for i in range(10)]
    summary = statistics.summarise(rows)[0]
    assert summary.interval == [1.0, 1.0]
    assert summary.note == statistics.ALL_ALIKE


def test_oracle_rows_never_enter_the_other_total():
    rows = [
        row("1", "p", False),
        row("2", "p", True, oracle=True),
        row("3", "p", True, oracle=True, source="map"),
    ]
    summaries = statistics.summarise(rows)
    totals = {s.oracle: s for s in summaries if s.question_type == "all"}
    assert totals[False].n == 1 and totals[False].accuracy == 0
    assert totals[True].n == 2 and totals[True].accuracy == 1
    assert {s.label_source for s in summaries if s.oracle} == {"all", "mask", "map"}


def test_paired_difference_pairs_by_item():
    first = [row(str(i), f"p{i % 12}", True) for i in range(24)]
    second = [row(str(i), f"p{i % 12}", i % 2 == 0, arm="b") for i in reversed(range(24))] + [
        row("extra", "p0", True, arm="b")
    ]
    difference = statistics.paired_difference(first, second)
    assert difference.difference == 0.5
    assert (difference.n, difference.clusters, difference.left_out) == (24, 12, 1)
    assert 0 <= difference.interval[0] < 0.5 < difference.interval[1] <= 1
    back = statistics.paired_difference(second, first)
    assert back.difference == -0.5
    assert back.interval == pytest.approx([-difference.interval[1], -difference.interval[0]])


def test_paired_difference_is_narrower_than_two_intervals():
    """Arms that fail on the same patients differ by a constant, which pairing shows."""
    rng = np.random.default_rng(5)
    easy = {f"p{i}": rng.random() < 0.5 for i in range(30)}
    first = [row(f"{p}-{k}", p, ok) for p, ok in easy.items() for k in range(4)]
    second = [{**r, "correct": r["correct"] and r["item"][-1] != "0", "arm": "b"} for r in first]
    difference = statistics.paired_difference(first, second)
    own = statistics.summarise(first)[0].interval
    assert difference.interval[1] - difference.interval[0] < 0.5 * (own[1] - own[0])


def test_paired_difference_refuses_foreign_and_doubled_items():
    with pytest.raises(ValueError, match="no question in common"):
        statistics.paired_difference([row("1", "p", True)], [row("2", "p", True)])
    with pytest.raises(ValueError, match="twice"):
        statistics.paired_difference([row("1", "p", True), row("1", "p", True)], [row("1", "p", True)])


@pytest.mark.slow
def test_the_interval_covers_the_truth_as_often_as_it_says():
    """200 patients with 1 to 20 questions; docs/evaluation.md states the coverage of fewer."""
    assert 0.93 <= interval_coverage.coverage(200, repeats=1000) <= 0.97
    assert interval_coverage.coverage(200, repeats=200, by_patient=False) < 0.8
