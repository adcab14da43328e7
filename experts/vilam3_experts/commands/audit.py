"""`vilam3-experts audit`: verify the log of expert calls, and replay the calls."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable

from vilam3_experts import audit
from vilam3_experts import descriptors as registry
from vilam3_experts.base import Expert, annotate_one
from vilam3_experts.engine.worker import create_expert
from vilam3_experts.inputs import Input, find_inputs
from vilam3_experts.weights import Weights, load_weights, weights_folder
from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("audit", help="verify the log of expert calls; replay the calls")
    actions = parser.add_subparsers(dest="action", required=True)
    verify = actions.add_parser(
        "verify",
        help="detect changed, removed, moved or inserted lines",
        description="Verifies every hash chain. Exits with 1 if there is a problem.",
    )
    verify.add_argument("log", help="folder of the log, local or gs://")
    verify.add_argument("--manifest", help="an earlier copy of the log's folder `manifest`")
    verify.set_defaults(run=_verify)
    replay = actions.add_parser(
        "replay",
        help="repeat the logged calls and compare the answers",
        description="Runs the experts over the same data and compares the hashes of their answers. Exits"
        " with 1 if an answer differs or a call cannot be repeated.",
    )
    replay.add_argument("log", help="folder of the log, local or gs://")
    replay.add_argument("--data", required=True, help="samples folder, or a folder or file of scans")
    replay.add_argument("--weights", help="folder of the model files (default: the samples folder)")
    replay.set_defaults(run=_replay)


def _verify(options: argparse.Namespace) -> int:
    known = None
    if options.manifest is not None:
        known = audit.heads(options.manifest)
        if not known:
            raise UserError(f"{options.manifest}: not a manifest; give a copy of the folder `manifest`")
    return _print_report(audit.verify(options.log, known))


def _print_report(report: audit.Report) -> int:
    for problem in report.problems:
        print(f"problem: {problem}", file=sys.stderr)
    for note in report.notes:
        print(f"note: {note}")
    print(f"{report.calls:,d} calls in {report.chains:,d} chains: {'intact' if report.ok else 'NOT intact'}")
    return 0 if report.ok else 1


def _replay(options: argparse.Namespace) -> int:
    if _print_report(audit.verify(options.log)):
        return 1
    found = audit.replay(options.log, _replayer(options.data, options.weights))
    for call, output in found.different:
        print(f"problem: {_name(call)}: gave {call.output[:12]}, gives {output[:12]}", file=sys.stderr)
    for call in found.missing:
        print(f"problem: {_name(call)}: its input, version or weights are not here", file=sys.stderr)
    different, missing = len(found.different), len(found.missing)
    print(f"{found.same:,d} answers are the same, {different:,d} differ, {missing:,d} cannot be computed")
    return 0 if found.ok else 1


def _name(call: audit.Call) -> str:
    return f"{call.expert}({call.args}) on {call.input[:12]}"


def _replayer(
    data: paths.PathLike, weights: paths.PathLike | None
) -> Callable[[audit.Call], Annotation | None]:
    """Repeats calls over the scans of a folder.

    The result is None if the input, expert, version or weights of a call are not available.
    """
    known, folder = registry.registry(), weights_folder(weights, data)

    @functools.cache
    def built(name: str) -> tuple[Weights, Expert]:
        found = load_weights(known[name], folder)
        return found, create_expert(known[name], found)

    @functools.cache
    def inputs(name: str) -> dict[str, Input]:
        """The expert's inputs by content key. Reads every input once."""
        found: dict[str, Input] = {}
        for item in find_inputs(data, known[name]):
            with contextlib.suppress(UserError):  # unreadable inputs have no logged call
                found[inputs_key(item.load().keys)] = item
        return found

    def answer(call: audit.Call) -> Annotation | None:
        descriptor = known.get(call.expert)
        if descriptor is None or descriptor.version != call.version:
            return None
        found, expert = built(call.expert)
        item = inputs(call.expert).get(call.input)
        if item is None:
            return None
        annotation = annotate_one(expert, descriptor, item.load(), call.args, weights_sha256=found.sha256)
        return annotation if annotation.weights_sha256 == call.weights else None

    return answer
