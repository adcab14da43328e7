"""Codec for images that were decoded and resized for the vision tower before training.

`vilam3 prepare --decode-images` stores them. A file has a header of 10 bytes (magic, version, channels,
height, width) and losslessly compressed pixels: the differences of each row from the pixel to the left, then
Zstandard. Grey images (three equal channels) are stored as one channel. docs/performance.md compares the
alternatives.
"""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np

from vilam3_jax.errors import UserError

_MAGIC = b"\x93V3P"
_VERSION = 1
_HEADER = struct.Struct("<4sBBHH")  # magic, version, channels, height, width
_LEVEL = 1  # of Zstandard; higher levels are slower and save 2 %
_MAX_SIDE = 4096


def encode(image: np.ndarray) -> bytes:
    """Encodes an image, uint8 [H, W, 3] with sides of 1 to 4096 pixels, losslessly.

    Raises `ValueError` for another shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"{image.dtype} {image.shape}: an image is uint8 [H, W, 3]")
    height, width = image.shape[:2]
    if not 0 < min(height, width) <= max(height, width) <= _MAX_SIDE:
        raise ValueError(f"{height} x {width} pixels: sides are from 1 to {_MAX_SIDE}")
    red = image[..., 0]
    grey = np.array_equal(red, image[..., 1]) and np.array_equal(red, image[..., 2])
    differences = imagecodecs.delta_encode(np.ascontiguousarray(red if grey else image), axis=1)
    header = _HEADER.pack(_MAGIC, _VERSION, 1 if grey else 3, height, width)
    return header + bytes(imagecodecs.zstd_encode(np.asarray(differences).tobytes(), _LEVEL))


def is_decoded(data: bytes) -> bool:
    """Whether `data` has the format of this module."""
    return data[:4] == _MAGIC


def shape(data: bytes) -> tuple[int, int]:
    """Returns (H, W) from the header; raises `UserError` if it is damaged or of a newer version."""
    return _header(data)[:2]


def decode(data: bytes) -> np.ndarray:
    """Returns the image given to `encode`, uint8 [H, W, 3]; raises `UserError` for damaged or newer data."""
    height, width, channels = _header(data)
    stored = (height, width) if channels == 1 else (height, width, channels)
    size = height * width * channels
    try:
        # One byte more than expected detects a longer stream and bounds the memory.
        found = imagecodecs.zstd_decode(data[_HEADER.size :], out=size + 1)
    except (imagecodecs.ZstdError, ValueError) as error:
        raise UserError("image stored as pixels is damaged; prepare the dataset again") from error
    if len(found) != size:
        raise UserError("image stored as pixels is cut short; prepare the dataset again")
    pixels = imagecodecs.delta_decode(np.frombuffer(found, np.uint8).reshape(stored), axis=1)
    if channels == 3:
        return pixels
    image = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        image[..., channel] = pixels
    return image


def _header(data: bytes) -> tuple[int, int, int]:
    """Height, width, channels."""
    if len(data) < _HEADER.size:
        raise UserError("image stored as pixels is cut short; prepare the dataset again")
    magic, version, channels, height, width = _HEADER.unpack_from(data)
    if version != _VERSION:
        raise UserError(f"image stored in version {version}, not {_VERSION}; prepare the dataset again")
    sides = (height, width)
    if magic != _MAGIC or channels not in (1, 3) or not 0 < min(sides) <= max(sides) <= _MAX_SIDE:
        raise UserError("image stored as pixels has a damaged header; prepare the dataset again")
    return height, width, channels
