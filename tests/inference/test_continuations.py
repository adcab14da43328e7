"""Raw continuations: what the whole model says token by token, until it is stopped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vilam3_jax
from vilam3_jax import tasks  # noqa: F401  makes batches pytrees
from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.data.examples import Turn
from vilam3_jax.data.images import load_pixels, resize
from vilam3_jax.data.templates import encode_document
from vilam3_jax.errors import UserError
from vilam3_jax.inference import continuations
from vilam3_jax.inference.stop_texts import certain, until_stop
from vilam3_jax.models import build

TEXT = "The results are liver, spleen"


@pytest.fixture(scope="module")
def model(export):
    with vilam3_jax.load(export, expert_host="off", max_length=512) as model:
        yield model


@pytest.fixture(scope="module")
def read(model_config, params, tokenizer):
    """Log-probabilities [V] of the token after a text, computed without cache."""
    whole = build.merge(build.abstract_model(model_config, "generative")[0], params)

    @jax.jit
    def after(tokens, length):
        positions = jnp.arange(tokens.shape[1])[None]
        segments = (positions < length).astype(jnp.int32)
        nothing = jnp.zeros(tokens.shape, jnp.float32)
        hidden = whole(PackedBatch(tokens, segments, positions, nothing, None, None, None))
        return jax.nn.log_softmax(whole.llm.logits(hidden[:, length - 1])[0, : tokenizer.vocab_size])

    return lambda tokens: np.asarray(
        after(np.pad(np.asarray([tokens]), ((0, 0), (0, 100 - len(tokens)))), len(tokens))
    )


def test_a_continuation_is_what_the_whole_model_says(model, read, tokenizer):
    found = model.generate(TEXT, max_new_tokens=20)
    tokens = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    assert len(found.ids) == len(found.log_probs) == 20 and not found.stopped
    for token, log_prob in zip(found.ids, found.log_probs, strict=True):
        expected = read(tokens)
        assert token == expected.argmax()
        assert log_prob == pytest.approx(expected[token], abs=1e-4)
        tokens.append(token)
    assert str(found) == found.text == tokenizer.decode(found.ids)
    assert model.generate(tokens[:-20], max_new_tokens=20) == found, "token ids are used unchanged"


def test_stop_tokens(model):
    free = model.generate(TEXT, max_new_tokens=20)
    place = next(place for place, token in enumerate(free.ids) if place > 3 and token not in free.ids[:place])
    ended = model.generate(TEXT, max_new_tokens=20, stop_ids=[free.ids[place]])
    assert ended.ids == free.ids[:place] and ended.stopped


def test_stop_texts_are_not_part_of_the_text(model):
    free = model.generate(TEXT, max_new_tokens=30)
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 3]
    expected = free.text[: free.text.find(stop)]
    ended = model.generate(TEXT, max_new_tokens=30, stop=[stop, "no such text"])
    assert ended.text == expected and ended.stopped and len(ended.ids) < 30
    pieces = list(model.stream(TEXT, max_new_tokens=30, stop=stop))
    assert "".join(pieces) == expected and len(pieces) > 1
    assert "".join(model.stream(TEXT, max_new_tokens=30)) == free.text


@pytest.mark.parametrize(
    ("text", "stops", "before", "sure"),
    [
        ("liver and", ["END"], "liver and", "liver and"),
        ("liver E", ["END"], "liver E", "liver "),
        ("liver EN", ["END", "ver EN!"], "liver EN", "li"),
        ("liver END spleen", ["END"], "liver ", "liver "),
        ("aab", ["ab", "aab"], "", ""),
        ("", ["END"], "", ""),
    ],
)
def test_what_a_stop_text_leaves(text, stops, before, sure):
    assert until_stop(text, stops) == before
    assert certain(text, stops) == sure


def test_samples_have_seeds_that_count_up(model):
    options = dict(max_new_tokens=10, temperature=1.5, top_p=0.95)
    found = model.samples(TEXT, 3, seed=5, **options)
    assert [one.text for one in found] == [model.generate(TEXT, seed=5 + i, **options).text for i in range(3)]
    assert len({one.ids for one in found}) == 3
    with pytest.raises(UserError, match="3 samples at temperature 0 would be equal"):
        model.samples(TEXT, 3)


def test_other_questions_go_on_beside_a_stream(model, world):
    """The only row of the batch is taken by a stream that nobody reads at the moment."""
    alone = "".join(model.stream(TEXT, max_new_tokens=20))
    stream = model.stream(TEXT, max_new_tokens=20)
    first = next(stream)
    asked = model.ask(world.film, "Is there pneumonia?", experts=False, max_new_tokens=4).answer
    assert first + "".join(stream) == alone
    assert asked == model.ask(world.film, "Is there pneumonia?", experts=False, max_new_tokens=4).answer
    dropped = model.stream(TEXT, max_new_tokens=200)
    next(dropped)
    dropped.close()
    assert model._batcher.unfinished == 0


def test_images_are_where_their_markers_are(model, world, tokenizer):
    film, seen = load_pixels(world.film), []
    for prompt in ("<image>\nThe liver", "The liver\n<image> is", "The liver"):
        scans = model._scans(world.film, "", {}, question=False)
        seen.append(continuations.beginning(model.generator, prompt, scans, model._template.rules))
        np.testing.assert_array_equal(seen[-1].images, [resize(film, 32)])
    count = model.generator.tokens_per_image
    for chunk, prompt in zip(
        seen, ("<image>\nThe liver", "The liver\n<image> is", "<image>The liver"), strict=True
    ):
        # Training's encoding of the same document, of which only the end is missing.
        document = encode_document(tokenizer, [Turn("user", prompt, True)], count)
        assert chunk.tokens.tolist() == document.tokens[:-1].tolist()
        assert ((chunk.visual_index >= 0) == (document.image_of_token[:-1] >= 0)).all()
    texts = {model.generate("The liver", one, max_new_tokens=8).text for one in (None, film, 255 - film)}
    assert len(texts) == 3, "the image is read"


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("<image> liver", {}, "the prompt has 1 <image>, but there are 0 images"),
        ([5, 100_000], {}, "token 100000: the model has ids 0 to "),
        ([], {}, "the prompt is empty"),
        (TEXT, {"stop": [""]}, "stop: an empty text"),
        (TEXT, {"stop_ids": list(range(9))}, "9 tokens; give at most 8"),
        (TEXT, {"max_new_tokens": 0}, "max_new_tokens 0: must be at least 1"),
        (TEXT, {"temperature": -1}, "temperature -1"),
        (TEXT, {"experts": True}, "generate takes no option experts"),
        ("liver " * 600, {}, "512"),
    ],
)
def test_impossible_continuations_are_refused(model, prompt, options, message):
    for call in (model.generate, lambda *args, **more: list(model.stream(*args, **more))):
        with pytest.raises(UserError, match=message):
            call(prompt, **options)
    assert model._batcher.unfinished == 0


def test_token_ids_hold_no_image(model, world):
    with pytest.raises(UserError, match="token ids, which cannot hold an image"):
        model.generate([5, 6], world.film)
