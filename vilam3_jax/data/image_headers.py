"""Parsers of JPEG, PNG, GIF and WebP headers (size, frames, truncation), and checks of all image readers."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from vilam3_jax.data.limits import Limits
from vilam3_jax.errors import UserError

_MAX_SEGMENTS = 10_000
_START_OF_SCAN, _JPEG_LS, _END = 0xDA, 0xF7, b"\xff\xd9"
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # tables, reserved, arithmetic coding
_PNG_START = 8
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> samples per pixel
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_INFLATED = 1 << 20
_GIF_BLOCK = re.compile(rb"[!,;]")
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))


class JpegFrame(NamedTuple):
    """The start-of-frame marker."""

    precision: int  # bits per sample
    height: int
    width: int
    offset: int  # byte offset of the precision


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """The first start-of-frame marker before the pixels, or None."""
    for marker, offset in _jpeg_segments(data):
        if marker in _START_OF_FRAME and len(data) >= offset + 8:
            height = int.from_bytes(data[offset + 3 : offset + 5], "big")
            width = int.from_bytes(data[offset + 5 : offset + 7], "big")
            return JpegFrame(data[offset + 2], height, width, offset + 2)
    return None


def is_jpeg_ls(data: bytes) -> bool:
    """Whether a stream with JPEG markers is JPEG-LS, another codec."""
    return b"\xff\xf7" in data and any(marker == _JPEG_LS for marker, _ in _jpeg_segments(data))


def jpeg_ends_early(data: bytes) -> bool:
    """Whether the end marker is missing after the first scan."""
    start = next((offset for marker, offset in _jpeg_segments(data) if marker == _START_OF_SCAN), None)
    return start is None or data.find(_END, start) < 0


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields markers and the offsets of their length fields up to the first scan, found as by libjpeg."""
    offset = 0
    for _ in range(_MAX_SEGMENTS):
        offset = data.find(b"\xff", offset) + 1
        if offset == 0 or offset >= len(data):
            return
        marker = data[offset]
        if marker in (0x00, 0xFF):
            offset += marker == 0
            continue
        offset += 1
        if marker in _WITHOUT_LENGTH:
            continue
        yield marker, offset
        if marker in (_START_OF_SCAN, 0xD9):
            return
        offset += max(2, int.from_bytes(data[offset : offset + 2], "big"))


def without_profiles(data: bytes) -> bytes:
    """Strips ICC profile and compressed texts from a PNG, as Pillow rejects images with large ones.

    EXIF data, which ImageMagick writes as text, is kept.
    """
    kept, offset = [], 0
    for kind, start, end in _png_chunks(data):
        body = data[start + 8 : end - 4]
        is_text = kind == b"zTXt" or (kind == b"iTXt" and body.partition(b"\0")[2][:1] == b"\1")
        if kind == b"iCCP" or (is_text and not body.startswith(b"Raw profile type exif")):
            kept.append(data[offset:start])
            offset = end
    return b"".join([*kept, data[offset:]]) if kept else data


def lacks_rows(data: bytes) -> bool:
    """Whether the pixels of an otherwise intact PNG end before its last row; Pillow fills the rest with 0."""
    width, height, depth, colour, *_, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    missing = 0
    for left, top, across, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            missing += rows * (1 + (columns * _PNG_CHANNELS[colour] * depth + 7) // 8)
    stream = zlib.decompressobj()
    for kind, start, end in _png_chunks(data):
        packed = data[start + 8 : end - 4] if kind == b"IDAT" else b""
        while packed and missing > 0:
            missing -= len(stream.decompress(packed, _INFLATED))
            packed = stream.unconsumed_tail
    return missing > 0


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields type, start and end of each complete chunk."""
    offset = _PNG_START
    while (end := offset + 12 + int.from_bytes(data[offset : offset + 4], "big")) <= len(data):
        yield data[offset + 4 : offset + 8], offset, end
        offset = end


def gif_frames(data: bytes, most: int) -> list[tuple[int, int]]:
    """The (right, bottom) corner of up to `most` frames of a GIF, in pixels; may lie outside its screen."""
    frames: list[tuple[int, int]] = []
    offset = 13 + _colour_table(data[10:11])
    while len(frames) < most and (block := _GIF_BLOCK.search(data, offset)) is not None:
        offset = block.start()
        if block[0] == b"!":
            offset = _after_blocks(data, offset + 2)
        elif block[0] == b"," and len(data) >= offset + 10:
            left, top, width, height = struct.unpack_from("<4H", data, offset + 1)
            frames.append((left + width, top + height))
            offset = _after_blocks(data, offset + 11 + _colour_table(data[offset + 9 : offset + 10]))
        else:
            break
    return frames


def _colour_table(flags: bytes) -> int:
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _after_blocks(data: bytes, offset: int) -> int:
    while offset < len(data) and data[offset]:
        offset += data[offset] + 1
    return offset + 1


def webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a WebP canvas; (0, 0) if its first chunk is unknown."""
    kind = data[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        packed = int.from_bytes(data[21:25], "little")
        return 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return 0, 0


def check_pixels(width: int, height: int, limits: Limits) -> None:
    """Raises `UserError` for an image that is empty or has more than `limits.pixels`."""
    if min(width, height) < 1:
        raise UserError(f"image of {width} x {height} pixels; fetch or export it again")
    if width * height > limits.pixels:
        raise UserError(
            f"image of {width} x {height} pixels, more than the limit of {limits.pixels}; scale it down"
        )


def choose_frame(frame: int | None, count: int, name: str, parts: str) -> int:
    """Validates a frame index; None is the only frame of the image.

    Raises `UserError`, naming the kind of image (`name`) and its `parts`, "pages" or "frames".
    """
    if frame is None and count > 1:
        raise UserError(f"{name} of {count} {parts}; choose one (0 to {count - 1}) or save it as PNG")
    if frame is not None and not 0 <= frame < count:
        raise UserError(f"{name} has no number {frame} among its {count} {parts}; choose 0 to {count - 1}")
    return frame or 0
