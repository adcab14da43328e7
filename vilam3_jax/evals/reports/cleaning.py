"""Texts to be scored: VILA-M3's cleaning of reports, and their sections.

`clean` applies the rules of VILA-M3's report evaluation, in its order. They drop text, so a result must say
whether its texts were cleaned.
"""

from __future__ import annotations

import re

_MIN_LETTERS = 7
_SENTENCE_END = re.compile(r"(?<!\b[ap]\.m)(?<!\bDr)\.(?!\d)(?!(?<=\b[ap]\.)m\.)|[?!]")
_LETTER = re.compile(r"[A-Za-z]")


def clean(report: str) -> str:
    """The report as VILA-M3 scores it; empty if nothing is left.

    Line breaks become spaces, and runs of spaces one. Sentences end at `?`, `!`, or a full stop without a
    digit after it that is not of `a.m.`, `p.m.` or `Dr.`. What precedes a sentence's first colon with a space
    after it goes.
    Each begins at its first letter, as a capital. Sentences of up to 6 characters are dropped, and so are
    questions, those without a letter, and exact repetitions. All end with one full stop.

    The description of the rules leaves three choices open, made here: a line break is a space, the final mark
    does not count as a character, and `!` becomes a full stop. "Clear." is dropped, and so is the text before
    a colon.
    """
    kept: dict[str, None] = {}
    for sentence in split_sentences(" ".join(report.split())):
        _, colon, after = sentence.partition(": ")
        text = after if colon else sentence
        first = _LETTER.search(text)
        if first is None or "?" in text:
            continue
        text = text[first.start()].upper() + text[first.start() + 1 :].rstrip(".! ")
        if len(text) >= _MIN_LETTERS:
            kept[text + "."] = None
    return " ".join(kept)


def split_sentences(text: str) -> list[str]:
    """The sentences of one line of text, stripped, each with its final mark."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    parts = (text[start:end].strip() for start, end in zip([0, *ends], [*ends, len(text)], strict=True))
    return [part for part in parts if part]


def findings(report: str) -> str:
    """The findings section, or the empty string. `report` has headers in capitals."""
    return _sections(report).get("findings", "")


def findings_and_impression(report: str) -> str:
    """Findings, then impression, joined by a space; the one there is if the other is missing."""
    sections = _sections(report)
    return " ".join(sections[kind] for kind in ("findings", "impression") if kind in sections)


def _sections(report: str) -> dict[str, str]:
    # Datasets import evaluation, so evaluation imports them late.
    from vilam3_jax.datasets.report_sections import sections_of

    return sections_of(report)
