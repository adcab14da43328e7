"""Lists of records in JSON arrays and JSON lines, read piece by piece.

The instruction lists of large models have gigabytes. They are walked through once, which gives where each
record lies; a record is read again when it is needed. Memory holds a piece of the file, not the list.
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
_PIECE = 8 << 20
_OPEN_FILES = 4
_SPACE = re.compile(r"[ \t\r\n]*")
# What may follow an element. Anything else, or nothing yet, and a number may go on in the next piece.
_AFTER = (" ", "\t", "\r", "\n", ",", "]")
# Up to and with the next quote or bracket, and up to and with the quote that closes a string.
_OUTSIDE = re.compile(r'[^"{}\[\]]*+(["{}\[\]]?)')
_QUOTED = re.compile(r'(?:[^"\\]++|\\.)*+("?)', re.DOTALL)
_KINDS = {
    list: "a list",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}
_DECODER = json.JSONDecoder()
_WIDE = (b"\xff\xfe", b"\xfe\xff")  # byte order marks of UTF-16


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a record lies.

    Attributes:
      row: its number from 1.
      start, length: in bytes.
    """

    row: int
    start: int
    length: int


class NotRecord(Exception):
    """What lies at a place is no JSON object; the message says what it is instead."""


def walk(path: paths.PathLike) -> Iterator[tuple[Place, bytes]]:
    """Places and bytes of all records of a file, whether they can be read or not.

    Args:
      path: a JSON file whose content is a list, or JSON lines; UTF-8, with or without a byte order mark.

    Raises:
      UserError: it is neither, ends early, or lacks commas between records, with the byte and the record.
    """
    path = paths.as_path(path)
    _opened.cache_clear()  # the list may be another one by now
    try:
        with path.open("rb") as file:
            head = file.read(_PIECE)
            if head[:2] in _WIDE:
                raise UserError(f"{path}: is UTF-16 text; save it as UTF-8")
            if head[:2] == b"\x1f\x8b":
                raise UserError(f"{path}: is packed with gzip; unpack it")
            skipped = 3 if head.startswith(b"\xef\xbb\xbf") else 0
            first = head[skipped:].lstrip()[:1]
            if not first:
                raise UserError(f"{path}: is empty; export or download it again")
            file.seek(skipped)
            if first == b"[":
                yield from _array(file, path, skipped)
                return
            if first != b"{" or (path.suffix.lower() == ".json" and not _is_object(file)):
                raise UserError(f"{path}: holds neither a JSON list nor JSON lines; give a list of records")
            file.seek(skipped)
            yield from lines(file, skipped)
    except OSError as error:
        paths.check_passing(path, error)
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def parse(data: bytes) -> dict[str, Any]:
    """The object of a record.

    Raises:
      NotRecord: it is no JSON, or none that is an object.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise NotRecord(f"is larger than {MAX_RECORD_BYTES} bytes")
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise NotRecord("is no UTF-8 text") from None
    except (ValueError, RecursionError):
        raise NotRecord("is no JSON") from None
    if not isinstance(value, dict):
        raise NotRecord(f"is {_KINDS[type(value)]}, not an object")
    return value


def read(path: str, place: Place) -> bytes:
    """The bytes of a record, at most one more than `MAX_RECORD_BYTES`."""
    file = _opened(path)
    file.seek(place.start)
    return file.read(min(place.length, MAX_RECORD_BYTES + 1))


def digest(data: bytes) -> int:
    """64 bits of a digest: records and names are compared by it."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@functools.lru_cache(maxsize=_OPEN_FILES)
def _opened(path: str) -> IO[bytes]:
    return paths.as_path(path).open("rb")


def _is_object(file: IO[bytes]) -> bool:
    """Whether the first line is a whole object, as in JSON lines."""
    try:
        return isinstance(json.loads(file.readline(MAX_RECORD_BYTES)), dict)
    except (ValueError, RecursionError):
        return False


def lines(file: IO[bytes], start: int = 0) -> Iterator[tuple[Place, bytes]]:
    """Places and bytes of lines that are not blank; of a too large one, the first `MAX_RECORD_BYTES` + 1.

    Args:
      file: at its byte `start`.
      start: where the file stands.
    """
    row = 1
    while line := file.readline(MAX_RECORD_BYTES + 1):
        length = len(line)
        while not line.endswith(b"\n") and (more := file.readline(_PIECE)):
            length += len(more)
            if more.endswith(b"\n"):
                break
        if line.strip():
            yield Place(row, start, length), line
            row += 1
        start += length


class _Window:
    """A piece of a file as Latin-1 text, so that characters are bytes.

    JSON's own characters are ASCII and never part of another character in UTF-8.
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
        """Drops what has been read, adds a piece."""
        piece = self._file.read(_PIECE)
        self.ended = not piece
        self._start += self.at
        self.text = self.text[self.at :] + piece.decode("latin-1")
        self.at = 0

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()


def _array(file: IO[bytes], path: paths.PathLike, start: int) -> Iterator[tuple[Place, bytes]]:
    window = _Window(file, start)
    window.peek()
    window.at += 1
    row = 1
    if window.peek() == "]":
        window.at += 1
    else:
        while True:
            window.peek()
            begin = window.byte
            text = _element(window, path, row)
            yield Place(row, begin, window.byte - begin), text.encode("latin-1")
            row += 1
            following = window.peek()
            if following not in (",", "]"):
                where = f"after record {row - 1}, at byte {window.byte}"
                problem = "ends early" if not following else "lacks a comma"
                raise UserError(f"{path}: {problem} {where}; export or download it again")
            window.at += 1
            if following == "]":
                break
    if window.peek():
        raise UserError(
            f"{path}: goes on after the end of its list, at byte {window.byte}; export or download it again"
        )


def _element(window: _Window, path: paths.PathLike, row: int) -> str:
    """The text of the next element; `window` is behind it then. Of a too large element, its start."""
    try:
        _, end = _DECODER.raw_decode(window.text, window.at)
        if window.text[end : end + 1] in _AFTER:
            text = window.text[window.at : end]
            window.at = end
            return text
    except (ValueError, RecursionError):
        pass  # incomplete in this piece, or no JSON: brackets say where it ends
    if window.peek() not in ("{", "["):
        return _scalar(window, path, row)
    kept: list[str] = []
    size = depth = 0
    quoted = False
    while True:
        match = (_QUOTED if quoted else _OUTSIDE).match(window.text, window.at)
        assert match is not None  # as both match nothing, too
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


def _scalar(window: _Window, path: paths.PathLike, row: int) -> str:
    """The text of a number, a text, true, false or null."""
    while True:
        try:
            _, end = _DECODER.raw_decode(window.text, window.at)
            if window.text[end : end + 1] in _AFTER:
                text = window.text[window.at : end]
                window.at = end
                return text
        except ValueError:
            pass  # incomplete in this piece, or no JSON
        if window.ended or len(window.text) - window.at > MAX_RECORD_BYTES:
            raise UserError(
                f"{path}: is no JSON at record {row}, byte {window.byte}; export or download it again"
            )
        window.more()
