"""Blind mutations of bytes, and the extreme values that all mutations use."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

INTEGERS = (
    *(0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 255, 256, 32767, 32768, 65535, 65536, 1 << 24, (1 << 31) - 1),
)
TEXT_NUMBERS = (
    *("0", "1", "-1", "-0", "2", "3", "16", "17", "255", "65535", "65536", "2147483647", "-2147483648"),
    *("4294967295", "9" * 20, "9" * 5000, "nan", "inf", "-inf", "1e400", "1e-400", "1e30", "1e38", "1e39"),
    *("0.1", "1,5", "0x10", "1_000", "½", "+", "-", ".", "e", "", " ", "1 2 3 4 5 6 7 8 9"),
)
FLOATS = (
    *(0.0, -0.0, 1.0, -1.0, 1e-320, 1e-30, 1e30, 3.4e38, 1e300, float("nan"), float("inf"), float("-inf")),
)


def _place(data: bytes, rng: random.Random) -> int:
    """A position, half of the time in the header."""
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
    """Overwrites 2, 4 or 8 bytes with an extreme length or count."""
    size = rng.choice((2, 4, 4, 8))
    at = _place(data, rng) & ~(rng.choice((1, 2, 4)) - 1)
    value = rng.choice((*INTEGERS, len(data), len(data) - at, len(data) + 1, rng.getrandbits(32)))
    value = -value if rng.random() < 0.3 else value
    written = (value & ((1 << 8 * size) - 1)).to_bytes(size, rng.choice(("little", "big")))
    return data[:at] + written + data[at + size :]


def set_float(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng) & ~3
    written = struct.pack(rng.choice("<>") + "f", as_float32(rng.choice(FLOATS)))
    return data[:at] + written + data[at + 4 :]


def clear(data: bytes, rng: random.Random) -> bytes:
    at, count = _place(data, rng), rng.choice((4, 16, 200))
    return data[:at] + rng.choice((b"\0", b"\xff", b" ")) * len(data[at : at + count]) + data[at + count :]


def append(data: bytes, rng: random.Random) -> bytes:
    return data + (
        rng.randbytes(rng.choice((1, 100))) if rng.random() < 0.5 else data[: rng.choice((8, 4000))]
    )


BLIND: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(flip_bits, flip_bits, set_bytes, set_bytes, set_integer, set_integer, set_integer),
    *(truncate, insert, delete, duplicate, swap, set_float, clear, append),
)


def as_float32(value: float) -> float:
    return max(-3.4e38, min(3.4e38, value)) if abs(value) < float("inf") else value


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)] + other[_place(other, rng) :]
