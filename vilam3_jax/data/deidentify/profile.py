"""The two tables of rules: the basic profile of PS3.15, and the attributes that a copy may contain."""

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

# Kinds of attributes in the allow-list. Each kind has its own rule for values.
NUMBER, ORDINAL, WORD, DATE, UID = "numbers", "order", "words", "dates", "uids"
CLASS_UID, CODES, SEQUENCE, BINARY = "class_uids", "codes", "sequences", "binary"
PATIENT = "patient_characteristics"


@dataclasses.dataclass(frozen=True)
class AllowList:
    """Attributes that a copy may contain."""

    kinds: dict[int, str]  # tag -> kind
    vocabularies: dict[int, re.Pattern[str]]  # tag of kind `WORD` -> pattern of permitted values
    image_classes: frozenset[str]  # UIDs of supported SOP classes; other objects are skipped


@functools.cache
def basic_profile() -> dict[int, str]:
    """Returns table E.1-1: tag -> action (X, Z, D, U or a combination such as X/Z/D).

    Omits rows of repeating groups (60xx, 50xx) and private attributes, which are always removed.
    """
    lines = _read("basic_profile.csv").splitlines()
    rows = csv.DictReader((line for line in lines if not line.startswith("#")), delimiter=";")
    return {int(row["tag"].replace(",", ""), 16): row["action"] for row in rows if "x" not in row["tag"]}


@functools.cache
def allow_list() -> AllowList:
    """Returns the allow-list of this package."""
    stored = json.loads(_read("allow_list.json"))
    keywords = {kind: stored[kind] for kind in (DATE, UID, CLASS_UID, CODES, SEQUENCE, BINARY, PATIENT, WORD)}
    keywords[ORDINAL] = stored[NUMBER].pop(ORDINAL)
    keywords[NUMBER] = [keyword for group in stored[NUMBER].values() for keyword in group]
    vocabularies = {
        _tag(keyword): re.compile("|".join([*map(re.escape, entry["words"]), entry.get("pattern", "(?!)")]))
        for keyword, entry in stored[WORD].items()
    }
    # Retired classes that pydicom does not name are listed by UID.
    classes = frozenset(str(getattr(pydicom.uid, name, name)) for name in stored["image_classes"])
    return AllowList({_tag(k): kind for kind in keywords for k in keywords[kind]}, vocabularies, classes)


def _read(name: str) -> str:
    return resources.files("vilam3_jax.data.deidentify").joinpath(name).read_text("utf-8")


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    assert tag is not None, keyword
    return tag
