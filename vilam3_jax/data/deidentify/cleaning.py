"""Copies a DICOM image, restricted to the attributes that the tables of `profile` allow.

The copy starts empty and receives only numbers, words of closed vocabularies, times of day, shifted dates,
new UIDs and pixels.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import functools
import re
import struct
from collections.abc import Callable
from typing import Any

from pydicom.datadict import dictionary_has_tag, dictionary_keyword, dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from vilam3_jax.data.deidentify import burned_in, codestreams, pixels, profile
from vilam3_jax.data.deidentify.pixels import Skipped
from vilam3_jax.data.deidentify.pseudonyms import Pseudonyms
from vilam3_jax.data.dicom.headers import as_list, stated_encoding
from vilam3_jax.data.limits import Limits

REMOVED, EMPTIED, REPLACED = "removed", "emptied", "replaced"

_DUMMY_TEXT = "REMOVED"
_DUMMIES = {
    "AS": "000Y",
    "DA": "19000101",
    "DT": "19000101000000",
    "TM": "000000",
    "UR": "about:blank",
    "OB": b"\0\0",
    "OW": b"\0\0",
    "UN": b"\0\0",
}
_TEXT = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"})

_DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
_INTEGER = re.compile(r"[+-]?\d{1,10}")
_ORDINAL = re.compile(r"[+-]?\d{1,7}")  # excludes dates, times and accession numbers used as series numbers
_AGE = re.compile(r"\d{3}[DWMY]")
_UID = re.compile(r"\d+(\.\d+)+")
_DATES = {
    "DA": re.compile(r"(?!0)\d{4}\.?\d{2}\.?\d{2}"),
    "TM": re.compile(r"\d{2}(:?\d{2}(:?\d{2}(\.\d{1,6})?)?)?"),
    "DT": re.compile(r"(?!0)\d{8}(\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?([+-]\d{4})?)?"),
}
_MAX_AGE = 89  # years; HIPAA's safe harbor aggregates all higher ages

_CODE_TAGS = frozenset({0x00080100, 0x00080102, 0x00080104})
_IDENTITY_TAGS = frozenset({0x00100010, 0x00100020})  # PatientName, PatientID: replaced at the top level
_PIXEL_GROUP = 0x7FE0
# Type 2 in the patient, study, series and equipment modules: required, possibly empty.
_TYPE_2 = """
    StudyDate StudyTime AccessionNumber ReferringPhysicianName PatientBirthDate PatientSex StudyID
    SeriesNumber InstanceNumber Manufacturer
"""
_SCHEMES = {"SNM3": "SRT", "99SDM": "SRT"}  # older names of the scheme
# Codes of PS3.16 CID 7050.
_BASIC_PROFILE = ("113100", "Basic Application Confidentiality Profile")
_MODIFIED_DATES = ("113107", "Retain Longitudinal Temporal Information Modified Dates Option")
_CHARACTERISTICS = ("113108", "Retain Patient Characteristics Option")


@dataclasses.dataclass
class Outcome:
    """The result for one file."""

    path: str = ""  # source file; used only for the mapping, as original_patient
    output: str | None = None  # path of the copy in the output folder; None if the file was skipped
    reason: str = ""  # why the file was skipped, a fixed text
    patient: str = ""  # new identifier, as study and series
    study: str = ""
    series: str = ""
    original_patient: str = ""  # PatientID of the source
    suspicions: list[str] = dataclasses.field(default_factory=list)  # signs of identifying text in the pixels
    # Action (removed, emptied, replaced) -> attribute -> count.
    actions: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)  # other changes


def clean(
    source: Dataset, pseudonyms: Pseudonyms, keep_characteristics: bool, limits: Limits
) -> tuple[Dataset, Outcome]:
    """Copies an object without identifiers; raises `Skipped` if it cannot be cleaned.

    Args:
      source: an object from `pydicom.dcmread`; not modified.
      pseudonyms: replaces identifiers.
      keep_characteristics: also keep age, sex, size and weight of the patient.
      limits: bounds on pixels, frames and nesting.

    Returns:
      The copy with file meta information, and the outcome without paths.
    """
    sop_class = UID(str(source.get("SOPClassUID") or ""))
    if sop_class not in profile.allow_list().image_classes:
        raise Skipped(f"not an image that can be cleaned: {_name(sop_class)}")
    meta = getattr(source, "file_meta", None)
    transfer_syntax = UID(str((meta and meta.get("TransferSyntaxUID")) or stated_encoding(source)))
    if transfer_syntax not in codestreams.NATIVE | codestreams.ENCAPSULATED:
        raise Skipped(f"pixels in a format that cannot be cleaned: {_name(transfer_syntax)}")

    builder = _Builder(keep_characteristics, limits.nesting)
    image = builder.copy(source, 0)
    for keyword in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
        if not image.get(keyword):
            raise Skipped(f"damaged: no {keyword}")
    pixels.check_size(image, limits)
    notes, suspicions = pixels.clean(image, source, transfer_syntax)

    original_patient = str(source.get("PatientID") or "").strip(" \0")
    if original_patient:
        patient = pseudonyms.token("patient", original_patient)
    else:
        patient = pseudonyms.token("patient of study", image.StudyInstanceUID)
        notes.append("no PatientID: each study counts as one patient")
    image.preamble = bytes(128)
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = transfer_syntax
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    pseudonyms.apply(image, patient)
    builder.add_placeholders()
    suspicions += burned_in.signs_in_attributes(source) + burned_in.signs_in_pixels(image, limits)
    _record_method(image, keep_characteristics, suspected=bool(suspicions))
    outcome = Outcome(
        patient=str(image.PatientID),
        study=str(image.StudyInstanceUID),
        series=str(image.SeriesInstanceUID),
        original_patient=original_patient,
        suspicions=suspicions,
        actions=builder.actions,
        notes=notes,
    )
    return image, outcome


def _name(uid: UID) -> str:
    """Returns the standard's name of a UID; private UIDs stay out of the report."""
    return uid.name if uid.name != uid else "unknown"


def _record_method(image: Dataset, keep_characteristics: bool, suspected: bool) -> None:
    image.PatientName = image.PatientID
    for keyword in _TYPE_2.split():
        if keyword not in image:
            setattr(image, keyword, "")
    if "FrameOfReferenceUID" in image:
        image.PositionReferenceIndicator = ""
    # By PS3.3, YES means that the identity was removed from the attributes and from the pixels.
    image.PatientIdentityRemoved = "NO" if suspected else "YES"
    image.DeidentificationMethod = ["vilam3 data deidentify", f"DICOM {profile.EDITION} Basic Profile"]
    used = [_BASIC_PROFILE, _MODIFIED_DATES] + [_CHARACTERISTICS] * keep_characteristics
    image.DeidentificationMethodCodeSequence = [_code_item(value, "DCM", meaning) for value, meaning in used]
    image.LongitudinalTemporalInformationModified = "MODIFIED"


def _code_item(value: str, scheme: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


class _Builder:
    """Copies allowed attributes and counts actions on all others."""

    def __init__(self, keep_characteristics: bool, nesting: int) -> None:
        self._keep_characteristics = keep_characteristics
        self._nesting = nesting
        self._placeholders: list[tuple[Dataset, DataElement]] = []
        self.actions = {name: collections.Counter[str]() for name in (REMOVED, EMPTIED, REPLACED)}

    def copy(self, source: Dataset, depth: int, omit: frozenset[int] = frozenset()) -> Dataset:
        """Copies the allowed part of a data set or sequence item, except for the tags in `omit`."""
        if depth > self._nesting:
            raise Skipped("damaged: sequences nested too deeply")
        result = Dataset()
        for tag in sorted(source.keys()):
            if tag in omit or tag.element == 0:
                continue
            if depth == 0 and tag in _IDENTITY_TAGS:
                self._count(REPLACED, tag)
                continue
            element = self._allowed(source, tag, depth)
            if element is not None:
                result.add(element)
            else:
                self._follow_profile(source, tag, result)
        return result

    def add_placeholders(self) -> None:
        """Adds empty and dummy values, after the replacement of dates and IDs, which must not alter them."""
        for item, element in self._placeholders:
            item.add(element)

    def _count(self, action: str, tag: BaseTag) -> None:
        if tag.is_private:
            name = "private attributes"
        elif tag.group >> 8 in (0x50, 0x60):
            name = "overlays and curves"
        elif dictionary_has_tag(tag):
            name = f"({tag.group:04X},{tag.element:04X}) {dictionary_keyword(tag)}"
        else:
            name = "attributes that are not in the dictionary"
        self.actions[action][name] += 1

    def _allowed(self, source: Dataset, tag: BaseTag, depth: int) -> DataElement | None:
        """Returns a copy of the element if its attribute and its value are allowed."""
        kind = profile.allow_list().kinds.get(tag)
        if (
            kind is None
            or (kind == profile.PATIENT and not self._keep_characteristics)
            or (tag.group == _PIXEL_GROUP and depth > 0)
        ):
            return None
        element = _readable(source, tag)
        if element is None or element.VR not in dictionary_VR(tag).split(" or "):
            return None
        if kind in (profile.SEQUENCE, profile.CODES):
            copy = self.copy if kind == profile.SEQUENCE else self._copy_code
            items = [copy(item, depth + 1) for item in element.value or ()]
            return DataElement(tag, "SQ", Sequence(item for item in items if len(item)))
        if kind == profile.WORD:
            return self._words(element)
        if kind == profile.BINARY and element.VR.startswith("O"):
            is_table = element.keyword.endswith(("LUTData", "TableData"))
            if not isinstance(element.value, bytes) or (is_table and not _is_valid_table(element, source)):
                return None
            return DataElement(tag, element.VR, element.value)
        rule = _RULES.get(kind, _number)  # returns None for a value that is not allowed
        try:
            values = [rule(value, element.VR) for value in as_list(element.value)]
        except (ValueError, TypeError, OverflowError):  # pydicom may return text for numeric elements
            return None
        if None in values or (kind == profile.DATE and len(values) > 1):
            return None
        if kind in (profile.UID, profile.DATE) and values:
            self._count(REPLACED, tag)
        return DataElement(tag, element.VR, values)

    def _copy_code(self, item: Dataset, depth: int) -> Dataset:
        """Copies a code; a standard code gets its standard meaning instead of the file's."""
        value, scheme = (str(item.get(keyword) or "") for keyword in ("CodeValue", "CodingSchemeDesignator"))
        meaning = _meaning(scheme, value)
        if meaning is None:
            return self.copy(item, depth)
        copied = self.copy(item, depth, omit=_CODE_TAGS)
        copied.update(_code_item(value, scheme, meaning))
        return copied

    def _words(self, element: DataElement) -> DataElement | None:
        vocabulary = profile.allow_list().vocabularies[element.tag]
        words = [str(value).strip(" \0") for value in as_list(element.value)]
        if element.VR == "CS":
            words = [word.upper() if vocabulary.fullmatch(word.upper()) else word for word in words]
        kept = [word if vocabulary.fullmatch(word) else "" for word in words]
        if kept != words:
            self._count(REPLACED, element.tag)
        while kept and not kept[-1]:
            kept.pop()
        if any(words) and not kept:
            return None
        return DataElement(element.tag, element.VR, kept)

    def _follow_profile(self, source: Dataset, tag: BaseTag, result: Dataset) -> None:
        """Applies the action of the basic profile to an attribute that is not copied.

        If the profile offers a choice, the result is valid for every object definition: a dummy rather than
        an empty value, an empty value rather than none. Sequences are removed if the profile permits.
        """
        action = profile.basic_profile().get(tag, "X")
        vr = dictionary_VR(tag).split(" or ")[0] if action != "X" and dictionary_has_tag(tag) else ""
        if action == "U" or (vr == "UI" and "D" in action):
            element = _readable(source, tag)
            uids = [_uid(value, "UI") for value in as_list(element.value)] if element is not None else []
            if uids and None not in uids:
                result.add(DataElement(tag, "UI", uids))
                self._count(REPLACED, tag)
                return
        if (
            not vr
            or action in ("X", "U", "X/Z/U*")
            or (vr == "SQ" and action.startswith("X") and "D" in action)
        ):
            self._count(REMOVED, tag)
            return
        dummy = "D" in action
        if dummy and "Z" in action:
            element = _readable(source, tag)
            dummy = element is None or not element.is_empty
        if vr == "SQ":
            value: Any = [Dataset()] if dummy else []
        else:
            value = _DUMMIES.get(vr, _DUMMY_TEXT if vr in _TEXT else None) if dummy else None
        self._placeholders.append((result, DataElement(tag, vr, value)))
        self._count(REPLACED if dummy else EMPTIED, tag)


def _readable(source: Dataset, tag: BaseTag) -> DataElement | None:
    try:
        return source[tag]
    except RecursionError:
        raise Skipped("damaged: sequences nested too deeply") from None
    except Exception:  # a damaged value; neither the copy nor a message may contain it
        return None


def _number(value: Any, vr: str) -> Any:
    """Checks a number. Strings keep all digits, so geometry is preserved exactly."""
    if vr == "DS":
        text = str(value).strip(" \0")
        return text if not text or _DECIMAL.fullmatch(text) else None
    if vr == "IS":
        text = str(value if value == "" else int(value))
        return text if not text or _INTEGER.fullmatch(text) else None
    if vr == "AT":
        return Tag(value)
    return value if isinstance(value, (int, float)) else None


def _ordinal(value: Any, vr: str) -> Any:
    number = _number(value, vr)
    return None if vr == "IS" and number and not _ORDINAL.fullmatch(number) else number


def _date(value: Any, vr: str) -> str | None:
    text = str(value).strip(" \0")
    if not _DATES[vr].fullmatch(text):
        return None
    text = text.replace(":", "")  # ACR-NEMA wrote times with colons and dates with points
    if vr == "DA":
        text = text.replace(".", "")
    if vr != "TM":
        try:
            datetime.datetime.strptime(text[:8], "%Y%m%d")
        except ValueError:
            return None
    return text


def _uid(value: Any, vr: str) -> str | None:
    text = str(value).strip(" \0")
    return text if len(text) <= 64 and _UID.fullmatch(text) else None


def _characteristic(value: Any, vr: str) -> Any:
    if vr == "CS":
        return value if value in ("M", "F", "O") else None
    if vr != "AS":
        return _number(value, vr)
    age = str(value).strip(" \0")
    if not _AGE.fullmatch(age):
        return None
    return f"{_MAX_AGE + 1:03d}Y" if age[3] == "Y" and int(age[:3]) > _MAX_AGE else age


_RULES: dict[str, Callable[[Any, str], Any]] = {
    profile.ORDINAL: _ordinal,
    profile.DATE: _date,
    profile.UID: _uid,
    profile.CLASS_UID: lambda value, vr: str(value) if UID(str(value)).name != str(value) else None,
    profile.PATIENT: _characteristic,
}


def _is_valid_table(element: DataElement, source: Dataset) -> bool:
    """Whether a look-up table matches its descriptor or consists of segments (PS3.3, C.7.9.2)."""
    name = element.keyword.removeprefix("Segmented").replace("Data", "Descriptor")
    try:
        entries, _, bits = (int(number) for number in source[name].value)
    except Exception:  # no descriptor, or a damaged one
        return False
    if element.keyword.startswith("Segmented"):
        order = "<" if source.original_encoding[1] else ">"
        return _are_segments(element.value, "B" if bits == 8 else f"{order}H")
    return len(element.value) <= 2 * (entries or 1 << 16) + 1


def _are_segments(data: bytes, number: str) -> bool:
    size = struct.calcsize(number)
    numbers = [value for (value,) in struct.iter_unpack(number, data[: len(data) // size * size])]
    place = 0
    while place + 1 < len(numbers):
        kind, count = numbers[place : place + 2]
        if kind > 2 or (kind == 2 and size == 1):
            return False
        place += 2 + {0: count, 1: 1, 2: 2}[kind]  # discrete values, a line, a reference to segments
    return place == len(numbers) or (size == 1 and place == len(numbers) - 1)  # padded to an even length


@functools.lru_cache(maxsize=4096)
def _meaning(scheme: str, value: str) -> str | None:
    """Returns the meaning of a code in pydicom's copy of PS3.16, or None if it is not listed."""
    wanted = Code(value, _SCHEMES.get(scheme, scheme), "")
    if wanted.scheme_designator == "SRT":  # pydicom maps SRT to SCT when it compares codes
        scheme = "SCT"
    if scheme not in codes.schemes():
        return None
    return next((code.meaning for code in getattr(codes, scheme).concepts.values() if code == wanted), None)
