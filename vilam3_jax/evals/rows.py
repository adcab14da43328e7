"""Files of an evaluation: rows that survive an interruption, results with the same bytes in every run.

While an arm is answered, finished rows stand in parts in `rows.partial`; a run with the same settings goes on
after them. Times and versions are kept apart, in `run.json`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

ROWS_FILE = "rows.jsonl"
RESULT_FILE = "result.json"
TABLES_FILE = "tables.md"
RUN_FILE = "run.json"
PARTIAL = "rows.partial"
PART_ROWS = 32
_SETTINGS_FILE = "settings.json"
_MAX_BYTES = 1 << 30
_SAMPLED = 1 << 16

Row = dict[str, Any]


def to_json(record: Any) -> str:
    """Indented JSON with a final newline."""
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def write_json(path: paths.PathLike, record: Any) -> None:
    """Writes `record` as indented JSON, atomically."""
    paths.write_text_atomic(path, to_json(record))


def to_lines(rows: Iterable[Row]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_lines(path: paths.PathLike) -> list[Row]:
    """Reads JSON lines.

    Raises:
      UserError: missing or damaged.
    """
    try:
        return [json.loads(line) for line in paths.read_bytes(path, _MAX_BYTES).decode().splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: damaged ({error}); evaluate again") from error


def read_finished(folder: paths.PathLike, settings: Mapping[str, Any]) -> list[Row] | None:
    """The rows of a finished arm with these settings; None if there is none."""
    root = paths.as_path(folder)
    if not (root / RESULT_FILE).exists():
        return None
    try:
        result = json.loads(paths.read_bytes(root / RESULT_FILE, _MAX_BYTES))
        rows = read_lines(root / ROWS_FILE)
    except (ValueError, UserError):
        return None  # damaged: answered again
    plain = json.loads(json.dumps(settings))
    return rows if all(result.get(key) == value for key, value in plain.items()) else None


class PartialRows:
    """Rows of an arm that is being answered."""

    def __init__(self, folder: paths.PathLike, settings: Mapping[str, Any]):
        """Reads the parts of an interrupted run with the same settings; removes those of another.

        Args:
          folder: of the arm.
          settings: all that rows depend on.
        """
        self._folder = paths.as_path(folder) / PARTIAL
        self._settings = to_json(settings)
        self.rows: list[Row] = []
        marker = self._folder / _SETTINGS_FILE
        if marker.exists() and paths.read_bytes(marker, _MAX_BYTES).decode() == self._settings:
            while (part := self._part(len(self.rows))).exists():
                self.rows += read_lines(part)
        elif self._folder.exists():
            self._folder.rmtree()

    def _part(self, first: int) -> Any:
        return self._folder / f"{first:09}.jsonl"

    def keep(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yields rows and writes them in parts."""
        first = len(self.rows)
        while part := list(itertools.islice(rows, PART_ROWS)):
            if first == 0:
                paths.write_text_atomic(self._folder / _SETTINGS_FILE, self._settings)
            paths.write_text_atomic(self._part(first), to_lines(part))
            first += len(part)
            yield from part

    def remove(self) -> None:
        """Removes the parts, after the result was written."""
        if self._folder.exists():
            self._folder.rmtree()


def fingerprint(folder: paths.PathLike) -> str:
    """sha256 (hex) that tells models apart: of the names, sizes, and first and last 64 KiB of all files.

    It changes with every new save of a model, and not when the folder is copied or moved.
    """
    root = paths.as_path(folder)
    digest = hashlib.sha256()

    def add(place: Any, name: str) -> None:
        for child in sorted(paths.children(place), key=lambda one: one.name):
            label = f"{name}/{child.name}"
            if child.is_dir():
                add(child, label)
                continue
            with child.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                start = file.read(_SAMPLED)
                file.seek(max(0, size - _SAMPLED))
                digest.update(f"{label}\0{size}\0".encode() + start + file.read(_SAMPLED))

    add(root, "")
    return digest.hexdigest()
