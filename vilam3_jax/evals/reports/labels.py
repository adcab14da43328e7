"""F1 of findings labelled in reports, as CheXbert labels them: accuracy, 14 and 5 findings, micro and macro.

The labels are given; no labeller runs here. A label is one of `STATES`. By default, `uncertain` counts as
positive, and `negative` and `blank` as absent. `uncertain="negative"` is the other convention; a result must
name the one it used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

STATES = ("blank", "positive", "negative", "uncertain")
FINDINGS_14 = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
FINDINGS_5 = ("Cardiomegaly", "Edema", "Consolidation", "Atelectasis", "Pleural Effusion")


def presence(states: Sequence[Sequence[str]], *, uncertain: str = "positive") -> np.ndarray:
    """Bool [n, 14] of the states [n, 14], in the order of `FINDINGS_14`.

    Raises:
      ValueError: an unknown state or rule, or a row without 14 states.
    """
    if uncertain not in ("positive", "negative"):
        raise ValueError(f"uncertain={uncertain!r}: choose 'positive' or 'negative'")
    for index, row in enumerate(states):
        if len(row) != len(FINDINGS_14) or not set(row) <= set(STATES):
            raise ValueError(f"row {index}: {list(row)} are not {len(FINDINGS_14)} of {STATES}")
    present = {"positive"} | ({"uncertain"} if uncertain == "positive" else set())
    flags = [[state in present for state in row] for row in states]
    return np.asarray(flags, bool).reshape(len(flags), len(FINDINGS_14))


def label_statistics(references: np.ndarray, hypotheses: np.ndarray) -> np.ndarray:
    """Float64 [n, 44] of bool [n, 14] each: true positives, false positives, false negatives of each finding;
    whether the five findings all agree; and 1.

    Raises:
      ValueError: other shapes.
    """
    references, hypotheses = np.asarray(references, bool), np.asarray(hypotheses, bool)
    if references.shape != hypotheses.shape or references.shape[1:] != (len(FINDINGS_14),):
        raise ValueError(
            f"labels of shapes {references.shape} and {hypotheses.shape}; [n, 14] twice is needed"
        )
    five = [FINDINGS_14.index(name) for name in FINDINGS_5]
    agree = (references == hypotheses)[:, five].all(axis=1)
    counts = [references & hypotheses, ~references & hypotheses, references & ~hypotheses]
    return np.concatenate([*counts, agree[:, None], np.ones((len(agree), 1))], axis=1).astype(np.float64)


def label_value(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Scores, float64 [...], of sums [..., 44] of the rows of `label_statistics`.

    F1 = 2 TP / (2 TP + FP + FN), and 0 without any. `micro` adds the counts of all findings first;
    `macro` is the mean over all 14 or 5 findings, those that never occur with 0. `accuracy` is the share of
    reports on which all five findings agree.
    """
    sums = np.asarray(sums, np.float64)
    size = len(FINDINGS_14)
    counts = np.stack([sums[..., i * size : (i + 1) * size] for i in range(3)])  # [3, ..., 14]
    five = [FINDINGS_14.index(name) for name in FINDINGS_5]
    chosen = {"14": counts, "5": counts[..., five]}
    found = {"accuracy": sums[..., -2] / sums[..., -1]}
    for name, own in chosen.items():
        found[f"micro_f1_{name}"] = _f1(own.sum(axis=-1))
        found[f"macro_f1_{name}"] = _f1(own).mean(axis=-1)
    return found


def _f1(counts: np.ndarray) -> np.ndarray:
    """F1, [...], of true positives, false positives and false negatives, [3, ...]."""
    twice, wrong = 2 * counts[0], counts[1] + counts[2]
    return np.divide(twice, twice + wrong, out=np.zeros_like(twice), where=twice + wrong > 0)
