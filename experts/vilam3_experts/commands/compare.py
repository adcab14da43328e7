"""`vilam3-experts compare`: where two experts disagree on the same inputs."""

from __future__ import annotations

import argparse
import collections
import contextlib

from vilam3_experts.compare import Thresholds, with_disagreements
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import AnnotationStore, new_store
from vilam3_jax.errors import UserError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compare",
        help="list where two experts disagree on the same inputs",
        description="Compares the records of two experts: overlap of labels and difference of probabilities."
        " With --out, copies the store and adds the disagreements to the records of both.",
    )
    parser.add_argument("--store", required=True, help="annotation store of both")
    parser.add_argument("--experts", required=True, help="two names, such as VISTA3D,TOTALSEGMENTATOR")
    parser.add_argument("--out", help="the new store")
    parser.add_argument(
        "--dice",
        type=float,
        default=Thresholds.dice,
        help="a smaller overlap is a disagreement (default %(default)s)",
    )
    parser.add_argument(
        "--difference",
        type=float,
        default=Thresholds.difference,
        help="a larger difference of probabilities is a disagreement (default %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    names = options.experts.split(",")
    if len(names) != 2 or names[0] == names[1] or not all(names):
        raise UserError(f"--experts {options.experts}: give two names separated by a comma")
    for name in ("dice", "difference"):
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(f"--{name} {getattr(options, name)}: give a number from 0 to 1")
    store = AnnotationStore(options.store)
    calls: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for key, expert, args in store.keys():  # noqa: SIM118
        if expert in names:
            calls[key].append((expert, args))
    shared = {key: of for key, of in calls.items() if {expert for expert, _ in of} == set(names)}
    if not shared:
        raise UserError(f"{options.store}: no input has records of both {names[0]} and {names[1]}")
    thresholds = Thresholds(options.dice, options.difference)
    count: collections.Counter[str] = collections.Counter()
    with contextlib.nullcontext() if options.out is None else new_store(options.out) as writer:
        for key, of in shared.items():
            for annotation in _compared(store, key, of, thresholds):
                if annotation.expert == names[0]:
                    count.update(f"{d.subject}, {d.measure}" for d in annotation.disagreements)
                if writer is not None:
                    writer.write(annotation)
        if writer is not None:
            for key in store.keys():  # noqa: SIM118
                if (key[1], key[2]) not in shared.get(key[0], ()):
                    annotation = store.get(*key)
                    assert annotation is not None
                    writer.write(annotation)
    print(f"{len(shared)} inputs with records of {names[0]} and {names[1]}")
    for what, number in count.most_common():
        print(f"{number}  {what}")
    if options.out is not None:
        print(f"store {options.out}")
    return 0


def _compared(
    store: AnnotationStore, key: str, calls: list[tuple[str, str]], thresholds: Thresholds
) -> list[Annotation]:
    """The records of one input, each with its disagreements with the other expert's records."""
    records = [a for a in (store.get(key, *call) for call in calls) if a is not None]
    return [
        with_disagreements(one, [other for other in records if other.expert != one.expert], thresholds)
        for one in records
    ]
