"""GREEN from the analyses of its judge: the parser and the formula (Ostmeier et al., 2024, equation 1).

matched findings / (matched findings + clinically significant errors), and 0 without a match. The denominator
of the mean is every item: an analysis that cannot be read counts as 0 and is named, as VILA-M3 counts it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

# The letters (a) to (f) of the judge's list of significant errors.
_LETTERS = "abcdef"
_SECTION = re.compile(
    r"\[(?P<name>Clinically (?:Ins|S)ignificant Errors|Matched Findings|Explanation)\]:?",
    re.IGNORECASE,
)
_ERROR = re.compile(r"\((?P<letter>[a-f])\)[^:\n]*[:.]\s*(?P<count>\d+)")
_COUNT = re.compile(r"\s*(?P<count>\d+)")


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What the judge counted.

    Attributes:
      matched: matched findings.
      significant: clinically significant errors of the kinds (a) to (f).
    """

    matched: int
    significant: tuple[int, ...]

    @property
    def score(self) -> float:
        """GREEN, between 0 and 1."""
        return self.matched / (self.matched + sum(self.significant)) if self.matched else 0.0


@dataclasses.dataclass(frozen=True)
class Green:
    """Scores of a corpus.

    Attributes:
      mean: over all items.
      items: float64 [n]; 0 where the analysis cannot be read.
      unscored: indices of the analyses that cannot be read.
    """

    mean: float
    items: np.ndarray
    unscored: tuple[int, ...]


def parse(analysis: str) -> Analysis | None:
    """Reads the judge's text; None if the significant errors or the matched findings are missing.

    "[Matched Findings]" begins with their number, or says that there are none ("No matched findings").
    """
    marks = list(_SECTION.finditer(analysis))
    ends = [mark.start() for mark in marks[1:]] + [len(analysis)] * bool(marks)
    sections = {
        mark["name"].lower(): analysis[mark.end() : end] for mark, end in zip(marks, ends, strict=True)
    }
    errors, found = (sections.get(name) for name in ("clinically significant errors", "matched findings"))
    if errors is None or found is None:
        return None
    matched = _COUNT.match(found)
    if matched is None and not re.match(r"\s*(?:no|none)\b", found, re.IGNORECASE):
        return None
    counted = {match["letter"]: int(match["count"]) for match in _ERROR.finditer(errors)}
    if not counted and not re.match(r"\s*(?:no|none)\b", errors, re.IGNORECASE):
        return None
    return Analysis(
        int(matched["count"]) if matched else 0, tuple(counted.get(letter, 0) for letter in _LETTERS)
    )


def green(analyses: Sequence[str]) -> Green:
    """The mean over all analyses, those that cannot be read with 0.

    Raises:
      ValueError: no analyses.
    """
    if not analyses:
        raise ValueError("no analyses")
    parsed = [parse(one) for one in analyses]
    items = np.asarray([one.score if one else 0.0 for one in parsed], np.float64)
    return Green(float(items.mean()), items, tuple(i for i, one in enumerate(parsed) if one is None))
