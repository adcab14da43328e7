"""The lock file of a weights folder: the sha256 of every file, recorded at first use."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

from etils import epath

from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

FILE = "weights.lock.json"
_VERSION = 1
_MAX_BYTES = 1 << 20
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Pin:
    """The recorded identity of a file.

    `origin` and `revision` are empty for a file that was found in the folder. `converted_from` is the sha256
    of the pickled file that it was converted from, or ''.
    """

    sha256: str
    size: int
    origin: str = ""
    revision: str = ""
    converted_from: str = ""


class LockFile:
    """`weights.lock.json` of one folder."""

    def __init__(self, folder: paths.PathLike) -> None:
        """Reads the file, if there is one; raises `UserError` if it is damaged."""
        self.path = paths.as_path(folder) / FILE
        self.pins: dict[str, Pin] = {}
        if paths.exists(self.path):
            self.pins = _parse(self.path)

    def check(self, name: str, found: Pin) -> None:
        """Compares a file with its pin, or pins it if it has none; `name` is its path below the folder.

        Raises `UserError` if the file changed, or the lock file cannot be written.
        """
        pinned = self.pins.get(name)
        if pinned is None:
            self.pin(name, found)
        elif pinned.sha256 != found.sha256:
            raise UserError(
                f"{self.path.parent / name}: sha256 {found.sha256}, but {pinned.sha256} was pinned at"
                f" first use; restore the file, or delete its entry in {self.path} to accept the change"
            )

    def pin(self, name: str, found: Pin) -> None:
        """Pins a file, replacing an existing pin; raises `UserError` if the lock file cannot be written."""
        self.pins[name] = found
        files = {name: dataclasses.asdict(pin) for name, pin in sorted(self.pins.items())}
        text = json.dumps({"version": _VERSION, "files": files}, indent=1) + "\n"
        try:
            paths.write_text_atomic(self.path, text)
        except UserError as error:
            raise UserError(
                f"{error}; run `vilam3-experts weights --weights {self.path.parent}` once where it can be"
                " written"
            ) from error


def _parse(path: epath.Path) -> dict[str, Pin]:
    try:
        stored: Any = json.loads(paths.read_bytes(path, _MAX_BYTES))
        if stored["version"] != _VERSION:
            raise ValueError(f"version {stored['version']!r}")
        pins = {str(name): Pin(**row) for name, row in stored["files"].items()}
        for name, pin in pins.items():
            if not _SHA256.fullmatch(pin.sha256):
                raise ValueError(f"no sha256 for {name!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a lock file of version {_VERSION} ({error}); restore it, or delete it to pin anew"
        ) from error
    return pins


def pin_of_bytes(content: bytes) -> Pin:
    return Pin(hashlib.sha256(content).hexdigest(), len(content))


def pin_of_file(path: paths.PathLike, **fields: str) -> Pin:
    """The pin of a file of any size; `fields` are further fields of `Pin`."""
    with paths.as_path(path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
        return Pin(digest.hexdigest(), file.tell(), **fields)
