"""Renders the report's pages from Jinja2 templates, with autoescaping."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
import importlib.resources
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe

from vilam3_jax.errors import UserError
from vilam3_jax.evals import statistics, tables
from vilam3_jax.report import answers, charts, dialogues, finding, formatting, plots, runs
from vilam3_jax.report.samples import Samples

Entry = Mapping[str, Any]

_SIZES = {"smoke": "smoke run on phantoms", "default": "short run", "full": "full run"}
_BESIDE_STEPS = {
    "compile_seconds": "Compilation",
    "evaluation_seconds": "Evaluation",
    "checkpoint_stall": "Checkpoint stalls",
}

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("vilam3_jax.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= dict(inspect.getmembers(formatting, inspect.isfunction))
_ENVIRONMENT.globals |= {
    "key_mark": plots.key_mark,
    "highlighted": formatting.HIGHLIGHTED_ARM,
    "min_clusters": statistics.MIN_CLUSTERS,
}


def quickstart_page(run: runs.Run, document: Mapping[str, Any], samples: Samples, answers_file: str) -> str:
    """The page of a quickstart run.

    Args:
      run: stages and arms.
      document: the summary of the run.
      samples: the images.
      answers_file: the page of all answers, in the same folder.
    """
    answerable = {one["arm"]: one for one in document["answerable"]}
    shown = {arm: answerable[arm] for arm in runs.ARMS if arm in answerable}
    return _render(
        "quickstart.html",
        answers_file=answers_file,
        size=_SIZES.get(document.get("size", ""), "run"),
        model=model_text(run.stages[-1].config.get("model", {})),
        document=document,
        finding=finding.sentence(document),
        finding_panel=charts.arms_panel(shown, "Questions that an expert can answer") if shown else None,
        contrasts=[(one, samples.images(one.row)) for one in finding.contrasts(run.arms)],
        retrieval=run.retrieval,
        loss=[charts.loss_panel(stage) for stage in run.stages],
        throughput_panels=[charts.throughput_panel(stage) for stage in run.stages],
        questions=[arms_table(document["evaluation"], oracle=oracle) for oracle in (False, True)],
        titles=(tables.MAIN_TITLE, tables.ORACLE_TITLE),
        pairs=list(dict.fromkeys((one["first"], one["second"]) for one in document["comparisons"])),
        comparisons={(one["first"], one["second"], one["group"]): one for one in document["comparisons"]},
        behaviour=[behaviour(arm) for arm in run.arms],
        dialogues=[(row, samples.images(row)) for row in dialogues.choose(run.arms)],
        licences=samples.licences(),
    )


def training_page(stage: runs.Stage, answers_file: str | None = None) -> str:
    """The page of one training run: charts, and the table of figures once it is finished.

    Args:
      stage: the run.
      answers_file: the page of all answers, in the same folder; None without evaluations.
    """
    beside_steps = []
    for key, name in _BESIDE_STEPS.items():
        seconds = [row[key] for row in stage.metrics if formatting.is_number(row.get(key))]
        if seconds:
            total = formatting.duration(sum(seconds))
            beside_steps.append((name, f"{len(seconds)} ×, {total} in total"))
    return _render(
        "training.html",
        answers_file=answers_file,
        stage=stage,
        model=model_text(stage.config.get("model", {})),
        beside_steps=beside_steps,
        loss=[charts.loss_panel(stage)],
        metric_panels=charts.metric_panels(stage),
    )


def answers_page(found: answers.Answers, name: str) -> str:
    """The page of all questions, with filters.

    Args:
      found: questions, answers and images.
      name: of the run.
    """
    rows = [row for arm in found.arms for row in arm.rows]
    summaries = [dataclasses.asdict(one) for arm in found.arms for one in _summaries(arm)]
    main, oracle = (arms_table(summaries, oracle=oracle) for oracle in (False, True))
    types = sorted({str(row["question_type"]) for row in rows})
    called = sorted({str(row["expert_called"]) for row in rows if row.get("expert_called")})
    choices = [("any", "any expert"), ("=", "no expert"), *((f"={expert}", expert) for expert in called)]
    script = (importlib.resources.files("vilam3_jax.report") / "templates" / "answers.js").read_text("utf-8")
    return _render(
        "answers.html",
        answers=found,
        name=name,
        main=main,
        oracle=oracle if oracle["rows"] else None,
        conditions={arm.name: _conditions(arm) for arm in found.arms},
        types=[(one, formatting.type_title(one)) for one in types],
        arms=[(arm.name, formatting.arm_title(arm.name)) for arm in found.arms],
        called=choices if called else [],
        script=markupsafe.Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _summaries(arm: runs.Arm) -> list[statistics.Summary]:
    """The figures that `vilam3 evaluate` stored, or, without them, those of the rows; a bootstrap is slow."""
    stored = arm.result.get("summaries")
    if stored is None:
        return statistics.summarise(arm.rows)
    try:
        return [statistics.Summary(**{**one, "arm": arm.name}) for one in stored]
    except TypeError as error:
        raise UserError(f"{arm.name}/result.json: 'summaries' is damaged; evaluate again") from error


def _conditions(arm: runs.Arm) -> str:
    """How an arm answered, in a few words."""
    if arm.is_majority:
        return "without a model"
    experts = {"on": "with experts", "falsified": "with falsified experts"}.get(
        arm.experts, "without experts"
    )
    return experts + (", blank images" if arm.images == "blank" else "")


def _render(template: str, **context: Any) -> str:
    time = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = _ENVIRONMENT.get_template(template).render(time=time, **context)
    return page.encode("utf-8", "replace").decode()  # a model may write halves of a character


def model_text(model: Mapping[str, Any]) -> str:
    """Summarizes a model config in one line."""
    if not model:
        return "not recorded"
    out = [str(model.get("name") or "unnamed")]
    for key, name in (("vision_tower", "vision tower"), ("llm", "language model")):
        part = model.get(key) or {}
        if part.get("num_layers") and part.get("hidden_size"):
            out.append(f"{name} of {part['num_layers']} layers × {part['hidden_size']}")
    if model.get("image_size"):
        out.append(f"images of {model['image_size']} × {model['image_size']}")
    return ", ".join(out)


def arms_table(evaluation: Sequence[Entry], *, oracle: bool) -> dict[str, Any]:
    """Arranges accuracies with question types down and arms across.

    Args:
      evaluation: evaluation of the summary.
      oracle: which group of questions.

    Returns:
      `arms`: names; `totals`: arm -> entry over all types; `panel`: their chart, if any; `rows`: `type`,
      `source`, `cells` (arm -> entry), `equal` (all arms have the same n and clusters), `few` (no arm has an
      interval), `volumes` (those with values of their own).
    """
    entries = [one for one in evaluation if one["oracle"] == oracle]
    groups: dict[tuple[str, str], dict[str, Entry]] = {}
    for one in entries:
        groups.setdefault((one["question_type"], one["label_source"]), {})[one["arm"]] = one
    rows = [
        {
            "type": kind,
            "source": source,
            "cells": cells,
            "equal": len({(one["n"], one["clusters"]) for one in cells.values()}) == 1,
            "few": all(one["interval"] is None for one in cells.values()),
            "volumes": sorted({name for one in cells.values() for name in one.get("per_cluster") or {}}),
        }
        for (kind, source), cells in sorted(groups.items(), key=lambda item: (item[0][0] != "all", item[0]))
    ]
    totals = {one["arm"]: one for one in entries if one["question_type"] == "all"}
    name = "Oracle questions" if oracle else "Main questions"
    return {
        "arms": list(dict.fromkeys(one["arm"] for one in entries)),
        "totals": totals,
        "panel": charts.arms_panel(totals, f"{name}, all types") if totals else None,
        "rows": rows,
    }


def behaviour(arm: runs.Arm) -> dict[str, Any]:
    """Shares of unparsed answers, of questions with an expert call, and of calls to the matching expert."""
    offered = (arm.result.get("arm") or {}).get("experts") != "off"
    called = [bool(row["trigger"]) for row in arm.rows if offered and "trigger" in row]
    matched = [
        row.get("expert_right") is True
        for row in arm.rows
        if offered and "trigger" in row and row.get("expert")
    ]
    unparsed = [bool(row["unparsed"]) for row in arm.rows]
    shares = [sum(flags) / len(flags) if flags else None for flags in (unparsed, called, matched)]
    return {"arm": arm.name, "questions": len(arm.rows), "shares": shares}
