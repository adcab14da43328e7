"""What a JPEG stream says of itself, without decoding it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

_MAX_SEGMENTS = 10_000
_START_OF_SCAN, _END = 0xDA, b"\xff\xd9"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {
    0xC4,
    0xC8,
    0xCC,
}  # what is left: tables, a reserved one, arithmetic
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD9)))


@dataclasses.dataclass(frozen=True)
class FrameHeader:
    """The start-of-frame marker.

    Attributes:
      precision: bits of a sample.
      height: rows.
      width: columns.
      components: samples of a pixel.
      place: offset of the precision's byte.
    """

    precision: int
    height: int
    width: int
    components: int
    place: int


def frame_header(data: bytes) -> FrameHeader | None:
    """The first start-of-frame marker before the pixels; None if there is none."""
    for marker, place in _segments(data):
        if marker in _FRAMES and len(data) >= place + 8:
            height = int.from_bytes(data[place + 3 : place + 5], "big")
            width = int.from_bytes(data[place + 5 : place + 7], "big")
            return FrameHeader(data[place + 2], height, width, data[place + 7], place + 2)
    return None


def ends_early(data: bytes) -> bool:
    """Whether the end marker is missing after the first scan."""
    start = next((place for marker, place in _segments(data) if marker == _START_OF_SCAN), None)
    return start is None or data.find(_END, start) < 0


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yields marker and offset of its length field, up to the first scan; finds markers as libjpeg does."""
    place = 0
    for _ in range(_MAX_SEGMENTS):
        place = data.find(b"\xff", place) + 1
        if place == 0 or place >= len(data):
            return
        marker = data[place]
        if marker in (0x00, 0xFF):
            place += marker == 0
            continue
        place += 1
        if marker in _WITHOUT_LENGTH:
            continue
        yield marker, place
        if marker in (_START_OF_SCAN, 0xD9):
            return
        place += max(2, int.from_bytes(data[place : place + 2], "big"))
