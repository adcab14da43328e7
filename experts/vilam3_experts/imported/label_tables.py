"""Label tables of segmentation tools: label id to structure name.

Supported are JSON (id to name, name to id, TotalSegmentator's `class_map`, nnU-Net's `dataset.json` with
regions, the `channel_def` of a MONAI bundle's metadata, lists), CSV and TSV (BIDS `dseg.tsv`, 3D Slicer's
CSV), the colour tables of 3D Slicer and FreeSurfer, and ITK-SNAP's label descriptions.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from vilam3_experts.text import listed
from vilam3_jax.datasets.samples import parse_class_map
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

MAX_LABEL_ID = 65535
_MAX_TABLE_BYTES = 4 << 20
_MAX_NAME = 120
_ID_COLUMNS = ("labelvalue", "label_id", "labelid", "id", "index", "value", "key", "label")
_NAME_COLUMNS = ("name", "label_name", "labelname", "structure", "organ", "meaning", "description", "label")
_IGNORED = ("ignore", "ignored")  # nnU-Net: unlabelled voxels
_BACKGROUND = ("background", "clear label", "unknown", "none", "exterior")  # names of id 0
# Any other name of id 0 shows a table of channels or one that counts from 0, whose ids would be off.
_NO_STRUCTURE = re.compile(
    r".*background.*|clear label|none|exterior|outside|air|void|empty|nothing|null|black|bg|rest|others?"
    r"|(no|not|non)\W.*|un(known|label|segment|class|defin|annot|assign).*|ignored?|0",
)
# ITK-SNAP: id, red, green, blue, opacity, visible, mesh visible, "name".
_ITK_SNAP = re.compile(r'\s*(\d+)\s+\d+\s+\d+\s+\d+\s+[\d.eE+-]+\s+[01]\s+[01]\s+"(.*)"\s*')
# 3D Slicer and FreeSurfer: id, name without blanks, red, green, blue and opacity.
_COLOUR_TABLE = re.compile(r"\s*(\d+)\s+(\S+)((?:\s+[\d.]+){3,4})\s*")


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """Names by label id, 1..65535, and the ids of unlabelled voxels, which count as background."""

    names: dict[int, str]
    ignored: frozenset[int] = frozenset()


def name_words(name: str) -> frozenset[str]:
    """Key for the comparison of names: `lung_upper_lobe_left` equals `left lung upper lobe`."""
    text = _spaced(name).lower()
    return frozenset({"urinary bladder": "bladder"}.get(text, text).split())


def clean_name(name: str, source: object) -> str:
    """A structure's name with single blanks.

    Raises `UserError` if it is empty, longer than 120 characters, or has control characters.
    """
    words = _spaced(name)
    if not words or len(words) > _MAX_NAME or not words.isprintable():
        raise UserError(f"{source}: a label name is empty, too long or not printable; correct the table")
    return words


def _spaced(name: str) -> str:
    return re.sub(r"[\s_]+", " ", name).strip()


def make_table(pairs: Iterable[tuple[int, str]], source: object) -> LabelTable:
    """Builds a table from (id, name) pairs, without the background 0.

    Raises `UserError` for an id out of range or with two names, a structure at id 0, a bad name, or no label.
    """
    names: dict[int, str] = {}
    ignored = set()
    for label_id, name in pairs:
        if label_id == 0:
            words = _spaced(name)
            if words and not _NO_STRUCTURE.fullmatch(words.lower()):
                raise UserError(
                    f"{source}: label id 0 is {words[:_MAX_NAME]!r}, but 0 is the background of a label map; "
                    "give the ids that the masks hold, and begin a list with 'background'"
                )
            continue
        if not 0 < label_id <= MAX_LABEL_ID:
            raise UserError(f"{source}: label id {label_id} is outside 1..{MAX_LABEL_ID}; correct the table")
        words = clean_name(name, source)
        if words.lower() in _IGNORED:
            ignored.add(label_id)
        elif names.setdefault(label_id, words) != words:
            raise UserError(f"{source}: label id {label_id} has two names; correct the table")
    if not names:
        raise UserError(f"{source}: names no label; give a table of label ids and names")
    return LabelTable(names, frozenset(ignored))


def read_label_table(table: str) -> LabelTable:
    """Reads a label table; raises `UserError`, which says what was expected, if there is none.

    `FILE#KEY` selects one of several tables in a file, such as a task of TotalSegmentator's `class_map`.
    """
    name, _, key = table.partition("#")
    path = paths.as_path(name)
    if not paths.exists(path):
        raise UserError(f"{path}: no such file; check --labels")
    try:
        text = paths.read_bytes(path, _MAX_TABLE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file; give a label table as JSON, CSV, TSV or .ctbl") from error
    suffix = path.suffix.lower()
    if suffix == ".py":
        try:
            return make_table(parse_class_map(text, key or "total").items(), path)
        except (ValueError, KeyError, SyntaxError, TypeError) as error:
            raise UserError(f"{path}: no class_map of {key or 'total'!r} in it; check --labels") from error
    if text.lstrip()[:1] in ("{", "["):
        return _from_json(text, key, path)
    if suffix in (".csv", ".tsv"):
        return _from_columns(text, path)
    return _from_lines(text, path)


def _from_json(text: str, key: str, source: object) -> LabelTable:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if found.setdefault(name, value) is not value:  # json alone would keep the last entry
                raise UserError(f"{source}: states {name[:_MAX_NAME]!r} twice; correct the table")
        return found

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON; correct the table") from error
    if key:
        if not isinstance(data, dict) or key not in data:
            raise UserError(f"{source}: has no entry {key!r}; check what follows '#' in --labels")
        data = data[key]
    pairs = _pairs(data, source)
    if pairs is None:
        raise UserError(
            f"{source}: not a table of ids and names, nor a dataset.json or metadata.json with one; "
            "give {id: name}"
        )
    return make_table(pairs, source)


def _pairs(data: Any, source: object) -> list[tuple[int, str]] | None:
    """The (id, name) pairs in a JSON value; None if there are none."""
    if isinstance(data, list):
        return _from_list(data)
    if not isinstance(data, dict) or not data:
        return None
    if all(map(_is_id, data)):
        if not all(isinstance(v, str) for v in data.values()):  # numbers to numbers: either may be the ids
            return None
        return [(int(k), v) for k, v in data.items()]
    if all(_is_id(v) or (isinstance(v, list) and v and all(map(_is_id, v))) for v in data.values()):
        return _from_regions(data, source)
    for key in ("labels", "channel_def", "class_map", "label_names"):
        if key in data and (found := _pairs(data[key], source)):
            return found
    node: Any = data
    for key in ("network_data_format", "outputs", "pred", "channel_def"):  # MONAI's metadata
        node = node.get(key) if isinstance(node, dict) else None
    if node is not None:
        return _pairs(node, source)
    tables = [repr(k) for k, v in data.items() if isinstance(v, dict) and _pairs(v, source)]
    if tables:
        raise UserError(
            f"{source}: has several tables ({listed(tables, 8)}); choose one with FILE#NAME in --labels"
        )
    return None


def _from_list(data: list[Any]) -> list[tuple[int, str]] | None:
    if data and all(isinstance(row, str) for row in data):
        return list(enumerate(data))
    pairs = []
    for row in data:
        if not isinstance(row, dict):
            return None
        row = {str(k).lower(): v for k, v in row.items()}
        number = next((row[c] for c in _ID_COLUMNS if _is_id(row.get(c))), None)
        name = next((row[c] for c in _NAME_COLUMNS if isinstance(row.get(c), str)), None)
        if number is None or name is None:
            return None
        pairs.append((int(number), name))
    return pairs or None


def _is_id(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"\d{1,9}", value.strip()) is not None
    return isinstance(value, int) and not isinstance(value, bool)


def _from_regions(data: Mapping[str, Any], source: object) -> list[tuple[int, str]]:
    """Converts {name: id} or nnU-Net's {name: ids of a region}.

    Regions are nested: the whole tumour includes its core. An id is named after the smallest region with it,
    minus the next smaller region inside: with {whole: [1, 2], core: [2]}, 1 is `whole without core`.
    """
    regions = {
        name: frozenset(int(v) for v in (value if isinstance(value, list) else [value]))
        for name, value in data.items()
    }
    if all(len(ids) == 1 for ids in regions.values()):
        return [(next(iter(ids)), name) for name, ids in regions.items()]
    pairs = []
    for label_id in sorted(frozenset().union(*regions.values())):
        holding = sorted((len(ids), name) for name, ids in regions.items() if label_id in ids)
        if len(holding) > 1 and holding[0][0] == holding[1][0]:
            raise UserError(f"{source}: regions of one size share label id {label_id}; give a plain table")
        smallest = holding[0][1]
        inner = max(((len(ids), n) for n, ids in regions.items() if ids < regions[smallest]), default=None)
        pairs.append((label_id, f"{smallest} without {inner[1]}" if inner else smallest))
    return pairs


def _from_columns(text: str, source: object) -> LabelTable:
    delimiter = max(("\t", ",", ";"), key=text.partition("\n")[0].count)
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise UserError(f"{source}: not a valid table ({error}); correct it") from error
    rows = [[cell.strip() for cell in row] for row in rows if not row[0].startswith("#")]
    head = [cell.lower().replace(" ", "_") for cell in rows[0]] if rows else []
    if head and not any(map(_is_id, head)):
        number = next((head.index(c) for c in _ID_COLUMNS if c in head), None)
        name = next((head.index(c) for c in _NAME_COLUMNS if c in head and head.index(c) != number), None)
        rows = rows[1:]
    else:
        number = 0 if head and _is_id(head[0]) else 1
        name = 1 - number
    if number is None or name is None:
        raise UserError(f"{source}: needs columns named id and name; correct its first line")
    pairs = []
    for row in rows:
        if len(row) <= max(number, name) or not _is_id(row[number]):
            raise UserError(f"{source}: a row has no label id and name; correct the table")
        pairs.append((int(row[number]), row[name]))
    return make_table(pairs, source)


def _from_lines(text: str, source: object) -> LabelTable:
    """ITK-SNAP's label descriptions, and the colour tables of 3D Slicer and FreeSurfer."""
    pairs = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _ITK_SNAP.fullmatch(line) or _COLOUR_TABLE.fullmatch(line)
        if match is None:
            raise UserError(
                f"{source}: not a known kind of label table; give JSON {{id: name}}, CSV with id and name, "
                "a 3D Slicer .ctbl or an ITK-SNAP label description"
            )
        if int(match[1]) == 0 or match[2].strip('"').lower().replace("_", " ") not in _BACKGROUND:
            pairs.append((int(match[1]), match[2]))
    return make_table(pairs, source)
