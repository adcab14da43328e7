"""What the TPU's compiler makes of a step, kept on disk: a compilation takes minutes, all else seconds."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import zlib
from typing import Any

import jax

from vilam3_jax.errors import UserError
from vilam3_jax.plan.topology import Topology
from vilam3_jax.runtime import paths
from vilam3_jax.training import program as program_lib
from vilam3_jax.training.chips import GIB


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step, or how far it is from fitting.

    Attributes:
      text: the optimised HLO module; empty if the step does not fit.
      needed: bytes that a device holds: arguments, temporary buffers, the holes between them, the program.
      temporary: bytes of these that are neither arguments nor results; 0 if the step does not fit.
      limit: bytes that a program may use, as the compiler said when it refused; 0 if it did not.
    """

    text: str
    needed: float
    temporary: float = 0.0
    limit: float = 0.0


def compile_lowered(lowered: Any) -> Compiled:
    """Compiles what `Program.lower` gives.

    Raises:
      UserError: the compiler refuses the step for another reason than memory.
    """
    with tempfile.TemporaryDirectory(prefix="vilam3-plan-") as folder:
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except Exception as error:  # XlaRuntimeError's place differs between versions
            needed, limit = _out_of_memory(error)
            return Compiled("", needed, limit=limit)
        assigned = _assigned(folder)
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return Compiled(
        compiled.as_text(),
        assigned + stats.generated_code_size_in_bytes,
        max(assigned - held, 0.0),
    )


# Other memories than HBM have a `color`.
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(?! color)(.*):$", re.MULTILINE)


def _assigned(folder: paths.PathLike) -> float:
    """Bytes of HBM that the compiler assigned to buffers; by these it refuses what does not fit.

    `memory_analysis` of libtpu 0.0.42.1 counts some buffers twice: arguments and temporary bytes together
    are 4 to 40 % more; its peak leaves out the holes. The total of the compiler's report of memory has
    buffers of its caller that a computation for the sparse cores uses once more ("thread-local"; libtpu
    0.0.52: up to 50 %). Neither counts where the compiler refuses.

    Args:
      folder: where the compiler dumped one TPU program (`xla_dump_to`, with `xla_dump_hlo_as_text`).

    Raises:
      UserError: the folder has not one assignment of buffers.
    """
    children = paths.children(paths.as_path(folder))
    texts = [path.read_text() for path in children if path.name.endswith("-buffer-assignment.txt")]
    sizes = [
        int(match[1])
        for text in texts
        for match in _ALLOCATION.finditer(text)
        if "thread-local" not in match[2]
    ]
    if len(texts) != 1 or not sizes:
        raise UserError("libtpu wrote no account of the step's memory; use the version of the constraints")
    return float(sum(sizes))


class Cache:
    """Compiled steps by all that they depend on: the step's StableHLO, devices, options, jax and libtpu.

    A price, or a change of the code that leaves the step as it was, compiles nothing again.

    Attributes:
      compiled: how many steps were not there.

    Raises:
      UserError: the folder cannot be made.
    """

    def __init__(self, folder: paths.PathLike) -> None:
        self._folder = paths.as_path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # not after minutes of compiling
        except OSError as error:
            raise UserError(f"--cache {folder}: cannot be made: {error.strerror}") from error
        self.compiled = 0

    def compile(self, program: program_lib.Program, topology: Topology) -> Compiled:
        """The compiled step of `program`, whose mesh is of `topology`; a damaged file is written anew."""
        lowered = program.lower()
        path = self._folder / f"{_key(program, topology, lowered.as_text())}.json.gz"
        try:
            return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
        except (OSError, EOFError, zlib.error, ValueError, TypeError):
            made = compile_lowered(lowered)
        self.compiled += 1
        paths.write_bytes_atomic(path, gzip.compress(json.dumps(dataclasses.asdict(made)).encode()))
        return made


def _key(program: program_lib.Program, topology: Topology, stablehlo: str) -> str:
    about = [
        hashlib.sha256(stablehlo.encode()).hexdigest(),
        topology.name,
        [int(device.id) for device in program.mesh.devices.flat],
        sorted(program_lib.compiler_options(program.config.compiler_options, program.mesh).items()),
        [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")],
        [jax.__version__, _version("jaxlib"), _version("libtpu")],
        "memory as assigned, callers' buffers once",  # earlier entries have another account
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


_PREFIXES = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"
_OUT_OF_MEMORY = (  # of different versions of libtpu
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"total memory required for \D*\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
)


def _out_of_memory(error: Exception) -> tuple[float, float]:
    """(needed, allowed) bytes per device of what the compiler says of a step that does not fit."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        raise UserError(f"the compiler refuses this step: {text.splitlines()[0]}") from error
    for pattern in _OUT_OF_MEMORY:
        if match := re.search(pattern, text):
            needed, limit = (float(match[n]) * _PREFIXES[match[n + 1]] for n in (1, 3))
            return needed, limit
    raise UserError(
        f"the compiler ran out of memory and does not say how far: {text.splitlines()[0]}"
    ) from error
