"""Starts the quarantined converter and checks what comes out of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import safetensors

import vilam3_experts
from vilam3_jax.errors import UserError

_MODULE = "vilam3_experts.weight_files.quarantine"
_SECONDS = 1200
# What the interpreter and the loader need; no credential or proxy is among them.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LANG", "SYSTEMROOT")


def to_safetensors(source: Path, target: Path) -> None:
    """Converts a pickled state dict or module to safetensors, without executing anything of it.

    Args:
      source: a file of `torch.save`.
      target: written in one move; its folder must be there.

    Raises:
      UserError: the file is damaged or hostile, or holds no tensors; says which global it asked for.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    package = os.path.dirname(os.path.dirname(os.path.abspath(vilam3_experts.__file__)))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    environment["OMP_NUM_THREADS"] = "1"
    try:
        done = subprocess.run(
            [sys.executable, "-s", "-m", _MODULE, os.path.abspath(source), os.path.abspath(partial)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            env=environment,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            told = lines[-1] if lines else f"the converter ended with {done.returncode}"
            raise UserError(
                f"{source}: cannot be converted: {told}; fetch the file again, or ask who made it"
            )
        with safetensors.safe_open(partial, framework="numpy") as made:
            if not list(made.keys()):
                raise UserError(f"{source}: holds no tensors")
        partial.replace(target)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{source}: was not converted in {_SECONDS} s; fetch the file again") from error
    finally:
        partial.unlink(missing_ok=True)
