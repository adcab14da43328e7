"""The two tables that decide: the basic profile of PS3.15, and the attributes that the output may contain."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import re
from importlib import resources

import pydicom.uid
from pydicom.datadict import tag_for_keyword

EDITION = "PS3.15 2026c"

# The kinds of attributes in the allow-list: each has a rule of its own for values.
NUMBER, ORDINAL, WORD, DATE, UID, CLASS_UID, CODES, SEQUENCE, BINARY, PATIENT = (
    "numbers",
    "order",
    "words",
    "dates",
    "uids",
    "class_uids",
    "codes",
    "sequences",
    "binary",
    "patient_characteristics",
)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The values that a text attribute may have: words, or what matches a pattern of few characters."""

    words: frozenset[str]
    pattern: re.Pattern[str] | None

    def __contains__(self, text: str) -> bool:
        return text in self.words or bool(self.pattern and self.pattern.fullmatch(text))


@dataclasses.dataclass(frozen=True)
class AllowList:
    """Attributes that the output may contain.

    Attributes:
      kinds: tag -> kind.
      vocabularies: tag of each attribute of kind `WORD` -> its values.
      image_classes: UIDs of the SOP classes that are cleaned; objects of other classes are skipped.
    """

    kinds: dict[int, str]
    vocabularies: dict[int, Vocabulary]
    image_classes: frozenset[str]


@functools.cache
def basic_profile() -> dict[int, str]:
    """Table E.1-1: tag -> action (X, Z, D, U or a combination such as X/Z/D), groups of overlays excepted.

    Overlays, curves (60xx, 50xx) and private attributes are always removed and have no tag of their own.
    """
    lines = _read("basic_profile.csv").splitlines()
    rows = csv.DictReader((line for line in lines if not line.startswith("#")), delimiter=";")
    return {int(row["tag"].replace(",", ""), 16): row["action"] for row in rows if "x" not in row["tag"]}


@functools.cache
def allow_list() -> AllowList:
    """The allow-list of this package."""
    stored = json.loads(_read("allow_list.json"))
    kinds = {
        _tag(keyword): kind
        for kind in (DATE, UID, CLASS_UID, CODES, SEQUENCE, BINARY, PATIENT)
        for keyword in stored[kind]
    }
    for group, keywords in stored[NUMBER].items():
        kinds |= dict.fromkeys(map(_tag, keywords), ORDINAL if group == ORDINAL else NUMBER)
    kinds |= {_tag(keyword): WORD for keyword in stored[WORD]}
    vocabularies = {
        _tag(keyword): Vocabulary(
            frozenset(entry["words"]), re.compile(entry["pattern"]) if "pattern" in entry else None
        )
        for keyword, entry in stored[WORD].items()
    }
    # Classes that were retired before DICOM named them in pydicom stand there by UID.
    classes = frozenset(str(getattr(pydicom.uid, name, name)) for name in stored["image_classes"])
    return AllowList(kinds, vocabularies, classes)


def _read(name: str) -> str:
    return resources.files("vilam3_jax.data.deidentify").joinpath(name).read_text("utf-8")


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return tag
