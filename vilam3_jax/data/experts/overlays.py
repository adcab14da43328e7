"""The slice with coloured labels that replaces `<image>` in a segmentation expert's turn, and its legend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vilam3_jax.data.experts.labels import apply_group, label_group, visible_segments
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.volumes import slice_2d

_OPACITY = 0.3
# The colours of VILA-M3 in its order (`orange` occurs twice), with the CSS values of scikit-image.
PALETTE: tuple[tuple[str, tuple[float, float, float]], ...] = (
    ("red", (1.0, 0.0, 0.0)),
    ("blue", (0.0, 0.0, 1.0)),
    ("yellow", (1.0, 1.0, 0.0)),
    ("magenta", (1.0, 0.0, 1.0)),
    ("green", (0.0, 0.502, 0.0)),
    ("indigo", (0.294, 0.0, 0.51)),
    ("darkorange", (1.0, 0.549, 0.0)),
    ("cyan", (0.0, 1.0, 1.0)),
    ("pink", (1.0, 0.753, 0.796)),
    ("brown", (0.647, 0.165, 0.165)),
    ("orange", (1.0, 0.647, 0.0)),
    ("lime", (0.0, 1.0, 0.0)),
    ("orange", (1.0, 0.647, 0.0)),
    ("gold", (1.0, 0.843, 0.0)),
    ("yellowgreen", (0.604, 0.804, 0.196)),
    ("darkgreen", (0.0, 0.392, 0.0)),
)


def palette_of(present: Sequence[int]) -> dict[int, str]:
    """Label id to colour name. Colours cycle over the sorted label ids `present` on a slice."""
    return {label_id: PALETTE[i % len(PALETTE)][0] for i, label_id in enumerate(sorted(present))}


def legend(names: Mapping[int, str], present: list[int]) -> dict[str, str]:
    """Colour to the names of its labels. A label without a name takes a colour but is not listed."""
    out: dict[str, str] = {}
    for label_id, colour in palette_of(present).items():
        if label_id in names:
            # Colours repeat beyond 16 labels (12 for orange): list all names.
            known = out.get(colour)
            out[colour] = f"{known} and {names[label_id]}" if known else names[label_id]
    return out


def slice_legend(annotation: Annotation, *, axis: int, index: int) -> dict[str, str]:
    """The `legend` of an `expert_overlay`."""
    names = {i: name for i, name, *_ in visible_segments(annotation, axis=axis, index=index)}
    return legend(names, list(names))


def brats_legend(colours: Mapping[int, str]) -> str:
    """Describes the `colours` (by label id) of a BraTS slice, where several colours form one subregion.

    Label 1 is the non-enhancing core, 2 edema, 4 enhancing tumor (BraTS 2018). The tumor core is 1 and 4, the
    whole tumor all three.
    """
    parts = []
    if core := [colours[i] for i in (1, 4) if i in colours]:
        parts.append(f"{' and '.join(core)}: tumor core")
    if 4 in colours:
        parts.append(f"{colours[4]}: enhancing tumor")
    if colours:
        parts.append(f"{' and '.join(colours[i] for i in (1, 2, 4) if i in colours)}: whole tumor")
    return ", ".join(parts)


def reference_brats_legend(colours: Mapping[int, str]) -> str:
    """`brats_legend` as in the reference's dialogues, which name the enhancing colour first."""
    words = f"{colours[4]} and {colours[1]}: tumor core, " if 1 in colours and 4 in colours else ""
    words += f"only {colours[4]}: enhancing tumor, " if 4 in colours else ""
    return f"{words}all colors: whole tumor" if colours else ""


def overlay(image: np.ndarray, label_slice: np.ndarray) -> np.ndarray:
    """Blends label colours into a slice, uint8 [H, W, 3]; the background stays unchanged.

    The formula of scikit-image's `label2rgb(kind='overlay', bg_label=0, bg_color=None)`. On grayscale images
    the result is within one gray level of scikit-image, which converts through HSV. `label_slice` has
    integers [h, w], 0 for background, resized to H x W by nearest neighbour; raises `ValueError` otherwise.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or label_slice.ndim != 2:
        raise ValueError(
            f"overlay needs uint8 [H, W, 3] and labels [h, w], got {image.dtype} {image.shape} "
            f"and {label_slice.shape}"
        )
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * m / n).astype(int), m - 1)
        for n, m in zip(image.shape[:2], label_slice.shape, strict=True)
    )
    present = [int(i) for i in np.unique(label_slice) if i]
    labels = label_slice[rows[:, None], columns[None, :]]
    out = image.copy()
    for i, label_id in enumerate(present):
        where = labels == label_id
        colour = np.array(PALETTE[i % len(PALETTE)][1])
        out[where] = ((colour * _OPACITY + image[where] / 255.0 * (1.0 - _OPACITY)) * 255.0).astype(np.uint8)
    return out


def expert_overlay(annotation: Annotation, image: np.ndarray, *, axis: int, index: int) -> np.ndarray:
    """The image that replaces `<image>` in a segmentation expert's turn, uint8 [H, W, 3].

    `image` is the slice `index` along `axis` in display orientation (`volumes.slice_2d`), uint8 [H, W, 3] of
    any size. Raises `ValueError` without a label map, `IndexError` outside of it.
    """
    group = label_group(annotation.expert, annotation.args)
    plane = apply_group(group, annotation.label_slice(axis, index))
    return overlay(image, slice_2d(np.expand_dims(plane, axis), axis, 0))
