"""Mutations of files for `fuzz_readers.py`: blind and format-aware ones.

A format-aware mutation damages one field and keeps the rest valid (checksums, compression, lengths), so that
the damage reaches the code behind the first check. All choices come from one `random.Random`: the same seed
and number give the same bytes.
"""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Callable, Mapping, Sequence

import fuzz_blind
import fuzz_dicom
import fuzz_formats

_MAX_BYTES = 1 << 20

Mutation = Callable[[bytes, random.Random], bytes | None]


def mutate(files: Mapping[str, bytes], others: Sequence[bytes], rng: random.Random) -> dict[str, bytes]:
    """Damages one file of an input, sometimes two, and sometimes removes one.

    Args:
      files: the input, name → content.
      others: contents of other inputs, for splices.
      rng: source of all choices.

    Returns:
      The damaged input; files are cut to 1 MiB.
    """
    damaged = dict(files)
    for name in rng.sample(sorted(files), min(len(files), 1 + (rng.random() < 0.1))):
        damaged[name] = mutate_bytes(files[name], others, rng)[:_MAX_BYTES]
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
            damaged = fuzz_blind.splice(data, rng.choice(others), rng)
        data = rng.choice(fuzz_blind.BLIND)(data, rng) if damaged is None else damaged
    return data


def _known_format(data: bytes) -> Mutation | None:
    if data[128:132] == b"DICM":
        return fuzz_dicom.dicom
    if data[4:6] == b"\x08\0" or data[:2] == b"\x08\0":
        return fuzz_dicom.dicom
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return fuzz_formats.png
    if data[:2] == b"\xff\xd8":
        return fuzz_formats.jpeg
    if data[:4] in (b"II*\0", b"MM\0*"):
        return fuzz_formats.tiff
    if data[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c", b"\x1c\x02\0\0", b"\0\0\x02\x1c"):
        return fuzz_formats.nifti
    if data[:4] == b"NRRD" or b"NDims" in data[:300] or data[:1] == b"{":
        return fuzz_formats.text_header
    if data[:4] == b"RIFF":
        return fuzz_formats.riff
    return None
