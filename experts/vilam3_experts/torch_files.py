"""Converts pickled PyTorch weights to safetensors: `python -m vilam3_experts.torch_files IN OUT`.

`vilam3 convert import --torch_files` runs it as a separate process. `torch.load(weights_only=True)` builds
only tensors and plain containers; a file that asks for anything else is refused.
"""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 1_000_000_000


def convert(files: list[Path], out: Path) -> None:
    """Writes the tensors of `files` as safetensors shards of about a gigabyte, and an index.

    Raises `ValueError` if a file is not a flat dict of tensors, or a tensor is in two files.
    """
    shard_of: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def save() -> None:
        name = f"from_pickle-{len(set(shard_of.values())) + 1:05}.safetensors"
        # Clones, because safetensors rejects tensors that share memory, such as tied embeddings.
        save_file(
            {key: value.clone(memory_format=torch.contiguous_format) for key, value in shard.items()},
            out / name,
        )
        shard_of.update(dict.fromkeys(shard, name))
        shard.clear()

    for file in files:
        # Files older than PyTorch 1.6 are not archives and cannot be mapped.
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
            raise ValueError(f"{file.name}: is not a dict of tensors")
        for key, value in state.items():
            if key in shard_of or key in shard:
                raise ValueError(f"{file.name}: tensor {key!r} is also in another file; remove the stale one")
            shard[key] = value
            if sum(tensor.nbytes for tensor in shard.values()) > _SHARD_BYTES:
                save()
    save()
    (out / _INDEX).write_text(json.dumps({"weight_map": shard_of}))


def main(arguments: list[str]) -> int:
    """Converts the `.bin`, `.pt` and `.pth` files of a folder; prints an error as one line."""
    source, out = map(Path, arguments)
    files = sorted(file for kind in ("bin", "pt", "pth") for file in source.glob(f"*.{kind}"))
    try:
        convert(files, out)
    except Exception as error:  # damaged or hostile files make torch raise anything
        print(" ".join(str(error).split())[:500] or type(error).__name__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
