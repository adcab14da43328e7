"""`vilam3-experts annotate`: run an expert over a dataset."""

from __future__ import annotations

import argparse
import re
import sys

from tqdm import tqdm

from vilam3_experts import descriptors as registry
from vilam3_experts.annotate import Engine, annotate
from vilam3_experts.calibrate import load_calibration
from vilam3_experts.descriptors import Descriptor
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import store_info
from vilam3_jax.data.experts.wording import doubts
from vilam3_jax.errors import UserError

_LISTED = 20


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "annotate",
        help="run an expert over a dataset",
        description="Runs an expert over every scan it is meant for. A restarted run resumes."
        " Failed scans are reported and skipped. Exit code 0: every scan has an answer or a reason;"
        " 1: a restart may help; 2: something must be changed first.",
    )
    parser.add_argument("--expert", required=True, help="name of the expert, see `list`")
    parser.add_argument("--data", required=True, help="samples folder, or a folder or file of scans")
    parser.add_argument("--out", required=True, help="annotation store, local or gs://")
    parser.add_argument("--args", help="the expert's argument (default: its first)")
    parser.add_argument("--weights", help="folder of the model files (default: the samples folder)")
    parser.add_argument(
        "--parity", action="store_true", help="reproduce the reference code with its defects (CXR)"
    )
    parser.add_argument(
        "--roles",
        help="roles of the scans of a case, such as 't1c=*_gd.nii.gz,t1=*_nat.nii.gz,…', or a JSON file of"
        " cases (default: detected from names and headers)",
    )
    parser.add_argument("--retry-failed", action="store_true", help="run failed scans again")
    parser.add_argument("--limit", type=int, help="stop after this many scans")
    parser.add_argument(
        "--shard", default="1/1", metavar="I/N", help="only shard I of N (1/N to N/N); shards are disjoint"
    )
    parser.add_argument("--dry-run", action="store_true", help="report what would run, with which weights")
    parser.add_argument("--audit", help="folder of the audit log (default: none)")
    parser.add_argument("--calibration", help="file of `calibrate`: also store calibrated probabilities")
    parser.add_argument("--verbose", action="store_true", help="print every result")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", choices=("local", "ray"), default="local", help="(local)")
    engine.add_argument(
        "--workers", type=int, help="processes (local: 1; ray: as many as the cluster has room for)"
    )
    engine.add_argument("--batch", type=int, default=1, help="scans per call, if the expert batches (1)")
    engine.add_argument("--timeout", type=float, help="seconds per scan (no limit)")
    ray = parser.add_argument_group("Ray")
    ray.add_argument("--address", help="of the cluster, such as auto (default: one on this machine)")
    ray.add_argument("--cpus-per-worker", type=float, default=1.0, help="(1)")
    ray.add_argument("--gpus-per-worker", type=float, help="(1 if the cluster has GPUs; 0.5: two share one)")
    ray.add_argument("--object-store-gb", type=float, default=1.0, help="limit of the run in it (1)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    def show(name: str, annotation: Annotation) -> None:
        tqdm.write(f"{name}: {describe(annotation)}")

    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit}: give a positive number")
    descriptor = registry.get(options.expert)
    if options.parity:
        descriptor = descriptor.with_parity()
    summary = annotate(
        descriptor,
        options.data,
        options.out,
        args=options.args,
        weights=options.weights,
        roles=options.roles,
        retry_failed=options.retry_failed,
        limit=options.limit,
        shard=parse_shard(options.shard),
        engine=_engine(options),
        audit=options.audit,
        calibration=None if options.calibration is None else load_calibration(options.calibration),
        dry_run=options.dry_run,
        show=show if options.verbose else None,
    )
    if options.dry_run:
        _print_dry_run(descriptor, options.weights, summary.planned, summary.counts["planned"])
    if summary.reasons:
        print(f"{options.expert}: scans without an answer, by reason:", file=sys.stderr)
        print("\n".join(summary.table()), file=sys.stderr)
    if summary.noted and not options.dry_run:
        print(f"{summary.noted} scans with notes on assumptions or omissions: notes-{options.expert}.json")
    if summary.counts["skipped"] and not options.retry_failed:
        calls = store_info(options.out).calls
        failed = sum(n for call, n in calls.items() if call.expert == descriptor.name and not call.ok)
        if failed:
            print(f"{descriptor.name}: {failed} stored answers are failures; --retry-failed runs them again")
    print(f"{options.expert}: {summary.line()}; store {options.out}")
    return summary.exit_code


def _engine(options: argparse.Namespace) -> Engine:
    workers = options.workers
    if options.engine == "local":
        if options.address is not None or options.gpus_per_worker is not None:
            raise UserError("--address and --gpus-per-worker are for --engine ray")
        workers = 1 if workers is None else workers
    if not options.object_store_gb > 0:
        raise UserError(f"--object-store-gb {options.object_store_gb:g}: give a positive number")
    return Engine(
        kind=options.engine,
        workers=workers,
        batch=options.batch,
        timeout=options.timeout,
        address=options.address,
        cpus_per_worker=options.cpus_per_worker,
        gpus_per_worker=options.gpus_per_worker,
        object_store_bytes=int(options.object_store_gb * (1 << 30)),
    )


def parse_shard(text: str) -> tuple[int, int]:
    """Parses 'I/N'; raises `UserError` unless 1 <= I <= N."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    shard = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= shard[0] <= shard[1]:
        raise UserError(f"--shard {text}: give I/N with I from 1 to N, such as 3/8")
    return shard


def _print_dry_run(descriptor: Descriptor, weights: str | None, names: list[str], count: int) -> None:
    for name in names[:_LISTED]:
        print(f"would run: {name}")
    if count > _LISTED:
        print(f"would run: {count - _LISTED} more")
    for file in descriptor.weights:
        print(f"weights: {file.file}  sha256 {file.sha256}")
    if not descriptor.weights:
        print(f"weights: {weights or 'none'}")


def describe(annotation: Annotation) -> str:
    """An annotation as one line of text."""
    if annotation.status == "failed":
        return f"failed: {annotation.reason}"
    parts = [f"{n} {p:.3f}" for n, p in annotation.probabilities.items()]
    parts += [f"{s.name} {s.volume_ml:.1f} ml" for s in annotation.segments]
    line = f"{', '.join(parts) or 'nothing found'} ({annotation.seconds:.1f} s)"
    return f"{line}. {doubts(annotation.verdicts)}".rstrip(". ") if annotation.verdicts else line
