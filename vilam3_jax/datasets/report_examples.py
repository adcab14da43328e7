"""Examples of films with reports, for the report datasets of MIMIC-CXR."""

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
    "clean": "cleaned reports in their original wording",
    "pooled": "cleaned reports whose frequent sentences have one wording",
    "pairs": "image-text pairs of films and cleaned reports",
}


class Pools(NamedTuple):
    """Frequent wordings of sentences, see `sentence_pool`; empty if reports keep their wording.

    Attributes:
      train: from the training split.
      test: from the test split, as in the reference; used only with `parity`, because it leaks the test
        split.
    """

    train: Mapping[str, str]
    test: Mapping[str, str]


def pools_of(texts: Mapping[str, Iterable[str]]) -> Pools:
    """The pools of raw texts, by split."""
    splits = ("train", "test")
    return Pools(*(sentence_pool(clean(text) for text in texts.get(name, ())) for name in splits))


def report_example(
    film: Film, image: ImageRef, raw: Sequence[str], heads: Sequence[str], context: Context, pools: Pools
) -> Example:
    """A film with a request to describe it and its report; without the request in the variant "pairs".

    `meta.raw_report` holds the original report.

    Args:
      film, image: the film and its image.
      raw, heads: texts and names of the report's sections; the names determine the request.
      context: context of the split.
      pools: wordings.

    Raises:
      SkipItem: a section has no text, or no text after cleaning.
    """
    pool = pools.test if context.parity else pools.train
    texts = {}
    for text, head in zip(raw, heads, strict=True):
        if not text.strip():
            raise SkipItem(f"its report has no {head}")
        if len(text) > MAX_REPORT:
            raise SkipItem(f"its {head} has {len(text)} characters; up to {MAX_REPORT} are read")
        texts[head] = reworded(clean(text), pool)
        if not texts[head]:
            raise SkipItem(f"its {head} has no sentence left after cleaning")
    report, original = headed(texts), headed(dict(zip(heads, raw, strict=True)))
    meta = film_meta(context, film, label_source="radiologist", raw_report=original)
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


def headed(texts: Mapping[str, str]) -> str:
    """Sections as one text, with their names if there are several."""
    if len(texts) == 1:
        return next(iter(texts.values()))
    return "\n".join(f"{head.capitalize()}: {text}" for head, text in texts.items())
