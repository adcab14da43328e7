"""Runs the quarantined converter and checks its output."""

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
# Needed by the interpreter and the loader. Credentials and proxies are not passed on.
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LANG", "SYSTEMROOT")


def to_safetensors(source: Path, target: Path) -> None:
    """Converts a file of `torch.save` to safetensors without executing any of its code.

    `target` is written atomically. Raises `UserError` if the file is damaged or hostile, or has no tensors;
    names the global it asked for.
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
            reason = lines[-1] if lines else f"the converter ended with {done.returncode}"
            raise UserError(
                f"{source}: cannot be converted: {reason}; fetch the file again, or ask its publisher"
            )
        with safetensors.safe_open(partial, framework="numpy") as converted:
            if not list(converted.keys()):
                raise UserError(f"{source}: holds no tensors")
        partial.replace(target)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{source}: conversion took over {_SECONDS} s; fetch the file again") from error
    finally:
        partial.unlink(missing_ok=True)
