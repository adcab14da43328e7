"""Continuous batching: answers are bitwise those of a dialogue alone, whatever shares its batch."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import jax
import numpy as np
import pytest

from vilam3_jax.errors import UserError
from vilam3_jax.inference.batching import Batcher, Turn, Wait
from vilam3_jax.inference.generate import Chunk, Generator
from vilam3_jax.inference.loading import load_generator
from vilam3_jax.inference.sampling import GREEDY, Sampling
from vilam3_jax.models import param_paths


@pytest.fixture(scope="module")
def generator(model_config, params, tokenizer):
    return Generator(model_config, params, tokenizer, max_length=700, batch_size=4)


def text(length, seed, tokenizer):
    return Chunk.text(np.random.default_rng(seed).integers(10, tokenizer.vocab_size, length).tolist())


def picture(seed, generator):
    side, count = generator.image_size, generator.tokens_per_image
    image = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Chunk(np.zeros(count, np.int32), np.arange(count, dtype=np.int32), (image,))


def dialogue(*turns, stops=(), sampling=GREEDY, prefix=0):
    """A script of (chunk, tokens) turns that returns all answers."""
    answers = []
    for chunk, count in turns:
        answers.append((yield Turn(chunk, count, tuple(stops), sampling=sampling, prefix=prefix)))
        prefix = 0
    return answers


def bits(answers):
    return [(answer.ids, np.asarray(answer.log_probs, np.float32).tobytes()) for answer in answers]


def mixed(generator, tokenizer):
    """Makers of scripts of all kinds: short and long ones, images, several turns, sampled ones."""
    image = picture(1, generator)
    shared = text(20, 9, tokenizer).join(image)

    def asks(seed):
        return shared.split(20)[0].join(image), text(5 + seed, 30 + seed, tokenizer)

    def with_image(seed):
        _, question = asks(seed)
        whole = Chunk(
            np.concatenate([shared.tokens, question.tokens]),
            np.concatenate([shared.visual_index, question.visual_index]),
            image.images,
        )
        return dialogue((whole, 12), prefix=len(shared.tokens))

    return [
        lambda: dialogue((text(5, 0, tokenizer), 40)),
        lambda: dialogue((text(300, 1, tokenizer), 9), (text(3, 2, tokenizer), 20)),
        lambda: with_image(0),
        lambda: dialogue(
            (text(50, 3, tokenizer), 3), (text(230, 4, tokenizer), 6), (text(9, 5, tokenizer), 50)
        ),
        lambda: with_image(1),
        lambda: dialogue((text(17, 6, tokenizer), 33), sampling=Sampling(temperature=1.5, top_p=0.9, seed=3)),
        lambda: dialogue((text(200, 7, tokenizer), 70)),
        lambda: with_image(2),
        lambda: dialogue((text(20, 8, tokenizer), 5), sampling=Sampling(repetition_penalty=2.0)),
    ]


@pytest.mark.parametrize("numbers", [{}, dict(dtype="int8", cache_dtype="int8")], ids=["float", "int8"])
def test_an_answer_has_the_same_bits_in_any_company(generator, export, tokenizer, numbers):
    if numbers:
        generator = load_generator(export, batch_size=4, max_length=700, **numbers)[0]
    makers = mixed(generator, tokenizer)
    alone = [bits(next(Batcher(generator).run([make()]))) for make in makers]
    assert len({str(one) for one in alone}) == len(alone)
    rng = np.random.default_rng(0)
    for _ in range(3):
        order = rng.permutation(len(makers))
        generator._prefixes.clear()
        found = list(Batcher(generator).run(makers[n]() for n in order))
        for n, answers in zip(order, found, strict=True):
            assert bits(answers) == alone[n]


def test_answers_are_those_of_a_session(generator, tokenizer):
    first, second = text(40, 0, tokenizer), text(7, 1, tokenizer)
    session = generator.start(1)
    session.append([first])
    (one,) = session.decode(6, [])
    session.append([second])
    (two,) = session.decode(45, [])
    (found,) = Batcher(generator).run([dialogue((first, 6), (second, 45))])
    assert [answer.ids for answer in found] == [one.ids, two.ids]
    stop = two.ids[20]
    (found,) = Batcher(generator).run([dialogue((first, 6), (second, 45), stops=[stop, 5, 6])])
    assert found[1].stopped and found[1].ids == two.ids[: two.ids.index(stop)]


def test_a_text_ends_at_a_stop_text_or_where_the_cache_does(generator, tokenizer):
    chunk = text(40, 0, tokenizer)
    (whole,) = next(Batcher(generator).run([dialogue((chunk, 60))]))
    said = tokenizer.decode(whole.ids)
    stop = said[len(said) // 2 : len(said) // 2 + 6]

    def script():
        first = yield Turn(chunk, 60, (), stop_texts=(stop, "never said"))
        second = yield Turn(text(2, 1, tokenizer), 3, ())
        return first, second

    ((first, second),) = Batcher(generator).run([script()])
    assert first.stopped and stop in tokenizer.decode(first.ids)
    assert stop not in tokenizer.decode(first.ids[:-1]) and whole.ids[: len(first.ids)] == first.ids
    session = generator.start(1)
    session.append([chunk.join(Chunk.text(first.ids)).join(text(2, 1, tokenizer))])
    assert session.decode(3, [])[0].ids == second.ids, "nothing after the stop text is cached"
    (last,) = next(Batcher(generator).run([dialogue((text(690, 2, tokenizer), 60))]))
    assert len(last.ids) == 10 and not last.stopped


def test_forgotten_positions_leave_no_trace(generator, tokenizer):
    chunk, following = text(30, 0, tokenizer), text(4, 1, tokenizer)

    def script():
        answer = yield Turn(chunk, 10, ())
        kept = Chunk.text(answer.ids[:3]).join(following)
        return answer, (yield Turn(kept, 8, (), forget=len(answer.ids)))

    ((answer, second),) = Batcher(generator).run([script()])
    session = generator.start(1)
    session.append([chunk.join(Chunk.text(answer.ids[:3])).join(following)])
    assert session.decode(8, [])[0].ids == second.ids


class Even:
    """Allows even ids, then odd ones, in turn."""

    def __init__(self, vocab_size):
        self.vocab_size, self.odd = vocab_size, 0

    def allowed(self):
        return np.arange(self.vocab_size) % 2 == self.odd

    def advance(self, token):
        assert token % 2 == self.odd
        self.odd = 1 - self.odd


def test_a_constraint_holds_beside_free_dialogues(generator, tokenizer):
    chunk = text(30, 0, tokenizer)
    (free,) = next(Batcher(generator).run([dialogue((chunk, 8))]))

    def script():
        return (yield Turn(chunk, 8, (), constraint=Even(generator.vocab_size)))

    bound, (beside,) = Batcher(generator).run([script(), dialogue((chunk, 8))])
    assert [token % 2 for token in bound.ids] == [0, 1] * 4
    assert bits([beside]) == bits([free])


def test_calls_run_while_others_are_decoded(generator, tokenizer):
    decoded = threading.Event()

    def calling():
        yield Turn(text(5, 0, tokenizer), 2, ())
        found = yield Wait(lambda: decoded.wait(60))  # ends only if the other dialogue goes on
        answer = yield Turn(text(5, 1, tokenizer), 2, ())
        return found, answer

    def talking():
        for seed in range(4):
            yield Turn(text(5, seed, tokenizer), 40, ())
        decoded.set()

    with ThreadPoolExecutor(1) as pool:
        (found, answer), _ = Batcher(generator, pool).run([calling(), talking()])
    assert found and len(answer.ids) == 2
    batcher = Batcher(generator)
    assert next(batcher.run([_catching()])) == "division by zero"


def _catching():
    try:
        yield Wait(lambda: 1 / 0)
    except ZeroDivisionError as error:
        return str(error)


def test_one_dialogue_that_fails_or_leaves_harms_no_other(generator, tokenizer):
    batcher = Batcher(generator)
    chunk = text(30, 0, tokenizer)
    futures = [batcher.add(dialogue((chunk, 40))) for _ in range(6)]
    long = batcher.add(dialogue((text(701, 0, tokenizer), 3)))
    told = []

    def leaving():
        yield Turn(chunk, 500, (), on_tokens=told.append)

    left = batcher.add(leaving())
    while batcher.step():
        if len(told) == 3:
            batcher.cancel(left)
    assert len(told) == 3 and batcher.unfinished == 0
    with pytest.raises(CancelledError):
        left.result()
    with pytest.raises(UserError, match=r"needs 701 positions, more than max_length 700"):
        long.result()
    assert len({str(bits(future.result())) for future in futures}) == 1


@pytest.mark.parametrize(
    ("layer", "where"),
    [
        (0, "the output of layer 0 of the LLM at position 0"),
        (-1, "check the last layer and the head"),
    ],
)
def test_a_model_that_is_not_finite_says_where(model_config, params, tokenizer, layer, where):
    flat = param_paths.flatten(params)
    path = "llm/layers/mlp/down/kernel"
    broken = {**flat, path: flat[path].at[layer].set(np.nan)}
    own = Generator(model_config, param_paths.unflatten(broken), tokenizer, max_length=300, batch_size=2)
    session = own.start(1)
    session.append([text(9, 0, tokenizer)])
    (decoded,) = session.decode(5, [])
    assert decoded.ids == [] and "logits are not finite" in decoded.error and where in decoded.error


def test_scores_are_those_of_the_whole_text(generator, tokenizer):
    prompt = text(25, 0, tokenizer)
    choices = [text(n, n, tokenizer).tokens.tolist() for n in (1, 7, 3)]
    session = generator.start(3)
    session.append([prompt] * 3)
    before = session.lengths.copy()
    scores = session.score(choices)
    assert [len(score) for score in scores] == [1, 7, 3]
    np.testing.assert_array_equal(session.lengths, before)
    for choice, score in zip(choices, scores, strict=True):
        alone = generator.start(1)
        alone.append([prompt])
        for token, expected in zip(choice, score, strict=True):
            allowed = np.zeros((1, generator.vocab_size), bool)
            allowed[0, token] = True
            logits = np.asarray(alone._state.logits[0], np.float64)[: generator.vocab_size]
            found = logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            np.testing.assert_allclose(expected, found, atol=1e-4)
            (decoded,) = alone.decode(1, [], allowed=allowed)
            assert decoded.ids == [token]
    (kept,) = {tuple(one.ids) for one in session.decode(4, [])}
    fresh = generator.start(1)
    fresh.append([prompt])
    assert fresh.decode(4, [])[0].ids == list(kept)


@pytest.mark.parametrize("numbers", [{}, dict(dtype="int8", cache_dtype="int8")], ids=["float", "int8"])
def test_sharded_equals_one_device(export, tokenizer, numbers):
    """Weights and caches are split over heads and hidden units; nothing large is gathered for a token."""
    one = load_generator(export, batch_size=2, max_length=300, **numbers)[0]
    many = load_generator(export, batch_size=2, max_length=300, mesh=2, **numbers)[0]
    scripts = [
        lambda: dialogue((text(30, 0, tokenizer), 20), (text(5, 1, tokenizer), 9)),
        lambda: dialogue((text(9, 2, tokenizer).join(picture(0, one)).join(text(3, 3, tokenizer)), 12)),
        lambda: dialogue((text(60, 4, tokenizer), 30)),
    ]
    for alone, split in zip(*(Batcher(g).run(make() for make in scripts) for g in (one, many)), strict=True):
        for expected, found in zip(alone, split, strict=True):
            assert found.ids == expected.ids
            np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)
    session = many.start(2, size=256)
    for cached in session._state.cache.values():
        assert cached.sharding.shard_shape(cached.shape)[2] == cached.shape[2] // 2
    logits = session._state.logits
    assert logits.sharding.shard_shape(logits.shape)[1] == logits.shape[1] // 2


def test_weights_in_bfloat16(export, tokenizer):
    generator = load_generator(export, batch_size=2, max_length=300, dtype="bfloat16")[0]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(generator._params)} == {"bfloat16"}
    (answers,) = Batcher(generator).run([dialogue((text(30, 0, tokenizer), 5))])
    assert len(answers[0].ids) == 5
    with pytest.raises(UserError, match="dtype 'int3': must be"):
        load_generator(export, dtype="int3")
