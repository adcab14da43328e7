"""Fetches weights into a weights folder: download, pin, unpack, convert, pin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vilam3_experts.weight_files import convert, fetch
from vilam3_experts.weight_files.lock import LockFile, Pin, pin_of_file
from vilam3_experts.weight_files.sources import Download, Source
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths


def install(expert: str, source: Source, folder: paths.PathLike) -> Iterator[tuple[Path, Pin]]:
    """Installs the files of `source` into `folder/EXPERT`; yields each file and its pin.

    Existing files are checked, not fetched, and a download that the user already placed there under its
    listed name is used. An interrupted installation resumes when restarted. Raises `UserError` if a file
    cannot be fetched or converted, or is not the pinned one.
    """
    root = paths.as_path(folder)
    if "://" in os.fspath(root):
        raise UserError(f"{folder}: weights are fetched into a local folder; copy it there afterwards")
    own = Path(root) / expert
    own.mkdir(parents=True, exist_ok=True)
    lock = LockFile(root)
    for download in source.downloads:
        results = [own / name for name in download.results]
        exists = all(path.exists() for path in results)
        provenance = {} if exists else _get(expert, source, download, own, lock)
        for path in results:
            name = f"{expert}/{path.relative_to(own).as_posix()}"
            pin = pin_of_file(path, **provenance)
            if exists:
                lock.check(name, pin)
            else:
                lock.pin(name, pin)  # the download itself matched its own pin
            yield path, pin


def _get(expert: str, source: Source, download: Download, own: Path, lock: LockFile) -> dict[str, str]:
    """Downloads and prepares one file; returns the provenance fields of its pin."""
    raw = own / download.file
    provenance = {"origin": download.origin, "revision": source.revision}
    fetched = not raw.exists()
    if fetched:
        raw.parent.mkdir(parents=True, exist_ok=True)
        if source.kind == "hub":
            provenance["revision"] = fetch.from_hub(download, source.revision, raw)
        else:
            fetch.from_url(download, raw)
    pin = pin_of_file(raw, **provenance)
    try:
        lock.check(f"{expert}/{download.file}", pin)
    except UserError:
        if fetched:
            raw.unlink()  # a file that the user placed there is kept for inspection
        raise
    if download.unpack:
        fetch.unpack(raw, download, own)
        raw.unlink()
    for pickled, target in download.convert:
        provenance["converted_from"] = pin_of_file(own / pickled).sha256
        convert.to_safetensors(own / pickled, own / target)
        (own / pickled).unlink()
    return provenance
