"""Copies model folders with pickled PyTorch weights to safetensors, in another process."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from vilam3_jax.convert.source_checks import NO_WEIGHTS
from vilam3_jax.convert.vila import PARTS
from vilam3_jax.errors import UserError

_PICKLES = (".bin", ".pt", ".pth")
_PROCESS = "vilam3_experts.torch_files"


def with_safetensors(folder: Path, scratch: Path) -> Path:
    """Mirrors a model folder with its pickled weights as safetensors.

    This process unpickles nothing; the other one builds only tensors (`weights_only=True`).

    Args:
      folder: folder of one component, or of a whole VILA model.
      scratch: empty folder with room for the weights.

    Returns:
      The mirror, inside `scratch`; other files are links.

    Raises:
      UserError: a file is damaged or holds anything but tensors, or the experts' package is not installed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --torch_files needs a model folder")
    if importlib.util.find_spec(_PROCESS.split(".")[0]) is None:
        raise UserError("--torch_files needs PyTorch: pip install -e ./experts")
    mirror = scratch / folder.name
    for place in (folder, *(folder / part for part in PARTS.values() if (folder / part).is_dir())):
        copy = mirror / place.relative_to(folder)
        copy.mkdir(parents=True)
        files = [file for file in sorted(place.iterdir()) if file.is_file()]
        pickles = [file for file in files if file.suffix in _PICKLES and not file.name.startswith(NO_WEIGHTS)]
        for file in files:
            # Beside pickles, link no other weights: they would be read, and a link could be written through.
            weights = file.suffix in (*_PICKLES, ".safetensors") or file.name.endswith(".index.json")
            if not (pickles and weights):
                (copy / file.name).symlink_to(file.resolve())
        if pickles:
            _convert(place, pickles, copy)
    return mirror


def _convert(source: Path, pickles: list[Path], out: Path) -> None:
    weights = out / "pickled"
    weights.mkdir()
    for file in pickles:
        (weights / file.name).symlink_to(file.resolve())
    done = subprocess.run(
        [sys.executable, "-m", _PROCESS, str(weights), str(out)], capture_output=True, text=True, check=False
    )
    shutil.rmtree(weights)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{source}: its PyTorch files cannot be read ({said[-1]}); take the safetensors ones")
