"""Zero-shot retrieval of the modality, with embeddings made by hand and with a tiny model."""

from __future__ import annotations

import numpy as np
import pytest

from vilam3_jax.checkpoints import exports
from vilam3_jax.data.examples import Example, ImageRef, Turn
from vilam3_jax.errors import UserError
from vilam3_jax.evals import retrieval
from vilam3_jax.models import build


def pair(name, modality="CT", patient="p", index=0, split="heldout", form="pair"):
    return Example(
        name,
        form,
        (ImageRef(path="s.nii", axis=2, index=index),),
        (Turn("user", "<image>"), Turn("assistant", "text", True)),
        meta={"split": split, "modality": modality, "patient": patient, "input_key": "k"},
    )


def test_each_image_counts_once():
    examples = [
        pair("a"),
        pair("b", form="caption"),
        pair("c", index=1),
        pair("d", split="train", index=2),
        pair("e", "MRI", index=3),
    ]
    items = retrieval.retrieval_items(examples)
    assert [item.example.id for item in items] == ["a", "c", "e"]
    with pytest.raises(UserError, match="at least two modalities"):
        retrieval.retrieval_items(examples[:3])


def test_scores_by_hand():
    names = ["CT", "CT", "MRI", "MRI", "MRI"]
    items = [retrieval.RetrievalItem(pair(str(i), m), m, f"p{i}") for i, m in enumerate(names)]
    towards = {"CT": [1.0, 0.0], "MRI": [0.0, 1.0]}
    images = np.asarray([towards[m] for m in ("CT", "MRI", "MRI", "MRI", "CT")])
    result = retrieval.evaluate_retrieval(items, images, ["CT", "MRI"], np.eye(2))
    assert result["accuracy"] == pytest.approx(3 / 5)
    assert result["balanced_accuracy"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert result["chance"] == 0.5 and result["majority"] == pytest.approx(3 / 5)
    assert result["per_class"]["MRI"] == {"n": 3, "clusters": 3, "accuracy": pytest.approx(2 / 3)}
    assert result["confusion"] == {"CT": {"CT": 1, "MRI": 1}, "MRI": {"CT": 1, "MRI": 2}}
    assert result["interval"] is None and result["clusters"] == 5
    assert "too few patients" in result["note"]


def test_wordings_are_averaged_per_class():
    table = {"CT a": [1.0, 0.0], "CT b": [0.0, 1.0], "MRI a": [-1.0, 0.0], "MRI b": [-1.0, 0.0]}
    made = retrieval.class_embeddings(
        lambda texts: np.asarray([table[text] for text in texts]),
        ["CT", "MRI"],
        ["{modality} a", "{modality} b"],
    )
    assert np.allclose(made, [[2**-0.5, 2**-0.5], [-1, 0]])


def test_prompts_treat_all_modalities_alike():
    protocol = retrieval.RETRIEVAL
    assert protocol.name == "retrieval@2" and len(protocol.hash) == 64
    assert len(set(protocol.prompts)) == len(protocol.prompts) == 4
    assert all("{modality}" in prompt for prompt in protocol.prompts)


def test_embeddings_are_those_of_the_training_model(towers_export, tokenizer):
    params, config, _ = exports.load_export(towers_export)
    embedder = retrieval.TwoTowerEmbedder(config, params, tokenizer, batch_size=4)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(6)]
    texts = ["CT", "an axial MRI", "yes", "no", "liver", "spleen"]
    model = build.merge(build.abstract_model(config, "contrastive")[0], params)
    tokens, valid = retrieval.prompt_tokens(tokenizer, texts, config.text_tower.max_length)
    assert tokens[0, valid[0]].tolist() == [*tokenizer.encode("CT"), tokenizer.eos_id]
    image, text = model(np.stack(images), tokens, valid)
    assert np.allclose(embedder.images(images), image, atol=1e-5)
    assert np.allclose(embedder.texts(texts), text, atol=1e-5)
