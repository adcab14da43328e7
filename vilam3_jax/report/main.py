"""`vilam3 report`: plots and tables of a run as one HTML file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from vilam3_jax.errors import UserError
from vilam3_jax.report import captions, dialogues, html, pictures, plots, runs, summary, telemetry
from vilam3_jax.runtime import paths

REPORT_FILE = "report.html"
_SECTIONS = (
    ("training", "Training"),
    ("retrieval", "Retrieval"),
    ("main", "Main table"),
    ("oracle", "Oracle table"),
    ("dialogues", "Dialogues"),
    ("licences", "Licences"),
    ("notes", "What the words mean"),
)


def quickstart_page(run: runs.Run, document: dict[str, Any], source: pictures.Source) -> str:
    """The page of a quickstart run.

    Args:
      run: what was read from its folder.
      document: its summary.
      source: where pictures and licences come from.
    """
    entries = document["evaluation"]
    shown = dialogues.dialogues(dialogues.choose(run.arms), source.pictures)
    body = [
        f'<p class="lead">{html.text(headline(document))}</p>',
        html.facts(_facts(run, document)),
        html.figure(
            plots.pipeline(vertical=False).replace('class="pipeline"', 'class="pipeline wide"')
            + plots.pipeline(vertical=True).replace('class="pipeline"', 'class="pipeline tall"'),
            captions.PIPELINE_CAPTION,
        ),
        html.section(
            "training",
            "Five runs, each from the one before",
            html.loss_panels(run.stages),
            html.stage_table(document["stages"]),
            "<h3>Speed</h3>",
            html.throughput_panels(run.stages),
        ),
        html.section(
            "retrieval", "Did the vision tower learn anything?", html.retrieval_table(run.retrieval)
        ),
        html.section(
            "main",
            html.MAIN_HEADING,
            html.figure(
                f'<div class="panels broad">{html.arms_figure(entries, oracle=False)}'
                f"{html.arms_figure(entries, oracle=True)}</div>",
                captions.ARMS_CAPTION,
            ),
            html.arms_table(entries, oracle=False, caption=captions.MAIN_CAPTION),
            "<h3>Differences between arms</h3>",
            html.comparisons_table(document["comparisons"]),
            "<h3>How the arms answered</h3>",
            html.behaviour_table(run.arms),
        ),
        html.section(
            "oracle",
            html.ORACLE_HEADING,
            f"<p>{html.text(captions.ORACLE_TEXT)}</p>",
            html.arms_table(entries, oracle=True, caption=captions.ORACLE_CAPTION),
        ),
        html.section(
            "dialogues",
            "Sample dialogues",
            f"<p>{html.text(captions.DIALOGUE_TEXT)}</p>",
            html.dialogue_cards(shown),
        ),
        html.section("licences", "Licences of the samples", html.licence_table(source.licences())),
        html.section("notes", "What the words mean", html.footnotes(captions.FOOTNOTES)),
    ]
    kind = captions.SIZES.get(document.get("size", ""), "run")
    return html.page(
        "A small VILA\u2011M3, trained from end to end", f"vilam3_jax · quickstart · {kind}", body, _SECTIONS
    )


def headline(document: dict[str, Any]) -> str:
    """The result in one paragraph, whatever it is."""
    totals = {
        (one["arm"], one["oracle"]): one for one in document["evaluation"] if one["question_type"] == "all"
    }

    def said(arm: str, oracle: bool) -> str | None:
        one = totals.get((arm, oracle))
        return captions.percent(one["accuracy"]) if one else None

    parts = []
    for oracle, where in ((False, "questions whose labels no expert made"), (True, "oracle questions")):
        names = ("stage4_experts", "stage4_no_experts", "stage4_falsified", "majority")
        values = [said(arm, oracle) for arm in names]
        if None not in values:
            one = totals[names[0], oracle]
            parts.append(
                f"On {one['n']} held-out {where} (from {one['clusters']} volumes), the last model is right "
                f"in {values[0]} with its experts, {values[1]} without, {values[2]} when they are falsified; "
                f"the majority answer gets {values[3]}."
            )
    return " ".join(parts)


def _facts(run: runs.Run, document: dict[str, Any]) -> list[tuple[str, str]]:
    machine = document["machine"]
    trained = sum(stage["seconds"] for stage in document["stages"].values())
    pairs = [
        ("Model", _model_words(run.stages[-1].config.get("model", {}))),
        (
            "Machine",
            f"{machine['processor']}, {machine['cores']} cores, {captions.size(machine['memory_bytes'])}",
        ),
        ("System", str(machine["platform"])),
        ("Factors of matrix products", str(machine.get("matmul_precision", "not recorded"))),
        ("Training, five runs", captions.duration(trained)),
        ("Peak memory of a process", captions.size(document["peak_rss"])),
        ("Versions", ", ".join(f"{name} {version}" for name, version in document["versions"].items())),
    ]
    if "wall_seconds" in document:
        pairs.insert(3, ("Everything, without fetching", captions.duration(document["wall_seconds"])))
    if document.get("commit"):
        pairs.append(("Source", str(document["commit"])))
    return pairs


def _model_words(model: dict[str, Any]) -> str:
    """One line about the model, of what its config tells."""
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


def training_page(stage: runs.Stage) -> str:
    """The page of one training run: curves, and the table once it is finished."""
    model = stage.config.get("model", {})
    last = stage.metrics[-1]["step"] if stage.metrics else 0
    planned = stage.config.get("num_steps")
    steps = captions.count(last) + (f" of {captions.count(planned)}" if planned else "")
    body = [
        html.facts([("Model", _model_words(model)), ("Step", steps), *telemetry.asides(stage)]),
        html.section("training", "Loss", html.loss_panels([stage])),
        html.section("speed", "Speed, rates and waits", telemetry.panels(stage)),
    ]
    if stage.result:
        body.append(html.section("figures", "Figures", html.stage_table({stage.name: stage.result})))
    return html.page(captions.stage_title(stage.name), "vilam3_jax · one training run", body)


def write_report(workdir: paths.PathLike, out: paths.PathLike | None = None) -> str:
    """Writes the report of a quickstart run (with its `summary.json`) or of one training run.

    Args:
      workdir: folder of the run.
      out: the HTML file; `workdir/report.html` by default.

    Returns:
      Path of the HTML file.

    Raises:
      UserError: a file is missing or damaged; names it. Nothing is written then.
    """
    folder = paths.as_path(workdir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run")
    target = paths.as_path(out) if out else folder / REPORT_FILE
    if runs.is_quickstart(folder):
        run = runs.read_run(folder)
        document = summary.summary_of(run, {})
        page = quickstart_page(run, document, pictures.Source(folder))
        summary.write_summary(folder, document)
    elif (folder / "metrics.jsonl").exists():
        page = training_page(runs.read_stage(folder, finished=False))
    else:
        raise UserError(
            f"{folder}: neither stages/ (a quickstart run) nor metrics.jsonl (a training run) is there; "
            "give the folder of a run"
        )
    paths.write_text_atomic(target, page)
    return str(target)


def main(argv: Sequence[str]) -> int:
    """Entry of `vilam3 report`."""
    parser = argparse.ArgumentParser(
        prog="vilam3 report",
        description="Plots and tables of a run as one HTML file that needs nothing else.",
    )
    parser.add_argument("--workdir", required=True, help="folder of a quickstart run or of one training run")
    parser.add_argument("--out", help="the HTML file to write (default: WORKDIR/report.html)")
    args = parser.parse_args(argv)
    print(write_report(args.workdir, args.out))
    return 0


if __name__ == "__main__":
    from vilam3_jax.cli import guarded

    sys.exit(guarded("report", main, sys.argv[1:]))
