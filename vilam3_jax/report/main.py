"""`vilam3 report`: charts and tables of a run as one HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from vilam3_jax.errors import UserError
from vilam3_jax.report import answers, finding, pages, runs, summary
from vilam3_jax.report.samples import Samples
from vilam3_jax.runtime import paths

REPORT_FILE = "report.html"


class Written(NamedTuple):
    """What a report wrote.

    Attributes:
      pages: paths of the HTML files: the report, then the page of all answers, if there are evaluations.
      notes: sentences for the console.
    """

    pages: tuple[str, ...]
    notes: tuple[str, ...]


def write_report(
    workdir: paths.PathLike,
    out: paths.PathLike | None = None,
    *,
    evaluations: Sequence[paths.PathLike] = (),
    questions: int = answers.MAX_QUESTIONS,
) -> Written:
    """Writes the report of a quickstart run (with its `summary.json`), a training run or an evaluation.

    The page of all answers is beside the report, as `report_answers.html`. An evaluation without a run has
    no other page.

    Args:
      workdir: folder of the run, or one that `vilam3 evaluate --out` wrote.
      out: the HTML file; `workdir/report.html` by default.
      evaluations: folders that `vilam3 evaluate --out` wrote; by default those in `workdir/eval`.
      questions: maximum number of questions on the page of answers.

    Raises:
      UserError: a file is missing or damaged; names it. Nothing is written then.
    """
    if questions < 1:
        raise UserError(f"--questions={questions}: must be at least 1")
    folder = paths.as_path(workdir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run")
    target = paths.as_path(out) if out else folder / REPORT_FILE
    beside = target.parent / f"{target.stem}_answers.html"
    written: dict[epath.Path, str] = {}
    notes: tuple[str, ...] = ()
    found = document = None
    if (folder / "stages").is_dir():
        if evaluations:
            raise UserError(f"--evaluation: {folder} is a quickstart run, whose evaluations are in eval/")
        run = runs.read_run(folder)
        document = summary.summary_of(run)
        data, annotations = folder / "data", folder / "annotations"
        found = answers.collect(run.arms, limit=questions, data=data, annotations=annotations)
        written[target] = pages.quickstart_page(run, document, Samples(data, annotations), beside.name)
        notes = (finding.sentence(document),)
    else:
        arms = _arms(folder, evaluations)
        found = answers.collect(arms, limit=questions) if arms else None
        if (folder / "metrics.jsonl").exists():
            stage = runs.read_stage(folder, finished=False)
            written[target] = pages.training_page(stage, beside.name if found else None)
        elif found:
            beside = target
        else:
            raise UserError(
                f"{folder}: has neither stages/ (quickstart run) nor metrics.jsonl (training run) nor "
                "rows.jsonl (evaluation); give the folder of a run"
            )
    if found:
        written[beside] = pages.answers_page(found, folder.name)
        notes += found.notes
    if document:
        summary.write_summary(folder, document)
    for path, page in written.items():
        paths.write_text_atomic(path, page)
    return Written(tuple(map(str, written)), notes)


def _arms(folder: epath.Path, evaluations: Sequence[paths.PathLike]) -> list[runs.Arm]:
    if not evaluations:
        trained = (folder / "metrics.jsonl").exists()
        return runs.read_evaluations(runs.evaluations_in(folder / "eval" if trained else folder))
    found: list[epath.Path] = []
    for given in evaluations:
        found += (those := runs.evaluations_in(given))
        if not those:
            raise UserError(f"--evaluation={given}: no rows.jsonl and result.json; evaluate first")
    return runs.read_evaluations(found)


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 report`."""
    parser = argparse.ArgumentParser(
        prog="vilam3 report",
        description="Writes charts and tables of a run, and all answers, as self-contained HTML files.",
    )
    add = parser.add_argument
    add(
        "--workdir",
        required=True,
        help="folder of a quickstart run, of one training run, or of an evaluation",
    )
    add("--out", help="the HTML file to write (default: WORKDIR/report.html)")
    add(
        "--evaluation",
        action="append",
        default=[],
        metavar="DIR",
        help="folder that `vilam3 evaluate --out` wrote; may be repeated (default: those in WORKDIR/eval)",
    )
    add(
        "--questions",
        type=int,
        default=answers.MAX_QUESTIONS,
        help=f"maximum questions on the page of answers (default: {answers.MAX_QUESTIONS})",
    )
    args = parser.parse_args(argv)
    written = write_report(args.workdir, args.out, evaluations=args.evaluation, questions=args.questions)
    print("\n".join((*written.notes, *written.pages)))
    return 0
