"""Geometry and distinguishing attributes of each frame, from the DICOM header."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pydicom
import pydicom.uid as uids
from pydicom.tag import Tag

from vilam3_jax.data.dicom.headers import as_list, as_number
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.runtime.paths import PathLike

# Attributes that distinguish frames at one position, in the order of preference, and their labels. An empty
# label: too long for a message, or a time.
STACK_KEYWORDS: dict[str, str] = {
    "StudyInstanceUID": "",
    "SeriesNumber": "series number",
    "AcquisitionNumber": "acquisition",
    "TemporalPositionIdentifier": "time point",
    "EchoNumbers": "echo",
    "EchoTime": "echo time",
    "DiffusionBValue": "b-value",
    "DiffusionGradientOrientation": "",
    "DiffusionDirectionality": "",
    "ImageType": "image type",
    "ComplexImageComponent": "component",
    "InversionTime": "inversion time",
    "FlipAngle": "flip angle",
    "RepetitionTime": "repetition time",
    "NominalPercentageOfCardiacPhase": "cardiac phase",
    "TriggerTime": "trigger time",
    "KVP": "kVp",
    "ConvolutionKernel": "kernel",
    "StackID": "stack",
    "NuclearVectors": "",
    "ImagingFrequency": "",
    "SequenceName": "",
    "FrameOfReferenceUID": "",
}
# Attributes that order frames at one position if none of `STACK_KEYWORDS` distinguishes them.
_TIME_KEYWORDS = ("FrameReferenceTime", "AcquisitionDateTime", "AcquisitionTime", "ContentTime")
ORDER_KEYWORDS = (*_TIME_KEYWORDS, "InstanceNumber")
# `_nuclear` sets NuclearVectors, which is not a DICOM keyword.
_ATTRIBUTES = tuple(key for key in (*STACK_KEYWORDS, *ORDER_KEYWORDS) if key != "NuclearVectors")
# Names of the same attributes in functional groups.
_FUNCTIONAL_NAMES = {
    "AcquisitionNumber": "FrameAcquisitionNumber",
    "TemporalPositionIdentifier": "TemporalPositionIndex",
    "EchoTime": "EffectiveEchoTime",
    "TriggerTime": "NominalCardiacTriggerDelayTime",
    "AcquisitionDateTime": "FrameAcquisitionDateTime",
    "FrameReferenceTime": "TemporalPositionTimeOffset",
}

_UNSUPPORTED = {
    str(uids.SegmentationStorage): "a segmentation, not a scan",
    "1.2.840.10008.5.1.4.1.1.66.7": "a segmentation, not a scan",  # label map
    str(uids.RTDoseStorage): "a radiotherapy dose grid, not a scan",
    str(uids.EnhancedUSVolumeStorage): "an enhanced ultrasound volume, not supported",
    str(uids.VLWholeSlideMicroscopyImageStorage): "a whole slide image, not supported",
    str(uids.MediaStorageDirectoryStorage): "a DICOMDIR; its paths are not followed",
}
# Projection images. Some state a position and an orientation, but they are not slices.
_PROJECTIONS = frozenset(
    {
        uids.ComputedRadiographyImageStorage,
        uids.DigitalIntraOralXRayImageStorageForPresentation,
        uids.DigitalIntraOralXRayImageStorageForProcessing,
        uids.DigitalMammographyXRayImageStorageForPresentation,
        uids.DigitalMammographyXRayImageStorageForProcessing,
        uids.DigitalXRayImageStorageForPresentation,
        uids.DigitalXRayImageStorageForProcessing,
        uids.EnhancedXAImageStorage,
        uids.EnhancedXRFImageStorage,
        uids.RTImageStorage,
        uids.XRayAngiographicImageStorage,
        uids.XRayRadiofluoroscopicImageStorage,
    }
)
_PLANAR_NM = {"STATIC", "DYNAMIC", "GATED", "WHOLE BODY", "TOMO", "GATED TOMO"}  # third value of ImageType
_NM_VECTORS = ("EnergyWindowVector", "DetectorVector", "RRIntervalVector", "TimeSlotVector", "PhaseVector")
_MIN_SPACING_MM, _MAX_SPACING_MM = 1e-4, 1e4
_MAX_POSITION_MM = 1e6
_CODE = re.compile(r"[A-Z0-9][A-Z0-9 _/-]{0,15}")
_Scope = pydicom.Dataset | dict[str, Any]
_tag_of = functools.cache(Tag)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One frame of a file; None for values that the header does not state."""

    path: PathLike
    number: int  # index in the file
    frames: int  # number of frames in the file
    uid: str  # SOPInstanceUID, or ""
    sop_class: str  # name of the SOP class
    modality: str  # DICOM's code, or "unknown"
    body_part: str  # upper case, or "unknown"
    rows: int
    columns: int
    inverted: bool  # MONOCHROME1
    image_type: tuple[str, ...]  # values of ImageType or FrameType
    position: tuple[float, ...] | None  # ImagePositionPatient, mm
    orientation: tuple[float, ...] | None  # ImageOrientationPatient
    spacing: tuple[float, ...] | None  # PixelSpacing, mm between rows and between columns
    distance: float | None  # SpacingBetweenSlices, mm
    thickness: float | None  # SliceThickness, mm
    tilt: float | None  # GantryDetectorTilt, degrees
    attributes: dict[str, Any]  # values of `STACK_KEYWORDS` and `ORDER_KEYWORDS`, as text or numbers
    part: tuple[int, int] | None  # (total files, number of this one) of a concatenation
    fault: str | None  # why the frame cannot be a slice of a volume, or None


def unsupported_reason(header: pydicom.Dataset) -> str | None:
    """Why an object is not a supported image, None for an image."""
    sop_class = sop_class_of(header)
    if sop_class in _UNSUPPORTED:
        return _UNSUPPORTED[sop_class]
    if header.get("Rows") and header.get("Columns"):
        return None
    name = class_name(sop_class)
    if "Image" in name or not name:
        return f"{name or 'an object'} without rows and columns"
    return f"{name}, not an image"


def sop_class_of(header: pydicom.Dataset) -> str:
    meta = getattr(header, "file_meta", None)
    stated = header.get("SOPClassUID") or (meta.get("MediaStorageSOPClassUID") if meta else None)
    return str(stated or "")


def class_name(sop_class: str) -> str:
    """DICOM's name of a SOP class without "Storage", "" for classes outside DICOM."""
    uid = uids.UID(sop_class)
    return uid.name.removesuffix(" Storage") if sop_class and not uid.is_private and uid.name != uid else ""


def code_of(value: Any) -> str:
    """The first code string of a value, upper case; "unknown" if it is empty or could be free text."""
    text = str(next(iter(as_list(value)), "")).strip().upper()
    return text if _CODE.fullmatch(text) else UNKNOWN


def short_identifier(uid: str) -> str:
    """A short form of a UID for users: the first 12 hexadecimal digits of its sha256."""
    return hashlib.sha256(uid.encode()).hexdigest()[:12]


def frame_scopes(header: pydicom.Dataset, number: int) -> list[_Scope]:
    """Where to look up values of a frame: per-frame functional groups, shared groups, header."""
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    return [*(_flat(group) for group in [*per_frame[number : number + 1], *shared[:1]]), header]


def find(scopes: Sequence[_Scope], keyword: str) -> Any:
    """The first value of a keyword, None if there is none."""
    for scope in scopes:
        if isinstance(scope, dict):
            value = scope.get(keyword)
        else:  # three times faster than `get` for absent elements, the common case
            tag = _tag_of(keyword)
            value = None if scope.get_item(tag) is None else scope[tag].value
        if value is not None:
            return value
    return None


def frames_of(header: pydicom.Dataset, path: PathLike) -> Iterator[Frame]:
    """The frames of one image file. Call it inside `wrap_dicom_errors`: pydicom raises anything on damage."""
    count = max(int(header.get("NumberOfFrames") or 1), 1)
    per_frame = header.get("PerFrameFunctionalGroupsSequence")
    if per_frame or header.get("SharedFunctionalGroupsSequence"):
        yield from _enhanced(header, path, count, per_frame or [])
    elif count > 1 and sop_class_of(header) == uids.NuclearMedicineImageStorage:
        yield from _nuclear(header, path, count)
    else:
        facts = _facts(header, path, count, [header], [header])
        if count > 1:
            facts["fault"] = f"a file of {count} frames without frame positions"
        yield Frame(number=0, **facts)


def _enhanced(
    header: pydicom.Dataset, path: PathLike, count: int, per_frame: Sequence[pydicom.Dataset]
) -> Iterator[Frame]:
    shared = _flat((header.get("SharedFunctionalGroupsSequence") or [pydicom.Dataset()])[0])
    groups = [_flat(group) for group in per_frame[:count]]
    for number, own in enumerate(groups or [{}]):
        facts = _facts(header, path, count, [own, shared, header], [own, shared])
        if len(groups) < count > 1:
            facts["fault"] = f"a file of {count} frames with functional groups for {len(groups)}"
        yield Frame(number=number, **facts)


def _flat(group: pydicom.Dataset) -> dict[str, Any]:
    """The values of a functional group by keyword, from the first items of its sequences."""
    values: dict[str, Any] = {}
    for element in group:
        if element.VR == "SQ":
            values |= _flat(element.value[0]) if element.value else {}
        else:
            values.setdefault(element.keyword, element.value)
    return values


def _nuclear(header: pydicom.Dataset, path: PathLike, count: int) -> Iterator[Frame]:
    """Reconstructed nuclear medicine slices, located by the first position and SpacingBetweenSlices.

    PS3.3 C.8.4.15: positive spacings point along the normal, negative spacings against it.
    """
    detector = list(header.get("DetectorInformationSequence") or [])[:1]
    facts = _facts(header, path, count, [header, *detector], [header, *detector])
    slices = _integers(header.get("SliceVector"))
    if "RECON" not in " ".join(facts["image_type"]) or facts["fault"] or not facts["distance"]:
        facts["fault"] = f"nuclear medicine of {count} frames without slice positions"
    elif len(slices) != count:
        facts["fault"] = f"nuclear medicine of {count} frames without a complete SliceVector"
    if facts["fault"]:
        yield Frame(number=0, **facts)
        return
    o, first, distance = facts["orientation"], facts["position"], facts["distance"]
    normal = (o[1] * o[5] - o[2] * o[4], o[2] * o[3] - o[0] * o[5], o[0] * o[4] - o[1] * o[3])
    vectors = [_integers(header.get(keyword)) for keyword in _NM_VECTORS]
    for number in range(count):
        along = distance * (slices[number] - 1)
        facts["position"] = tuple(p + along * n for p, n in zip(first, normal, strict=True))
        own = tuple(vector[number] for vector in vectors if len(vector) == count)
        attributes = {**facts["attributes"], "NuclearVectors": own}
        yield Frame(number=number, **{**facts, "attributes": attributes})


def _facts(
    header: pydicom.Dataset, path: PathLike, count: int, scopes: Sequence[_Scope], geometry: Sequence[_Scope]
) -> dict[str, Any]:
    """All fields of a `Frame` except its number.

    `scopes` are searched for general values, `geometry` for position, orientation and pixel spacing.
    """
    photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2").strip().upper()
    grey = int(header.get("SamplesPerPixel") or 1) == 1 and photometric.startswith("MONOCHROME")
    part = header.get("InConcatenationTotalNumber"), header.get("InConcatenationNumber")
    facts = {
        "path": path,
        "frames": count,
        "uid": str(header.get("SOPInstanceUID") or ""),
        "sop_class": class_name(sop_class_of(header)),
        "modality": code_of(header.get("Modality")),
        "body_part": code_of(header.get("BodyPartExamined")),
        "rows": int(header.get("Rows") or 0),
        "columns": int(header.get("Columns") or 0),
        "inverted": photometric == "MONOCHROME1",
        "image_type": tuple(
            str(word).upper() for word in as_list(find(scopes, "FrameType") or header.get("ImageType"))
        ),
        "position": _numbers(find(geometry, "ImagePositionPatient"), 3),
        "orientation": _numbers(find(geometry, "ImageOrientationPatient"), 6),
        "spacing": _numbers(find(geometry, "PixelSpacing"), 2),
        "distance": _number(find(scopes, "SpacingBetweenSlices")),
        "thickness": _number(find(scopes, "SliceThickness")),
        "tilt": _number(find(scopes, "GantryDetectorTilt")),
        "part": (int(part[0]), int(part[1])) if part[0] and part[1] else None,
    }
    facts["attributes"] = _attributes(scopes, facts["image_type"])
    facts["fault"] = _fault(header, geometry, facts) if grey else "a colour image"
    return facts


def _fault(header: pydicom.Dataset, geometry: Sequence[_Scope], facts: dict[str, Any]) -> str | None:
    words = facts["image_type"]
    if "MOSAIC" in words:
        return "a mosaic of slices in one image; convert it with dcm2niix"
    if "LOCALIZER" in words and facts["modality"] == "CT":
        return "a localizer (scout)"
    sop_class = sop_class_of(header)
    if sop_class in _PROJECTIONS:
        return "a projection image, not a slice"
    if sop_class == uids.NuclearMedicineImageStorage and _PLANAR_NM & set(words[2:3]):
        return "a planar nuclear medicine image, not a slice"
    if facts["position"] is None:
        return _invalid(geometry, "ImagePositionPatient") or "no slice position"
    if facts["orientation"] is None:
        return _invalid(geometry, "ImageOrientationPatient") or "no slice orientation"
    if (spacing := facts["spacing"]) is None:
        if invalid := _invalid(geometry, "PixelSpacing"):
            return invalid
        if find([header], "ImagerPixelSpacing") not in (None, ""):
            return "no PixelSpacing (ImagerPixelSpacing is measured at the detector)"
        return "no PixelSpacing"
    if not _MIN_SPACING_MM <= min(spacing) <= max(spacing) <= _MAX_SPACING_MM:
        return "a PixelSpacing that is zero, negative or implausible"
    if max(abs(p) for p in facts["position"]) > _MAX_POSITION_MM:
        return "an implausible slice position"
    return None


def _invalid(geometry: Sequence[_Scope], keyword: str) -> str | None:
    """The fault of a value that is present but not the right number of finite numbers."""
    return f"an invalid {keyword}" if as_list(find(geometry, keyword)) else None


def _attributes(scopes: Sequence[_Scope], image_type: tuple[str, ...]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for keyword, name in (*((key, key) for key in _ATTRIBUTES), *_FUNCTIONAL_NAMES.items()):
        value = find(scopes, name)
        if value not in (None, ""):  # text, a number or a tuple of these, for comparing and sorting
            found = tuple(float(v) if isinstance(v, (int, float)) else str(v) for v in as_list(value))
            attributes[keyword] = found[0] if len(found) == 1 else found
    if image_type:
        attributes["ImageType"] = "\\".join(image_type)
    return attributes


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers; None if there are fewer or more, or other values."""
    values = finite_numbers(value)
    numbers = tuple(number for number in values if number is not None)
    return numbers if len(numbers) == len(values) == count else None


def _number(value: Any) -> float | None:
    numbers = _numbers(value, 1)
    return numbers[0] if numbers else None


def _integers(value: Any) -> list[int]:
    return [int(v) for v in as_list(value)]


def finite_numbers(value: Any) -> list[float | None]:
    """The values of an element as numbers, None for values that are not finite numbers."""
    numbers = [as_number(v) for v in as_list(value)]
    return [None if number is None or not math.isfinite(number) else number for number in numbers]
