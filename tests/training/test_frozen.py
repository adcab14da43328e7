"""Frozen parameters cost no backward pass: products counted in the jaxpr of the train step."""

from __future__ import annotations

import functools
import math

import jax

from tests.training.helpers import equations, packed_batch, tiny_config
from vilam3_jax import config as config_lib
from vilam3_jax.models import build, param_paths
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib

ALL = ((r".*", 1.0),)
PROJECTOR = ((r"projector/.*", 1.0), (r".*", 0.0))  # stage 2a
NO_TOWER = ((r"vision_tower/.*", 0.0), (r".*", 1.0))  # stage 2b


def products(function, *arguments):
    """Multiplications of all matrix products and convolutions, scans counted by their length."""
    total = 0
    for equation, times in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += times * equation.outvars[0].aval.size * math.prod(left[a] for a in summed)
        assert equation.primitive.name != "conv_general_dilated"
    return total


@functools.cache
def counted(trainable, remat="none"):
    """Products of the train step, and of each part of a forward pass."""
    config = tiny_config(fsdp=8)
    config.model.remat, config.trainable, config.loss_chunk = remat, trainable, 48
    config.model.llm.num_layers = 4
    config = config_lib.resolve(config)
    program = program_lib.build(config, mesh_lib.build_mesh(config.mesh))
    graphdef, nested = build.abstract_model(config.model, config.task)
    shapes = param_paths.flatten(nested)
    batch = packed_batch(0)
    images = batch.images.reshape(-1, 32, 32, 3)
    tokens, llm = batch.tokens.size, config.model.llm
    states = jax.ShapeDtypeStruct((*batch.tokens.shape, llm.hidden_size), "float32")
    rows = batch.segment_ids, batch.positions
    forward = {
        "tower": products(lambda p: build.merge(graphdef, p).vision_tower.features(images), nested),
        "encoded": products(lambda p: build.merge(graphdef, p).encode_images(images), nested),
        "llm": products(lambda p, x: build.merge(graphdef, p).llm(x, *rows), nested, states),
        "head": tokens * llm.hidden_size * llm.vocab_size,
        # Without the two products of attention, whose gradient has five.
        "llm_weights": tokens
        * sum(x.size for p, x in shapes.items() if p.startswith("llm/layers/") and p.endswith("kernel")),
    }
    forward["attention"] = (forward["llm"] - forward["llm_weights"]) // 2
    forward["projector"] = forward["encoded"] - forward["tower"]
    return products(program.step, program.state, batch), forward


def test_only_the_projector_trains():
    """Stage 2a: the tower forward; the LLM forward and back to its inputs, without weight gradients."""
    step, part = counted(PROJECTOR)
    least = part["tower"] + 2 * part["llm_weights"] + 7 * part["attention"] + 2 * part["head"]
    assert 2 * part["projector"] <= step - least <= 3 * part["projector"]


def test_a_frozen_tower_runs_forward_alone():
    (frozen, part), (trained, _) = counted(NO_TOWER), counted(ALL)
    least = part["tower"] + 3 * part["llm_weights"] + 7 * part["attention"] + 3 * part["head"]
    assert 2 * part["projector"] <= frozen - least <= 3 * part["projector"]
    assert (
        1.8 * part["tower"] < trained - frozen < 3 * part["tower"]
    )  # the gradient of attention has five products for two


def test_recomputation_leaves_a_frozen_tower_alone():
    (kept, part), (again, _) = counted(PROJECTOR), counted(PROJECTOR, "full")
    assert 0.5 * part["llm"] < again - kept <= part["llm"]
