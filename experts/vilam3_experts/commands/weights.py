"""`vilam3-experts weights`: the model files, their origin and licence."""

from __future__ import annotations

import argparse

from vilam3_experts import descriptors as registry
from vilam3_experts.weights import locate, read_checked
from vilam3_jax.errors import UserError


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Declares the command."""
    parser = commands.add_parser("weights", help="the model files, their origin and licence")
    parser.add_argument("--weights", help="also check the files in this folder")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs the command."""
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
