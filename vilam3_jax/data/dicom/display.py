"""Display settings of a DICOM image: VOI LUTs and windows (PS3.3 C.11.2)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pydicom

from vilam3_jax.data.dicom.headers import ImageError, functional_group, items, numbers
from vilam3_jax.data.dicom.lookup_tables import Table, read_table
from vilam3_jax.data.volume_io import one_line


@dataclasses.dataclass(frozen=True, eq=False)
class Display:
    """A display setting: a VOI LUT, or a window if `table` is None."""

    name: str  # for messages
    table: Table | None = None
    centre: float = 0.0
    width: float = 0.0
    function: str = "LINEAR"  # VOI LUT Function of the window
    problem: str | None = None  # why the setting cannot be applied, or None

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Maps values to 0 (black) to 1, see PS3.3 C.11.2.1.2 and C.11.2.1.3."""
        if self.table is not None:
            return self.table.look_up(values) / self.table.largest
        values = values.astype(np.float64)
        if self.function == "SIGMOID":
            return 1 / (1 + np.exp(np.clip(-4 * (values - self.centre) / self.width, -700, 700)))
        if self.function == "LINEAR_EXACT":
            return np.clip((values - self.centre) / self.width + 0.5, 0, 1)
        if self.width == 1:
            return (values > self.centre - 0.5).astype(np.float64)
        return np.clip((values - (self.centre - 0.5)) / (self.width - 1) + 0.5, 0, 1)


def between(low: float, high: float) -> Display:
    """The setting that shows `low` as black and `high` as white; all black if they are equal."""
    width = high - low if high > low else 1.0
    return Display("", centre=low + width / 2, width=width, function="LINEAR_EXACT")


def choose(
    dataset: pydicom.Dataset, frame: int, voi: int, bounds: tuple[float, float], notes: list[str]
) -> Display | None:
    """Chooses a display setting.

    Args:
      dataset: the image.
      frame: frame index; settings may differ between frames.
      voi: index of the setting, VOI LUTs before windows. 0: the first setting that can be applied.
      bounds: smallest and largest possible value after the modality transform.
      notes: receives the choice and its reason.

    Returns:
      The setting; None if the file has no applicable one.

    Raises:
      ImageError: no such setting, or it cannot be applied.
    """
    settings = _settings(dataset, frame, bounds, notes)
    if not settings and voi == 0:
        return None
    names = ", ".join(f"{index}: {setting.name}" for index, setting in enumerate(settings[:20]))
    if not 0 <= voi < len(settings):
        raise ImageError(f"no display setting {voi}; the file has {names or 'none'}")
    if voi and settings[voi].problem:
        raise ImageError(f"{settings[voi].name} cannot be applied: {settings[voi].problem}")
    for index, setting in enumerate(settings[voi:], voi):
        if setting.problem is None:
            if len(settings) > 1:
                notes.append(f"display setting {index} is shown; the file has {names}")
            return setting
        notes.append(f"{setting.name} skipped: {setting.problem}")
    return None


def _settings(
    dataset: pydicom.Dataset, frame: int, bounds: tuple[float, float], notes: list[str]
) -> list[Display]:
    own = functional_group(dataset, frame, "FrameVOILUTSequence")
    item = dataset if own is None else own
    settings = []
    for index, table in enumerate(items(item, "VOILUTSequence")):
        name = f"VOI LUT {index}"
        try:
            found = read_table(table, bounds, dataset, notes)
            used = int(found.entries.max()).bit_length()
            # Some writers state 16 bits for 8- or 12-bit entries, which would be black.
            if found.bits > 8 and 0 < used < found.bits - 1:
                found = found.with_bits(used, "a VOI LUT", notes)
            settings.append(Display(name, table=found))
        except ValueError as error:
            settings.append(Display(name, problem=one_line(error)))
    centres, widths = (numbers(item, key) for key in ("WindowCenter", "WindowWidth"))
    if len(centres) != len(widths):
        notes.append(f"{len(centres)} window centres and {len(widths)} widths; unpaired values are ignored")
    function = str(item.get("VOILUTFunction") or "LINEAR").strip().upper() or "LINEAR"
    if centres and widths and function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        name = f"{ascii(function)[1:-1]:.40}"
        raise ImageError(f"the VOI LUT Function {name} is not supported; export it with LINEAR")
    settings += [_window(*window, function, notes) for window in zip(centres, widths, strict=False)]
    return settings


def _window(centre: float | None, width: float | None, function: str, notes: list[str]) -> Display:
    if centre is None or width is None or not (math.isfinite(centre) and math.isfinite(width)):
        return Display("a window", problem="its centre or width is not a number")
    name = f"window {centre:g}/{width:g}"
    if width <= 0:
        return Display(name, problem="its width is not positive")
    if width < 1 and function == "LINEAR":
        notes.append(f"{name} is too narrow for LINEAR and is shown as LINEAR_EXACT")
        function = "LINEAR_EXACT"
    return Display(name, centre=centre, width=width, function=function)
