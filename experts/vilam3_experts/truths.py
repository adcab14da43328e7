"""Known labels of inputs, to which a calibration is fitted.

The file is a CSV table with a header, or JSON lines:

    key,group,pneumonia,effusion      {"key": "5a0f...", "labels": {"pneumonia": true}}
    5a0f...,p17,1,                    {"input": "a.png", "group": "p18", "labels": {"effusion": false}}

`key` is the content key of the input, `input` its name below `--data`. The optional `group`, such as a
patient's pseudonym, names inputs that must stay on one side of a cross-validation split; it is not stored.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vilam3_experts.descriptors import Descriptor
from vilam3_experts.inputs import Inputs
from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_MAX_FILE_BYTES = 1 << 30
_KEY = re.compile("[0-9a-f]{64}")
_VALUES = {"1": True, "true": True, "0": False, "false": False, "": None}


@dataclasses.dataclass(frozen=True)
class Truth:
    """The known labels of one input.

    `where` is its line in the file. The file states either `key` or `input`; the other is ''. `labels` maps
    class names to whether the class is present.
    """

    where: str
    key: str
    input: str
    group: str
    labels: Mapping[str, bool]


def read_truths(path: paths.PathLike) -> list[Truth]:
    """Reads a file of known labels; raises `UserError` with the line of a mistake."""
    try:
        text = paths.read_bytes(path, _MAX_FILE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text; save it as CSV or JSON lines") from error
    rows = _json_rows(text, path) if str(path).endswith(".jsonl") else _csv_rows(text, path)
    truths, seen = [], set()
    for where, row in rows:
        truth = _truth(where, row)
        if (name := truth.key or truth.input) in seen:
            raise UserError(f"{where}: {name[:80]!r} appears twice; keep one line")
        seen.add(name)
        truths.append(truth)
    if not truths:
        raise UserError(f"{path}: has no labels; see docs/experts_checks.md")
    return truths


def by_content_key(
    truths: list[Truth], data: paths.PathLike | None, descriptor: Descriptor
) -> dict[str, Truth]:
    """The known labels by content key; inputs that are given by name are read for their key.

    Raises `UserError` for a name that is not in the data folder.
    """
    found = {truth.key: truth for truth in truths if truth.key}
    named = {truth.input: truth for truth in truths if truth.input}
    if not named:
        return found
    if data is None:
        raise UserError("the labels name inputs; give their folder as --data")
    for item in Inputs(data, descriptor):
        truth = named.pop(item.name, None)
        if truth is None:
            continue
        key = inputs_key(item.load().keys)
        if key in found:
            raise UserError(f"{truth.where}: the same image as {found[key].where}; keep one line")
        found[key] = truth
    if named:
        name, truth = next(iter(named.items()))
        raise UserError(f"{truth.where}: {data} has no input {name[:80]!r} that {descriptor.name} reads")
    return found


def _csv_rows(text: str, path: paths.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        columns = reader.fieldnames or ()
        if len(set(columns)) != len(columns):
            raise UserError(f"{path}: two columns have the same name; rename one")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: not the {len(columns)} columns of the header")
            fixed = {name: row.pop(name, "") for name in ("key", "input", "group")}
            yield where, {**fixed, "labels": row}
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def _json_rows(text: str, path: paths.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("labels"), dict):
            raise UserError(f"{where}: give an object with `key` or `input`, and an object `labels`")
        yield where, row


def _truth(where: str, row: dict[str, Any]) -> Truth:
    key, name, group = (str(row.get(field) or "") for field in ("key", "input", "group"))
    if bool(key) == bool(name):
        raise UserError(f"{where}: give either `key` or `input`")
    if key and not _KEY.fullmatch(key):
        raise UserError(f"{where}: {key[:80]!r} is not a content key (64 hex digits); or use `input`")
    labels = {}
    for class_name, value in row["labels"].items():
        text = str(value).strip().lower() if value is not None else ""
        if text not in _VALUES:
            raise UserError(f"{where}: {class_name} is {str(value)[:40]!r}; give 1, 0 or nothing")
        if _VALUES[text] is not None:
            labels[class_name] = bool(_VALUES[text])
    return Truth(where, key, name, group, labels)
