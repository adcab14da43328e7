"""`vilam3-experts list`: the experts, their cards and versions."""

from __future__ import annotations

import argparse

from vilam3_experts import descriptors as registry


def add_parser(commands: argparse._SubParsersAction) -> None:
    commands.add_parser("list", help="the experts, their cards and versions").set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    del options
    for name, d in sorted(registry.registry().items()):
        print(f"{name}  version {d.version}  reads {d.input}  gives {d.kind}")
        print(f"    {d.card.render()}")
    return 0
