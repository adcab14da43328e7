"""The sentence of a report follows from the interval of the difference, and its dialogues from the rows."""

from __future__ import annotations

import pytest

from vilam3_jax.report import finding, runs


def document(interval, difference=0.3):
    accuracies = {"stage4_experts": 0.8, "stage4_no_experts": 0.5, "stage4_falsified": 0.25}
    pair = {"first": "stage4_experts", "second": "stage4_no_experts", "difference": difference}
    return {
        "answerable": [{"arm": arm, "accuracy": accuracy} for arm, accuracy in accuracies.items()],
        "comparisons": [
            {"group": "main", **pair, "n": 90, "clusters": 30, "interval": [-1, 1]},
            {"group": "answerable", **pair, "n": 40, "clusters": 12, "interval": interval},
        ],
    }


@pytest.mark.parametrize(
    ("interval", "start"),
    [
        ([0.1, 0.5], "The model uses its experts: on 40 held-out questions of 12 patients"),
        ([0.0, 0.5], "This run does not show that experts help"),
        ([-0.1, 0.5], "This run does not show that experts help"),
        ([-0.5, -0.1], "In this run, experts make the answers worse"),
        (None, "Too few patients to tell whether experts help"),
    ],
)
def test_the_sentence_says_what_the_interval_allows(interval, start):
    text = finding.sentence(document(interval))
    assert text.startswith(start)
    assert "80\u202f% with experts and 50\u202f% without (+30 points" in text
    assert text.endswith("with falsified expert results, on 25\u202f%.")
    assert ("95 % interval" in text) == (interval is not None)


def test_without_a_comparison_the_sentence_says_so():
    assert "No question" in finding.sentence({"answerable": [], "comparisons": []})


def arm(name, right, called=True):
    rows = [
        {"item": item, "correct": correct, "oracle": item == "oracle", "trigger": "<X()>" if called else None}
        for item, correct in right.items()
    ]
    return runs.Arm(name, rows, {})


def test_contrasts_are_questions_whose_outcome_the_expert_changed():
    without = arm("stage4_no_experts", dict.fromkeys("abc", False) | {"d": True, "oracle": False}, False)
    helped = arm("stage4_experts", {"a": True, "b": False, "d": True, "oracle": True})
    falsified = arm("stage4_falsified", {"a": False, "d": False})
    corrected, spoiled = finding.contrasts([without, helped, falsified])
    assert corrected.title == "The expert corrected the answer"
    assert (corrected.row["item"], corrected.before["correct"]) == ("a", False)
    assert spoiled.row is falsified.rows[1] and spoiled.before["correct"]
    assert finding.contrasts([without, arm("stage4_experts", {"a": True}, called=False)]) == []
    assert finding.contrasts([without]) == []
