"""Training with quantised matmuls: losses close to exact ones, on any mesh."""

from __future__ import annotations

import collections
import os
import re

import jax
import numpy as np
import pytest

from tests.training.helpers import Run, equations, packed_batch, tiny_config
from vilam3_jax import config as config_lib
from vilam3_jax.errors import UserError
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib

pytest.importorskip("qwix")
STEPS = 30


def make_config(kind="", gradients=False, modules=r"llm/layers/.*", **axes):
    config = tiny_config(**axes)
    config.num_steps = STEPS
    config.quantization.update(dict(matmul=kind, gradients=gradients, modules=modules))
    return config


def built(config, devices=None):
    config = config_lib.resolve(config)
    return program_lib.build(config, mesh_lib.build_mesh(config.mesh, devices))


def losses(config, steps=STEPS):
    axes = config_lib.resolve(config).mesh
    devices = jax.devices()[: axes.data * axes.fsdp * axes.tensor]
    run = Run(config, mesh_lib.build_mesh(axes, devices))
    return np.asarray([run.step(packed_batch(step % 2))["loss"] for step in range(steps)])


@pytest.fixture(scope="module")
def learned():
    """Losses on one device: exact, and with quantised matmuls in both passes."""
    return {kind: losses(make_config(kind, bool(kind))) for kind in ("", "int8", "fp8")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_loss_goes_where_it_goes_with_exact_products(learned, kind):
    found, exact = learned[kind], learned[""]
    assert found[0] != exact[0] and found[0] == pytest.approx(exact[0], rel=5e-3)
    assert found[-1] < 0.8 * found[0]
    np.testing.assert_allclose(found, exact, rtol=0.03)


@pytest.mark.slow
def test_a_mesh_changes_no_more_than_rounding(learned):
    """Scales are per device, for rows over `tensor` and in gradients; with remat as well."""
    config = make_config("int8", True, data=2, fsdp=2, tensor=2)
    config.model.remat = "qkv+mlp"
    np.testing.assert_allclose(losses(config, 3), learned["int8"][:3], rtol=2e-3)


def test_tower_and_projector_by_expression():
    config = make_config("int8", modules=r"llm/layers/.*|vision_tower/blocks/.*|projector/.*", fsdp=8)
    text = built(config).lower().as_text()
    assert text.count("xi8>, tensor<") >= 7 + 6 + 2  # per LLM layer, tower block, projector


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(matmul="int4"), r"quantization\.matmul='int4'.*'int8' or 'fp8'"),
        (dict(gradients=True), r"quantization\.gradients.*needs quantization\.matmul"),
        (dict(modules="llm/("), r"quantization\.modules.*regular expression"),
    ],
)
def test_what_a_config_may_not_say(changes, message):
    config = tiny_config()
    config.quantization.update(changes)
    with pytest.raises(UserError, match=message):
        config_lib.resolve(config)


def test_an_expression_that_matches_nothing():
    config = make_config("int8", modules=r"llm/lm_head|llm/layer/.*", fsdp=8)
    with pytest.raises(UserError, match=r"quantization\.modules.*matches none of.*llm/layers/attn/k"):
        built(config)


def test_products_of_the_head_and_of_embeddings_stay():
    config = make_config("int8", modules=".*", fsdp=8)
    config.model.llm.tie_embeddings = False
    program = built(config)
    with program.context():
        jaxpr = jax.make_jaxpr(program.step)(program.state, program.batch).jaxpr
    vocabulary = config.model.llm.vocab_size
    products = [e for e, _ in equations(jaxpr) if e.primitive.name == "dot_general"]
    of_head = [e for e in products if vocabulary in {n for v in e.invars for n in v.aval.shape}]
    assert of_head and all(v.aval.dtype != np.int8 for e in of_head for v in e.invars)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, kind, forward, backward",
    [
        ("v5e:2x2", "int8", ("s32", "s8", "s8"), ("s32", "s8", "s8")),
        ("tpu7x:2x2x1", "fp8", ("f32", "f8e4m3fn", "f8e4m3fn"), ("f32", "f8e4m3fn", "f8e5m2")),
    ],
)
def test_a_tpu_multiplies_the_quantised_numbers(monkeypatch, name, kind, forward, backward):
    """In the compiled step: 7 products per layer, and 14 in its backward pass."""
    pytest.importorskip("libtpu")
    from vilam3_jax.plan import topology

    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    config = make_config(kind, True, fsdp=-1)
    config.data.seq_len, config.model.dtype = 256, "bfloat16"
    config.model.llm.update(dict(hidden_size=256, head_dim=128, mlp_dim=512, num_heads=2, num_kv_heads=2))
    devices = topology.parse(name).devices()
    text = built(config, devices).lower().compile().as_text()
    found = tpu_products(text)
    orders = {backward, (backward[0], *reversed(backward[1:]))}
    if forward == backward:
        assert found[forward] == 21, found
    else:
        assert found[forward] == 7 and sum(found[order] for order in orders) == 14, found


def tpu_products(text):
    """(result, first factor, second factor) types → number of products in a compiled program."""
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", text))
    found = collections.Counter()
    for result, factors in re.findall(r"= (\w+)\[\S* (?:convolution|dot)\(([^)]*)\)", text):
        found[(result, *(types[name] for name in re.findall(r"%([\w.\-]+)", factors)))] += 1
    return found
