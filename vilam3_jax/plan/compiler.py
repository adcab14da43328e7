"""Compiles steps for TPUs and caches the results on disk: a compilation takes minutes."""

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
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from vilam3_jax.errors import UserError
from vilam3_jax.plan.topology import Topology
from vilam3_jax.runtime import paths
from vilam3_jax.runtime.chips import GIB


class Lowerable(Protocol):
    """A program that can be compiled for a slice."""

    @property
    def mesh(self) -> Mesh:
        """Its devices."""
        ...

    @property
    def compiler_options(self) -> Mapping[str, Any]:
        """XLA options that it is compiled with."""
        ...

    def lower(self) -> Any:
        """Traces it."""
        ...


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step, or the memory of a step that does not fit.

    Attributes:
      text: the optimised HLO module; empty if the step does not fit.
      needed: bytes per device: arguments, temporary buffers, fragmentation and the program.
      temporary: bytes of these that are neither arguments nor results; 0 if the step does not fit.
      limit: available bytes, from the compiler's error if the step does not fit; otherwise 0.
    """

    text: str
    needed: float
    temporary: float = 0.0
    limit: float = 0.0


def compile_lowered(lowered: Any) -> Compiled:
    """Compiles the result of `Lowerable.lower`.

    Raises:
      UserError: the compiler fails for another reason than memory.
    """
    with tempfile.TemporaryDirectory(prefix="vilam3-plan-") as folder:
        try:
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except Exception as error:  # the location of XlaRuntimeError differs between versions
            needed, limit = _out_of_memory(error)
            return Compiled("", needed, limit=limit)
        assigned = _assigned(folder)
    stats = compiled.memory_analysis()
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    needed = assigned + stats.generated_code_size_in_bytes
    return Compiled(compiled.as_text(), needed, max(assigned - held, 0.0))


# Memories other than HBM have a `color`; those marked "thread-local" are shared, see `_assigned`.
_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(?! color)(?!.*thread-local).*:$", re.MULTILINE)


def _assigned(folder: paths.PathLike) -> float:
    """Bytes of HBM that the compiler assigned to buffers, by which it also decides whether a step fits.

    `memory_analysis` of libtpu 0.0.42.1 counts some buffers twice (4 to 40 % too large), and its peak omits
    fragmentation. The total of the memory report counts buffers that sparse-core computations share with
    their caller twice ("thread-local"; libtpu 0.0.52: up to 50 % too large).

    Args:
      folder: dump of one TPU program (`xla_dump_to`, with `xla_dump_hlo_as_text`).

    Raises:
      UserError: the folder does not have exactly one buffer assignment.
    """
    children = paths.children(paths.as_path(folder))
    texts = [path.read_text() for path in children if path.name.endswith("-buffer-assignment.txt")]
    sizes = [int(size) for text in texts for size in _ALLOCATION.findall(text)]
    if len(texts) != 1 or not sizes:
        raise UserError("libtpu did not report the memory of the step; install the version in constraints/")
    return float(sum(sizes))


class Cache:
    """Compiled steps, keyed by StableHLO, devices, compiler options and the versions of jax and libtpu.

    Attributes:
      compiled: number of cache misses.

    Raises:
      UserError: the folder cannot be made.
    """

    def __init__(self, folder: paths.PathLike) -> None:
        self._folder = paths.as_path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)  # fail before minutes of compiling
        except OSError as error:
            raise UserError(f"--cache {folder}: cannot be made: {error.strerror}") from error
        self.compiled = 0

    def compile(self, program: Lowerable, topology: Topology) -> Compiled:
        """`program`, whose mesh is of `topology`, compiled; replaces a damaged file."""
        lowered = program.lower()
        path = self._folder / f"{_key(program, topology, lowered.as_text())}.json.gz"
        try:
            return Compiled(**json.loads(gzip.decompress(path.read_bytes())))
        except (OSError, EOFError, zlib.error, ValueError, TypeError):
            made = compile_lowered(lowered)
        self.compiled += 1
        paths.write_bytes_atomic(path, gzip.compress(json.dumps(dataclasses.asdict(made)).encode()))
        return made


def _key(program: Lowerable, topology: Topology, stablehlo: str) -> str:
    key = [
        hashlib.sha256(stablehlo.encode()).hexdigest(),
        topology.name,
        [int(device.id) for device in program.mesh.devices.flat],
        sorted(program.compiler_options.items()),
        [os.environ.get(name, "") for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")],
        [jax.__version__, _version("jaxlib"), _version("libtpu")],
        "memory as assigned, callers' buffers once",  # earlier entries count memory differently
    ]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


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
    """(needed, available) bytes per device, from the compiler's error about a step that does not fit."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
        raise UserError(f"the compiler refuses this step: {text.splitlines()[0]}") from error
    for pattern in _OUT_OF_MEMORY:
        if match := re.search(pattern, text):
            needed, limit = (float(match[n]) * _PREFIXES[match[n + 1]] for n in (1, 3))
            return needed, limit
    raise UserError(
        f"the compiler ran out of memory and does not report how much it needs: {text.splitlines()[0]}"
    ) from error
