"""Whatever a model is stored as, and on whatever devices: the same parameters, and the same answers."""

from __future__ import annotations

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import vilam3_jax
from tests.training.helpers import tiny_config
from vilam3_jax import config as config_lib
from vilam3_jax.checkpoints import exports, run_checkpoints
from vilam3_jax.convert.exporter import export_folder
from vilam3_jax.convert.importer import import_model
from vilam3_jax.errors import UserError
from vilam3_jax.inference import loading
from vilam3_jax.models import param_paths
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib
from vilam3_jax.training.export_checkpoint import export_checkpoint

PROMPT = "Is the liver visible in this slice?"
LOADED = dict(expert_host="off", max_length=512)


def run_folder(workdir, tokenizer_dir, *, quantised):
    """A run with checkpoints 2 and 10 of random states, whose moving average differs from the parameters."""
    config = tiny_config()
    config.model.tokenizer = str(tokenizer_dir)
    config.model.llm.vocab_size = config.model.text_tower.vocab_size = 320
    if quantised:
        pytest.importorskip("qwix")
        config.model.llm.update(dict(lora_rank=4, lora_targets=("q", "down")))
        config.trainable = ((r"llm/.*lora_[ab]", 1.0), (r".*", 0.0))
        config.quantization.frozen = quantised
    config.ema_decay = 0.5
    config = config_lib.resolve(config)
    program = program_lib.build(config, mesh_lib.build_mesh(config.mesh, jax.devices()[:1]))
    state, _ = program.initial_state()
    noise = np.random.default_rng(0)
    checkpoints = run_checkpoints.RunCheckpoints(workdir)
    for step in (2, 10):
        assert state.ema is not None
        moved = {path: x + 0.1 * noise.normal(size=x.shape) for path, x in state.ema.items()}
        state = dataclasses.replace(state, ema=jax.device_put(moved, jax.tree.map(_sharding, state.ema)))
        checkpoints.save(step, state.to_tree(), {}, {"config": config.to_dict(), "provenance": {}})
    checkpoints.wait()
    return workdir


def _sharding(array):
    return array.sharding


def parameters(model):
    """Path → array, without the wrappers of a mesh."""
    flat = param_paths.flatten(model.generator._params)
    return {path: np.asarray(getattr(leaf, "value", leaf)) for path, leaf in flat.items()}


def assert_same_parameters(one, other):
    one, other = parameters(one), parameters(other)
    assert one.keys() == other.keys()
    for path, value in one.items():
        assert value.dtype == other[path].dtype, path
        np.testing.assert_array_equal(value, other[path], err_msg=path)


def answer(model, image):
    asked = dict(experts=False, max_new_tokens=8)
    return model.ask(image, PROMPT, **asked).answer, model.score(image, PROMPT, ["yes", "no"])


def assert_same_answers(one, other, image):
    (said, scores), (also, more) = answer(one, image), answer(other, image)
    assert said == also
    assert scores == pytest.approx(more, abs=1e-4)


@pytest.mark.parametrize("quantised", ["", "int8", "nf4"])
def test_a_checkpoint_is_loaded_as_its_export(tmp_path, tokenizer_dir, world, quantised):
    run = run_folder(tmp_path / "run", tokenizer_dir, quantised=quantised)
    exported = export_checkpoint(run, 10, tmp_path / "export")
    before = sorted(run.rglob("*"))
    expected = vilam3_jax.load(exported, **LOADED)
    newest = vilam3_jax.load(run, **LOADED)
    assert_same_parameters(newest, expected)
    assert newest.generator.model == expected.generator.model
    split = vilam3_jax.load(run / "checkpoints", mesh=2, **LOADED)
    assert_same_parameters(split, expected)
    if not quantised:
        assert_same_answers(split, newest, world.film)
        older = vilam3_jax.load(run / "checkpoints" / "2", **LOADED)
        with pytest.raises(AssertionError):
            assert_same_parameters(older, expected)
    assert sorted(run.rglob("*")) == before, "loading writes nothing"


def test_the_places_of_a_run(tmp_path, tokenizer_dir, export):
    run = run_folder(tmp_path / "run", tokenizer_dir, quantised="")
    for place in (run, run / "checkpoints", run / "checkpoints" / "10"):
        assert loading.open_model(place).name == str(run / "checkpoints" / "10")
    with pytest.raises(UserError, match="has no step 3; it has 2, 10"):
        loading.open_model(run / "checkpoints" / "3")
    shutil.copytree(export, run / "export")
    assert loading.open_model(run).name == str(run / "export"), "a finished run"
    assert loading.open_model(run / "checkpoints" / "2").name == str(run / "checkpoints" / "2")
    largest = max((run / "checkpoints" / "10").rglob("*"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"10: is damaged .*use another step"):
        loading.open_model(run / "checkpoints")


@pytest.mark.parametrize("leaf_bytes", [exports.LEAF_BYTES, 40_000])
def test_a_hugging_face_folder_is_loaded_as_its_import(tmp_path, export, world, monkeypatch, leaf_bytes):
    export_folder(export, tmp_path / "vila")
    import_model(tmp_path / "vila", tmp_path / "imported")
    before = sorted((tmp_path / "vila").rglob("*"))
    expected = vilam3_jax.load(tmp_path / "imported", **LOADED)
    monkeypatch.setattr(exports, "LEAF_BYTES", leaf_bytes)
    direct = vilam3_jax.load(tmp_path / "vila", **LOADED)
    assert_same_parameters(direct, expected)
    assert direct.generator.model.replace(name="") == expected.generator.model.replace(name="")
    split = vilam3_jax.load(tmp_path / "vila", mesh=2, dtype="float32", **LOADED)
    assert_same_parameters(split, expected)
    if leaf_bytes == exports.LEAF_BYTES:
        whole = vilam3_jax.load(tmp_path / "vila", dtype="float32", **LOADED)
        assert_same_answers(split, whole, world.film)
    halved = vilam3_jax.load(tmp_path / "vila", dtype="bfloat16", **LOADED)
    assert {value.dtype.name for value in parameters(halved).values()} == {"bfloat16"}
    assert sorted((tmp_path / "vila").rglob("*")) == before, "loading writes nothing"


def test_parts_of_a_model_are_not_asked(tmp_path, export):
    export_folder(export, tmp_path / "vila")
    with pytest.raises(UserError, match=r"llm: holds only a llm, a part of a model.*give a whole model"):
        vilam3_jax.load(tmp_path / "vila" / "llm")
    import_model(tmp_path / "vila" / "vision_tower", tmp_path / "tower")
    with pytest.raises(UserError, match=r"tower: holds only a vision_tower"):
        vilam3_jax.load(tmp_path / "tower")


@pytest.mark.parametrize(
    ("name", "problem"), [("nowhere", "no such folder"), ("empty", "holds no model"), ("file", "is a file")]
)
def test_what_is_accepted_is_said(tmp_path, name, problem):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"weights")
    accepted = r"training run, .*RUN/checkpoints/STEP.*, an export, or a Hugging Face folder"
    with pytest.raises(UserError, match=rf"{name}: {problem}; give a {accepted}") as error:
        vilam3_jax.load(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_run_without_a_checkpoint_is_named(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoint"):
        vilam3_jax.load(tmp_path / "run")


def test_every_way_to_name_a_mesh():
    two = jax.devices()[2:4]
    own = mesh_lib.decoding_mesh(Mesh(np.array(two), ("tensor",)))
    assert own is not None and own.axis_names == mesh_lib.MESH_AXES and list(own.devices.flat) == two
    assert (
        mesh_lib.decoding_mesh(None)
        is mesh_lib.decoding_mesh(1)
        is mesh_lib.decoding_mesh("tensor=1")
        is None
    )
    assert mesh_lib.decoding_mesh(4) == mesh_lib.decoding_mesh("tensor=4")
    every = mesh_lib.decoding_mesh("tensor=-1")
    assert every is not None and every.shape["tensor"] == len(jax.devices())


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (3000, "mesh tensor=3000: must be 1 to 8, the number of devices"),
        (0, "mesh tensor=0"),
        ("tensor=0", "mesh tensor=0"),
        ("tensor", "must be like tensor=4"),
        ("fsdp=2", "must be like tensor=4"),
        ("tensor=2,data=2", "must be like tensor=4"),
        (Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor")), "mesh data=2: .*tensor alone"),
    ],
)
def test_impossible_meshes_are_refused(mesh, message):
    with pytest.raises(UserError, match=message):
        mesh_lib.decoding_mesh(mesh)


def test_a_mesh_that_does_not_fit_the_model_is_refused(export):
    with pytest.raises(UserError, match="cannot be split into 7 over tensor"):
        vilam3_jax.load(export, mesh=7)
