"""Whether a chest film shows pneumonia, by the Keras archive of the pneumonia-model-package, on torch."""

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
_FOREIGN = ("jax", "flax", "orbax", "tensorflow")


@contextlib.contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Makes packages that are not imported yet look as if they were not installed.

    Keras imports jax, where it is installed, whatever its back end; in an expert's process jax would seize
    the accelerator's memory.
    """
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)


class Pneumonia:
    """An Xception that knows two classes; nodules, effusions and the like escape it."""

    def __init__(self, weights: Weights) -> None:
        """Loads the network from the checked bytes `model`.

        Raises:
          UserError: Keras was imported before, with another back end.
        """
        os.environ.setdefault("KERAS_BACKEND", "torch")
        with _hidden(_FOREIGN), tempfile.TemporaryDirectory(prefix="vilam3-pneumonia-") as folder:
            import keras

            if keras.backend.backend() != "torch":
                raise UserError(
                    f"KERAS_BACKEND is {keras.backend.backend()!r}; PNEUMONIA runs on torch, unset it"
                )
            # Keras opens paths only; the copy has the bytes that were checked.
            path = os.path.join(folder, "model.keras")
            with open(path, "wb") as file:
                file.write(weights.files["model"])
            self._model: Any = keras.saving.load_model(path, compile=False, safe_mode=True)

    def run(self, data: np.ndarray, args: str) -> Output:
        """Classifies an image, uint8 [H, W, 3]."""
        del args  # the card has none
        import torch

        # The network was trained on Keras' `load_img`, which picks the nearest pixel.
        image = Image.fromarray(data).resize(_SIZE, Image.Resampling.NEAREST)
        batch = np.asarray(image, np.float32)[None] / 127.5 - 1.0
        with torch.inference_mode(), _hidden(_FOREIGN), warnings.catch_warnings():
            # Archives differ in whether their one input is a list; Keras takes either and grumbles.
            warnings.filterwarnings("ignore", message="The structure of `inputs`")
            logits = self._model([batch], training=False)[0].double()
            probabilities = torch.softmax(logits, dim=0).cpu().tolist()
        return Output(probabilities=dict(zip(CLASSES, probabilities, strict=True)))
