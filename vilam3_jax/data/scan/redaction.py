"""Redacts text from files before it is reported.

Headers and file names contain names, dates and numbers of patients, even in fields meant for codes. A report
repeats a code only if DICOM defines it, and a message only without the parts that may quote a file.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pkgutil
import re
import warnings
from collections.abc import Iterator

from pydicom.sr.codedict import codes

from vilam3_jax.data.stored_volume import UNKNOWN

UNLISTED = "unlisted"

# Common terms that PS3.16 table L-1 lacks.
_MORE_BODY_PARTS = """
    ABD ABDO CARDIAC CARDIO CAROTID COLUMN CRANIUM DORSAL LUMBOSACRAL LUNGS PEL PELV RIBS SACRUM SINUS SINUSES
    PARTIAL PARTIALBODY TEETH TOOTH VESSEL WHOLE BODY UPPER LOWER LEFT RIGHT LIMB LEG ARM AND
"""
_SEPARATORS = re.compile(r"[ _/,&+-]+")

# Parentheses in messages that hold only sizes and our own terms.
_SAFE_PARENTHESES = re.compile(
    r"\d+ x \d+ pixels|[\d.]+ mm|axial|coronal|sagittal|oblique|scout|MIP|same SOPInstanceUID|"
    r"radial or rotating|ImagerPixelSpacing is measured at the detector|"
    r"ElementDataFile|[RLAPSI]{3}"
)
_OTHER_MODALITY = re.compile(r"another modality \(.*\)")


@contextlib.contextmanager
def library_output_suppressed() -> Iterator[None]:
    """Suppresses library warnings and logs, which quote file contents and names."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


def modality(code: str) -> str:
    """Returns a modality code of DICOM's CID 33 or "unknown" unchanged, otherwise "unlisted"."""
    return code if code == UNKNOWN or code in _modalities() else UNLISTED


def body_part(text: str) -> str:
    """Returns a body part made of terms of PS3.16 table L-1 or "unknown" unchanged, otherwise "unlisted"."""
    if text == UNKNOWN:
        return text
    known = text in _body_parts() or all(word in _body_parts() for word in _SEPARATORS.split(text))
    return text if known and text.isascii() else UNLISTED


def message(text: str, path: str = "") -> str:
    """Removes from a reader's message or note everything that may quote the file or its name.

    The name of the file `path`, with any suffix, is replaced by "a file".
    """
    text = " ".join(text.split())
    if path:
        text = text.removeprefix(f"{path}: ")
        name = os.path.basename(path)
        stem = name.partition(".")[0]
        names = [re.escape(name), *([re.escape(stem) + r"\.\S*[^\s:;,.]"] if stem else [])]
        text = re.sub("|".join(names), "a file", text)
    text = _OTHER_MODALITY.sub("another modality", text)
    text = re.sub(r"(?<!\w)(['\"]).*\1(?!\w)", "a value", text)
    return _without_parentheses(text)


def _without_parentheses(text: str) -> str:
    """Removes parentheses unless all are safe; cuts to the last closing one, as they may be unbalanced."""
    start, end = text.find("("), text.rfind(")")
    if start < 0:
        return text
    if end < start:
        return text[:start].rstrip()
    parts = re.findall(r"\(([^()]*)\)", text)
    balanced = text.count("(") == text.count(")") == len(parts)
    if balanced and all(_SAFE_PARENTHESES.fullmatch(part) for part in parts):
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
