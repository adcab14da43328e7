"""Operations counted by hand for published sizes, and against what XLA counts for a small model."""

import jax
import numpy as np
import pytest
from vilam3_jax.configs import models

from tests.training.helpers import packed_batch, pair_batch, tiny_config
from vilam3_jax import config as config_lib
from vilam3_jax.data.batches import PackedBatch, PairBatch
from vilam3_jax.models import param_paths, vila
from vilam3_jax.training import flops
from vilam3_jax.training import step as step_lib


def config_of(name, trainable=((r".*", 1.0),), kind="generative"):
    config = config_lib.base_config()
    config.task, config.model, config.trainable = kind, models.get(name), trainable
    return config


def test_llama_3_8b_by_hand():
    counted = flops.model_flops(config_of("vila_m3_8b"))
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14_336
    assert counted.per_token == 6 * 32 * layer
    assert counted.per_target == 6 * 4096 * 128_257
    assert counted.per_attended == 3 * 32 * 4 * 4096  # layers; scores and values, 2 each, 32 heads of 128


def test_siglip_and_projector_by_hand():
    counted = flops.model_flops(config_of("vila_m3_8b"))
    block = 4 * 1152**2 + 2 * 1152 * 4304
    tower = 26 * (6 * 729 * block + 3 * 4 * 1152 * 729**2) + 4 * 729 * 14 * 14 * 3 * 1152
    projector = 6 * 196 * (4 * 1152 * 4096 + 4096 * 4096)
    assert counted.per_image == tower + projector


def test_what_is_frozen_costs_what_it_must():
    whole = flops.model_flops(config_of("vila_m3_3b"))
    align = flops.model_flops(config_of("vila_m3_3b", ((r"projector/.*", 1.0), (r".*", 0.0))))
    assert align.per_token == whole.per_token * 2 / 3  # forward, and back to the images
    assert align.per_attended == whole.per_attended  # attention has no weights: nothing is saved
    pretrain = flops.model_flops(config_of("vila_m3_3b", ((r"vision_tower/.*", 0.0), (r".*", 1.0))))
    assert pretrain.per_token == whole.per_token
    block = 4 * 1152**2 + 2 * 1152 * 4304
    frozen = 26 * (2 * 729 * block + 4 * 1152 * 729**2) + 2 * 729 * 588 * 1152
    projector = 196 * 2 * 3 * (4 * 1152 * 2560 + 2560 * 2560)
    assert pretrain.per_image == frozen + projector
    llm_only = flops.model_flops(config_of("vila_m3_3b", ((r"llm/.*", 1.0), (r".*", 0.0))))
    assert llm_only.per_image == frozen + projector / 3


def test_scales_and_intern_vit():
    config = config_of("vila_m3_8b")
    once = flops.model_flops(config).per_image
    config.model.s2_scales = (384, 768)
    projector = 6 * 196 * (4096 * 4096)
    assert flops.model_flops(config).per_image - projector == pytest.approx(
        5 * (once - projector - 6 * 196 * 4 * 1152 * 4096) + 2 * 6 * 196 * 4 * 1152 * 4096, rel=1e-12
    )
    counted = flops.model_flops(config_of("vila_m3_40b"))
    block = 4 * 3200**2 + 2 * 3200 * 12_800
    tower = 45 * (6 * 1025 * block + 12 * 3200 * 1025**2) + 4 * 1024 * 588 * 3200
    assert counted.per_image == tower + 6 * 256 * (4 * 3200 * 7168 + 7168**2)


def test_the_work_of_a_batch_leaves_padding_out():
    segments = np.asarray([[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
    weights = np.asarray([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0.0]])
    valid = np.asarray([[1, 0]], bool)
    batch = PackedBatch(None, segments, None, weights, None, None, valid)
    assert flops.batch_work(batch) == flops.Work(6, 3, 1, (9 + 4 + 1) / 2)
    valid = np.asarray([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    assert flops.batch_work(PairBatch(None, None, valid)) == flops.Work(4, 0, 2, 10)


def test_no_batch_holds_more_than_the_full_one():
    config = tiny_config()
    config.data.global_rows, config.data.seq_len, config.data.images_per_group = 8, 48, 2
    most, real = flops.full_work(config), flops.batch_work(packed_batch(0))
    for name in ("tokens", "targets", "images", "attended"):
        assert 0 < getattr(real, name) <= getattr(most, name)
    counted = flops.model_flops(config)
    assert counted.of(real) < counted.of(most)


@pytest.mark.parametrize("kind", ["generative", "contrastive"])
def test_the_count_agrees_with_xla(kind):
    """XLA counts forward and backward of unrolled layers; the rest (norms, softmax) is under a tenth here."""
    config = tiny_config(kind)
    wide = dict(hidden_size=128, mlp_dim=512)
    config.model.vision_tower.update(wide)
    config.model.text_tower.update(wide)
    config.model.llm.update(dict(wide, num_layers=1, head_dim=32, vocab_size=256, tie_embeddings=False))
    config.model.vision_tower.num_layers = config.model.text_tower.num_layers = 1
    config.model.vision_tower.select_layer = -1
    config.loss_chunk = 48
    batch = packed_batch(0) if kind == "generative" else pair_batch(0)
    graphdef, nested = build.abstract_model(config.model, kind)
    loss = step_lib.make_loss(config, graphdef)
    gradient = jax.jit(jax.grad(lambda params, batch: loss(params, batch)[0]))
    cost = gradient.lower(param_paths.flatten(nested), batch).compile().cost_analysis()
    slots = (
        flops.Work(8 * 48, 8 * 48, 16, 8 * 48 * 48) if kind == "generative" else flops.Work(96, 0, 8, 1152)
    )
    assert flops.model_flops(config).of(slots) == pytest.approx(cost["flops"], rel=0.1)
