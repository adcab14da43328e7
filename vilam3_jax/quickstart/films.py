"""2-D films: what is known of one, and altered copies of it for training."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image

from vilam3_jax.datasets.samples import Sample
from vilam3_jax.quickstart.questions import TUMOR_CLASSES, Facts

MAX_VARIANT_SIDE = 512  # a training copy needs no more: models read 64 to 448 pixels
_SMALLEST_CROP = 0.85
_EXPERT_OF_REGION = {"head": "BRAINTUMOR", "chest": "PNEUMONIA"}


def film_facts(sample: Sample) -> Facts:
    """What the class name of a film, and its region, say."""
    source = sample.label_source or ""
    head = sample.body_region == "head"
    facts: dict = {
        "group": sample.split_group,
        "modality": "MRI" if head else sample.modality,
        "region": sample.body_region,
        "expert": _EXPERT_OF_REGION.get(sample.body_region),
        "brain": head,
        "brain_source": "sample list",
    }
    if head and sample.class_name in TUMOR_CLASSES:
        facts |= {
            "tumor_class": sample.class_name,
            "tumor": sample.class_name != "no tumor",
            "tumor_source": source,
        }
    if sample.body_region == "chest" and sample.class_name in ("normal", "pneumonia"):
        facts |= {"pneumonia": sample.class_name == "pneumonia", "film_source": source}
    return Facts(**facts)


def film_variant(image: np.ndarray, rng: random.Random, *, mirror: bool) -> np.ndarray:
    """An altered copy: cropped, brighter or darker, perhaps mirrored.

    Args:
      image: [H, W, 3] uint8.
      rng: source of the change.
      mirror: left and right may be exchanged (a head; never a chest: the heart has its side).

    Returns:
      [h, w, 3] uint8, no side longer than `MAX_VARIANT_SIDE`.
    """
    height, width = image.shape[:2]
    keep = rng.uniform(_SMALLEST_CROP, 1.0)
    h, w = max(1, round(height * keep)), max(1, round(width * keep))
    top, left = rng.randint(0, height - h), rng.randint(0, width - w)
    out = image[top : top + h, left : left + w]
    if mirror and rng.random() < 0.5:
        out = out[:, ::-1]
    gain, gamma = rng.uniform(0.85, 1.15), rng.uniform(0.8, 1.25)
    levels = np.clip(255.0 * gain * (np.arange(256) / 255.0) ** gamma, 0, 255).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(levels[out]))
    picture.thumbnail((MAX_VARIANT_SIDE, MAX_VARIANT_SIDE), Image.Resampling.BICUBIC)
    return np.array(picture)
