"""Initial and restored states: the architecture, the adapters, and checkpoints of older versions."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vilam3_jax.configs import models
from vilam3_jax.configs.models.parts.llms import LLMS

from tests.training.helpers import tiny_config
from vilam3_jax import config as config_lib
from vilam3_jax import train
from vilam3_jax.checkpoints import exports, run_checkpoints
from vilam3_jax.errors import UserError
from vilam3_jax.models import build, model_config, param_paths
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import initialization
from vilam3_jax.training import program as program_lib


@pytest.mark.parametrize("llm", LLMS)
def test_a_model_is_the_one_that_its_checkpoint_names(llm):
    """Configs of checkpoints come from JSON; those of exports have tuples again."""
    model = models.get("tiny")
    model.llm = LLMS[llm]()
    model.llm.update(dict(lora_rank=4, lora_targets=("q", "v")))
    resolved = model_config.resolve(model)
    stored = json.loads(json.dumps(resolved.to_dict()))
    components = {"vision_tower", "text_tower", "projector", "llm"}
    for form in (stored, model_config.resolve(stored).to_dict()):
        assert not initialization.architecture_differences(form, resolved, components, adapters=True)
    if stored["llm"].get("rope_scaling"):
        other = resolved.replace({"llm.rope_scaling.factor": 2.0})
        (found,) = initialization.architecture_differences(stored, other, {"llm"}, adapters=True)
        assert found.startswith("llm.rope_scaling=")
        assert "another model" in initialization.mismatch("runs/x", [found])


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
    config = config_lib.resolve(config)
    return program_lib.build(config, mesh_lib.build_mesh(config.mesh, jax.devices()[:1])).initial_state()


def test_adapters_are_taken_over(adapted):
    export, params = adapted
    config = with_adapters()
    config.init.everything = str(export)
    state, _ = start(config)
    for path, leaf in state.params().items():
        np.testing.assert_array_equal(leaf, params[path], err_msg=path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_rank": 0}, r"lora_rank=4, this config 0.*merge.*vilam3 convert export"),
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


def test_all_differences_of_all_exports_are_in_one_message(adapted):
    export, _ = adapted
    config = with_adapters(num_layers=3, rope_theta=5.0)
    config.model.vision_tower.update(mlp_dim=64)
    config.init.vision_tower = config.init.everything = str(export)
    with pytest.raises(UserError) as caught:
        start(config)
    message = str(caught.value)
    for difference in (
        "vision_tower.mlp_dim=96, this config 64",
        "llm.num_layers=2, this config 3",
        "llm.rope_theta=10000.0, this config 5.0",
    ):
        assert message.count(difference) == 1, message
    assert "llm/" not in message, "the settings explain the shapes"


def test_a_long_list_ends_with_a_count(adapted, tmp_path):
    export, _ = adapted
    config = with_adapters()
    config.model.projector.type = "mlp_downsample_3x3_fix"
    config.init.everything = str(export)
    with pytest.raises(UserError, match=r"projector.type=mlp_downsample, this config mlp_downsample_3x3_fix"):
        start(config)
    wanted = {f"llm/{n}": jax.ShapeDtypeStruct((2,), jnp.float32) for n in range(33)}
    with pytest.raises(UserError, match=r"has no llm/19; and 13 more\)$"):
        exports.load_params(export, wanted)


def test_a_part_with_its_own_export_is_not_taken_from_the_one_for_everything(adapted, tmp_path):
    export, params = adapted
    config = with_adapters()
    other = {path: leaf + 1 for path, leaf in params.items() if path.startswith("llm/")}
    exports.export_model(
        tmp_path / "llm", other, {"kind": "llm", "llm": config.model.llm.to_dict()}, None, {}
    )
    config.init.everything, config.init.llm = str(export), str(tmp_path / "llm")
    state, origin = start(config)
    assert origin["llm"] == str(tmp_path / "llm") and origin["projector"] == str(export)
    for path, leaf in state.params().items():
        np.testing.assert_array_equal(leaf, other.get(path, params[path]), err_msg=path)


# Paths in checkpoints from before `TrainState`, when the state was a dict.
_PROJECTOR = [f"projector/{name}" for name in ("fc1/bias", "fc1/kernel", "fc2/bias", "fc2/kernel")]
_PROJECTOR += ["projector/norm1/bias", "projector/norm1/scale"]
_KERNELS = [path for path in _PROJECTOR if path.endswith("kernel")]
_OTHERS = [path for path in _PROJECTOR if not path.endswith("kernel")]
_ADAM, _MUON = (f"1/inner_states/{name}/inner_state" for name in ("adam", "muon"))
OPT_STATE_PATHS = {
    "adamw": ["1/count", *(f"1/{moment}/{path}" for moment in ("mu", "nu") for path in _PROJECTOR)],
    "muon": [
        f"{_ADAM}/count",
        *(f"{_ADAM}/{moment}/{path}" for moment in ("mu", "nu") for path in _OTHERS),
        f"{_MUON}/0/count",
        *(f"{_MUON}/0/mu/{path}" for path in _KERNELS),
        f"{_MUON}/0/ns_coeffs",
    ],
}


def key_name(key):
    return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))


@pytest.mark.parametrize("optimizer", OPT_STATE_PATHS)
def test_a_checkpoint_of_a_dict_state_restores(tmp_path, optimizer):
    """Its record names `kind` where a config now has `task`, and lacks the provenance."""
    config = tiny_config()
    config.optimizer.name, config.ema_decay = optimizer, 0.9
    config.trainable = ((r"projector/.*", 1.0), (r".*", 0.0))
    config = config_lib.resolve(config)
    program = program_lib.build(config, mesh_lib.build_mesh(config.mesh, jax.devices()[:1]))
    state, _ = program.initial_state()
    counters = {name: np.int32(number) for number, name in enumerate(("taken", "skipped", "skipped_in_row"))}
    old = {
        "step": np.int32(7),
        "rng": state.rng,
        "trainable": {path: leaf + 1 for path, leaf in state.trainable.items()},
        "frozen": state.frozen,
        "opt_state": jax.tree.map(lambda leaf: leaf + 2, state.opt_state),
        "guard": {"norms": np.arange(config.skip.window, dtype=np.float32), **counters},
        "ema": {path: leaf + 3 for path, leaf in state.ema.items()},
    }
    paths = {
        name: ["/".join(map(key_name, keys)) for keys, _ in jax.tree_util.tree_flatten_with_path(part)[0]]
        for name, part in program.state.to_tree().items()
    }
    assert set(paths) == set(old)
    assert paths["opt_state"] == [*OPT_STATE_PATHS[optimizer], "3/count"]
    assert paths["trainable"] == paths["ema"] == _PROJECTOR
    assert paths["guard"] == ["norms", "skipped", "skipped_in_row", "taken"]

    record = config.to_dict()
    record["kind"] = record.pop("task")
    saved = run_checkpoints.RunCheckpoints(tmp_path)
    saved.save(
        7, jax.tree.map(jnp.asarray, old), {"0": {"next": 5}}, {"config": record, "clock": {"tokens": 9}}
    )
    saved.wait()
    loader = Loader()
    start, restored, clock, origin, changed = train._restore(
        program, run_checkpoints.RunCheckpoints(tmp_path), loader, tmp_path
    )
    assert (start, clock.tokens, loader.state) == (7, 9, {"0": {"next": 5}})
    assert origin == config.init.to_dict() and not changed
    for name, part in old.items():
        for want, got in zip(jax.tree.leaves(part), jax.tree.leaves(restored.to_tree()[name]), strict=True):
            np.testing.assert_array_equal(got, want, err_msg=name)


class Loader:
    """Keeps the state that a run restores."""

    state = None

    def set_state(self, state):
        self.state = state
