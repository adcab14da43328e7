"""`vilam3 prepare DATASET --source DIR --out DIR`: a downloaded dataset becomes a TFDS dataset."""

from __future__ import annotations

import argparse
import collections
import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from vilam3_jax.datasets import registry
from vilam3_jax.datasets.dataset import Dataset
from vilam3_jax.errors import UserError

_MAX_REASONS = 12
_WIDTH = 100
_USAGE = """\
usage: vilam3 prepare DATASET --source DIR --out DIR [options]
       vilam3 prepare --list
       vilam3 prepare DATASET --help

Converts a dataset that you downloaded to records: a TFDS folder OUT/DATASET/VERSION.
An interrupted build resumes. `--list` shows the datasets; `instructions` and `table`
take files of your own."""
_QUICKSTART = ("quickstart", "open", "various", "The data of `make quickstart`, from a folder of samples.")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0 if argv else 2
    if argv[0] == "--list":
        print(listing())
        return 0
    name, *rest = argv
    if name.startswith("-"):
        raise UserError(f"{name}: the name of a dataset comes first; see `vilam3 prepare --list`")
    if name in registry.COMMANDS:
        return importlib.import_module(registry.COMMANDS[name]).main(rest)
    return _prepare(registry.get(name), rest)


def listing() -> str:
    """All datasets: name, access class, licence and description."""
    rows: list[tuple[str, str, str, str]] = [_QUICKSTART]
    for name in registry.names():
        try:
            dataset = registry.get(name)
        except UserError as error:  # a broken dataset of another package must not hide the others
            rows.append((name, "-", "-", str(error)))
            continue
        rows.append((name, dataset.access, dataset.licence, dataset.description))
    return "\n".join(
        aligned([(*row[:3], textwrap.shorten(row[3], _WIDTH, placeholder=" ...")) for row in sorted(rows)])
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of text, one per row, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _parser(dataset: type[Dataset]) -> argparse.ArgumentParser:
    indented = textwrap.indent(textwrap.fill(" ".join(dataset.instructions.split()), _WIDTH), "  ")
    variants = "".join(f"\n  {name}: {text}" for name, text in dataset.configs.items())
    parser = argparse.ArgumentParser(
        prog=f"vilam3 prepare {dataset.name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{textwrap.fill(' '.join(dataset.description.split()), _WIDTH)}\n\n"
        f"licence: {dataset.licence}; access: {dataset.access}; {dataset.homepage}\n\n"
        f"what to download:\n{indented}" + (f"\n\nvariants:{variants}" if variants else ""),
    )
    kind = "FILE" if dataset.source_is_file else "DIR"
    parser.add_argument("--source", required=True, metavar=kind, help="the download, or your own file")
    parser.add_argument("--out", required=True, help="folder of datasets, local or gs://")
    if dataset.configs:
        parser.add_argument("--variant", default="", choices=list(dataset.configs), help="default: the first")
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="worker processes (default: one per core)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every choice (default: 0)")
    parser.add_argument(
        "--decode-images",
        type=int,
        default=0,
        metavar="SIDE",
        help="store images decoded, SIDE pixels square (the vision tower's size): faster to load",
    )
    flags = {
        "--parity": "reproduce the known defects of VILA-M3's own preparation",
        "--image-paths": "store the paths of images instead of the images",
        "--no-input-keys": "omit the keys that link images to expert results; saves decoding each image once",
        "--strict": "refuse unofficial item counts, and patients or images that are in several splits",
        "--allow-upload": "write to a bucket; your data use agreement must permit it",
    }
    unavailable = {"--parity": not dataset.has_parity, "--allow-upload": dataset.access != "credentialed"}
    for flag, text in flags.items():
        if not unavailable.get(flag):
            parser.add_argument(flag, action="store_true", help=text)
    own = parser.add_argument_group(f"options of {dataset.name}")
    dataset.add_arguments(own)  # type: ignore[arg-type]
    return parser


def _prepare(dataset: type[Dataset], argv: Sequence[str]) -> int:
    args = _parser(dataset).parse_args(argv)
    if args.processes < 1 or not 0 <= args.decode_images <= 4096:
        raise UserError("--processes must be at least 1, and --decode-images between 0 and 4096")
    if dataset.access == "credentialed" and "://" in args.out and not args.allow_upload:
        raise UserError(
            f"--out {args.out}: {dataset.name} is credentialed data and stays on this machine; write to a "
            "local folder, or add --allow-upload if your data use agreement permits this bucket"
        )
    from vilam3_jax.datasets import builder  # imports TFDS, which --list and --help do not need

    options = builder.BuildOptions(
        processes=args.processes,
        seed=args.seed,
        parity=getattr(args, "parity", False),
        copy_images=not args.image_paths,
        input_keys=not args.no_input_keys,
        decode_side=args.decode_images,
        strict=args.strict,
        progress=sys.stderr.isatty(),
    )
    chosen = dataset(args, getattr(args, "variant", ""))
    built = builder.prepare(chosen, args.source, args.out, options)
    for warning in built.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(summary(built.info))
    print(f"{built.folder}: " + ("complete build found, reused" if built.reused else "written and verified"))
    print(_next_commands(chosen, args, built.info))
    return 0


def summary(info: dict[str, Any]) -> str:
    """The counts of a build as a table, and the reasons for skipped items."""
    rows: list[tuple[str, ...]] = [("split", "items", "records", "skipped", "images", "questions")]
    reasons: collections.Counter[str] = collections.Counter()
    for name, split in {**info["splits"], **info.get("empty_splits", {})}.items():
        images = sum(int(number) * count for number, count in split["counts"].get("images", {}).items())
        questions = sum(split["counts"].get("question_types", {}).values())
        cells = (split["items"], split["records"], split["skipped"]["total"], images, questions)
        rows.append((name, *(f"{cell:,}" for cell in cells)))
        reasons.update(split["skipped"]["reasons"])
    lines = aligned(rows)
    if side := info["provenance"]["decode_side"]:
        files, stored = (sum(s["image_bytes"][place] for s in info["splits"].values()) for place in (0, 1))
        lines.append(
            f"images decoded at {side} pixels: {stored / 1e6:,.1f} MB, {files / 1e6:,.1f} MB as files; "
            f"the build took {info['provenance']['seconds']:,.0f} s"
        )
    lines += [f"skipped {count:,}: {reason}" for reason, count in reasons.most_common(_MAX_REASONS)]
    if len(reasons) > _MAX_REASONS:
        lines.append(f"and for {len(reasons) - _MAX_REASONS} other reasons, see metadata.json")
    return "\n".join(lines)


def _next_commands(dataset: Dataset, args: argparse.Namespace, info: dict[str, Any]) -> str:
    name, look, train = dataset.name + (f"/{dataset.config}" if dataset.config else ""), "", ""
    if any(split["counts"].get("format", {}).get("study") for split in info["splits"].values()):
        # Studies have no text. A rule generates it from expert results.
        name, look = f"{name}:RULE", " --annotations=ANNOTATIONS --experts=on"
        train = " --config.data.annotations=ANNOTATIONS"
    lines = [f"look:  vilam3 data show --data={args.out} --dataset={name}{look}"]
    if dataset.expert_inputs:
        source = os.path.dirname(args.source) if dataset.source_is_file else args.source
        source = getattr(args, "images", None) or source
        lines.append(f"next:  vilam3-experts annotate --expert=NAME --data={source or '.'} --out=ANNOTATIONS")
    lines.append(
        "train: vilam3 train --config=configs/stage3_instruct.py:tiny --workdir=DIR "
        f"--config.data.path={args.out}{train} --config.data.mixture=\"(('{name}', 1.0),)\""
    )
    return "\n".join(lines)


if __name__ == "__main__":
    from vilam3_jax.cli import guarded

    sys.exit(guarded("vilam3 prepare", main, sys.argv[1:]))
