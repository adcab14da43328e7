"""Compact records of scanned files and series; they contain no unredacted text.

`read_records` and `group_series` run in worker processes. Neither decodes pixels.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, cast

import msgpack
import nibabel as nib
import numpy as np
import pydicom
import tifffile
from PIL import Image
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from vilam3_jax.data import file_kinds
from vilam3_jax.data.dicom.codecs import is_decodable
from vilam3_jax.data.dicom.frames import Frame, short_identifier
from vilam3_jax.data.dicom.grouping import (
    CINE,
    IMAGE,
    VOLUME,
    FileFrames,
    Series,
    file_frames,
    group_files,
    skipped_notes,
)
from vilam3_jax.data.dicom.headers import is_directory, read_header, wrap_dicom_errors
from vilam3_jax.data.dicom.layout import COLOUR, GREY, PALETTE, read_layout
from vilam3_jax.data.dicom.series import damaged_note, over_limits, without_damaged
from vilam3_jax.data.image_headers import check_pixels
from vilam3_jax.data.limits import Limits
from vilam3_jax.data.scan import redaction
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.volume_io import check_file_size
from vilam3_jax.data.volumes import describe_volume
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime.paths import as_path, check_passing, file_size

VANISHED = "vanished during the scan"
UNREADABLE = "cannot be read; check its permissions"
UNAVAILABLE = "cannot be read now: disk or network failure"
DAMAGED_DICOM = "damaged DICOM header"
DICOMDIR = "DICOMDIR; the files it references are not followed"
PAIRED_IMG = "voxel data of a .hdr/.img pair, counted with its .hdr"

_ITEM_TAG = b"\xfe\xff\x00\xe0"
_LAYOUT_KEYWORDS = """
    SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns
    BitsAllocated BitsStored HighBit PixelRepresentation
"""
_LAYOUT_TAGS = tuple(map(Tag, _LAYOUT_KEYWORDS.split()))
# (transfer syntax, values of _LAYOUT_TAGS, limits) -> result of _layout_fault. The slices of a series share a
# layout, and checking it takes as long as grouping a slice.
_known_layouts: dict[tuple[Any, ...], tuple[str | None, int]] = {}
_MAX_KNOWN_LAYOUTS = 1000
_FRAME_FIELDS = tuple(field.name for field in dataclasses.fields(Frame) if field.name != "path")

# How a run uses a series or a file.
AS_VOLUME, AS_IMAGES, UNDECIDED, NOT_USED = "volume", "images", "undecided", "no"


@dataclasses.dataclass(frozen=True)
class VolumeGrid:
    """The header of a NIfTI, NRRD or MetaImage volume. Field names are those of the JSON."""

    shape: tuple[int, ...] | None = None  # number of voxels along the three stored axes
    spacing_mm: tuple[float, ...] | None = None  # voxel size along them
    orientation: str = UNKNOWN  # directions in which the axes increase, such as "LPS"
    modality: str = UNKNOWN  # redacted code, as body_part
    body_part: str = UNKNOWN
    notes: tuple[str, ...] = ()  # assumptions of the reader


@dataclasses.dataclass(frozen=True, slots=True)
class FileRecord:
    """One file."""

    index: int  # position in the listing
    kind: str  # name of the file kind
    reader: str | None = None  # the reader for this kind, or None
    size: int = 0  # bytes
    problem: str | None = None  # why the file is not used; None if it is, or if that depends on its series
    advice: str = ""  # what to do with a file of an unsupported kind
    series: str | None = None  # SeriesInstanceUID of a DICOM file, otherwise None
    header: bytes = b""  # packed `FileFrames` and pixel fault, input of `group_series`
    grid: VolumeGrid = VolumeGrid()  # of a volume
    width: int = 0  # of an image in pixels, as height; frames are its pages
    height: int = 0
    frames: int = 0


@dataclasses.dataclass(frozen=True)
class SeriesRecord:
    """One series, or one of its stacks; see `grouping.Series`. Field names are those of the JSON."""

    id: str  # accepted by `load_volume(series=...)`
    study: str  # hash of the StudyInstanceUID
    modality: str  # redacted code, as body_part
    body_part: str
    kind: str  # "volume", "image", "cine" or "not an image"
    use: str  # AS_VOLUME, AS_IMAGES, UNDECIDED or NOT_USED
    files: tuple[int, ...]  # indices of its files
    columns: int  # as rows and slices, see `Series`
    rows: int
    slices: int
    spacing_mm: tuple[float, ...] | None  # between columns, rows and slices
    plane: str  # "axial", "coronal", "sagittal", "oblique" or "unknown"
    thickness_mm: float | None  # slice thickness
    localizer: bool  # every slice is a localizer
    problem: str | None  # why it cannot be read as a volume, or None
    notes: tuple[str, ...]  # assumptions of the reader
    skipped: dict[str, tuple[int, ...]]  # reason -> indices of skipped files of the series


def read_records(files: Sequence[tuple[int, str]], limits: Limits) -> list[FileRecord]:
    """Reads the headers of (index, path) pairs."""
    return [_read_record(index, path, limits) for index, path in files]


def _read_record(index: int, path: str, limits: Limits) -> FileRecord:
    try:
        record = _read_header(index, path, limits)
    except UnavailableError:
        record = FileRecord(index, "unknown", problem=UNAVAILABLE)
    except (UserError, OSError):
        record = FileRecord(index, "unknown", problem=UNREADABLE)
    except Exception as error:  # one file in 100,000 must not end the scan
        record = FileRecord(index, "unknown", problem=_unexpected(error))
    if record.problem is not None:
        with contextlib.suppress(OSError, ValueError):
            if not as_path(path).exists():
                return dataclasses.replace(record, reader=None, problem=VANISHED)
    return record


def _unexpected(error: Exception) -> str:
    return f"unexpected reader error ({type(error).__name__}); please report it"


def _read_header(index: int, path: str, limits: Limits) -> FileRecord:
    kind = file_kinds.identify(path)
    advice = "" if kind.advice == file_kinds.UNKNOWN.advice else kind.advice
    record = FileRecord(index, kind.name, kind.reader, file_size(path), advice=advice)
    try:
        if kind.reader == "dicom" or kind is file_kinds.UNKNOWN:
            return _read_dicom(record, path, limits)
        if kind.reader == "image":
            return _read_image(record, path, kind, limits)
        return record if kind.reader is None else _read_volume(record, path, limits)
    except UnavailableError:
        raise
    except UserError as error:
        return dataclasses.replace(record, problem=redaction.message(str(error), path))


def _read_dicom(record: FileRecord, path: str, limits: Limits) -> FileRecord:
    try:
        header = read_header(path, limits=limits)
    except UnavailableError:
        raise
    except UserError:
        return dataclasses.replace(record, problem=DAMAGED_DICOM)
    if header is None:
        return dataclasses.replace(record, reader=None)
    record = dataclasses.replace(record, reader="dicom", kind=file_kinds.DICOM.name, advice="")
    if is_directory(header):
        return dataclasses.replace(record, problem=DICOMDIR)
    frames = file_frames(path, header)
    fault = None if frames.reason else _pixel_fault(header, record.size, path, limits)
    try:
        return dataclasses.replace(record, series=frames.uid, header=_packed(frames, fault))
    except OverflowError:  # the number of frames exceeds 64 bits
        return dataclasses.replace(record, problem=DAMAGED_DICOM)


def _packed(file: FileFrames, fault: str | None) -> bytes:
    """Packs a header into a few hundred bytes per slice, a tenth of the size of the objects."""
    frames = [[getattr(frame, name) for name in _FRAME_FIELDS] for frame in file.frames]
    fields = [file.uid, file.study, file.modality, file.reason, frames, fault]
    return cast(bytes, msgpack.packb(fields, unicode_errors="surrogateescape"))


def _unpacked(index: int, header: bytes) -> tuple[FileFrames, str | None]:
    """Inverse of `_packed`, with the file's index as its path."""
    unpacked = msgpack.unpackb(header, use_list=False, unicode_errors="surrogateescape")
    uid, study, modality, reason, rows, fault = unpacked
    path = str(index)
    frames = tuple(Frame(path=path, **dict(zip(_FRAME_FIELDS, row, strict=True))) for row in rows)
    return FileFrames(path, uid, study, modality, frames, reason), fault


def _pixel_fault(header: pydicom.Dataset, size: int, path: str, limits: Limits) -> str | None:
    """Why the pixels cannot be decoded, as far as the header and the file size reveal."""
    try:
        with wrap_dicom_errors(path):
            items = (header.get_item(tag) for tag in _LAYOUT_TAGS)  # does not decode values
            values = tuple(None if item is None else str(item.value) for item in items)
            key = (str(header.file_meta.get("TransferSyntaxUID")), *values, limits)
            if key not in _known_layouts:
                if len(_known_layouts) >= _MAX_KNOWN_LAYOUTS:
                    _known_layouts.clear()
                _known_layouts[key] = _layout_fault(header, limits)
            fault, min_bytes = _known_layouts[key]
            # Iterating the header itself would decode all values.
            elements = (header.get_item(tag) for tag in header.keys())  # noqa: SIM118
            offsets = (getattr(e, "value_tell", None) or getattr(e, "file_tell", None) or 0 for e in elements)
            return fault or ("truncated pixel data" if size < max(offsets, default=0) + min_bytes else None)
    except UnavailableError:
        raise
    except UserError as error:
        return redaction.message(str(error), path)


def _layout_fault(header: pydicom.Dataset, limits: Limits) -> tuple[str | None, int]:
    """Why the pixel layout is unsupported or invalid, and the minimum size of the pixels in bytes."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax and (syntax.name == syntax or syntax.type != "Transfer Syntax"):
        return "unknown transfer syntax", 0
    photometric = str(header.get("PhotometricInterpretation") or "").strip().upper()
    if photometric and photometric not in (*GREY, *COLOUR, PALETTE):
        return "unsupported photometric interpretation", 0
    encapsulated = bool(syntax) and syntax.is_encapsulated
    # A placeholder for the unread pixels: `read_layout` inspects their first bytes.
    header.add_new("PixelData", "OB", _ITEM_TAG if encapsulated else bytes(4))
    header["PixelData"].is_undefined_length = encapsulated
    layout = read_layout(header, limits)
    if encapsulated and not is_decodable(layout.syntax):
        name = layout.syntax.name
        return f"no decoder for the transfer syntax {name}; `pip install 'vilam3-jax[dicom]'`", 0
    if encapsulated or syntax == DeflatedExplicitVRLittleEndian:
        return None, 0
    bits = layout.rows * layout.columns * layout.samples * layout.bits_allocated * layout.frames
    return None, bits * (2 if "422" in layout.photometric else 3) // 3 // 8


def _read_volume(record: FileRecord, path: str, limits: Limits) -> FileRecord:
    if record.kind == file_kinds.NIFTI_PAIR.name and re.search(r"\.img(\.gz)?$", path, re.IGNORECASE):
        return dataclasses.replace(record, reader=None, problem=PAIRED_IMG)
    stored = describe_volume(path, limits=limits)
    spacing = np.sqrt((stored.affine[:3, :3] ** 2).sum(axis=0))
    grid = VolumeGrid(
        stored.values.shape,
        tuple(float(mm) for mm in spacing),
        "".join(nib.orientations.aff2axcodes(stored.affine)),
        redaction.modality(stored.modality),
        redaction.body_part(stored.body_part),
        tuple(redaction.message(note, path) for note in stored.notes),
    )
    return dataclasses.replace(record, grid=grid)


def _read_image(record: FileRecord, path: str, kind: file_kinds.FileKind, limits: Limits) -> FileRecord:
    try:
        check_file_size(path, limits)
        with as_path(path).open("rb") as file:
            if kind is file_kinds.TIFF:
                with tifffile.TiffFile(file) as tiff:
                    page, frames = tiff.pages.first, len(tiff.pages)
                width, height = page.imagewidth, page.imagelength
            else:
                with Image.open(file) as image:
                    (width, height), frames = image.size, int(getattr(image, "n_frames", 1))
        check_pixels(width, height, limits)
    except UserError:
        raise
    except Exception as error:  # decoders do not document their exceptions
        check_passing(path, error)
        return dataclasses.replace(record, problem=f"damaged {kind.name}")
    return dataclasses.replace(record, width=width, height=height, frames=frames)


@dataclasses.dataclass(frozen=True, slots=True)
class _SeriesFile:
    index: int
    size: int
    fault: str | None
    thickness: float | None


def group_series(files: Sequence[tuple[int, int, bytes]], limits: Limits) -> list[SeriesRecord]:
    """Groups the files of one SeriesInstanceUID, (index, size, header) of `FileRecord`s, into stacks."""
    headers = [_unpacked(index, header) for index, _, header in files]
    by_path = {
        frames.path: _SeriesFile(index, size, fault, frames.frames[0].thickness if frames.frames else None)
        for (index, size, _), (frames, fault) in zip(files, headers, strict=True)
    }
    try:
        return [
            _series_record(series, by_path, limits) for series in group_files(file for file, _ in headers)
        ]
    except Exception as error:  # the other series are still worth a report
        uid, study = headers[0][0].uid, headers[0][0].study
        failed = Series(short_identifier(uid), uid, short_identifier(study))
        indices = tuple(index for index, _, _ in files)
        record = _series_record(failed, by_path, limits)
        return [dataclasses.replace(record, problem=_unexpected(error), files=indices)]


def _series_record(series: Series, by_path: dict[Any, _SeriesFile], limits: Limits) -> SeriesRecord:
    members = [by_path[member.path] for member in series.members]
    used, problem, notes = _usable(series, members, limits)
    files = dict.fromkeys(used)
    skipped: dict[str, list[int]] = collections.defaultdict(list)
    for path, reason in dict.fromkeys(series.skipped):
        skipped[redaction.message(reason)].append(by_path[path].index)
    for file in dict.fromkeys(members):
        if file.fault and file not in files:
            skipped[file.fault].append(file.index)
    listed = set(skipped_notes(series.skipped))
    notes += [note for note in series.notes if note not in listed]
    thickness = collections.Counter(file.thickness for file in files).most_common(1)
    return SeriesRecord(
        id=series.identifier,
        study=series.study,
        modality=redaction.modality(series.modality),
        body_part=redaction.body_part(series.body_part),
        kind=series.kind,
        use=_use(series, problem, len(files)),
        files=tuple(file.index for file in files),
        columns=series.columns,
        rows=series.rows,
        slices=series.slices,
        spacing_mm=series.spacing,
        plane=series.orientation,
        thickness_mm=thickness[0][0] if thickness else None,
        localizer=series.localizer,
        problem=problem,
        notes=tuple(redaction.message(note) for note in notes),
        skipped={reason: tuple(indices) for reason, indices in skipped.items()},
    )


def _usable(
    series: Series, members: list[_SeriesFile], limits: Limits
) -> tuple[list[_SeriesFile], str | None, list[str]]:
    """Returns the slices that a reader would use, why it would use none, and a note on damaged ones."""
    problem = None if series.problem is None else redaction.message(series.problem)
    faults = {index: file.fault for index, file in enumerate(members) if file.fault}
    if series.kind != VOLUME:
        intact = [file for file in members if not file.fault]
        return intact, problem if intact else next(iter(faults.values()), problem), []
    problem = problem or over_limits(series, sum(file.size for file in dict.fromkeys(members)), limits)
    kept = without_damaged(faults, len(members))
    if problem is not None or kept is None:
        return members, problem or next(iter(faults.values())), []
    return members[kept], None, [damaged_note(len(faults))] if faults else []


def _use(series: Series, problem: str | None, files: int) -> str:
    if series.kind in (IMAGE, CINE):
        return AS_IMAGES if files else NOT_USED
    if series.kind != VOLUME or problem is not None:
        return NOT_USED
    return UNDECIDED if series.copies else AS_VOLUME
