"""What the colours of a BraTS overlay mean: subregions nest, so several colours make one of them.

Label 1 is the core without enhancement, 2 edema, 4 enhancing tumor (BraTS 2018). The tumor core is 1 and 4,
the whole tumor all three.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

LegendWording = Literal["correct", "trained"]


def brats_legend(colours: Mapping[int, str], wording: LegendWording) -> str:
    """Explains the colours of a slice.

    Args:
      colours: label id (1, 2, 4) to its colour, of the labels on the slice.
      wording: `trained` as the reference's dialogues have it, which name the enhancing colour first whatever
        the slice shows; `correct` names what is there.
    """
    if wording == "trained":
        return _trained(colours)
    parts = []
    core = [colours[i] for i in (1, 4) if i in colours]
    if core:
        parts.append(f"{' and '.join(core)}: tumor core")
    if 4 in colours:
        parts.append(f"{colours[4]}: enhancing tumor")
    if colours:
        whole = [colours[i] for i in (1, 2, 4) if i in colours]
        parts.append(f"{' and '.join(whole)}: whole tumor")
    return ", ".join(parts)


def _trained(colours: Mapping[int, str]) -> str:
    words = ""
    if 1 in colours and 4 in colours:
        words += f"{colours[4]} and {colours[1]}: tumor core, "
    if 4 in colours:
        words += f"only {colours[4]}: enhancing tumor, "
    return f"{words}all colors: whole tumor" if colours else ""
