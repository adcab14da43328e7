"""Metrics of answer families against scikit-learn and values by hand, and weights against repeated rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics

from vilam3_jax.errors import UserError
from vilam3_jax.evals.metrics import detection, question_kinds, text_overlap
from vilam3_jax.evals.metrics.base import metric

YES_NO = ["yes", "no"]
NAMES = (
    "macro_accuracy", "closed_accuracy", "open_accuracy", "macro_closed_accuracy", "positive_f1",
    "macro_positive_f1", "vila_m3_f1",
)  # fmt: skip


def row(gold, parsed, kind="a", options=YES_NO, **more):
    return {
        "item": "i", "gold": gold, "parsed": parsed, "unparsed": parsed is None, "correct": parsed == gold,
        "question_type": kind, "options": options, "output": str(parsed), **more,
    }  # fmt: skip


def value(name, rows, draws=None):
    weights = np.ones((1, len(rows))) if draws is None else np.asarray([draws], float)
    return float(metric(name).resampled(rows, np.arange(len(rows)))(weights)[0])


def answers(n=300, seed=0):
    rng = np.random.default_rng(seed)
    said = rng.choice(["yes", "no", None], n, p=[0.4, 0.5, 0.1])
    gold = rng.choice(YES_NO, n)
    kinds = rng.choice(["a", "b", "c"], n, p=[0.6, 0.3, 0.1])
    options = [YES_NO if closed else [] for closed in rng.random(n) < 0.7]
    return [row(str(g), s, str(k), o) for g, s, k, o in zip(gold, said, kinds, options, strict=True)]


def wrong_if_unparsed(one):
    """What scikit-learn is shown: an unparsed answer says the opposite of the right one."""
    return (one["gold"] == "no") if one["parsed"] is None else one["parsed"] == "yes"


def test_f1_is_that_of_scikit_learn_where_an_unparsed_answer_is_wrong():
    rows = answers()
    own = {kind: [one for one in rows if one["question_type"] == kind] for kind in "abc"}

    def f1(part):
        return sklearn_metrics.f1_score(
            [one["gold"] == "yes" for one in part], [wrong_if_unparsed(one) for one in part]
        )

    assert value("positive_f1", rows) == pytest.approx(f1(rows), abs=1e-12)
    macro = np.mean([f1(part) for part in own.values()])
    assert value("macro_positive_f1", rows) == pytest.approx(macro, abs=1e-12)
    assert value("vila_m3_f1", rows) == pytest.approx(macro, abs=1e-12)


def test_f1_is_zero_where_nothing_is_yes_and_undefined_nowhere():
    rows = [row("no", "no"), row("yes", "yes", "b")]
    assert value("macro_positive_f1", rows) == 1 / 2
    assert value("positive_f1", rows[:1]) == 0


def test_one_answer_that_is_not_binary_makes_the_f1_of_its_finding_zero_as_scikit_learn_refuses_it():
    rows = [row("yes", "yes"), row("no", "no"), row("no", 2), row("yes", "yes", "b")]
    with pytest.raises(ValueError, match="multiclass"):
        sklearn_metrics.f1_score([True, False, False], [1, 0, 2])
    assert value("vila_m3_f1", rows) == 1 / 2
    assert value("macro_positive_f1", rows) == 1
    assert value("vila_m3_f1", rows, [1, 1, 0, 1]) == 1, "a resample without that answer"


def test_f1_needs_questions_for_yes_or_no():
    with pytest.raises(UserError, match="item 'i': its answer is 'liver'"):
        value("positive_f1", [row("liver", "liver")])


def test_accuracies_of_closed_and_open_questions():
    rows = [
        row("yes", "yes"), row("no", None), row("liver", "liver", options=[]), row("yes", "yes", "b"),
        row("left", "left", "b", options=[], answer_spec={"answer_type": "closed"}),
        row("x", "y", "c", options=[]),
    ]  # fmt: skip
    assert value("closed_accuracy", rows) == 3 / 4
    assert value("open_accuracy", rows) == 1 / 2
    assert value("macro_closed_accuracy", rows) == pytest.approx((1 / 2 + 1) / 2), "c has no closed question"
    assert value("macro_accuracy", rows) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert math.isnan(value("closed_accuracy", rows[2:3]))


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_repeats_a_row(name):
    rows = answers(60)
    draws = np.random.default_rng(1).integers(0, 3, len(rows))
    repeated = [one for one, count in zip(rows, draws, strict=True) for _ in range(count)]
    assert value(name, rows, draws) == pytest.approx(value(name, repeated), abs=1e-12)


# --- sets of labels


def test_label_scores_are_those_of_scikit_learn_for_each_question():
    rng = np.random.default_rng(0)
    names = np.asarray(list("abcde"))
    gold, said = (rng.random((50, 5)) < 0.4 for _ in range(2))
    rows = [row(list(names[g]), list(names[s])) for g, s in zip(gold, said, strict=True)]
    both_empty = ~gold.any(1) & ~said.any(1)
    for place, name in enumerate(("precision", "recall", "f1")):
        found = [
            sklearn_metrics.precision_recall_fscore_support(
                g, s, average="binary", zero_division=np.float64(1.0 if empty else 0.0)
            )[place]
            for g, s, empty in zip(gold, said, both_empty, strict=True)
        ]
        assert value(f"label_{name}", rows) == pytest.approx(np.mean(found), abs=1e-12)


def test_empty_sets_of_labels():
    assert question_kinds.label_scores([], []) == (1, 1, 1)
    assert question_kinds.label_scores([], ["a"]) == question_kinds.label_scores(["a"], []) == (0, 0, 0)
    assert question_kinds.label_scores(None, []) == (0, 0, 0)
    assert question_kinds.label_scores(["a", "b"], ["a"]) == (2 / 3, 1 / 2, 1)


# --- numbers

RANGE = {"minimum": 0, "maximum": 100}


def test_an_unparsed_number_has_the_largest_error_of_its_range():
    rows = [
        row(10.0, 13.0, answer_spec=RANGE),
        row(30.0, None, answer_spec=RANGE),
        row(90.0, None, answer_spec=RANGE),
    ]
    assert value("mae", rows) == pytest.approx((3 + 70 + 90) / 3)
    assert value("rmse", rows) == pytest.approx(math.sqrt((9 + 4900 + 8100) / 3))
    assert value("flare_mae", rows) == pytest.approx((3 + 30 + 90) / 3)
    assert value("flare_rmse", rows) == pytest.approx(math.sqrt((9 + 900 + 8100) / 3))


def test_without_a_range_the_error_of_an_unparsed_number_is_undefined():
    assert value("mae", [row(10.0, 12.0)]) == 2
    assert math.isnan(value("mae", [row(10.0, 12.0), row(10.0, None)]))
    assert math.isnan(value("rmse", [row(10.0, None, answer_spec={"minimum": 0})]))


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100) | st.none()), min_size=1, max_size=8))
def test_no_number_is_worse_than_an_unparsed_answer(pairs):
    rows = [row(gold, parsed, answer_spec=RANGE) for gold, parsed in pairs]
    unparsed = [row(gold, None, answer_spec=RANGE) for gold, _ in pairs]
    for name in ("mae", "rmse"):
        assert value(name, rows) <= value(name, unparsed) * (1 + 1e-12)
        assert not metric(name).higher_is_better


# --- boxes


def box(*corners, label=""):
    return {"label": label, "box": [float(corner) for corner in corners]}


def test_iou_by_hand():
    assert detection.iou([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(50 / 150)
    assert detection.iou([0, 0, 10, 10], [10, 0, 20, 10]) == 0
    assert detection.iou([0, 0, 4, 4], [0, 0, 4, 4]) == 1


def test_boxes_are_matched_by_falling_iou_one_to_one():
    gold = [box(0, 0, 10, 10), box(0, 0, 10, 6)]
    said = [box(0, 0, 10, 9)]  # IoU 0.9 with the first, 0.67 with the second
    assert detection.matched_ious(said, gold) == [pytest.approx(0.9)]
    twice = [box(0, 0, 10, 9), box(0, 0, 10, 9)]
    assert detection.matched_ious(twice, gold) == [pytest.approx(0.9), pytest.approx(2 / 3)]


def test_labels_must_agree_if_both_boxes_have_one():
    gold = [box(0, 0, 4, 4, label="a")]
    assert detection.matched_ious([box(0, 0, 4, 4, label="b")], gold) == []
    assert detection.matched_ious([box(0, 0, 4, 4)], gold) == [1]


def test_f1_of_boxes_sums_counts_over_questions():
    rows = [
        row([box(0, 0, 10, 10)], [box(0, 0, 10, 5), box(50, 50, 60, 60)]),  # IoU 0.5
        row([box(0, 0, 10, 10), box(20, 20, 30, 30)], None),
        row([], []),
    ]
    assert value("detection_f1_0.5", rows) == pytest.approx(2 * 1 / (2 + 3))
    assert value("detection_f1_0.3", rows) == pytest.approx(2 * 1 / (2 + 3))
    assert value("detection_f1_mean", rows) == pytest.approx(3 / 5 * 2 / 5), "0.3, 0.4 and 0.5 of five"
    assert math.isnan(value("detection_f1_0.5", rows[2:]))


# --- words


def test_token_f1_counts_multisets():
    assert text_overlap.token_f1("left left lung", "left lobe") == pytest.approx(2 * 1 / 5)
    assert text_overlap.token_f1("left left lung", "left left lobe") == pytest.approx(2 * 2 / 6)
    assert text_overlap.token_f1(None, "left") == text_overlap.token_f1("right", "left") == 0
    assert text_overlap.token_f1("left lung", "lung left") == 1


def test_recall_counts_the_words_of_the_answer_as_the_reference_does():
    assert text_overlap.vqa_recall("left left lung", "left lobe") == pytest.approx(2 / 3)
    assert text_overlap.vqa_recall("lung", "left lung") == 1 / 2
    assert text_overlap.vqa_recall(None, "left") == text_overlap.vqa_recall("right", "left") == 0


def test_llava_med_leaves_wrong_yes_and_no_out_as_released():
    rows = [row("yes", "yes it is"), row("no", "yes"), row("yes", "maybe"), row("no", None)]
    assert value("llava_med_closed_accuracy", rows) == 1 / 4
    assert value("llava_med_closed_accuracy_as_released", rows) == 1 / 3
