"""Pixel layout of a DICOM image, read from the header and checked before decoding."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pydicom
from pydicom.uid import UID

from vilam3_jax.data.dicom.headers import ImageError, numbers, stated_encoding
from vilam3_jax.data.limits import Limits

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_ICT", "YBR_RCT")
PALETTE = "PALETTE COLOR"
_PIXEL_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_ITEM_TAG = b"\xfe\xff\x00\xe0"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the pixels are stored; see PS3.5 8.1.1 for the bits."""

    keyword: str  # PixelData, FloatPixelData or DoubleFloatPixelData
    syntax: UID  # transfer syntax
    photometric: str  # photometric interpretation, one of GREY, COLOUR or PALETTE
    samples: int  # samples per pixel, 1 or 3
    planar: int  # Planar Configuration: 0 for interleaved colours, 1 for colour planes
    rows: int
    columns: int
    frames: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool  # two's complement
    notes: tuple[str, ...]  # assumptions

    @property
    def stored_range(self) -> tuple[int, int]:
        """Smallest and largest value of a stored sample."""
        if self.signed:
            return -(1 << (self.bits_stored - 1)), (1 << (self.bits_stored - 1)) - 1
        return 0, (1 << self.bits_stored) - 1

    def options(self, photometric: str) -> dict[str, Any]:
        """Options of pydicom's decoders."""
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


def read_layout(dataset: pydicom.Dataset, limits: Limits) -> Layout:
    """Reads and checks the pixel layout of a data set; call it inside `wrap_dicom_errors`.

    Raises `ImageError` for no pixels, an unsupported photometric interpretation or number of bits, a
    contradictory header, or a size above a limit.
    """
    keyword = _pixel_keyword(dataset)
    notes: list[str] = []
    photometric = _photometric(dataset)
    expected_samples = 3 if photometric in COLOUR else 1
    samples = _integer(dataset, "SamplesPerPixel", expected_samples, notes)
    if samples != expected_samples:
        raise ImageError(
            f"Samples per Pixel of {samples} contradicts the photometric interpretation {photometric}; "
            "correct the header or export it again"
        )
    planar = _integer(dataset, "PlanarConfiguration", -1)
    syntax = _transfer_syntax(dataset, keyword)
    if samples == 3 and planar not in (0, 1):
        planar = 0
        if not syntax.is_encapsulated:
            notes.append("Planar Configuration is missing; interleaved colours are assumed")
    rows, columns = (_integer(dataset, key) for key in ("Rows", "Columns"))
    frames = _integer(dataset, "NumberOfFrames", 1)
    if frames < 0:
        raise ImageError(f"Number of Frames of {frames} is invalid; export it again")
    frames = frames or 1
    if keyword == "PixelData":
        bits = _bits(dataset, notes)
        signed = _integer(dataset, "PixelRepresentation", 0, notes)
        if signed not in (0, 1):
            raise ImageError(f"Pixel Representation of {signed} is invalid; export it again")
    else:
        width = 32 if keyword == "FloatPixelData" else 64
        bits, signed = (width, width, width - 1), 1
    if not (0 < rows <= 65535 and 0 < columns <= 65535):
        raise ImageError(f"{rows} rows and {columns} columns are invalid; export it again")
    if rows * columns > limits.pixels:
        raise ImageError(f"{rows} x {columns} pixels, more than the limit of {limits.pixels}; scale it down")
    if rows * columns * samples * max(bits[0] // 8, 1) > limits.decoded_bytes:
        raise ImageError(f"a frame above the limit of {limits.decoded_bytes} bytes; scale it down")
    if frames > limits.frames:
        raise ImageError(f"{frames} frames, more than the limit of {limits.frames}; split it")
    size = rows, columns, frames
    return Layout(keyword, syntax, photometric, samples, planar, *size, *bits, bool(signed), tuple(notes))


def _pixel_keyword(dataset: pydicom.Dataset) -> str:
    present = [keyword for keyword in _PIXEL_KEYWORDS if keyword in dataset]
    if len(present) == 1:
        return present[0]
    if present:
        raise ImageError(f"contains {' and '.join(present)}, only one is allowed; export it again")
    uid = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")
    known = isinstance(uid, UID) and uid.is_valid and not uid.is_private
    name = uid.name if known else "unknown class"
    raise ImageError(f"a DICOM object without pixels ({name:.80}); give an image instead")


def _photometric(dataset: pydicom.Dataset) -> str:
    name = str(dataset.get("PhotometricInterpretation") or "").strip().upper()
    if not name:
        raise ImageError(
            "the Photometric Interpretation is empty, so grey and colour cannot be distinguished; correct "
            "the header"
        )
    if name not in (*GREY, *COLOUR, PALETTE):
        shown = f"{name} " if name.isprintable() and len(name) <= 16 else ""  # 16: the limit of DICOM
        raise ImageError(
            f"the photometric interpretation {shown}is not supported; export it as MONOCHROME2 or RGB"
        )
    return name


def _transfer_syntax(dataset: pydicom.Dataset, keyword: str) -> UID:
    meta = getattr(dataset, "file_meta", None)
    syntax = meta.get("TransferSyntaxUID") if meta is not None else None
    data = cast(Any, dataset[keyword].value)
    if not data:
        raise ImageError("the pixel data is empty; fetch it again")
    starts_with_item = bytes(data[:4]) == _ITEM_TAG
    is_encapsulated = starts_with_item and dataset[keyword].is_undefined_length
    if not syntax:
        if is_encapsulated:
            raise ImageError("compressed pixels without a Transfer Syntax UID; export it again")
        return stated_encoding(dataset)
    try:
        compressed = syntax.is_encapsulated
    except ValueError as error:
        shown = f"{syntax} " if syntax.is_valid else ""
        raise ImageError(
            f"the transfer syntax {shown}is unknown; export it as Explicit VR Little Endian"
        ) from error
    contradicts = not starts_with_item if compressed else is_encapsulated
    if contradicts:
        found = "uncompressed" if compressed else "compressed"
        raise ImageError(
            f"{found} pixels contradict the transfer syntax {syntax.name}; correct the header or export it "
            "again"
        )
    return syntax


def _bits(dataset: pydicom.Dataset, notes: list[str]) -> tuple[int, int, int]:
    allocated = _integer(dataset, "BitsAllocated")
    stored = _integer(dataset, "BitsStored", allocated, notes)
    high = _integer(dataset, "HighBit", stored - 1)
    if allocated not in (1, 8, 16, 32, 64) or not 1 <= stored <= allocated:
        raise ImageError(
            f"{allocated} bits allocated and {stored} stored are not supported; export it with 8, 16 or 32 "
            "bits allocated"
        )
    if not stored - 1 <= high < allocated:
        notes.append(f"High Bit of {high} contradicts {stored} bits stored and is ignored")
        high = stored - 1
    return allocated, stored, high


def _integer(
    dataset: pydicom.Dataset, keyword: str, default: int | None = None, notes: list[str] | None = None
) -> int:
    """An integer of the header; `default` if it is absent or empty, with a note if `notes` is given."""
    found = numbers(dataset, keyword)
    if not found and default is not None:
        if notes is not None:
            notes.append(f"{keyword} is missing; {default} is assumed")
        return default
    if len(found) != 1 or found[0] is None or not found[0].is_integer():
        state = "missing" if not found else "not an integer"
        raise ImageError(f"{keyword} is {state}; export it again")
    return int(found[0])
