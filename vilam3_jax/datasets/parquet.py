"""Rows of parquet files by column name, read one row group at a time.

Images come from the file itself. A path next to them is only a name and is never opened.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet

from vilam3_jax.datasets.dataset import MAX_IMAGE_BYTES, SkipItem
from vilam3_jax.datasets.source_files import SourceFolder, find_columns, one_line
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_MAX_GROUP_BYTES = 4 << 30  # size of a decompressed row group
_PART = re.compile(r"-(\d{5})-of-(\d{5})")


@dataclasses.dataclass(frozen=True)
class Place:
    """Position of a row in a parquet file.

    Attributes:
      file: path below the source folder.
      group, offset: row group, and position in it.
      number: number of the row in the file, from 1.
      id: `{prefix}/{row}`; rows are counted from 0 over all files listed together.
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
    """The parquet files of one split, ordered by part number.

    Of the `patterns`, such as "data/train-*.parquet", the first that matches is used.

    Raises:
      UserError: no file matches, or parts such as `-00000-of-00007` are missing or repeated (all are named).
    """
    found = next((names for pattern in patterns if (names := source.glob(pattern))), [])
    if not found:
        source.require(patterns)
    numbers = [(int(match[1]), int(match[2])) for name in found if (match := _PART.search(name))]
    if not numbers:
        return found
    total = max(count for _, count in numbers)
    present = [number for number, _ in numbers]
    missing = sorted(set(range(total)) - set(present))
    if missing or len(numbers) != total or len(found) != total:
        named = ", ".join(f"{number:05d}-of-{total:05d}" for number in missing) or "none"
        raise UserError(
            f"{source.root}: {len(found)} files match {patterns[0]}, of {total} parts; missing: {named}. "
            "Download the missing parts and remove those of other versions"
        )
    return sorted(found, key=lambda name: int(_PART.findall(name)[-1][0]))


def rows(
    source: SourceFolder, files: Sequence[str], columns: Mapping[str, Sequence[str]], prefix: str
) -> list[Place]:
    """Lists all rows of files; reads only their footers.

    Args:
      source, files: the folder, and paths below it, in order.
      columns: key of the row → accepted names, compared without case and surrounding spaces.
      prefix: prefix of the ids.

    Raises:
      UserError: a file is not parquet, lacks columns (all are named), or has too large a row group.
    """
    listed: list[Place] = []
    for file in files:
        path = source.root / file
        try:
            with path.open("rb") as opened:
                parquet_file = pyarrow.parquet.ParquetFile(opened)
                metadata, names = parquet_file.metadata, parquet_file.schema_arrow.names
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            paths.check_passing(path, error)
            raise UserError(
                f"{path}: is not a parquet file ({one_line(error)}); download it again"
            ) from error
        pairs = tuple((key, names[place]) for key, place in find_columns(path, names, columns).items())
        number = 0
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            if row_group.total_byte_size > _MAX_GROUP_BYTES:
                raise UserError(
                    f"{path}: row group {group} has {row_group.total_byte_size} bytes, more than "
                    f"{_MAX_GROUP_BYTES}; write the file again with smaller row groups"
                )
            for offset in range(row_group.num_rows):
                number += 1
                listed.append(Place(file, group, offset, number, f"{prefix}/{len(listed)}", pairs))
    return listed


def read(root: str, row: Place) -> dict[str, Any]:
    """The values of a row by key. Consecutive rows of a group cost one read.

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
    """The encoded image in a column of {bytes, path} or of plain bytes.

    Raises:
      SkipItem: the column has none, or it is too large.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes) or not data:
        raise SkipItem("the image column holds no bytes")
    if len(data) > MAX_IMAGE_BYTES:
        raise SkipItem(f"the image has {len(data)} bytes; up to {MAX_IMAGE_BYTES} are read")
    return data
