"""Mutations of NIfTI, text headers, PNG, JPEG, TIFF and WebP: one field changes, the rest stays valid."""

from __future__ import annotations

import random
import re
import struct
import zlib

import nibabel as nib
from fuzz_blind import BLIND, FLOATS, INTEGERS, TEXT_NUMBERS, as_float32

_WORDS = (
    *("none", "null", "true", "[]", "{}", "LOCAL", "LIST", "raw", "gzip", "/etc/passwd", "../x", "float"),
    *("block", "int64", "MET_USHORT_ARRAY", "%03d.raw 1 9999999 1"),
)


def nifti(data: bytes, rng: random.Random) -> bytes | None:
    """Sets one header field to an extreme value."""
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
        value = rng.choice(FLOATS)
        written = struct.pack(order + ("f" if base.itemsize == 4 else "d"), as_float32(value))
    else:
        number = rng.choice(INTEGERS) * rng.choice((1, 1, -1))
        number &= (1 << 8 * base.itemsize) - 1
        written = number.to_bytes(base.itemsize, "little" if order == "<" else "big")
    return data[:place] + written + data[place + base.itemsize :]


def text_header(data: bytes, rng: random.Random) -> bytes | None:
    """Changes one line, word or number of a text header, as in NRRD, MetaImage and JSON."""
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
        new = rng.choice((*TEXT_NUMBERS, *_WORDS))
        lines[at] = line[: found.start()] + new.encode() + line[found.end() :]
    return b"\n".join(lines) + rest


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
    """Changes, repeats, removes or moves a chunk; checksums stay valid."""
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
        chunks[at] = (kind, content[:head] + zlib.compress(rng.choice(BLIND)(plain, rng), 1))
    else:
        chunks[at] = (kind, rng.choice(BLIND)(content, rng))
    if rng.random() < 0.2:
        rng.shuffle(chunks)
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _set_field(content: bytes, field: tuple[int, int], rng: random.Random) -> bytes:
    start, size = field
    number = rng.choice(INTEGERS) & ((1 << 8 * size) - 1)
    return content[:start] + number.to_bytes(size, "big") + content[start + size :]


def jpeg(data: bytes, rng: random.Random) -> bytes | None:
    """Changes a marker segment: its kind, length, or content (including EXIF data)."""
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
    content = rng.choice(BLIND)(segment[4:], rng)[:65533]
    return data[: start + 2] + (len(content) + 2).to_bytes(2, "big") + content + rest


def tiff(data: bytes, rng: random.Random) -> bytes | None:
    """Changes an entry of a directory: tag, type, count or value; or the order of directories."""
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
    if choice == 0:  # endless directories
        link, target = rng.choice(links), rng.choice((*INTEGERS, *(e - 2 for e in entries)))
        return data[:link] + struct.pack(f"{order}I", target & 0xFFFFFFFF) + data[link + 4 :]
    if choice == 1:
        tag = rng.choice(_TIFF_TAGS)
        return data[:entry] + struct.pack(f"{order}H", tag) + data[entry + 2 :]
    if choice == 2:
        return data[: entry + 2] + struct.pack(f"{order}H", rng.randrange(20)) + data[entry + 4 :]
    if choice == 3:
        return data[: entry + 4] + struct.pack(f"{order}I", rng.choice(INTEGERS)) + data[entry + 8 :]
    (kind,) = struct.unpack_from(f"{order}H", data, entry + 2)
    value = rng.choice((*INTEGERS, *range(9), len(data), 32773, 32946, 34712, 50000, 50002))
    if kind == 3:
        return data[: entry + 8] + struct.pack(f"{order}H", value & 0xFFFF) + data[entry + 10 :]
    return data[: entry + 8] + struct.pack(f"{order}I", value & 0xFFFFFFFF) + data[entry + 12 :]


def riff(data: bytes, rng: random.Random) -> bytes | None:
    """Changes a chunk of a WebP file; the total length stays valid."""
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
        chunks[at] = (kind, rng.choice(BLIND)(content, rng))
    body = b"".join(
        kind + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) % 2)
        for kind, content in chunks
    )
    return b"RIFF" + (len(body) + 4).to_bytes(4, "little") + b"WEBP" + body
