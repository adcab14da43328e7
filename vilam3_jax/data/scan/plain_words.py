"""What of a file's own words may be printed: codes that DICOM defines, and reasons without quotations.

Headers and file names hold names, dates and numbers of patients, also in places meant for codes. A report
repeats a code only if DICOM defines it, and a sentence only without the parts that could quote a file.
"""

from __future__ import annotations

import functools
import json
import os
import pkgutil
import re

from pydicom.sr.codedict import codes

from vilam3_jax.data.stored_volume import UNKNOWN

UNLISTED = "unlisted"

# In use, but not in PS3.16 table L-1.
_MORE_BODY_PARTS = """
    ABD ABDO CARDIAC CARDIO CAROTID COLUMN CRANIUM DORSAL LUMBOSACRAL LUNGS PEL PELV RIBS SACRUM SINUS SINUSES
    PARTIAL PARTIALBODY TEETH TOOTH VESSEL WHOLE BODY UPPER LOWER LEFT RIGHT LIMB LEG ARM AND
"""
_SEPARATORS = re.compile(r"[ _/,&+-]+")

# What may stand in the parentheses of a reason: sizes and words of our own.
_OWN_PARENTHESES = re.compile(
    r"\d+ x \d+ pixels|[\d.]+ mm|axial|coronal|sagittal|oblique|scout|MIP|same SOPInstanceUID|"
    r"radial or rotating|ImagerPixelSpacing is measured at the detector|"
    r"ElementDataFile|[RLAPSI]{3}"
)
_ANOTHER_MODALITY = re.compile(r"another modality \(.*\)")


def modality(code: str) -> str:
    """A modality as it may be printed: a code of DICOM's CID 29 or 32, "unknown", or "unlisted"."""
    return code if code == UNKNOWN or code in _modalities() else UNLISTED


def body_part(text: str) -> str:
    """A body part as it may be printed: words of PS3.16 table L-1, "unknown", or "unlisted"."""
    if text == UNKNOWN:
        return text
    words = _SEPARATORS.split(text)
    known = text in _body_parts() or all(word in _body_parts() for word in words)
    return text if known and text.isascii() else UNLISTED


def reason(text: str, path: str = "") -> str:
    """A sentence of a reader without anything that it may quote from a file or its name.

    Args:
      text: message of a `UserError`, or a reason of `Series`.
      path: the file; its name and those of files that differ from it in the suffix are replaced.
    """
    text = " ".join(text.split())
    if path:
        text = text.removeprefix(f"{path}: ")
        name = os.path.basename(path)
        stem = name.partition(".")[0]
        names = [re.escape(name), *([re.escape(stem) + r"\.\S*[^\s:;,.]"] if stem else [])]
        text = re.sub("|".join(names), "a file", text)
    text = _ANOTHER_MODALITY.sub("another modality", text)
    text = re.sub(r"(?<!\w)(['\"]).*\1(?!\w)", "a value", text)
    return _without_quotations(text)


def _without_quotations(text: str) -> str:
    """Removes parentheses with other people's words, to the last closing one: they may be unbalanced."""
    start, end = text.find("("), text.rfind(")")
    if start < 0:
        return text
    if end < start:
        return text[:start].rstrip()
    parts = re.findall(r"\(([^()]*)\)", text)
    balanced = text.count("(") == text.count(")") == len(parts)
    if balanced and all(_OWN_PARENTHESES.fullmatch(part) for part in parts):
        return text
    return f"{text[:start].rstrip()}{text[end + 1 :]}"


@functools.cache
def _modalities() -> frozenset[str]:
    return frozenset(getattr(codes.cid33, name).value for name in codes.cid33.dir())


@functools.cache
def _body_parts() -> frozenset[str]:
    table = pkgutil.get_data("highdicom", "_standard/anatomic_regions.json")
    assert table is not None
    return frozenset([*json.loads(table), *_MORE_BODY_PARTS.split()])
