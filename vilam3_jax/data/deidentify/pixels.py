"""Pixel data of the copy: the same values, without hidden bytes around them."""

from __future__ import annotations

import struct

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.utils import get_expected_length
from pydicom.uid import ExplicitVRBigEndian

from vilam3_jax.data.deidentify import codestreams
from vilam3_jax.data.limits import Limits

_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_EXTENDED_OFFSETS = (0x7FE00001, 0x7FE00002)  # the table and the lengths
TAGS = frozenset({0x7FE00010, 0x7FE00008, 0x7FE00009})  # of these attributes
_NEEDED = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PhotometricInterpretation")

GRAPHICS_REMOVED = "graphics in unused bits of pixels removed"
TAIL_REMOVED = "bytes after the last pixel removed"


class PixelError(Exception):
    """Why pixels cannot be copied; a fixed text, without values of the file."""


def check_size(header: Dataset, limits: Limits) -> None:
    """Raises:
    PixelError: no pixels, or more than `limits` allow.
    """
    if any(header.get(keyword) in (None, "") for keyword in _NEEDED):
        raise PixelError("damaged: the description of the pixels is incomplete")
    frames = int(header.get("NumberOfFrames") or 1)
    pixels = int(header.Rows) * int(header.Columns)
    if min(frames, pixels) < 1:
        raise PixelError("damaged: an image without pixels")
    decoded = pixels * frames * int(header.SamplesPerPixel) * max(int(header.BitsAllocated), 8) // 8
    if frames > limits.frames or decoded > limits.decoded_bytes:
        raise PixelError("larger than the limits of frames or bytes")


def clean(image: Dataset, source: Dataset, transfer_syntax: str) -> tuple[list[str], list[str]]:
    """Cleans the pixel element of `image` in place; no pixel changes its value.

    Args:
      image: the copy, with its pixel element as stored in `source`.
      source: the original, asked only whether overlays lie in unused bits.
      transfer_syntax: of both.

    Returns:
      Notes on removed bytes, and signs of burned-in text.

    Raises:
      PixelError: the stored bytes are not the pixels that the header describes.
    """
    keyword = next((name for name in _KEYWORDS if name in image), None)
    if keyword is None:
        raise PixelError("no pixels")
    element = image[keyword]
    data = element.value
    if not isinstance(data, bytes) or not data:
        raise PixelError("no pixels")
    embedded = _overlays_in_pixels(source)
    _check_extended_offsets(image, transfer_syntax in codestreams.ENCAPSULATED, len(data))
    if transfer_syntax in codestreams.ENCAPSULATED:
        try:
            element.value = codestreams.without_comments(
                data, transfer_syntax, int(image.Rows) * int(image.Columns)
            )
        except (ValueError, struct.error) as error:
            raise PixelError("damaged: compressed pixels that are not well-formed") from error
        element.is_undefined_length = True
        return [], ["overlay graphics inside compressed pixels"] if embedded else []
    expected = get_expected_length(image, unit="bytes") if keyword == "PixelData" else _float_length(image)
    if len(data) < expected:
        raise PixelError("damaged: pixels are cut short")
    done = []
    padded = expected + expected % 2
    if len(data) > padded:
        done.append(TAIL_REMOVED)
        data = data[:padded]
    suspicions = []
    if keyword == "PixelData":
        data, graphics = _without_graphics(data, image, transfer_syntax, embedded)
        if graphics and embedded:
            done.append(GRAPHICS_REMOVED)
        elif graphics:
            suspicions.append("unused bits of the pixels are not empty")
    element.value = data
    return done, suspicions


def _check_extended_offsets(image: Dataset, encapsulated: bool, size: int) -> None:
    """Removes the extended offset table, which decoders do without, unless it can be one."""
    frames = int(image.get("NumberOfFrames") or 1)
    starts, lengths = (image[tag].value if tag in image else b"" for tag in _EXTENDED_OFFSETS)
    if not encapsulated or not codestreams.is_extended_offset_table(starts, lengths, frames, size):
        for tag in _EXTENDED_OFFSETS:
            image.pop(tag, None)


def _float_length(image: Dataset) -> int:
    frames = int(image.get("NumberOfFrames") or 1)
    return int(image.Rows) * int(image.Columns) * frames * int(image.BitsAllocated) // 8


def _overlays_in_pixels(source: Dataset) -> bool:
    """Whether an overlay has no data of its own, and so lies in bits of the pixels (retired since 2004)."""
    return any(
        (group << 16 | 0x0010) in source and (group << 16 | 0x3000) not in source
        for group in range(0x6000, 0x6020, 2)
    )


def _without_graphics(data: bytes, image: Dataset, transfer_syntax: str, remove: bool) -> tuple[bytes, bool]:
    """Bits that no pixel uses: whether they hold anything, and the data without them if `remove`."""
    allocated, stored = int(image.BitsAllocated), int(image.get("BitsStored") or image.BitsAllocated)
    high = int(image.get("HighBit") or stored - 1)
    if allocated not in (8, 16, 32) or not 0 < stored < allocated or not stored - 1 <= high < allocated:
        return data, False
    order = ">" if transfer_syntax == ExplicitVRBigEndian else "<"
    values = np.frombuffer(data, f"{order}u{allocated // 8}")
    used = ((1 << stored) - 1) << (high + 1 - stored)
    unused = values & ~np.array(used, values.dtype)
    if int(image.PixelRepresentation) == 1:  # the sign may be extended into the bits above
        above = ((1 << allocated) - 1) & ~((1 << (high + 1)) - 1)
        negative = (values >> high) & 1 == 1
        unused = np.where(
            negative & (unused & above == above), unused & ~np.array(above, values.dtype), unused
        )
    if not unused.any():
        return data, False
    return (values & ~unused).tobytes() if remove else data, True
