"""Metrics against scikit-learn, weights against repeated rows, and temperatures that are known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from vilam3_jax.evals import estimates
from vilam3_jax.evals.metrics import calibration
from vilam3_jax.evals.metrics.base import metric

NAMES = (
    "accuracy", "positive_f1", "balanced_accuracy", "auroc", "average_precision", "brier", "nll", "ece",
    "aurc",
)  # fmt: skip


def rows_of(n=400, seed=0, ties=8):
    """Yes-no answers with probabilities on a coarse grid, of patients with one to five questions."""
    rng = np.random.default_rng(seed)
    probability = np.round(rng.uniform(0.02, 0.98, n) * ties) / ties * 0.96 + 0.02
    gold = rng.random(n) < probability
    rows = []
    for i in range(n):
        p = float(probability[i])
        said = "yes" if p > 0.5 else "no"
        right = "yes" if gold[i] else "no"
        unparsed = i % 37 == 0
        rows.append(
            {
                "item": f"q{i}", "cluster": f"p{i // 3}", "options": ["yes", "no"], "gold": right,
                "parsed": None if unparsed else said, "correct": said == right and not unparsed,
                "unparsed": unparsed, "output": said, "probabilities": {"yes": p, "no": 1 - p},
                "question_type": "ab"[i % 2], "groups": {"sex": "MF"[i % 5 > 2]},
            }
        )  # fmt: skip
    return rows


def value(name, rows, counts=None):
    """The metric of rows, each repeated as often as its cluster is drawn."""
    _, inverse = np.unique([row["cluster"] for row in rows], return_inverse=True)
    draws = np.ones((1, inverse.max() + 1)) if counts is None else counts[None]
    return float(metric(name).resampled(rows, inverse)(draws)[0])


def test_equal_to_scikit_learn():
    rows = rows_of()
    gold = np.asarray([row["gold"] == "yes" for row in rows])
    score = np.asarray([row["probabilities"]["yes"] for row in rows])
    labels = np.asarray([str(row["parsed"]) for row in rows])
    names = np.asarray([row["gold"] for row in rows])
    wanted = {
        "auroc": sklearn_metrics.roc_auc_score(gold, score),
        "average_precision": sklearn_metrics.average_precision_score(gold, score),
        "brier": sklearn_metrics.brier_score_loss(gold, score),
        "nll": sklearn_metrics.log_loss(gold, score),
        "accuracy": (labels == names).mean(),
        "balanced_accuracy": np.mean([(labels == names)[names == one].mean() for one in ("yes", "no")]),
    }
    for name, expected in wanted.items():
        assert value(name, rows) == pytest.approx(expected, abs=1e-9), name


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("ece", "aurc")])
def test_a_drawn_cluster_counts_as_often_as_it_is_drawn(name):
    rows = rows_of(60)
    clusters = sorted({row["cluster"] for row in rows})
    counts = np.random.default_rng(1).integers(0, 3, len(clusters))
    repeated = [
        {**row, "cluster": f"{cluster}-{copy}"}
        for cluster, count in zip(clusters, counts, strict=True)
        for copy in range(count)
        for row in rows
        if row["cluster"] == cluster
    ]
    assert value(name, rows, counts.astype(float)) == pytest.approx(value(name, repeated), abs=1e-12)


def test_calibration_error_of_known_probabilities():
    rows = rows_of(40_000, ties=1000)
    assert value("ece", rows) < 0.02  # the answers were drawn from these probabilities
    sure = [
        {**row, "probabilities": {row["parsed"] or "no": 0.999, "other": 0.001}, "options": ["no", "yes"]}
        for row in rows
    ]
    for row in sure:
        said = max(row["probabilities"], key=row["probabilities"].get)
        row["probabilities"] = {"yes": 0.999, "no": 0.001} if said == "yes" else {"yes": 0.001, "no": 0.999}
    accuracy = np.mean([max(r["probabilities"], key=r["probabilities"].get) == r["gold"] for r in sure])
    assert value("ece", sure) == pytest.approx(0.999 - accuracy, abs=1e-6)
    assert value("ece_scaled", sure) < 0.03


def test_the_temperature_of_sharpened_probabilities_is_found():
    rows = rows_of(8000, ties=1000)
    raw = calibration.probabilities_of(rows)
    sharpened = [calibration.scale(p, 1 / 3) for p in raw]
    right = np.asarray([row["options"].index(row["gold"]) for row in rows])
    assert calibration.fit_temperature(sharpened, right) == pytest.approx(3, rel=0.05)


def test_selective_answers_rank_by_confidence():
    rows = [
        {**row, "gold": "yes", "probabilities": {"yes": p, "no": 1 - p}}
        for row, p in zip(rows_of(4), (0.9, 0.8, 0.2, 0.4), strict=True)
    ]
    # Right with 0.9 and 0.8, then wrong: "no" with 0.8, which ties, and with 0.6.
    assert value("aurc", rows) == pytest.approx((0 + 0 + 1 / 3 + 2 / 4) / 4)


def test_means_over_question_types():
    rows = rows_of()
    both = estimates.aggregated(metric("positive_f1"), "mean_of_types")
    found = estimates.estimate(both, rows, arm="a")
    parts = [value("positive_f1", [row for row in rows if row["question_type"] == kind]) for kind in "ab"]
    assert found.value == pytest.approx(np.mean(parts))
    assert (
        found.interval[0] < found.value < found.interval[1]
        and found.metric == "positive_f1, mean over question_type"
    )
    groups = estimates.group_rows(rows, "sex")
    assert list(groups) == ["sex=F", "sex=M"] and sum(map(len, groups.values())) == len(rows)


def test_a_metric_that_is_undefined_says_so():
    rows = [{**row, "gold": "no"} for row in rows_of(60)]
    found = estimates.estimate(metric("auroc"), rows, arm="a")
    assert (found.value, found.interval, found.note) == (None, None, estimates.UNDEFINED)
    few = estimates.estimate(metric("positive_f1"), rows_of(12), arm="a")
    assert few.interval is None and few.note == estimates.TOO_FEW and few.clusters == 4


def test_a_contrast_is_paired():
    rows = rows_of(300)
    better = [{**row, "correct": True} if i % 4 == 0 else row for i, row in enumerate(rows)]
    found = estimates.contrast(metric("accuracy"), better[:290], rows, name="gain", arms=("b", "a"))
    assert found.n == 290 and found.left_out == 10
    wanted = np.mean(
        [float(b["correct"]) - float(a["correct"]) for a, b in zip(rows, better, strict=True)][:290]
    )
    assert found.difference == pytest.approx(wanted)
    assert found.interval[0] > 0 and found.p_value < 0.001
    same = estimates.contrast(metric("accuracy"), rows, rows, name="none", arms=("b", "a"))
    assert same.difference == 0 and same.p_value == 1 and same.note == estimates.ALL_ALIKE
    assert estimates.contrast(metric("positive_f1"), rows[:5], rows[5:], name="none", arms=("b", "a")) is None
