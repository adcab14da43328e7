"""Display settings of a DICOM image: its VOI LUTs and windows (PS3.3 C.11.2)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pydicom

from vilam3_jax.data.dicom.headers import functional_group, items, numbers, short
from vilam3_jax.data.dicom.lookup_tables import Table, read_table
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike


@dataclasses.dataclass(frozen=True, eq=False)
class Display:
    """One display setting of a file.

    Attributes:
      name: for messages.
      table: the VOI LUT; None: a window.
      centre, width, function: of the window.
      problem: why it cannot be applied; None: it can.
    """

    name: str
    table: Table | None = None
    centre: float = 0.0
    width: float = 0.0
    function: str = "LINEAR"
    problem: str | None = None

    def apply(self, values: np.ndarray) -> np.ndarray:
        """0 (black) to 1, by PS3.3 C.11.2.1.2 and C.11.2.1.3."""
        if self.table is not None:
            return self.table.look_up(values) / self.table.largest
        if self.function == "SIGMOID":
            exponent = np.clip(-4 * (values.astype(np.float64) - self.centre) / self.width, -700, 700)
            return 1 / (1 + np.exp(exponent))
        values = values.astype(np.float64)
        if self.function == "LINEAR":
            if self.width == 1:
                return (values > self.centre - 0.5).astype(np.float64)
            return np.clip((values - (self.centre - 0.5)) / (self.width - 1) + 0.5, 0, 1)
        return np.clip((values - self.centre) / self.width + 0.5, 0, 1)


def between(low: float, high: float) -> Display:
    """The setting that shows `low` as black and `high` as white; all black if they are equal."""
    width = high - low if high > low else 1.0
    return Display("", centre=low + width / 2, width=width, function="LINEAR_EXACT")


def choose(
    dataset: pydicom.Dataset,
    frame: int,
    voi: int,
    bounds: tuple[float, float],
    path: PathLike,
    notes: list[str],
) -> Display | None:
    """Chooses a display setting.

    Args:
      dataset: the image.
      frame: whose settings are asked for; they may differ from frame to frame.
      voi: which one: VOI LUTs come first, then windows. 0 is the first that can be applied.
      bounds: smallest and largest value that the image can hold after the modality transform.
      path: named in errors.
      notes: gets what was chosen and why.

    Returns:
      The setting; None if the file has none that can be applied.

    Raises:
      UserError: no such setting, or it cannot be applied.
    """
    settings = _settings(dataset, frame, bounds, path, notes)
    if not settings and voi == 0:
        return None
    names = ", ".join(f"{index}: {setting.name}" for index, setting in enumerate(settings[:20]))
    if not 0 <= voi < len(settings):
        raise UserError(f"{path}: no display setting {voi}; the file has {names or 'none'}")
    if voi and settings[voi].problem:
        raise UserError(f"{path}: {settings[voi].name} cannot be applied, {settings[voi].problem}")
    chosen = voi
    while chosen < len(settings) and (problem := settings[chosen].problem):
        notes.append(f"{settings[chosen].name} is left out, {problem}")
        chosen += 1
    if chosen == len(settings):
        return None
    if len(settings) > 1:
        notes.append(f"display setting {chosen} is shown; the file has {names}")
    return settings[chosen]


def _settings(
    dataset: pydicom.Dataset, frame: int, bounds: tuple[float, float], path: PathLike, notes: list[str]
) -> list[Display]:
    own = functional_group(dataset, frame, "FrameVOILUTSequence")
    item = dataset if own is None else own
    settings = []
    for place, table in enumerate(items(item, "VOILUTSequence")):
        name = f"VOI LUT {place}"
        try:
            settings.append(
                Display(name, table=_within_its_bits(read_table(table, bounds, dataset, notes), notes))
            )
        except ValueError as error:
            settings.append(Display(name, problem=short(error)))
    centres, widths = (numbers(item, key) for key in ("WindowCenter", "WindowWidth"))
    if len(centres) != len(widths):
        notes.append(
            f"{len(centres)} window centres and {len(widths)} widths; the ones in excess are left out"
        )
    function = str(item.get("VOILUTFunction") or "LINEAR").strip().upper() or "LINEAR"
    if centres and widths and function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise UserError(
            f"{path}: the VOI LUT Function {ascii(function)[1:-1]:.40} is not read here; export it with "
            "LINEAR"
        )
    for centre, width in zip(centres, widths, strict=False):
        settings.append(_window(centre, width, function, notes))
    return settings


def _within_its_bits(table: Table, notes: list[str]) -> Table:
    """Some writers state 16 bits for entries of 8 or 12, which would leave the picture black."""
    used = int(table.entries.max()).bit_length()
    if table.bits <= 8 or not 0 < used < table.bits - 1:
        return table
    notes.append(f"a VOI LUT states {table.bits} bits, its entries have {used} and are read so")
    return dataclasses.replace(table, bits=used)


def _window(centre: float | None, width: float | None, function: str, notes: list[str]) -> Display:
    if centre is None or width is None or not (math.isfinite(centre) and math.isfinite(width)):
        return Display("a window", problem="its centre or width is not a number")
    name = f"window {centre:g}/{width:g}"
    if width <= 0:
        return Display(name, problem="its width is not positive")
    if width < 1 and function == "LINEAR":
        notes.append(f"{name} is narrower than LINEAR allows and is shown as LINEAR_EXACT")
        function = "LINEAR_EXACT"
    return Display(name, centre=centre, width=width, function=function)
