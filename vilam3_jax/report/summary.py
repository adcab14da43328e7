"""`summary.json`: machine-readable figures of a quickstart run, validated against a JSON schema."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema
import psutil

from vilam3_jax.errors import UserError
from vilam3_jax.evals import statistics
from vilam3_jax.report import runs
from vilam3_jax.runtime import paths

SUMMARY_FILE = "summary.json"
SCHEMA_FILE = "summary.schema.json"
SCHEMA_VERSION = 1
DRIVER_FILE = "quickstart.json"
EXTRA = ("machine", "versions", "peak_rss", "wall_seconds", "commit", "size")

_STAGE_KEYS = (
    "steps",
    "tokens",
    "loss_first",
    "loss_last",
    "heldout_first",
    "heldout_true",
    "heldout_swapped",
    "seconds",
    "tokens_per_second",
    "peak_rss",
)
_RETRIEVAL_KEYS = (
    "accuracy",
    "balanced_accuracy",
    "chance",
    "majority",
    "n",
    "clusters",
    "interval",
    "per_cluster",
    "per_class",
)
_PACKAGES = (
    "vilam3-jax",
    "vilam3-experts",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "torch",
)
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


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can affect results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def evaluation(arms: Sequence[runs.Arm]) -> list[statistics.Summary]:
    """Accuracies of all arms by question type and label source; oracle questions are kept separate."""
    return statistics.summarise(row for arm in arms for row in arm.rows)


def comparisons(arms: Sequence[runs.Arm]) -> list[dict[str, Any]]:
    """Paired differences between arms, for three groups of questions.

    `answerable`: questions that an expert can answer and whose label it did not make.
    """
    rows = {arm.name: arm.rows for arm in arms}
    groups = {
        "main": lambda row: not row["oracle"],
        "answerable": lambda row: not row["oracle"] and bool(row.get("expert")),
        "oracle": lambda row: bool(row["oracle"]),
    }
    out = []
    for group, belongs in groups.items():
        for first, second in _PAIRS:
            left = [row for row in rows.get(first, []) if belongs(row)]
            right = [row for row in rows.get(second, []) if belongs(row)]
            if {row["item"] for row in left} & {row["item"] for row in right}:
                out.append({"group": group, **statistics.paired_difference(left, right).to_json()})
    return out


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


def build_summary(run_dir: paths.PathLike, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Gathers the figures of a quickstart run.

    Args:
      run_dir: folder with `stages/` and `eval/`.
      extra: overrides for `machine`, `versions`, `peak_rss` (bytes), `wall_seconds`, `commit`, `size`.

    Returns:
      The document, valid under `schema()`.

    Raises:
      UserError: a file is missing or damaged, or a value violates the schema; names it.
    """
    return summary_of(runs.read_run(run_dir), extra)


def summary_of(run: runs.Run, extra: Mapping[str, Any]) -> dict[str, Any]:
    """`build_summary` for a run that is already loaded."""
    unknown = sorted(set(extra) - set(EXTRA))
    if unknown:
        raise UserError(f"summary: unknown extra value {unknown[0]!r}; known are {', '.join(EXTRA)}")
    stages = {s.name: {k: s.result[k] for k in _STAGE_KEYS if k in s.result} for s in run.stages}
    known = recorded(run.folder)
    peaks = [known.get("peak_rss", 0), *(stage.get("peak_rss", 0) for stage in stages.values())]
    document = {
        "schema_version": SCHEMA_VERSION,
        "stages": stages,
        "retrieval": {k: run.retrieval[k] for k in _RETRIEVAL_KEYS if k in run.retrieval},
        "evaluation": [one.to_json() for one in evaluation(run.arms)],
        "comparisons": comparisons(run.arms),
        "machine": machine(),
        "versions": versions(),
        **known,
        "peak_rss": max(peaks),
        **extra,
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
    """Validates the document and writes `run_dir/summary.json` atomically.

    Raises:
      UserError: the document violates the schema, or the folder cannot be written.
    """
    check(document)
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    paths.write_text_atomic(paths.as_path(run_dir) / SUMMARY_FILE, text)
