"""Seconds to tokenize and score reports, as a ratio to pycocoevalcap in the same run.

    python benchmarks/report_metrics.py --reports 3000

The reports are those of Indiana University, read from the torchxrayvision package; each is scored against the
next. Needs the extra `coco`; the tokenizer of pycocoevalcap also needs Java. Prints JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from vilam3_jax.evals.reports import coco, ptb


def reports(count: int) -> list[str]:
    """Findings and impressions of the first reports."""
    spec = importlib.util.find_spec("torchxrayvision")
    if spec is None or spec.origin is None:
        raise SystemExit("error: the reports come from torchxrayvision, which is not installed")
    texts = []
    with tarfile.open(Path(spec.origin).parent / "data/NLMCXR_reports.tgz") as members:
        for member in members:
            if member.name.endswith(".xml") and (file := members.extractfile(member)):
                parts = {
                    one.get("Label"): one.text or "" for one in ElementTree.parse(file).iter("AbstractText")
                }
                text = " ".join(f"{parts.get('FINDINGS', '')} {parts.get('IMPRESSION', '')}".split())
                texts += [text] if text else []
    return texts[:count]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    """Runs both and prints the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reports", type=int, default=3000)
    texts = reports(parser.parse_args().reports)
    texts = [*texts, texts[0]]
    ours: dict[str, float] = {}
    ours["tokens"], tokens = timed(lambda: [ptb.joined(text) for text in texts])
    wanted, given = [[one] for one in tokens[:-1]], tokens[1:]
    ours["bleu"], _ = timed(lambda: coco.bleu_statistics(wanted, given))
    ours["rouge_l"], _ = timed(lambda: coco.rouge_l(wanted, given))
    ours["cider"], _ = timed(lambda: coco.cider(wanted, given))

    theirs: dict[str, float] = {}
    captions = {index: [{"caption": text}] for index, text in enumerate(texts)}
    theirs["tokens"], _ = timed(lambda: PTBTokenizer().tokenize(captions))
    gold, guess = dict(enumerate(wanted)), {index: [one] for index, one in enumerate(given)}
    with open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
        for name, scorer in {"bleu": Bleu(4), "rouge_l": Rouge(), "cider": Cider()}.items():
            theirs[name], _ = timed(lambda scorer=scorer: scorer.compute_score(gold, guess))
    ours["all"], theirs["all"] = sum(ours.values()), sum(theirs.values())
    found = {
        name: {"seconds": round(ours[name], 3), "ratio": round(ours[name] / theirs[name], 3)} for name in ours
    }
    print(json.dumps({"reports": len(given), **found}, indent=2))


if __name__ == "__main__":
    main()
