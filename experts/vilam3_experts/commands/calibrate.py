"""`vilam3-experts calibrate`: fit calibrated probabilities, or add them to the records of a store."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from vilam3_experts import descriptors as registry
from vilam3_experts.calibrate import METHODS, fit, load_calibration
from vilam3_experts.truths import Truth, by_content_key, read_truths
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import AnnotationStore, new_store
from vilam3_jax.errors import UserError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="fit calibrated probabilities on labelled data, or apply them to a store",
        description="With --labels, fits one function per class of an expert to stored probabilities and"
        " known labels. With --calibration, copies a store and adds calibrated probabilities.",
    )
    parser.add_argument("--store", required=True, help="annotation store of the expert")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--labels", help="table of known labels, .csv or .jsonl")
    what.add_argument("--calibration", help="a fitted calibration to apply")
    parser.add_argument("--out", required=True, help="calibration file; with --calibration, the new store")
    parser.add_argument("--expert", help="with --labels: name of the expert")
    parser.add_argument("--data", help="with --labels: folder of the inputs that the labels name")
    parser.add_argument("--method", choices=METHODS, default="temperature", help="with --labels")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    store = AnnotationStore(options.store)
    return _fit(store, options) if options.labels else _apply(store, options)


def _fit(store: AnnotationStore, options: argparse.Namespace) -> int:
    if options.expert is None:
        raise UserError("--labels needs --expert, whose probabilities are calibrated")
    descriptor = registry.get(options.expert)
    truths = by_content_key(read_truths(options.labels), options.data, descriptor)
    annotations = list(_labelled(store, options.expert, truths))
    if not annotations:
        raise UserError(
            f"{options.store}: has no probabilities of {options.expert} for any of {len(truths)} labelled"
            " inputs; annotate them first"
        )
    of_each = [truths[a.input_key] for a in annotations]
    known = {name for a in annotations for name in a.probabilities}
    for truth in of_each:
        if unknown := [name for name in truth.labels if name not in known]:
            has = ", ".join(sorted(known))
            raise UserError(f"{truth.where}: the expert has no class {unknown[0][:80]!r}; it has {has}")
    calibration, left_out = fit(
        annotations,
        [t.labels for t in of_each],
        options.method,
        [t.group or a.input_key for t, a in zip(of_each, annotations, strict=True)],
    )
    calibration.save(options.out)
    print(f"{len(annotations)} of {len(truths)} labelled inputs have probabilities of {options.expert}")
    print("class  samples  positives  log loss before, after  ECE before, after  (held out)")
    for name, c in calibration.classes.items():
        losses = f"{c.log_loss[0]:.4f}, {c.log_loss[1]:.4f}  {c.ece[0]:.4f}, {c.ece[1]:.4f}"
        print(f"{name}  {c.samples}  {c.positives}  {losses}")
    for name, reason in left_out.items():
        print(f"{name}  not calibrated: {reason}")
    print(f"{options.out}: {calibration.name}")
    return 0


def _labelled(store: AnnotationStore, expert: str, truths: dict[str, Truth]) -> Iterator[Annotation]:
    """Yields one record of the expert per labelled input; of several arguments, the first."""
    done = set()
    for key, name, args in sorted(k for k in store.keys() if k[1] == expert):  # noqa: SIM118
        if key not in truths or key in done:
            continue
        annotation = store.get(key, name, args)
        if annotation is not None and annotation.status == "ok" and annotation.probabilities:
            done.add(key)
            yield annotation


def _apply(store: AnnotationStore, options: argparse.Namespace) -> int:
    calibration = load_calibration(options.calibration)
    changed = copied = 0
    with new_store(options.out) as writer:
        for key in store.keys():  # noqa: SIM118
            annotation = store.get(*key)
            assert annotation is not None
            if annotation.expert == calibration.expert and annotation.status == "ok":
                annotation = calibration.apply(annotation)
                changed += 1
            else:
                copied += 1
            writer.write(annotation)
    if not changed:
        raise UserError(f"{options.store}: has no records of {calibration.expert}; check --store")
    print(f"{changed} records calibrated, {copied} copied; store {options.out}")
    return 0
