"""How a DICOM image stores its pixels: read from the header, and checked before anything is decoded."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pydicom
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from vilam3_jax.data.dicom.headers import numbers
from vilam3_jax.data.limits import Limits
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_ICT", "YBR_RCT")
PALETTE = "PALETTE COLOR"
_PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_ITEM_TAG = b"\xfe\xff\x00\xe0"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the pixels are stored.

    Attributes:
      keyword: PixelData, FloatPixelData or DoubleFloatPixelData.
      syntax: the transfer syntax.
      photometric: the photometric interpretation, one of GREY, COLOUR or PALETTE.
      samples: per pixel, 1 or 3.
      planar: 0 if the colours of a pixel lie side by side, 1 if each colour has a plane of its own.
      rows, columns, frames: size.
      bits_allocated, bits_stored, high_bit: of a sample, see PS3.5 8.1.1.
      signed: whether samples are in two's complement.
      notes: what was assumed.
    """

    keyword: str
    syntax: UID
    photometric: str
    samples: int
    planar: int
    rows: int
    columns: int
    frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    notes: tuple[str, ...]

    @property
    def stored_range(self) -> tuple[int, int]:
        """Smallest and largest number that a sample can store."""
        if self.signed:
            return -(1 << (self.bits_stored - 1)), (1 << (self.bits_stored - 1)) - 1
        return 0, (1 << self.bits_stored) - 1

    def options(self, photometric: str) -> dict[str, Any]:
        """What pydicom's decoders want to know."""
        return {
            "rows": self.rows,
            "columns": self.columns,
            "samples_per_pixel": self.samples,
            "planar_configuration": self.planar,
            "photometric_interpretation": photometric,
            "bits_allocated": self.bits_allocated,
            "bits_stored": self.bits_stored,
            "pixel_representation": int(self.signed),
        }


def read_layout(dataset: pydicom.Dataset, path: PathLike, limits: Limits) -> Layout:
    """Reads and checks how the pixels of a data set are stored.

    Raises:
      UserError: no pixels, an interpretation or a number of bits that is not read, contradictions, or a size
        over a limit.
    """
    keyword = _pixel_keyword(dataset, path)
    notes: list[str] = []
    photometric = _photometric(dataset, path)
    samples = _stated(dataset, "SamplesPerPixel", path, 3 if photometric in COLOUR else 1, notes)
    if samples != (3 if photometric in COLOUR else 1):
        raise UserError(
            f"{path}: Samples per Pixel of {samples} contradicts the photometric interpretation "
            f"{photometric}; correct the header or export it again"
        )
    planar = _whole(dataset, "PlanarConfiguration", path, -1)
    syntax = _transfer_syntax(dataset, keyword, path)
    if samples == 3 and planar not in (0, 1):
        planar = 0
        if not syntax.is_encapsulated:
            notes.append("Planar Configuration is not stated; colours are taken as interleaved")
    rows, columns = (_whole(dataset, key, path) for key in ("Rows", "Columns"))
    frames = _frames(dataset, path)
    if keyword == "PixelData":
        bits = _bits(dataset, path, notes)
        signed = _stated(dataset, "PixelRepresentation", path, 0, notes)
        if signed not in (0, 1):
            raise UserError(f"{path}: Pixel Representation of {signed} makes no sense; export it again")
    else:
        width = 32 if keyword == "FloatPixelData" else 64
        bits, signed = (width, width, width - 1), 1
    _check_size(rows, columns, samples, bits[0], frames, path, limits)
    return Layout(
        keyword,
        syntax,
        photometric,
        samples,
        planar,
        rows,
        columns,
        frames,
        *bits,
        bool(signed),
        tuple(notes),
    )


def _pixel_keyword(dataset: pydicom.Dataset, path: PathLike) -> str:
    present = [keyword for keyword in _PIXEL_KEYWORDS if keyword in dataset]
    if len(present) == 1:
        return present[0]
    if present:
        raise UserError(f"{path}: holds {' and '.join(present)}, only one may be there; export it again")
    kind = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")
    known = isinstance(kind, UID) and kind.is_valid and not kind.is_private
    name = kind.name if known else "unknown class"
    raise UserError(f"{path}: a DICOM object without pixels ({name:.80}); give an image instead")


def _photometric(dataset: pydicom.Dataset, path: PathLike) -> str:
    value = dataset.get("PhotometricInterpretation")
    name = str(value or "").strip().upper()
    if not name:
        raise UserError(
            f"{path}: DICOM image whose Photometric Interpretation is empty, so grey and colour cannot be "
            "told apart; correct the header"
        )
    if name not in (*GREY, *COLOUR, PALETTE):
        shown = name if name.isprintable() and len(name) <= 16 else "that it states"  # 16: DICOM's limit
        raise UserError(
            f"{path}: the photometric interpretation {shown} is not read here; export it as MONOCHROME2 "
            "or RGB"
        )
    return name


def _transfer_syntax(dataset: pydicom.Dataset, keyword: str, path: PathLike) -> UID:
    meta = getattr(dataset, "file_meta", None)
    syntax = meta.get("TransferSyntaxUID") if meta is not None else None
    data = cast(Any, dataset[keyword].value)
    if not data:
        raise UserError(f"{path}: its pixel data is empty; fetch it again")
    is_encapsulated = bytes(data[:4]) == _ITEM_TAG and dataset[keyword].is_undefined_length
    if not syntax:  # old archives leave out the meta information; how the header was encoded is known
        if is_encapsulated:
            raise UserError(f"{path}: compressed pixels without a Transfer Syntax UID; export it again")
        implicit, little = dataset.original_encoding
        native = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        return ImplicitVRLittleEndian if implicit else native
    try:
        stated_encapsulated = syntax.is_encapsulated
    except ValueError as error:
        raise UserError(
            f"{path}: the transfer syntax {syntax if syntax.is_valid else 'that it states'} is not known; "
            "export it as Explicit VR Little Endian"
        ) from error
    if is_encapsulated and not stated_encapsulated:
        raise UserError(
            f"{path}: its pixels are compressed, its transfer syntax {syntax.name} says they are not; "
            "correct the header or export it again"
        )
    if stated_encapsulated and bytes(data[:4]) != _ITEM_TAG:
        raise UserError(
            f"{path}: its pixels are not compressed as its transfer syntax {syntax.name} says; correct the "
            "header or export it again"
        )
    return syntax


def _frames(dataset: pydicom.Dataset, path: PathLike) -> int:
    frames = _whole(dataset, "NumberOfFrames", path, 1)
    if frames < 0:
        raise UserError(f"{path}: Number of Frames of {frames} makes no sense; export it again")
    return frames or 1


def _bits(dataset: pydicom.Dataset, path: PathLike, notes: list[str]) -> tuple[int, int, int]:
    allocated = _whole(dataset, "BitsAllocated", path)
    stored = _stated(dataset, "BitsStored", path, allocated, notes)
    high = _whole(dataset, "HighBit", path, stored - 1)
    if allocated not in (1, 8, 16, 32, 64) or not 1 <= stored <= allocated:
        raise UserError(
            f"{path}: {allocated} bits allocated and {stored} stored are not read here; export it with 8, 16 "
            "or 32 bits allocated"
        )
    if not stored - 1 <= high < allocated:
        notes.append(f"High Bit of {high} contradicts {stored} bits stored and is ignored")
        high = stored - 1
    return allocated, stored, high


def _check_size(
    rows: int, columns: int, samples: int, bits: int, frames: int, path: PathLike, limits: Limits
) -> None:
    if not (0 < rows <= 65535 and 0 < columns <= 65535):
        raise UserError(f"{path}: {rows} rows and {columns} columns make no sense; export it again")
    if rows * columns > limits.pixels:
        raise UserError(
            f"{path}: {rows} x {columns} pixels, more than the limit of {limits.pixels}; scale it down"
        )
    if rows * columns * samples * max(bits // 8, 1) > limits.decoded_bytes:
        raise UserError(f"{path}: a frame over the limit of {limits.decoded_bytes} bytes; scale it down")
    if frames > limits.frames:
        raise UserError(f"{path}: {frames} frames, more than the limit of {limits.frames}; split it")


def check_frame(frame: int, layout: Layout, path: PathLike) -> None:
    """Raises a `UserError` if there is no such frame."""
    if not 0 <= frame < layout.frames:
        raise UserError(f"{path}: no frame {frame}; choose one of 0 to {layout.frames - 1}")


def _stated(dataset: pydicom.Dataset, keyword: str, path: PathLike, default: int, notes: list[str]) -> int:
    """A whole number that every image should state; its absence is noted."""
    number = _whole(dataset, keyword, path, -1)
    if number == -1:
        notes.append(f"{keyword} is not stated and taken as {default}")
        return default
    return number


def _whole(dataset: pydicom.Dataset, keyword: str, path: PathLike, default: int | None = None) -> int:
    """A whole number of the header; `default` where it is absent or empty."""
    found = numbers(dataset, keyword)
    if not found and default is not None:
        return default
    if len(found) != 1 or found[0] is None or not found[0].is_integer():
        state = "missing" if not found else "not a whole number"
        raise UserError(f"{path}: {keyword} is {state}; export it again")
    return int(found[0])
