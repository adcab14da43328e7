"""Pneumonia classifier for chest films: the Keras archive of the pneumonia-model-package, on torch."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from vilam3_experts.base import Output
from vilam3_experts.weights import Weights
from vilam3_jax.errors import UserError

CLASSES = ("normal", "pneumonia")
_SIZE = (150, 150)


@contextlib.contextmanager
def _hidden_packages() -> Iterator[None]:
    """Makes packages that are not yet imported look uninstalled.

    Keras imports jax if it is installed, whatever its backend, and jax would preallocate the accelerator's
    memory in an expert's process.
    """
    hidden = [name for name in ("jax", "flax", "orbax", "tensorflow") if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


class Pneumonia:
    """An Xception with two classes; it does not detect nodules, effusions or other findings."""

    def __init__(self, weights: Weights) -> None:
        """Loads the network from the verified bytes `model`.

        Raises `UserError` if Keras was already imported with another backend.
        """
        os.environ.setdefault("KERAS_BACKEND", "torch")
        with _hidden_packages(), tempfile.TemporaryDirectory(prefix="vilam3-pneumonia-") as folder:
            import keras

            if keras.backend.backend() != "torch":
                raise UserError(
                    f"KERAS_BACKEND is {keras.backend.backend()!r}; PNEUMONIA runs on torch, unset it"
                )
            # Keras opens only paths, so the verified bytes are written to a file.
            path = os.path.join(folder, "model.keras")
            with open(path, "wb") as file:
                file.write(weights.files["model"])
            self._model: Any = keras.saving.load_model(path, compile=False, safe_mode=True)

    def run(self, data: np.ndarray, args: str) -> Output:
        """Classifies an image, uint8 [H, W, 3]."""
        del args  # the card has none
        import torch

        # Nearest neighbour, as in Keras' `load_img`, which the network was trained with.
        image = Image.fromarray(data).resize(_SIZE, Image.Resampling.NEAREST)
        batch = np.asarray(image, np.float32)[None] / 127.5 - 1.0
        with torch.inference_mode(), _hidden_packages(), warnings.catch_warnings():
            # Keras warns of a list input to archives with a single input, but accepts it.
            warnings.filterwarnings("ignore", message="The structure of `inputs`")
            logits = self._model([batch], training=False)[0].double()
            probabilities = torch.softmax(logits, dim=0).cpu().tolist()
        return Output(probabilities=dict(zip(CLASSES, probabilities, strict=True)))
