"""A tiny random model, its export, and a small world of images, questions and annotations."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import nibabel
import numpy as np
import pytest
from vilam3_jax.configs import models

from vilam3_jax.checkpoints import exports
from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.examples import Example, ExpertRequest, ImageRef, RequestImage, Turn
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment
from vilam3_jax.data.experts.store import AnnotationWriter
from vilam3_jax.data.images import encode_png
from vilam3_jax.data.records import ExampleWriter
from vilam3_jax.data.tokenizer import load_tokenizer, train_bpe
from vilam3_jax.data.volumes import load_volume
from vilam3_jax.models import build

CORPUS = [
    "user assistant expert system yes no CT MRI axial coronal sagittal",
    "Is the liver visible in this slice? The results are liver, spleen, aorta.",
]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(CORPUS, 300, folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    return load_tokenizer(tokenizer_dir)


@pytest.fixture(scope="session")
def model_config():
    cfg = models.get("tiny")
    cfg.cards = "quickstart"
    cfg.llm.vocab_size = cfg.text_tower.vocab_size = 320
    return cfg


@pytest.fixture(scope="session")
def params(model_config):
    params = jax.jit(lambda key: build.init_params(model_config, "generative", key))(jax.random.key(0))
    # Random weights of the usual scale repeat one token; larger ones make texts depend on their context.
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)


@pytest.fixture(scope="session")
def export(tmp_path_factory, model_config, params, tokenizer_dir):
    """An export of the generative model."""
    folder = tmp_path_factory.mktemp("exports") / "generative"
    exports.export_model(folder, params, {**model_config.to_dict(), "kind": "generative"}, tokenizer_dir, {})
    return folder


@pytest.fixture(scope="session")
def towers_export(tmp_path_factory, model_config, tokenizer_dir):
    """An export of a contrastive model."""
    params = jax.jit(lambda key: build.init_params(model_config, "contrastive", key))(jax.random.key(1))
    folder = tmp_path_factory.mktemp("exports") / "contrastive"
    exports.export_model(folder, params, {**model_config.to_dict(), "kind": "contrastive"}, tokenizer_dir, {})
    return folder


@dataclasses.dataclass(frozen=True)
class World:
    """Paths of the data.

    Attributes:
      data: folder of the datasets `instruct` and `pairs`.
      annotations: store with one record of ORGANS for `volume`, and of PNEUMONIA for `film`.
      volume: a NIfTI file of 24 x 20 x 16 voxels in HU.
      film: a PNG file.
    """

    data: Path
    annotations: Path
    volume: Path
    film: Path


def _qa(question, answer, kind, options, *, source="mask", expert=None, args="", oracle=False):
    return {
        "question": question, "answer": answer, "type": kind, "label_source": source,
        "options": list(options), "expert": expert, "args": args, "oracle": oracle,
    }  # fmt: skip


def _examples(split, volume_key, film_key):
    organ = _qa("Is the liver visible in this slice?", "yes", "organ_present", ("yes", "no"), source="map",
                expert="ORGANS", args="organs", oracle=True)  # fmt: skip
    modality = ("CT", "MRI", "chest X-ray")
    for person in range(3):
        slices = [ImageRef(path="images/scan.nii.gz", axis=2, index=4 + person, window=(50.0, 400.0))]
        meta = {"split": split, "modality": "CT", "patient": f"{split}{person}", "licence": "none"}
        questions = [organ, _qa("What imaging modality is this?", "CT", "modality", modality)]
        yield _dialogue(f"instruct/{split}/scan{person}", slices, meta | {"input_key": volume_key}, questions)
        film = [ImageRef(path="images/film.png")]
        meta = {**meta, "modality": "chest X-ray", "patient": f"{split}-film{person}", "input_key": film_key}
        questions = [
            _qa(
                "Does this film show pneumonia?",
                "no",
                "pneumonia",
                ("yes", "no"),
                source="class",
                expert="PNEUMONIA",
            ),
            _qa("What imaging modality is this?", "chest X-ray", "modality", modality),
        ]
        yield _dialogue(f"instruct/{split}/film{person}", film, meta, questions)


def _dialogue(name, images, meta, questions):
    turns = []
    for position, one in enumerate(questions):
        turns.append(Turn("user", ("" if position else "<image>\n") + one["question"]))
        turns.append(Turn("assistant", one["answer"], True))
    first = questions[0]
    requests = (ExpertRequest(first["expert"], first["args"], (RequestImage(),), 1, "optional"),)
    return Example(name, "conversation", tuple(images), tuple(turns), requests, {**meta, "qa": questions})


def _pairs(examples):
    for example in examples:
        turns = (Turn("user", "<image>"), Turn("assistant", f"{example.meta['modality']} image.", True))
        meta = {k: v for k, v in example.meta.items() if k != "qa"}
        yield Example(example.id.replace("instruct", "pairs"), "pair", example.images, turns, (), meta)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1000, 300, (24, 20, 16)).astype(np.int16)
    film = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    for name in ("instruct", "pairs"):
        images = root / "data" / name / "images"
        images.mkdir(parents=True)
        image = nibabel.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0]))
        image.header.set_xyzt_units("mm")
        nibabel.save(image, images / "scan.nii.gz")
        (images / "film.png").write_bytes(encode_png(film))
    volume = root / "data" / "instruct" / "images" / "scan.nii.gz"
    keys = load_volume(volume).content_key, image_key(film)
    for split in ("train", "heldout"):
        made = list(_examples(split, *keys))
        for name, examples in (("instruct", made), ("pairs", _pairs(made))):
            with ExampleWriter(root / "data" / name, split) as writer:
                for example in examples:
                    writer.write(example)
    labels = np.zeros(voxels.shape, np.int32)
    labels[4:12, 4:12, 2:12] = 1
    segment = Segment(1, "liver", 640, 7.7, 1, (4, 4, 2, 12, 12, 12))
    record = LabelMap.encode(labels, load_volume(volume).affine)
    with AnnotationWriter(root / "annotations") as writer:
        writer.write(Annotation(keys[0], "ORGANS", "organs", segments=(segment,), labels=record, version="1"))
        writer.write(
            Annotation(keys[1], "PNEUMONIA", probabilities={"pneumonia": 0.2, "normal": 0.8}, version="1")
        )
    return World(root / "data", root / "annotations", volume, volume.parent / "film.png")
