"""Detects signs of burned-in text, which may identify the patient. Text is never removed."""

from __future__ import annotations

import numpy as np
import scipy.ndimage
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, UltrasoundImageStorage, UltrasoundMultiFrameImageStorage

from vilam3_jax.data.limits import Limits

_ULTRASOUND = frozenset({UltrasoundImageStorage, UltrasoundMultiFrameImageStorage})
# Devices of these modalities burn names into the image, unless the file states otherwise.
_MODALITIES = frozenset({"US", "IVUS", "BDUS", "XC", "ES", "OT", "GM", "OP", "DG", "SC"})

_STEPS = (1, 2, 4, 1)  # doubling shifts that build a window of 9 pixels, wider than the strokes of letters
_CONTRASTS = (76, 140)  # of strokes against the background, of 255; at the first, soft edges merge letters
_MAX_BRIGHTNESS_DIFFERENCE = 25  # between letters of one line, of 255
_HEIGHTS = (6, 48)  # of letters, in pixels
_MIN_LETTERS = 5  # in one line of text
_BORDER = 0.25  # of each side
# Larger images are halved until they fit the first; images above the second are also searched at half size.
_MAX_SIDE, _FULL_SIZE_SIDE = 1500, 700
_MAX_SHAPES = 4000  # more shapes are noise


def signs_in_attributes(source: Dataset) -> list[str]:
    """Returns signs of text in the attributes, as fixed texts. Unreadable values count as absent."""
    stated, modality = _text(source, "BurnedInAnnotation"), _text(source, "Modality")
    sop_class, image_type = _text(source, "SOPClassUID"), _text(source, "ImageType").split("\\")
    signs = {
        "BurnedInAnnotation is YES": stated == "YES",
        f"BurnedInAnnotation is not stated, modality {modality}": not stated and modality in _MODALITIES,
        "secondary capture": "Secondary Capture Image" in UID(sop_class).name or "ConversionType" in source,
        "ImageType states secondary": "SECONDARY" in image_type,
        "ImageType states a screen capture": any("SCREEN" in v or "CAPTURE" in v for v in image_type),
        "image of a slide label": _text(source, "SpecimenLabelInImage") == "YES"
        or bool({"LABEL", "OVERVIEW"} & set(image_type)),
        "ultrasound without regions": sop_class in _ULTRASOUND
        and "SequenceOfUltrasoundRegions" not in source,
    }
    return [sign for sign, present in signs.items() if present]


def _text(source: Dataset, keyword: str) -> str:
    try:
        value = source.get(keyword)
    except Exception:  # a damaged value, which is not copied
        return ""
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else "\\".join(str(word).strip() for word in value)


def signs_in_pixels(image: Dataset, limits: Limits) -> list[str]:
    """Returns signs of text in the middle frame, as fixed texts."""
    if int(image.Rows) * int(image.Columns) > limits.pixels:
        return ["too many pixels to search for text"]
    try:
        frames = int(image.get("NumberOfFrames") or 1)
        # Stored values: with a window applied, bone would be as white as letters.
        frame = pixel_array(image, index=frames // 2, raw=True)
    except Exception:  # decoders raise arbitrary exceptions for damaged bytes
        return ["undecodable pixels, not searched for text"]
    if frame.ndim == 3:
        frame = frame[..., 0] if image.PhotometricInterpretation.startswith("YBR") else frame.max(axis=-1)
    return ["text-like shapes in the image"] if shows_text(frame) else []


def shows_text(frame: np.ndarray) -> bool:
    """Whether a line of thin high-contrast shapes, like letters, is near the border of `frame` [H, W]."""
    grey = np.nan_to_num(frame.astype(np.float32))
    low, high = np.percentile(grey, (0.1, 99.9))
    if not high > low:
        low, high = float(grey.min()), float(grey.max())
    if not high > low:
        return False
    grey = np.clip((grey - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    while max(grey.shape) > _MAX_SIDE:
        grey = _halved(grey)
    scales = [grey] if max(grey.shape) <= _FULL_SIZE_SIDE else [grey, _halved(grey)]
    return any(_has_letters(shade) for image in scales for shade in (image, 255 - image))


def _halved(grey: np.ndarray) -> np.ndarray:
    height, width = grey.shape[0] // 2 * 2, grey.shape[1] // 2 * 2
    return grey[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3)).astype(np.uint8)


def _filtered(grey: np.ndarray, reduce: np.ufunc) -> np.ndarray:
    """A minimum or maximum filter with a square window, ten times as fast as SciPy's."""
    for _ in range(2):
        grey = np.pad(grey, ((sum(_STEPS) // 2,) * 2, (0, 0)), "edge")
        for step in _STEPS:
            grey = reduce(grey[:-step], grey[step:])
        grey = np.ascontiguousarray(grey.T)
    return grey


def _has_letters(grey: np.ndarray) -> bool:
    thin = grey - _filtered(_filtered(grey, np.minimum), np.maximum)  # an opening never brightens
    height, width = grey.shape
    rows, columns = int(height * _BORDER), int(width * _BORDER)
    thin[rows : height - rows, columns : width - columns] = 0
    return any(_has_line(_shapes(thin > contrast, grey)) for contrast in _CONTRASTS)


def _shapes(strokes: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Returns letter-sized connected components, [N, 5]: top, bottom, left, right, brightness."""
    labels, count = scipy.ndimage.label(strokes, np.ones((3, 3)))  # type: ignore[misc]
    if not _MIN_LETTERS <= count <= _MAX_SHAPES:
        return np.zeros((0, 5))
    boxes = []
    peaks = scipy.ndimage.mean(grey, labels, np.arange(1, count + 1))
    for found, peak in zip(scipy.ndimage.find_objects(labels), np.asarray(peaks), strict=True):
        top, bottom, left, right = found[0].start, found[0].stop, found[1].start, found[1].stop
        if _HEIGHTS[0] <= bottom - top <= _HEIGHTS[1] and right - left <= 1.5 * (bottom - top):
            boxes.append((top, bottom, left, right, peak))
    return np.array(boxes, np.float64).reshape(-1, 5)


def _has_line(boxes: np.ndarray) -> bool:
    """Whether enough boxes of similar height and brightness form a line."""
    boxes = boxes[np.argsort(boxes[:, 2], kind="stable")]
    longest = np.ones(len(boxes), int)  # length of the longest line that ends with each box
    for i, (top, bottom, left, _, peak) in enumerate(boxes):
        height = bottom - top
        before = boxes[:i]
        gap = left - before[:, 3]
        follows = (
            (gap >= -1)
            & (gap <= 1.2 * height)
            & (np.abs(before[:, 1] - bottom) <= 0.15 * height + 1)
            & (np.abs(before[:, 1] - before[:, 0] - height) <= 0.35 * height + 1)
            & (np.abs(before[:, 4] - peak) <= _MAX_BRIGHTNESS_DIFFERENCE)
        )
        if follows.any():
            longest[i] += longest[:i][follows].max()
    return bool(len(boxes)) and int(longest.max()) >= _MIN_LETTERS
