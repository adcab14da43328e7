"""DICOM Segmentation objects (binary, fractional, label map) as label maps.

highdicom reads the object; the checks before it bound what a file may cost.
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
from vilam3_jax.data.limits import DEFAULT_LIMITS, Limits
from vilam3_jax.data.volume_io import check_file_size, one_line, wrap_parser_errors
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path, check_passing

_LABEL_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
_HEADER = (
    "SOPClassUID",
    "SeriesInstanceUID",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SegmentSequence",
    "ReferencedSeriesSequence",
    "SegmentationType",
)
_GENERIC = re.compile(r"(segment|segmentation|label|roi|untitled|unnamed)?[ _#-]*\d*", re.IGNORECASE)
_MAX_SEGMENTS = 4096
_META_BYTES = 4096  # the meta information, which names the transfer syntax, stands at the start
FRACTION = 0.5  # of a fractional segment: the voxels that count as inside


@dataclasses.dataclass(frozen=True)
class SegHeader:
    """What a segmentation object says of itself.

    Attributes:
      names: segment number to name.
      series: SeriesInstanceUIDs of the images that it refers to.
      kind: BINARY, FRACTIONAL or LABELMAP.
    """

    names: dict[int, str]
    series: tuple[str, ...]
    kind: str


def is_segmentation(path: PathLike) -> bool:
    """Whether a file is a DICOM Segmentation object, judged by its header."""
    path = as_path(path)
    if file_kinds.identify(path).reader != "dicom":
        return False
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = pydicom.dcmread(file, specific_tags=["SOPClassUID"], stop_before_pixels=True, force=True)
            return header.get("SOPClassUID") in (SegmentationStorage, _LABEL_MAP_STORAGE)
    except Exception as error:  # whatever a damaged header makes pydicom raise: it is no segmentation
        check_passing(path, error)
        return False


def read_seg_header(path: PathLike, limits: Limits = DEFAULT_LIMITS) -> SegHeader:
    """Reads the header of a segmentation object, and checks its size.

    Raises:
      UserError: damaged, too large, or without segments.
    """
    path = as_path(path)
    check_file_size(path, limits)
    with wrap_parser_errors(path), path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if str(DeflatedExplicitVRLittleEndian).encode() in file.read(_META_BYTES):
            raise UserError(f"{path}: is deflated as a whole; store it uncompressed or with RLE")
        file.seek(0)
        header = pydicom.dcmread(file, specific_tags=list(_HEADER), stop_before_pixels=True)
        rows, columns, frames = (int(header.get(k) or 0) for k in ("Rows", "Columns", "NumberOfFrames"))
        segments = header.get("SegmentSequence") or []
        series = tuple(
            str(item.SeriesInstanceUID)
            for item in header.get("ReferencedSeriesSequence") or []
            if item.get("SeriesInstanceUID")
        )
        kind = str(header.get("SegmentationType") or "")
        names = {int(s.SegmentNumber): _segment_name(s, path) for s in segments}
    frames = frames or 1
    if rows * columns > limits.pixels or frames > limits.voxels // max(1, rows * columns):
        raise UserError(f"{path}: {frames} frames of {rows} x {columns} are over the limit; split it")
    if not 0 < len(names) <= _MAX_SEGMENTS:
        raise UserError(f"{path}: has {len(names)} segments, 1 to {_MAX_SEGMENTS} are read; export it again")
    return SegHeader(names, series, kind)


def _segment_name(segment: pydicom.Dataset, path: PathLike) -> str:
    """The segment's own label, or, where it is empty or a mere number, its coded property with its side."""
    label = str(segment.get("SegmentLabel") or "").strip()
    if not _GENERIC.fullmatch(label):
        return clean_name(label, path)
    coded = (segment.get("SegmentedPropertyTypeCodeSequence") or [pydicom.Dataset()])[0]
    words = [
        str(item.get("CodeMeaning") or "")
        for item in coded.get("SegmentedPropertyTypeModifierCodeSequence") or []
    ]
    name = " ".join([*words, str(coded.get("CodeMeaning") or "")]).strip()
    return clean_name(name or label or f"segment {segment.SegmentNumber}", path)


@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
    """The decoded segments of an object, one at a time.

    Attributes:
      shape: [K, R, C], slices, rows and columns.
      affine: [4, 4] float64, index (slice, row, column) to RAS millimetres.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    _object: hd.seg.Segmentation
    _header: SegHeader

    def masks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (segment number, bool [K, R, C]); a fractional voxel is inside from 0.5 on."""
        if self._header.kind == "LABELMAP":
            labels = self._object.get_volume(combine_segments=True).array
            yield from ((number, labels == number) for number in self._header.names)
            return
        for number in self._header.names:
            values = self._object.get_volume(segment_numbers=[number], combine_segments=False).array[..., 0]
            yield number, values >= FRACTION


def open_segments(path: PathLike, header: SegHeader) -> Segments:
    """Opens the pixels of a segmentation object.

    Raises:
      UserError: damaged, not in patient space, or slices that are no regular grid.
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
        raise UserError(f"{path}: is no segmentation that can be read ({one_line(error)})") from error
    if geometry is None or geometry.coordinate_system != hd.CoordinateSystemNames.PATIENT:
        raise UserError(f"{path}: its frames lie on no regular grid in patient space; resample it")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(geometry.affine, np.float64)
    slices, rows, columns = (int(n) for n in geometry.spatial_shape)
    return Segments((slices, rows, columns), affine, segmentation, header)
