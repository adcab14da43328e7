"""`vilam3 prepare quickstart --source DIR --out DIR`: a folder of samples becomes four TFDS datasets."""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from etils import epath

from vilam3_jax.data.content_keys import DECODER_VERSION
from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.records import ExampleSource, ExampleWriter
from vilam3_jax.datasets.prepare import aligned
from vilam3_jax.datasets.samples import INDEX_NAME, asset, read_samples
from vilam3_jax.errors import UserError
from vilam3_jax.quickstart import examples
from vilam3_jax.quickstart.volumes import BRAIN_EXPERT
from vilam3_jax.runtime import paths

BUILD_NAME = "build.json"
_VERSION = "1.0.0"  # of the folders; `examples.VERSION` identifies the content
_MAX_BUILD_BYTES = 16 << 20


def prepare_quickstart(
    source: paths.PathLike,
    out: paths.PathLike,
    *,
    size: str = "default",
    seed: int = 0,
    annotations: paths.PathLike | None = None,
) -> dict[str, Any]:
    """Builds the quickstart's datasets, or reuses a complete build of the same input.

    The folder appears only after everything in it was written and read back.

    Args:
      source: folder written by the samples or the phantoms command.
      out: folder to create; local or an object store.
      size: a key of `examples.SIZES`.
      seed, annotations: see `examples.ExampleBuilder`.

    Returns:
      The content of `build.json`, with `reused` added.

    Raises:
      UserError: the samples cannot be read, `out` holds something else, or the disk is full.
    """
    source_dir, target = paths.as_path(source), paths.as_path(out)
    store = None if annotations is None else AnnotationStore(annotations)
    identity = {
        "dataset": "quickstart",
        "version": examples.VERSION,
        "decoder_version": DECODER_VERSION,
        "size": size,
        "seed": seed,
        "source_sha256": _source_digest(source_dir),
        "annotations_sha256": None if store is None else store.digest(BRAIN_EXPERT),
    }
    known = _existing(target, identity)
    if known is not None:
        return known | {"reused": True}
    remote = "://" in str(target)
    try:
        if not remote:
            target.parent.mkdir(parents=True, exist_ok=True)
        beside = None if remote else target.parent  # so that publishing is a rename
        with tempfile.TemporaryDirectory(".partial", f".{target.name}.", beside) as scratch:
            work = epath.Path(scratch) / "build"
            build = _write(source_dir, work, identity, store)
            _publish(work, target, remote)
    except OSError as error:
        raise paths.write_error(target, error) from error
    return build | {"reused": False}


def _write(
    source: epath.Path, work: epath.Path, identity: dict[str, Any], store: AnnotationStore | None
) -> dict[str, Any]:
    work.mkdir()
    size = examples.SIZES[identity["size"]]
    builder = examples.ExampleBuilder(source, work, size, identity["seed"], store)
    provenance = identity | {
        "origins": sorted({sample.origin for sample in builder.samples}),
        "split": "by subject: Sample.split_group, never by slice",
    }
    grouped: dict[tuple[str, str], list[Example]] = collections.defaultdict(list)
    for dataset, split, example in builder.examples():
        grouped[dataset, split].append(example)
    for (dataset, split), of_split in sorted(grouped.items()):
        with ExampleWriter(
            work / dataset / _VERSION, split, name=dataset, provenance=provenance, data_root="../.."
        ) as writer:
            for example in of_split:
                writer.write(example)
    build = {
        **identity,
        "counts": verify(work),
        "left_out": dict(sorted(builder.skipped.items())),
        "notes": dict(sorted(builder.notes.items())),
        "samples": [
            {"name": s.name, "split": builder.splits[s.split_group], "licence": s.licence, "origin": s.origin}
            for s in builder.samples
        ],
    }
    paths.write_text_atomic(work / BUILD_NAME, json.dumps(build, indent=1) + "\n")
    return build


def verify(folder: paths.PathLike) -> list[dict[str, Any]]:
    """Reads every record of `prepare_quickstart` back and checks it, its images and the split.

    Returns:
      One row per dataset and split: `dataset`, `split`, `records`, `questions`, `subjects`, `images`.

    Raises:
      UserError: a record is malformed, an image is missing, or a subject is in both splits.
    """
    root = paths.as_path(folder)
    rows = []
    split_of: dict[str, str] = {}
    present: set[str] = set()
    for dataset in examples.DATASETS:
        for split in examples.SPLITS:
            subjects, images, questions, records = set(), set(), 0, 0
            for example in ExampleSource(root / dataset, split):
                example.validate()
                group = example.meta["group"]
                if split_of.setdefault(group, split) != split:
                    raise UserError(f"example {example.id!r}: its subject is in train and in heldout")
                for image in example.images:
                    if image.path is not None and image.path not in present:
                        if not (root / image.path).exists():
                            raise UserError(f"example {example.id!r}: image {image.path} is missing")
                        present.add(image.path)
                    images.add((image.path, image.axis, image.index))
                subjects.add(group)
                records += 1
                questions += len(example.meta.get("qa", ()))
            counts = {"records": records, "questions": questions}
            counts |= {"subjects": len(subjects), "images": len(images)}
            rows.append({"dataset": dataset, "split": split, **counts})
    return rows


def _publish(work: epath.Path, out: epath.Path, remote: bool) -> None:
    if not remote:
        if out.exists():  # an empty folder; `_existing` refuses any other
            out.rmdir()
        work.rename(out)
        return
    files = [epath.Path(folder) / name for folder, _, names in os.walk(work) for name in names]
    # Object stores cannot rename folders: the file that marks the build as complete is copied last.
    for path in sorted(files, key=lambda p: (p.name == BUILD_NAME, p)):
        target = out / path.relative_to(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.copy(target, overwrite=True)


def _existing(out: epath.Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; choose another --out")
    if not paths.children(out):
        return None
    if not (out / BUILD_NAME).exists():
        raise UserError(f"{out}: not empty and no complete build; remove it or choose another --out")
    try:
        found = json.loads(paths.read_bytes(out / BUILD_NAME, _MAX_BUILD_BYTES))
        differs = [key for key, value in identity.items() if found.get(key) != value]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{out / BUILD_NAME}: damaged ({error}); remove the folder") from error
    if differs:
        raise UserError(
            f"{out}: holds a build with another {', '.join(differs)}; remove it or choose another --out"
        )
    return found


def _source_digest(source: epath.Path) -> str:
    """Hash of the index and of every file that the build reads."""
    samples = read_samples(source)
    files = [source / INDEX_NAME]
    if any(sample.origin != examples.GENERATED for sample in samples):
        files.append(asset(source, examples.REPORTS_ASSET))
    for sample in samples:
        for path in (sample.path, sample.label_map):
            if path is not None:
                files += sorted(path.iterdir()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(source).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # type: ignore[arg-type]
    return digest.hexdigest()


def table(build: dict[str, Any]) -> str:
    """The build's counts, and what was skipped and why, as text."""
    columns = ("dataset", "split", "records", "questions", "subjects", "images")
    lines = aligned([columns, *(tuple(str(row[c]) for c in columns) for row in build["counts"])])
    lines += [f"skipped: {count:6d}  {reason}" for reason, count in build["left_out"].items() if count]
    lines += [f"note: {count:6d}  volumes: {note}" for note, count in build["notes"].items()]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="vilam3 prepare quickstart",
        description="Make dialogues, captions, pairs and reports from a folder of samples or phantoms.",
    )
    parser.add_argument("--source", required=True, help="folder of samples or phantoms")
    parser.add_argument("--out", required=True, help="folder to create, local or gs://")
    parser.add_argument("--size", default="default", choices=sorted(examples.SIZES), help="amount of data")
    parser.add_argument("--seed", type=int, default=0, help="seed of every choice (default 0)")
    parser.add_argument("--annotations", help="store of expert results, used for brain questions in training")
    options = vars(parser.parse_args(argv))
    build = prepare_quickstart(**options)
    print(table(build))
    state = "complete build found, reused" if build["reused"] else "every record read back and checked"
    print(f"{options['out']}: {state}")
    return 0
