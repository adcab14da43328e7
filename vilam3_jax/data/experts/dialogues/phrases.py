"""Helpers for phrases: modalities, plurals, articles."""

from __future__ import annotations

from vilam3_jax.data.experts.wording import IMAGE_OF

_MODALITIES = {"MR": "MRI", "CR": "CXR", "DX": "CXR", "X-RAY": "CXR"}


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
