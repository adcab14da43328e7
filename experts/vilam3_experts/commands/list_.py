"""`vilam3-experts list`: the experts, their cards and versions."""

from __future__ import annotations

import argparse
import json

from vilam3_experts import descriptors as registry
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("list", help="the experts, their cards and versions")
    parser.add_argument("--expert", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument(
        "--cards", metavar="FILE.json", help="also write their cards as a card list, for `model.cards`"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    names = sorted(registry.registry()) if options.expert is None else dict.fromkeys(options.expert)
    chosen = [registry.get(name) for name in names]
    if options.cards is not None:
        if not options.cards.endswith(".json"):
            raise UserError(f"--cards {options.cards}: the name of a card list must end with .json")
        text = json.dumps([d.card.to_dict() for d in chosen], indent=1)
        paths.write_text_atomic(paths.as_path(options.cards), f"{text}\n")
    for d in chosen:
        print(f"{d.name}  version {d.version}  reads {d.input}  gives {d.kind}")
        print(f"    {d.card.render()}")
    return 0
