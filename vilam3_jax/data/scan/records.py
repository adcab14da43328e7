"""What a scan keeps of each file, and of each series: small records without text of the files.

`look` and `describe` run in worker processes. Nothing is decoded.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
from collections.abc import Sequence
from typing import IO, Any, cast

import msgpack
import nibabel as nib
import numpy as np
import pydicom
import tifffile
from PIL import Image
from pydicom.tag import Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian

from vilam3_jax.data import file_kinds
from vilam3_jax.data.dicom.codecs import is_decodable
from vilam3_jax.data.dicom.frames import Frame, short_identifier
from vilam3_jax.data.dicom.grouping import (
    CINE,
    PICTURE,
    VOLUME,
    FileFrames,
    Series,
    file_frames,
    group_files,
    skipped_notes,
)
from vilam3_jax.data.dicom.headers import is_directory, naming, read_header
from vilam3_jax.data.dicom.layout import COLOUR, GREY, PALETTE, read_layout
from vilam3_jax.data.dicom.series import damaged_note, without_damaged
from vilam3_jax.data.image_headers import check_pixels
from vilam3_jax.data.limits import Limits
from vilam3_jax.data.scan import plain_words
from vilam3_jax.data.volume_io import check_file_size
from vilam3_jax.data.volumes import describe_volume
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime.paths import as_path, check_passing, file_size

VANISHED = "vanished during the scan"
CLOSED = "cannot be read; check its permissions"
FAILING = "cannot be read now: the disk or the network fails"
DAMAGED_DICOM = "a damaged DICOM header"
DICOMDIR = "a DICOMDIR; its paths are not followed"
OTHER_HALF = "voxels of a .hdr/.img pair, counted with the .hdr"

_ITEM_TAG = b"\xfe\xff\x00\xe0"
_LAYOUT_TAGS = tuple(
    Tag(keyword)
    for keyword in (
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "PlanarConfiguration",
        "NumberOfFrames",
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "PixelRepresentation",
    )
)
# The slices of a series share one layout, and to check it takes as long as to group a slice.
_known_layouts: dict[tuple[Any, ...], tuple[str | None, int]] = {}
_MAX_KNOWN_LAYOUTS = 1000
_FRAME_FIELDS = tuple(field.name for field in dataclasses.fields(Frame))

# What a run can do with a series or a file.
AS_VOLUME, AS_PICTURES, UNDECIDED, NOT_USED = "volume", "pictures", "undecided", "no"


@dataclasses.dataclass(frozen=True, slots=True)
class GridFacts:
    """A volume in a file of its own.

    Attributes:
      shape: voxels along the three axes, in the order of the file.
      spacing: millimetres along them.
      orientation: the directions in which they grow, such as "LPS".
      modality, body_part: codes that may be printed.
      notes: what the reader would assume.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    orientation: str
    modality: str
    body_part: str
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class FileRecord:
    """One file.

    Attributes:
      index: its number in the listing.
      kind: name of its kind.
      reader: which reader takes it, or None.
      size: bytes.
      problem: why it is not used; None if it is, or if its series decides.
      advice: what to do with a kind that is not read.
      series: SeriesInstanceUID of a DICOM file; None for any other file.
      header: packed `FileFrames` and what is wrong with the pixels; see `describe`.
      grid: of a volume.
      width, height, frames: of a picture, pixels and pages.
    """

    index: int
    kind: str
    reader: str | None = None
    size: int = 0
    problem: str | None = None
    advice: str = ""
    series: str | None = None
    header: bytes = b""
    grid: GridFacts | None = None
    width: int = 0
    height: int = 0
    frames: int = 0


@dataclasses.dataclass(frozen=True)
class SeriesRecord:
    """One series, or one of several stacks in it; see `grouping.Series`.

    Attributes:
      identifier: accepted by `load_volume(series=...)`.
      study: hash of the StudyInstanceUID.
      modality, body_part: codes that may be printed.
      kind: "volume", "picture", "cine" or "not an image".
      use: AS_VOLUME, AS_PICTURES, UNDECIDED or NOT_USED.
      rows, columns, slices: as in `Series`.
      spacing: millimetres between columns, rows and slices, or None.
      plane: "axial", "coronal", "sagittal", "oblique" or "unknown".
      thickness: of the slices in millimetres, or None.
      localizer: every slice is a localizer.
      files: indices of the files it consists of.
      problem: why it cannot be read as a volume, or None.
      notes: what the reader would assume.
      skipped: reason -> indices of files of the series that are skipped.
    """

    identifier: str
    study: str
    modality: str
    body_part: str
    kind: str
    use: str
    rows: int
    columns: int
    slices: int
    spacing: tuple[float, ...] | None
    plane: str
    thickness: float | None
    localizer: bool
    files: tuple[int, ...]
    problem: str | None
    notes: tuple[str, ...]
    skipped: dict[str, tuple[int, ...]]


def look(files: Sequence[tuple[int, str]], limits: Limits) -> list[FileRecord]:
    """Looks at the headers of some files; see `FileRecord`."""
    return [_look_at(index, path, limits) for index, path in files]


def _look_at(index: int, path: str, limits: Limits) -> FileRecord:
    try:
        kind = file_kinds.identify(path)
        advice = "" if kind.advice == file_kinds.UNKNOWN.advice else kind.advice
        record = FileRecord(index, kind.name, kind.reader, advice=advice)
        record = dataclasses.replace(record, size=file_size(path))
        if kind.reader == "dicom" or kind is file_kinds.UNKNOWN:
            return _dicom(record, path, limits)
        if kind.reader == "picture":
            return _picture(record, path, kind, limits)
        if kind.reader is not None:
            return _volume(record, path, limits)
        return record
    except UnavailableError:
        return FileRecord(index, "unknown", problem=FAILING)
    except (UserError, OSError):
        record = FileRecord(index, "unknown", problem=CLOSED)
        return record if _is_there(path) else _gone(record)
    except Exception as error:  # one file in 100,000 must not end the scan
        return FileRecord(index, "unknown", problem=_unexpected(error))


def _unexpected(error: Exception) -> str:
    return f"met an error that no reader expects ({type(error).__name__}); please report it"


def _gone(record: FileRecord) -> FileRecord:
    return dataclasses.replace(record, reader=None, problem=VANISHED)


def _is_there(path: str) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return as_path(path).exists()
    return True


def _dicom(record: FileRecord, path: str, limits: Limits) -> FileRecord:
    try:
        header = read_header(path, limits=limits, frames=True)
    except UnavailableError:
        raise
    except UserError:
        return dataclasses.replace(record, problem=DAMAGED_DICOM) if _is_there(path) else _gone(record)
    if header is None:
        return dataclasses.replace(record, reader=None)
    record = dataclasses.replace(record, reader="dicom", kind=file_kinds.DICOM.name, advice="")
    if is_directory(header):
        return dataclasses.replace(record, problem=DICOMDIR)
    frames = file_frames(path, header)
    fault = None if frames.reason else _pixel_fault(header, record.size, path, limits)
    try:
        return dataclasses.replace(record, series=frames.uid, header=_packed(frames, fault))
    except OverflowError:  # a number of frames of more than 64 bits
        return dataclasses.replace(record, problem=DAMAGED_DICOM)


def _packed(file: FileFrames, fault: str | None) -> bytes:
    """A few hundred bytes for a slice, a tenth of what the objects take."""
    frames = [[getattr(frame, name) for name in _FRAME_FIELDS if name != "path"] for frame in file.frames]
    facts = [file.uid, file.study, file.modality, file.reason, frames, fault]
    return cast(bytes, msgpack.packb(facts, unicode_errors="surrogateescape"))


def _unpacked(index: int, header: bytes) -> tuple[FileFrames, str | None]:
    """The header of `_packed`; the file's index stands for its path."""
    unpacked = msgpack.unpackb(header, use_list=False, unicode_errors="surrogateescape")
    uid, study, modality, reason, frames, fault = unpacked
    names = [name for name in _FRAME_FIELDS if name != "path"]
    path = str(index)
    built = (Frame(path=path, **dict(zip(names, values, strict=True))) for values in frames)
    return FileFrames(path, uid, study, modality, tuple(built), reason), fault


def _pixel_fault(header: pydicom.Dataset, size: int, path: str, limits: Limits) -> str | None:
    """Why the pixels cannot be decoded, as far as the header and the size of the file tell."""
    try:
        with naming(path):
            items = (header.get_item(tag) for tag in _LAYOUT_TAGS)  # which decodes nothing
            stated = tuple(None if item is None else str(item.value) for item in items)
            key = (str(header.file_meta.get("TransferSyntaxUID")), *stated, limits)
            known = _known_layouts.get(key)
            if known is None:
                if len(_known_layouts) >= _MAX_KNOWN_LAYOUTS:
                    _known_layouts.clear()
                known = _known_layouts[key] = _layout_fault(header, path, limits)
            fault, least = known
            return fault or ("the pixel data is cut short" if size < _last_value(header) + least else None)
    except UnavailableError:
        raise
    except UserError as error:
        return plain_words.reason(str(error), path)


def _layout_fault(header: pydicom.Dataset, path: str, limits: Limits) -> tuple[str | None, int]:
    """What is wrong with how the pixels are stored, and how many bytes they take at least."""
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax and (syntax.name == syntax or syntax.type != "Transfer Syntax"):
        return "a transfer syntax that is not known", 0
    photometric = str(header.get("PhotometricInterpretation") or "").strip().upper()
    if photometric and photometric not in (*GREY, *COLOUR, PALETTE):
        return "a photometric interpretation that is not read", 0
    encapsulated = bool(syntax) and syntax.is_encapsulated
    # Stands for the pixels, which were not read: `read_layout` looks at their first bytes.
    header.add_new("PixelData", "OB", _ITEM_TAG if encapsulated else bytes(4))
    header["PixelData"].is_undefined_length = encapsulated
    layout = read_layout(header, path, limits)
    if encapsulated:
        return None if is_decodable(layout.syntax) else _no_decoder(layout.syntax), 0
    if syntax == DeflatedExplicitVRLittleEndian:
        return None, 0
    bits = layout.rows * layout.columns * layout.samples * layout.bits_allocated * layout.frames
    return None, bits * (2 if "422" in layout.photometric else 3) // 3 // 8


def _last_value(header: pydicom.Dataset) -> int:
    """Where the last value of the header starts in the file; the pixels come later."""
    elements = (header.get_item(tag) for tag in header.keys())  # noqa: SIM118 (to iterate would decode all)
    return max(
        (getattr(e, "value_tell", None) or getattr(e, "file_tell", None) or 0 for e in elements), default=0
    )


def _no_decoder(syntax: UID) -> str:
    return f"no decoder for the transfer syntax {syntax.name}; `pip install 'vilam3-jax[dicom]'`"


def _volume(record: FileRecord, path: str, limits: Limits) -> FileRecord:
    if record.kind == file_kinds.NIFTI_PAIR.name and re.search(r"\.img(\.gz)?$", path, re.IGNORECASE):
        return dataclasses.replace(record, reader=None, problem=OTHER_HALF)
    try:
        stored = describe_volume(path, limits=limits)
    except UnavailableError:
        raise
    except UserError as error:
        if not _is_there(path):
            return _gone(record)
        return dataclasses.replace(record, problem=plain_words.reason(str(error), path))
    spacing = np.sqrt((stored.affine[:3, :3] ** 2).sum(axis=0))
    facts = GridFacts(
        stored.values.shape,
        tuple(float(mm) for mm in spacing),
        "".join(nib.orientations.aff2axcodes(stored.affine)),
        plain_words.modality(stored.modality),
        plain_words.body_part(stored.body_part),
        tuple(plain_words.reason(note, path) for note in stored.notes),
    )
    return dataclasses.replace(record, grid=facts)


def _picture(record: FileRecord, path: str, kind: file_kinds.FileKind, limits: Limits) -> FileRecord:
    try:
        check_file_size(path, limits)
        with as_path(path).open("rb") as file:
            width, height, frames = _tiff_size(file) if kind is file_kinds.TIFF else _picture_size(file)
        check_pixels(width, height, limits)
    except UserError as error:
        return dataclasses.replace(record, problem=plain_words.reason(str(error)))
    except Exception as error:  # decoders document few of their exceptions
        check_passing(path, error)
        return dataclasses.replace(
            record, problem=f"{kind.name} that is damaged" if _is_there(path) else VANISHED
        )
    return dataclasses.replace(record, width=width, height=height, frames=frames)


def _picture_size(file: IO[bytes]) -> tuple[int, int, int]:
    with Image.open(file) as image:
        return *image.size, int(getattr(image, "n_frames", 1))


def _tiff_size(file: IO[bytes]) -> tuple[int, int, int]:
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        return page.imagewidth, page.imagelength, len(tiff.pages)


def describe(files: Sequence[tuple[int, int, bytes]], limits: Limits) -> list[SeriesRecord]:
    """Groups the files of one SeriesInstanceUID.

    Args:
      files: index, size in bytes and `header` of each file, from `FileRecord`.
      limits: as for `load_volume`.
    """
    headers = [_unpacked(index, header) for index, _, header in files]
    facts = {
        frames.path: _FileFacts(index, size, fault, frames.frames[0].thickness if frames.frames else None)
        for (index, size, _), (frames, fault) in zip(files, headers, strict=True)
    }
    try:
        return [_series(series, facts, limits) for series in group_files(frames for frames, _ in headers)]
    except Exception as error:  # the other series are still worth a report
        indices = tuple(file.index for file in facts.values())
        uid, study = headers[0][0].uid, headers[0][0].study
        failed = Series(short_identifier(uid), uid, short_identifier(study), problem=_unexpected(error))
        record = _series(failed, facts, limits)
        return [dataclasses.replace(record, problem=failed.problem, files=indices)]


@dataclasses.dataclass(frozen=True, slots=True)
class _FileFacts:
    index: int
    size: int
    fault: str | None
    thickness: float | None


def _series(series: Series, facts: dict[Any, _FileFacts], limits: Limits) -> SeriesRecord:
    members = [facts[member.path] for member in series.members]
    used, problem, notes = _usable(series, members, limits)
    files = dict.fromkeys(used)
    reasons = [(facts[path].index, plain_words.reason(why)) for path, why in dict.fromkeys(series.skipped)]
    reasons += [
        (file.index, file.fault) for file in dict.fromkeys(members) if file.fault and file not in files
    ]
    skipped: dict[str, list[int]] = collections.defaultdict(list)
    for index, why in reasons:
        skipped[why].append(index)
    listed = set(skipped_notes(series.skipped))
    notes += [note for note in series.notes if note not in listed]
    thickness = collections.Counter(file.thickness for file in files).most_common(1)
    return SeriesRecord(
        identifier=series.identifier,
        study=series.study,
        modality=plain_words.modality(series.modality),
        body_part=plain_words.body_part(series.body_part),
        kind=series.kind,
        use=_use(series, problem, len(files)),
        rows=series.rows,
        columns=series.columns,
        slices=series.slices,
        spacing=series.spacing,
        plane=series.orientation,
        thickness=thickness[0][0] if thickness else None,
        localizer=series.localizer,
        files=tuple(file.index for file in files),
        problem=problem,
        notes=tuple(plain_words.reason(note) for note in notes),
        skipped={why: tuple(indices) for why, indices in skipped.items()},
    )


def _usable(
    series: Series, members: list[_FileFacts], limits: Limits
) -> tuple[list[_FileFacts], str | None, list[str]]:
    """The slices that a reader would use, why it would use none, and a note about those it leaves out."""
    problem = None if series.problem is None else plain_words.reason(series.problem)
    faults = {place: file.fault for place, file in enumerate(members) if file.fault}
    if series.kind != VOLUME:
        good = [file for file in members if not file.fault]
        return good, problem if good else next(iter(faults.values()), problem), []
    problem = problem or _over_limits(series, members, limits)
    kept = without_damaged(faults, len(members))
    if problem is not None or kept is None:
        return members, problem or next(iter(faults.values())), []
    return members[kept], None, [damaged_note(len(faults))] if faults else []


def _over_limits(series: Series, members: list[_FileFacts], limits: Limits) -> str | None:
    voxels = series.rows * series.columns * series.slices
    size = sum(file.size for file in dict.fromkeys(members))
    if voxels > limits.voxels:
        return f"{voxels} voxels, more than the limit of {limits.voxels}"
    if size > limits.file_bytes:
        return f"{size} bytes in one series, more than the limit of {limits.file_bytes}"
    return None


def _use(series: Series, problem: str | None, files: int) -> str:
    if series.kind in (PICTURE, CINE):
        return AS_PICTURES if files else NOT_USED
    if series.kind != VOLUME or problem is not None:
        return NOT_USED
    return UNDECIDED if series.copies else AS_VOLUME
