"""Comments inside compressed frames are overwritten with zeros, without a change of length or of a pixel."""

from __future__ import annotations

import functools
import itertools
import re
import struct
from collections.abc import Callable, Sequence

from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    JPEG2000MC,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEG2000MCLossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

NATIVE = frozenset(
    {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian}
)
_JPEG = frozenset(
    {
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
        JPEGLossless,
        JPEGLosslessSV1,
        JPEGLSLossless,
        JPEGLSNearLossless,
    }
)
_JPEG_2000 = frozenset(
    {
        JPEG2000,
        JPEG2000Lossless,
        JPEG2000MC,
        JPEG2000MCLossless,
        HTJ2K,
        HTJ2KLossless,
        HTJ2KLosslessRPCL,
    }
)
ENCAPSULATED = _JPEG | _JPEG_2000 | {RLELossless}

_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
# In entropy-coded data, bytes up to 7F after FF are stuffing (JPEG-LS) or zero (JPEG); D0 to D7 restart.
_MARKER = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]")
_J2K_START = b"\xff\x4f\xff\x51"
# Some writers wrap the codestream in a JP2 file, against the standard. Boxes of other types hold metadata.
_JP2_START = b"\0\0\0\x0cjP  "
_JP2_BOXES = frozenset({b"jP  ", b"ftyp", b"rreq", b"jp2h"})


def without_comments(pixel_data: bytes, transfer_syntax: str, frame_pixels: int) -> bytes:
    """Overwrites bytes that no decoder needs: comments, application data, the rest after the end of a frame.

    Args:
      pixel_data: an encapsulated PixelData element: items, the first of them the offset table.
      transfer_syntax: one of `ENCAPSULATED`.
      frame_pixels: rows times columns.

    Returns:
      The same items, their frames of the same length. An offset table that cannot be one becomes empty.

    Raises:
      ValueError: the items or the compressed frames are not well-formed.
    """
    table, *fragments = _fragments(pixel_data)
    if transfer_syntax == RLELossless:
        clean = functools.partial(_clean_rle, frame_pixels)
    else:
        clean = _clean_jpeg if transfer_syntax in _JPEG else _clean_jpeg_2000
    stream = bytearray().join(pixel_data[start:end] for start, end in fragments)
    _clean_frames(stream, [end - start for start, end in fragments], clean)
    result, place = bytearray(pixel_data), 0
    for start, end in fragments:
        result[start:end] = stream[place : place + end - start]
        place += end - start
    if not _is_offset_table(pixel_data[slice(*table)], len(pixel_data)):
        result[: table[1]] = _ITEM + bytes(4)
    return bytes(result)


def _is_offset_table(data: bytes, size: int) -> bool:
    if len(data) % 4:
        return False
    offsets = struct.unpack(f"<{len(data) // 4}L", data)
    return not offsets or (offsets[0] == 0 and offsets[-1] < size and _is_ascending(offsets))


def _is_ascending(values: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


def is_extended_offset_table(starts: bytes, lengths: bytes, frames: int, size: int) -> bool:
    """Whether ExtendedOffsetTable and its lengths can be those of `frames` in `size` bytes of PixelData."""
    if not len(starts) == len(lengths) == 8 * frames:
        return False
    numbers = [struct.unpack(f"<{frames}Q", data) for data in (starts, lengths)]
    return numbers[0][0] == 0 and _is_ascending(numbers[0]) and max(max(row) for row in numbers) <= size


def _fragments(data: bytes) -> list[tuple[int, int]]:
    """Start and end of the value of each item; the first is the offset table."""
    found, place = [], 0
    while data[place : place + 4] == _ITEM:
        (length,) = struct.unpack_from("<L", data, place + 4)
        place += 8
        if place + length > len(data):
            raise ValueError("a fragment is cut short")
        found.append((place, place + length))
        place += length
    if data[place : place + 4] not in (b"", _END) or any(data[place + 8 :]):
        raise ValueError("bytes between fragments")
    if len(found) < 2:
        raise ValueError("no fragments")
    return found


_Clean = Callable[[bytearray, int, int], int]


def _clean_frames(stream: bytearray, lengths: list[int], clean: _Clean) -> None:
    """Cleans each frame; a frame starts with a fragment and may go on in the next ones."""
    bounds = [0, *itertools.accumulate(lengths)]
    place = 0
    while place < len(stream):
        after = clean(stream, place, _frame_limit(stream, place, bounds))
        if after > len(stream):
            raise ValueError("a frame is cut short")
        place = next(bound for bound in bounds if bound >= after)
        stream[after:place] = bytes(place - after)


def _frame_limit(stream: bytearray, start: int, bounds: list[int]) -> int:
    """Where the next JPEG 2000 frame starts, or the end."""
    starts = (_J2K_START, _JP2_START)
    return next(
        (bound for bound in bounds if bound > start and stream.startswith(starts, bound)), len(stream)
    )


def _segment(stream: bytearray, place: int) -> tuple[int, int]:
    """Start and end of the value of the marker segment at `place`."""
    if place + 4 > len(stream):
        raise ValueError("a marker segment is cut short")
    (length,) = struct.unpack_from(">H", stream, place + 2)
    if length < 2 or place + 2 + length > len(stream):
        raise ValueError("a marker segment is cut short")
    return place + 4, place + 2 + length


def _clean_jpeg(stream: bytearray, start: int, limit: int) -> int:
    """JPEG and JPEG-LS; returns where the frame ends."""
    if stream[start : start + 2] != b"\xff\xd8":
        raise ValueError("not a JPEG frame")
    place = start + 2
    while True:
        while stream[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
        if place + 2 > len(stream) or stream[place] != 0xFF:
            raise ValueError("no marker where one must be")
        marker = stream[place + 1]
        if marker == 0xD9:
            return place + 2
        value, end = _segment(stream, place)
        if marker == 0xFE or 0xE0 <= marker <= 0xEF:
            _blank_application_data(stream, marker, value, end)
        place = end
        if marker == 0xDA:
            found = _MARKER.search(stream, end)
            if not found:
                raise ValueError("a JPEG frame without an end")
            place = found.start()


def _blank_application_data(stream: bytearray, marker: int, value: int, end: int) -> None:
    """Keeps the segments that decide colour: JFIF, Adobe's transform, HP's transform of JPEG-LS."""
    if marker == 0xE0 and stream[value : value + 5] == b"JFIF\0":
        value += 14  # a thumbnail follows
    elif marker == 0xEE and stream[value : value + 5] == b"Adobe":
        value += 12
    elif marker == 0xE8 and stream[value : value + 4] == b"mrfx":
        value += 5
    if value < end:
        stream[value:end] = bytes(end - value)


def _clean_jpeg_2000(stream: bytearray, start: int, limit: int) -> int:
    """A JPEG 2000 codestream that ends before `limit`; returns where it ends."""
    if stream.startswith(_JP2_START, start):
        return _clean_jp2(stream, start, limit)
    if not stream.startswith(_J2K_START, start):
        raise ValueError("not a JPEG 2000 codestream")
    place = start + 2
    while stream[place : place + 2] != b"\xff\xd9":
        if not any(stream[place:limit]):  # encoders leave the last marker out, though it is required
            return place
        tile_part = place
        length = 0
        while stream[place : place + 2] != b"\xff\x93":  # SOD: packets follow
            value, end = _segment(stream, place)
            if stream[place + 1] == 0x90:  # SOT
                tile_part = place
                (length,) = struct.unpack_from(">L", stream, value + 2)
            elif stream[place + 1] == 0x64:  # COM, its first two bytes say whether it is text
                stream[value + 2 : end] = bytes(max(end - value - 2, 0))
            place = end
        if length == 0:  # up to the end of the codestream
            place = stream.rfind(b"\xff\xd9", place, limit)
            if place < 0:
                raise ValueError("a JPEG 2000 codestream without an end")
            continue
        if not place < tile_part + length <= limit:
            raise ValueError("a tile part of impossible length")
        place = tile_part + length
    return place + 2


def _clean_jp2(stream: bytearray, start: int, limit: int) -> int:
    """A JP2 file; returns where it ends."""
    place = start
    while any(stream[place:limit]):
        if place + 8 > limit:
            raise ValueError("a JP2 box is cut short")
        length, kind = struct.unpack_from(">L4s", stream, place)
        end = place + length if length else limit
        if not place + 8 <= end <= limit:  # also 1, which announces a length of more than 4 GiB
            raise ValueError("a JP2 box of impossible length")
        if kind == b"jp2c":
            after = _clean_jpeg_2000(stream, place + 8, end)
            stream[after:end] = bytes(end - after)
        elif kind not in _JP2_BOXES:
            stream[place + 8 : end] = bytes(end - place - 8)
        place = end
    return place


def _clean_rle(frame_pixels: int, stream: bytearray, start: int, limit: int) -> int:
    """An RLE frame (PS3.5, annex G): a header of offsets, and a segment for each byte of a pixel."""
    count, *offsets = struct.unpack_from("<16L", stream, start)
    if not 1 <= count <= 15 or offsets[0] != 64 or sorted(offsets[:count]) != offsets[:count]:
        raise ValueError("not an RLE frame")
    struct.pack_into(f"<{15 - count}L", stream, start + 4 + 4 * count, *[0] * (15 - count))
    end = start + 64
    for offset in offsets[:count]:
        if not end <= start + offset <= len(stream):
            raise ValueError("RLE segments overlap or lie outside")
        stream[end : start + offset] = bytes(start + offset - end)
        end = _rle_segment_end(stream, start + offset, frame_pixels)
    return end


def _rle_segment_end(stream: bytearray, place: int, bytes_left: int) -> int:
    while bytes_left > 0:
        if place >= len(stream):
            raise ValueError("an RLE segment is cut short")
        control = stream[place]
        if control < 128:
            bytes_left -= control + 1
            place += control + 2
        else:  # 128 does nothing, and has no byte after it
            bytes_left -= 257 - control if control > 128 else 0
            place += 2 if control > 128 else 1
    return place
