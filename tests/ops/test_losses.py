"""Losses against their dense formulas."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vilam3_jax.ops import losses
from vilam3_jax.ops.losses import chunked_cross_entropy, sigmoid_contrastive_loss
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES
from vilam3_jax.sharding.mesh import MESH_AXES
from vilam3_jax.sharding.weights import Weight

VOCAB, WIDTH = 23, 6


def dense_cross_entropy(hidden, kernel, tokens, weights, segments):
    """All logits at once; differentiable."""
    log_p = jax.nn.log_softmax(hidden[:, :-1].astype(jnp.float32) @ kernel)
    picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    counted = jnp.where((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0), weights[:, 1:], 0.0)
    right = log_p.argmax(-1) == tokens[:, 1:]
    return -(picked * counted).sum(), counted.sum(), (right * counted).sum()


def batch(seed, rows, length):
    rng = np.random.default_rng(seed)
    segments = np.sort(rng.integers(0, 4, (rows, length)), axis=1)[:, ::-1]  # padding at the end
    return dict(
        hidden=jnp.asarray(rng.normal(size=(rows, length, WIDTH)), jnp.float32),
        head_kernel=jnp.asarray(rng.normal(size=(WIDTH, VOCAB)), jnp.float32),
        tokens=jnp.asarray(rng.integers(0, VOCAB, (rows, length))),
        loss_weights=jnp.asarray(rng.integers(0, 3, (rows, length)) * 0.5, jnp.float32),
        segment_ids=jnp.asarray(segments.copy()),
    )


@pytest.mark.parametrize("rows, length, chunk", [(1, 1, 3), (2, 9, 4), (3, 8, 8), (2, 7, 1)])
def test_values_and_gradients_match_dense(rows, length, chunk):
    data = batch(10 * rows + length, rows, length)

    def ours(hidden, head_kernel):
        out = chunked_cross_entropy(**{**data, "hidden": hidden, "head_kernel": head_kernel}, chunk=chunk)
        return 3.0 * out[0], out

    def theirs(hidden, head_kernel):
        rest = (data[k] for k in ("tokens", "loss_weights", "segment_ids"))
        out = dense_cross_entropy(hidden, head_kernel, *rest)
        return 3.0 * out[0], out

    args = (data["hidden"], data["head_kernel"])
    got_grads, got = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(*args)
    want_grads, want = jax.jit(jax.grad(theirs, (0, 1), has_aux=True))(*args)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    # Without a gradient, the value takes another path.
    np.testing.assert_allclose(chunked_cross_entropy(**data, chunk=chunk), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("piece_bytes, pieces", [(losses._PIECE_BYTES, 1), (8 * WIDTH * 4, 3), (1, VOCAB)])
def test_a_head_over_devices_gets_its_gradient_in_pieces(monkeypatch, piece_bytes, pieces):
    monkeypatch.setattr(losses, "_PIECE_BYTES", piece_bytes)
    axes = dict(data=4, fsdp=2)
    mesh = compat.make_mesh([axes.get(name, 1) for name in MESH_AXES], MESH_AXES, jax.devices()[:8])
    data = batch(4, 8, 8)
    rest = [data[key] for key in ("tokens", "loss_weights", "segment_ids")]

    def ours(hidden, kernel):
        given = {**data, "hidden": hidden, "head_kernel": Weight(kernel, (("fsdp", None),))}
        return chunked_cross_entropy(**given, chunk=4)[0]

    arguments = data["hidden"], data["head_kernel"]
    with logical_axes.activation_rules(mesh, ACTIVATION_RULES):
        compiled = jax.jit(jax.grad(ours, (0, 1))).lower(*arguments).compile()
    want = jax.grad(lambda *args: dense_cross_entropy(*args, *rest)[0], (0, 1))(*arguments)
    for one, other in zip(compiled(*arguments), want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)
    assert compiled.as_text().count(" reduce-scatter(") == pieces


def test_all_logits_never_exist():
    data = batch(0, 2, 64)
    data["head_kernel"] = jnp.zeros((WIDTH, 1000))

    def loss(hidden, kernel):
        return chunked_cross_entropy(**{**data, "hidden": hidden, "head_kernel": kernel}, chunk=8)[0]

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(data["hidden"], data["head_kernel"]).compile()
    text = compiled.as_text()
    assert "f32[2,8,1000]" in text or "f32[16,1000]" in text
    assert "[2,64,1000]" not in text and "[128,1000]" not in text


@pytest.mark.parametrize("wanted, products", [((0, 1), 3), ((0,), 2), ((1,), 2)])
def test_a_gradient_nobody_asks_for_is_not_computed(wanted, products):
    data = batch(0, 2, 16)

    def loss(hidden, kernel):
        return chunked_cross_entropy(**{**data, "hidden": hidden, "head_kernel": kernel}, chunk=8)[0]

    program = jax.make_jaxpr(jax.grad(loss, wanted))(data["hidden"], data["head_kernel"])
    assert str(program).count("dot_general[") == products


def test_the_count_of_right_answers_has_no_slope():
    data = batch(0, 2, 16)
    gradient = jax.grad(lambda h: chunked_cross_entropy(**{**data, "hidden": h}, chunk=8)[2])(data["hidden"])
    assert not np.any(gradient)


def test_no_supervised_token_gives_zero_and_zero_gradients():
    data = batch(1, 2, 8)
    data["loss_weights"] = jnp.zeros_like(data["loss_weights"])
    value, gradient = jax.value_and_grad(
        lambda h: chunked_cross_entropy(**{**data, "hidden": h}, chunk=4)[0]
    )(data["hidden"])
    assert value == 0 and not np.any(gradient)


def test_first_token_of_a_segment_is_no_target():
    data = batch(2, 1, 6)
    data["segment_ids"] = jnp.array([[1, 1, 1, 2, 2, 0]])
    data["loss_weights"] = jnp.array([[1.0, 0, 0, 1.0, 0, 1.0]])
    assert chunked_cross_entropy(**data, chunk=6)[1] == 0


def test_bfloat16_states_give_float32_sums_and_bfloat16_gradients():
    data = batch(3, 2, 8)
    want = dense_cross_entropy(
        *(data[k] for k in ("hidden", "head_kernel", "tokens", "loss_weights", "segment_ids"))
    )
    value, gradient = jax.value_and_grad(
        lambda h: chunked_cross_entropy(**{**data, "hidden": h}, chunk=4)[0]
    )(data["hidden"].astype(jnp.bfloat16))
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, want[0], rtol=2e-2)


def test_chunk_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        chunked_cross_entropy(**batch(0, 1, 4), chunk=0)


def pairs(seed, rows, width=7, classes=None):
    """Unit embeddings, of which some rows are invalid; labels of three columns from a few classes."""
    rng = np.random.default_rng(seed)
    img, txt = (rng.normal(size=(rows, width)).astype(np.float32) for _ in range(2))
    img, txt = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (img, txt))
    labels = rng.integers(0, classes or rows // 3, (rows, 1)).repeat(3, axis=1)
    labels[:, 1] += rng.integers(0, 2, rows)  # rows may differ in this column alone
    return img, txt, np.float32(0.7), np.float32(-1.5), rng.random(rows) < 0.8, labels


def dense_contrastive(img, txt, log_scale, bias, valid, labels):
    """Loss, weight, number of correct images and gradients from the full matrix, in float64."""
    img, txt, valid = img.astype(np.float64)[valid], txt.astype(np.float64)[valid], np.flatnonzero(valid)
    products, scale = img @ txt.T, np.exp(np.float64(log_scale))
    same = (labels[valid][:, None] == labels[valid][None]).all(-1)
    signed = np.where(same, 1, -1) * (products * scale + bias)
    slope = -np.where(same, 1, -1) / (1 + np.exp(signed))
    d_img, d_txt = np.zeros((2, len(labels), img.shape[1]))
    d_img[valid], d_txt[valid] = slope @ txt * scale, slope.T @ img * scale
    gradients = d_img, d_txt, (slope * products).sum() * scale, slope.sum()
    right = same[np.arange(len(valid)), products.argmax(1)].sum()
    return np.log1p(np.exp(-signed)).sum(), len(valid), right, gradients


def ours(*arguments, axes=None):
    """Like `dense_contrastive`, plus the compiled program; with `axes`, on a mesh of 8 devices."""
    context = contextlib.nullcontext()
    if axes:
        context = logical_axes.activation_rules(
            compat.make_mesh([axes.get(a, 1) for a in MESH_AXES], MESH_AXES), ACTIVATION_RULES
        )

    def loss(*floats):
        out = sigmoid_contrastive_loss(*floats, *arguments[4:])
        return 3.0 * out[0], out

    with context:
        both = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True)).lower(*arguments[:4]).compile()
        values = jax.jit(sigmoid_contrastive_loss)(*arguments)  # without a gradient
    gradients, out = both(*arguments[:4])
    np.testing.assert_allclose(values, out, rtol=1e-6)
    return *out, [g / 3 for g in gradients], both


@pytest.mark.parametrize("axes", [None, dict(fsdp=8), dict(data=2, fsdp=2, tensor=2), dict(tensor=8)])
def test_contrastive_equals_the_full_matrix(axes):
    arguments = pairs(1, 24)
    loss, weight, right, gradients, compiled = ours(*arguments, axes=axes)
    want_loss, want_weight, want_right, want_gradients = dense_contrastive(*arguments)
    assert 0 < want_right < want_weight < 24
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    assert (float(weight), float(right)) == (want_weight, want_right)
    for got, want in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-6, atol=5e-6)
    text = compiled.as_text()
    ways = 1 if axes is None else axes.get("data", 1) * axes.get("fsdp", 1)
    assert f"f32[{24 // ways},{24 // ways}]" in text
    if ways > 1:
        assert "f32[24,24]" not in text and f"f32[{24 // ways},24]" not in text
        assert "collective-permute" in text and "all-gather" not in text


def test_contrastive_without_labels_pairs_row_with_row():
    img, txt, scale, bias, valid, _ = pairs(2, 16)
    want = dense_contrastive(img, txt, scale, bias, valid, np.arange(16)[:, None])
    for axes in (None, dict(fsdp=8)):
        got = ours(img, txt, scale, bias, valid, None, axes=axes)
        np.testing.assert_allclose(got[:3], want[:3], rtol=1e-6)


def test_contrastive_of_equal_scores_counts_the_first_text():
    """Texts 1 and 5 have equal embeddings and different labels; image 5 is nearest to both."""
    img, txt, *scalars, _, _ = pairs(3, 8)
    txt[5] = txt[1]
    img[5] = txt[1]
    for axes in (None, dict(fsdp=8)):
        right = ours(img, txt, *scalars, np.ones(8, bool), np.arange(8)[:, None], axes=axes)[2]
        assert right == (np.argmax(img @ txt.T, axis=1) == np.arange(8)).sum()


@pytest.mark.parametrize("axes", [None, dict(fsdp=4, tensor=2)])
def test_contrastive_without_valid_rows_is_zero(axes):
    img, txt, scale, bias, _, labels = pairs(4, 8)
    loss, weight, right, gradients, _ = ours(img, txt, scale, bias, np.zeros(8, bool), labels, axes=axes)
    assert loss == weight == right == 0 and not any(np.any(g) for g in gradients)
