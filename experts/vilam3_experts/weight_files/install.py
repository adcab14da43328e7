"""Fetches a source of weights into a weights folder: download, pin, unpack, convert, pin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vilam3_experts.weight_files import convert, fetch
from vilam3_experts.weight_files.lock import Lock, Pin, pin_of_file
from vilam3_experts.weight_files.sources import Download, Source
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths


def install(
    expert: str, source: Source, folder: paths.PathLike, *, endpoint: str | None = None
) -> Iterator[tuple[Path, Pin]]:
    """Puts the files of `source` into `folder/EXPERT`. What is there already is checked, not fetched.

    A file of the source's own name that a person put there is taken in place of the download. Started again
    after an interruption, it goes on where it was.

    Args:
      expert: name of the expert.
      source: one of its sources.
      folder: local folder of weights, with its lock file; made if it is missing.
      endpoint: of the hub, see `fetch.from_hub`.

    Yields:
      Each file that the expert reads, and its pin.

    Raises:
      UserError: a file cannot be had or converted, or is not the one that was pinned.
    """
    root = paths.as_path(folder)
    if "://" in os.fspath(root):
        raise UserError(
            f"{folder}: weights are fetched into a local folder; copy that folder there afterwards"
        )
    own = Path(root) / expert
    own.mkdir(parents=True, exist_ok=True)
    lock = Lock(root)
    for download in source.downloads:
        results = [own / name for name in download.results]
        there = all(path.exists() for path in results)
        known = {} if there else _get(expert, source, download, own, lock, endpoint)
        for path in results:
            name = f"{expert}/{path.relative_to(own).as_posix()}"
            pin = pin_of_file(path, **known)
            if there:
                lock.check(name, pin)
            else:
                lock.pin(name, pin)  # what was downloaded for it has passed its own pin
            yield path, pin


def _get(
    expert: str, source: Source, download: Download, own: Path, lock: Lock, endpoint: str | None
) -> dict[str, str]:
    """Downloads and prepares one file; returns what its pin says of its origin."""
    raw = own / download.file
    known = {"origin": download.origin, "revision": source.revision}
    fetched = not raw.exists()
    if fetched:
        raw.parent.mkdir(parents=True, exist_ok=True)
        if source.kind == "hub":
            known["revision"] = fetch.from_hub(download, source.revision, raw, endpoint=endpoint)
        else:
            fetch.from_url(download, raw)
    pin = pin_of_file(raw, **known)
    try:
        lock.check(f"{expert}/{download.file}", pin)
    except UserError:
        if fetched:
            raw.unlink()  # what a person put there is left for them to look at
        raise
    if download.unpack:
        fetch.unpack(raw, download, own)
        raw.unlink()
    for pickled, target in download.convert:
        before = pin_of_file(own / pickled)
        convert.to_safetensors(own / pickled, own / target)
        (own / pickled).unlink()
        known["converted_from"] = before.sha256
    return known
