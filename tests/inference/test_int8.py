"""Weights and caches in int8: how far answers move, and the memory."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.inference.test_batching import picture, text
from vilam3_jax.checkpoints import exports
from vilam3_jax.errors import UserError
from vilam3_jax.inference.generate import Chunk, Generator
from vilam3_jax.inference.loading import load_generator, open_model
from vilam3_jax.inference.sampling import GREEDY, RowSampling
from vilam3_jax.models import build, kv_cache, param_paths
from vilam3_jax.ops.quantized import QuantizedKernel
from vilam3_jax.sharding.weights import Weight

pytest.importorskip("qwix")


@pytest.fixture(scope="module")
def plain(model_config, params, tokenizer):
    return Generator(model_config, params, tokenizer, max_length=300, batch_size=4)


@pytest.fixture(scope="module")
def in_int8(export):
    return load_generator(export, batch_size=4, max_length=300, dtype="int8")[0]


def next_logits(generator, tokenizer):
    """Logits after four prompts, one of them with an image."""
    session = generator.start(4)
    prompts = [text(n, n, tokenizer) for n in (9, 30, 61)]
    session.append([*prompts, text(5, 1, tokenizer).join(picture(0, generator)).join(prompts[0])])
    return np.asarray(session._state.logits)[:, : tokenizer.vocab_size]


TABLE = "llm/embed/embedding"  # the head, too


def summed_axis(path):
    """The axis over which the head or a layer sums: numbers along it share a scale. None for other arrays."""
    return -1 if path == TABLE else -2 if path.startswith("llm/") and path.endswith("/kernel") else None


def test_the_matrices_of_the_llm_are_int8_and_nothing_else(in_int8, params):
    is_weight = lambda leaf: isinstance(leaf, Weight)  # noqa: E731
    leaves, _ = jax.tree.flatten(in_int8._params, is_leaf=is_weight)
    kernels = [leaf.value for leaf in leaves if is_weight(leaf)]
    flat = param_paths.flatten(params)
    axes = {path: axis for path in flat if (axis := summed_axis(path))}
    assert len(kernels) == len(axes) == 8
    assert all(isinstance(kernel, QuantizedKernel) and kernel.qvalue.dtype == np.int8 for kernel in kernels)
    rest = {leaf.dtype.name for leaf in leaves if not is_weight(leaf)}
    assert rest == {"float32"}, "the type of the export's activations"
    numbers = sum(flat[path].size for path in axes)
    scales = sum(flat[path].size // flat[path].shape[axis] for path, axis in axes.items())
    assert sum(x.nbytes for kernel in kernels for x in jax.tree.leaves(kernel)) == numbers + 4 * scales


def test_logits_move_as_far_as_random_errors_of_half_a_step(plain, in_int8, params, tokenizer):
    """Int8 moves each weight by at most half a step, its column's largest magnitude / 127.5.

    Errors of rounding are nearly uniform and independent, so logits move as far as with uniform random errors
    of that size, here the range over several draws, with a margin of a half.
    """
    exact = next_logits(plain, tokenizer)
    flat, rng = param_paths.flatten(params), np.random.default_rng(0)

    def moved(generator):
        return float(np.sqrt(np.square(next_logits(generator, tokenizer) - exact).mean()))

    drawn = []
    try:
        for _ in range(6):
            noisy = dict(flat)
            for path in filter(summed_axis, flat):
                half = np.abs(flat[path]).max(axis=summed_axis(path), keepdims=True) / 255
                noisy[path] = flat[path] + np.float32(rng.uniform(-half, half, flat[path].shape))
            plain.set_params(param_paths.unflatten(noisy))
            drawn.append(moved(plain))
    finally:
        plain.set_params(params)
    assert min(drawn) > 1e-3 * exact.std()
    assert min(drawn) / 1.5 < moved(in_int8) < max(drawn) * 1.5, (moved(in_int8), drawn)


def test_logits_after_a_cache_in_int8_move_as_far_as_with_random_errors(
    model_config, params, plain, tokenizer, monkeypatch
):
    """The same for cached vectors, whose steps are the largest magnitude / 127."""

    def moved(**options):
        generator = Generator(model_config, params, tokenizer, max_length=300, batch_size=4, **options)
        return float(np.sqrt(np.square(next_logits(generator, tokenizer) - exact).mean()))

    exact, write, drawn = next_logits(plain, tokenizer), kv_cache.write, []
    found = moved(cache_dtype="int8")
    for seed in range(4):

        def noisy(cache, layer, slots, *vectors, seed=seed):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), layer))
            errors = (
                jnp.abs(x).max(axis=-1, keepdims=True) / 254 * jax.random.uniform(key, x.shape, minval=-1)
                for key, x in zip(keys, vectors, strict=True)
            )
            return write(cache, layer, slots, *map(jnp.add, vectors, errors))

        monkeypatch.setattr(kv_cache, "write", noisy)
        drawn.append(moved())
    assert min(drawn) > 1e-3 * exact.std()
    assert min(drawn) / 1.5 < found < max(drawn) * 1.5, (found, drawn)


def test_cached_vectors_are_within_half_a_step(model_config, params, plain, tokenizer):
    """Those of the first layer, whose inputs are not rounded."""
    cached = Generator(model_config, params, tokenizer, max_length=300, batch_size=4, cache_dtype="int8")
    sessions = [generator.start(1) for generator in (plain, cached)]
    for session in sessions:
        session.append([text(61, 0, tokenizer)])
    exact, found = (session._state.cache for session in sessions)
    for name in ("k", "v"):
        want = np.asarray(exact[name])[0, 0, :, :61]
        scale = np.asarray(found[f"{name}_scale"])[0, 0, :, :61, None]
        np.testing.assert_allclose(scale[..., 0], np.abs(want).max(axis=-1) / 127, rtol=1e-5)
        got = np.asarray(found[name], np.float32)[0, 0, :, :61] * scale
        assert (np.abs(got - want) <= scale * 0.501).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cache_of_another_type(model_config, params, tokenizer, dtype):
    generator = Generator(model_config, params, tokenizer, max_length=300, batch_size=4, cache_dtype=dtype)
    session = generator.start(2, size=256)
    assert {x.dtype.name for x in session._state.cache.values()} == {dtype}
    session.append([text(9, 0, tokenizer), text(30, 1, tokenizer)])
    assert [len(one.ids) for one in session.decode(5, [])] == [5, 5]


def test_all_of_a_session_with_int8(export, tokenizer):
    """Rows that are copied, inserted, rewound and lengthened say what one that was read at once says."""
    generator = load_generator(export, batch_size=2, max_length=600, dtype="int8", cache_dtype="int8")[0]
    prefix, rest = text(40, 0, tokenizer), text(9, 1, tokenizer)
    whole = generator.start(1)
    whole.append([prefix])
    whole.append([rest])
    (expected,) = whole.decode(12, [])
    pair = generator.start(2, prefix)
    pair.append([rest, text(200, 2, tokenizer)])
    assert pair.decode(12, [], active=[True, False])[0].ids == expected.ids
    pair.rewind(0, 49)
    single = pair.extract(0, 512)
    single.rewind(0, 40)
    single.append([rest])
    target = generator.start(2, size=512)
    target.insert(1, single)
    assert target.decode(12, [], active=[False, True])[1].ids == expected.ids
    scored = generator.start(1, prefix)
    scored.append([rest])
    (scores,) = scored.score([expected.ids])
    np.testing.assert_allclose(scores, expected.log_probs, atol=1e-4)


def test_a_cache_that_is_not_finite_says_where(export, tokenizer):
    generator = load_generator(export, batch_size=1, max_length=300, cache_dtype="int8")[0]
    flat = param_paths.flatten(generator._params)
    path = "llm/layers/mlp/down/kernel"
    generator.set_params(param_paths.unflatten({**flat, path: flat[path].at[0].set(np.nan)}))
    session = generator.start(1)
    session.append([text(9, 0, tokenizer)])
    (decoded,) = session.decode(5, [])
    assert "the output of layer 0 of the LLM at position 0" in decoded.error


def test_no_float_copy_stays_on_the_device(export):
    """Kernels are read one by one: after loading, arrays are those of the model alone."""
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    generator = load_generator(export, dtype="int8")[0]
    gc.collect()
    own = sum(x.nbytes for x in jax.tree.leaves(generator._params))
    assert sum(x.nbytes for x in jax.live_arrays()) - before <= own


@pytest.mark.parametrize("tied", [True, False])
def test_decoding_makes_no_float_copy_of_the_weights(model_config, tokenizer_dir, tmp_path, tied):
    """By XLA's own figures: temporaries of float32, and a layer's kernel and a block of the head in float."""
    config = model_config.copy_and_resolve_references()
    config.llm.update(dict(vocab_size=16384, hidden_size=512, mlp_dim=1024, num_layers=6, head_dim=64))
    config.llm.tie_embeddings = tied
    params = jax.jit(lambda key: build.init_params(config, "generative", key))(jax.random.key(0))
    exports.export_model(
        tmp_path / "export", params, {**config.to_dict(), "kind": "generative"}, tokenizer_dir, {}
    )

    def memory(dtype):
        generator = load_generator(tmp_path / "export", batch_size=2, max_length=256, dtype=dtype)[0]
        session, rows = generator.start(2), np.zeros(2, np.int32)
        session.append([Chunk.text([20, 21])] * 2)
        sampling, stops = RowSampling.of([GREEDY] * 2), np.zeros((2, 8), np.int32)
        until = np.int32(2), np.int32(2)
        arguments = (rows, rows > 0, rows, sampling, None, stops, *until)
        lowered = generator._programs.decode.lower(generator._params, session._state, *arguments, size=32)
        return lowered.compile().memory_analysis()

    plain, in_int8 = memory("float32"), memory("int8")
    weights = param_paths.flatten(params["llm"])
    quantised = [path for path in weights if tied or path != "embed/embedding"]
    saved = sum(weights[path].nbytes for path in quantised) * 3 / 4
    assert plain.argument_size_in_bytes - in_int8.argument_size_in_bytes > 0.97 * saved
    kernel, block = 4 * 512 * 1024, 4 * (1 << 19)
    assert in_int8.temp_size_in_bytes <= plain.temp_size_in_bytes + kernel + block


def test_models_without_llm_and_unknown_types_are_refused(export, towers_export):
    source = open_model(towers_export)
    with pytest.raises(UserError, match="dtype 'int8': a contrastive model has no LLM"):
        exports.read_model(source.config, source.read, dtype="int8")
    with pytest.raises(UserError, match="cache_dtype 'int3': must be"):
        load_generator(export, cache_dtype="int3")
