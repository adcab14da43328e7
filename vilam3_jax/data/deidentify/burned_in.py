"""Signs that pixels show text, which may identify the patient. It is looked for, and never removed."""

from __future__ import annotations

import numpy as np
import scipy.ndimage
from pydicom.dataset import Dataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import (
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    MultiFrameSingleBitSecondaryCaptureImageStorage,
    MultiFrameTrueColorSecondaryCaptureImageStorage,
    SecondaryCaptureImageStorage,
    UltrasoundImageStorage,
    UltrasoundMultiFrameImageStorage,
)

from vilam3_jax.data.limits import Limits

_SECONDARY_CAPTURES = frozenset(
    {
        SecondaryCaptureImageStorage,
        MultiFrameSingleBitSecondaryCaptureImageStorage,
        MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
        MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
        MultiFrameTrueColorSecondaryCaptureImageStorage,
    }
)
_ULTRASOUND = frozenset({UltrasoundImageStorage, UltrasoundMultiFrameImageStorage})
# Devices of these modalities write names into the picture, unless the file states otherwise.
_MODALITIES = frozenset({"US", "IVUS", "BDUS", "XC", "ES", "OT", "GM", "OP", "DG", "SC"})

_STEPS = (1, 2, 4, 1)  # windows that grow by doubling to 9 pixels: strokes of letters are thinner
_CONTRASTS = (76, 140)  # of strokes against their surroundings, of 255; soft edges join letters at the first
_ALIKE = 25  # how far letters of one line differ in brightness, of 255
_HEIGHTS = (6, 48)  # pixels, of letters
_LETTERS = 5  # in one line, to be taken for text
_BORDER = 0.25  # of each side
# Pixels: a larger picture is halved until it fits. One above the second is looked at in half size, too.
_MAX_SIDE, _MIN_SIDE = 1500, 700
_MAX_SHAPES = 4000  # more are noise


def of_attributes(source: Dataset) -> list[str]:
    """Signs of text in the attributes of an object, as fixed texts. Unreadable values count as absent."""
    stated, modality = _text(source, "BurnedInAnnotation"), _text(source, "Modality")
    sop_class, image_type = _text(source, "SOPClassUID"), _text(source, "ImageType").split("\\")
    signs = {
        "BurnedInAnnotation is YES": stated == "YES",
        f"BurnedInAnnotation is not stated, modality {modality}": not stated and modality in _MODALITIES,
        "secondary capture": sop_class in _SECONDARY_CAPTURES or "ConversionType" in source,
        "ImageType says secondary": "SECONDARY" in image_type,
        "ImageType says screen": any("SCREEN" in word or "CAPTURE" in word for word in image_type),
        "picture of a slide's label": _text(source, "SpecimenLabelInImage") == "YES"
        or bool({"LABEL", "OVERVIEW"} & set(image_type)),
        "ultrasound without regions": sop_class in _ULTRASOUND
        and "SequenceOfUltrasoundRegions" not in source,
    }
    return [sign for sign, is_there in signs.items() if is_there]


def _text(source: Dataset, keyword: str) -> str:
    try:
        value = source.get(keyword)
    except Exception:  # a damaged value, which is not copied either
        return ""
    if value is None:
        return ""
    return value.strip() if isinstance(value, str) else "\\".join(str(word).strip() for word in value)


def of_pixels(image: Dataset, limits: Limits) -> list[str]:
    """Signs of text in the middle frame, as fixed texts."""
    if int(image.Rows) * int(image.Columns) > limits.pixels:
        return ["pixels too many to look for text"]
    try:
        frames = int(image.get("NumberOfFrames") or 1)
        # As stored: a window would make bone as white as letters.
        frame = pixel_array(image, index=frames // 2, raw=True)
    except Exception:  # decoders raise whatever a damaged byte leads to
        return ["pixels could not be decoded to look for text"]
    if frame.ndim == 3:
        frame = frame[..., 0] if image.PhotometricInterpretation.startswith("YBR") else frame.max(axis=-1)
    return ["the picture shows what looks like text"] if shows_text(frame) else []


def shows_text(frame: np.ndarray) -> bool:
    """Whether thin shapes of high contrast stand in a line near the border, as letters do.

    Args:
      frame: [H, W], any real dtype.
    """
    grey = np.nan_to_num(frame.astype(np.float32))
    low, high = np.percentile(grey, (0.1, 99.9))
    if not high > low:
        low, high = float(grey.min()), float(grey.max())
    if not high > low:
        return False
    grey = np.clip((grey - low) * (255 / (high - low)), 0, 255).astype(np.uint8)
    while max(grey.shape) > _MAX_SIDE:
        grey = _halved(grey)
    pictures = [grey] if max(grey.shape) <= _MIN_SIDE else [grey, _halved(grey)]
    return any(_has_letters(shade) for picture in pictures for shade in (picture, 255 - picture))


def _halved(grey: np.ndarray) -> np.ndarray:
    height, width = grey.shape[0] // 2 * 2, grey.shape[1] // 2 * 2
    return grey[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3)).astype(np.uint8)


def _slid(grey: np.ndarray, reduce: np.ufunc) -> np.ndarray:
    """Smallest or largest value in a square window around each pixel, ten times as fast as SciPy's."""
    for _ in range(2):
        grey = np.pad(grey, ((sum(_STEPS) // 2,) * 2, (0, 0)), "edge")
        for step in _STEPS:
            grey = reduce(grey[:-step], grey[step:])
        grey = np.ascontiguousarray(grey.T)
    return grey


def _has_letters(grey: np.ndarray) -> bool:
    thin = grey - _slid(_slid(grey, np.minimum), np.maximum)  # an opening never brightens
    height, width = grey.shape
    rows, columns = int(height * _BORDER), int(width * _BORDER)
    thin[rows : height - rows, columns : width - columns] = 0
    return any(_has_line(_shapes(thin > contrast, grey)) for contrast in _CONTRASTS)


def _shapes(strokes: np.ndarray, grey: np.ndarray) -> np.ndarray:
    """Boxes of connected strokes as large as letters, [N, 5]: top, bottom, left, right, brightness."""
    labels, count = scipy.ndimage.label(strokes, np.ones((3, 3)))  # type: ignore[misc]
    if not _LETTERS <= count <= _MAX_SHAPES:
        return np.zeros((0, 5))
    boxes = []
    peaks = scipy.ndimage.mean(grey, labels, np.arange(1, count + 1))
    for found, peak in zip(scipy.ndimage.find_objects(labels), np.asarray(peaks), strict=True):
        top, bottom, left, right = found[0].start, found[0].stop, found[1].start, found[1].stop
        if _HEIGHTS[0] <= bottom - top <= _HEIGHTS[1] and right - left <= 1.5 * (bottom - top):
            boxes.append((top, bottom, left, right, peak))
    return np.array(boxes, np.float64).reshape(-1, 5)


def _has_line(boxes: np.ndarray) -> bool:
    """Whether some boxes follow each other on one line, alike in height and brightness."""
    boxes = boxes[np.argsort(boxes[:, 2], kind="stable")]
    longest = np.ones(len(boxes), int)  # line that ends with this box
    for i, (top, bottom, left, _, peak) in enumerate(boxes):
        height = bottom - top
        before = boxes[:i]
        gap = left - before[:, 3]
        follows = (
            (gap >= -1)
            & (gap <= 1.2 * height)
            & (np.abs(before[:, 1] - bottom) <= 0.15 * height + 1)
            & (np.abs(before[:, 1] - before[:, 0] - height) <= 0.35 * height + 1)
            & (np.abs(before[:, 4] - peak) <= _ALIKE)
        )
        if follows.any():
            longest[i] += longest[:i][follows].max()
    return bool(len(boxes)) and int(longest.max()) >= _LETTERS
