"""Operations compared with counts by hand for published sizes, and with XLA's for a small model."""

import jax
import numpy as np
import pytest
from vilam3_jax.configs import models

from tests.training.helpers import packed_batch, pair_batch, tiny_config
from vilam3_jax import config as config_lib
from vilam3_jax.data.batches import PackedBatch, PairBatch
from vilam3_jax.models import build, model_config, param_paths
from vilam3_jax.tasks import TASKS
from vilam3_jax.tasks.task import Work
from vilam3_jax.training import flops
from vilam3_jax.training import optimizer as optimizer_lib


def counted(config):
    """Operations of a config's model per unit of work."""
    config = config_lib.resolve(config)
    shapes = param_paths.flatten(build.abstract_model(config.model, config.task)[1])
    groups = optimizer_lib.lr_groups(config.trainable, shapes)
    rates = {path: group.rate for path, group in groups.items()}
    return flops.model_flops(TASKS[config.task], config.model, shapes, rates)


def config_of(name, trainable=((r".*", 1.0),)):
    config = config_lib.base_config()
    config.model, config.trainable = models.get(name), trainable
    return config


def test_llama_3_8b_by_hand():
    found = counted(config_of("vila_m3_8b"))
    layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14_336
    assert found.tokens == 6 * 32 * layer
    assert found.targets == 6 * 4096 * 128_257
    assert found.attended == 3 * 32 * 4 * 4096  # layers; scores and values, 2 each, 32 heads of 128


def test_siglip_and_projector_by_hand():
    found = counted(config_of("vila_m3_8b"))
    block = 4 * 1152**2 + 2 * 1152 * 4304
    tower = 26 * (6 * 729 * block + 3 * 4 * 1152 * 729**2) + 4 * 729 * 14 * 14 * 3 * 1152
    projector = 6 * 196 * (4 * 1152 * 4096 + 4096 * 4096)
    assert found.images == tower + projector


def test_what_is_frozen_costs_what_it_must():
    whole = counted(config_of("vila_m3_3b"))
    align = counted(config_of("vila_m3_3b", ((r"projector/.*", 1.0), (r".*", 0.0))))
    assert align.tokens == whole.tokens * 2 / 3  # forward, and back to the images
    assert align.attended == whole.attended  # attention has no weights, so freezing saves nothing
    pretrain = counted(config_of("vila_m3_3b", ((r"vision_tower/.*", 0.0), (r".*", 1.0))))
    assert pretrain.tokens == whole.tokens
    block = 4 * 1152**2 + 2 * 1152 * 4304
    frozen = 26 * (2 * 729 * block + 4 * 1152 * 729**2) + 2 * 729 * 588 * 1152
    projector = 196 * 2 * 3 * (4 * 1152 * 2560 + 2560 * 2560)
    assert pretrain.images == frozen + projector
    llm_only = counted(config_of("vila_m3_3b", ((r"llm/.*", 1.0), (r".*", 0.0))))
    assert llm_only.images == frozen + projector / 3


def test_scales_and_intern_vit():
    config = config_of("vila_m3_8b")
    once = counted(config).images
    config.model.s2_scales = (384, 768)
    projector = 6 * 196 * (4096 * 4096)
    assert counted(config).images - projector == pytest.approx(
        5 * (once - projector - 6 * 196 * 4 * 1152 * 4096) + 2 * 6 * 196 * 4 * 1152 * 4096, rel=1e-12
    )
    found = counted(config_of("vila_m3_40b"))
    block = 4 * 3200**2 + 2 * 3200 * 12_800
    tower = 45 * (6 * 1025 * block + 12 * 3200 * 1025**2) + 4 * 1024 * 588 * 3200
    assert found.images == tower + 6 * 256 * (4 * 3200 * 7168 + 7168**2)


def work(task, batch):
    return Work(*map(float, TASKS[task].work(model_config.resolve(models.get("tiny")), batch)))


def test_the_work_of_a_batch_leaves_padding_out():
    segments = np.asarray([[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]])
    weights = np.asarray([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0.0]])
    valid = np.asarray([[1, 0]], bool)
    positions = np.asarray([[0, 1, 2, 0, 1, 0], [0, 0, 0, 0, 0, 0]])
    batch = PackedBatch(None, segments, positions, weights, None, None, valid)
    assert work("generative", batch) == Work(6, 3, 1, (9 + 4 + 1) / 2)
    valid = np.asarray([[1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    assert work("contrastive", PairBatch(None, None, valid)) == Work(4, 0, 2, 10)


def test_no_batch_holds_more_than_the_full_one():
    config = tiny_config()
    config.data.global_rows, config.data.seq_len, config.data.images_per_group = 8, 48, 2
    resolved = config_lib.resolve(config)
    most = TASKS["generative"].full_work(resolved.model, resolved.data)
    real = work("generative", packed_batch(0))
    for name in ("tokens", "targets", "images", "attended"):
        assert 0 < getattr(real, name) <= getattr(most, name)
    per_unit = counted(config)
    assert flops.step_flops(per_unit, real) < flops.step_flops(per_unit, most)


@pytest.mark.parametrize("kind", ["generative", "contrastive"])
def test_the_count_agrees_with_xla(kind):
    """XLA counts forward and backward of unrolled layers; norms and softmax are below a tenth here."""
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

    def loss(params, batch):
        return TASKS[kind].loss(build.merge(graphdef, params), batch, config.loss_chunk).loss

    cost = jax.jit(jax.grad(loss)).lower(nested, batch).compile().cost_analysis()
    slots = Work(8 * 48, 8 * 48, 16, 8 * 48 * 48) if kind == "generative" else Work(96, 0, 8, 1152)
    assert flops.step_flops(counted(config), slots) == pytest.approx(cost["flops"], rel=0.1)
