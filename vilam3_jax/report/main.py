"""`vilam3 report`: charts and tables of a run as one HTML file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vilam3_jax.errors import UserError
from vilam3_jax.report import finding, pages, runs, summary
from vilam3_jax.report.samples import Samples
from vilam3_jax.runtime import paths

REPORT_FILE = "report.html"


def write_report(workdir: paths.PathLike, out: paths.PathLike | None = None) -> tuple[str, str]:
    """Writes the report of a quickstart run (with its `summary.json`) or of one training run.

    Args:
      workdir: folder of the run.
      out: the HTML file; `workdir/report.html` by default.

    Returns:
      Path of the HTML file, and what a quickstart run shows, in one sentence ('' for a training run).

    Raises:
      UserError: a file is missing or damaged; names it. Nothing is written then.
    """
    folder = paths.as_path(workdir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a run")
    target = paths.as_path(out) if out else folder / REPORT_FILE
    shown = ""
    if (folder / "stages").is_dir():
        run = runs.read_run(folder)
        document = summary.summary_of(run)
        page = pages.quickstart_page(run, document, Samples(folder))
        summary.write_summary(folder, document)
        shown = finding.sentence(document)
    elif (folder / "metrics.jsonl").exists():
        page = pages.training_page(runs.read_stage(folder, finished=False))
    else:
        raise UserError(
            f"{folder}: has neither stages/ (quickstart run) nor metrics.jsonl (training run); "
            "give the folder of a run"
        )
    paths.write_text_atomic(target, page)
    return str(target), shown


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 report`."""
    parser = argparse.ArgumentParser(
        prog="vilam3 report", description="Writes charts and tables of a run as one self-contained HTML file."
    )
    parser.add_argument("--workdir", required=True, help="folder of a quickstart run or of one training run")
    parser.add_argument("--out", help="the HTML file to write (default: WORKDIR/report.html)")
    args = parser.parse_args(argv)
    target, shown = write_report(args.workdir, args.out)
    print(f"{shown}\n{target}".strip())
    return 0
