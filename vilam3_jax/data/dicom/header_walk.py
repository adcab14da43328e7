"""A fast header parser for common DICOM files.

pydicom spends most of its time on elements that are skipped. This parser reads the little-endian files that
scanners and archives write, about three times faster, and leaves all other files to pydicom. Both return the
same elements.
"""

from __future__ import annotations

import io
import struct
from typing import IO, cast

from pydicom.dataelem import RawDataElement, empty_value_for_VR
from pydicom.tag import BaseTag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian
from pydicom.valuerep import EXPLICIT_VR_LENGTH_32, VR

Elements = dict[BaseTag, RawDataElement]

_META_START = 132
_META_GROUP = b"\x02\x00"
_TRANSFER_SYNTAX = 0x00020010
_DIRECTORY_RECORDS, _REPORT_CONTENT, _RADIOTHERAPY = 0x00041220, 0x0040A730, range(0x3002, 0x3100)
_PIXEL_GROUP = 0x7FE0
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_OTHER_ENCODINGS = {str(uid).encode() for uid in (DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian)}

_WINDOW_BYTES = 1 << 15
_MAX_VALUE_BYTES = 1 << 20
_MAX_ELEMENTS = 100_000
_MAX_NESTING = 16

_LONG = {str(vr).encode(): str(vr) for vr in EXPLICIT_VR_LENGTH_32}
_SHORT = {str(vr).encode(): str(vr) for vr in VR if len(str(vr)) == 2 and vr not in EXPLICIT_VR_LENGTH_32}
_unpack_explicit = struct.Struct("<HH2sH").unpack_from
_unpack_implicit = struct.Struct("<HHL").unpack_from
_unpack_length = struct.Struct("<L").unpack_from


def ends_header(tag: int) -> bool:
    """Whether no image element follows: at the pixels, or at directory records, report content or
    radiotherapy structures, which may be long and occur only in objects without pixels."""
    group = tag >> 16
    return group >= _PIXEL_GROUP or tag in (_DIRECTORY_RECORDS, _REPORT_CONTENT) or group in _RADIOTHERAPY


class _Unsupported(Exception):
    """The file needs pydicom."""


def walk(file: IO[bytes], tags: frozenset[int]) -> tuple[Elements, Elements, bool] | None:
    """Reads the elements `tags` in the header of a little-endian DICOM file with a preamble.

    Returns:
      (meta information, elements, whether they are in implicit VR); None for files that need pydicom: big
      endian, deflated, damaged, without meta information, or with a selected sequence of undefined length.
    """
    try:
        walker = _Walker(file)
        meta, end = walker.elements(_META_START, False, None)
        syntax = meta.get(BaseTag(_TRANSFER_SYNTAX))
        if syntax is None or not syntax.value:
            return None
        uid = bytes(syntax.value).rstrip(b"\0 ")
        if uid in _OTHER_ENCODINGS:
            return None
        implicit = uid == str(ImplicitVRLittleEndian).encode()
        found, _ = walker.elements(end, implicit, tags)
        return meta, found, implicit
    except (_Unsupported, struct.error):
        return None


class _Walker:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._size = file.seek(0, io.SEEK_END)
        self._left = _MAX_ELEMENTS
        self._buffer, self._base = b"", 0

    def elements(self, position: int, implicit: bool, tags: frozenset[int] | None) -> tuple[Elements, int]:
        """(elements of `tags` after `position`, end offset); `tags` None: the meta information."""
        found: Elements = {}
        if implicit and self._at(position, 6)[4:6].isalpha():
            raise _Unsupported  # explicit VR, contrary to the transfer syntax
        while position + 8 <= self._size:
            if tags is None and self._at(position, 2) != _META_GROUP:
                return found, position  # the data set may be in implicit VR
            tag, vr, start, length = self._element(position, implicit)
            if ends_header(tag):
                return found, position
            if length == _UNDEFINED:
                if tags is None or tag in tags:
                    raise _Unsupported
                position = self._after_sequence(start, implicit, 0)
                continue
            position = start + length
            if tags is None or tag in tags:
                if length > _MAX_VALUE_BYTES:
                    raise _Unsupported
                empty = cast(bytes | None, empty_value_for_VR(vr, raw=True))
                value = self._at(start, length) if length else empty
                base_tag = BaseTag(tag)
                found[base_tag] = RawDataElement(base_tag, vr, length, value, start, implicit, True)
        if position != self._size:
            raise _Unsupported
        return found, position

    def _element(self, position: int, implicit: bool) -> tuple[int, str | None, int, int]:
        """Tag, value representation, offset and length of the value."""
        self._left -= 1
        if self._left < 0:
            raise _Unsupported
        offset = position - self._base
        if offset < 0 or offset + 12 > len(self._buffer):
            self._fill(position, _WINDOW_BYTES)
            offset = 0
        if implicit:
            group, element, length = _unpack_implicit(self._buffer, offset)
            return group << 16 | element, None, position + 8, length
        group, element, code, length = _unpack_explicit(self._buffer, offset)
        tag = group << 16 | element
        if code in _SHORT:
            return tag, _SHORT[code], position + 8, length
        if code in _LONG:
            return tag, _LONG[code], position + 12, _unpack_length(self._buffer, offset + 8)[0]
        if group == 0xFFFE:  # item and sequence delimiters have no value representation
            return tag, None, position + 8, _unpack_length(self._buffer, offset + 4)[0]
        raise _Unsupported

    def _after_sequence(self, position: int, implicit: bool, depth: int) -> int:
        """End offset of a sequence of undefined length."""
        if depth > _MAX_NESTING:
            raise _Unsupported
        while True:
            group, element, length = _unpack_implicit(self._at(position, 8))
            tag = group << 16 | element
            position += 8
            if tag == _SEQUENCE_END:
                return position
            if tag != _ITEM:
                raise _Unsupported
            position = (
                position + length if length != _UNDEFINED else self._after_item(position, implicit, depth)
            )

    def _after_item(self, position: int, implicit: bool, depth: int) -> int:
        while True:
            tag, _, start, length = self._element(position, implicit)
            if tag == _ITEM_END:
                return start
            if length == _UNDEFINED:
                position = self._after_sequence(start, implicit, depth + 1)
            else:
                position = start + length

    def _at(self, position: int, count: int) -> bytes:
        offset = position - self._base
        if offset < 0 or offset + count > len(self._buffer):
            self._fill(position, max(count, _WINDOW_BYTES))
            offset = 0
        value = self._buffer[offset : offset + count]
        if len(value) < count:
            raise _Unsupported
        return value

    def _fill(self, position: int, count: int) -> None:
        self._file.seek(position)
        self._buffer, self._base = self._file.read(count), position
