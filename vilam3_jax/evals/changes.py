"""Changes of images and questions, by which a protocol tests what an answer depends on."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import io
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from vilam3_jax.evals.items import Item

BLANK_GREY = 127
_JPEG_QUALITY = 20
_DEGREES = 10
_CONTRAST = 0.6  # of the pixel range, as a window wider by 1 / 0.6


Source = Callable[[Item], Item | None]


@dataclasses.dataclass(frozen=True)
class ImageChange:
    """What is shown instead of the images of an item.

    Attributes:
      pixels: (uint8 [H, W, 3], item) ↦ uint8 [H, W, 3].
      source: all items ↦ (item ↦ the item whose images are shown, or None if there is none); by default
        itself.
      shown: whether images are shown at all.
      needs_region: only items with a region are asked.
    """

    pixels: Callable[[np.ndarray, Item], np.ndarray] | None = None
    source: Callable[[Sequence[Item]], Source] | None = None
    shown: bool = True
    needs_region: bool = False


def _blank(image: np.ndarray, item: Item) -> np.ndarray:
    return np.full_like(image, BLANK_GREY)


def _region_hidden(image: np.ndarray, item: Item) -> np.ndarray:
    """The region in the mean colour of the image."""
    assert item.region is not None
    height, width = image.shape[:2]
    x0, y0, x1, y1 = item.region
    rows = slice(int(np.floor(y0 * height)), int(np.ceil(y1 * height)))
    columns = slice(int(np.floor(x0 * width)), int(np.ceil(x1 * width)))
    changed = image.copy()
    changed[rows, columns] = image.reshape(-1, image.shape[-1]).mean(axis=0).round().astype(np.uint8)
    return changed


def _jpeg(image: np.ndarray, item: Item) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _rotated(image: np.ndarray, item: Item) -> np.ndarray:
    turned = Image.fromarray(image).rotate(_DEGREES, resample=Image.Resampling.BILINEAR)
    return np.asarray(turned)


def _wider_window(image: np.ndarray, item: Item) -> np.ndarray:
    middle = 127.5
    return np.clip(np.rint((image - middle) * _CONTRAST + middle), 0, 255).astype(np.uint8)


def _of_another_patient(items: Sequence[Item]) -> Source:
    return _Others(items, same_modality=True).one


def _of_another_modality(items: Sequence[Item]) -> Source:
    return _Others(items, same_modality=False).one


class _Others:
    """Chooses an item of another patient, by hashes of ids: evenly, and the same in every run."""

    def __init__(self, items: Sequence[Item], *, same_modality: bool):
        self._same = same_modality
        modalities = sorted({item.modality for item in items})
        self._ordered: dict[str, list[tuple[str, Item]]] = {}
        for name in modalities:
            own = [one for one in items if one.images and (one.modality == name) == same_modality]
            self._ordered[name] = sorted(((self._key(one), one) for one in own), key=lambda pair: pair[0])

    @staticmethod
    def _key(item: Item) -> str:
        return hashlib.sha256(item.id.encode()).hexdigest()

    def one(self, item: Item) -> Item | None:
        """The next item of another patient after this one, in the order of the hashes; None without any."""
        ordered = self._ordered[item.modality]
        start = bisect.bisect_right(ordered, self._key(item), key=lambda pair: pair[0])
        candidates = (one for _, one in itertools.chain(ordered[start:], ordered[:start]))
        return next((one for one in candidates if one.cluster != item.cluster), None)


IMAGE_CHANGES: Mapping[str, ImageChange] = {
    "true": ImageChange(),
    "blank": ImageChange(pixels=_blank),
    "none": ImageChange(shown=False),
    "other_patient": ImageChange(source=_of_another_patient),
    "other_modality": ImageChange(source=_of_another_modality),
    "region_hidden": ImageChange(pixels=_region_hidden, needs_region=True),
    "jpeg": ImageChange(pixels=_jpeg),
    "rotated": ImageChange(pixels=_rotated),
    "wider_window": ImageChange(pixels=_wider_window),
}

# Item ↦ the item that is asked instead, or None if the change does not apply to it.
QuestionChange = Callable[[Item], Item | None]


def _framed(item: Item) -> Item:
    return dataclasses.replace(item, question=f"Question: {item.question}\nAnswer:")


def _polite(item: Item) -> Item:
    return dataclasses.replace(item, question=f"Please look at the image carefully. {item.question}")


def _options_reversed(item: Item) -> Item | None:
    """The options in reversed order, where the question states them one per line as `(A) text`."""
    lines = item.question.split("\n")
    listed = [f"({chr(65 + i)}) {option}" for i, option in enumerate(item.options)]
    if len(listed) < 2 or any(lines.count(line) != 1 for line in listed):
        return None
    options = item.options[::-1]
    reversed_lines = {line: f"({chr(65 + i)}) {options[i]}" for i, line in enumerate(listed)}
    question = "\n".join(reversed_lines.get(line, line) for line in lines)
    return dataclasses.replace(item, question=question, options=options)


QUESTION_CHANGES: Mapping[str, QuestionChange] = {
    "true": lambda item: item,
    "framed": _framed,
    "polite": _polite,
    "options_reversed": _options_reversed,
}


def asked_items(items: Sequence[Item], images: str, question: str) -> list[tuple[Item, Item | None]]:
    """(item as it is asked, item whose images are shown or None) for each item to which both changes apply.

    Args:
      items: all items of the protocol; images of others are taken from these.
      images: key of `IMAGE_CHANGES`.
      question: key of `QUESTION_CHANGES`.
    """
    change, rewrite = IMAGE_CHANGES[images], QUESTION_CHANGES[question]
    source: Source = change.source(items) if change.source else lambda item: item
    found: list[tuple[Item, Item | None]] = []
    for item in items:
        asked = rewrite(item)
        shown = source(item)
        if asked is None or shown is None or (change.needs_region and item.region is None):
            continue
        found.append((asked, shown if change.shown and shown.images else None))
    return found
