"""Generation with a cache equals recomputing everything for every token."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vilam3_jax import tasks  # noqa: F401  makes batches pytrees
from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.data.examples import Turn
from vilam3_jax.data.packing import GroupShape, Sample, assemble_group
from vilam3_jax.data.templates import encode_prompt, get_template
from vilam3_jax.errors import UserError
from vilam3_jax.inference import generate
from vilam3_jax.inference import sampling as sampling_lib
from vilam3_jax.models import build


@pytest.fixture(scope="module")
def generator(model_config, params, tokenizer):
    return generate.Generator(model_config, params, tokenizer, max_length=300, batch_size=4)


@pytest.fixture(scope="module")
def image_chunk(generator):
    """Makes a chunk of text, images, and text."""

    def make(text, pictures=()):
        per_image = generator.tokens_per_image
        half = len(text) // 2
        tokens = [*text[:half], *[0] * (len(pictures) * per_image), *text[half:]]
        visual = np.full(len(tokens), -1, np.int32)
        visual[half : half + len(pictures) * per_image] = np.arange(len(pictures) * per_image)
        return generate.Chunk(np.asarray(tokens, np.int32), visual, tuple(pictures))

    return make


@pytest.fixture(scope="module")
def naive(model_config, params, tokenizer, generator):
    """One row without cache: the model reads the whole dialogue for every token."""
    graphdef, _ = build.abstract_model(model_config, "generative")
    model = build.merge(graphdef, params)

    @jax.jit
    def logits(tokens, visual, images, length):
        # One padded length for all calls, so that the reference compiles once.
        positions = jnp.arange(tokens.shape[1])[None]
        segments = (positions < length).astype(jnp.int32)
        weights = jnp.zeros(tokens.shape, jnp.float32)
        valid = images[..., 0, 0, 0] >= 0
        hidden = model(PackedBatch(tokens, segments, positions, weights, visual, images, valid))
        return model.llm.logits(hidden[:, length - 1])[0, : tokenizer.vocab_size]

    class Naive:
        def __init__(self):
            self.tokens, self.visual, self.images = [], [], []

        def append(self, chunk):
            shift = len(self.images) * generator.tokens_per_image
            self.tokens += [int(t) for t in chunk.tokens]
            self.visual += [int(v) + shift if v >= 0 else -1 for v in chunk.visual_index]
            self.images += chunk.images

        def decode(self, count, stops):
            said = []
            side = generator.image_size
            while len(said) < count:
                pictures = np.zeros((1, 4, side, side, 3), np.uint8)
                pictures[0, : len(self.images)] = self.images or np.zeros((0, side, side, 3))
                pad = 200 - len(self.tokens)
                tokens = np.pad(np.asarray([self.tokens]), ((0, 0), (0, pad)))
                visual = np.pad(np.asarray([self.visual]), ((0, 0), (0, pad)), constant_values=-1)
                token = int(jnp.argmax(logits(tokens, visual, pictures, len(self.tokens))))
                if token in stops:
                    return said, True
                said.append(token)
                self.tokens.append(token)
                self.visual.append(-1)
            return said, False

    return Naive


def random_text(rng, length, tokenizer):
    return rng.integers(10, tokenizer.vocab_size, length).tolist()


def test_two_turns_of_ragged_rows_equal_the_naive_model(generator, tokenizer, naive, image_chunk):
    rng = np.random.default_rng(0)
    side = generator.image_size
    pictures = [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(3)]
    # Rows of very different lengths; rows 0 and 2 share an image.
    first = [
        image_chunk(random_text(rng, 5, tokenizer), pictures[:1]),
        generate.Chunk.text(random_text(rng, 23, tokenizer)),
        image_chunk(random_text(rng, 40, tokenizer), [pictures[1], pictures[0]]),
    ]
    second = [
        generate.Chunk.text(random_text(rng, 9, tokenizer)),
        None,
        image_chunk(random_text(rng, 17, tokenizer), [pictures[2]]),
    ]
    references = [naive() for _ in first]
    for reference, chunk in zip(references, first, strict=True):
        reference.append(chunk)
    # A stop token that the model generates, early in one row, so that rows stop at different times.
    free = [dataclasses.replace(chunk) for chunk in first]
    scout = generator.start(3)
    scout.append(free)
    spoken = [decoded.ids for decoded in scout.decode(12, stop_ids=[])]
    assert len({tuple(ids) for ids in spoken}) == 3, "rows must differ"
    stop = spoken[1][4]

    session = generator.start(3)
    session.append(first)
    decoded = session.decode(12, stop_ids=[stop])
    expected = [reference.decode(12, [stop]) for reference in references]
    assert [(d.ids, d.stopped) for d in decoded] == expected
    assert any(d.stopped for d in decoded) and not all(len(d.ids) == 12 for d in decoded)

    session.append(second)
    decoded = session.decode(7, stop_ids=[stop], active=[True, False, True])
    for row in (0, 2):
        references[row].append(second[row])
        assert (decoded[row].ids, decoded[row].stopped) == references[row].decode(7, [stop])
    assert decoded[1].ids == []
    assert session.lengths.tolist() == [len(reference.tokens) for reference in references]

    # The inactive row continues where it was.
    third = generate.Chunk.text(random_text(rng, 3, tokenizer))
    references[1].append(third)
    session.append([None, third, None])
    assert (
        session.decode(5, stop_ids=[], active=[False, True, False])[1].ids == references[1].decode(5, [])[0]
    )


def test_a_row_does_not_depend_on_its_neighbours(generator, tokenizer):
    rng = np.random.default_rng(1)
    chunks = [generate.Chunk.text(random_text(rng, n, tokenizer)) for n in (4, 16, 11)]
    together = generator.start(3)
    together.append(chunks)
    said = together.decode(6, stop_ids=[])
    for chunk, expected in zip(chunks, said, strict=True):
        alone = generator.start(1)
        alone.append([chunk])
        assert alone.decode(6, stop_ids=[]) == [expected]


def test_a_shared_prefix_changes_nothing(generator, tokenizer):
    rng = np.random.default_rng(4)
    prefix = random_text(rng, 20, tokenizer)
    tails = [random_text(rng, n, tokenizer) for n in (3, 9, 7)]
    whole = generator.start(3)
    whole.append([generate.Chunk.text(prefix + tail) for tail in tails])
    expected = whole.decode(6, stop_ids=[])
    for _ in range(2):  # the second time the prefix is known
        session = generator.start(3, generate.Chunk.text(prefix))
        assert session.lengths.tolist() == [20] * 3
        session.append([generate.Chunk.text(tail) for tail in tails])
        assert session.decode(6, stop_ids=[]) == expected
        assert session.lengths.tolist() == whole.lengths.tolist()
    only = generator.start(1, generate.Chunk.text(prefix))
    alone = generator.start(1)
    alone.append([generate.Chunk.text(prefix)])
    assert only.decode(6, stop_ids=[]) == alone.decode(6, stop_ids=[])


def test_the_cache_grows_and_its_end_stops_a_row(generator, tokenizer):
    rng = np.random.default_rng(2)
    session = generator.start(2)
    session.append([generate.Chunk.text(random_text(rng, n, tokenizer)) for n in (250, 295)])
    decoded = session.decode(20, stop_ids=[])
    assert [len(d.ids) for d in decoded] == [20, 5]
    assert not decoded[1].stopped
    assert session.lengths.tolist() == [270, 300]
    with pytest.raises(UserError, match=r"dialogue 1 needs 301 positions.*max_length 300"):
        session.append([None, generate.Chunk.text([11])])
    session.append([generate.Chunk.text([11]), None])
    assert session.lengths.tolist() == [271, 300]


def test_stop_token_is_neither_said_nor_cached(generator, tokenizer):
    session = generator.start(1)
    session.append([generate.Chunk.text([20, 21, 22])])
    first = generator.start(1)
    first.append([generate.Chunk.text([20, 21, 22])])
    stop = first.decode(1, stop_ids=[])[0].ids[0]
    assert session.decode(5, stop_ids=[stop]) == [generate.Decoded([], True)]
    assert session.lengths.tolist() == [3]


def test_few_programs_serve_many_lengths(generator, tokenizer):
    before = generator._programs.prefill._cache_size()
    rng = np.random.default_rng(3)
    for length in range(97, 129, 5):
        session = generator.start(1)
        session.append([generate.Chunk.text(random_text(rng, length, tokenizer))])
    assert generator._programs.prefill._cache_size() <= before + 1


def test_sampling(generator, tokenizer):
    def say(sampling):
        session = generator.start(1)
        session.append([generate.Chunk.text([20, 21, 22, 23])])
        return session.decode(10, stop_ids=[], sampling=sampling)[0].ids

    greedy = say(sampling_lib.GREEDY)
    assert say(sampling_lib.Sampling(temperature=1.0, top_p=1e-6)) == greedy
    drawn = [say(sampling_lib.Sampling(temperature=3.0, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(token < tokenizer.vocab_size for ids in drawn for token in ids)
    with pytest.raises(UserError, match="temperature"):
        sampling_lib.Sampling(temperature=-1)


@pytest.mark.parametrize(
    ("value", "least", "expected"),
    [
        (1, 1, 1),
        (2, 1, 2),
        (3, 1, 3),
        (4, 1, 4),
        (5, 1, 6),
        (7, 1, 8),
        (9, 1, 12),
        (13, 1, 16),
        (1, 16, 16),
        (65, 16, 96),
    ],
)
def test_round_up(value, least, expected):
    assert generate.round_up(value, least) == expected


def test_wrong_calls_are_refused(generator):
    with pytest.raises(UserError, match="batch size, 4"):
        generator.start(5)
    session = generator.start(2)
    with pytest.raises(ValueError, match="1 chunks for 2 rows"):
        session.append([None])
    with pytest.raises(ValueError, match="no prompt yet"):
        session.decode(3)
    picture = np.zeros((5, 5, 3), np.uint8)
    chunk = generate.Chunk(np.zeros(1, np.int32), np.zeros(1, np.int32), (picture,))
    with pytest.raises(ValueError, match="the model needs uint8"):
        session.append([chunk, None])


def test_merged_tiles_equal_the_training_path(model_config, tokenizer):
    """Two rows share an image: logits are those of the packed training batch."""
    config = model_config.copy_and_resolve_references()
    config.update(dict(image_aspect_ratio="dynamic_s2", s2_scales=(32, 64), max_tiles=6))
    params = jax.jit(lambda key: build.init_params(config, "generative", key))(jax.random.key(3))
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
    generator = generate.Generator(config, params, tokenizer, max_length=300, batch_size=4)
    processor, count = generator.processor, generator.tokens_per_image
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in ((60, 90), (70, 70))]
    chunks, samples = [], []
    for number, shown in enumerate(((0,), (1, 0), (0,))):
        images = [pictures[i] for i in shown]
        grids = [processor.grid(image) for image in images]
        turns = processor.expand([Turn("user", "<image>" * len(images) + "Is it seen? " * number)], grids)
        encoded = encode_prompt(tokenizer, get_template("chatml"), turns, count)
        encoded = processor.merge(encoded, grids, count)
        inputs = tuple(tile for image in images for tile in processor.inputs(image))
        tiles = processor.tile_map(grids)
        visual = np.where(
            encoded.image_of_token >= 0, encoded.image_of_token * count + encoded.visual_offset, -1
        )
        chunks.append(generate.Chunk(encoded.tokens, visual, inputs, tiles))
        samples.append(Sample(str(number), number, encoded, lambda inputs=inputs: inputs, tiles))
    assert [len(chunk.images) for chunk in chunks] == [7, 12, 7]
    session = generator.start(3)
    session.append(chunks)
    shape = GroupShape(3, max(map(len, (s.encoded for s in samples))), 26, count, 32, tiled=True)
    batch = assemble_group(shape, [[sample] for sample in samples])
    graphdef, _ = build.abstract_model(config, "generative")

    @jax.jit
    def logits(params, batch):
        model = build.merge(graphdef, params)
        return model.llm.logits(model(batch))

    want = np.asarray(logits(params, batch))
    for row, sample in enumerate(samples):
        got = np.asarray(session._state.logits)[row, : tokenizer.vocab_size]
        np.testing.assert_allclose(got, want[row, len(sample.encoded) - 1, : len(got)], atol=1e-5, rtol=0)
    assert np.ptp(want, axis=-1).min() > 1
    slots = generate._ImageSlots(processor)
    placed = [slots.add(chunk) for chunk in chunks]
    assert placed[0] == placed[2] == list(range(7)) and placed[1] == [*range(7, 12), *range(7)]
    with pytest.raises(ValueError, match="needs one"):
        slots.add(dataclasses.replace(chunks[0], tile_map=None))
