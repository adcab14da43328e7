"""`vilam3-experts weights`: origin and licence of the model files; check and fetch them."""

from __future__ import annotations

import argparse

from vilam3_experts import descriptors as registry
from vilam3_experts.descriptors import Descriptor
from vilam3_experts.weight_files.install import install
from vilam3_experts.weight_files.sources import Source
from vilam3_experts.weights import check_folder, expert_folder, locate, read_checked
from vilam3_jax.errors import UserError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "weights",
        help="the model files: origin, licence, size, check, fetch",
        description="Lists the origin and licence of each expert's files. With --weights it checks the files"
        " in that folder: weights.lock.json records each sha256 at first use, and later changes are refused."
        " With --fetch it downloads missing files and converts them to safetensors.",
    )
    parser.add_argument("--expert", help="only this expert")
    parser.add_argument("--weights", help="folder of the model files")
    parser.add_argument(
        "--fetch", action="store_true", help="download missing files; needs --expert and --weights"
    )
    parser.add_argument("--source", help="source to fetch from (default: the first one listed)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if options.source and not options.fetch:
        raise UserError("--source selects where to fetch from; add --fetch")
    if options.fetch:
        if not (options.expert and options.weights):
            raise UserError("--fetch downloads one expert into one folder; give --expert and --weights")
        return _fetch(registry.get(options.expert), options.weights, options.source)
    chosen = [registry.get(options.expert)] if options.expert else None
    wrong = 0
    for descriptor in chosen or [one for _, one in sorted(registry.registry().items())]:
        for line in _describe(descriptor):
            print(line)
        if options.weights is not None:
            wrong += _check(descriptor, options.weights)
    return 1 if wrong else 0


def _describe(descriptor: Descriptor) -> list[str]:
    """Origin of an expert's files, as lines of text."""
    name = descriptor.name
    lines = [
        f"{name}: {file.file}  of {file.origin}  licence: {file.licence}  sha256 {file.sha256}"
        for file in descriptor.weights
        if file.sha256
    ]
    for number, source in enumerate(descriptor.sources):
        default = " (default)" if number == 0 and len(descriptor.sources) > 1 else ""
        lines.append(
            f"{name}: source {source.name}{default}  revision: {source.revision}  licence: {source.licence}"
        )
        lines += [
            f"    {download.file}  about {download.megabytes:g} MB  {download.origin}"
            for download in source.downloads
        ]
    return lines or [f"{name}: no model files"]


def _check(descriptor: Descriptor, folder: str) -> int:
    """Prints the state of each file; returns how many are missing or wrong."""
    name, wrong = descriptor.name, 0
    for file in descriptor.weights:
        try:
            read_checked(file, folder, name)
            print(f"    ok: {locate(file, folder, name)}")
        except UserError as error:
            wrong += 1
            print(f"    {error}")
    if descriptor.needs_folder and descriptor.sources:
        where = expert_folder(folder, name)
        try:
            found = len(check_folder(descriptor, folder))
            if not found:
                fix = f"run `vilam3-experts weights --fetch --expert {name} --weights {folder}`"
                raise UserError(f"{where}: no files of {name}; {fix}")
            print(f"    ok: {found} files in {where}")
        except UserError as error:
            wrong += 1
            print(f"    {error}")
    return wrong


def _fetch(descriptor: Descriptor, folder: str, name: str | None) -> int:
    source = _choose(descriptor, name)
    print(f"{descriptor.name}: revision {source.revision}, licence: {source.licence}")
    for path, pin in install(descriptor.name, source, folder):
        print(f"    ok: {path}  {pin.size} bytes  sha256 {pin.sha256}")
    return 0


def _choose(descriptor: Descriptor, name: str | None) -> Source:
    if not descriptor.sources:
        origins = sorted({file.origin for file in descriptor.weights})
        reason = f"its files are in {', '.join(origins)}" if origins else "it has no files"
        raise UserError(f"{descriptor.name}: nothing to fetch; {reason}")
    for source in descriptor.sources:
        if name in (None, source.name):
            return source
    listed = ", ".join(source.name for source in descriptor.sources)
    raise UserError(f"{descriptor.name}: no source {name!r}; choose from {listed}")
