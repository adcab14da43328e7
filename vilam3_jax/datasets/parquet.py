"""Rows of parquet files, read one row group at a time, with columns found by name.

Images are taken from the file itself. A path that stands beside them is a name, which is never opened.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from vilam3_jax.datasets.dataset import SkipItem
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_MAX_GROUP_BYTES = 4 << 30  # of one row group, decompressed
_MAX_IMAGE_BYTES = 64 << 20
_PART = re.compile(r"-(\d{5})-of-(\d{5})")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a row of a parquet file stands.

    Attributes:
      file: path below the source folder.
      group, offset: the row group and the place in it.
      number: from 1, over the file.
      id: `{prefix}/{row}`, rows counted from 0 over all files that were listed together.
      columns: (key, column of the file) pairs.
    """

    file: str
    group: int
    offset: int
    number: int
    id: str
    columns: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.file} row {self.number}"


def parts(source: SourceFolder, *patterns: str) -> list[str]:
    """The parquet files of one split, in the order of their numbers.

    Args:
      source: the folder.
      patterns: alternatives such as "data/train-*.parquet"; the first that matches counts.

    Raises:
      UserError: there is none, or one of `-00000-of-00007` is missing or there twice; all are named.
    """
    found = next((names for pattern in patterns if (names := source.glob(pattern))), [])
    if not found:
        source.require(patterns)
    numbers = [(int(match[1]), int(match[2])) for name in found if (match := _PART.search(name))]
    if not numbers:
        return found
    total = max(count for _, count in numbers)
    present = [number for number, _ in numbers]
    lacking = sorted(set(range(total)) - set(present))
    if lacking or len(numbers) != total or len(found) != total:
        what = ", ".join(f"{number:05d}-of-{total:05d}" for number in lacking) or "none"
        raise UserError(
            f"{source.root}: {len(found)} files match {patterns[0]}, of {total} parts; missing: {what}. "
            "Download the missing parts and remove those of other versions"
        )
    return sorted(found, key=lambda name: int(_PART.findall(name)[-1][0]))


def rows(
    source: SourceFolder, files: Sequence[str], columns: Mapping[str, Sequence[str]], prefix: str
) -> list[Place]:
    """All rows of files; reads their footers only.

    Args:
      source: the folder.
      files: paths below it, in order.
      columns: key of the row → accepted names, compared without case and surrounding spaces.
      prefix: of the ids.

    Raises:
      UserError: a file is no parquet, lacks a column (all are named), or has a row group that is too large.
    """
    listed: list[Place] = []
    for file in files:
        path = source.root / file
        try:
            with path.open("rb") as opened:
                described = pyarrow.parquet.ParquetFile(opened)
                metadata, schema = described.metadata, described.schema_arrow
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            paths.check_passing(path, error)
            raise UserError(f"{path}: is no parquet file ({_line(error)}); download it again") from error
        names = {name.strip().lower(): name for name in reversed(schema.names)}
        chosen = {
            key: next((names[n.lower()] for n in accepted if n.lower() in names), None)
            for key, accepted in columns.items()
        }
        if lacking := [" or ".join(columns[key]) for key, name in chosen.items() if name is None]:
            raise UserError(
                f"{path}: no column {', '.join(lacking)}; it has {', '.join(schema.names) or 'none'}"
            )
        pairs = tuple((key, name) for key, name in chosen.items() if name is not None)
        number = 0
        for group in range(metadata.num_row_groups):
            described_group = metadata.row_group(group)
            if described_group.total_byte_size > _MAX_GROUP_BYTES:
                raise UserError(
                    f"{path}: row group {group} has {described_group.total_byte_size} bytes, more than "
                    f"{_MAX_GROUP_BYTES}; write the file again with smaller row groups"
                )
            for offset in range(described_group.num_rows):
                number += 1
                listed.append(Place(file, group, offset, number, f"{prefix}/{len(listed)}", pairs))
    return listed


def read(root: str, row: Place) -> dict[str, Any]:
    """The values of a row by key. Rows that follow one another cost one reading of their group.

    Raises:
      UserError: the row group is damaged.
      UnavailableError: the disk or the network fails.
    """
    table = _group(root, row.file, row.group, tuple(name for _, name in row.columns))
    values = table.slice(row.offset, 1)
    if not values.num_rows:
        raise UserError(f"{row}: the file changed while it was read; start again")
    return {key: values.column(name)[0].as_py() for key, name in row.columns}


@functools.lru_cache(maxsize=1)
def _group(root: str, file: str, group: int, names: tuple[str, ...]) -> pyarrow.Table:
    path = paths.as_path(root) / file
    try:
        with path.open("rb") as opened:
            return pyarrow.parquet.ParquetFile(opened).read_row_group(group, columns=list(names))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        paths.check_passing(path, error)
        raise UserError(f"{file}: row group {group} is damaged; download the file again") from error


def image_bytes(value: object) -> bytes:
    """The encoded image in a column of the form {bytes, path}, or of plain bytes.

    Raises:
      SkipItem: the column has none, or it is too large.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise SkipItem("the image column holds no bytes")
    if len(data) > _MAX_IMAGE_BYTES:
        raise SkipItem(f"the image has {len(data)} bytes; up to {_MAX_IMAGE_BYTES} are read")
    return data


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
