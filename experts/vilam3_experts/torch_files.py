"""PyTorch's pickled weights → safetensors, in its own process: `python -m vilam3_experts.torch_files IN OUT`.

`vilam3 convert import --torch_files` starts it. `torch.load(weights_only=True)` builds tensors and plain
containers only; a file that asks for anything else is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

_INDEX = "model.safetensors.index.json"


def convert(files: list[Path], out: Path) -> None:
    """Writes one safetensors file for each of `files`, and the index.

    Raises:
      ValueError: a file holds something else than a flat dict of tensors, or a tensor twice.
    """
    where: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict) or not all(
            isinstance(value, torch.Tensor) for value in state.values()
        ):
            raise ValueError(f"{file}: holds something else than a dict of tensors")
        doubled = sorted(where.keys() & state.keys())
        if doubled:
            raise ValueError(f"{file}: tensor {doubled[0]} is also in another file; remove the stale one")
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        # Copies, because safetensors refuses tensors that share memory, as tied embeddings do.
        save_file(
            {key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()},
            out / name,
        )
        where |= dict.fromkeys(state, name)
    (out / _INDEX).write_text(json.dumps({"weight_map": where}))


def main(arguments: list[str]) -> int:
    """Converts the `.bin`, `.pt` and `.pth` files of a folder; errors are one line."""
    source, out = map(Path, arguments)
    files = sorted(file for kind in ("bin", "pt", "pth") for file in source.glob(f"*.{kind}"))
    try:
        convert(files, out)
    except Exception as error:  # whatever a damaged or hostile file makes torch raise
        print(" ".join(str(error).split())[:500] or type(error).__name__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
