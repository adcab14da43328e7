"""The sections of a radiology report.

Columns and rules are those of the sectioner published with MIMIC-CXR: headers are in capitals at the start of
a line, the last section of a kind is used, and a report without findings and impression has a last paragraph.
There are four differences: an addendum above the report is a separate section, sections without text are
ignored, a header may end the report, and there are no rules for single studies, which would be lists of the
database's ids.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

# A header right below a bare header is part of its text, so the search continues after the first line.
_HEADER = re.compile(r"\n[ \t]*([A-Z][A-Z ()/,-]*):(?=\s|\Z)")
_BLANK_LINE = re.compile(r"\n[ \t]*\n")
_SEPARATOR = re.compile(r"^[ \t]*_{8,}[ \t]*$", re.MULTILINE)  # `___` alone masks a word
_TARGETS = ("findings", "impression")
_KINDS = ("impression", "findings", "history", "comparison", "addendum")
_SYNONYMS = {"conclusion": "impression", "reference exam": "comparison"}
_CLOSE = 0.87  # passes "finidngs" and "imoression", not "compression"
_EXAMINATION = re.compile(
    r"chest|portable|ribs|bone window|frontal and|frontal (semi-)?upright"
    r"|(pa|ap|lateral) and (pa|ap|lat)|(one|frontal|pa|ap|lateral) view|two views"
)


@dataclasses.dataclass(frozen=True)
class Sections:
    """Texts of the sections, stripped; "" for an absent section.

    Attributes:
      impression, findings, comparison: the last section of that kind.
      last_paragraph: in a report with neither findings nor impression, the text after the first blank line of
        its last section.
      addendum: the text above the report proper.
    """

    impression: str = ""
    findings: str = ""
    last_paragraph: str = ""
    comparison: str = ""
    addendum: str = ""


def sections_of(report: str) -> Sections:
    """Finds the sections in the text of a report.

    >>> sections_of(" FINDINGS: Clear lungs.\\n \\n IMPRESSION: Normal.").impression
    'Normal.'
    """
    addendum, text = _without_addendum(report.replace("\r\n", "\n").replace("\r", "\n"))
    parts = _parts(text if text.startswith("\n") else "\n" + text)
    parts = [(kind, body) for kind, body in parts if kind not in _TARGETS or body.strip()]
    last = ""
    if not any(kind in _TARGETS for kind, _ in parts):
        kind, body = parts[-1]
        body, *rest = _BLANK_LINE.split(body)
        parts[-1], last = (kind, body), "\n\n".join(rest).strip()
    found = {kind: body.strip() for kind, body in parts if body.strip()}
    return Sections(
        found.get("impression", ""),
        found.get("findings", ""),
        last,
        found.get("comparison", ""),
        addendum.strip(),
    )


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


def _without_addendum(text: str) -> tuple[str, str]:
    """(addendum, report proper), separated by the last full line of underscores."""
    separators = list(_SEPARATOR.finditer(text))
    if not separators or "addendum" not in text[: separators[-1].start()].lower():
        return "", text
    separator = separators[-1]
    below = text[separator.end() :]
    return (text[: separator.start()], below) if below.strip() else ("", text)
