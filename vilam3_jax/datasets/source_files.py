"""Readers of the user's files: JSON, JSON lines, CSV by header name, text and lists of files."""

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
_MAX_ALTERNATIVES = 2  # in a message, before those that differ only in folder or compression are merged
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks
_GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)


class SourceFolder:
    """The folder with the user's download.

    Attributes:
      root: the folder, local or an object store.
      notes: one sentence for the user about each problem in the files that were read.
    """

    def __init__(self, root: paths.PathLike, instructions: str = "") -> None:
        """Opens an existing folder.

        Raises:
          UserError: it does not exist; the message ends with `instructions`.
        """
        self.root = paths.as_path(root)
        self.notes: list[str] = []
        self._instructions = " ".join(instructions.split())
        if not self.root.is_dir():
            raise UserError(f"{root}: no such folder. {self._instructions}".rstrip())

    def find(self, *names: str) -> str | None:
        """The first of `names`, paths of files or folders below the root, that exists, or None."""
        return next((name for name in names if paths.exists(self.root / name)), None)

    def require(self, *alternatives: str | Sequence[str]) -> list[str]:
        """Finds required files and folders.

        Args:
          alternatives: a name, or names of which one must exist.

        Returns:
          The name found for each.

        Raises:
          UserError: lists everything that is missing, and the instructions.
        """
        found, missing = [], []
        for names in alternatives:
            names = [names] if isinstance(names, str) else list(names)
            name = self.find(*names)
            found.append(name or "")
            if name is None:
                missing.append(" or ".join(_listed(names)))
        if missing:
            raise UserError(f"{self.root}: {', '.join(missing)} missing. {self._instructions}".rstrip())
        return found

    def glob(self, pattern: str) -> list[str]:
        """Paths below the root that match, sorted, without AppleDouble files (`._name`)."""
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
          UserError: it is not JSON.
        """
        data = paths.read_bytes(self.root / name, _MAX_TABLE_BYTES)
        try:
            return json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
        except (ValueError, RecursionError, *_GZIP_ERRORS) as error:
            raise self._damaged(name, "is not JSON", error) from error

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
        """Yields (line number from 1, value) of a JSON lines file, a `ValueError` for an invalid line.

        Raises:
          UserError: the file is compressed and damaged.
        """
        with self._open(name) as file:
            try:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        try:
                            yield number, json.loads(line)
                        except (ValueError, RecursionError) as error:
                            yield number, ValueError(f"is not JSON ({one_line(error)})")
            except _GZIP_ERRORS as error:
                raise self._damaged(name, "cannot be read", error) from error

    def table(
        self,
        name: str,
        columns: Mapping[str, Sequence[str]],
        *,
        optional: Mapping[str, Sequence[str]] | None = None,
        delimiter: str = ",",
    ) -> Iterator[dict[str, str]]:
        """Yields the rows of a CSV file (also .gz, with or without a byte order mark) by column name.

        A row with more cells than the header is read as a row of empty cells and reported in `notes`: an
        unquoted delimiter in a text shifts all later cells. Bytes that are not UTF-8 become lone surrogates,
        so that only the records with these texts are skipped.

        Args:
          name: path of the file.
          columns: key of the row → accepted headers, compared without case and surrounding spaces.
          optional: the same for columns that may be absent; they are then absent from the rows.
          delimiter: separator of cells.

        Raises:
          UserError: columns are missing (lists them and the existing ones), a column is repeated, or the file
            is not CSV.
        """
        csv.field_size_limit(_MAX_FIELD)
        path = self.root / name
        try:
            reader = csv.reader(self._text(name, errors="surrogateescape"), delimiter=delimiter)
            header = [cell.strip().lstrip("\ufeff") for cell in next(reader, [])]
            "".join(header).encode()  # names of columns must be text
            chosen = find_columns(path, header, columns, optional)
            if repeated := [header[place] for place in chosen.values() if header.count(header[place]) > 1]:
                raise UserError(f"{path}: has two columns {repeated[0]}; remove or rename one of them")
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
            raise UserError(f"{path}: its header is not UTF-8 text; save it as UTF-8") from error
        except (csv.Error, *_GZIP_ERRORS) as error:
            raise self._damaged(name, "cannot be read", error) from error

    def lines(self, name: str) -> list[str]:
        """The non-empty lines of a text file, stripped.

        Raises:
          UserError: it is not UTF-8 text.
        """
        try:
            return [line.strip() for line in self._text(name) if line.strip()]
        except (UnicodeDecodeError, *_GZIP_ERRORS) as error:
            raise self._damaged(name, "is not text", error) from error

    def _damaged(self, name: str, problem: str, error: BaseException) -> UserError:
        return UserError(f"{self.root / name}: {problem} ({one_line(error)}); download it again")

    def _text(self, name: str, errors: str = "strict") -> io.TextIOBase:
        file = self._open(name)
        if file.read(2) in _UTF16:
            raise UserError(f"{self.root / name}: is UTF-16 text; save it as UTF-8")
        file.seek(0)
        return io.TextIOWrapper(file, encoding="utf-8-sig", errors=errors, newline="")

    def _open(self, name: str) -> IO[bytes] | gzip.GzipFile:
        path = self.root / name
        if paths.file_size(path) > _MAX_TABLE_BYTES:
            raise UserError(f"{path}: larger than {_MAX_TABLE_BYTES} bytes; split it")
        file = path.open("rb")
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        return gzip.open(file) if compressed else file


def find_columns(
    path: paths.PathLike,
    header: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, int]:
    """Key → position of its column in `header`; see `SourceFolder.table`.

    Raises:
      UserError: columns are missing; lists them and the existing ones.
    """
    places = {cell.strip().lower(): place for place, cell in reversed(list(enumerate(header)))}
    found = {
        key: places[name.lower()]
        for key, names in {**columns, **(optional or {})}.items()
        if (name := next((name for name in names if name.lower() in places), None)) is not None
    }
    if missing := [" or ".join(names) for key, names in columns.items() if key not in found]:
        raise UserError(f"{path}: no column {', '.join(missing)}; it has {', '.join(header) or 'none'}")
    return found


def one_line(error: BaseException) -> str:
    """The text of an error, for a message of one line."""
    return " ".join(str(error).split())[:200]


def _listed(names: Sequence[str]) -> list[str]:
    """Alternatives for a message; of many, each file once, regardless of folder and compression."""
    if len(names) <= _MAX_ALTERNATIVES:
        return list(names)
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(os.path.basename(name).removesuffix(".gz"), name)
    return list(first.values())
