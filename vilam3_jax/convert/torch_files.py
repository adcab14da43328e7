"""Model folders whose weights are PyTorch's pickles: a copy with safetensors, made by another process."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from vilam3_jax.errors import UserError

_PICKLES = (".bin", ".pt", ".pth")
# What VILA and transformers leave beside the weights: states of a trainer, which are not weights.
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
_PROCESS = "vilam3_experts.torch_files"


def with_safetensors(folder: Path, scratch: Path) -> Path:
    """Mirrors a model folder with its pickled weights as safetensors.

    Nothing is unpickled in this process, and in the other only tensors (`weights_only=True`).

    Args:
      folder: of one component, or of a whole VILA model.
      scratch: empty folder with room for the weights.

    Returns:
      The mirror, in `scratch`; other files are links.

    Raises:
      UserError: a file is damaged or holds more than tensors, or the experts' package is not installed.
    """
    if importlib.util.find_spec(_PROCESS.split(".")[0]) is None:
        raise UserError("--torch_files needs PyTorch: pip install -e ./experts")
    mirror = scratch / folder.name
    for place in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        copy = mirror / place.relative_to(folder)
        copy.mkdir(parents=True)
        pickled = False
        for file in sorted(place.iterdir()):
            if not file.is_file() or file.name in _NO_WEIGHTS:
                continue
            if file.suffix in _PICKLES:
                pickled = True
            elif not file.name.endswith(".index.json"):
                (copy / file.name).symlink_to(file.resolve())
        if pickled:
            _convert(place, copy)
    return mirror


def _convert(source: Path, out: Path) -> None:
    weights = out / "pickled"
    weights.mkdir()
    for file in source.iterdir():
        if file.suffix in _PICKLES and file.name not in _NO_WEIGHTS:
            (weights / file.name).symlink_to(file.resolve())
    done = subprocess.run(
        [sys.executable, "-m", _PROCESS, str(weights), str(out)], capture_output=True, text=True, check=False
    )
    shutil.rmtree(weights)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{source}: its PyTorch files cannot be read ({said[-1]}); take the safetensors ones")
