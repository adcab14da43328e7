"""Phrases of dialogues: pools of questions and answers (`questions/*.json`), plurals, articles."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json
from typing import Any

from vilam3_jax.data.experts.wording import IMAGE_OF

_MODALITIES = {"MR": "MRI", "CR": "CXR", "DX": "CXR", "X-RAY": "CXR"}
_POOLS = ("brain", "counts", "films", "follow_ups", "groups", "lesions", "negatives", "presence", "what")


@functools.cache
def pool(name: str) -> dict[str, Any]:
    """The questions and answers of one file; texts contain `{placeholders}`."""
    return json.loads(_read(name))


@functools.cache
def pools_digest() -> str:
    """SHA-256 (hex) of all pools; part of the fingerprint of a stream of dialogues."""
    return hashlib.sha256(b"".join(map(_read, _POOLS))).hexdigest()


def _read(name: str) -> bytes:
    folder = importlib.resources.files("vilam3_jax.data.experts.dialogues") / "questions"
    return (folder / f"{name}.json").read_bytes()


def modality_of(text: str) -> str:
    """`CT`, `MRI` or `CXR` for the modality of a card or record or a DICOM code; else the text itself.

    >>> modality_of("chest x-ray (CXR)"), modality_of("MR"), modality_of("cell imaging")
    ('CXR', 'MRI', 'cell imaging')
    """
    words = text.upper().replace("(", " ").replace(")", " ").split()
    found = {_MODALITIES.get(word, word) for word in words} & set(IMAGE_OF)
    return found.pop() if len(found) == 1 else text


def plural(name: str) -> str:
    """The plural of a label's name.

    >>> plural("hepatic tumor"), plural("kidney mass"), plural("lung metastasis")
    ('hepatic tumors', 'kidney masses', 'lung metastases')
    """
    if name.endswith("sis"):
        return name[:-2] + "es"
    return name + ("es" if name.endswith("ss") else "" if name.endswith("s") else "s")


def with_article(name: str) -> str:
    """The name with `a` or `an`."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def said(name: str) -> str:
    """A label's name within a sentence, with the singular for a vertebra.

    >>> said("vertebrae L3"), said("liver")
    ('vertebra L3', 'liver')
    """
    return "vertebra" + name.removeprefix("vertebrae") if name.startswith("vertebrae ") else name
