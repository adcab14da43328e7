"""Reading what users downloaded: JSON, JSON lines, CSV by header name, parquet and lists of files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from vilam3_jax.data.folder_walk import list_files
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_MAX_TABLE_BYTES = 8 << 30
_MAX_FILES = 20_000_000
_MAX_FIELD = 16 << 20  # characters in one CSV field: whole reports are fields
_MOST_TOLD = 2
_WIDE = (b"\xff\xfe", b"\xfe\xff")  # byte order marks of UTF-16
_PACKING = (EOFError, zlib.error, gzip.BadGzipFile)  # what damaged gzip files raise


class SourceFolder:
    """The folder with what the user downloaded.

    Attributes:
      root: the folder, local or an object store.
      notes: what a person should know of the files that were read, one sentence each.
    """

    def __init__(self, root: paths.PathLike, instructions: str = "") -> None:
        """Looks that the folder is there.

        Raises:
          UserError: it is not; the message ends with `instructions`.
        """
        self.root = paths.as_path(root)
        self.notes: list[str] = []
        self._instructions = " ".join(instructions.split())
        if not self.root.is_dir():
            raise UserError(f"{root}: no such folder. {self._instructions}".rstrip())

    def find(self, *names: str) -> str | None:
        """The first of `names`, paths below the root, that is there (a file or a folder), or None."""
        return next((name for name in names if paths.exists(self.root / name)), None)

    def require(self, *alternatives: str | Sequence[str]) -> list[str]:
        """Finds files and folders that must be there.

        Args:
          alternatives: a name, or names of which one must be there.

        Returns:
          The name found for each.

        Raises:
          UserError: lists everything that is missing and says where it comes from.
        """
        found, missing = [], []
        for names in alternatives:
            names = [names] if isinstance(names, str) else list(names)
            name = self.find(*names)
            found.append(name or "")
            if name is None:
                missing.append(" or ".join(_told(names)))
        if missing:
            raise UserError(f"{self.root}: {', '.join(missing)} missing. {self._instructions}".rstrip())
        return found

    def glob(self, pattern: str) -> list[str]:
        """Paths below the root that match, sorted; AppleDouble files (`._name`) are left out."""
        found = (os.fspath(path.relative_to(self.root)) for path in self.root.glob(pattern))
        return sorted(name for name in found if not os.path.basename(name).startswith("._"))

    def files(self, folder: str = ".") -> list[str]:
        """All files of a folder and its subfolders, as paths below the root, sorted."""
        listed = list_files(self.root / folder, _MAX_FILES, lambda: None)
        start = len(os.fspath(self.root).rstrip("/")) + 1
        return sorted(os.fspath(path)[start:] for path in listed.files)

    def json(self, name: str) -> Any:
        """A JSON file.

        Raises:
          UserError: it is no JSON.
        """
        try:
            return json.loads(self._bytes(name))
        except (ValueError, RecursionError, *_PACKING) as error:
            raise UserError(f"{self.root / name}: is no JSON ({_line(error)}); download it again") from error

    def json_list(self, name: str, key: str = "") -> list[Any]:
        """A list in a JSON file, or under `key` of the object in it.

        Raises:
          UserError: there is none.
        """
        content = self.json(name)
        if key:
            content = content.get(key) if isinstance(content, dict) else None
        if not isinstance(content, list):
            where = f" under {key!r}" if key else ""
            raise UserError(f"{self.root / name}: holds no list{where}; download it again")
        return content

    def json_lines(self, name: str) -> Iterator[tuple[int, Any]]:
        """(line number from 1, value) of a JSON lines file; of a line that is no JSON, the `ValueError`.

        Raises:
          UserError: the file is compressed and damaged.
        """
        with self._open(name) as file:
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield number, _parsed(line)
            except _PACKING as error:
                raise UserError(
                    f"{self.root / name}: cannot be read ({_line(error)}); download it again"
                ) from error

    def table(
        self,
        name: str,
        columns: Mapping[str, Sequence[str]],
        *,
        optional: Mapping[str, Sequence[str]] | None = None,
        delimiter: str = ",",
        others: bool = False,
    ) -> Iterator[dict[str, str]]:
        """Rows of a CSV file (also .gz, with or without a byte order mark), columns found by name.

        A row with more cells than the header is read as a row of empty cells, and `notes` tells: a delimiter
        in a text without quotes moves all that follows. Bytes that are no UTF-8 become halves of surrogate
        pairs, so that only the records whose texts hold them are skipped.

        Args:
          name: of the file.
          columns: key of the row → accepted headers, compared without case and surrounding spaces.
          optional: the same for columns that may be absent; they are then absent from the rows.
          delimiter: of fields.
          others: columns of other names are kept under their own name.

        Raises:
          UserError: a column is missing (names all that are, and those there are), one is there twice, or the
            file is no CSV.
        """
        csv.field_size_limit(_MAX_FIELD)
        path = self.root / name
        try:
            reader = csv.reader(self._text(name, errors="surrogateescape"), delimiter=delimiter)
            header = [cell.strip().lstrip("\ufeff") for cell in next(reader, [])]
            "".join(header).encode()  # names of columns must be text
            places = {cell.lower(): place for place, cell in reversed(list(enumerate(header)))}
            known = {**columns, **(optional or {})}
            where = {
                key: next((places[n.lower()] for n in names if n.lower() in places), None)
                for key, names in known.items()
            }
            if lacking := [f"{' or '.join(columns[key])}" for key in columns if where[key] is None]:
                raise UserError(
                    f"{path}: no column {', '.join(lacking)}; it has {', '.join(header) or 'none'}"
                )
            chosen = {key: place for key, place in where.items() if place is not None}
            if doubled := [header[place] for place in chosen.values() if header.count(header[place]) > 1]:
                raise UserError(f"{path}: has two columns {doubled[0]}; remove or rename one of them")
            if others:
                taken = set(chosen.values())
                chosen |= {cell: place for place, cell in enumerate(header) if place not in taken and cell}
            surplus: list[int] = []
            for cells in reader:
                if any(cell.strip() for cell in cells[len(header) :]):
                    surplus.append(reader.line_num)
                    cells = [""]
                if cells:
                    yield {key: cells[place] if place < len(cells) else "" for key, place in chosen.items()}
            if surplus:
                self.notes.append(
                    f"{name} has {len(surplus):,} rows with more cells than its header, the first in line "
                    f"{surplus[0]}, which are not used; put texts that hold {delimiter!r} in quotes"
                )
        except UnicodeError as error:
            raise UserError(f"{path}: its header is no UTF-8 text; save it as UTF-8") from error
        except (csv.Error, *_PACKING) as error:
            raise UserError(f"{path}: cannot be read ({_line(error)}); download it again") from error

    def lines(self, name: str) -> list[str]:
        """The non-empty lines of a text file, stripped.

        Raises:
          UserError: it is no UTF-8 text.
        """
        try:
            return [line.strip() for line in self._text(name) if line.strip()]
        except (UnicodeDecodeError, *_PACKING) as error:
            raise UserError(f"{self.root / name}: is no text ({_line(error)}); download it again") from error

    def _bytes(self, name: str) -> bytes:
        data = paths.read_bytes(self.root / name, _MAX_TABLE_BYTES)
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data

    def _text(self, name: str, errors: str = "strict") -> io.TextIOBase:
        file = self._open(name)
        if file.read(2) in _WIDE:
            raise UserError(f"{self.root / name}: is UTF-16 text; save it as UTF-8")
        file.seek(0)
        return io.TextIOWrapper(file, encoding="utf-8-sig", errors=errors, newline="")

    def _open(self, name: str) -> IO[bytes] | gzip.GzipFile:
        path = self.root / name
        if paths.file_size(path) > _MAX_TABLE_BYTES:
            raise UserError(f"{path}: larger than {_MAX_TABLE_BYTES} bytes; split it")
        file = path.open("rb")
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        return gzip.open(file) if packed else file


def _told(names: Sequence[str]) -> list[str]:
    """Alternatives for a message: of many, each file once, whichever folder it may be in, packed or not."""
    if len(names) <= _MOST_TOLD:
        return list(names)
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(os.path.basename(name).removesuffix(".gz"), name)
    return list(first.values())


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"is no JSON ({_line(error)})")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
