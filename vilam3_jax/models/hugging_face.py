"""Building blocks of a family's Hugging Face layout: tensor rules, and values of config.json.

In config.json null counts as absent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vilam3_jax.errors import UserError

_LARGEST_SIZE = 1 << 24

Shape = tuple[int, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """How a foreign tensor stores one of our arrays.

    Attributes:
      axes: foreign axis of each of our axes; None keeps the order.
      part: index of our array among the equal `parts` of the foreign tensor's first axis.
      parts: number of parts.
      leading: the foreign tensor has an extra leading axis of size 1; excludes the other fields.
    """

    axes: tuple[int, ...] | None = None
    part: int = 0
    parts: int = 1
    leading: bool = False

    def ours(self, shape: Shape) -> Shape | None:
        """Our shape for a foreign tensor of `shape`; None if they do not fit."""
        if self.leading:
            return shape[1:] if shape[:1] == (1,) else None
        if not shape or shape[0] % self.parts or (self.axes and len(self.axes) != len(shape)):
            return None
        shape = (shape[0] // self.parts, *shape[1:])
        return tuple(shape[axis] for axis in self.axes) if self.axes else shape

    def foreign(self, shape: Shape) -> Shape:
        """The shape of the whole foreign tensor for our `shape`."""
        if self.leading:
            return (1, *shape)
        shape = self._reordered(shape)
        return (shape[0] * self.parts, *shape[1:])

    def read(self, rows: Callable[[int, int], np.ndarray], shape: Shape, where: Index) -> np.ndarray:
        """Reads a block of our array from the foreign rows that it needs.

        Args:
          rows: (start, stop) → those rows of the foreign tensor's first axis.
          shape: our shape.
          where: a slice with start and stop for each of our axes.

        Returns:
          The block, usually a non-contiguous view.
        """
        if self.leading:
            return rows(0, 1)[0][where]
        foreign = self._reordered(where)
        offset = self.part * self._reordered(shape)[0]
        block = rows(offset + foreign[0].start, offset + foreign[0].stop)[(slice(None), *foreign[1:])]
        return block.transpose(self.axes) if self.axes else block

    def write(self, array: np.ndarray) -> tuple[np.ndarray, int]:
        """Our whole `array` in the foreign layout, and its first row in the foreign tensor."""
        if self.leading:
            return array[None], 0
        if self.axes:
            array = array.transpose(np.argsort(self.axes))
        return array, self.part * array.shape[0]

    def _reordered(self, ours: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(ours[place] for place in np.argsort(self.axes)) if self.axes else ours


KEEP = Layout()
TRANSPOSE = Layout(axes=(1, 0))  # PyTorch's [out, in] → our [in, out]
LEADING = Layout(leading=True)
PATCHES = Layout(axes=(2, 3, 1, 0))  # PyTorch's [out, in, height, width] → [height, width, in, out]


@dataclass(frozen=True)
class TensorRule:
    """Which foreign tensors store the parameter `target`.

    Attributes:
      target: path of the parameter.
      sources: tensor names, one per layer if `stacked`, otherwise exactly one.
      layout: layout of each of these tensors.
      stacked: whether the parameter has a leading layer axis.
    """

    target: str
    sources: tuple[str, ...]
    layout: Layout
    stacked: bool = False


def single(target: str, rows: Iterable[tuple[str, str, Layout]]) -> list[TensorRule]:
    """Parameters of one layer; rows are (our name within `target`, the foreign name, layout)."""
    return [TensorRule(f"{target}{ours}", (theirs,), layout) for ours, theirs, layout in rows]


def dense(target: str, source: str, weight: str = "kernel", layout: Layout = TRANSPOSE) -> list[TensorRule]:
    """A linear layer with bias."""
    return single(f"{target}/", [(weight, f"{source}.weight", layout), ("bias", f"{source}.bias", KEEP)])


def layer_norm(target: str, source: str) -> list[TensorRule]:
    """A layer norm."""
    return dense(target, source, "scale", KEEP)


def stacked(
    target: str, source: str, count: int, rows: Iterable[tuple[str, str, Layout]]
) -> list[TensorRule]:
    """Parameters of `count` stacked layers; rows are (our name within a layer, the foreign name, layout)."""
    rules = []
    for ours, theirs, layout in rows:
        sources = tuple(f"{source}.{layer}.{theirs}" for layer in range(count))
        rules.append(TensorRule(f"{target}/{ours}", sources, layout, stacked=True))
    return rules


def whole(value: Any, what: str) -> int:
    """Checks a size; raises UserError with the name `what` unless it is a plausible positive integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 < value <= _LARGEST_SIZE:
        raise UserError(
            f"{what} is {value!r}, a positive size was expected; the file is damaged, download it again"
        )
    return int(value)


def layer_count(value: Any, tensors: Mapping[str, Any], what: str) -> int:
    """Checks a number of layers; each has at least one of the `tensors`."""
    count = whole(value, what)
    if count > len(tensors):
        raise UserError(f"{what} is {count}, but there are only {len(tensors)} tensors; download it again")
    return count


def size(values: Mapping[str, Any], key: str, where: Path | str, default: int | None = None) -> int:
    """A positive integer of config.json."""
    value = values.get(key)
    return whole(default if value is None else value, f"{where}: {key}")


def read_sizes(
    values: Mapping[str, Any], where: Path, keys: Mapping[str, str], defaults: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Sizes of config.json by our names; `keys` maps our names to its keys."""
    return {ours: size(values, key, where, (defaults or {}).get(ours)) for ours, key in keys.items()}


def write_sizes(section: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `read_sizes`."""
    return {key: getattr(section, ours) for ours, key in keys.items()}


def number(values: Mapping[str, Any], key: str, where: Path | str, default: float | None = None) -> float:
    """A positive number of config.json."""
    value = values.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise UserError(f"{where}: {key} is {value!r}, a positive number was expected; download it again")
    return float(value)


def flag(values: Mapping[str, Any], key: str, where: Path | str, default: bool = False) -> bool:
    """A boolean of config.json."""
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} is {value!r}, true or false was expected; download it again")
    return value


def subsection(values: Mapping[str, Any], key: str, where: Path | str) -> dict[str, Any]:
    """A JSON object inside another; empty if absent."""
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{where}: {key} is {value!r}, a JSON object was expected; download it again")
    return value


def refuse(values: Mapping[str, Any], where: Path | str, only: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises UserError for unsupported settings that would change results.

    Args:
      values: content of config.json.
      where: its path.
      only: key → supported values.
    """
    for key, supported in only.items():
        value = values.get(key)
        if value is not None and value not in supported:
            raise UserError(f"{where}: {key}={value!r} is not supported; choose another model")
