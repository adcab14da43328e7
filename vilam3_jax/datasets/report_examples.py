"""Films with their reports: what the report datasets of MIMIC-CXR share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets.chest_findings import with_film_expert
from vilam3_jax.datasets.conversations import conversation, pair, question_meta
from vilam3_jax.datasets.dataset import Context, SkipItem
from vilam3_jax.datasets.mimic_cxr import FRONTAL, Film, film_meta
from vilam3_jax.datasets.report_text import clean, reworded, sentence_pool

MAX_REPORT = 256 << 10  # bytes or characters; the longest reports have some 10,000
REFERENCE_QUESTION = "Describe the image in detail."
CONFIGS = {
    "clean": "cleaned reports in their own words",
    "pooled": "cleaned reports whose frequent sentences have one wording",
    "pairs": "image-text pairs of films and cleaned reports",
}


class Pools(NamedTuple):
    """Usual wordings of sentences, of `sentence_pool`; empty where reports keep their words.

    Attributes:
      train: from the training split.
      test: from the test split, as the reference's; used with `parity` alone, as it tells of the test.
    """

    train: Mapping[str, str]
    test: Mapping[str, str]


def pools_of(texts: Mapping[str, Iterable[str]]) -> Pools:
    """The pools of raw texts, by split."""
    made = {
        name: sentence_pool(clean(text).text for text in texts.get(name, ())) for name in ("train", "test")
    }
    return Pools(made["train"], made["test"])


def report_example(
    film: Film, image: ImageRef, raw: Sequence[str], heads: Sequence[str], context: Context, pools: Pools
) -> Example:
    """A film, a request to describe it, and its report; for the variant "pairs" the film and its report.

    The report as it was stands in `meta.raw_report`.

    Args:
      film: which.
      image: its picture.
      raw: the texts of the report's sections.
      heads: the name of each section, for a report of several; the name alone decides the request.
      context: of the split.
      pools: for the wording.

    Raises:
      SkipItem: a section has no text, or none that is left by cleaning.
    """
    pool = pools.test if context.parity else pools.train
    texts = []
    for text, head in zip(raw, heads, strict=True):
        if not text.strip():
            raise SkipItem(f"its report has no {head}")
        if len(text) > MAX_REPORT:
            raise SkipItem(f"its {head} has {len(text)} characters; up to {MAX_REPORT} are read")
        texts.append(reworded(clean(text).text, pool))
        if not texts[-1]:
            raise SkipItem(f"its {head} has no sentence left after cleaning")
    report = _headed(texts, heads)
    meta = film_meta(context, film, label_source="radiologist", raw_report=_headed(raw, heads))
    if context.config == "pairs":
        return pair(film.dicom, image, report, meta, kind="pair")
    question = _QUESTIONS.get(tuple(heads), REFERENCE_QUESTION)
    qa = question_meta(question, report, "report", label_source="radiologist")
    example = conversation(film.dicom, [image], [(question, report)], meta, questions=[qa])
    return with_film_expert(example) if film.view in FRONTAL else example


_QUESTIONS = {
    ("impression",): "What is the impression of this chest X-ray?",
    ("findings", "impression"): "Write the findings and the impression of this chest X-ray.",
}


def _headed(texts: Sequence[str], heads: Sequence[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{head.capitalize()}: {text}" for head, text in zip(heads, texts, strict=True))
