"""What a run starts from: the same model, with the adapters that were trained."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from vilam3_jax.configs import models
from vilam3_jax.configs.models.parts.llms import LLMS

from tests.training.helpers import tiny_config
from vilam3_jax.checkpoints import exports
from vilam3_jax.config import COMPONENTS, ConfigDict
from vilam3_jax.errors import UserError
from vilam3_jax.models import param_paths, vila
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib
from vilam3_jax.training import state as state_lib


@pytest.mark.parametrize("llm", LLMS)
def test_a_model_is_the_one_that_its_checkpoint_names(llm):
    """A checkpoint's config went through JSON; an export's has tuples again."""
    model = models.get("tiny")
    model.llm = LLMS[llm]()
    model.llm.update(dict(lora_rank=4, lora_targets=("q", "v")))
    stored = json.loads(json.dumps(model.to_dict()))
    for form in (stored, ConfigDict(exports._tuples(stored))):
        state_lib.check_architecture("runs/x", form, model, set(COMPONENTS), adapters=True)
    if stored["llm"]["rope_scaling"]:
        model.llm.rope_scaling.factor = 2.0
        with pytest.raises(UserError, match=r"runs/x: its llm has rope_scaling=.*another model"):
            state_lib.check_architecture("runs/x", stored, model, {"llm"}, adapters=True)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """An export with trained adapters."""
    config = with_adapters()
    params = param_paths.flatten(build.init_params(config.model, "generative", jax.random.key(3)))
    params = {p: leaf + 0.1 if p.endswith("/lora_b") else leaf for p, leaf in params.items()}
    out = tmp_path_factory.mktemp("adapted") / "export"
    exports.export_model(out, params, {**config.model.to_dict(), "kind": "generative"}, None, {})
    return out, params


def with_adapters(**changes):
    config = tiny_config()
    config.model.llm.update(dict(lora_rank=4, lora_alpha=32.0, lora_targets=("q", "down")) | changes)
    return config


def start(config):
    program = program_lib.build(config, mesh_lib.build_mesh(config.mesh, jax.devices()[:1]))
    return state_lib.initial_state(config, program.state, program.optimizer)


def test_adapters_are_taken_over(adapted):
    export, params = adapted
    config = with_adapters()
    config.init.everything = str(export)
    state, _ = start(config)
    for path, leaf in state_lib.model_params(state).items():
        np.testing.assert_array_equal(leaf, params[path], err_msg=path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_rank": 0}, r"lora_rank=4, this config 0; .*merge.*vilam3 convert export"),
        ({"lora_alpha": 16.0}, r"lora_alpha=32\.0, this config 16\.0"),
        ({"lora_targets": ("q",)}, r"lora_targets=\['q', 'down'\], this config \['q'\]"),
    ],
)
@pytest.mark.parametrize("component", ["everything", "llm"])
def test_adapters_are_neither_lost_nor_scaled(adapted, component, changes, message):
    export, _ = adapted
    config = with_adapters(**changes)
    config.init[component] = str(export)
    with pytest.raises(UserError, match=message):
        start(config)


def test_adapters_of_a_part_that_is_not_taken_do_not_matter(adapted):
    export, _ = adapted
    config = with_adapters(lora_rank=0)
    config.init.projector = str(export)
    _, origin = start(config)
    assert origin["projector"] == str(export) and origin["llm"] == "fresh"
