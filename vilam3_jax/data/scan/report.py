"""The result of a scan as text for people and as JSON for programs. Neither names a patient or a path."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import vilam3_jax
from vilam3_jax.data.scan.collect import Found
from vilam3_jax.data.scan.records import (
    AS_PICTURES,
    AS_VOLUME,
    NOT_USED,
    UNDECIDED,
    FileRecord,
    SeriesRecord,
)
from vilam3_jax.data.stored_volume import UNKNOWN

SCHEMA_VERSION = 1
_VOLUME_READERS = ("nifti", "nifti pair", "nrrd", "metaimage")
_TABLE_ROWS = 50
_REASONS = 20
_NUMBERS = 12


def to_json(found: Found, seconds: float) -> dict[str, Any]:
    """The whole result; docs/data_scan.md describes the schema."""
    studies = {study: number for number, study in enumerate(dict.fromkeys(s.study for s in found.series), 1)}
    volumes = [record for record in found.files if record.reader in _VOLUME_READERS]
    pictures = [record for record in found.files if record.reader == "picture"]
    other = [record for record in found.files if record.reader is None and record.problem is None]
    fates = _fates(found)
    return {
        "schema": "vilam3.data.scan",
        "schema_version": SCHEMA_VERSION,
        "vilam3": vilam3_jax.__version__,
        "summary": {
            "files": len(found.files),
            "bytes": sum(record.size for record in found.files),
            "dicom_files": sum(record.series is not None for record in found.files),
            "studies": len(studies),
            "series": len({one.identifier.partition("/")[0] for one in found.series}),
            "usable_volumes": sum(one.use == AS_VOLUME for one in found.series)
            + sum(record.problem is None for record in volumes),
            "undecided_volumes": sum(one.use == UNDECIDED for one in found.series),
            "usable_pictures": sum(one.slices for one in found.series if one.use == AS_PICTURES)
            + sum(record.problem is None for record in pictures),
            "used_files": len(found.files) - len(fates) - len(other),
            "skipped_files": len(fates),
            "other_files": len(other),
            "seconds": round(seconds, 2),
        },
        "series": [_series_json(number, one, studies) for number, one in enumerate(found.series, 1)],
        "volumes": [_volume_json(number, record) for number, record in enumerate(volumes, 1)],
        "pictures": _pictures_json(pictures),
        "problems": _problems(found.series, volumes),
        "skipped": _counted("reason", fates.values()),
        "other_files": [
            {"kind": kind, "advice": advice, "files": files}
            for (kind, advice), files in collections.Counter((r.kind, r.advice) for r in other).most_common()
        ],
        "not_files": [{"reason": reason, "entries": count} for reason, count in found.skipped.most_common()],
    }


def _counted(key: str, values: Iterable[str]) -> list[dict[str, Any]]:
    return [{key: value, "files": files} for value, files in collections.Counter(values).most_common()]


def _fates(found: Found) -> dict[int, str]:
    """File index -> why nothing is made of the file, for all files of kinds that are read."""
    used = {index for one in found.series if one.use != NOT_USED for index in one.files}
    fates: dict[int, str] = {}
    for one in found.series:
        if one.use == NOT_USED and one.problem is not None:
            fates |= dict.fromkeys(one.files, one.problem)
        for reason, files in one.skipped.items():
            fates |= dict.fromkeys(files, reason)
    fates |= {record.index: record.problem for record in found.files if record.problem is not None}
    return {index: fates[index] for index in sorted(fates) if index not in used}


def _series_json(number: int, one: SeriesRecord, studies: dict[str, int]) -> dict[str, Any]:
    thickness = _rounded(None if one.thickness is None else [one.thickness])
    return {
        "number": number,
        "id": one.identifier,
        "study": studies[one.study],
        "modality": one.modality,
        "body_part": one.body_part,
        "kind": one.kind,
        "use": one.use,
        "files": len(one.files),
        "columns": one.columns,
        "rows": one.rows,
        "slices": one.slices,
        "spacing_mm": _rounded(one.spacing),
        "plane": one.plane,
        "thickness_mm": thickness[0] if thickness else None,
        "localizer": one.localizer,
        "problem": one.problem,
        "notes": list(one.notes),
        "skipped": [{"reason": reason, "files": len(files)} for reason, files in one.skipped.items()],
    }


def _volume_json(number: int, record: FileRecord) -> dict[str, Any]:
    grid = record.grid
    return {
        "number": number,
        "kind": record.kind,
        "use": AS_VOLUME if record.problem is None else NOT_USED,
        "shape": list(grid.shape) if grid else None,
        "spacing_mm": _rounded(grid.spacing) if grid else None,
        "orientation": grid.orientation if grid else UNKNOWN,
        "modality": grid.modality if grid else UNKNOWN,
        "body_part": grid.body_part if grid else UNKNOWN,
        "problem": record.problem,
        "notes": list(grid.notes) if grid else [],
    }


def _pictures_json(pictures: Sequence[FileRecord]) -> list[dict[str, Any]]:
    kinds: dict[str, list[FileRecord]] = collections.defaultdict(list)
    for record in pictures:
        kinds[record.kind].append(record)
    entries = []
    for kind, records in sorted(kinds.items(), key=lambda item: -len(item[1])):
        usable = [record for record in records if record.problem is None]
        sizes = sorted(((record.width, record.height) for record in usable), key=lambda s: s[0] * s[1])
        entries.append(
            {
                "kind": kind,
                "files": len(records),
                "usable": len(usable),
                "several_pages": sum(record.frames > 1 for record in usable),
                "smallest": list(sizes[0]) if sizes else None,
                "largest": list(sizes[-1]) if sizes else None,
            }
        )
    return entries


def _problems(series: Sequence[SeriesRecord], volumes: Sequence[FileRecord]) -> list[dict[str, Any]]:
    """Why series and volumes cannot be used, the most frequent reason first."""
    reasons: dict[str, dict[str, list[int]]] = {}
    for name, problems in (
        ("series", [one.problem if one.use == NOT_USED else None for one in series]),
        ("volumes", [record.problem for record in volumes]),
    ):
        for number, problem in enumerate(problems, 1):
            if problem is not None:
                reasons.setdefault(problem, {"series": [], "volumes": []})[name].append(number)
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]["series"] + item[1]["volumes"]))
    return [{"reason": reason, **numbers} for reason, numbers in ordered]


def to_text(result: dict[str, Any]) -> str:
    """The result of `to_json` for a terminal of 110 columns; long lists are cut, with a count."""
    summary = result["summary"]
    lines = [
        f"{_count(summary['files'], 'file')}, {summary['bytes'] / 1e9:,.2f} GB, "
        f"headers read in {summary['seconds']:,.1f} s",
        f"  DICOM      {_count(summary['dicom_files'], 'file')}, {_count(summary['studies'], 'study')}, "
        f"{summary['series']:,} series",
        f"  usable     {_count(summary['usable_volumes'], 'volume')} and "
        f"{_count(summary['usable_pictures'], 'picture')} out of {_count(summary['used_files'], 'file')}",
        f"  skipped    {_count(summary['skipped_files'], 'file')}",
        f"  other      {_count(summary['other_files'], 'file')} of kinds that are not read",
    ]
    if summary["undecided_volumes"]:
        lines.append(
            f"  undecided  {_count(summary['undecided_volumes'], 'volume')} with two slices at one position, "
            "read only if both are equal"
        )
    reason_numbers = {entry["reason"]: number for number, entry in enumerate(result["problems"], 1)}
    lines += _table("DICOM series", _SERIES_HEADS, _series_rows(result["series"], reason_numbers))
    lines += _table("Volumes in files", _VOLUME_HEADS, _volume_rows(result["volumes"], reason_numbers))
    lines += _table("Pictures", _PICTURE_HEADS, _picture_rows(result["pictures"]))
    lines += _listed("Problems", [_problem_line(number, entry) for entry, number in _numbered(result)])
    lines += _listed("Skipped files", [f"{e['files']:>9,}  {e['reason']}" for e in result["skipped"]])
    lines += _listed("Other files", [_other_line(entry) for entry in result["other_files"]])
    lines += _listed("Not looked into", [f"{e['entries']:>9,}  {e['reason']}" for e in result["not_files"]])
    lines += _listed("What the readers assume", _notes(result))
    lines += ["", "Next", *_next(result)]
    return "\n".join(lines) + "\n"


_SERIES_HEADS = ("#", "id", "study", "modality", "body part", "grid", "spacing mm", "plane", "thick", "use")
_VOLUME_HEADS = ("#", "kind", "modality", "body part", "grid", "spacing mm", "axes", "use")
_PICTURE_HEADS = ("files", "usable", "kind", "smallest", "largest", "with several pages")
_RIGHT = {"#", "study", "thick", "files", "usable", "with several pages"}
_WIDEST = {"body part": 14, "kind": 24}


def _series_rows(series: Sequence[dict[str, Any]], reasons: dict[str, int]) -> list[tuple[str, ...]]:
    rows = []
    for one in series:
        grid = "x".join(str(one[key]) for key in ("columns", "rows", "slices"))
        spacing = _product(one["spacing_mm"])
        thickness = "-" if one["thickness_mm"] is None else f"{one['thickness_mm']:g}"
        use = {AS_PICTURES: one["kind"], NOT_USED: f"no ({reasons.get(one['problem'], '-')})"}
        word = use.get(one["use"], one["use"]) + (", localizer" if one["localizer"] else "")
        rows.append(
            (
                str(one["number"]),
                one["id"],
                str(one["study"]),
                one["modality"],
                one["body_part"],
                grid if one["slices"] else "-",
                spacing,
                one["plane"] if one["plane"] != UNKNOWN else "-",
                thickness,
                word,
            )
        )
    return rows


def _volume_rows(volumes: Sequence[dict[str, Any]], reasons: dict[str, int]) -> list[tuple[str, ...]]:
    return [
        (
            str(one["number"]),
            one["kind"],
            one["modality"],
            one["body_part"],
            "x".join(map(str, one["shape"])) if one["shape"] else "-",
            _product(one["spacing_mm"]),
            one["orientation"] if one["shape"] else "-",
            one["use"] if one["use"] != NOT_USED else f"no ({reasons.get(one['problem'], '-')})",
        )
        for one in volumes
    ]


def _picture_rows(pictures: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            f"{one['files']:,}",
            f"{one['usable']:,}",
            one["kind"],
            *("x".join(map(str, one[key])) if one[key] else "-" for key in ("smallest", "largest")),
            str(one["several_pages"]),
        )
        for one in pictures
    ]


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    shown = [
        [_cut(cell, _WIDEST.get(head, 40)) for head, cell in zip(heads, row, strict=True)]
        for row in rows[:_TABLE_ROWS]
    ]
    widths = [max(len(head), *(len(row[i]) for row in shown)) for i, head in enumerate(heads)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if head in _RIGHT else cell.ljust(width)
            for head, cell, width in zip(heads, cells, widths, strict=True)
        )
        return ("  " + "  ".join(aligned)).rstrip()

    lines = ["", title, line(heads), *map(line, shown)]
    if len(rows) > _TABLE_ROWS:
        lines.append(f"  and {len(rows) - _TABLE_ROWS:,} more; --json FILE has all")
    return lines


def _listed(title: str, entries: Sequence[str]) -> list[str]:
    if not entries:
        return []
    more = len(entries) - _REASONS
    return [
        "",
        title,
        *entries[:_REASONS],
        *([f"  and {more:,} more; --json FILE has all"] if more > 0 else []),
    ]


def _numbered(result: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    return [(entry, number) for number, entry in enumerate(result["problems"], 1)]


def _problem_line(number: int, entry: dict[str, Any]) -> str:
    where = [f"{name} {_first_numbers(entry[name])}" for name in ("series", "volumes") if entry[name]]
    return f"  ({number}) {entry['reason']}: {'; '.join(where)}"


def _first_numbers(numbers: Sequence[int]) -> str:
    more = len(numbers) - _NUMBERS
    return ", ".join(map(str, numbers[:_NUMBERS])) + (f" and {more:,} more" if more > 0 else "")


def _other_line(entry: dict[str, Any]) -> str:
    return f"{entry['files']:>9,}  {entry['kind']}" + (f": {entry['advice']}" if entry["advice"] else "")


def _notes(result: dict[str, Any]) -> list[str]:
    where: dict[str, dict[str, list[int]]] = {}
    for name in ("series", "volumes"):
        for one in result[name]:
            for note in one["notes"]:
                where.setdefault(note, {"series": [], "volumes": []})[name].append(one["number"])
    return [
        f"  {note}: "
        + "; ".join(f"{name} {_first_numbers(numbers)}" for name, numbers in places.items() if numbers)
        for note, places in where.items()
    ]


def _next(result: dict[str, Any]) -> list[str]:
    """Commands for what was found; FOLDER and FILE stand for paths, which a report does not repeat."""
    series = [one for one in result["series"] if one["use"] == AS_VOLUME]
    series = [one for one in series if not one["localizer"]] or series
    own_files = [one for one in result["volumes"] if one["use"] == AS_VOLUME]
    pictures = any(one["usable"] for one in result["pictures"])
    dicom_pictures = any(one["use"] == AS_PICTURES for one in result["series"])
    lines = []
    if series:
        largest = max(series, key=lambda one: one["slices"])
        lines.append(
            f"  vilam3 chat --checkpoint=EXPORT --image=FOLDER --series={largest['id']} --prompt=..."
        )
    if own_files or pictures or dicom_pictures:
        lines.append("  vilam3 chat --checkpoint=EXPORT --image=FILE --prompt=...")
    if series or own_files:
        lines.append("  vilam3-experts annotate --expert=NAME --data=FOLDER --out=ANNOTATIONS")
    if result["summary"]["dicom_files"]:
        lines.append("  vilam3 data deidentify --source=FOLDER --out=COPY  # before you share anything")
    return lines or ["  nothing here can be read; give the folder that holds the images"]


def to_paths(found: Found, folder: str) -> dict[str, Any]:
    """Where everything lies: ids and numbers of the report -> paths. This may identify patients."""
    by_reason: dict[str, list[str]] = collections.defaultdict(list)
    for index, reason in _fates(found).items():
        by_reason[reason].append(found.paths[index])
    by_kind: dict[str, list[str]] = collections.defaultdict(list)
    for record in found.files:
        if record.reader is None and record.problem is None:
            by_kind[record.kind].append(found.paths[record.index])
    volumes = [record for record in found.files if record.reader in _VOLUME_READERS]
    return {
        "schema": "vilam3.data.scan.paths",
        "schema_version": SCHEMA_VERSION,
        "warning": "Names of files and folders may identify patients. Keep this file where the images are.",
        "folder": folder,
        "series": {one.identifier: [found.paths[index] for index in one.files] for one in found.series},
        "volumes": {str(number): found.paths[record.index] for number, record in enumerate(volumes, 1)},
        "pictures": [found.paths[record.index] for record in found.files if record.reader == "picture"],
        "skipped": by_reason,
        "other_files": by_kind,
    }


def dumps(document: dict[str, Any]) -> str:
    """JSON text, ASCII: names of files that are not Unicode survive as escapes."""
    return json.dumps(document, indent=1) + "\n"


def _rounded(lengths: Sequence[float] | None) -> list[float] | None:
    """Millimetres to four digits; None where one is infinite or NaN, which JSON cannot hold."""
    if lengths is None or not all(map(math.isfinite, lengths)):
        return None
    return [float(f"{mm:.4g}") for mm in lengths]


def _count(number: int, name: str) -> str:
    if number != 1:
        name = f"{name.removesuffix('y')}ies" if name.endswith("y") else f"{name}s"
    return f"{number:,} {name}"


def _product(spacing: Sequence[float] | None) -> str:
    return "x".join(f"{mm:.3g}" for mm in spacing) if spacing else "-"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
