"""PyTorch's pickled weights → safetensors, in its own process: `python -m vilam3_experts.torch_files IN OUT`.

`vilam3 convert import --torch_files` starts it. `torch.load(weights_only=True)` builds tensors and plain
containers only; a file that asks for anything else is refused.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

_INDEX = "model.safetensors.index.json"
_GROUP_BYTES = 1_000_000_000


def convert(files: list[Path], out: Path) -> None:
    """Writes the tensors of `files` as safetensors of about a gigabyte, and an index.

    Raises:
      ValueError: a file holds something else than a flat dict of tensors, or a tensor twice.
    """
    where: dict[str, str] = {}
    group: dict[str, torch.Tensor] = {}
    count = 0

    def save() -> None:
        nonlocal count
        count += 1
        name = f"from_pickle-{count:05}.safetensors"
        # Copies, because safetensors refuses tensors that share memory, as tied embeddings do.
        save_file(
            {key: value.clone(memory_format=torch.contiguous_format) for key, value in group.items()},
            out / name,
        )
        where.update(dict.fromkeys(group, name))
        group.clear()

    for file in files:
        # Files older than PyTorch 1.6 are no archives and cannot be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(state, dict) or not all(
            isinstance(value, torch.Tensor) for value in state.values()
        ):
            raise ValueError(f"{file.name}: holds something else than a dict of tensors")
        for key, value in state.items():
            if key in where or key in group:
                raise ValueError(f"{file.name}: tensor {key!r} is also in another file; remove the stale one")
            group[key] = value
            if sum(tensor.nbytes for tensor in group.values()) > _GROUP_BYTES:
                save()
    save()
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
