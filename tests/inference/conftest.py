"""A tiny random model and tokenizer for the inference tests."""

from __future__ import annotations

import jax
import pytest
from vilam3_jax.configs import models

from vilam3_jax.data.tokenizer import train_bpe
from vilam3_jax.models import vila

CORPUS = [
    "user assistant expert system yes no CT MRI axial coronal sagittal",
    "Is the liver visible in this slice? The results are liver, spleen, aorta.",
]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return train_bpe(CORPUS, 300, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def model_config(tokenizer):
    cfg = models.get("tiny")
    cfg.llm.vocab_size = cfg.text_tower.vocab_size = 320
    return cfg


@pytest.fixture(scope="session")
def params(model_config):
    params = jax.jit(lambda key: vila.init_params(model_config, "generative", key))(jax.random.key(0))
    # Random weights of the usual size repeat one token for ever; larger ones make texts depend on their past.
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
