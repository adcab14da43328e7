"""Prompts are read in parts: the same numbers, and others are answered in between."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.inference.test_batching import bits, dialogue, picture, text
from vilam3_jax import tasks  # noqa: F401  makes batches pytrees
from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.inference.batching import Batcher, Turn
from vilam3_jax.inference.generate import PART, Chunk, Generator, part_widths
from vilam3_jax.models import build


@pytest.fixture(scope="module")
def generator(model_config, params, tokenizer):
    return Generator(model_config, params, tokenizer, max_length=1536, batch_size=4)


def test_widths_of_parts():
    for positions in (1, 15, 16, 17, 500, 512, 513, 1100, 3 * 512):
        widths = part_widths(positions)
        assert widths[:-1] == [PART] * (len(widths) - 1) and widths[-1] <= PART
        assert positions <= sum(widths) <= 4 / 3 * positions + 16


def over_the_boundary(generator, tokenizer, length):
    """Text, an image whose tokens lie in two parts, and text."""
    shown = picture(3, generator)
    before = PART - len(shown.tokens) // 2
    rest = length - before - len(shown.tokens)
    return text(before, 0, tokenizer).join(shown).join(text(rest, 1, tokenizer))


def test_parts_equal_the_whole(model_config, params, generator, tokenizer):
    """Against the model without a cache, which reads rows of mixed lengths whole."""
    chunks = [
        over_the_boundary(generator, tokenizer, 1100),
        text(20, 2, tokenizer),
        over_the_boundary(generator, tokenizer, 600),
    ]
    session = generator.start(3)
    session.append(chunks)
    assert session.lengths.tolist() == [1100, 20, 600]
    graphdef, _ = build.abstract_model(model_config, "generative")

    @jax.jit
    def logits(tokens, visual, images, length):
        positions = jnp.arange(tokens.shape[1])[None]
        segments = (positions < length).astype(jnp.int32)
        weights, valid = jnp.zeros(tokens.shape), jnp.ones((1, 1), bool)
        model = build.merge(graphdef, params)
        hidden = model(PackedBatch(tokens, segments, positions, weights, visual, images, valid))
        return model.llm.logits(hidden[:, length - 1])[0, : tokenizer.vocab_size]

    for row, chunk in enumerate(chunks):
        images = np.stack(chunk.images or [np.zeros((generator.image_size,) * 2 + (3,), np.uint8)])[None]
        pad = (0, 1100 - len(chunk.tokens))
        visual = np.pad(chunk.visual_index, pad, constant_values=-1)[None]
        want = logits(np.pad(chunk.tokens, pad)[None], visual, images, len(chunk.tokens))
        got = session._state.logits[row, : tokenizer.vocab_size]
        # The same sums in float32 in another order, logits of a few units.
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)
        assert np.ptp(want) > 2


def test_others_are_answered_between_parts(generator, tokenizer):
    told: list[str] = []

    def talking():
        yield Turn(text(5, 0, tokenizer), 60, (), on_tokens=lambda ids: told.append("tokens"))

    def asking():
        answer = yield Turn(text(1400, 1, tokenizer), 3, (), on_tokens=lambda ids: told.append("long"))
        return answer

    batcher = Batcher(generator)
    short = batcher.add(talking())
    batcher.step()
    before = len(told)
    assert before == 1
    long = batcher.add(asking())
    while batcher.step():
        pass
    assert short.done() and told[before:].index("long") > 0
    (alone,) = next(Batcher(generator).run([dialogue((text(1400, 1, tokenizer), 3))]))
    assert bits([long.result()]) == bits([alone])


def test_a_prefix_is_read_once_by_all_that_wait_for_it(generator, tokenizer, monkeypatch):
    generator.forget_prefixes()
    prefix = text(1200, 5, tokenizer)
    widths = []
    programs = generator._programs
    recording = dataclasses.replace(
        programs, prefill=lambda *args: widths.append(args[4].shape[1]) or programs.prefill(*args)
    )
    monkeypatch.setattr(generator, "_programs", recording)

    def asks(seed):
        return dialogue((prefix.join(text(3 + seed, seed, tokenizer)), 4), prefix=1200)

    together = list(Batcher(generator).run(asks(seed) for seed in range(3)))
    assert sorted(widths) == sorted([*part_widths(1200), 16, 16, 16])
    generator.forget_prefixes()
    for seed, answers in enumerate(together):
        assert bits(next(Batcher(generator).run([asks(seed)]))) == bits(answers)


def test_who_leaves_while_reading_stops_no_other(generator, tokenizer):
    generator.forget_prefixes()
    prefix = text(1200, 6, tokenizer)

    def asks(seed):
        return dialogue((prefix.join(text(3, seed, tokenizer)), 4), prefix=1200)

    batcher = Batcher(generator)
    left, stays = batcher.add(asks(0)), batcher.add(asks(1))
    batcher.step()
    assert batcher.unfinished == 2 and not stays.done()
    batcher.cancel(left)
    while batcher.step():
        pass
    generator.forget_prefixes()
    assert left.cancelled() and bits(stays.result()) == bits(next(Batcher(generator).run([asks(1)])))


def test_a_prefix_that_is_too_long_fails_each_of_its_dialogues(generator, tokenizer):
    whole = text(1600, 7, tokenizer)
    batcher = Batcher(generator)
    futures = [batcher.add(dialogue((whole, 4), prefix=1590)) for _ in range(2)]
    fine = batcher.add(dialogue((text(5, 0, tokenizer), 4)))
    while batcher.step():
        pass
    for future in futures:
        with pytest.raises(Exception, match="more than max_length 1536"):
            future.result()
    assert len(fine.result()[0].ids) == 4
    assert Chunk.text(whole.tokens[:1590]).key not in generator._prefixes
