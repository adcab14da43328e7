"""Streaming access to lists of records in JSON arrays and JSON lines.

Instruction lists have gigabytes. One pass over the file yields the position of each record; a record is read
again when it is needed. Memory holds one chunk of the file, not the list.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

MAX_RECORD_BYTES = 64 << 20
_CHUNK = 8 << 20
_OPEN_FILES = 4
_SPACE = re.compile(r"[ \t\r\n]*")
_AFTER = tuple(" \t\r\n,]")  # an element ends only before these; a number may continue otherwise
# Text through the next quote or bracket, and through the closing quote of a string.
_OUTSIDE = re.compile(r'[^"{}\[\]]*+(["{}\[\]]?)')
_QUOTED = re.compile(r'(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
_KINDS = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
_DECODER = json.JSONDecoder()
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks


@dataclasses.dataclass(frozen=True)
class Place:
    """Position of a record.

    Attributes:
      row: its number from 1.
      start, length: in bytes.
    """

    row: int
    start: int
    length: int


class NotRecord(Exception):
    """A record is not a JSON object; the message says what it is."""


def walk(path: paths.PathLike) -> Iterator[tuple[Place, bytes]]:
    """Yields position and bytes of every record, valid or not.

    Args:
      path: a JSON file with a list, or JSON lines; UTF-8, with or without a byte order mark.

    Raises:
      UserError: it is neither, ends early, or lacks a comma between records; names the byte and the record.
    """
    path = paths.as_path(path)
    _opened.cache_clear()  # the file may have been replaced
    try:
        with path.open("rb") as file:
            head = file.read(_CHUNK)
            if head[:2] in _UTF16:
                raise UserError(f"{path}: is UTF-16 text; save it as UTF-8")
            if head[:2] == b"\x1f\x8b":
                raise UserError(f"{path}: is compressed with gzip; decompress it")
            start = 3 if head.startswith(b"\xef\xbb\xbf") else 0
            first = head[start:].lstrip()[:1]
            if not first:
                raise UserError(f"{path}: is empty; export or download it again")
            file.seek(start)
            if first == b"[":
                yield from _array(file, path, start)
                return
            if first != b"{" or (path.suffix.lower() == ".json" and not _is_object(file)):
                raise UserError(f"{path}: holds neither a JSON list nor JSON lines; give a list of records")
            file.seek(start)
            yield from lines(file, start)
    except OSError as error:
        paths.check_passing(path, error)
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object of a record.

    Raises:
      NotRecord: it is not a JSON object.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise NotRecord(f"is larger than {MAX_RECORD_BYTES} bytes")
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise NotRecord("is not UTF-8 text") from None
    except (ValueError, RecursionError):
        raise NotRecord("is not JSON") from None
    if not isinstance(value, dict):
        raise NotRecord(f"is {_KINDS.get(type(value), 'a number')}, not an object")
    return value


def read(path: str, place: Place) -> bytes:
    """The bytes of a record, at most one more than `MAX_RECORD_BYTES`."""
    file = _opened(path)
    file.seek(place.start)
    return file.read(min(place.length, MAX_RECORD_BYTES + 1))


def digest(data: bytes) -> int:
    """64-bit hash for comparisons of records and names."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(path: str) -> IO[bytes]:
    return paths.as_path(path).open("rb")


def _is_object(file: IO[bytes]) -> bool:
    """Whether the first line is a complete object, as in JSON lines."""
    try:
        return isinstance(json.loads(file.readline(MAX_RECORD_BYTES)), dict)
    except (ValueError, RecursionError):
        return False


def lines(file: IO[bytes], start: int = 0) -> Iterator[tuple[Place, bytes]]:
    """Yields position and bytes of non-blank lines; only the first `MAX_RECORD_BYTES` + 1 of a longer line.

    `file` is at byte `start`.
    """
    row = 1
    while line := file.readline(MAX_RECORD_BYTES + 1):
        length = len(line)
        while not line.endswith(b"\n") and (more := file.readline(_CHUNK)):
            length += len(more)
            if more.endswith(b"\n"):
                break
        if line.strip():
            yield Place(row, start, length), line
            row += 1
        start += length


class _Window:
    """A chunk of a file as Latin-1 text, so that character positions are byte positions.

    JSON syntax is ASCII, and ASCII bytes are never part of another character in UTF-8.
    """

    def __init__(self, file: IO[bytes], start: int) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self._file = file
        self._start = start

    @property
    def byte(self) -> int:
        return self._start + self.at

    def more(self) -> None:
        """Drops the consumed text and reads a chunk."""
        chunk = self._file.read(_CHUNK)
        self.ended = not chunk
        self._start += self.at
        self.text = self.text[self.at :] + chunk.decode("latin-1")
        self.at = 0

    def peek(self) -> str:
        """Skips white space; returns the next character, "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def element(self) -> str | None:
        """Consumes the next element; None if it is invalid or may continue in the next chunk."""
        try:
            _, end = _DECODER.raw_decode(self.text, self.at)
        except (ValueError, RecursionError):
            return None
        if self.text[end : end + 1] not in _AFTER:
            return None
        text, self.at = self.text[self.at : end], end
        return text


def _array(file: IO[bytes], path: paths.PathLike, start: int) -> Iterator[tuple[Place, bytes]]:
    window = _Window(file, start)
    window.peek()
    window.at += 1
    row, following = 0, window.peek()
    if following == "]":
        window.at += 1
    while following != "]":
        row += 1
        window.peek()
        begin = window.byte
        text = _element(window, path, row)
        yield Place(row, begin, window.byte - begin), text.encode("latin-1")
        following = window.peek()
        if following not in (",", "]"):
            problem = "lacks a comma" if following else "ends early"
            where = f"after record {row}, at byte {window.byte}"
            raise UserError(f"{path}: {problem} {where}; export or download it again")
        window.at += 1
    if window.peek():
        raise UserError(
            f"{path}: continues after the end of its list, at byte {window.byte}; export or download it again"
        )


def _element(window: _Window, path: paths.PathLike, row: int) -> str:
    """Consumes the next element and returns its text, or only the start of a too large one."""
    while (text := window.element()) is None:
        if window.peek() in ("{", "["):
            return _bracketed(window, path, row)
        if window.ended or len(window.text) - window.at > MAX_RECORD_BYTES:
            raise UserError(
                f"{path}: is not JSON at record {row}, byte {window.byte}; export or download it again"
            )
        window.more()
    return text


def _bracketed(window: _Window, path: paths.PathLike, row: int) -> str:
    """The same for an object or a list that is incomplete in this chunk or invalid: brackets mark its end."""
    kept: list[str] = []
    size = depth = 0
    quoted = False
    while True:
        match = (_QUOTED if quoted else _OUTSIDE).match(window.text, window.at)
        assert match is not None  # both patterns match the empty string
        if size <= MAX_RECORD_BYTES:
            kept.append(match[0])
        size += len(match[0])
        window.at = match.end()
        if match[1] == '"':
            quoted = not quoted
        elif match[1]:
            depth += 1 if match[1] in "{[" else -1
            if depth == 0:
                return "".join(kept)
        elif window.ended:
            raise UserError(f"{path}: ends within record {row}; export or download it again")
        else:
            window.more()
