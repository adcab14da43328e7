"""TPU slices by topology (`v5p:4x4x4`) or product name (`v5p-128`)."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import itertools
import math
import re
from typing import Any

from jax.experimental import topologies

from vilam3_jax.errors import UserError
from vilam3_jax.runtime.chips import CHIPS, Chip

_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6lite": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x"}
_TPUS = tuple(name for name, chip in CHIPS.items() if chip.torus_axes)
_EXAMPLES = ("v5e:16x16", "v5p:4x4x4", "v5p:4x8x8", "v6e:16x16", "tpu7x:4x4x4", "v5p-128", "v5litepod-256")
_WIDEST = 16  # chips along an axis of a two-axis torus
_SOLD = {  # torus axes → sides, smallest first; larger slices of three axes consist of 4x4x4 cubes
    2: ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 4), (2, 4, 4)),
}
_MOST_CUBES = 1024  # more than any pod has
_DEFAULT_HOST = (2, 2, 1)  # chips of a host; libtpu requires slices to be multiples
_HOSTS = {1: (1, 1, 1), 2: (1, 2, 1)}  # slices smaller than that


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more equal slices.

    Attributes:
      chip: its generation.
      shape: chips along each axis of the torus of one slice.
      slices: number of slices, joined by the data-centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def name(self) -> str:
        """The name that `parse` reads, with the number of slices if there are several."""
        return f"{self._prefix}{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def product(self) -> str:
        """The name of the product, such as `v5p-128`."""
        name = "v5litepod" if self.chip.name == "v5e" else self.chip.name
        return f"{self._prefix}{name}-{math.prod(self.shape) * (2 if self.chip.cores_in_name else 1)}"

    @property
    def _prefix(self) -> str:
        return f"{self.slices}x" if self.slices > 1 else ""

    def wrapped(self, axis: int) -> bool:
        """Whether an axis is a ring (Google's pages on each generation).

        With three axes: in slices of whole 4x4x4 cubes. With two axes: if the axis is 16 long.
        """
        if self.chip.torus_axes == 3:
            return all(size % 4 == 0 for size in self.shape)
        return self.shape[axis] == 16

    def devices(self) -> list[Any]:
        """JAX devices of this topology, for compilation only.

        Raises:
          UserError: libtpu is not installed, or does not support the slice.
        """
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                "vilam3 plan compiles with libtpu, which is not installed; pip install -e '.[tpu]' (Linux on "
                "x86; no TPU is needed)"
            )
        shape = (*self.shape, 1)[:3]
        options: dict[str, Any] = {"chips_per_host_bounds": _HOSTS.get(math.prod(shape), _DEFAULT_HOST)}
        if self.chip.name == "v4":
            options["chip_config_name"] = "megacore"  # a chip is one device, as on Cloud TPUs
        if self.slices > 1:
            options["num_slices"] = self.slices
        name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        try:
            return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
        except Exception as error:  # the class differs between versions of JAX
            raise UserError(f"topology {name}: libtpu refuses it: {str(error).splitlines()[0]}") from error


def parse(name: str) -> Topology:
    """Parses the name of a topology or product, with the prefix `2x` for two slices.

    Raises:
      UserError: there is no such slice; names a similar one.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*?)(?::(\d+(?:x\d+){1,2})|-(\d+))", name.strip().lower())
    generation = _ALIASES.get(match[2], match[2]) if match else ""
    if not match or generation not in _TPUS:
        near = difflib.get_close_matches(name, _EXAMPLES, n=1, cutoff=0.3) or ["v5p:4x4x4"]
        raise UserError(
            f"topology {name!r}: unknown; did you mean {near[0]}? Generations are {', '.join(_TPUS)}; write "
            "v5p:4x4x4 (the torus) or v5p-128 (the product), 2xv5p-128 for two slices"
        )
    chip = CHIPS[generation]
    slices = int(match[1] or 1)
    if match[3]:
        shape = tuple(int(size) for size in match[3].split("x"))
        if len(shape) != chip.torus_axes:
            raise UserError(
                f"topology {name!r}: a {generation} slice has {chip.torus_axes} axes, such as "
                f"{'4x4x4' if chip.torus_axes == 3 else '16x16'}"
            )
    else:
        shape = _product_shape(name, chip, int(match[4]))
    if slices < 1 or min(shape) < 1:
        raise UserError(f"topology {name!r}: sizes are at least 1")
    if chip.torus_axes == 2 and max(shape) > _WIDEST:
        raise UserError(
            f"topology {name!r}: a {generation} slice has at most {_WIDEST}x{_WIDEST} chips; name several, "
            f"such as 2x{generation}:{_WIDEST}x{_WIDEST}"
        )
    whole_cubes = chip.torus_axes == 3 and not any(size % 4 for size in shape)
    if not whole_cubes and tuple(sorted(shape)) not in _SOLD[chip.torus_axes]:
        sold = ", ".join("x".join(map(str, small)) for small in _SOLD[chip.torus_axes])
        more = ", or multiples of 4 on every axis" if chip.torus_axes == 3 else ""
        raise UserError(f"topology {name!r}: no such slice; those of {generation} are {sold}{more}")
    return Topology(chip, shape, slices)


def _product_shape(name: str, chip: Chip, number: int) -> tuple[int, ...]:
    """The default topology of a product: the most cubic or square one."""
    chips, odd = divmod(number, 2) if chip.cores_in_name else (number, 0)
    shapes = [shape for shape in _SOLD[chip.torus_axes] if math.prod(shape) == chips]
    cubes, rest = divmod(chips, 64)
    if chip.torus_axes == 3 and 0 < cubes <= _MOST_CUBES and not rest:
        sides = [side for side in range(1, cubes + 1) if cubes % side == 0]
        factors = itertools.combinations_with_replacement(sides, 3)
        shapes = [(4 * a, 4 * b, 4 * c) for a, b, c in factors if a * b * c == cubes]
    if odd or not shapes:
        what = "cores, two a chip" if chip.cores_in_name else "chips"
        sold = ", ".join(str(math.prod(shape)) for shape in _SOLD[chip.torus_axes])
        more = " or a multiple of 64 chips" if chip.torus_axes == 3 else " chips"
        raise UserError(
            f"topology {name!r}: the number counts {what}; slices have {sold}{more}. Several are named like "
            f"2x{chip.name}:{'4x4x4' if chip.torus_axes == 3 else '16x16'}"
        )
    shape = min(shapes, key=sum)
    return (2, 2, 1) if shape == (1, 2, 2) else shape
