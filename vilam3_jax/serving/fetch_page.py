"""Fetches NiiVue for the page of `vilam3 serve`: one file of a pinned npm package.

Run it with `make page`, or as `python -m vilam3_jax.serving.fetch_page`. The page has no 3-D view
without it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import tarfile
import urllib.request
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
_REGISTRY = "https://registry.npmjs.org"
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


def npm_registry() -> str:
    """The registry of npm's environment variable, else the public one."""
    environment = {name.lower(): value for name, value in os.environ.items()}
    return (environment.get("npm_config_registry") or _REGISTRY).rstrip("/")


def _download() -> bytes:
    url = f"{npm_registry()}/@niivue/niivue/-/niivue-{VERSION}.tgz"
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as response:
            return response.read(_MAX_ARCHIVE)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(
            f"NiiVue cannot be downloaded ({reason}); check the network and npm_config_registry, "
            "or give --archive"
        ) from error


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
