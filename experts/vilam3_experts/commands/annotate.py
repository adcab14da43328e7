"""`vilam3-experts annotate`: run an expert over a data set."""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from vilam3_experts import descriptors as registry
from vilam3_experts.annotate import annotate
from vilam3_experts.inputs import Input
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.errors import UserError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "annotate",
        help="run an expert over a data set",
        description="Runs an expert over every scan it is meant for. Started again, it goes on where it was."
        " Failed scans are named and put aside.",
    )
    parser.add_argument("--expert", required=True, help="name of the expert, see `list`")
    parser.add_argument("--data", required=True, help="samples folder, or a folder or file of scans")
    parser.add_argument("--out", required=True, help="annotation store, local or gs://")
    parser.add_argument("--args", help="the expert's argument (default: its first)")
    parser.add_argument("--weights", help="folder of the model files (default: the samples folder)")
    parser.add_argument("--retry-failed", action="store_true", help="run failed scans again")
    parser.add_argument("--limit", type=int, help="stop after this many scans")
    parser.add_argument("--verbose", action="store_true", help="print every result")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""

    def show(item: Input, annotation: Annotation) -> None:
        tqdm.write(f"{item.name}: {describe(annotation)}")

    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: give a positive number")
    summary = annotate(
        registry.get(options.expert),
        options.data,
        options.out,
        args=options.args,
        weights=options.weights,
        retry_failed=options.retry_failed,
        limit=options.limit,
        show=show if options.verbose else None,
    )
    for name, reason in summary.problems:
        print(f"problem: {name}: {reason}", file=sys.stderr)
    if summary.notes:
        scans = len({name for name, _ in summary.notes})
        print(f"{scans} scans with notes on what was assumed or skipped: notes-{options.expert}.json")
    print(f"{options.expert}: {summary.line()}; store {options.out}")
    done = summary.counts["annotated"] + summary.counts["skipped"]
    return 0 if done else 1


def describe(annotation: Annotation) -> str:
    """One line on an annotation, for people."""
    if annotation.status == "failed":
        return f"failed: {annotation.reason}"
    parts = [f"{n} {p:.3f}" for n, p in annotation.probabilities.items()]
    parts += [f"{s.name} {s.volume_ml:.1f} ml" for s in annotation.segments]
    return f"{', '.join(parts) or 'nothing found'} ({annotation.seconds:.1f} s)"
