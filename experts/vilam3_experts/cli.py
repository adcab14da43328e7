"""`vilam3-experts`: run experts over data, list them, check their weights, serve them live."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from tqdm import tqdm

from vilam3_experts import __version__
from vilam3_experts import descriptors as registry
from vilam3_experts.annotate import annotate
from vilam3_experts.host import serve_stdio
from vilam3_experts.inputs import Input
from vilam3_experts.weights import locate, read_checked
from vilam3_jax.data.experts.store import Annotation
from vilam3_jax.errors import UserError, use_one_line_notes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vilam3-experts", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)

    over = commands.add_parser(
        "annotate",
        help="run an expert over a data set",
        description="Runs an expert over every scan it is meant for. Started again, it goes on where it was."
        " Failed scans are named and put aside.",
    )
    over.add_argument("--expert", required=True, help="name of the expert, see `list`")
    over.add_argument("--data", required=True, help="samples folder, or a folder or file of scans")
    over.add_argument("--out", required=True, help="annotation store, local or gs://")
    over.add_argument("--args", help="the expert's argument (default: its first)")
    over.add_argument("--weights", help="folder of the model files (default: the samples folder)")
    over.add_argument("--retry-failed", action="store_true", help="run failed scans again")
    over.add_argument("--limit", type=int, help="stop after this many scans")
    over.add_argument("--verbose", action="store_true", help="print every result")
    over.set_defaults(run=_annotate)

    listing = commands.add_parser("list", help="the experts, their cards and versions")
    listing.set_defaults(run=_list)

    weights = commands.add_parser("weights", help="the model files, their origin and licence")
    weights.add_argument("--weights", help="also check the files in this folder")
    weights.set_defaults(run=_weights)

    host = commands.add_parser("host", help="serve experts over standard input and output")
    host.add_argument("--weights", help="folder of the model files")
    host.set_defaults(run=_host)
    return parser


def _annotate(options: argparse.Namespace) -> int:
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


def _list(options: argparse.Namespace) -> int:
    del options
    for name, d in sorted(registry.registry().items()):
        print(f"{name}  version {d.version}  reads {d.input}  gives {d.kind}")
        print(f"    {d.card.render()}")
    return 0


def _weights(options: argparse.Namespace) -> int:
    wrong = 0
    for name, d in sorted(registry.registry().items()):
        if not d.weights:
            print(f"{name}: no model files")
        for file in d.weights:
            print(f"{name}: {file.file}  of {file.origin}  licence: {file.licence}  sha256 {file.sha256}")
            if options.weights is None:
                continue
            try:
                read_checked(file, options.weights)
                print(f"    ok: {locate(file, options.weights)}")
            except UserError as error:
                wrong += 1
                print(f"    {error}")
    return 1 if wrong else 0


def _host(options: argparse.Namespace) -> int:
    return serve_stdio(options.weights)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parser().parse_args(argv)
    use_one_line_notes()
    # A scheduler's SIGTERM must leave through the writer, which commits what is done.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; start again to go on", file=sys.stderr)
        return 130
