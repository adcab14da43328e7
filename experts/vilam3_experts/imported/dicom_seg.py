"""DICOM Segmentation objects (binary, fractional, label map) as label maps.

highdicom reads the objects, after checks that bound their size.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from typing import BinaryIO, cast

import highdicom as hd
import numpy as np
import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian, SegmentationStorage

from vilam3_experts.imported.label_tables import clean_name
from vilam3_jax.data import file_kinds
from vilam3_jax.data.limits import DEFAULT_LIMITS
from vilam3_jax.data.volume_io import check_file_size, one_line, wrap_parser_errors
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path, check_passing

_LABEL_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
_SIZE = ("Rows", "Columns", "NumberOfFrames")
_HEADER = [*_SIZE, "SegmentSequence", "ReferencedSeriesSequence", "SegmentationType"]
_GENERIC = re.compile(r"(segment|segmentation|label|roi|untitled|unnamed)?[ _#-]*\d*", re.IGNORECASE)
_MAX_SEGMENTS = 4096
_META_BYTES = 4096  # at the start of the file, with the transfer syntax
FRACTION = 0.5  # fractional voxels from here on are inside


@dataclasses.dataclass(frozen=True)
class SegHeader:
    """Segment names by number, SeriesInstanceUIDs of the referenced images, and the segmentation type."""

    names: dict[int, str]
    series: tuple[str, ...]
    kind: str


def is_segmentation(path: PathLike) -> bool:
    """Whether a file is a DICOM Segmentation object, by its header."""
    path = as_path(path)
    if file_kinds.identify(path).reader != "dicom":
        return False
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(file, specific_tags=["SOPClassUID"], stop_before_pixels=True, force=True)
            return header.get("SOPClassUID") in (SegmentationStorage, _LABEL_MAP_STORAGE)
    except Exception as error:  # damaged headers make pydicom raise anything
        check_passing(path, error)
        return False


def read_seg_header(path: PathLike) -> SegHeader:
    """Reads the header of a segmentation object.

    Raises `UserError` if it is damaged, too large, or without segments.
    """
    path, limits = as_path(path), DEFAULT_LIMITS
    check_file_size(path, limits)
    with wrap_parser_errors(path), path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if str(DeflatedExplicitVRLittleEndian).encode() in file.read(_META_BYTES):
            raise UserError(f"{path}: is deflated as a whole; store it uncompressed or with RLE")
        file.seek(0)
        header = pydicom.dcmread(file, specific_tags=_HEADER, stop_before_pixels=True)
        rows, columns, frames = (int(header.get(k) or 0) for k in _SIZE)
        referenced = header.get("ReferencedSeriesSequence") or []
        series = tuple(str(r.SeriesInstanceUID) for r in referenced if r.get("SeriesInstanceUID"))
        kind = str(header.get("SegmentationType") or "")
        names = {int(s.SegmentNumber): _segment_name(s, path) for s in header.get("SegmentSequence") or []}
    frames = frames or 1
    if rows * columns > limits.pixels or frames > limits.voxels // max(1, rows * columns):
        raise UserError(f"{path}: {frames} frames of {rows} x {columns} are over the limit; split it")
    if not 0 < len(names) <= _MAX_SEGMENTS:
        raise UserError(f"{path}: has {len(names)} segments, 1 to {_MAX_SEGMENTS} are read; export it again")
    return SegHeader(names, series, kind)


def _segment_name(segment: pydicom.Dataset, path: PathLike) -> str:
    """The segment's label; if that is empty or generic, its coded property with its side."""
    label = str(segment.get("SegmentLabel") or "").strip()
    if not _GENERIC.fullmatch(label):
        return clean_name(label, path)
    coded = (segment.get("SegmentedPropertyTypeCodeSequence") or [pydicom.Dataset()])[0]
    modifiers = coded.get("SegmentedPropertyTypeModifierCodeSequence") or []
    name = " ".join(str(item.get("CodeMeaning") or "") for item in [*modifiers, coded]).strip()
    return clean_name(name or label or f"segment {segment.SegmentNumber}", path)


def open_segments(
    path: PathLike, header: SegHeader
) -> tuple[tuple[int, ...], np.ndarray, Iterator[tuple[int, np.ndarray]]]:
    """Opens the pixels of a segmentation object.

    Returns its shape [K, R, C] (slices, rows and columns); the affine, float64 [4, 4], index (slice, row,
    column) to RAS millimetres; and an iterator of (segment number, bool [K, R, C]), decoded one at a time.
    Raises `UserError` if it is damaged, not in patient space, or not on a regular grid.
    """
    path = as_path(path)
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            segmentation = hd.seg.segread(cast(BinaryIO, file))
            geometry = segmentation.get_volume_geometry(allow_missing_positions=True)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # highdicom documents few of its exceptions
        raise UserError(
            f"{path}: cannot be read as a segmentation ({one_line(error)}); export it again"
        ) from error
    if geometry is None or geometry.coordinate_system != hd.CoordinateSystemNames.PATIENT:
        raise UserError(f"{path}: its frames are not on a regular grid in patient space; resample it")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(geometry.affine, np.float64)
    return tuple(int(n) for n in geometry.spatial_shape), affine, _masks(segmentation, header)


def _masks(segmentation: hd.seg.Segmentation, header: SegHeader) -> Iterator[tuple[int, np.ndarray]]:
    if header.kind == "LABELMAP":
        labels = segmentation.get_volume(combine_segments=True).array
        yield from ((number, labels == number) for number in header.names)
        return
    for number in header.names:
        values = segmentation.get_volume(segment_numbers=[number], combine_segments=False).array[..., 0]
        yield number, values >= FRACTION
