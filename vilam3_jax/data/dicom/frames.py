"""What a DICOM header says of each frame: where it lies, and what tells it from frames at the same place."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pydicom
from pydicom.tag import BaseTag, Tag
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    DigitalIntraOralXRayImageStorageForPresentation,
    DigitalIntraOralXRayImageStorageForProcessing,
    DigitalMammographyXRayImageStorageForPresentation,
    DigitalMammographyXRayImageStorageForProcessing,
    DigitalXRayImageStorageForPresentation,
    DigitalXRayImageStorageForProcessing,
    EnhancedXAImageStorage,
    EnhancedXRFImageStorage,
    RTImageStorage,
    XRayAngiographicImageStorage,
    XRayRadiofluoroscopicImageStorage,
)

from vilam3_jax.data.dicom.headers import as_number
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.runtime.paths import PathLike

# What tells apart frames at one position, in the order in which it is tried: keyword and the words for it.
# An empty word: too long for a message, or a time.
MARKS: dict[str, str] = {
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
# What orders frames at one position, where nothing above tells them apart.
ORDER = (
    "FrameReferenceTime",
    "AcquisitionDateTime",
    "AcquisitionTime",
    "ContentTime",
    "InstanceNumber",
)

_NOT_READ = {
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation, not a scan",
    "1.2.840.10008.5.1.4.1.1.66.7": "a segmentation, not a scan",
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose grid, not a scan",
    "1.2.840.10008.5.1.4.1.1.6.2": "an enhanced ultrasound volume, which is not read",
    "1.2.840.10008.5.1.4.1.1.77.1.6": "a whole slide image, which is not read",
    "1.2.840.10008.1.3.10": "a DICOMDIR; its paths are not followed",
}
# Pictures in projection. Some state a position and an orientation, but they are no slices.
_PROJECTIONS = frozenset(
    {
        ComputedRadiographyImageStorage,
        DigitalIntraOralXRayImageStorageForPresentation,
        DigitalIntraOralXRayImageStorageForProcessing,
        DigitalMammographyXRayImageStorageForPresentation,
        DigitalMammographyXRayImageStorageForProcessing,
        DigitalXRayImageStorageForPresentation,
        DigitalXRayImageStorageForProcessing,
        EnhancedXAImageStorage,
        EnhancedXRFImageStorage,
        RTImageStorage,
        XRayAngiographicImageStorage,
        XRayRadiofluoroscopicImageStorage,
    }
)
_NM_IMAGE = "1.2.840.10008.5.1.4.1.1.20"
_PLANAR_NM = {"STATIC", "DYNAMIC", "GATED", "WHOLE BODY", "TOMO", "GATED TOMO"}  # third value of ImageType
_NM_VECTORS = ("EnergyWindowVector", "DetectorVector", "RRIntervalVector", "TimeSlotVector", "PhaseVector")
_MIN_SPACING_MM, _MAX_SPACING_MM = 1e-4, 1e4
_MAX_POSITION_MM = 1e6
_CODE = re.compile(r"[A-Z0-9][A-Z0-9 _/-]{0,15}")
_Values = pydicom.Dataset | dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One frame of one file.

    Attributes:
      path: the file.
      number: of the frame in the file, from 0.
      frames: how many the file holds.
      uid: SOPInstanceUID, or "".
      sop_class: name of the SOP class.
      modality: DICOM's code, or "unknown".
      body_part: upper case, or "unknown".
      rows: pixels.
      columns: pixels.
      grey: one sample per pixel, no palette.
      inverted: MONOCHROME1.
      image_type: the values of ImageType or FrameType.
      position: ImagePositionPatient, mm.
      orientation: ImageOrientationPatient.
      spacing: PixelSpacing, mm between rows and between columns.
      distance: SpacingBetweenSlices, mm.
      thickness: SliceThickness, mm.
      tilt: GantryDetectorTilt, degrees.
      marks: values of `MARKS` and `ORDER`, as text or numbers; None where the header has none.
      parts: (files, found in this one) of a concatenation: (3, 2) is the second of three; None otherwise.
      fault: why the frame cannot be a slice of a volume, or None.
    """

    path: PathLike
    number: int
    frames: int
    uid: str
    sop_class: str
    modality: str
    body_part: str
    rows: int
    columns: int
    grey: bool
    inverted: bool
    image_type: tuple[str, ...]
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    distance: float | None
    thickness: float | None
    tilt: float | None
    marks: dict[str, Any]
    parts: tuple[int, int] | None
    fault: str | None


def not_an_image(header: pydicom.Dataset) -> str | None:
    """What an object is that is no image to read; None for an image."""
    sop_class = sop_class_of(header)
    if sop_class in _NOT_READ:
        return _NOT_READ[sop_class]
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
    """DICOM's name of a SOP class without "Storage"; "" for one that DICOM does not define."""
    uid = UID(sop_class)
    return uid.name.removesuffix(" Storage") if sop_class and not uid.is_private and uid.name != uid else ""


def code_of(value: Any) -> str:
    """The first code string of a header value, upper case; "unknown" if it is empty or could be free text."""
    text = str(next(iter(_listed(value)), "")).strip().upper()
    return text if _CODE.fullmatch(text) else UNKNOWN


def series_uid(header: pydicom.Dataset) -> str:
    return str(header.get("SeriesInstanceUID") or "").strip().strip("\0")


def short_identifier(uid: str) -> str:
    """What people type instead of a UID: the first 12 hexadecimal digits of its sha256."""
    return hashlib.sha256(uid.encode()).hexdigest()[:12]


def places(header: pydicom.Dataset, number: int) -> list[_Values]:
    """Where the values of one frame are looked up: its functional groups, the shared ones, the header."""
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    own = [_flat(per_frame[number])] if number < len(per_frame) else []
    return [*own, *(_flat(group) for group in shared[:1]), header]


def find(places: Sequence[_Values], keyword: str) -> Any:
    """The first value of a keyword, None if there is none."""
    for place in places:
        value = place.get(keyword) if isinstance(place, dict) else _value(place, keyword)
        if value is not None:
            return value
    return None


def _value(place: pydicom.Dataset, keyword: str) -> Any:
    """`place.get(keyword)`, in a third of the time where the element is absent, as most are."""
    tag = _tag_of(keyword)
    return None if place.get_item(tag) is None else place[tag].value


@functools.cache
def _tag_of(keyword: str) -> BaseTag:
    return Tag(keyword)


def frames_of(header: pydicom.Dataset, path: PathLike) -> Iterator[Frame]:
    """The frames of one file.

    Args:
      header: of an image, with its functional groups.
      path: the file.

    Raises:
      Exception: whatever pydicom raises on damaged values; call it inside `headers.naming`.
    """
    count = max(int(header.get("NumberOfFrames") or 1), 1)
    per_frame = header.get("PerFrameFunctionalGroupsSequence")
    if per_frame or header.get("SharedFunctionalGroupsSequence"):
        yield from _enhanced(header, path, count, per_frame or [])
    elif count > 1 and sop_class_of(header) == _NM_IMAGE:
        yield from _nuclear(header, path, count)
    else:
        facts = _facts(header, path, count, [header], [header])
        if count > 1:
            facts["fault"] = f"a file of {count} frames without the position of each"
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
    """The values of a functional group by keyword, out of the first items of its sequences."""
    values: dict[str, Any] = {}
    for element in group:
        if element.VR == "SQ":
            values |= _flat(element.value[0]) if element.value else {}
        else:
            values.setdefault(element.keyword, element.value)
    return values


def _nuclear(header: pydicom.Dataset, path: PathLike, count: int) -> Iterator[Frame]:
    """Reconstructed slices of nuclear medicine: the first has a position, the others follow.

    PS3.3 C.8.4.15: a positive SpacingBetweenSlices stacks slices along the normal, a negative one against it.
    """
    detector = list(header.get("DetectorInformationSequence") or [])[:1]
    facts = _facts(header, path, count, [header, *detector], [header, *detector])
    slices = _whole_numbers(header.get("SliceVector"))
    if "RECON" not in " ".join(facts["image_type"]) or facts["fault"] or not facts["distance"]:
        facts["fault"] = f"nuclear medicine of {count} frames without slice positions"
    elif len(slices) != count:
        facts["fault"] = f"nuclear medicine of {count} frames without a complete SliceVector"
    if facts["fault"]:
        yield Frame(number=0, **facts)
        return
    o, first, distance = facts["orientation"], facts["position"], facts["distance"]
    normal = (o[1] * o[5] - o[2] * o[4], o[2] * o[3] - o[0] * o[5], o[0] * o[4] - o[1] * o[3])
    vectors = [_whole_numbers(header.get(keyword)) for keyword in _NM_VECTORS]
    for number in range(count):
        along = distance * (slices[number] - 1)
        facts["position"] = tuple(p + along * n for p, n in zip(first, normal, strict=True))
        own = tuple(vector[number] for vector in vectors if len(vector) == count)
        yield Frame(number=number, **{**facts, "marks": {**facts["marks"], "NuclearVectors": own}})


def _facts(
    header: pydicom.Dataset,
    path: PathLike,
    count: int,
    places: Sequence[_Values],
    geometry: Sequence[_Values],
) -> dict[str, Any]:
    """The fields of a `Frame` but its number: `places` are searched in order, `geometry` for its position."""
    image_type = find(places, "FrameType") or header.get("ImageType")
    position = _numbers(find(geometry, "ImagePositionPatient"), 3)
    orientation = _numbers(find(geometry, "ImageOrientationPatient"), 6)
    spacing = _numbers(find(geometry, "PixelSpacing"), 2)
    photometric = str(header.get("PhotometricInterpretation") or "MONOCHROME2").strip().upper()
    grey = int(header.get("SamplesPerPixel") or 1) == 1 and photometric.startswith("MONOCHROME")
    words = tuple(str(word).upper() for word in _listed(image_type))
    parts = header.get("InConcatenationTotalNumber"), header.get("InConcatenationNumber")
    return {
        "path": path,
        "frames": count,
        "uid": str(header.get("SOPInstanceUID") or ""),
        "sop_class": class_name(sop_class_of(header)),
        "modality": code_of(header.get("Modality")),
        "body_part": code_of(header.get("BodyPartExamined")),
        "rows": int(header.get("Rows") or 0),
        "columns": int(header.get("Columns") or 0),
        "grey": grey,
        "inverted": photometric == "MONOCHROME1",
        "image_type": words,
        "position": position,
        "orientation": orientation,
        "spacing": spacing,
        "distance": _number(find(places, "SpacingBetweenSlices")),
        "thickness": _number(find(places, "SliceThickness")),
        "tilt": _number(find(places, "GantryDetectorTilt")),
        "marks": _marks(places, words),
        "parts": (int(parts[0]), int(parts[1])) if parts[0] and parts[1] else None,
        "fault": _fault(header, geometry, grey, words, position, orientation, spacing),
    }


def _fault(
    header: pydicom.Dataset,
    geometry: Sequence[_Values],
    grey: bool,
    words: tuple[str, ...],
    position: tuple[float, ...] | None,
    orientation: tuple[float, ...] | None,
    spacing: tuple[float, ...] | None,
) -> str | None:
    if not grey:
        return "a colour picture"
    if "MOSAIC" in words:
        return "a mosaic of slices in one picture; convert it with dcm2niix"
    if "LOCALIZER" in words and code_of(header.get("Modality")) == "CT":
        return "a localizer (scout)"
    sop_class = sop_class_of(header)
    if sop_class in _PROJECTIONS:
        return "a picture in projection, not a slice"
    if sop_class == _NM_IMAGE and _PLANAR_NM & set(words[2:3]):
        return "a planar picture of nuclear medicine, not a slice"
    if position is None:
        return _unusable(geometry, "ImagePositionPatient") or "no slice position"
    if orientation is None:
        return _unusable(geometry, "ImageOrientationPatient") or "no slice orientation"
    if spacing is None:
        if unusable := _unusable(geometry, "PixelSpacing"):
            return unusable
        if find([header], "ImagerPixelSpacing") not in (None, ""):
            return "no PixelSpacing (ImagerPixelSpacing is measured at the detector)"
        return "no PixelSpacing"
    if not _MIN_SPACING_MM <= min(spacing) <= max(spacing) <= _MAX_SPACING_MM:
        return "a PixelSpacing that is zero, negative or absurd"
    if max(abs(p) for p in position) > _MAX_POSITION_MM:
        return "an absurd slice position"
    return None


def _unusable(geometry: Sequence[_Values], keyword: str) -> str | None:
    """That a value is there, though it is not the right number of finite numbers."""
    return f"an unusable {keyword}" if _listed(find(geometry, keyword)) else None


def _marks(places: Sequence[_Values], image_type: tuple[str, ...]) -> dict[str, Any]:
    marks: dict[str, Any] = {}
    for keyword in _MARK_KEYWORDS:
        value = find(places, keyword)
        if value not in (None, ""):
            marks[keyword] = _plain(value)
    for keyword, other in _FUNCTIONAL_NAMES.items():
        value = find(places, other)
        if value not in (None, ""):
            marks[keyword] = _plain(value)
    if image_type:
        marks["ImageType"] = "\\".join(image_type)
    return marks


_MARK_KEYWORDS = tuple(keyword for keyword in (*MARKS, *ORDER) if keyword != "NuclearVectors")
# The same facts have other names in the functional groups.
_FUNCTIONAL_NAMES = {
    "AcquisitionNumber": "FrameAcquisitionNumber",
    "TemporalPositionIdentifier": "TemporalPositionIndex",
    "EchoTime": "EffectiveEchoTime",
    "TriggerTime": "NominalCardiacTriggerDelayTime",
    "AcquisitionDateTime": "FrameAcquisitionDateTime",
    "FrameReferenceTime": "TemporalPositionTimeOffset",
}


def _listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, (str, int, float)) else list(value)


def _plain(value: Any) -> Any:
    """A header's value that can be compared and sorted."""
    listed = tuple(float(v) if isinstance(v, (int, float)) else str(v) for v in _listed(value))
    return listed[0] if len(listed) == 1 else listed


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """`count` finite numbers; None if the header has none, another number of them, or other text."""
    numbers = tuple(number for number in finite_numbers(value) if number is not None)
    return numbers if len(numbers) == len(_listed(value)) == count else None


def _number(value: Any) -> float | None:
    numbers = _numbers(value, 1)
    return numbers[0] if numbers else None


def _whole_numbers(value: Any) -> list[int]:
    return [int(v) for v in _listed(value)]


def finite_numbers(value: Any) -> list[float | None]:
    """The numbers of a header value, None in place of what is no finite number."""
    numbers = [as_number(v) for v in _listed(value)]
    return [None if number is None or not math.isfinite(number) else number for number in numbers]
