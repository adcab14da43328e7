"""Metrics that need a model, loaded from local weights by another package, and BERTScore's matching.

A back end is an entry point of the group `vilam3.report_metrics`: a function from a folder of weights to an
object with `score` (`Backend`). `vilam3_experts` brings `bertscore`. CheXbert, RadGraph and GREEN need none:
run the model where it is installed, and score its output with `labels`, `graphs` and `green`. Nothing is
downloaded, no code of a weight folder runs, and no other metric stands in for a missing one.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from vilam3_jax.errors import UserError

GROUP = "vilam3.report_metrics"
# What to do about a metric without a back end.
ADVICE = {
    "bertscore": "pip install -e ./experts",
    "chexbert": "label the reports with CheXbert and use vilam3_jax.evals.reports.labels",
    "radgraph": "annotate the reports with RadGraph and use vilam3_jax.evals.reports.graphs",
    "green": "run the judge and use vilam3_jax.evals.reports.green",
    "ratescore": f"install a package with an entry point of the group {GROUP}",
}
_PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".th")


class Backend(Protocol):
    """A loaded metric."""

    def score(self, references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
        """Float64 [n], one score per pair."""
        ...


def load(name: str, weights: str | Path) -> Backend:
    """The metric `name` with the weights in the folder `weights`.

    Raises:
      UserError: an unknown metric, no back end for it, no such folder, or no safetensors in it.
    """
    entries = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if name not in entries:
        if name not in ADVICE:
            raise UserError(f"unknown metric {name!r}; there are {sorted({*ADVICE, *entries})}")
        raise UserError(f"no back end for {name!r} is installed; {ADVICE[name]}")
    folder = Path(weights)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {name} needs its weights there, and downloads nothing")
    if not list(folder.rglob("*.safetensors")):
        pickled = sorted(file.name for file in folder.rglob("*") if file.suffix in _PICKLED)
        found = f"only pickles ({', '.join(pickled)}), which could run code" if pickled else "no weights"
        raise UserError(f"{folder}: {found}; {name} reads *.safetensors")
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[variable] = "1"
    try:
        factory: Callable[[Path], Backend] = entries[name].load()
    except ImportError as error:
        raise UserError(
            f"the back end of {name!r} cannot be imported ({error}); {ADVICE.get(name, '')}"
        ) from error
    return factory(folder)


def greedy_match(reference: np.ndarray, hypothesis: np.ndarray) -> tuple[float, float, float]:
    """Precision, recall and F1 of token embeddings [R, E] and [H, E] (Zhang et al., 2020, section 3).

    Each token is matched with the most similar one of the other text by cosine; the mean over the tokens of
    the hypothesis is the precision, of the reference the recall. Without idf weights and baseline rescaling.
    A text without tokens scores 0.
    """
    if not len(reference) or not len(hypothesis):
        return 0.0, 0.0, 0.0
    similarity = _unit(hypothesis) @ _unit(reference).T  # [H, R]
    precision, recall = float(similarity.max(axis=1).mean()), float(similarity.max(axis=0).mean())
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total > 0 else 0.0


def _unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
