"""`summary.json`: machine-readable figures of a quickstart run, validated against a JSON schema."""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import json
import math
import os
import platform
import re
from collections.abc import Mapping
from typing import Any

import jsonschema
import psutil

from vilam3_jax.errors import UserError
from vilam3_jax.evals import statistics
from vilam3_jax.report import runs
from vilam3_jax.runtime import paths

SUMMARY_FILE = "summary.json"
SCHEMA_FILE = "summary.schema.json"
SCHEMA_VERSION = 2
DRIVER_FILE = "quickstart.json"
_PAIRS = (
    ("stage4_experts", "stage4_no_experts"),
    ("stage4_falsified", "stage4_experts"),
    ("stage4_experts", "stage3"),
    ("stage4_experts", "majority"),
    ("stage4_no_experts", "stage4_blank"),
)


def schema() -> dict[str, Any]:
    """The packaged JSON schema (draft 2020-12) of `summary.json`."""
    text = (importlib.resources.files("vilam3_jax.report") / SCHEMA_FILE).read_text(encoding="utf-8")
    return json.loads(text)


def machine() -> dict[str, Any]:
    """Platform, processor, usable cores and memory in bytes of this machine."""
    model = platform.processor() or platform.machine()
    # On Linux, platform.processor() is empty or only the architecture.
    cpuinfo = paths.as_path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "platform": platform.platform(),
        "processor": model or "unknown",
        "cores": usable,
        "memory_bytes": psutil.virtual_memory().total,
    }


def recorded(run_dir: paths.PathLike) -> dict[str, Any]:
    """Machine, versions, peak memory, time and size from the quickstart's record (`quickstart.json`), if any.

    `wall_seconds` is the time of all finished steps, except the download of samples.

    Raises:
      UserError: the file is damaged.
    """
    path = paths.as_path(run_dir) / DRIVER_FILE
    if not path.exists():
        return {}
    record = runs.read_json(path)
    out = {key: record[key] for key in ("machine", "versions", "peak_rss") if key in record}
    try:
        steps = {name: step for name, step in record["steps"].items() if step["finished"]}
        out["wall_seconds"] = float(sum(step["seconds"] for name, step in steps.items() if name != "samples"))
        found = re.search(r"--size (\w+)", steps.get("prepare", {}).get("command", ""))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error!r}); run the quickstart again") from error
    return out | ({"size": found[1]} if found else {})


def summary_of(run: runs.Run) -> dict[str, Any]:
    """Gathers the figures of a quickstart run.

    Returns:
      The document, valid under `schema()`.

    Raises:
      UserError: the quickstart's record is damaged, or a value violates the schema; names it.
    """
    known = recorded(run.folder)
    if "versions" not in known:
        from vilam3_jax.checkpoints import run_checkpoints  # the import of JAX behind it is slow

        known["versions"] = run_checkpoints.versions()
    wanted = schema()
    stage_keys = wanted["$defs"]["stage"]["properties"].keys()
    retrieval_keys = wanted["properties"]["retrieval"]["properties"].keys()
    stages = {s.name: {k: s.result[k] for k in stage_keys if k in s.result} for s in run.stages}
    rows = {arm.name: arm.rows for arm in run.arms}
    accuracies = statistics.summarise(itertools.chain(*rows.values()))
    answerable = statistics.summarise(
        row for own in rows.values() for row in own if row.get("expert") and not row["oracle"]
    )
    pairs = [(rows[first], rows[second]) for first, second in _PAIRS if first in rows and second in rows]
    document = {
        "schema_version": SCHEMA_VERSION,
        "stages": stages,
        "retrieval": {k: run.retrieval[k] for k in retrieval_keys if k in run.retrieval},
        "evaluation": [dataclasses.asdict(one) for one in accuracies],
        "answerable": [
            dataclasses.asdict(one) for one in answerable if one.question_type == statistics.ALL_TYPES
        ],
        "comparisons": [
            {"group": group, **dataclasses.asdict(difference)}
            for group, difference in statistics.paired_differences(pairs)
        ],
        "machine": machine(),
        **known,
        "peak_rss": max(one.get("peak_rss", 0) for one in (known, *stages.values())),
    }
    check(document)
    return document


def check(document: Mapping[str, Any]) -> None:
    """Validates a document against the schema.

    Raises:
      UserError: names the path of the first invalid value, and what was expected.
    """
    for path, value in _leaves(document, "$"):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"summary {path}: {value} is not a JSON number; check how it was computed")
    validator = jsonschema.Draft202012Validator(schema())
    errors = sorted(validator.iter_errors(document), key=lambda error: [str(part) for part in error.path])
    if errors:
        raise UserError(f"summary {errors[0].json_path}: {errors[0].message:.300}; see docs/{SCHEMA_FILE}")


def _leaves(value: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [leaf for key, inner in value.items() for leaf in _leaves(inner, f"{path}.{key}")]
    if isinstance(value, list | tuple):
        return [leaf for i, inner in enumerate(value) for leaf in _leaves(inner, f"{path}[{i}]")]
    return [(path, value)]


def write_summary(run_dir: paths.PathLike, document: Mapping[str, Any]) -> None:
    """Writes a checked document to `run_dir/summary.json` atomically."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    paths.write_text_atomic(paths.as_path(run_dir) / SUMMARY_FILE, text)
