"""Mutations of DICOM files: one element of the data set, at any depth, is changed."""

from __future__ import annotations

import dataclasses
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator

from fuzz_blind import FLOATS, INTEGERS, TEXT_NUMBERS, as_float32

_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_ALL_VRS = tuple(
    b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN "
    b"UR US UT UV XX \0\0".split(b" ")
)
_UNDEFINED = 0xFFFFFFFF
_BINARY = {b"US": "H", b"SS": "h", b"UL": "I", b"SL": "i", b"FL": "f", b"FD": "d", b"AT": "HH", b"UV": "Q"}
_CODES = (
    b"MONOCHROME1 |MONOCHROME2 |RGB |PALETTE COLOR |YBR_FULL|YBR_FULL_422|YBR_ICT |YBR_RCT |ARGB|CMYK|XYZ |"
    b"SIGMOID |LINEAR_EXACT|INVERSE |CT|MR|PT|SEG |SR|PR|ORIGINAL\\PRIMARY\\LOCALIZER |BQML|GML |HEAD|"
    b"ISO_IR 192|ISO 2022 IR 87\\ISO 2022 IR 149 |nonsense|\xff\xfe"
).split(b"|")
_SYNTAX_ENDS = (
    *("", ".1", ".2", ".1.98", ".1.99", ".5", ".4.50", ".4.51", ".4.57", ".4.70", ".4.80", ".4.81", ".4.90"),
    *(".4.91", ".4.100", ".4.102", ".4.103", ".4.201", ".4.202", ".7.1", ".8.1"),
)
_SYNTAXES = tuple(f"1.2.840.10008.1.2{end}".encode() for end in _SYNTAX_ENDS)
# (tag, VR, values) that affect the interpretation of pixels and geometry.
_ADDED: tuple[tuple[int, bytes, tuple[bytes, ...]], ...] = (
    (0x00280008, b"IS", (b"0 ", b"1 ", b"2 ", b"-1", b"1000000 ", b"999999999999", b"1.5 ", b"")),
    (0x00280002, b"US", (b"\0\0", b"\3\0", b"\4\0", b"\xff\xff", b"")),
    (0x00280006, b"US", (b"\0\0", b"\1\0", b"\2\0", b"\1\0\1\0")),
    (0x00280010, b"US", (b"\0\0", b"\1\0", b"\xff\xff", b"", b"\2\0\2\0")),
    (0x00280011, b"US", (b"\0\0", b"\1\0", b"\xff\xff", b"")),
    (0x00280100, b"US", (b"\0\0", b"\1\0", b"\x08\0", b"\x0c\0", b"\x10\0", b"\x20\0", b"\7\0", b"\xff\xff")),
    (0x00280101, b"US", (b"\0\0", b"\1\0", b"\x0c\0", b"\x10\0", b"\x11\0", b"\xff\xff")),
    (0x00280102, b"US", (b"\0\0", b"\x0b\0", b"\x0f\0", b"\xff\xff")),
    (0x00280103, b"US", (b"\0\0", b"\1\0", b"\2\0", b"")),
    (0x00280030, b"DS", (b"0\\0 ", b"1", b"-1\\1", b"nan\\nan ", b"1e400\\1 ", b"1\\1\\1 ", b"", b"a\\b ")),
    (0x00281050, b"DS", (b"40", b"40\\50 ", b"nan ", b"", b"1e400 ", b"x ")),
    (0x00281051, b"DS", (b"0 ", b"1 ", b"-1", b"400 ", b"400\\0 ", b"inf ", b"")),
    (0x00281052, b"DS", (b"-1024 ", b"1e38", b"nan ", b"1\\2 ", b"")),
    (0x00281053, b"DS", (b"0 ", b"1e-320", b"1e308 ", b"nan ", b"-1", b"")),
    (0x00281056, b"CS", (b"SIGMOID ", b"LINEAR", b"X ")),
    (0x00280120, b"US", (b"\0\0", b"\xff\xff", b"", b"\0\0\1\0")),
    (0x00280121, b"SS", (b"\0\x80", b"\xff\x7f")),
    (0x00281101, b"US", (b"\0\1\0\0\x10\0", b"\0\0\0\0\x10\0", b"\4\0\0\0\x08\0", b"\0\1", b"\xff" * 6)),
    (0x00281201, b"OW", (b"", b"\0" * 8, b"\xff" * 512)),
    (0x00281221, b"OW", (b"\0\0", b"\1\0\xff\xff\0\0", b"\2\0\1\0\0\0\0\0", b"\2\0\xff\xff\0\0\0\0" * 40)),
    (0x00200032, b"DS", (b"0\\0\\0 ", b"nan\\0\\0 ", b"0\\0 ", b"1e308\\1e308\\1e308 ", b"")),
    (0x00200037, b"DS", (b"1\\0\\0\\0\\1\\0 ", b"0\\0\\0\\0\\0\\0 ", b"nan\\0\\0\\0\\1\\0 ")),
    (0x00180050, b"DS", (b"0 ", b"-1", b"1e30", b"nan ")),
    (0x00080060, b"CS", (b"CT", b"PT", b"US", b"SEG ", b"", b"SR")),
    (0x7FE00010, b"OW", (b"", b"\0\0", b"\0" * 50)),
    (0x7FE00010, b"OB", (b"\xfe\xff\0\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0",)),
    (0x7FE00008, b"OF", (b"\0\0\xc0\x7f" * 4, b"")),
    (0x7FE00009, b"OD", (b"\0" * 16,)),
    (0x60000010, b"US", (b"\xff\xff", b"\1\0", b"\0\0")),
    (0x60000011, b"US", (b"\xff\xff", b"\1\0")),
    (0x60000100, b"US", (b"\1\0", b"\x10\0")),
    (0x60000102, b"US", (b"\0\0", b"\x0f\0", b"\xff\xff")),
    (0x60003000, b"OW", (b"", b"\xff" * 8)),
    (0x00283000, b"SQ", (b"", b"\xfe\xff\0\xe0\0\0\0\0")),
    (0x00283010, b"SQ", (b"", b"\xfe\xff\0\xe0\0\0\0\0")),
    (0x52009229, b"SQ", (b"", b"\xfe\xff\0\xe0\0\0\0\0")),
    (0x52009230, b"SQ", (b"", b"\xfe\xff\0\xe0\0\0\0\0")),
    (0x00289145, b"SQ", (b"", b"\xfe\xff\0\xe0\0\0\0\0")),
    (0x00409096, b"SQ", (b"", b"\xfe\xff\0\xe0\0\0\0\0")),
    (0x00281404, b"IS", (b"1 ",)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class _Element:
    """The location of one element: tag and VR at `start`, then the length, then the value up to `end`."""

    tag: int
    vr: bytes
    start: int
    length_start: int
    length_size: int
    value: int
    length: int
    order: str

    @property
    def end(self) -> int:
        return self.value + (0 if self.length == _UNDEFINED else self.length)


def dicom(data: bytes, rng: random.Random) -> bytes | None:
    """Changes value, length, VR, tag or position of one element, also in deflated files."""
    start, syntax = _end_of_meta(data)
    if syntax == b"1.2.840.10008.1.2.1.99" and rng.random() < 0.8:
        try:
            plain = zlib.decompress(data[start:], -15)
        except zlib.error:
            return None
        changed = _change_element(plain, 0, "<", True, rng)
        if changed is None:
            return None
        packer = zlib.compressobj(1, wbits=-15)
        return data[:start] + packer.compress(changed) + packer.flush()
    if start > 132 and rng.random() < 0.12:
        return _change_element(data[:start], 132, "<", True, rng, rest=data[start:])
    order = ">" if syntax == b"1.2.840.10008.1.2.2" or data[start : start + 2] == b"\0\x08" else "<"
    return _change_element(data, start, order, data[start + 4 : start + 6] in _ALL_VRS[:-2], rng)


def _end_of_meta(data: bytes) -> tuple[int, bytes]:
    """Offset of the data set, and its transfer syntax."""
    start, syntax = (132, b"") if data[128:132] == b"DICM" else (0, b"")
    for element in _walk(data, start, len(data), "<", True):
        if element.tag >> 16 != 2:
            return element.start, syntax
        if element.tag == 0x00020010:
            syntax = data[element.value : element.end].rstrip(b"\0 ")
        start = element.end
    return start, syntax


def _walk(
    data: bytes, start: int, end: int, order: str, explicit: bool, depth: int = 0
) -> Iterator[_Element]:
    """Yields elements, items and fragments from `start`, including nested ones, to the first invalid one."""
    while start + 8 <= end:
        group, number = struct.unpack_from(f"{order}HH", data, start)
        tag, vr = group << 16 | number, b""
        if group == 0xFFFE:
            length_start, size = start + 4, 4
        elif explicit:
            vr = data[start + 4 : start + 6]
            length_start, size = (start + 8, 4) if vr in _LONG_VRS else (start + 6, 2)
        else:
            length_start, size = start + 4, 4
        if length_start + size > end:
            return
        (length,) = struct.unpack_from(order + ("I" if size == 4 else "H"), data, length_start)
        value = length_start + size
        yield _Element(tag, vr, start, length_start, size, value, length, order)
        if depth < 20 and (tag == 0xFFFEE000 or length == _UNDEFINED or vr == b"SQ"):
            start = value  # descend
            continue
        start = value + length


def _change_element(
    data: bytes, start: int, order: str, explicit: bool, rng: random.Random, rest: bytes = b""
) -> bytes | None:
    elements = list(_walk(data, start, len(data), order, explicit))
    if not elements:
        return None
    return rng.choice(_DICOM_CHANGES)(data, elements, explicit, rng) + rest


_Change = Callable[[bytes, "list[_Element]", bool, random.Random], bytes]


def _with_value(data: bytes, element: _Element, value: bytes) -> bytes:
    size = element.length_size
    written = (len(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little" if element.order == "<" else "big")
    return data[: element.length_start] + written + value + data[element.end :]


def _new_value(data: bytes, element: _Element, rng: random.Random) -> bytes:
    """An invalid or a rare value for this VR."""
    old, vr = data[element.value : element.end], element.vr
    choice = rng.random()
    if choice < 0.1:
        return b""
    if choice < 0.2:
        return old[: len(old) // 2 & ~1]
    if choice < 0.25:
        return old + (b"\\" if vr in (b"DS", b"IS", b"CS") else b"") + old
    if vr in _BINARY:
        code = _BINARY[vr]
        values = [rng.choice(FLOATS) if code in "fd" else rng.choice(INTEGERS) for _ in code]
        width = struct.calcsize(code[:1]) * 8
        if code == "f":
            values = [as_float32(v) for v in values]
        elif code != "d":
            values = [int(v) & ((1 << width) - 1) for v in values]
            code = code.upper()
        return struct.pack(f"{element.order}{code}", *values) * rng.choice(
            (1, 1, 1, max(len(old) // (width // 8), 1))
        )
    if vr in (b"DS", b"IS") or (vr == b"" and re.fullmatch(rb"[-0-9.eE+\\ ]+", old or b"x")):
        count = old.count(b"\\") + 1
        parts = old.split(b"\\")
        for _ in range(rng.choice((1, 1, count))):
            parts[rng.randrange(count)] = rng.choice(TEXT_NUMBERS).encode()
        return _even(b"\\".join(parts))
    if vr == b"UI" or old.startswith(b"1.2.840.10008"):
        return _even(rng.choice(_SYNTAXES), b"\0") if rng.random() < 0.8 else _even(b"1." * 40)
    if vr == b"CS":
        return rng.choice(_CODES)
    choices = (old[::-1], b"\0" * len(old), b"\xff" * len(old), rng.randbytes(len(old) & ~1), b"x" * 2000)
    return rng.choice((*choices, "ß日本\\=^\x1b$B".encode() + b"  "))


def _even(value: bytes, pad: bytes = b" ") -> bytes:
    return value + pad * (len(value) % 2)


def _change_value(data: bytes, elements: list[_Element], explicit: bool, rng: random.Random) -> bytes:
    # Prefer elements that describe pixels and geometry to the many others.
    important = [
        e for e in elements if e.tag >> 16 in (0x0018, 0x0020, 0x0028, 0x5200, 0x7FE0, 0xFFFE, 0x0002)
    ]
    element = rng.choice(important if important and rng.random() < 0.7 else elements)
    return _with_value(data, element, _new_value(data, element, rng))


def _change_length(data: bytes, elements: list[_Element], explicit: bool, rng: random.Random) -> bytes:
    element = rng.choice(elements)
    true, left = element.length, len(data) - element.value
    near = (true + 1, true + 2, true - 1, true - 2, true * 2, left, left + 2)
    far = (0, 1, 2, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, _UNDEFINED, _UNDEFINED, rng.getrandbits(16))
    length = rng.choice((*near, *far))
    size = element.length_size
    written = (length & ((1 << 8 * size) - 1)).to_bytes(size, "little" if element.order == "<" else "big")
    return data[: element.length_start] + written + data[element.value :]


def _change_vr(data: bytes, elements: list[_Element], explicit: bool, rng: random.Random) -> bytes:
    element = rng.choice(elements)
    if not element.vr:
        return _change_length(data, elements, explicit, rng)
    return data[: element.start + 4] + rng.choice(_ALL_VRS).ljust(2, b"\0") + data[element.start + 6 :]


def _change_tag(data: bytes, elements: list[_Element], explicit: bool, rng: random.Random) -> bytes:
    one, other = rng.choice(elements), rng.choice(elements)
    tag = rng.choice(
        (other.tag, rng.choice(_ADDED)[0], 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, rng.getrandbits(32))
    )
    return data[: one.start] + struct.pack(f"{one.order}HH", tag >> 16, tag & 0xFFFF) + data[one.start + 4 :]


def _remove(data: bytes, elements: list[_Element], explicit: bool, rng: random.Random) -> bytes:
    element = rng.choice(elements)
    return data[: element.start] + data[element.end :]


def _repeat(data: bytes, elements: list[_Element], explicit: bool, rng: random.Random) -> bytes:
    element, place = rng.choice(elements), rng.choice(elements)
    copy = data[element.start : element.end]
    at = element.end if rng.random() < 0.5 else place.start
    return data[:at] + copy * rng.choice((1, 1, 2, 50)) + data[at:]


def _add(data: bytes, elements: list[_Element], explicit: bool, rng: random.Random) -> bytes:
    tag, vr, values = rng.choice(_ADDED)
    value, order = rng.choice(values), elements[0].order
    if order == ">" and vr in (b"US", b"SS"):
        value = value[::-1]
    for old in elements:
        if old.tag == tag:
            return _with_value(data, old, value)
    place = next((e.start for e in elements if e.tag > tag and e.tag < 0xFFFE0000), len(data))
    if rng.random() < 0.1:
        place = rng.choice(elements).start
    return data[:place] + _encoded(tag, vr, value, order, explicit) + data[place:]


def _encoded(tag: int, vr: bytes, value: bytes, order: str, explicit: bool) -> bytes:
    head = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF)
    if not explicit:
        return head + struct.pack(f"{order}I", len(value)) + value
    if vr in _LONG_VRS:
        return head + vr + b"\0\0" + struct.pack(f"{order}I", len(value)) + value
    return head + vr + struct.pack(f"{order}H", len(value) & 0xFFFF) + value


def _nest(data: bytes, elements: list[_Element], explicit: bool, rng: random.Random) -> bytes:
    """Nested sequences, with and without lengths."""
    order, depth = elements[0].order, rng.choice((2, 15, 16, 17, 100, 1500))
    tag = rng.choice((0x00081140, 0x52009230, 0x00283000, 0x00409096, 0x00289145))
    head = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF) + (b"SQ\0\0" if explicit else b"")
    item = struct.pack(f"{order}HH", 0xFFFE, 0xE000)
    undefined = struct.pack(f"{order}I", _UNDEFINED)
    if rng.random() < 0.5:
        nested = (head + undefined + item + undefined) * depth
    else:
        nested = b""
        for _ in range(depth):
            nested = item + struct.pack(f"{order}I", len(nested)) + nested
            nested = head + struct.pack(f"{order}I", len(nested)) + nested
    place = rng.choice(elements).start
    return data[:place] + nested + data[place:]


_DICOM_CHANGES: tuple[_Change, ...] = (
    *(_change_value,) * 8,
    *(_change_length,) * 4,
    *(_add,) * 5,
    *(_change_vr, _change_vr, _change_tag, _remove, _remove, _repeat, _nest),
)
