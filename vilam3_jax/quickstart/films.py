"""Films: known facts about one, and augmented copies for training."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from PIL import Image

from vilam3_jax.datasets.samples import Sample
from vilam3_jax.quickstart.questions import TUMOR_CLASSES, Facts

_MAX_SIDE = 512  # enough for a training copy: models read 64 to 448 pixels
_MIN_CROP = 0.85
_EXPERT_OF_REGION = {"head": "BRAINTUMOR", "chest": "PNEUMONIA"}


def film_facts(sample: Sample) -> Facts:
    """The facts that follow from a film's class name and region."""
    source = sample.label_source or ""
    head = sample.body_region == "head"
    facts: dict[str, Any] = {}
    if head and sample.class_name in TUMOR_CLASSES:
        tumor = sample.class_name != "no tumor"
        facts = {"tumor_class": sample.class_name, "tumor": tumor, "tumor_source": source}
    if sample.body_region == "chest" and sample.class_name in ("normal", "pneumonia"):
        facts = {"pneumonia": sample.class_name == "pneumonia", "film_source": source}
    return Facts(
        group=sample.split_group,
        modality="MRI" if head else sample.modality,
        region=sample.body_region,
        expert=_EXPERT_OF_REGION.get(sample.body_region),
        **facts,
    )


def film_variant(image: np.ndarray, rng: random.Random, *, mirror: bool) -> np.ndarray:
    """An augmented copy of `image`, [H, W, 3] uint8: cropped, brighter or darker, perhaps mirrored.

    `mirror` allows swapping left and right: for heads, never for chests.

    Returns:
      [h, w, 3] uint8, no side longer than 512.
    """
    height, width = image.shape[:2]
    keep = rng.uniform(_MIN_CROP, 1.0)
    h, w = max(1, round(height * keep)), max(1, round(width * keep))
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    crop = image[top : top + h, left : left + w]
    if mirror and rng.random() < 0.5:
        crop = crop[:, ::-1]
    gain, gamma = rng.uniform(0.85, 1.15), rng.uniform(0.8, 1.25)
    levels = np.clip(255.0 * gain * (np.arange(256) / 255.0) ** gamma, 0, 255).astype(np.uint8)
    resized = Image.fromarray(np.ascontiguousarray(levels[crop]))
    resized.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BICUBIC)
    return np.array(resized)
