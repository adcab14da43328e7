"""The sections of a radiology report.

The rules are those of the sectioner published with MIMIC-CXR: headers are in capitals at the start of a line,
and the last section of a kind is used. There are four differences. An addendum above the report is ignored,
and so are empty sections. A header may end the report. The special rules for single studies, which list ids
of the database, are left out.
"""

from __future__ import annotations

import difflib
import re

# A header right below a bare header is part of its text, so the search continues after the first line.
_HEADER = re.compile(r"\n[ \t]*([A-Z][A-Z ()/,-]*):(?=\s|\Z)")
_SEPARATOR = re.compile(r"^[ \t]*_{8,}[ \t]*$", re.MULTILINE)  # `___` alone masks a word
_KINDS = ("impression", "findings", "history", "comparison", "addendum")
_SYNONYMS = {"conclusion": "impression", "reference exam": "comparison"}
_CLOSE = 0.87  # passes "finidngs" and "imoression", not "compression"
_EXAMINATION = re.compile(
    r"chest|portable|ribs|bone window|frontal and|frontal (semi-)?upright"
    r"|(pa|ap|lateral) and (pa|ap|lat)|(one|frontal|pa|ap|lateral) view|two views"
)


def sections_of(report: str) -> dict[str, str]:
    """Kind (see `kind_of`) → text of the last section of that kind, stripped, without empty sections.

    >>> sections_of(" FINDINGS: Clear lungs.\\n \\n IMPRESSION: Normal.")
    {'findings': 'Clear lungs.', 'impression': 'Normal.'}
    """
    text = _without_addendum(report.replace("\r\n", "\n").replace("\r", "\n"))
    parts = _parts(text if text.startswith("\n") else "\n" + text)
    return {kind: body.strip() for kind, body in parts if body.strip()}


def kind_of(header: str) -> str:
    """The kind of section under a header, such as "findings" for "CHEST, TWO VIEWS".

    An unknown header is returned in lower case.
    """
    name = " ".join(header.lower().split())
    if name in _SYNONYMS:
        return _SYNONYMS[name]
    for kind in _KINDS:
        if kind in name:
            return kind
    if close := difflib.get_close_matches(name, ("impression", "findings", "comparison"), 1, _CLOSE):
        return close[0]
    return "findings" if _EXAMINATION.search(name) else name


def _parts(text: str) -> list[tuple[str, str]]:
    """(kind, body) of all parts in order; the first is the text before any header."""
    header = _HEADER.search(text)
    parts = [("preamble", text[: header.start()] if header else text)]
    while header:
        start = header.end() + 1  # skips the white space after the colon
        following = _HEADER.search(text, max(text.find("\n", start), start))
        body = text[start : following.start() if following else len(text)]
        parts.append((kind_of(header[1]), body))
        header = following
    return parts


def _without_addendum(text: str) -> str:
    """The report proper, below the last full line of underscores if that separates an addendum from it."""
    *_, separator = (None, *_SEPARATOR.finditer(text))
    if separator is None or "addendum" not in text[: separator.start()].lower():
        return text
    below = text[separator.end() :]
    return below if below.strip() else text
