"""Sampling: each setting against its definition, and against transformers' logits processors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vilam3_jax.errors import UserError
from vilam3_jax.inference.sampling import RowSampling, Sampling, choose

VOCAB = 40


def draw(logits, sampling, count, held=None):
    """`count` tokens that follow the same logits [V], at different positions."""
    held = np.zeros(VOCAB, bool) if held is None else held
    rows = RowSampling.of([sampling] * count)
    tokens, log_probs = jax.jit(choose)(
        jnp.tile(logits, (count, 1)), jnp.tile(held, (count, 1)), jnp.arange(count), rows
    )
    expected = jax.nn.log_softmax(logits)[tokens]
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)
    return np.asarray(tokens)


def theirs(logits, held, sampling):
    """Probabilities [V] of transformers' processors, in their order."""
    ids, scores = torch.tensor(np.flatnonzero(held))[None], torch.tensor(np.asarray(logits))[None]
    if sampling.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores)
    scores = TemperatureLogitsWarper(sampling.temperature)(ids, scores)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
    return scores.softmax(-1)[0].numpy()


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=1.0),
        dict(temperature=0.5),
        dict(temperature=1.5, top_p=0.7),
        dict(temperature=1.0, top_k=5),
        dict(temperature=2.0, top_k=20, top_p=0.8, repetition_penalty=1.7),
    ],
)
def test_frequencies_are_those_of_transformers(settings):
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.normal(size=VOCAB) * 2, jnp.float32)
    held = rng.random(VOCAB) < 0.3
    sampling, count = Sampling(**settings), 20_000
    expected = theirs(logits, held, sampling)
    found = np.bincount(draw(logits, sampling, count, held), minlength=VOCAB) / count
    assert not found[expected == 0].any()
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / count))


def test_rows_have_settings_of_their_own():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, VOCAB)), jnp.float32)
    best = np.asarray(logits.argmax(-1))
    held = np.zeros((4, VOCAB), bool)
    held[1, best[1]] = True
    each = [
        Sampling(),
        Sampling(repetition_penalty=50.0),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-6),
    ]
    tokens, _ = choose(logits, held, jnp.zeros(4, jnp.int32), RowSampling.of(each))
    assert tokens[0] == best[0] and tokens[2] == best[2] and tokens[3] == best[3]
    assert tokens[1] == np.argsort(logits[1])[-2]


def test_a_text_depends_on_its_seed_and_position_alone():
    logits = jnp.zeros(VOCAB)
    first = draw(logits, Sampling(temperature=1.0, seed=5), 8)
    np.testing.assert_array_equal(draw(logits, Sampling(temperature=1.0, seed=5), 12)[:8], first)
    assert (draw(logits, Sampling(temperature=1.0, seed=6), 8) != first).any()
    assert len(set(first.tolist())) > 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_impossible_settings_are_refused(setting, value):
    with pytest.raises(UserError, match=f"{setting} {value}: must be"):
        Sampling(**{setting: value})
