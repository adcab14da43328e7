"""A tokenizer and small datasets for the tests of rendering and loading."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path

import ml_collections
import nibabel as nib
import numpy as np
from vilam3_jax.configs import models

from vilam3_jax import config as config_lib
from vilam3_jax.data.batch_formats import FORMATS
from vilam3_jax.data.batches import arrays
from vilam3_jax.data.examples import Example, ExpertRequest, ImageRef, RequestImage, Turn
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment
from vilam3_jax.data.experts.store import AnnotationWriter
from vilam3_jax.data.images import encode_png
from vilam3_jax.data.loader import build_loader
from vilam3_jax.data.records import ExampleWriter
from vilam3_jax.data.tokenizer import Tokenizer, train_bpe
from vilam3_jax.data.volumes import load_volume

TOKENS_PER_IMAGE = 4
WORDS = (
    "what is shown here? a chest x-ray of the left lung, no effusion. there are two kidneys in this slice."
)


@functools.cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return train_bpe([WORDS] * 3, 400, folder)


def picture(number: int, side: int = 12) -> bytes:
    """A PNG whose first pixel encodes `number`."""
    return encode_png(np.full((side, side, 3), number % 251, np.uint8))


def film(number: int, rng: np.random.Generator, expert: bool = False, policy: str = "always") -> Example:
    words = WORDS.split()
    text = " ".join(rng.choice(words, size=rng.integers(2, 12)))
    return Example(
        f"film{number}",
        "conversation",
        (ImageRef(data=picture(number)),),
        (Turn("user", "<image>\nWhat is shown?"), Turn("assistant", text, True)),
        (ExpertRequest("PNEUMONIA", "", (RequestImage(),), 1, policy),) if expert else (),
        {"patient": f"p{number // 2}", "modality": "CXR", "licence": "CC0", "input_key": f"key{number}"},
    )


def report(number: int, rng: np.random.Generator) -> Example:
    text = " ".join(rng.choice(WORDS.split(), size=rng.integers(3, 30)))
    return Example(f"report{number}", "document", (), (Turn("assistant", text, True),))


def pair(number: int) -> Example:
    turns = (Turn("user", "<image>"), Turn("assistant", f"film number {number}", True))
    return Example(f"pair{number}", "pair", (ImageRef(data=picture(number)),), turns)


def write(folder: Path, examples: list[Example], split: str = "train") -> None:
    with ExampleWriter(folder, split) as writer:
        for example in examples:
            writer.write(example)


def ct_volume(folder: Path) -> str:
    """Writes a small CT and returns its content key."""
    voxels = np.random.default_rng(0).integers(-200, 300, (10, 12, 14)).astype(np.int16)
    folder.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(voxels, np.diag([-1.0, -1.0, 2.0, 1.0]))
    image.header.set_xyzt_units("mm")
    nib.save(image, folder / "ct.nii.gz")
    return load_volume(folder / "ct.nii.gz").content_key


def ct_example(key: str, number: int = 0, axis: int = 2, index: int = 5, policy: str = "always") -> Example:
    return Example(
        f"ct{number}",
        "conversation",
        (ImageRef(path="ct.nii.gz", axis=axis, index=index, window=(50.0, 400.0)),),
        (Turn("user", "<image>\nIs the liver here?"), Turn("assistant", "Yes.", True)),
        (ExpertRequest("ORGANS", "organs", (RequestImage(),), 1, policy),),
        {"patient": "p", "modality": "CT", "input_key": key},
    )


def ct_annotation(key: str, shape: tuple[int, int, int] = (10, 12, 14)) -> Annotation:
    from vilam3_jax.data.experts.labels import label_table

    names = {name: number for number, name in label_table("ORGANS").items()}
    liver, spleen = names["liver"], names["spleen"]
    labels = np.zeros(shape, np.uint8)
    labels[2:6, 2:9] = liver
    labels[7:9, 2:9, 5:] = spleen
    affine = np.eye(4)
    segments = tuple(
        Segment(
            i, n, int((labels == i).sum()), float((labels == i).sum()) / 1000 * 500, 1, (2, 2, 0, 9, 9, 14)
        )
        for n, i in (("liver", liver), ("spleen", spleen))
    )
    return Annotation(
        key, "ORGANS", "organs", version="t", segments=segments, labels=LabelMap.encode(labels, affine)
    )


def annotate(folder: Path, annotations: list[Annotation]) -> None:
    with AnnotationWriter(folder) as writer:
        for annotation in annotations:
            writer.write(annotation)


def config(root: Path, mixture: tuple = (("films", 1.0),), **data) -> ml_collections.ConfigDict:
    cfg = config_lib.base_config()
    cfg.model = models.get("tiny")
    cfg.model.cards = "quickstart"
    # Images of 8 x 8 pixels that take 4 tokens, as those of 32 x 32 do.
    cfg.model.image_size = cfg.model.vision_tower.image_size = 8
    cfg.model.vision_tower.patch_size = 2
    cfg.data.path = str(root)
    cfg.data.mixture = mixture
    cfg.data.update(
        dict(seq_len=96, rows_per_group=2, images_per_group=4, global_rows=8, loader_shards=4) | data
    )
    return cfg


def build(cfg, split="train", **settings):
    run = config_lib.resolve(cfg)
    settings = dict(seed=run.seed, tokenizer=tokenizer()) | settings
    return build_loader(run.data, run.model, FORMATS[run.task], split, **settings)


def take(loader, count):
    return list(itertools.islice(loader, count))


def batches_of(cfg, count, *split, **settings):
    loader = build(cfg, *split, **settings)
    batches = take(loader, count)
    loader.close()
    return batches


def same(left, right) -> bool:
    assert len(left) == len(right)
    return all(
        type(a) is type(b)
        and arrays(a).keys() == arrays(b).keys()
        and all(np.array_equal(value, arrays(b)[name]) for name, value in arrays(a).items())
        for a, b in zip(left, right, strict=True)
    )
