"""Mutations of files, for `fuzz_readers.py`: blind ones, and ones that know the format.

A mutation that knows the format damages one field and keeps the rest valid (checksums, compression, lengths),
so that the damage reaches the code behind the first check. Everything is drawn from one `random.Random`: the
same seed and number give the same bytes.
"""

from __future__ import annotations

import dataclasses
import gzip
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import nibabel as nib

Mutation = Callable[[bytes, random.Random], bytes | None]

_INTEGERS = (
    *(0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 255, 256, 32767, 32768, 65535, 65536, 1 << 24, (1 << 31) - 1),
)
_TEXT_NUMBERS = (
    *("0", "1", "-1", "-0", "2", "3", "16", "17", "255", "65535", "65536", "2147483647", "-2147483648"),
    *("4294967295", "9" * 20, "9" * 5000, "nan", "inf", "-inf", "1e400", "1e-400", "1e30", "1e38", "1e39"),
    *("0.1", "1,5", "0x10", "1_000", "½", "+", "-", ".", "e", "", " ", "1 2 3 4 5 6 7 8 9"),
)
_FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 1e-320, 1e-30, 1e30, 3.4e38, 1e300, float("nan"), float("inf"), float("-inf")),
)


def mutate(
    files: Mapping[str, bytes], others: Sequence[bytes], rng: random.Random, size_limit: int = 1 << 20
) -> dict[str, bytes]:
    """Damages one file of an input, now and then two.

    Args:
      files: the input, name → content.
      others: contents of other inputs, for splices.
      rng: source of every choice.
      size_limit: results are cut to this many bytes.

    Returns:
      The input with the damage.
    """
    damaged = dict(files)
    for name in rng.sample(sorted(files), min(len(files), 1 + (rng.random() < 0.1))):
        damaged[name] = mutate_bytes(files[name], others, rng)[:size_limit]
    if len(files) > 1 and rng.random() < 0.05:
        del damaged[rng.choice(sorted(damaged))]
    return damaged


def mutate_bytes(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """Damages `data` in one to four places."""
    if data[:2] == b"\x1f\x8b" and rng.random() < 0.8:
        try:
            plain = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            pass
        else:
            return gzip.compress(mutate_bytes(plain, others, rng), 1, mtime=0)
    known = _known_format(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        damaged = None
        if known is not None and rng.random() < 0.6:
            damaged = known(data, rng)
        if damaged is None and others and rng.random() < 0.04:
            damaged = _splice(data, rng.choice(others), rng)
        data = rng.choice(_BLIND)(data, rng) if damaged is None else damaged
    return data


def _known_format(data: bytes) -> Mutation | None:
    if data[128:132] == b"DICM":
        return dicom
    if data[4:6] == b"\x08\0" or data[:2] == b"\x08\0":
        return dicom
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return png
    if data[:2] == b"\xff\xd8":
        return jpeg
    if data[:4] in (b"II*\0", b"MM\0*"):
        return tiff
    if data[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0", b"\0\0\x02\x1c"):
        return nifti
    if data[:4] == b"NRRD" or b"NDims" in data[:300] or data[:1] == b"{":
        return text_header
    if data[:4] == b"RIFF":
        return riff
    return None


# Blind mutations.


def _place(data: bytes, rng: random.Random) -> int:
    """A position, half of the time near the beginning, where headers are."""
    return rng.randrange(min(len(data), 600) if rng.random() < 0.5 else len(data)) if data else 0


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if out:
            out[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(out)


def set_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if out:
            out[_place(data, rng)] = rng.choice((0, 1, 0x20, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))
    return bytes(out)


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)] if rng.random() < 0.7 else data[: -rng.choice((1, 2, 4, 9))]


def insert(data: bytes, rng: random.Random) -> bytes:
    at, count = _place(data, rng), rng.choice((1, 2, 4, 7, 64, 1000))
    return (
        data[:at]
        + (bytes([rng.randrange(256)]) * count if rng.random() < 0.5 else rng.randbytes(count))
        + data[at:]
    )


def delete(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.choice((1, 2, 4, 8, 60, 500)) :]


def duplicate(data: bytes, rng: random.Random) -> bytes:
    at, count = _place(data, rng), rng.choice((2, 8, 40, 300))
    return data[: at + count] + data[at : at + count] * rng.choice((1, 2, 20)) + data[at + count :]


def swap(data: bytes, rng: random.Random) -> bytes:
    (a, b), count = sorted((_place(data, rng), _place(data, rng))), rng.choice((2, 4, 8, 32))
    if a + count > b:
        return flip_bits(data, rng)
    return data[:a] + data[b : b + count] + data[a + count : b] + data[a : a + count] + data[b + count :]


def set_integer(data: bytes, rng: random.Random) -> bytes:
    """Overwrites 2, 4 or 8 bytes with a number that lengths and counts should not have."""
    size = rng.choice((2, 4, 4, 8))
    at = _place(data, rng) & ~(rng.choice((1, 2, 4)) - 1)
    value = rng.choice((*_INTEGERS, len(data), len(data) - at, len(data) + 1, rng.getrandbits(32)))
    value = -value if rng.random() < 0.3 else value
    written = (value & ((1 << 8 * size) - 1)).to_bytes(size, rng.choice(("little", "big")))
    return data[:at] + written + data[at + size :]


def set_float(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng) & ~3
    written = struct.pack(rng.choice("<>") + "f", _as_float32(rng.choice(_FLOATS)))
    return data[:at] + written + data[at + 4 :]


def clear(data: bytes, rng: random.Random) -> bytes:
    at, count = _place(data, rng), rng.choice((4, 16, 200))
    return data[:at] + rng.choice((b"\0", b"\xff", b" ")) * len(data[at : at + count]) + data[at + count :]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + (
        rng.randbytes(rng.choice((1, 100))) if rng.random() < 0.5 else data[: rng.choice((8, 4000))]
    )


_BLIND: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flip_bits, flip_bits, set_bytes, set_bytes, set_integer, set_integer, set_integer),
    *(truncate, insert, delete, duplicate, swap, set_float, clear, append),
)


def _splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)] + other[_place(other, rng) :]


def _as_float32(value: float) -> float:
    return max(-3.4e38, min(3.4e38, value)) if abs(value) < float("inf") else value


# DICOM: every element, however deep, is a place to change.

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
# (tag, VR, values): what changes how pixels and geometry are understood.
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
    """Where one element of a data set lies: `start`, then tag and VR, the length, the value until `end`."""

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
    """Changes one element of a data set: value, length, VR, tag, place; in deflated files, too."""
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
    """Where the data set begins, and its transfer syntax."""
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
    """Elements, items and fragments from `start` on, nested ones too; ends at the first that is broken."""
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
            start = value  # goes on inside
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
    """Something that this VR should not hold, or a rare value that it may."""
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
        values = [rng.choice(_FLOATS) if code in "fd" else rng.choice(_INTEGERS) for _ in code]
        width = struct.calcsize(code[:1]) * 8
        if code == "f":
            values = [_as_float32(v) for v in values]
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
            parts[rng.randrange(count)] = rng.choice(_TEXT_NUMBERS).encode()
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
    # What describes the pixels and the geometry, rather than one of a hundred other elements.
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
    """Sequences in sequences, with and without lengths."""
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


# Volumes.

_WORDS = (
    *("none", "null", "true", "[]", "{}", "LOCAL", "LIST", "raw", "gzip", "/etc/passwd", "../x", "float"),
    *("block", "int64", "MET_USHORT_ARRAY", "%03d.raw 1 9999999 1"),
)


def nifti(data: bytes, rng: random.Random) -> bytes | None:
    """Sets one header field to an extreme."""
    order = ">" if data[:2] == b"\0\0" else "<"
    header = (
        nib.Nifti2Header if data[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nib.Nifti1Header
    ).template_dtype
    assert header.fields is not None
    name = rng.choice(("dim", "dim", "pixdim", "datatype", "vox_offset", "scl_slope", *header.fields))
    dtype, offset = header.fields[name][:2]
    base = dtype.base
    index = rng.randrange(max(dtype.itemsize // base.itemsize, 1))
    place = offset + index * base.itemsize
    if base.kind == "S":
        return data[:place] + rng.randbytes(rng.choice((1, base.itemsize))) + data[place + base.itemsize :]
    if base.kind == "f":
        value = rng.choice(_FLOATS)
        written = struct.pack(order + ("f" if base.itemsize == 4 else "d"), _as_float32(value))
    else:
        number = rng.choice(_INTEGERS) * rng.choice((1, 1, -1))
        number &= (1 << 8 * base.itemsize) - 1
        written = number.to_bytes(base.itemsize, "little" if order == "<" else "big")
    return data[:place] + written + data[place + base.itemsize :]


def text_header(data: bytes, rng: random.Random) -> bytes | None:
    """Changes one line, word or number of a header of text, such as those of NRRD, MetaImage and JSON."""
    end = len(data) if data[:1] == b"{" else data.find(b"\n\n") + 1
    if end <= 0:
        mark = re.search(rb"ElementDataFile[^\n]*\n", data)
        end = mark.end() if mark else len(data)
    lines, rest = data[:end].split(b"\n"), data[end:]
    at = rng.randrange(len(lines))
    line, choice = lines[at], rng.randrange(10)
    if choice == 0:
        del lines[at]
    elif choice == 1:
        lines.insert(rng.randrange(len(lines)), line)
    elif choice == 2:
        lines[at] = re.sub(rb"([:=]).*", rb"\1", line)
    elif choice == 3:
        lines[at] = line.replace(
            rng.choice((b":", b"=", b" ", b",", b'"', b"(", b")")), rng.choice((b"", b"=", b"\0", b"::"))
        )
    elif choice == 4:
        other = rng.choice(lines)
        key, value = re.match(rb"[^:=]*[:=]?", line), re.search(rb"[:=].*", other)
        lines[at] = (key[0] if key else b"") + (value[0][1:] if value else b"")
    elif choice == 5:
        lines[at] = line + rng.choice((b"\r", b" ", b" # x", b"\0", b"\xff", b" 1", b"," * 9, b"x" * 9000))
    else:
        numbers = list(re.finditer(rb"-?[0-9][-+0-9.eE]*|none|(?<=[:=])\s*\w+", line))
        if not numbers:
            return None
        found = rng.choice(numbers)
        new = rng.choice((*_TEXT_NUMBERS, *_WORDS))
        lines[at] = line[: found.start()] + new.encode() + line[found.end() :]
    return b"\n".join(lines) + rest


# Pictures.

_PNG_CHUNKS = (
    *(b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"iCCP", b"gAMA", b"sRGB", b"eXIf", b"acTL", b"fcTL"),
    *(b"fdAT", b"tEXt", b"zTXt", b"iTXt", b"sBIT", b"bKGD", b"pHYs", b"xxxx"),
)
_JPEG_MARKERS = (
    *(0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xF7),
)
_TIFF_TAGS = (
    *(254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 330),
    *(338, 339, 347, 530, 34665, 34675, 50838, 65535),
)


def png(data: bytes, rng: random.Random) -> bytes | None:
    """Changes, repeats, removes or moves a chunk; checksums stay right."""
    chunks, place = [], 8
    while place + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return None
    at, choice = rng.randrange(len(chunks)), rng.randrange(8)
    kind, content = chunks[at]
    if choice == 0:
        del chunks[at]
    elif choice == 1:
        chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
    elif choice == 2:
        chunks[at] = (rng.choice(_PNG_CHUNKS), content)
    elif choice in (3, 4) and chunks[0][0] == b"IHDR":
        chunks[0] = (
            b"IHDR",
            _set_field(chunks[0][1], rng.choice(((0, 4), (4, 4), (8, 1), (9, 1), (10, 1), (12, 1))), rng),
        )
    elif choice == 5 and kind in (b"IDAT", b"iCCP", b"zTXt"):
        head = content.find(b"\0") + 2 if kind != b"IDAT" else 0
        try:
            plain = zlib.decompress(content[head:])
        except zlib.error:
            return None
        chunks[at] = (kind, content[:head] + zlib.compress(rng.choice(_BLIND)(plain, rng), 1))
    else:
        chunks[at] = (kind, rng.choice(_BLIND)(content, rng))
    if rng.random() < 0.2:
        rng.shuffle(chunks)
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _set_field(content: bytes, field: tuple[int, int], rng: random.Random) -> bytes:
    start, size = field
    number = rng.choice(_INTEGERS) & ((1 << 8 * size) - 1)
    return content[:start] + number.to_bytes(size, "big") + content[start + size :]


def jpeg(data: bytes, rng: random.Random) -> bytes | None:
    """Changes a marker segment: its kind, length, or content, EXIF data included."""
    segments, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        segments.append((place, length))
        place += 2 + length
    if not segments:
        return None
    start, length = rng.choice(segments)
    segment, rest = data[start : start + 2 + length], data[start + 2 + length :]
    choice = rng.randrange(6)
    if choice == 0:
        return data[:start] + rest
    if choice == 1:
        return data[:start] + segment * rng.choice((2, 3, 100)) + rest
    if choice == 2:
        marker = rng.choice(_JPEG_MARKERS)
        return data[: start + 1] + bytes([marker]) + data[start + 2 :]
    if choice == 3:
        size = rng.choice((0, 1, 2, 3, length - 1, length + 1, 0xFFFF)) & 0xFFFF
        return data[: start + 2] + size.to_bytes(2, "big") + data[start + 4 :]
    content = rng.choice(_BLIND)(segment[4:], rng)[:65533]
    return data[: start + 2] + (len(content) + 2).to_bytes(2, "big") + content + rest


def tiff(data: bytes, rng: random.Random) -> bytes | None:
    """Changes an entry of a directory: tag, type, count or value; or the directories' order."""
    if len(data) < 8:
        return None
    order = "<" if data[:2] == b"II" else ">"
    entries, links = [], [4]
    (place,) = struct.unpack_from(f"{order}I", data, 4)
    for _ in range(20):
        if not 8 <= place <= len(data) - 2:
            break
        (count,) = struct.unpack_from(f"{order}H", data, place)
        entries += [place + 2 + 12 * i for i in range(min(count, 200)) if place + 14 + 12 * i <= len(data)]
        link = place + 2 + 12 * count
        if link + 4 > len(data):
            break
        links.append(link)
        (place,) = struct.unpack_from(f"{order}I", data, link)
    if not entries:
        return None
    entry, choice = rng.choice(entries), rng.randrange(10)
    if choice == 0:  # directories that go on for ever
        link, target = rng.choice(links), rng.choice((*_INTEGERS, *(e - 2 for e in entries)))
        return data[:link] + struct.pack(f"{order}I", target & 0xFFFFFFFF) + data[link + 4 :]
    if choice == 1:
        tag = rng.choice(_TIFF_TAGS)
        return data[:entry] + struct.pack(f"{order}H", tag) + data[entry + 2 :]
    if choice == 2:
        return data[: entry + 2] + struct.pack(f"{order}H", rng.randrange(20)) + data[entry + 4 :]
    if choice == 3:
        return data[: entry + 4] + struct.pack(f"{order}I", rng.choice(_INTEGERS)) + data[entry + 8 :]
    (kind,) = struct.unpack_from(f"{order}H", data, entry + 2)
    value = rng.choice((*_INTEGERS, *range(9), len(data), 32773, 32946, 34712, 50000, 50002))
    if kind == 3:
        return data[: entry + 8] + struct.pack(f"{order}H", value & 0xFFFF) + data[entry + 10 :]
    return data[: entry + 8] + struct.pack(f"{order}I", value & 0xFFFFFFFF) + data[entry + 12 :]


def riff(data: bytes, rng: random.Random) -> bytes | None:
    """Changes a chunk of a WebP file; the length of the whole stays right."""
    chunks, place = [], 12
    while place + 8 <= len(data):
        length = int.from_bytes(data[place + 4 : place + 8], "little")
        chunks.append((data[place : place + 4], data[place + 8 : place + 8 + length]))
        place += 8 + length + length % 2
    if not chunks:
        return None
    at, choice = rng.randrange(len(chunks)), rng.randrange(5)
    kind, content = chunks[at]
    if choice == 0:
        chunks[at] = (
            rng.choice((b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"EXIF", b"XMP ")),
            content,
        )
    elif choice == 1:
        chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
    else:
        chunks[at] = (kind, rng.choice(_BLIND)(content, rng))
    body = b"".join(
        kind + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) % 2)
        for kind, content in chunks
    )
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body
