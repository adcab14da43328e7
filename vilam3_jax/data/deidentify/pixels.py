"""Pixel data of the copy: unchanged values, without hidden bytes around them."""

from __future__ import annotations

import struct

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.utils import get_expected_length
from pydicom.uid import ExplicitVRBigEndian

from vilam3_jax.data.deidentify import codestreams
from vilam3_jax.data.limits import Limits

_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
TAGS = frozenset({0x7FE00010, 0x7FE00008, 0x7FE00009})  # of _KEYWORDS
_EXTENDED_OFFSETS = (0x7FE00001, 0x7FE00002)  # table and lengths
_REQUIRED = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PhotometricInterpretation")


class Skipped(Exception):
    """An object that is not copied. The message is the reason, a fixed text without values of the file."""


def check_size(header: Dataset, limits: Limits) -> None:
    """Raises `Skipped` if there are no pixels, or more than `limits` allow."""
    if any(header.get(keyword) in (None, "") for keyword in _REQUIRED):
        raise Skipped("damaged: incomplete description of the pixels")
    frames = _frames(header)
    pixels = int(header.Rows) * int(header.Columns)
    if min(frames, pixels) < 1:
        raise Skipped("damaged: an image without pixels")
    decoded = pixels * frames * int(header.SamplesPerPixel) * max(int(header.BitsAllocated), 8) // 8
    if frames > limits.frames or decoded > limits.decoded_bytes:
        raise Skipped("larger than the limits of frames or bytes")


def _frames(header: Dataset) -> int:
    return int(header.get("NumberOfFrames") or 1)


def clean(image: Dataset, source: Dataset, transfer_syntax: str) -> tuple[list[str], list[str]]:
    """Cleans the pixel element of `image` in place without changing a pixel value.

    `image` is the copy, with the pixel element of `source`, the original, which is checked for overlays in
    unused bits. Raises `Skipped` if the stored bytes do not match the header.

    Returns:
      Notes on removed bytes, and signs of burned-in text.
    """
    keyword = next((name for name in _KEYWORDS if name in image), "")
    data = image[keyword].value if keyword else None
    if not isinstance(data, bytes) or not data:
        raise Skipped("no pixels")
    # An overlay without OverlayData occupies bits of the pixels (retired in 2004).
    planes = (group << 16 for group in range(0x6000, 0x6020, 2))
    has_overlay = any((plane | 0x0010) in source and (plane | 0x3000) not in source for plane in planes)
    encapsulated = transfer_syntax in codestreams.ENCAPSULATED
    starts, lengths = (image[tag].value if tag in image else b"" for tag in _EXTENDED_OFFSETS)
    if not encapsulated or not codestreams.is_extended_offset_table(
        starts, lengths, _frames(image), len(data)
    ):
        for tag in _EXTENDED_OFFSETS:  # optional for decoders
            image.pop(tag, None)
    pixels = int(image.Rows) * int(image.Columns)
    if encapsulated:
        try:
            image[keyword].value = codestreams.without_comments(data, transfer_syntax, pixels)
        except (ValueError, struct.error) as error:
            raise Skipped("damaged: malformed compressed pixels") from error
        image[keyword].is_undefined_length = True
        return [], ["overlay graphics inside compressed pixels"] if has_overlay else []
    if keyword == "PixelData":
        expected = get_expected_length(image, unit="bytes")
    else:
        expected = pixels * _frames(image) * int(image.BitsAllocated) // 8
    if len(data) < expected:
        raise Skipped("damaged: truncated pixel data")
    notes, suspicions = [], []
    padded = expected + expected % 2
    if len(data) > padded:
        notes.append("bytes after the last pixel removed")
        data = data[:padded]
    if keyword == "PixelData":
        data, unused = _clear_unused_bits(data, image, transfer_syntax, has_overlay)
        if unused and has_overlay:
            notes.append("graphics in unused bits of pixels removed")
        elif unused:
            suspicions.append("unused bits of the pixels are set")
    image[keyword].value = data
    return notes, suspicions


def _clear_unused_bits(data: bytes, image: Dataset, transfer_syntax: str, clear: bool) -> tuple[bytes, bool]:
    """Returns the data, with unused bits cleared if `clear`, and whether any unused bit was set."""
    allocated, stored = int(image.BitsAllocated), int(image.get("BitsStored") or image.BitsAllocated)
    high = int(image.get("HighBit") or stored - 1)
    if allocated not in (8, 16, 32) or not 0 < stored < allocated or not stored - 1 <= high < allocated:
        return data, False
    order = ">" if transfer_syntax == ExplicitVRBigEndian else "<"
    values = np.frombuffer(data, f"{order}u{allocated // 8}")
    used = ((1 << stored) - 1) << (high + 1 - stored)
    unused = values & ~np.array(used, values.dtype)
    if int(image.PixelRepresentation) == 1:  # the sign may extend into the bits above
        above = np.array(((1 << allocated) - 1) & ~((1 << (high + 1)) - 1), values.dtype)
        negative = (values >> high) & 1 == 1
        unused = np.where(negative & (unused & above == above), unused & ~above, unused)
    if not unused.any():
        return data, False
    return (values & ~unused).tobytes() if clear else data, True
