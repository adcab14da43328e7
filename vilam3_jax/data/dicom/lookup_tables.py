"""Lookup tables of DICOM: Modality and VOI LUTs, and colour palettes."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, cast

import numpy as np
import pydicom

from vilam3_jax.data.dicom.headers import numbers

_COLOURS = ("Red", "Green", "Blue")
_MAX_ENTRIES = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A lookup table.

    Attributes:
      first: the input that the first entry belongs to; smaller inputs get that entry too.
      entries: [N] int64; inputs beyond the last get the last.
      bits: of an entry.
    """

    first: int
    entries: np.ndarray
    bits: int

    @property
    def largest(self) -> int:
        """The largest value that an entry can have."""
        return (1 << self.bits) - 1

    def look_up(self, values: np.ndarray) -> np.ndarray:
        """Entries for `values`, of the same shape; values that are not whole are rounded."""
        if values.dtype.kind == "f":
            values = np.rint(values)
        places = np.clip(values, self.first, self.first + len(self.entries) - 1) - self.first
        return self.entries[places.astype(np.int64)]


def read_table(
    item: pydicom.Dataset, inputs: tuple[float, float], dataset: pydicom.Dataset, notes: list[str]
) -> Table:
    """Reads an item of a Modality or VOI LUT Sequence (PS3.3 C.11.1.1 and C.11.2.1.1).

    Args:
      item: LUT Descriptor and LUT Data.
      inputs: smallest and largest value that can come in, by the header; it decides whether a first value
        of more than 32767 was meant as negative.
      dataset: what the item belongs to; its byte order holds for the item.
      notes: gets what was corrected.

    Raises:
      ValueError: descriptor or data are missing, contradict each other, or make no sense.
    """
    descriptor = _descriptor(item, "LUTDescriptor", inputs)
    return _table(item, "LUTData", descriptor, dataset, notes)


def palette(dataset: pydicom.Dataset, indices: np.ndarray, notes: list[str]) -> np.ndarray:
    """Applies the Palette Color Lookup Tables (PS3.3 C.7.6.3.1.5 and C.7.9).

    Args:
      dataset: the image.
      indices: [H, W] stored values.
      notes: gets what was corrected.

    Returns:
      [H, W, 3] uint8 RGB.

    Raises:
      ValueError: a table is missing or damaged.
    """
    inputs = (float(np.iinfo(indices.dtype).min), float(np.iinfo(indices.dtype).max))
    tables = []
    for colour in _COLOURS:
        descriptor = _descriptor(dataset, f"{colour}PaletteColorLookupTableDescriptor", inputs)
        keyword = f"{colour}PaletteColorLookupTableData"
        if keyword in dataset:
            tables.append(_table(dataset, keyword, descriptor, dataset, notes))
        else:
            tables.append(_segmented(dataset, f"Segmented{keyword}", descriptor, dataset))
    if all(table.bits == 16 and table.entries.max() <= 255 for table in tables) and any(
        table.entries.any() for table in tables
    ):
        notes.append("the palette states 16 bits, its entries have 8 and are read so")
        tables = [dataclasses.replace(table, bits=8) for table in tables]
    planes = [table.look_up(indices) >> max(table.bits - 8, 0) for table in tables]
    return np.stack(planes, axis=-1).astype(np.uint8)


_Descriptor = tuple[int, int, int]  # entries, first input, bits


def _descriptor(item: pydicom.Dataset, keyword: str, inputs: tuple[float, float]) -> _Descriptor:
    stated = numbers(item, keyword)
    if len(stated) != 3 or None in stated:
        raise ValueError(f"{keyword} is not three numbers")
    count, first, bits = (int(cast(float, value)) for value in stated)
    count = count % _MAX_ENTRIES or _MAX_ENTRIES  # 16 bits hold no 65536, and may have been read as signed
    if not 1 <= bits <= 16:
        raise ValueError(f"{keyword} states {bits} bits")
    if first > inputs[1] and first - _MAX_ENTRIES >= inputs[0]:
        first -= _MAX_ENTRIES
    elif first < inputs[0] and first + _MAX_ENTRIES <= inputs[1]:
        first += _MAX_ENTRIES
    return count, first, bits


def _table(
    item: pydicom.Dataset, keyword: str, descriptor: _Descriptor, dataset: pydicom.Dataset, notes: list[str]
) -> Table:
    count, first, bits = descriptor
    entries = _words(item, keyword, dataset)
    if len(entries) < count:
        packed = entries.astype("<u2").view(np.uint8)  # two entries of 8 bits in a word, the first one low
        if bits > 8 or len(packed) < count:
            raise ValueError(f"{keyword} has {len(entries)} entries, its descriptor says {count}")
        entries = packed
    entries = entries[:count].astype(np.int64)
    needed = int(entries.max()).bit_length()
    if needed > bits:
        notes.append(f"a lookup table states {bits} bits, its entries have {needed} and are read so")
        bits = needed
    return Table(first, entries, bits)


def _words(item: pydicom.Dataset, keyword: str, dataset: pydicom.Dataset) -> np.ndarray:
    """The 16-bit words of an element that may be US, SS or OW."""
    if keyword not in item:
        raise ValueError(f"{keyword} is missing")
    value = cast(Any, item[keyword].value)
    if isinstance(value, bytes):
        odd = b"\0" * (len(value) % 2)
        return np.frombuffer(value + odd, "<u2" if _is_little_endian(dataset) else ">u2").astype(np.uint16)
    if value is None:
        raise ValueError(f"{keyword} is empty")
    words = np.atleast_1d(np.asarray(value, np.int64))
    return (words & 0xFFFF).astype(np.uint16)


def _is_little_endian(dataset: pydicom.Dataset) -> bool:
    little = dataset.original_encoding[1]
    if little is None:  # made in memory
        meta = getattr(dataset, "file_meta", None)
        syntax = meta.get("TransferSyntaxUID") if meta is not None else None
        return sys.byteorder == "little" if syntax is None else bool(syntax.is_little_endian)
    return little


def _segmented(
    item: pydicom.Dataset, keyword: str, descriptor: _Descriptor, dataset: pydicom.Dataset
) -> Table:
    """Expands a segmented palette (PS3.3 C.7.9.2): runs of entries and straight lines between entries."""
    count, first, bits = descriptor
    words = _words(item, keyword, dataset).astype(np.int64)
    if bits <= 8:
        words = words.astype("<u2").view(np.uint8).astype(np.int64)
    parts: list[np.ndarray] = []
    made, last, place = 0, None, 0
    while place + 1 < len(words) and made < count:
        kind, length = int(words[place]), int(words[place + 1])
        place += 2
        if kind == 0:
            part = words[place : place + length]
            place += length
        elif kind == 1 and last is not None and place < len(words):
            part = np.rint(np.linspace(last, words[place], length + 1)[1:]).astype(np.int64)
            place += 1
        else:
            raise ValueError(f"{keyword} has a segment of a kind that is not read here")
        if len(part):
            last = int(part[-1])
        parts.append(part)
        made += len(part)
    if made < count:
        raise ValueError(f"{keyword} has {made} entries, its descriptor says {count}")
    return Table(first, np.concatenate(parts)[:count], bits)
