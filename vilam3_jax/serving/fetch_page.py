"""Fetches NiiVue for the page of `vilam3 serve`: one file of a pinned npm package.

Run it with `make page`, or as `python -m vilam3_jax.serving.fetch_page`. npm downloads the archive. Without
NiiVue, the page has no 3-D view.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vilam3_jax.cli import guarded
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

VERSION = "0.69.0"
SHA256 = "6e9a6a471b428eb3b258a0086beca9187d95e43a781a39e8a519c6da246af485"
MEMBER = "package/dist/index.js"  # the module with all its dependencies
MEMBER_SHA256 = "d6c2be4feb1ad53b2ac76b4196da8d8fd2263b662b511c55ca0fd127eb6a6532"
NOTICE = f"""NiiVue {VERSION}, https://github.com/niivue/niivue
Copyright (c) 2021, Niivue. BSD 2-Clause License, https://opensource.org/license/bsd-2-clause
"""
_FOLDER = Path(__file__).with_name("page") / "vendor"
_MAX_ARCHIVE = 64 << 20
_MAX_MEMBER = 16 << 20
_SECONDS = 60


def module_of(archive: bytes) -> bytes:
    """NiiVue's module out of the archive; raises `UserError` unless both are the pinned ones."""
    if hashlib.sha256(archive).hexdigest() != SHA256:
        raise UserError(f"the archive is not NiiVue {VERSION}, its sha256 differs; fetch it again")
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as members:
        file = members.extractfile(MEMBER)
        data = b"" if file is None else file.read(_MAX_MEMBER)
    if hashlib.sha256(data).hexdigest() != MEMBER_SHA256:
        raise UserError(f"{MEMBER} in the archive of NiiVue {VERSION} has another sha256; fetch it again")
    return data


def pack(package: str, version: str, folder: Path) -> Path:
    """Downloads the archive of an npm package into `folder`, from the registry that npm is configured for.

    Raises:
      UserError: npm is not installed, or cannot download the package.
    """
    command = ["npm", "pack", f"{package}@{version}", f"--pack-destination={folder}", "--ignore-scripts"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{package} cannot be downloaded: npm is not installed, or takes too long") from error
    archive = folder / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if done.returncode or not archive.exists():
        reason = next((line for line in done.stderr.splitlines() if "npm error" in line), "no archive")
        raise UserError(f"{package} cannot be downloaded ({reason}); check npm's configuration")
    return archive


def _download() -> bytes:
    with tempfile.TemporaryDirectory(prefix="vilam3-") as folder:
        try:
            return pack("@niivue/niivue", VERSION, Path(folder)).read_bytes()
        except UserError as error:
            raise UserError(f"{error}; or give the archive with --archive") from error


def main(argv: Sequence[str]) -> int:
    """Entry of the command."""
    parser = argparse.ArgumentParser(prog="python -m vilam3_jax.serving.fetch_page", description=__doc__)
    parser.add_argument("--archive", help=f"niivue-{VERSION}.tgz, if this machine has no network")
    options = parser.parse_args(argv)
    if options.archive and not paths.exists(options.archive):
        raise UserError(f"--archive={options.archive}: no such file")
    archive = paths.read_bytes(options.archive, _MAX_ARCHIVE) if options.archive else _download()
    data = module_of(archive)
    _FOLDER.mkdir(exist_ok=True)
    partial = _FOLDER / "niivue.js.partial"
    partial.write_bytes(data)
    partial.replace(_FOLDER / "niivue.js")
    (_FOLDER / "niivue.txt").write_text(NOTICE)
    print(f"NiiVue {VERSION} is in {_FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded("fetch_page", main, sys.argv[1:]))
