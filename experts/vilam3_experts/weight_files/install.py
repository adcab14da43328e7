"""Fetches weights into a weights folder: download, pin, unpack, convert, pin."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import safetensors

import vilam3_experts
from vilam3_experts.weight_files import fetch
from vilam3_experts.weight_files.lock import LockFile, Pin, pin_of_file
from vilam3_experts.weight_files.sources import Download, Source
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_CONVERTER = "vilam3_experts.weight_files.quarantine"
_SECONDS = 1200
# Needed by the interpreter and the loader. Credentials and proxies are not passed on.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LANG", "SYSTEMROOT")


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
        to_safetensors(own / pickled, own / target)
        (own / pickled).unlink()
    return provenance


def to_safetensors(source: Path, target: Path) -> None:
    """Converts a file of `torch.save` to safetensors without executing any of its code.

    `target` is written atomically. Raises `UserError` if the file is damaged or hostile, or has no tensors;
    names the global it asked for.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    package = os.path.dirname(os.path.dirname(os.path.abspath(vilam3_experts.__file__)))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    environment["OMP_NUM_THREADS"] = "1"
    try:
        done = subprocess.run(
            [sys.executable, "-s", "-m", _CONVERTER, os.path.abspath(source), os.path.abspath(partial)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            env=environment,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            reason = lines[-1] if lines else f"the converter ended with {done.returncode}"
            raise UserError(
                f"{source}: cannot be converted: {reason}; fetch the file again, or ask its publisher"
            )
        with safetensors.safe_open(partial, framework="numpy") as converted:
            if not list(converted.keys()):
                raise UserError(f"{source}: holds no tensors")
        partial.replace(target)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{source}: conversion took over {_SECONDS} s; fetch the file again") from error
    finally:
        partial.unlink(missing_ok=True)
