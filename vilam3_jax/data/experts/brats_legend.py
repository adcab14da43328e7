"""The legend of a BraTS overlay: subregions nest, so several colours form one of them.

Label 1 is the non-enhancing core, 2 edema, 4 enhancing tumor (BraTS 2018). The tumor core is 1 and 4, the
whole tumor all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

LegendWording = Literal["correct", "trained"]


def brats_legend(colours: Mapping[int, str], wording: LegendWording) -> str:
    """Describes the colours of a slice.

    Args:
      colours: label id (1, 2, 4) to colour of the labels on the slice.
      wording: `trained` follows the reference's dialogues, which name the enhancing colour first whatever the
        slice shows; `correct` names the labels that are present.
    """
    if wording == "trained":
        words = f"{colours[4]} and {colours[1]}: tumor core, " if 1 in colours and 4 in colours else ""
        words += f"only {colours[4]}: enhancing tumor, " if 4 in colours else ""
        return f"{words}all colors: whole tumor" if colours else ""
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
