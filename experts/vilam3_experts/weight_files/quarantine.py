"""Converts pickled weights to safetensors: `python -m vilam3_experts.weight_files.quarantine IN OUT`.

`install.to_safetensors` runs it in a separate process without network access. It starts no other process,
writes one file, and has bounded memory and time. It tries `torch.load(weights_only=True)` first; files that
this refuses go to `pickled`.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import Any

_CPU_SECONDS = 900
_BASE_BYTES = 6 << 30  # PyTorch itself, with CUDA
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_FORBIDDEN = (
    "ctypes.",
    "os.exec",
    "os.fork",
    "os.link",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.spawn",
    "os.symlink",
    "os.system",
    "pty.",
    "socket.",
    "subprocess.",
)
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _limit_resources(size: int) -> None:
    """Sets resource limits for the conversion of a file of `size` bytes."""
    for kind, most in (
        (resource.RLIMIT_CPU, _CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_DATA, _BASE_BYTES + 5 * size),
        (resource.RLIMIT_FSIZE, 2 * size + (1 << 20)),
    ):
        _, hard = resource.getrlimit(kind)
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (bound, bound))


def _drop_network() -> None:
    """Enters a network namespace without interfaces, if the kernel allows users to create one.

    Otherwise only the audit hook prevents Python from opening a socket.
    """
    if unshare := getattr(ctypes.CDLL(None), "unshare", None):  # Linux
        unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _add_audit_hook(out: Path) -> None:
    """Ends the process on any operation that no conversion needs. Audit hooks cannot be removed."""
    allowed = os.fspath(out)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[0] != allowed and arguments[2] & _WRITE_FLAGS
        if writes or event.startswith(_FORBIDDEN):
            os.write(2, f"refused: the file made the converter try {event}\n".encode())
            os._exit(3)

    sys.addaudithook(hook)


def _convert(source: Path, out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from vilam3_experts.weight_files.pickled import (
        InvalidFileError,
        check_container,
        is_archive,
        read_tensors,
    )

    _add_audit_hook(out)
    check_container(source)
    try:
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=is_archive(source))
    except Exception:  # more than tensors in plain containers, or damage, which `read_tensors` names
        state = read_tensors(source)
    if isinstance(state, dict) and len(state) == 1 and isinstance(next(iter(state.values())), dict):
        (state,) = state.values()  # checkpoints such as {"state_dict": ...}
    if not isinstance(state, dict) or not state:
        raise InvalidFileError("it is not a dict of named tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise InvalidFileError(f"its entry {ascii(name)[:80]} is not a named dense tensor")
    if sum(value.nbytes for value in state.values()) > 2 * source.stat().st_size:
        raise InvalidFileError("its tensors are larger than the file")
    # Clones, because safetensors rejects tensors that share memory.
    save_file({k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in state.items()}, out)


def main(arguments: list[str]) -> int:
    """Converts one file; prints an error as one line."""
    source, out = map(Path, arguments)
    _limit_resources(source.stat().st_size)
    _drop_network()
    try:
        _convert(source, out)
    except MemoryError:
        print("it asks for more memory than weights of its size need", file=sys.stderr)
        return 2
    except Exception as error:  # damaged or hostile files make the libraries raise anything
        print(" ".join(str(error).split())[:500] or type(error).__name__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
