"""Packing: samples are complete, separate, and within the budgets."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vilam3_jax.data import packing
from vilam3_jax.data.batches import join
from vilam3_jax.data.packing import (
    GroupShape,
    Sample,
    assemble_group,
    next_group,
    oversize_reason,
)
from vilam3_jax.data.templates import Encoded

T = 3
SHAPE = GroupShape(rows=2, seq_len=24, images=3, tokens_per_image=T, image_size=2, pad_id=9)


def sample(number: int, text: int, images: int) -> Sample:
    """`text` tokens `100 + number`, then the images, whose pixels encode number and ordinal."""
    length = text + images * T
    which = np.array([-1] * text + [i for i in range(images) for _ in range(T)], np.int32)
    offset = np.array([0] * text + list(range(T)) * images, np.int32)
    encoded = Encoded(
        np.full(length, 100 + number, np.int32), np.ones(length, np.float32), which, offset, images
    )
    pixels = tuple(np.full((2, 2, 3), (10 * number + i) % 256, np.uint8) for i in range(images))
    return Sample(f"s{number}", number, encoded, lambda: pixels)


SIZES = st.lists(st.tuples(st.integers(1, 15), st.integers(0, 3)), min_size=1, max_size=60)


def pack_all(samples: list[Sample], lookahead: int = 8):
    stream, waiting = iter(samples), []
    while True:
        rows, waiting = next_group(SHAPE, waiting, lambda: next(stream, None), lookahead)
        if not any(rows):
            assert not waiting
            return
        yield rows


@settings(deadline=None)
@given(SIZES, st.integers(1, 12))
def test_every_sample_appears_once_and_whole(sizes: list[tuple[int, int]], lookahead: int) -> None:
    samples = [s for i, (t, m) in enumerate(sizes[:20]) if not oversize_reason(SHAPE, s := sample(i, t, m))]
    seen: list[int] = []
    for rows in pack_all(samples, lookahead):
        group = assemble_group(SHAPE, rows)
        assert group.tokens.shape == (2, 24) and group.images.shape == (1, 3, 2, 2, 3)
        assert group.image_valid.sum() == sum(s.num_images for row in rows for s in row) <= SHAPE.images
        table = group.images[0, :, 0, 0, 0]
        for row in range(SHAPE.rows):
            segments = group.segment_ids[row]
            used = int((segments > 0).sum())
            assert (segments[:used] > 0).all() and (np.diff(segments[:used]) >= 0).all()
            assert sorted(set(segments[:used])) == list(range(1, len(rows[row]) + 1))
            assert (group.tokens[row, used:] == 9).all() and (group.visual_index[row, used:] == -1).all()
            assert not group.loss_weights[row, used:].any()
            for number, packed in enumerate(rows[row], start=1):
                at = np.flatnonzero(segments == number)
                assert np.array_equal(group.tokens[row, at], packed.encoded.tokens)
                assert group.positions[row, at].tolist() == list(range(len(at)))
                assert group.loss_weights[row, at].tolist() == [0.0] + [1.0] * (len(at) - 1)
                visual = group.visual_index[row, at]
                shown = packed.encoded.image_of_token >= 0
                assert (visual[~shown] == -1).all()
                assert (visual[shown] % T == packed.encoded.visual_offset[shown]).all()
                expected = 10 * packed.index + packed.encoded.image_of_token[shown]
                assert (table[visual[shown] // T] == expected).all()
                assert group.image_valid[0, visual[shown] // T].all()
                seen.append(packed.index)
    assert sorted(seen) == [s.index for s in samples]


@settings(deadline=None)
@given(SIZES)
def test_the_oldest_is_never_left_behind(sizes: list[tuple[int, int]]) -> None:
    samples = [s for i, (t, m) in enumerate(sizes) if not oversize_reason(SHAPE, s := sample(i, t, m))]
    placed: set[int] = set()
    for rows in pack_all(samples):
        oldest = min(s.index for s in samples if s.index not in placed)
        placed |= {s.index for row in rows for s in row}
        assert oldest in placed


@settings(deadline=None)
@given(SIZES, st.integers(0, 3))
def test_packing_resumes_from_what_waits(sizes: list[tuple[int, int]], cut: int) -> None:
    samples = [s for i, (t, m) in enumerate(sizes) if not oversize_reason(SHAPE, s := sample(i, t, m))]
    whole = [[[s.index for s in row] for row in rows] for rows in pack_all(samples)]
    taken: list[Sample] = []
    stream = iter(samples)

    def pull() -> Sample | None:
        one = next(stream, None)
        taken.extend([one] if one else [])
        return one

    waiting: list[Sample] = []
    for _ in range(cut):
        _, waiting = next_group(SHAPE, waiting, pull, 8)
    state = (len(taken), [s.index for s in waiting])
    rest = iter(samples[state[0] :])
    by_index = {s.index: s for s in samples}
    rows, _ = next_group(SHAPE, [by_index[i] for i in state[1]], lambda: next(rest, None), 8)
    got = [[s.index for s in row] for row in rows]
    assert got == (whole[cut] if cut < len(whole) else [[], []])


def test_oversized_samples_are_named() -> None:
    assert "25 tokens, a row has 24" in oversize_reason(SHAPE, sample(0, 25, 0))
    assert "4 images, a group has 3" in oversize_reason(SHAPE, sample(0, 1, 4))
    assert oversize_reason(SHAPE, sample(0, 24, 0)) is None


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(1, 15), st.integers(0, 2)), min_size=1, max_size=8),
    st.integers(1, 4),
)
@example([(5, 0), (15, 0), (1, 1)], 2)  # full without the image, or with it and 11 tokens short
def test_a_row_is_the_best_of_all_sets(sizes: list[tuple[int, int]], slots: int) -> None:
    """The best of all subsets with the oldest sample, where an image slot is worth 16 tokens."""
    waiting = [sample(i, t, m) for i, (t, m) in enumerate(sizes)]
    waiting = [s for s in waiting if s.num_tokens <= 20 and s.num_images <= slots]
    share = slots / 2

    def cost(chosen: Sequence[int]) -> float:
        tokens = sum(waiting[i].num_tokens for i in chosen)
        images = sum(waiting[i].num_images for i in chosen)
        most = max(math.ceil(share), waiting[0].num_images)
        over = tokens > 20 or images > most
        return math.inf if over else 20 - tokens + 16 * abs(images - share)

    chosen = packing._choose_row(waiting, 20, slots, share)
    if not waiting:
        assert chosen == []
        return
    rest = range(1, len(waiting))
    every = [(0, *more) for n in range(len(waiting)) for more in itertools.combinations(rest, n)]
    assert chosen[0] == 0 and cost(chosen) == min(map(cost, every))
    # Of equal sums, the set with the older samples.
    sums = [(waiting[i].num_tokens, waiting[i].num_images) for i in chosen]
    total = tuple(map(sum, zip(*sums, strict=True)))
    same = [
        one
        for one in every
        if tuple(
            sum(v) for v in zip(*[(waiting[i].num_tokens, waiting[i].num_images) for i in one], strict=True)
        )
        == total
    ]
    assert tuple(chosen) == max(same, key=lambda one: [i in one for i in range(len(waiting))])


@settings(deadline=None)
@given(SIZES, st.integers(1, 12))
def test_few_samples_wait(sizes: list[tuple[int, int]], lookahead: int) -> None:
    samples = [s for i, (t, m) in enumerate(sizes) if not oversize_reason(SHAPE, s := sample(i, t, m))]
    stream, waiting = iter(samples), []
    while True:
        rows, waiting = next_group(SHAPE, waiting, lambda: next(stream, None), lookahead)
        if not any(rows):
            break
        # More than `lookahead` only while they were too short for two rows, when the last came.
        assert len(waiting) <= lookahead or sum(s.num_tokens for s in waiting) < 3 * SHAPE.seq_len


def test_lookahead_fills_the_gaps() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.permutation([11] * 200 + [13] * 200)  # only one of each fills a row
    samples = [sample(i % 20, int(length), 0) for i, length in enumerate(lengths)]

    def fill(lookahead: int) -> float:
        groups = [sum(len(s.encoded) for row in rows for s in row) for rows in pack_all(samples, lookahead)]
        return sum(groups) / (len(groups) * 48)

    assert fill(32) > 0.97 > fill(1)


def test_images_are_read_only_when_their_sample_has_a_place() -> None:
    read: list[int] = []

    def reading(number: int) -> Sample:
        one = sample(number, 10, 1)
        return dataclasses.replace(one, read_images=lambda: (read.append(number), one.read_images())[1])

    stream = iter([reading(i) for i in range(20)])
    rows, waiting = next_group(SHAPE, [], lambda: next(stream, None), 16)
    assert len(waiting) >= 10 and not read
    assemble_group(SHAPE, rows)
    assert read == [s.index for row in rows for s in row]


def test_batches_put_groups_one_after_another() -> None:
    groups = [assemble_group(SHAPE, [[sample(i, 5, 1)], []]) for i in range(2)]
    batch = join(groups)
    assert batch.tokens.shape == (4, 24) and batch.images.shape == (2, 3, 2, 2, 3)
    assert batch.tokens[2, 0] == 101 and batch.image_valid.tolist() == [[True, False, False]] * 2


@pytest.mark.parametrize("end", [0, 1])
def test_an_empty_stream_gives_empty_rows(end: int) -> None:
    rows, waiting = next_group(SHAPE, [sample(0, 2, 0)] * end, lambda: None)
    assert [len(row) for row in rows] == [end, 0] and waiting == []
