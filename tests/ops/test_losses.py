"""Losses against their dense formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vilam3_jax.ops.losses import chunked_cross_entropy, sigmoid_contrastive_loss

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
    segments = np.sort(rng.integers(0, 4, (rows, length)), axis=1)[:, ::-1]  # ends in padding
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
    # Without a gradient another path computes the value.
    np.testing.assert_allclose(chunked_cross_entropy(**data, chunk=chunk), want, rtol=1e-5, atol=1e-5)


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


def test_contrastive_counts_only_valid_pairs():
    rng = np.random.default_rng(0)
    img, txt = (rng.normal(size=(5, 7)).astype(np.float32) for _ in range(2))
    valid = np.array([True, False, True, True, False])
    scale, bias = np.float32(0.7), np.float32(-1.5)
    logits = np.exp(scale) * img[valid] @ txt[valid].T + bias
    want = np.log1p(np.exp(-(2 * np.eye(3) - 1) * logits)).sum() / 3
    assert sigmoid_contrastive_loss(img, txt, scale, bias, valid) == pytest.approx(want, rel=1e-5)

    gradient = jax.grad(lambda i: sigmoid_contrastive_loss(i, txt, scale, bias, jnp.asarray(valid)))(
        jnp.asarray(img)
    )
    assert not np.any(gradient[~valid]) and np.all(np.any(gradient[valid] != 0, axis=1))
    assert sigmoid_contrastive_loss(img, txt, scale, bias, np.zeros(5, bool)) == 0


def test_contrastive_positives_may_lie_off_the_diagonal():
    """Rows 0 and 2 have equal texts: each image belongs to both."""
    rng = np.random.default_rng(1)
    img, txt = (rng.normal(size=(3, 4)).astype(np.float32) for _ in range(2))
    together = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], bool)
    logits = np.exp(0.3) * img @ txt.T - 1.0
    want = np.where(together, np.log1p(np.exp(-logits)), np.log1p(np.exp(logits))).sum() / 3
    got = sigmoid_contrastive_loss(img, txt, np.float32(0.3), np.float32(-1.0), positive=together)
    assert got == pytest.approx(want, rel=1e-5)
    assert got != pytest.approx(float(sigmoid_contrastive_loss(img, txt, np.float32(0.3), np.float32(-1.0))))
