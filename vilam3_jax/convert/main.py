"""`vilam3 convert`: imports checkpoints of other tools, and exports to their formats."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from vilam3_jax.runtime import process_flags

if TYPE_CHECKING:  # the import of jax behind it is slow
    from vilam3_jax.convert.importer import Progress


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 convert import|export ...`."""
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilam3 convert",
        description="Import checkpoints of other tools, or export models to their formats.",
    )
    commands = parser.add_subparsers(dest="action", required=True)
    imports = commands.add_parser(
        "import",
        help="read a Hugging Face folder or a GGUF file",
        description="Read a language model (Llama, Qwen2, Qwen3, Mistral or Gemma 3 as a Hugging Face "
        "folder; Llama as a GGUF file), a SigLIP or InternViT vision tower, or a whole VILA folder, and "
        "write a folder that training can start from (--config.init.llm=DIR, .vision_tower, .everything).",
    )
    imports.set_defaults(run=_import)
    add = imports.add_argument
    add("--source", required=True, help="GGUF file or Hugging Face model folder")
    add("--out", required=True, help="folder to create; may be gs://...")
    formats = "auto, gguf, hugging_face, siglip_pair or vila (default: auto)"
    add("--format", default="auto", help=formats)
    dtypes = "float32, bfloat16 or auto: bfloat16 if the source is (default: auto)"
    add("--dtype", default="auto", help=dtypes)
    add("--tokenizer", help="tokenizer folder that replaces the source's")
    add(
        "--torch_files",
        action="store_true",
        help="read weights pickled by PyTorch (.bin, .pt, .pth) in another process that builds only tensors; "
        "needs the experts' package",
    )
    process_flags.add_arguments(imports)
    exports = commands.add_parser(
        "export",
        help="write Hugging Face folders",
        description="Write an export of a run or of an import as a VILA folder (llm/, vision_tower/ and "
        "mm_projector/, each a Hugging Face folder), or a single component as a Hugging Face folder.",
    )
    exports.set_defaults(run=_export)
    add = exports.add_argument
    add("--source", required=True, help="export folder")
    add("--out", required=True, help="folder to create, on a local disk")
    dtypes = "float32, bfloat16 or auto: that of the export (default: auto)"
    add("--dtype", default="auto", help=dtypes)
    verify = "hash all files and read the result back (default: yes)"
    for command in (imports, exports):
        command.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True, help=verify)
    return parser


@contextlib.contextmanager
def _bar(description: str) -> Iterator[Progress]:
    with tqdm(desc=description, unit="B", unit_scale=True, delay=0.5, file=sys.stderr) as bar:

        def progress(written: int, total: int) -> None:
            bar.total = total
            bar.update(written - bar.n)

        yield progress


def _import(arguments: argparse.Namespace) -> int:
    from vilam3_jax.convert.importer import import_model
    from vilam3_jax.runtime import processes

    shared = process_flags.argument_values(arguments)
    with processes.group("vilam3 convert", **shared), _bar("importing") as progress:
        summary = import_model(
            arguments.source,
            arguments.out,
            source_format=arguments.format,
            dtype=arguments.dtype,
            tokenizer=arguments.tokenizer,
            torch_files=arguments.torch_files,
            verify=arguments.verify,
            progress=progress,
        )
        if not processes.is_primary_process():
            return 0
    _print(
        ("component", summary.component),
        ("stored as", ", ".join(summary.dtypes)),
        ("tensors read", f"{summary.tensors:,}"),
        ("tensors left out", f"{len(summary.unused):,}"),
        ("parameters", f"{summary.parameters:,}"),
        ("bytes", f"{summary.bytes:,} ({summary.dtype})"),
        ("tokenizer", "yes" if summary.tokenizer else "none"),
        ("seconds", f"{summary.seconds:.1f}"),
    )
    for name, reason in sorted(summary.unused.items()):
        print(f"left out {name}: {reason}")
    print(f"written to {arguments.out}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from vilam3_jax.convert.exporter import export_folder

    with _bar("exporting") as progress:
        options = dict(dtype=arguments.dtype, verify=arguments.verify, progress=progress)
        summary = export_folder(arguments.source, arguments.out, **options)
    _print(
        ("folders", ", ".join(summary.folders)),
        ("tensors", f"{summary.tensors:,}"),
        ("bytes", f"{summary.bytes:,} ({summary.dtype})"),
        ("LoRAs merged", f"{summary.merged:,}"),
        ("seconds", f"{summary.seconds:.1f}"),
    )
    print(f"written to {arguments.out}")
    return 0


def _print(*rows: tuple[str, str]) -> None:
    for name, value in rows:
        print(f"{name:<17} {value}")
