"""The published variant of the COCO metrics: pycocoevalcap with its Java tokenizer and METEOR 1.5.

Needs the extra `coco` and a Java runtime. Texts are untokenized. BLEU, ROUGE-L and CIDEr equal those of
`coco` on tokens of `ptb`; METEOR is here alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence

import numpy as np

from vilam3_jax.errors import UserError
from vilam3_jax.evals.reports.optional import package
from vilam3_jax.evals.reports.pairs import check

METRICS = {
    "bleu": "pycocoevalcap.bleu.bleu.Bleu",
    "rouge_l": "pycocoevalcap.rouge.rouge.Rouge",
    "cider": "pycocoevalcap.cider.cider.Cider",
    "meteor": "pycocoevalcap.meteor.meteor.Meteor",
}


def scores(
    references: Sequence[Sequence[str]], hypotheses: Sequence[str], metrics: Sequence[str] = tuple(METRICS)
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric → (corpus score, scores of the items): [] and [n], for `bleu` [4] and [n, 4].

    Line breaks become spaces: the tokenizer reads one text per line.

    Raises:
      UserError: an unknown metric; Java or pycocoevalcap is missing.
      ValueError: no items, different numbers of items, or an item without references.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise UserError(f"unknown metrics {unknown}; there are {list(METRICS)}")
    check(references, hypotheses)
    if not hypotheses:
        raise ValueError("no items")
    tokenizer = package("pycocoevalcap.tokenizer.ptbtokenizer", "coco", "the published COCO metrics")
    if shutil.which("java") is None:
        raise UserError(
            "the published COCO metrics need java, which is not on PATH: install a runtime (Debian: "
            "apt-get install openjdk-17-jre-headless), or use vilam3_jax.evals.reports.coco, which needs none"
        )
    tokenize = tokenizer.PTBTokenizer().tokenize
    wanted = {i: [{"caption": _line(one)} for one in own] for i, own in enumerate(references)}
    given = {i: [{"caption": _line(one)}] for i, one in enumerate(hypotheses)}
    wanted, given = tokenize(wanted), tokenize(given)
    found = {}
    for name in metrics:
        module, _, kind = METRICS[name].rpartition(".")
        scorer = getattr(package(module, "coco", "the published COCO metrics"), kind)()
        with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):  # BLEU prints its lengths
            corpus, items = scorer.compute_score(wanted, given)
        items = np.asarray(items, np.float64)
        found[name] = (np.asarray(corpus, np.float64), items.T if name == "bleu" else items)
    return found


def _line(text: str) -> str:
    return " ".join(text.split())
