"""Pickled weights → safetensors: `python -m vilam3_experts.weight_files.quarantine IN OUT`.

`convert.to_safetensors` starts it as a process of its own, without a network. It starts no other process,
writes one file, and has bounded memory and time. `torch.load(weights_only=True)` is tried first; what that
refuses goes to `pickled`.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import Any

_SECONDS = 900
_ROOM_BYTES = 6 << 30  # PyTorch itself, with CUDA
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
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
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _bound(size: int) -> None:
    """Bounds what the process may use; `size` is that of the file."""
    for kind, most in (
        (resource.RLIMIT_CPU, _SECONDS),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_DATA, _ROOM_BYTES + 5 * size),
        (resource.RLIMIT_FSIZE, 2 * size + (1 << 20)),
    ):
        _, hard = resource.getrlimit(kind)
        bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (bound, bound))


def _leave_network() -> None:
    """Moves to a network namespace without interfaces, where the kernel lets users have one.

    Where it does not, the audit hook alone keeps Python from opening a socket.
    """
    if unshare := getattr(ctypes.CDLL(None), "unshare", None):  # Linux
        unshare(_NEW_USER | _NEW_NETWORK)


def _forbid(out: Path) -> None:
    """Ends the process when Python code tries what no conversion needs. A hook cannot be removed."""
    allowed = os.fspath(out)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[0] != allowed and arguments[2] & _WRITING
        if writes or event.startswith(_FORBIDDEN):
            os.write(2, f"refused: the file made the converter try {event}\n".encode())
            os._exit(3)

    sys.addaudithook(hook)


def _convert(source: Path, out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from vilam3_experts.weight_files.pickled import Refused, check_container, is_archive, read_tensors

    _forbid(out)
    check_container(source)
    try:
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=is_archive(source))
    except Exception:  # more than tensors in plain containers, or damage, which the other reader names
        state = read_tensors(source)
    if isinstance(state, dict) and len(state) == 1 and isinstance(next(iter(state.values())), dict):
        (state,) = state.values()  # checkpoints name what they hold: {"state_dict": ...}
    if not isinstance(state, dict) or not state:
        raise Refused("it holds something else than named tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            raise Refused(f"its entry {ascii(name)[:80]} is no dense tensor with a name")
    if sum(value.nbytes for value in state.values()) > 2 * source.stat().st_size:
        raise Refused("its tensors are larger than the file")
    # Copies, because safetensors refuses tensors that share memory.
    save_file({k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in state.items()}, out)


def main(arguments: list[str]) -> int:
    """Converts one file; an error is one line."""
    source, out = map(Path, arguments)
    _bound(source.stat().st_size)
    _leave_network()
    try:
        _convert(source, out)
    except MemoryError:
        print("it asks for more memory than weights of its size need", file=sys.stderr)
        return 2
    except Exception as error:  # whatever a damaged or hostile file makes the libraries raise
        print(" ".join(str(error).split())[:500] or type(error).__name__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
