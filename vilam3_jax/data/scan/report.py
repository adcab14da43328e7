"""Formats a scan as text and JSON. Neither contains patient data or paths; only `to_paths` does."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import vilam3_jax
from vilam3_jax.data.scan.collect import ScanResult
from vilam3_jax.data.scan.records import AS_IMAGES, AS_VOLUME, NOT_USED, UNDECIDED, FileRecord, SeriesRecord
from vilam3_jax.data.stored_volume import UNKNOWN

SCHEMA_VERSION = 1
_VOLUME_READERS = ("nifti", "nifti pair", "nrrd", "metaimage")
_MAX_TABLE_ROWS = 50
_MAX_LIST_ENTRIES = 20
_MAX_NUMBERS = 12


def to_json(scanned: ScanResult, seconds: float) -> dict[str, Any]:
    """Returns the complete result; docs/data_scan.schema.json is its schema."""
    series, files = scanned.series, scanned.files
    studies = {study: number for number, study in enumerate(dict.fromkeys(one.study for one in series), 1)}
    volumes = [record for record in files if record.reader in _VOLUME_READERS]
    images = [record for record in files if record.reader == "image"]
    other = [record for record in files if record.reader is None and record.problem is None]
    skipped = _skip_reasons(scanned)
    series_rows = [_series_json(number, one, studies) for number, one in enumerate(series, 1)]
    volume_rows = [_volume_json(number, record) for number, record in enumerate(volumes, 1)]
    problems = _by_text(series_rows, volume_rows, _problem).items()
    return {
        "schema": "vilam3.data.scan",
        "schema_version": SCHEMA_VERSION,
        "vilam3": vilam3_jax.__version__,
        "summary": {
            "files": len(files),
            "bytes": sum(record.size for record in files),
            "dicom_files": sum(record.series is not None for record in files),
            "studies": len(studies),
            "series": len({one.id.partition("/")[0] for one in series}),
            "usable_volumes": sum(row["use"] == AS_VOLUME for row in series_rows + volume_rows),
            "undecided_volumes": sum(one.use == UNDECIDED for one in series),
            "usable_images": sum(one.slices for one in series if one.use == AS_IMAGES)
            + sum(record.problem is None for record in images),
            "used_files": len(files) - len(skipped) - len(other),
            "skipped_files": len(skipped),
            "other_files": len(other),
            "seconds": round(seconds, 2),
        },
        "series": series_rows,
        "volumes": volume_rows,
        "images": _images_json(images),
        "problems": [
            {"reason": reason, **numbers}
            for reason, numbers in sorted(problems, key=lambda item: -sum(map(len, item[1].values())))
        ],
        "skipped": [
            {"reason": reason, "files": count}
            for reason, count in collections.Counter(skipped.values()).most_common()
        ],
        "other_files": [
            {"kind": kind, "advice": advice, "files": count}
            for (kind, advice), count in collections.Counter((r.kind, r.advice) for r in other).most_common()
        ],
        "not_files": [{"reason": reason, "entries": n} for reason, n in scanned.skipped.most_common()],
    }


def _skip_reasons(scanned: ScanResult) -> dict[int, str]:
    """Returns file index -> reason, for all skipped files of supported kinds."""
    used = {index for one in scanned.series if one.use != NOT_USED for index in one.files}
    reasons: dict[int, str] = {}
    for one in scanned.series:
        if one.use == NOT_USED and one.problem is not None:
            reasons |= dict.fromkeys(one.files, one.problem)
        for reason, files in one.skipped.items():
            reasons |= dict.fromkeys(files, reason)
    reasons |= {record.index: record.problem for record in scanned.files if record.problem is not None}
    return {index: reasons[index] for index in sorted(reasons) if index not in used}


def _series_json(number: int, one: SeriesRecord, studies: dict[str, int]) -> dict[str, Any]:
    thickness = _rounded(None if one.thickness_mm is None else [one.thickness_mm])
    return {
        "number": number,
        **vars(one),
        "study": studies[one.study],
        "files": len(one.files),
        "spacing_mm": _rounded(one.spacing_mm),
        "thickness_mm": thickness[0] if thickness else None,
        "notes": list(one.notes),
        "skipped": [{"reason": reason, "files": len(files)} for reason, files in one.skipped.items()],
    }


def _volume_json(number: int, record: FileRecord) -> dict[str, Any]:
    grid = record.grid
    return {
        "number": number,
        "kind": record.kind,
        "use": AS_VOLUME if record.problem is None else NOT_USED,
        "shape": list(grid.shape) if grid.shape else None,
        "spacing_mm": _rounded(grid.spacing_mm),
        "orientation": grid.orientation,
        "modality": grid.modality,
        "body_part": grid.body_part,
        "problem": record.problem,
        "notes": list(grid.notes),
    }


def _images_json(images: Iterable[FileRecord]) -> list[dict[str, Any]]:
    kinds: dict[str, list[FileRecord]] = collections.defaultdict(list)
    for record in images:
        kinds[record.kind].append(record)
    rows = []
    for kind, records in sorted(kinds.items(), key=lambda item: -len(item[1])):
        usable = [record for record in records if record.problem is None]
        sizes = sorted(((record.width, record.height) for record in usable), key=math.prod)
        rows.append(
            {
                "kind": kind,
                "files": len(records),
                "usable": len(usable),
                "several_pages": sum(record.frames > 1 for record in usable),
                "smallest": list(sizes[0]) if sizes else None,
                "largest": list(sizes[-1]) if sizes else None,
            }
        )
    return rows


_Numbers = dict[str, list[int]]


def _by_text(
    series: list[dict[str, Any]], volumes: list[dict[str, Any]], texts: Callable[[Any], list[str]]
) -> dict[str, _Numbers]:
    """Maps each text of a row (a problem or a note) to the numbers of the series and volumes that have it."""
    found: dict[str, _Numbers] = {}
    for name, rows in (("series", series), ("volumes", volumes)):
        for row in rows:
            for text in texts(row):
                found.setdefault(text, {"series": [], "volumes": []})[name].append(row["number"])
    return found


def _problem(row: dict[str, Any]) -> list[str]:
    return [row["problem"]] if row["use"] == NOT_USED and row["problem"] is not None else []


def to_text(result: dict[str, Any]) -> str:
    """Formats the result of `to_json` for a terminal of 110 columns; truncates long lists with a count."""
    summary = result["summary"]
    lines = [
        f"{_count(summary['files'], 'file')}, {summary['bytes'] / 1e9:,.2f} GB, "
        f"headers read in {summary['seconds']:,.1f} s",
        f"  DICOM      {_count(summary['dicom_files'], 'file')}, {_count(summary['studies'], 'study')}, "
        f"{summary['series']:,} series",
        f"  usable     {_count(summary['usable_volumes'], 'volume')} and "
        f"{_count(summary['usable_images'], 'image')} from {_count(summary['used_files'], 'file')}",
        f"  skipped    {_count(summary['skipped_files'], 'file')}",
        f"  other      {_count(summary['other_files'], 'file')} of unsupported kinds",
    ]
    if summary["undecided_volumes"]:
        lines.append(
            f"  undecided  {_count(summary['undecided_volumes'], 'volume')} with two slices at one position, "
            "usable if their pixels are equal"
        )
    problems = {entry["reason"]: number for number, entry in enumerate(result["problems"], 1)}
    notes = _by_text(result["series"], result["volumes"], lambda row: row["notes"])
    lines += _table("DICOM series", _SERIES_HEADS, [_cells(row, problems) for row in result["series"]])
    lines += _table("Volume files", _VOLUME_HEADS, [_cells(row, problems) for row in result["volumes"]])
    lines += _table("Image files", _IMAGE_HEADS, [_image_cells(row) for row in result["images"]])
    lines += _listed(
        "Problems", [f"({problems[e['reason']]}) {e['reason']}: {_where(e)}" for e in result["problems"]]
    )
    lines += _listed("Skipped files", [f"{e['files']:>7,}  {e['reason']}" for e in result["skipped"]])
    other = [
        f"{e['files']:>7,}  {e['kind']}" + f": {e['advice']}" * bool(e["advice"])
        for e in result["other_files"]
    ]
    lines += _listed("Other files", other)
    lines += _listed("Not scanned", [f"{e['entries']:>7,}  {e['reason']}" for e in result["not_files"]])
    lines += _listed("Reader assumptions", [f"{note}: {_where(numbers)}" for note, numbers in notes.items()])
    lines += ["", "Next steps", *_next_commands(result)]
    return "\n".join(lines) + "\n"


_SERIES_HEADS = ("#", "id", "study", "modality", "body part", "grid", "spacing mm", "plane", "thick", "use")
_VOLUME_HEADS = ("#", "kind", "modality", "body part", "grid", "spacing mm", "axes", "use")
_IMAGE_HEADS = ("files", "usable", "kind", "smallest", "largest", "multi-page")
_RIGHT_ALIGNED = {"#", "study", "thick", "files", "usable", "multi-page"}
_MAX_WIDTHS = {"body part": 14, "kind": 24}


def _cells(row: dict[str, Any], problems: dict[str, int]) -> dict[str, str]:
    """Formats the columns of a series or a volume."""
    shape = row["shape"] if "shape" in row else row["slices"] and [row["columns"], row["rows"], row["slices"]]
    use = f"no ({problems.get(row['problem'], '-')})" if row["use"] == NOT_USED else row["use"]
    cells = {
        "#": str(row["number"]),
        "modality": row["modality"],
        "body part": row["body_part"],
        "grid": _product(shape, "d"),
        "spacing mm": _product(row["spacing_mm"]),
    }
    if "shape" in row:
        return cells | {"kind": row["kind"], "axes": row["orientation"] if shape else "-", "use": use}
    return cells | {
        "id": row["id"],
        "study": str(row["study"]),
        "plane": row["plane"] if row["plane"] != UNKNOWN else "-",
        "thick": "-" if row["thickness_mm"] is None else f"{row['thickness_mm']:g}",
        "use": (row["kind"] if row["use"] == AS_IMAGES else use) + ", localizer" * row["localizer"],
    }


def _image_cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "files": f"{row['files']:,}",
        "usable": f"{row['usable']:,}",
        "kind": row["kind"],
        "smallest": _product(row["smallest"], "d"),
        "largest": _product(row["largest"], "d"),
        "multi-page": str(row["several_pages"]),
    }


def _product(numbers: Sequence[float] | None, spec: str = ".3g") -> str:
    return "x".join(format(number, spec) for number in numbers) if numbers else "-"


def _table(title: str, heads: Sequence[str], rows: Sequence[dict[str, str]]) -> list[str]:
    shown = [[_cut(row[head], _MAX_WIDTHS.get(head, 40)) for head in heads] for row in rows[:_MAX_TABLE_ROWS]]
    widths = [max(map(len, column)) for column in zip(heads, *shown, strict=True)]
    aligns = [">" if head in _RIGHT_ALIGNED else "<" for head in heads]
    lines = [
        "  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(cells, aligns, widths, strict=True))
        for cells in [heads, *shown]
    ]
    return _listed(title, lines, len(rows) + 1, _MAX_TABLE_ROWS + 1) if rows else []


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _listed(
    title: str, entries: Sequence[str], total: int | None = None, limit: int = _MAX_LIST_ENTRIES
) -> list[str]:
    if not entries:
        return []
    more = (total or len(entries)) - limit
    lines = ["", title, *(f"  {entry}".rstrip() for entry in entries[:limit])]
    return [*lines, f"  and {more:,} more; --json FILE has all"] if more > 0 else lines


def _where(numbers: dict[str, Any]) -> str:
    """Formats numbers by kind, such as "series 1, 2; volumes 3"; truncates long lists."""
    parts = []
    for name in ("series", "volumes"):
        more = len(numbers[name]) - _MAX_NUMBERS
        listed = ", ".join(map(str, numbers[name][:_MAX_NUMBERS])) + (
            f" and {more:,} more" if more > 0 else ""
        )
        parts += [f"{name} {listed}"] if listed else []
    return "; ".join(parts)


def _next_commands(result: dict[str, Any]) -> list[str]:
    """Suggests commands for what was found, with placeholders for paths, which a report never contains."""
    series = [one for one in result["series"] if one["use"] == AS_VOLUME]
    series = [one for one in series if not one["localizer"]] or series
    volume_files = any(one["use"] == AS_VOLUME for one in result["volumes"])
    images = any(one["usable"] for one in result["images"])
    dicom_images = any(one["use"] == AS_IMAGES for one in result["series"])
    lines = []
    if series:
        largest = max(series, key=lambda one: one["slices"])
        lines.append(
            f"  vilam3 chat --checkpoint=EXPORT --image=FOLDER --series={largest['id']} --prompt=..."
        )
    if volume_files or images or dicom_images:
        lines.append("  vilam3 chat --checkpoint=EXPORT --image=FILE --prompt=...")
    if series or volume_files:
        lines.append("  vilam3-experts annotate --expert=NAME --data=FOLDER --out=ANNOTATIONS")
    if result["summary"]["dicom_files"]:
        lines.append("  vilam3 data deidentify --source=FOLDER --out=COPY  # before you share anything")
    return lines or ["  no readable images; give the folder that contains them"]


def to_paths(scanned: ScanResult, folder: str) -> dict[str, Any]:
    """Maps the ids and numbers of the report to paths. The result may identify patients."""
    by_reason: dict[str, list[str]] = collections.defaultdict(list)
    for index, reason in _skip_reasons(scanned).items():
        by_reason[reason].append(scanned.paths[index])
    by_kind: dict[str, list[str]] = collections.defaultdict(list)
    for record in scanned.files:
        if record.reader is None and record.problem is None:
            by_kind[record.kind].append(scanned.paths[record.index])
    volumes = [record for record in scanned.files if record.reader in _VOLUME_READERS]
    return {
        "schema": "vilam3.data.scan.paths",
        "schema_version": SCHEMA_VERSION,
        "warning": "File and folder names may identify patients. Store this file with the images.",
        "folder": folder,
        "series": {one.id: [scanned.paths[index] for index in one.files] for one in scanned.series},
        "volumes": {str(number): scanned.paths[record.index] for number, record in enumerate(volumes, 1)},
        "images": [scanned.paths[record.index] for record in scanned.files if record.reader == "image"],
        "skipped": by_reason,
        "other_files": by_kind,
    }


def _rounded(lengths: Sequence[float] | None) -> list[float] | None:
    """Rounds to four significant digits; None if a value is not finite, which JSON cannot represent."""
    if lengths is None or not all(map(math.isfinite, lengths)):
        return None
    return [float(f"{mm:.4g}") for mm in lengths]


def _count(number: int, name: str) -> str:
    if number != 1:
        name = f"{name.removesuffix('y')}ies" if name.endswith("y") else f"{name}s"
    return f"{number:,} {name}"
