"""Overwrites comments in compressed frames with zeros; changes no length and no pixel."""

from __future__ import annotations

import functools
import io
import itertools
import re
import struct
from collections.abc import Callable, Sequence

from pydicom.uid import (
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
    UncompressedTransferSyntaxes,
)

NATIVE = frozenset(UncompressedTransferSyntaxes)
_JPEG = frozenset(JPEGTransferSyntaxes + JPEGLSTransferSyntaxes)
ENCAPSULATED = _JPEG | {*JPEG2000TransferSyntaxes, RLELossless}

_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
# In entropy-coded data, FF precedes 00 (JPEG), a stuffed byte up to 7F (JPEG-LS) or a restart D0 to D7.
_MARKER = re.compile(rb"\xff[\x80-\xcf\xd8-\xfe]")
# Application data that determine colour: marker -> (identifier, bytes to keep). JFIF may contain a thumbnail.
_COLOUR_SEGMENTS = {0xE0: (b"JFIF\0", 14), 0xEE: (b"Adobe", 12), 0xE8: (b"mrfx", 5)}
_J2K_START = b"\xff\x4f\xff\x51"
# Some writers violate the standard and wrap the codestream in a JP2 file. Boxes of other types hold metadata.
_JP2_START = b"\0\0\0\x0cjP  "
_FRAME_STARTS = (_J2K_START, _JP2_START)
_JP2_BOXES = frozenset({b"jP  ", b"ftyp", b"rreq", b"jp2h"})


def without_comments(pixel_data: bytes, transfer_syntax: str, frame_pixels: int) -> bytes:
    """Overwrites bytes that no decoder needs: comments, application data, and padding after each frame.

    Args:
      pixel_data: value of an encapsulated PixelData element: the offset table and the fragments, as items.
      transfer_syntax: one of `ENCAPSULATED`.
      frame_pixels: rows times columns.

    Returns:
      The same items with unchanged lengths, except that an invalid offset table becomes empty.

    Raises:
      ValueError: the items or the compressed frames are malformed.
    """
    table, *fragments = _fragments(pixel_data)
    if transfer_syntax == RLELossless:
        clean = functools.partial(_clean_rle, frame_pixels)
    else:
        clean = _clean_jpeg if transfer_syntax in _JPEG else _clean_jpeg_2000
    stream = bytearray().join(pixel_data[start:end] for start, end in fragments)
    _clean_frames(stream, [end - start for start, end in fragments], clean)
    result, cleaned = bytearray(pixel_data), io.BytesIO(stream)
    for start, end in fragments:
        result[start:end] = cleaned.read(end - start)
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
    """Whether an extended offset table and lengths are valid for `frames` in `size` bytes of PixelData."""
    if not len(starts) == len(lengths) == 8 * frames:
        return False
    numbers = [struct.unpack(f"<{frames}Q", data) for data in (starts, lengths)]
    return numbers[0][0] == 0 and _is_ascending(numbers[0]) and max(max(row) for row in numbers) <= size


def _fragments(data: bytes) -> list[tuple[int, int]]:
    """Returns start and end of each item's value; the first item is the offset table."""
    found, place = [], 0
    while data[place : place + 4] == _ITEM:
        (length,) = struct.unpack_from("<L", data, place + 4)
        place += 8
        if place + length > len(data):
            raise ValueError("truncated fragment")
        found.append((place, place + length))
        place += length
    if data[place : place + 4] not in (b"", _END) or any(data[place + 8 :]):
        raise ValueError("bytes between fragments")
    if len(found) < 2:
        raise ValueError("no fragments")
    return found


_Clean = Callable[[bytearray, int, int], int]


def _clean_frames(stream: bytearray, lengths: list[int], clean: _Clean) -> None:
    """Cleans each frame. A frame starts with a fragment and may span several."""
    bounds = [0, *itertools.accumulate(lengths)]
    place = 0
    while place < len(stream):
        # The next start of a JPEG 2000 frame bounds this one.
        limit = next((b for b in bounds if b > place and stream.startswith(_FRAME_STARTS, b)), len(stream))
        after = clean(stream, place, limit)
        if after > len(stream):
            raise ValueError("truncated frame")
        place = next(bound for bound in bounds if bound >= after)
        stream[after:place] = bytes(place - after)


def _segment(stream: bytearray, place: int) -> tuple[int, int]:
    """Returns start and end of the value of the marker segment at `place`."""
    length = int.from_bytes(stream[place + 2 : place + 4], "big")
    if length < 2 or place + 2 + length > len(stream):
        raise ValueError("truncated marker segment")
    return place + 4, place + 2 + length


def _clean_jpeg(stream: bytearray, start: int, limit: int) -> int:
    """Cleans a JPEG or JPEG-LS frame; returns its end."""
    if stream[start : start + 2] != b"\xff\xd8":
        raise ValueError("not a JPEG frame")
    place = start + 2
    while True:
        while stream[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
        if place + 2 > len(stream) or stream[place] != 0xFF:
            raise ValueError("missing JPEG marker")
        marker = stream[place + 1]
        if marker == 0xD9:
            return place + 2
        value, end = _segment(stream, place)
        if marker == 0xFE or 0xE0 <= marker <= 0xEF:
            identifier, kept = _COLOUR_SEGMENTS.get(marker, (b"", 0))
            value += kept if stream.startswith(identifier, value) else 0
            stream[value:end] = bytes(max(end - value, 0))
        place = end
        if marker == 0xDA:
            found = _MARKER.search(stream, end)
            if not found:
                raise ValueError("JPEG frame without an end marker")
            place = found.start()


def _clean_jpeg_2000(stream: bytearray, start: int, limit: int) -> int:
    """Cleans a JPEG 2000 codestream that ends before `limit`; returns its end."""
    if stream.startswith(_JP2_START, start):
        return _clean_jp2(stream, start, limit)
    if not stream.startswith(_J2K_START, start):
        raise ValueError("not a JPEG 2000 codestream")
    place = start + 2
    while stream[place : place + 2] != b"\xff\xd9":
        if not any(stream[place:limit]):  # some encoders omit the required end marker
            return place
        tile_part = place
        length = 0
        while stream[place : place + 2] != b"\xff\x93":  # SOD, before the packets
            value, end = _segment(stream, place)
            if stream[place + 1] == 0x90:  # SOT
                tile_part = place
                (length,) = struct.unpack_from(">L", stream, value + 2)
            elif stream[place + 1] == 0x64:  # COM, starts with two bytes for its type
                stream[value + 2 : end] = bytes(max(end - value - 2, 0))
            place = end
        if length == 0:  # extends to the end of the codestream
            place = stream.rfind(b"\xff\xd9", place, limit)
            if place < 0:
                raise ValueError("JPEG 2000 codestream without an end marker")
            continue
        if not place < tile_part + length <= limit:
            raise ValueError("JPEG 2000 tile part of invalid length")
        place = tile_part + length
    return place + 2


def _clean_jp2(stream: bytearray, start: int, limit: int) -> int:
    """Cleans a JP2 file; returns its end."""
    place = start
    while any(stream[place:limit]):
        if place + 8 > limit:
            raise ValueError("truncated JP2 box")
        length, kind = struct.unpack_from(">L4s", stream, place)
        end = place + length if length else limit
        if not place + 8 <= end <= limit:  # also for 1, which denotes a 64-bit length
            raise ValueError("JP2 box of invalid length")
        if kind == b"jp2c":
            after = _clean_jpeg_2000(stream, place + 8, end)
            stream[after:end] = bytes(end - after)
        elif kind not in _JP2_BOXES:
            stream[place + 8 : end] = bytes(end - place - 8)
        place = end
    return place


def _clean_rle(frame_pixels: int, stream: bytearray, start: int, limit: int) -> int:
    """Cleans an RLE frame (PS3.5, annex G): a header of offsets and one segment per byte of a pixel."""
    count, *offsets = struct.unpack_from("<16L", stream, start)
    if not 1 <= count <= 15 or offsets[0] != 64 or sorted(offsets[:count]) != offsets[:count]:
        raise ValueError("not an RLE frame")
    struct.pack_into(f"<{15 - count}L", stream, start + 4 + 4 * count, *[0] * (15 - count))
    end = start + 64
    for offset in offsets[:count]:
        if not end <= start + offset <= len(stream):
            raise ValueError("RLE segments overlap or extend outside the frame")
        stream[end : start + offset] = bytes(start + offset - end)
        end = _rle_segment_end(stream, start + offset, frame_pixels)
    return end


def _rle_segment_end(stream: bytearray, place: int, bytes_left: int) -> int:
    while bytes_left > 0:
        if place >= len(stream):
            raise ValueError("truncated RLE segment")
        control = stream[place]
        if control < 128:
            bytes_left -= control + 1
            place += control + 2
        else:  # 128 is a no-op without operand
            bytes_left -= 257 - control if control > 128 else 0
            place += 2 if control > 128 else 1
    return place
