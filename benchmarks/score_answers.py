"""How long does scoring take? 100,000 answers must be read and counted within 10 seconds.

Run: python benchmarks/score_answers.py [--items=100000]

Reads the adversarial answers of tests/evals with their parsers, over and over, and prints the time of each
parser for that many answers. Then evaluates each metric on that many rows of 1,000 patients, with 1,000
bootstrap resamples. No time includes a model.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vilam3_jax.evals.metrics.base import metric
from vilam3_jax.evals.parsers import PARSERS

CORPUS = Path(__file__).parents[1] / "tests" / "evals" / "adversarial_answers.jsonl"
BUDGET_S = 10.0
PATIENTS, RESAMPLES = 1_000, 1_000
# (metrics, parsed, gold): alternately right and wrong.
ROWS: tuple[tuple[tuple[str, ...], tuple[Any, Any], tuple[Any, Any]], ...] = (
    (("accuracy", "balanced_accuracy", "macro_positive_f1", "vila_m3_f1"), ("yes", None), ("yes", "no")),
    (("auroc", "average_precision"), ("yes", "no"), ("yes", "no")),
    (("token_f1", "open_recall"), ("left lung", "nodule of liver"), ("left lower lung", "liver nodule")),
    (("label_f1",), (["a", "b"], []), (["a"], ["c"])),
    (("mae", "rmse"), (3.5, None), (3.0, 4.0)),
    (
        ("detection_f1_0.5", "detection_f1_mean"),
        ([{"label": "", "box": [0.0, 0.0, 9.0, 9.0]}] * 3, None),
        ([{"label": "", "box": [0.0, 0.0, 9.0, 8.0]}] * 2, []),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the times; returns 1 if a parser is over the budget."""
    options = argparse.ArgumentParser(description="Times parsers and metrics of answers.")
    options.add_argument("--items", type=int, default=100_000, help="answers of each parser")
    items = options.parse_args(argv).items
    cases: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in CORPUS.read_text("utf-8").splitlines():
        case = json.loads(line)
        cases[case["parser"]].append(case)
    seconds = {name: _parser_seconds(name, own, items) for name, own in cases.items()}
    for name, taken in seconds.items():
        print(f"parser {name:26} {taken:6.2f} s for {items:,} answers")
    draws = np.random.default_rng(0).multinomial(PATIENTS, np.full(PATIENTS, 1 / PATIENTS), RESAMPLES)
    for names, parsed, gold in ROWS:
        rows = [_row(place, parsed[place % 2], gold[place % 2]) for place in range(items)]
        for name in names:
            start = time.perf_counter()
            metric(name).resampled(rows, np.arange(items) % PATIENTS)(draws)
            taken = time.perf_counter() - start
            print(f"metric {name:26} {taken:6.2f} s for {items:,} rows, {RESAMPLES:,} resamples")
    slow = [name for name, taken in seconds.items() if taken > BUDGET_S * items / 100_000]
    print(f"over the budget: {', '.join(slow) or 'none'}")
    return int(bool(slow))


def _parser_seconds(name: str, cases: list[dict[str, Any]], items: int) -> float:
    parse = PARSERS[name]
    start = time.perf_counter()
    for case in itertools.islice(itertools.cycle(cases), items):
        parse(case["text"], case.get("options", ()), **case.get("spec", {}))
    return time.perf_counter() - start


def _row(place: int, parsed: Any, gold: Any) -> dict[str, Any]:
    return {
        "gold": gold,
        "parsed": parsed,
        "correct": parsed == gold,
        "question_type": "abcde"[place % 5],
        "options": [],
        "answer_spec": {"minimum": 0, "maximum": 10},
        "probabilities": {"yes": (place % 997) / 997, "no": 1 - (place % 997) / 997},
    }


if __name__ == "__main__":
    sys.exit(main())
