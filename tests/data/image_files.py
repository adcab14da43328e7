"""Builders of image files, some with features that Pillow cannot write."""

from __future__ import annotations

import io
import struct
import zlib

import imagecodecs
import numpy as np
from PIL import Image


def encoded(image: Image.Image, format: str = "PNG", **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()


RGB = np.random.default_rng(0).integers(0, 256, (9, 7, 3)).astype(np.uint8)
FRAMES = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deep_png(samples: np.ndarray, *before: bytes, after: bytes = b"") -> bytes:
    """A 16-bit PNG of [H, W, C] samples with chunks before and after the pixels."""
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[samples.shape[-1]]
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
    body = head + b"".join(before) + chunk(b"IDAT", zlib.compress(rows)) + after
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


def few_bits_png(values: np.ndarray, depth: int, colour: int, *before: bytes) -> bytes:
    """A PNG of less than 8 bits per sample."""
    height, width = values.shape
    rows = b"".join(b"\0" + imagecodecs.packints_encode(row, depth) for row in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(before)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """The orientations of EXIF 2.32 in numpy."""
    return {
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.swapaxes(0, 1),
        6: np.rot90(array, -1),
        7: array[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(array),
    }.get(orientation, array)


RAMP = np.linspace(0, 4080, 400).round().astype(np.uint16).reshape(20, 20, 1)  # 12 bits in 16
FULL = np.full_like(RAMP, 65535)
