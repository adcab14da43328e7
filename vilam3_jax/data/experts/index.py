"""The index of an annotation store: maps keys to the records of shards.

The index of a single shard and the merged index of a store share one file format:

    8 bytes  magic
    8 bytes  length of the header, little endian
    header   msgpack: versions, shard names, calls, input keys that are not SHA-256, number of rows
    rows     `ROW` each, sorted by input; starts at a multiple of 64 bytes
    4 bytes  CRC-32 of everything before, little endian

A row is 60 bytes. A large index on a local disk is memory-mapped, so the processes of a host share its pages.

Merging is a union that keeps the best row of each key: a success beats a failure, then the later one wins.
The order and grouping of the files do not matter, so overlapping files, as they occur during a compaction,
cannot change the result.
"""

from __future__ import annotations

import bisect
import collections
import hashlib
import mmap
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import msgpack
import numpy as np

from vilam3_jax.data.content_keys import DECODER_VERSION
from vilam3_jax.data.experts.record import SCHEMA_VERSION, Key
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

MAX_INDEX_BYTES = 16 << 30
_MAGIC = b"VL3INDEX"
_ALIGN = 64
_SHA256 = re.compile("[0-9a-f]{64}")
_SHARD_NAME = re.compile(r"annotations-[0-9A-Za-z-]+\.array_record")

ROW = np.dtype(
    [
        ("input", ">u8", (4,)),  # `_input_bytes` as integers that sort like the bytes
        ("stamp", "<u8"),  # commit time of the record, nanoseconds since 1970
        ("content", "<u8"),  # first 8 bytes of the SHA-256 of the record's content
        ("call", "<u4"),  # position in the table of calls
        ("shard", "<u4"),  # position in the table of shards
        ("record", "<u4"),  # position of the record in its shard
    ]
)
_INPUT_BYTES = 32
# Among the rows of one key and of equal success, the largest wins: by time, then by any fixed order.
_RANKS = ("stamp", "content", "shard", "record")
_MIN_MAPPED_BYTES = 1 << 20


class Outcome(NamedTuple):
    """A call and how it ended. A store holds few distinct ones."""

    expert: str
    args: str
    version: str
    status: str

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class Shard(NamedTuple):
    """A file of records: name, number of records, size in bytes."""

    name: str
    records: int
    size: int


class Location(NamedTuple):
    """Shard and position of a record, with its outcome and commit time."""

    shard: str
    record: int
    outcome: Outcome
    stamp: int


class Entry(NamedTuple):
    """A record as its writer indexes it."""

    key: Key
    version: str  # of the expert
    status: str  # 'ok' or 'failed'
    content: bytes  # SHA-256 of the record without its duration
    stamp: int  # commit time, nanoseconds since 1970


def _input_bytes(input_key: str) -> bytes:
    """32 bytes for an input key: the key itself if it is a SHA-256, else the SHA-256 of its text."""
    if _SHA256.fullmatch(input_key):
        return bytes.fromhex(input_key)
    return hashlib.sha256(b"text:" + input_key.encode()).digest()


class Index:
    """Rows in sorted layers, with shared tables of calls and shards.

    Layers avoid copying a mapped file of millions of rows when a few rows are added.
    """

    def __init__(self) -> None:
        self.calls: list[Outcome] = []
        self.shards: list[Shard] = []
        self._texts: dict[bytes, str] = {}  # input keys that are not SHA-256
        self._layers: list[np.ndarray] = []
        self._call_codes: dict[Outcome, int] = {}
        self._shard_codes: dict[str, int] = {}
        self._merged: np.ndarray | None = None

    def add_file(self, data: bytes | mmap.mmap) -> None:
        """Adds the rows of an index file; a memory mapping stays referenced.

        Raises `ValueError`, `KeyError`, `TypeError` or `UnpackException` for a damaged file, and `UserError`
        without its name for one of other versions.
        """
        header, rows = _parse(data)
        calls = [self._call_code(Outcome(*map(str, fields))) for fields in header["calls"]]
        shards = [self._shard_code(Shard(str(n), int(r), int(s))) for n, r, s in header["shards"]]
        self._texts |= {_input_bytes(text): text for text in header["texts"]}
        # The codes of the first file are already those of the tables, so it stays mapped.
        if calls != list(range(len(calls))) or shards != list(range(len(shards))):
            rows = rows.copy()
            rows["call"] = np.asarray(calls, "<u4")[rows["call"]]
            rows["shard"] = np.asarray(shards, "<u4")[rows["shard"]]
        self._add_layer(rows)

    def add_shard(self, shard: Shard, entries: Sequence[Entry]) -> None:
        """Adds the records of a shard, in the order in which they were written."""
        code = self._shard_code(shard)
        rows = np.zeros(len(entries), ROW)
        for number, entry in enumerate(entries):
            input_key, expert, args = entry.key
            digest = _input_bytes(input_key)
            if not _SHA256.fullmatch(input_key):
                self._texts[digest] = input_key
            call = self._call_code(Outcome(expert, args, entry.version, entry.status))
            content = int.from_bytes(entry.content[:8], "little")
            rows[number] = (np.frombuffer(digest, ">u8"), entry.stamp, content, call, code, number)
        self._add_layer(self._best(rows))

    def relocated(self, rows: np.ndarray, shards: Sequence[Shard]) -> Index:
        """Returns an index of `rows`, whose shard codes from `len(self.shards)` on refer to new `shards`."""
        new = Index()
        new._texts = self._texts
        for call in self.calls:
            new._call_code(call)
        for shard in (*self.shards, *shards):
            new._shard_code(shard)
        new._add_layer(new._best(rows))
        return new

    def used_shards(self) -> set[str]:
        """Names of the shards that hold the best record of some key."""
        return {self.shards[code].name for code in np.unique(self.rows()["shard"])}

    def merge_layers(self) -> None:
        """Merges all layers, except that a first layer larger than the others together is not copied."""
        start = 1 if self._layers and 2 * len(self._layers[0]) > sum(map(len, self._layers)) else 0
        if len(self._layers) > start + 1:
            self._layers[start:] = [self._best(concatenate(self._layers[start:]))]

    def merge_similar_layers(self) -> None:
        """Merges layers of similar size, which keeps them few and copies each row a few times at most."""
        layers = self._layers
        while len(layers) > 1 and len(layers[-2]) < 2 * len(layers[-1]):
            layers[-2:] = [self._best(concatenate(layers[-2:]))]

    def _add_layer(self, rows: np.ndarray) -> None:
        self._merged = None
        if len(rows):
            self._layers.append(rows)

    def _call_code(self, call: Outcome) -> int:
        code = self._call_codes.setdefault(call, len(self.calls))
        if code == len(self.calls):
            self.calls.append(call)
        return code

    def _shard_code(self, shard: Shard) -> int:
        code = self._shard_codes.setdefault(shard.name, len(self.shards))
        if code == len(self.shards):
            self.shards.append(shard)
        return code

    def _best(self, rows: np.ndarray) -> np.ndarray:
        """The best row of each key, sorted by input, then by expert and arguments."""
        first = rows["input"][:, 0].astype(np.uint64)
        order = np.argsort(first)
        first, rows = first[order], rows[order]
        same = first[1:] == first[:-1]
        # Few rows share their first 8 bytes: those of an input with several experts or answers.
        close = np.zeros(len(rows), bool)
        close[1:] |= same
        close[:-1] |= same
        if not close.any():
            return rows
        keep = ~close
        keep[close] = self._sort_all(rows, close)
        return rows[keep]

    def _sort_all(self, rows: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """Sorts the `chosen` rows in place; returns a mask of those that are the best of their key."""
        part = rows[chosen]
        pairs = {pair: number for number, pair in enumerate(sorted({call[:2] for call in self.calls}))}
        pair = np.array([pairs[call[:2]] for call in self.calls])[part["call"]]
        # Distinct for distinct pairs; within a pair, successes are larger.
        call = 2 * pair + np.array([call.ok for call in self.calls])[part["call"]]
        words = np.ascontiguousarray(part["input"].T, np.uint64)
        same = words[0, 1:] == words[0, :-1]
        if not (words[1:, 1:] != words[1:, :-1])[:, same].any():
            words = words[:1]  # the usual case with hashes: equal in 8 bytes means the same input
        order = np.lexsort((*(part[name] for name in reversed(_RANKS)), call, *words[::-1]))
        rows[chosen] = part = part[order]
        pair = pair[order]
        best = np.ones(len(part), bool)
        best[:-1] = (part["input"][1:] != part["input"][:-1]).any(axis=1) | (pair[1:] != pair[:-1])
        return best

    def find(self, key: Key) -> Location | None:
        """Returns the location of a key's record, or None."""
        input_key, expert, args = key
        digest = _input_bytes(input_key)
        best: tuple[Any, ...] | None = None
        for rows in self._layers:
            for row in _rows_of(rows, digest):
                call = self.calls[row["call"]]
                if (call.expert, call.args) == (expert, args):
                    rank = (call.ok, *(int(row[name]) for name in _RANKS), call)
                    best = rank if best is None else max(best, rank)
        if best is None:
            return None
        _, stamp, _, shard, record, call = best
        return Location(self.shards[shard].name, record, call, stamp)

    def rows(self) -> np.ndarray:
        """The best row of each key, `ROW`, sorted by input, expert and arguments."""
        if self._merged is None:
            one = len(self._layers) == 1
            self._merged = self._layers[0] if one else self._best(concatenate(self._layers))
        return self._merged

    def __len__(self) -> int:
        return len(self.rows())

    def keys(self) -> Iterator[Key]:
        """Yields every key, in the order of `rows`."""
        rows = self.rows()
        digests = np.ascontiguousarray(rows["input"]).tobytes()
        for number, code in enumerate(rows["call"].tolist()):
            digest = digests[number * _INPUT_BYTES : (number + 1) * _INPUT_BYTES]
            call = self.calls[code]
            yield self._texts.get(digest) or digest.hex(), call.expert, call.args

    def latest_stamp(self) -> int:
        """The largest stamp, 0 without rows."""
        return max((int(rows["stamp"].max()) for rows in self._layers), default=0)

    def counts(self) -> collections.Counter[Outcome]:
        """Number of keys per call and outcome."""
        codes, numbers = np.unique(self.rows()["call"], return_counts=True)
        return collections.Counter({self.calls[c]: int(n) for c, n in zip(codes, numbers, strict=True)})

    def digest(self, expert: str | None = None) -> str:
        """SHA-256 (hex) over the keys and the content of their records, of one expert if given.

        Stores with the same answers have the same digest, regardless of runs, shards and timing.
        """
        chosen = [call for call in self.calls if expert is None or call.expert == expert]
        codes = np.array([self._call_codes[call] for call in chosen], np.uint32)
        rows = self.rows()
        rows = rows[np.isin(rows["call"], codes)]
        used = sorted({self.calls[code] for code in np.unique(rows["call"])})
        ranks = np.zeros(len(self.calls) + 1, "<u4")
        for rank, call in enumerate(used):
            ranks[self._call_codes[call]] = rank
        digest = hashlib.sha256(cast(bytes, msgpack.packb([list(call) for call in used])))
        for part in (rows["input"], rows["content"], ranks[rows["call"]]):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """The content of this index's file. Its tables hold only what rows refer to."""
        rows = self.rows().copy()
        calls, rows["call"] = np.unique(rows["call"], return_inverse=True)
        shards, rows["shard"] = np.unique(rows["shard"], return_inverse=True)
        texts: list[str] = []
        if self._texts:
            known = {row.tobytes() for row in rows["input"]}
            texts = sorted(text for digest, text in self._texts.items() if digest in known)
        header: Any = msgpack.packb(
            {
                "schema_version": SCHEMA_VERSION,
                "decoder_version": DECODER_VERSION,
                "rows": len(rows),
                "shards": [list(self.shards[code]) for code in shards],
                "calls": [list(self.calls[code]) for code in calls],
                "texts": texts,
            }
        )
        data = _MAGIC + len(header).to_bytes(8, "little") + header
        data += b"\0" * (-len(data) % _ALIGN) + rows.tobytes()
        return data + zlib.crc32(data).to_bytes(4, "little")


def concatenate(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenates rows. `np.concatenate` alone would convert them to native byte order."""
    return np.concatenate([np.zeros(0, ROW), *parts], dtype=ROW)


def _rows_of(rows: np.ndarray, digest: bytes) -> Iterator[np.void]:
    """The rows of one input."""
    view, size = rows.view(np.uint8).data, ROW.itemsize

    def at(position: int) -> bytes:
        return bytes(view[position * size : position * size + _INPUT_BYTES])

    position = bisect.bisect_left(range(len(rows)), digest, key=at)
    while position < len(rows) and at(position) == digest:
        yield rows[position]
        position += 1


def _parse(data: bytes | mmap.mmap) -> tuple[dict[str, Any], np.ndarray]:
    view = memoryview(data)
    start = len(_MAGIC) + 8
    if bytes(view[: len(_MAGIC)]) != _MAGIC or len(view) < start + 4:
        raise ValueError("not an annotation index")
    if zlib.crc32(view[:-4]) != int.from_bytes(view[-4:], "little"):
        raise ValueError("checksum mismatch")
    end = start + int.from_bytes(view[len(_MAGIC) : start], "little")
    header = msgpack.unpackb(view[start:end], raw=False)
    if header["schema_version"] != SCHEMA_VERSION:
        raise wrong_schema(header["schema_version"])
    if header["decoder_version"] != DECODER_VERSION:
        raise UserError(
            f"content keys of decoder version {header['decoder_version']}, this version computes keys of "
            f"version {DECODER_VERSION}; annotate into a new folder"
        )
    rows = np.frombuffer(view[end + -end % _ALIGN : -4], ROW)
    if len(rows) != header["rows"]:
        raise ValueError(f"{len(rows)} rows, expected {header['rows']}")
    for name, _, _ in header["shards"]:
        if not _SHARD_NAME.fullmatch(name):
            raise ValueError(f"shard name {name!r}")
    for table, column in (("calls", "call"), ("shards", "shard")):
        if len(rows) and int(rows[column].max()) >= len(header[table]):
            raise ValueError(f"a row refers to an entry beyond the table of {table}")
    return header, rows


def wrong_schema(found: object) -> UserError:
    """The error for a store of another schema; the message lacks the file name."""
    return UserError(f"schema {found}, this version reads {SCHEMA_VERSION}; annotate into a new folder")


def open_file(path: str) -> bytes | mmap.mmap:
    """Returns the content of an index file, memory-mapped if it is large and local.

    Raises `FileNotFoundError`, or `UserError` or `UnavailableError` if it cannot be read.
    """
    if "://" in path:
        try:
            return paths.read_bytes(path, MAX_INDEX_BYTES)
        except UserError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise error.__cause__ from None
            raise
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < _MIN_MAPPED_BYTES:
                return file.read()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise
    except OSError as error:
        paths.check_passing(path, error)
        raise UserError(f"{path}: cannot be read ({error}); check the path") from error


def read_index(files: Iterable[tuple[str, bytes | mmap.mmap]]) -> Index:
    """Merges index files, given as (path, content); the first one stays mapped, so put the largest first.

    Raises `UserError` for a file that is damaged or of another version.
    """
    index = Index()
    for path, data in files:
        try:
            index.add_file(data)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            raise UserError(f"{path}: damaged index ({error}); delete it and annotate again") from error
    index.merge_layers()
    return index
