"""DICOM lookup tables: Modality LUTs, VOI LUTs and colour palettes."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, cast

import numpy as np
import pydicom

from vilam3_jax.data.dicom.headers import numbers

_MAX_ENTRIES = 1 << 16


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A lookup table; inputs outside its range map to the first or last entry."""

    first: int  # input value of the first entry
    entries: np.ndarray  # [N] int64
    bits: int  # bits per entry

    @property
    def largest(self) -> int:
        """The largest possible entry."""
        return (1 << self.bits) - 1

    def look_up(self, values: np.ndarray) -> np.ndarray:
        """Entries for `values`, in the same shape; non-integer values are rounded."""
        if values.dtype.kind == "f":
            values = np.rint(values)
        indices = np.clip(values, self.first, self.first + len(self.entries) - 1) - self.first
        return self.entries[indices.astype(np.int64)]

    def with_bits(self, bits: int, name: str, notes: list[str]) -> Table:
        """Corrects the stated number of bits, with a note that calls the table `name`."""
        notes.append(f"{name} states {self.bits} bits but has {bits}-bit entries; {bits} bits are used")
        return dataclasses.replace(self, bits=bits)


def read_table(
    item: pydicom.Dataset, inputs: tuple[float, float], dataset: pydicom.Dataset, notes: list[str]
) -> Table:
    """Reads an item of a Modality or VOI LUT Sequence (PS3.3 C.11.1.1 and C.11.2.1.1).

    Args:
      item: LUT Descriptor and LUT Data; raises `ValueError` if they are missing, contradictory or invalid.
      inputs: smallest and largest possible input. They determine whether a first input above 32767 is a
        negative value.
      dataset: the data set that contains the item and defines its byte order.
      notes: receives corrections.
    """
    return _table(item, "LUTData", _descriptor(item, "LUTDescriptor", inputs), dataset, notes)


def apply_palette(dataset: pydicom.Dataset, indices: np.ndarray, notes: list[str]) -> np.ndarray:
    """Applies the Palette Color Lookup Tables (PS3.3 C.7.6.3.1.5 and C.7.9).

    Maps `indices`, [H, W] stored values, to [H, W, 3] uint8 RGB; `notes` receives corrections. Raises
    `ValueError` if a table is missing or damaged.
    """
    inputs = (float(np.iinfo(indices.dtype).min), float(np.iinfo(indices.dtype).max))
    tables = []
    for colour in ("Red", "Green", "Blue"):
        descriptor = _descriptor(dataset, f"{colour}PaletteColorLookupTableDescriptor", inputs)
        keyword = f"{colour}PaletteColorLookupTableData"
        if keyword in dataset:
            tables.append(_table(dataset, keyword, descriptor, dataset, notes))
        else:
            tables.append(_segmented(dataset, f"Segmented{keyword}", descriptor, dataset))
    largest = max(table.entries.max() for table in tables)
    if all(table.bits == 16 for table in tables) and 0 < largest <= 255:
        tables = [table.with_bits(8, "the palette", notes) for table in tables]
    planes = [table.look_up(indices) >> max(table.bits - 8, 0) for table in tables]
    return np.stack(planes, axis=-1).astype(np.uint8)


_Descriptor = tuple[int, int, int]  # number of entries, first input, bits per entry


def _descriptor(item: pydicom.Dataset, keyword: str, inputs: tuple[float, float]) -> _Descriptor:
    values = numbers(item, keyword)
    if len(values) != 3 or None in values:
        raise ValueError(f"{keyword} is not three numbers")
    count, first, bits = (int(cast(float, value)) for value in values)
    count = count % _MAX_ENTRIES or _MAX_ENTRIES  # 0 means 65536; counts may have been read as signed
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
        packed = entries.astype("<u2").view(np.uint8)  # two 8-bit entries per word, low byte first
        if bits > 8 or len(packed) < count:
            raise ValueError(f"{keyword} has {len(entries)} entries, its descriptor states {count}")
        entries = packed
    table = Table(first, entries[:count].astype(np.int64), bits)
    needed = int(table.entries.max()).bit_length()
    return table.with_bits(needed, "a lookup table", notes) if needed > bits else table


def _words(item: pydicom.Dataset, keyword: str, dataset: pydicom.Dataset) -> np.ndarray:
    """The 16-bit words of an element with VR US, SS or OW."""
    if keyword not in item:
        raise ValueError(f"{keyword} is missing")
    value = cast(Any, item[keyword].value)
    if isinstance(value, bytes):
        little = dataset.original_encoding[1]
        if little is None:  # created in memory
            meta = getattr(dataset, "file_meta", None)
            syntax = meta.get("TransferSyntaxUID") if meta is not None else None
            little = sys.byteorder == "little" if syntax is None else syntax.is_little_endian
        odd = b"\0" * (len(value) % 2)
        return np.frombuffer(value + odd, "<u2" if little else ">u2").astype(np.uint16)
    if value is None:
        raise ValueError(f"{keyword} is empty")
    return (np.atleast_1d(np.asarray(value, np.int64)) & 0xFFFF).astype(np.uint16)


def _segmented(
    item: pydicom.Dataset, keyword: str, descriptor: _Descriptor, dataset: pydicom.Dataset
) -> Table:
    """Expands a segmented palette (PS3.3 C.7.9.2) of discrete and linear segments."""
    count, first, bits = descriptor
    words = _words(item, keyword, dataset).astype(np.int64)
    if bits <= 8:
        words = words.astype("<u2").view(np.uint8).astype(np.int64)
    parts: list[np.ndarray] = []
    expanded, last, position = 0, None, 0
    while position + 1 < len(words) and expanded < count:
        kind, length = int(words[position]), int(words[position + 1])
        position += 2
        if kind == 0:
            part = words[position : position + length]
            position += length
        elif kind == 1 and last is not None and position < len(words):
            part = np.rint(np.linspace(last, words[position], length + 1)[1:]).astype(np.int64)
            position += 1
        else:
            raise ValueError(f"{keyword} has a segment of an unsupported type")
        if len(part):
            last = int(part[-1])
        parts.append(part)
        expanded += len(part)
    if expanded < count:
        raise ValueError(f"{keyword} has {expanded} entries, its descriptor states {count}")
    return Table(first, np.concatenate(parts)[:count], bits)
