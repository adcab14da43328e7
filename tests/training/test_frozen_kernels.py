"""QLoRA: quantised frozen kernels and trained adapters; resumed, on another mesh, exported."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.helpers import Run, packed_batch, tiny_config
from vilam3_jax import config as config_lib
from vilam3_jax.checkpoints import exports, run_checkpoints
from vilam3_jax.convert import exporter
from vilam3_jax.convert.importer import import_model
from vilam3_jax.data.tokenizer import train_bpe
from vilam3_jax.errors import UserError
from vilam3_jax.models import build as build_lib
from vilam3_jax.models import param_paths
from vilam3_jax.ops.quantized import QuantizedKernel, quantize_kernel
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib
from vilam3_jax.training.train_state import TrainState, shardings

pytest.importorskip("qwix")
KINDS = ("int8", "nf4")
Q = "llm/layers/attn/q/kernel"


def make_config(kind, **axes):
    config = tiny_config(**axes)
    config.model.llm.update(dict(lora_rank=4, lora_targets=("q", "v", "down")))
    config.trainable = ((r"llm/.*lora_[ab]", 1.0), (r".*", 0.0))
    config.quantization.frozen = kind
    return config


def build(config):
    config = config_lib.resolve(config)
    axes = config.mesh
    devices = jax.devices()[: axes.data * axes.fsdp * axes.tensor]
    return program_lib.build(config, mesh_lib.build_mesh(axes, devices))


def device_bytes(tree):
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def dequantized(params):
    quantized = {path: leaf for path, leaf in params.items() if isinstance(leaf, QuantizedKernel)}
    return {**params, **{path: leaf.dequantize() for path, leaf in quantized.items()}}


def described(config):
    return {**config.model.to_dict(), "kind": "generative"}


def hidden_states(config, params):
    """Hidden states of all positions, computed by the training model."""
    graphdef, _ = build_lib.abstract_model(config.model, "generative")
    run = jax.jit(lambda params, batch: build_lib.merge(graphdef, params)(batch))
    return run(param_paths.unflatten(dict(params)), packed_batch(0))


@pytest.mark.parametrize("kind, share", [("int8", 1.05 / 4), ("nf4", 0.6 / 4)])
def test_memory_of_frozen_kernels_drops(kind, share):
    """Per device, from the shapes that `vilam3 plan` counts."""
    kernels = {}
    for name in ("", kind):
        config = make_config(name, fsdp=2, tensor=2)
        config.model.llm.update(dict(hidden_size=256, mlp_dim=512, head_dim=64))
        frozen = build(config).state.frozen
        kernels[name] = {path: leaf for path, leaf in frozen.items() if path.endswith("kernel")}
    layers = [path for path in kernels[kind] if path.startswith("llm/layers/")]
    assert len(layers) == 7 and all(isinstance(kernels[kind][path], QuantizedKernel) for path in layers)
    for path, leaf in kernels[kind].items():
        if path in layers:
            assert device_bytes(leaf) <= share * device_bytes(kernels[""][path]), path
        else:
            assert leaf == kernels[""][path]


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_are_quantised_as_they_are_read(tmp_path, kind):
    config = make_config(kind, fsdp=2, tensor=2)
    init = jax.jit(lambda key: build_lib.init_params(config.model, "generative", key))
    plain = param_paths.flatten(init(jax.random.key(7)))
    base = {path: leaf for path, leaf in plain.items() if "/lora_" not in path}
    exports.export_model(tmp_path / "base", base, described(config), None, {})
    config.init.everything = str(tmp_path / "base")
    program = build(config)
    state, origin = program.initial_state()
    assert origin["llm"] == config.init.everything
    want = quantize_kernel(plain[Q], kind)
    for got, one in zip(jax.tree.leaves(state.frozen[Q]), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(got, one)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings(program.state)

    # Fresh adapters add nothing, so the model equals that of the dequantised kernels, not the original one.
    params = jax.device_put(state.params(), jax.devices()[0])
    states = hidden_states(config, params)
    np.testing.assert_allclose(states, hidden_states(config, dequantized(params)), rtol=1e-5, atol=1e-5)
    gap = np.abs(states - hidden_states(config, {**params, **base})).max()
    assert gap > 1e-3, gap


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_trained_saved_resumed_and_exported(tmp_path, kind):
    config = make_config(kind, data=2, fsdp=2, tensor=2)
    config.schedule.warmup_fraction = 0.0
    run = Run(config)
    before = jax.tree.map(np.asarray, run.state.frozen)
    start = [run.step(packed_batch(i))["loss"] for i in range(2)]
    saved = run_checkpoints.RunCheckpoints(tmp_path / "run")
    saved.save(2, run.state.to_tree(), {"0": {}}, {})
    rest = [run.step(packed_batch(i % 2))["loss"] for i in range(2, 8)]
    saved.wait()
    assert rest[-1] < start[0]
    # Only adapters are trained and have optimizer state.
    assert all("/lora_" in path for path in run.state.trainable)
    for one, two in zip(jax.tree.leaves(before), jax.tree.leaves(run.state.frozen), strict=True):
        np.testing.assert_array_equal(one, two)
    final = run.state.params()

    # Resumed on the same mesh: bitwise the same losses.
    restored = run_checkpoints.RunCheckpoints(tmp_path / "run").restore(run.program.state.to_tree())
    assert restored is not None
    run.state = TrainState.from_tree(restored.state)
    assert isinstance(run.state.frozen[Q], QuantizedKernel)
    assert [run.step(packed_batch(i % 2))["loss"] for i in range(2, 8)] == rest

    # On another mesh: the same arrays with other shardings.
    other = build(make_config(kind, fsdp=4))
    moved = run_checkpoints.RunCheckpoints(tmp_path / "run").restore(other.state.to_tree())
    restored = run_checkpoints.RunCheckpoints(tmp_path / "run").restore(run.program.state.to_tree())
    assert moved is not None and restored is not None  # the steps donated what was restored before
    for got, want in zip(jax.tree.leaves(moved.state), jax.tree.leaves(restored.state), strict=True):
        np.testing.assert_array_equal(got, want)
    assert jax.tree.map(lambda x: x.sharding, TrainState.from_tree(moved.state)) == shardings(other.state)

    # The export and its merged version compute the same as the training model.
    train_bpe(["liver spleen"], 270, tmp_path / "words", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    exports.export_model(tmp_path / "export", final, described(config), tmp_path / "words", {})
    loaded, _, _ = exports.load_export(tmp_path / "export")
    loaded = param_paths.flatten(loaded)
    assert loaded[Q].dtype == jnp.float32
    params = jax.device_put(final, jax.devices()[0])
    assert np.abs(params["llm/layers/attn/q/lora_b"]).max() > 0
    want = hidden_states(config, params)
    np.testing.assert_allclose(hidden_states(config, loaded), want, rtol=1e-5, atol=1e-5)
    assert exporter.export_folder(tmp_path / "export", tmp_path / "vila").merged == 3
    import_model(tmp_path / "vila", tmp_path / "again")
    merged, model, _ = exports.load_export(tmp_path / "again")
    merged, stored = param_paths.flatten(merged), {**model.to_dict(), "dtype": "float32"}
    del stored["kind"]
    config = config_lib.resolve(config).replace(model=stored)
    assert not any("/lora_" in path for path in merged)
    np.testing.assert_allclose(hidden_states(config, merged), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trainable": ((".*", 1.0),)}, r"quantization\.frozen='nf4' includes llm/layers/attn/k/.*trainable"),
        ({"quantization.modules": "llm/none"}, r"quantization\.modules='llm/none' matches none"),
        ({"quantization.modules": r"vision_tower/blocks/.*"}, "has 48 rows, not a multiple of 64"),
        ({"mesh.tensor": 4, "model.llm.mlp_dim": 384}, r"llm/layers/mlp/down/kernel.*6 tiles.*tensor"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_quantised_is_named(changes, message):
    config = make_config("nf4", fsdp=2)
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        build(config)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(frozen="int4"), r"quantization\.frozen='int4'.*'int8' or 'nf4'"),
        (dict(frozen="nf4", matmul="int8"), r"quantization\.matmul='int8' and frozen='nf4'"),
    ],
)
def test_what_a_config_may_not_say(changes, message):
    config = tiny_config()
    config.quantization.update(changes)
    with pytest.raises(UserError, match=message):
        config_lib.resolve(config)
