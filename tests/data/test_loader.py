"""The loader: exact resume, mixtures by weight, finite evaluation, and skipped bad records."""

from __future__ import annotations

import collections
import dataclasses
import errno
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_worlds import (
    TOKENS_PER_IMAGE,
    annotate,
    batches_of,
    build,
    config,
    ct_annotation,
    ct_example,
    ct_volume,
    film,
    pair,
    picture,
    report,
    same,
    take,
    tokenizer,
    write,
)

from vilam3_jax.data import batch_formats, shards
from vilam3_jax.data.batches import SEQUENCE_FIELDS, PackedBatch, PairBatch, arrays, join
from vilam3_jax.data.examples import Example, ImageRef, Turn
from vilam3_jax.data.experts.store import Annotation
from vilam3_jax.data.stream import dealt_position
from vilam3_jax.data.tokenizer import load_tokenizer
from vilam3_jax.errors import StoppingError, UnavailableError, UserError
from vilam3_jax.runtime import paths

KEYS = {"tokens", "segment_ids", "positions", "loss_weights", "images", "image_valid", "visual_index"}
STATE_KEYS = {"next", "pending", "groups", "order", "tokenizer", "annotations", "pictures"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    write(folder / "films", [film(i, rng) for i in range(37)])
    write(folder / "films", [film(100 + i, rng) for i in range(11)], "heldout")
    write(folder / "reports", [report(i, rng) for i in range(23)])
    write(folder / "pairs", [pair(i) for i in range(20)])
    write(folder / "pairs", [pair(i) for i in range(5)], "heldout")
    return folder


def pictures(batch) -> list[int]:
    return batch.images[batch.image_valid][:, 0, 0, 0].tolist()


def test_batch_contract(root) -> None:
    loader = build(config(root))
    (batch,) = take(loader, 1)
    loader.close()
    assert isinstance(batch, PackedBatch) and arrays(batch).keys() == KEYS
    assert all(arrays(batch)[name].shape == (8, 96) for name in SEQUENCE_FIELDS)
    assert batch.images.shape == (4, 4, 8, 8, 3) and batch.images.dtype == np.uint8
    assert batch.image_valid.shape == (4, 4) and batch.loss_weights.dtype == np.float32
    assert batch.visual_index.max() < 4 * TOKENS_PER_IMAGE
    assert (batch.loss_weights[batch.segment_ids == 0] == 0).all() and batch.loss_weights.any()
    assert loader.provenance[0]["name"] == "films" and loader.provenance[0]["licences"] == ["CC0"]


def test_text_rules_of_the_model_are_kept(root) -> None:
    def after_images(rule: str) -> set[str]:
        cfg = config(root)
        cfg.model.text.bos = rule
        (batch,) = batches_of(cfg, 1)
        tokens, visual = batch.tokens.ravel(), batch.visual_index.ravel()
        ends = np.flatnonzero((visual[:-1] >= 0) & (visual[1:] < 0)) + 1
        return {tokenizer().decode([token]) for token in tokens[ends]}

    # The tokenizer's BOS is <|im_start|>, with which the template begins: VILA's rule takes the line end.
    assert after_images("clean") == {"\n"} and "\n" not in after_images("as_trained")
    with pytest.raises(UserError, match="text rule bos='no'"):
        after_images("no")


@pytest.mark.parametrize("shards", [1, 3, 4, 16])
@pytest.mark.parametrize("cut", [1, 5])
def test_resume_is_bitwise(root, shards: int, cut: int) -> None:
    cfg = config(root, (("films", 2.0), ("reports", 1.0)), loader_shards=shards)
    whole = batches_of(cfg, 9)
    first = build(cfg)
    begun = take(first, cut)
    state = json.loads(json.dumps(first.get_state()))
    assert same(begun + take(first, 1), whole[: cut + 1])  # iterating on continues, too
    first.close()
    resumed = build(cfg)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert same(take(resumed, 9 - cut), whole[cut:])
    resumed.close()
    assert set(state) == {str(s) for s in range(shards)} and state["0"].keys() == STATE_KEYS


def test_a_state_is_of_its_tokenizer(root, tmp_path) -> None:
    loader = build(config(root))
    state = loader.get_state()
    loader.close()
    tokenizer().save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    settings["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    same_one = build(config(root))
    same_one.set_state(state)
    same_one.set_state({n: {k: v for k, v in of.items() if k != "tokenizer"} for n, of in state.items()})
    same_one.close()
    other = build(config(root), tokenizer=load_tokenizer(tmp_path))
    with pytest.raises(UserError, match=r"of another tokenizer; set model\.tokenizer"):
        other.set_state(state)
    other.close()


def test_a_state_is_of_its_annotations(tmp_path) -> None:
    write(tmp_path / "films", [film(i, np.random.default_rng(0), expert=True) for i in range(9)])
    for name, p in (("first", 0.9), ("same", 0.9), ("other", 0.1)):
        classes = {"pneumonia": p}
        records = [Annotation(f"key{i}", "PNEUMONIA", probabilities=classes, version="t") for i in range(9)]
        annotate(tmp_path / name, records)
    settings = dict(experts="on", mixture=(("films", 1.0),), seq_len=1024)
    loader = build(config(tmp_path, annotations=str(tmp_path / "first"), **settings))
    take(loader, 1)
    state = loader.get_state()
    loader.close()
    same_answers = build(config(tmp_path, annotations=str(tmp_path / "same"), **settings))
    same_answers.set_state(state)
    same_answers.close()
    other = build(config(tmp_path, annotations=str(tmp_path / "other"), **settings))
    with pytest.raises(UserError, match=r"of other annotations; restore data\.annotations"):
        other.set_state(state)
    other.close()


def test_state_belongs_to_the_batch_returned_last(root) -> None:
    cfg = config(root)
    loader = build(cfg)
    batches = iter(loader)
    next(batches)
    state = loader.get_state()
    threading.Event().wait(0.3)  # the thread runs ahead meanwhile
    assert loader.get_state() == state
    second = next(batches)
    loader.set_state(state)
    assert same(take(loader, 1), [second])
    loader.close()


def test_every_record_once_an_epoch_in_another_order(root) -> None:
    loader = build(config(root, images_per_group=4), "train")
    seen: list[int] = []
    for batch in loader:
        seen += pictures(batch)
        if len(seen) > 4 * 37:
            break
    state = loader.get_state()
    waiting = sum(len(s["pending"]) for s in state.values())
    loader.close()
    counts = collections.Counter(seen)
    # Queued samples are at most those of the epochs begun.
    drawn = len(seen) + waiting
    assert set(counts) == set(range(37)) and max(counts.values()) <= -(-drawn // 37)
    order = [loader.samples.address(i)[1] for i in range(74)]
    assert sorted(order[:37]) == sorted(order[37:]) == list(range(37)) and order[:37] != order[37:]


def test_every_shard_sees_the_whole_mixture(root) -> None:
    """A mixture of two halves has period two, which an even number of shards could resonate with."""
    loader = build(config(root, (("films", 23.0), ("reports", 37.0)), images_per_group=8))
    take(loader, 8)
    for number in range(4):
        positions = [dealt_position(index, number, 4) for index in range(200)]
        films = sum(loader.samples.address(position)[0] == 0 for position in positions)
        assert 70 < films < 130
    assert sorted(dealt_position(i, s, 4) for i in range(5) for s in range(4)) == list(range(20))
    loader.close()


def test_mixture_follows_its_weights(root) -> None:
    loader = build(config(root, (("films", 3.0), ("reports", 1.0))))
    counts = collections.Counter(loader.samples.address(i) for i in range(3 * 37 + 23))
    loader.close()
    assert {dataset: set(counts[d, r] for d, r in counts if d == dataset) for dataset in (0, 1)} == {
        0: {3},
        1: {1},
    }


def test_seed_changes_the_order(root) -> None:
    cfg = config(root)
    batches = []
    for seed in (0, 0, 1):
        cfg.seed = seed
        batches.append(batches_of(cfg, 1))
    assert same(batches[0], batches[1]) and not same(batches[0], batches[2])


def test_held_out_order_mixes_patients_and_does_not_depend_on_the_seed(root) -> None:
    cfg = config(root, (("films", 1.0),))
    orders = []
    for seed in (0, 5):
        cfg.seed = seed
        loader = build(cfg, "heldout")
        orders.append([loader.samples.address(i) for i in range(11)])
        loader.close()
    assert orders[0] == orders[1]
    assert orders[0] != sorted(orders[0]) and len(set(orders[0])) == 11


def test_augment_changes_training_images_only_and_resumes(root) -> None:
    cfg = config(root, (("films", 1.0),))
    clean = batches_of(cfg, 4)
    cfg.data.augment = True
    loader = build(cfg)
    altered = take(loader, 2)
    state = loader.get_state()
    altered += take(loader, 2)
    loader.close()
    assert [b.tokens.tobytes() for b in altered] == [b.tokens.tobytes() for b in clean]
    assert not same(altered, clean)
    again = build(cfg)
    again.set_state(state)
    assert same(take(again, 2), altered[2:])
    again.close()
    held = [batches_of(c, 1, "heldout") for c in (cfg, config(root, (("films", 1.0),)))]
    assert same(*held)


def test_state_of_other_data_is_refused(root) -> None:
    cfg = config(root)
    loader = build(cfg)
    state = loader.get_state()
    loader.close()
    cfg.seed = 1
    other = build(cfg)
    with pytest.raises(UserError, match="other data"):
        other.set_state(state)
    other.close()
    cfg.seed, cfg.data.loader_shards = 0, 8
    other = build(cfg)
    with pytest.raises(UserError, match="shards 0, 1, 2, 3, this run has 8"):
        other.set_state(state)
    other.close()


@pytest.mark.parametrize("kind", ["generative", "contrastive"])
@pytest.mark.parametrize("shards,units", [(4, 8), (8, 4), (4, 4), (1, 4), (6, 4)])
def test_parts_of_a_batch_are_those_of_the_whole(root, kind, shards, units) -> None:
    cfg = config(root, (("pairs" if kind == "contrastive" else "films", 1.0),))
    cfg.task = kind
    cfg.data.loader_shards, cfg.data.global_pairs = shards, units
    cfg.data.global_rows = units * cfg.data.rows_per_group
    whole = build(cfg)
    batches = take(whole, 4)
    # Two processes take halves, three take arbitrary units; some parts share a shard.
    for parts in ([range(units // 2), range(units // 2, units)], [(3, 0), (1,), (2, *range(4, units))]):
        loaders = [build(cfg, local_units=part) for part in parts]
        taken = [take(loader, 2) for loader in loaders]
        states: dict[str, Any] = {}
        for part, loader, own in zip(parts, loaders, taken, strict=True):
            for batch, expected in zip(own, batches, strict=False):
                for key, value in arrays(batch).items():
                    whole_array = arrays(expected)[key]
                    rows = whole_array.reshape(units, -1, *whole_array.shape[1:])[sorted(part)]
                    assert np.array_equal(value, rows.reshape(value.shape)), (key, part)
            state = loader.get_state()
            assert all(states.get(number, value) == value for number, value in state.items())
            states |= state
            loader.close()
        assert len(states) == shards
        whole.set_state(states)
        assert same(take(whole, 2), batches[2:])
    whole.close()


def test_a_process_reads_only_its_shards(root) -> None:
    cfg = config(root, (("films", 1.0),), global_rows=8)
    cfg.data.loader_shards = 8 // cfg.data.rows_per_group
    halves = [build(cfg, local_units=part) for part in np.split(np.arange(cfg.data.loader_shards), 2)]
    for number, loader in enumerate(halves):
        take(loader, 2)
        assert len(loader.get_state()) == cfg.data.loader_shards // 2
        assert (str(0) in loader.get_state()) == (number == 0)
        loader.close()


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_heldout_is_one_pass_each_time(root, shards) -> None:
    cfg = config(root, (("films", 2.0), ("reports", 1.0)), global_rows=4)
    cfg.data.loader_shards = shards
    loader = build(cfg, "heldout")
    first, again = list(loader), list(loader)
    assert same(first, again)
    seen = sorted(p for batch in first for p in pictures(batch))
    assert seen == list(range(100, 111))
    assert {b.tokens.shape for b in first} == {(4, 96)}
    assert loader.stats.samples == 22
    units = 4 // cfg.data.rows_per_group
    halves = [build(cfg, "heldout", local_units=part) for part in np.split(np.arange(units), 2)]
    parts = [list(half) for half in halves]
    for number, batch in enumerate(first):
        # A process may reach the end of its records before another one.
        left, right = (
            p[number] if number < len(p) else h.empty_batch() for p, h in zip(parts, halves, strict=True)
        )
        assert same([join([left, right])], [batch])
    for one in (loader, *halves):
        one.close()


def test_swapped_images_come_from_other_patients(root) -> None:
    cfg = config(root)
    true, swapped = build(cfg, "heldout"), build(cfg, "heldout", swap_images=True)
    for right, wrong in zip(true, swapped, strict=True):
        for key in KEYS - {"images"}:
            assert np.array_equal(getattr(right, key), getattr(wrong, key))
        for own, other in zip(pictures(right), pictures(wrong), strict=True):
            assert own // 2 != other // 2 and 100 <= other < 111
    true.close()
    swapped.close()


def test_bad_records_are_named_and_do_not_end_the_run(tmp_path) -> None:
    rng = np.random.default_rng(0)
    long = Example("long", "document", (), (Turn("assistant", "what is shown here? " * 60, True),))
    many = Example(
        "many",
        "conversation",
        tuple(ImageRef(data=picture(i)) for i in range(5)),
        (Turn("user", "<image>" * 5), Turn("assistant", "x", True)),
    )
    broken = Example("broken", "conversation", (ImageRef(data=b"not an image"),), film(0, rng).turns)
    write(tmp_path / "films", [film(0, rng), long, broken, many, film(1, rng)])
    loader = build(config(tmp_path))
    take(loader, 3)
    loader.close()
    reasons = dict(loader.stats.skipped)
    assert len(reasons) == 3 and loader.stats.skipped_total >= 3
    text = "\n".join(f"{name}: {reason}" for name, reason in reasons.items())
    assert "films/train record 1 (long)" in text and "raise data.seq_len" in text
    assert "films/train record 2: example broken" in text and "image" in text
    assert "(many): 5 images, a group has 4" in text


def test_an_unreadable_image_leaves_a_gap_and_the_run_resumes(tmp_path) -> None:
    """The image is read after its sample is packed; the rest of the batches does not change."""
    rng = np.random.default_rng(0)
    good = [film(i, rng) for i in range(12)]
    broken = dataclasses.replace(good[5], id="broken", images=(ImageRef(data=b"\x89PNG junk"),))
    write(tmp_path / "films", [*good[:5], broken, *good[6:]])
    write(tmp_path / "clean" / "films", good)
    loader, clean = build(config(tmp_path)), build(config(tmp_path / "clean"))
    batches, expected = take(loader, 6), take(clean, 6)
    lost = 0
    for batch, whole in zip(batches, expected, strict=True):
        lost += whole.image_valid.sum() - batch.image_valid.sum()
        assert pictures(batch) == [number for number in pictures(whole) if number != 5]
    assert lost == loader.stats.skipped_total > 0
    assert dict(loader.stats.skipped).keys() == {"films/train record 5"}
    first = build(config(tmp_path))
    take(first, 3)
    second = build(config(tmp_path))
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert same(take(second, 3), batches[3:])
    for one in (loader, clean, first, second):
        one.close()


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_only_bad_records_is_an_error(tmp_path, split: str) -> None:
    turns = film(0, np.random.default_rng(0)).turns
    bad = [Example(f"b{i}", "conversation", (ImageRef(data=b"junk"),), turns) for i in range(3)]
    write(tmp_path / "films", bad, split)
    loader = build(config(tmp_path), split)
    with pytest.raises(UserError, match=r"no usable record.*example b"):
        take(loader, 3)  # 16 must have been tried
    loader.close()


def test_a_dataset_without_a_good_record_is_an_error_beside_one_that_has_them(tmp_path) -> None:
    rng = np.random.default_rng(0)
    bad = [dataclasses.replace(film(i, rng), images=(ImageRef(data=b"junk"),)) for i in range(3)]
    write(tmp_path / "films", bad)
    write(tmp_path / "reports", [report(i, rng) for i in range(9)])
    loader = build(config(tmp_path, (("films", 1.0), ("reports", 1.0))))
    with pytest.raises(UserError, match=r"no usable record of films in 16 tried.*text file"):
        take(loader, 60)
    loader.close()


@pytest.mark.parametrize("shard", ["reports", "annotations"])
def test_a_shard_that_cannot_be_read_ends_the_run(tmp_path, monkeypatch, shard: str) -> None:
    """Its records are not skipped, as the run would continue with another mixture."""
    rng = np.random.default_rng(0)
    write(tmp_path / "films", [film(i, rng, expert=True) for i in range(9)])
    write(tmp_path / "reports", [report(i, rng) for i in range(9)])
    records = [Annotation(f"key{i}", "PNEUMONIA", version="t") for i in range(9)]
    annotate(tmp_path / "annotations", records)
    whole = shards.open_reader

    def no_space(path: str):
        if f"/{shard}/" in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(path)

    monkeypatch.setattr(shards, "open_reader", no_space)
    cfg = config(tmp_path, (("films", 1.0), ("reports", 1.0)))
    cfg.data.annotations, cfg.data.experts = str(tmp_path / "annotations"), "on"
    loader = build(cfg)
    with pytest.raises(UnavailableError, match=rf"{shard}/.*array_record\S*: cannot be read .*No space left"):
        take(loader, 10)
    assert not loader.stats.skipped
    loader.close()


def test_an_image_that_cannot_be_read_now_is_not_skipped(tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)

    def fail(path: Path):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "x.png").write_bytes(picture(1))
    write(tmp_path / "films", [dataclasses.replace(film(0, rng), images=(ImageRef(path="x.png"),))])
    loader = build(config(tmp_path))
    monkeypatch.setattr(paths, "_look_up", fail)
    with pytest.raises(UnavailableError, match=r"x\.png: cannot be read now"):
        take(loader, 2)
    assert not loader.stats.skipped
    loader.close()


def test_records_that_the_program_fails_on_are_skipped_by_type(root, monkeypatch) -> None:
    whole = batch_formats.encode_example

    def fail_on(often: int):
        def encode(tokenizer, template, form, turns, tokens):
            if len(turns[-1].text) % often == 0:
                raise TypeError(turns[-1].text)
            return whole(tokenizer, template, form, turns, tokens)

        return encode

    monkeypatch.setattr(batch_formats, "encode_example", fail_on(3))
    loader = build(config(root))
    take(loader, 3)
    loader.close()
    assert {reason for _, reason in loader.stats.skipped} == {"a value in it cannot be used (TypeError)"}
    monkeypatch.setattr(batch_formats, "encode_example", fail_on(1))
    loader = build(config(root))
    with pytest.raises(UserError, match=r"no usable record of films in 37 tried; .*\(TypeError\)"):
        take(loader, 1)
    loader.close()


@pytest.mark.parametrize("error", [MemoryError, StoppingError])
def test_what_is_no_fault_of_a_record_ends_the_run(root, monkeypatch, error) -> None:
    def fail(*args):
        raise error("now")

    monkeypatch.setattr(batch_formats, "encode_example", fail)
    loader = build(config(root))
    with pytest.raises(error, match="now"):
        take(loader, 1)
    loader.close()


def test_close_joins_threads(root) -> None:
    before = set(threading.enumerate())
    loader = build(config(root))
    batches = iter(loader)
    next(batches)
    assert any(t.name.startswith("vilam3") for t in set(threading.enumerate()) - before)
    loader.close()
    assert not set(threading.enumerate()) - before
    assert list(batches) == []


def test_stats_and_fill(root) -> None:
    loader = build(config(root, (("films", 1.0), ("reports", 1.0)), images_per_group=8))
    batches = take(loader, 6)
    loader.close()
    real = sum(int((b.segment_ids > 0).sum()) for b in batches)
    assert loader.stats.tokens == real and loader.stats.batches == 6
    assert loader.stats.images == sum(int(b.image_valid.sum()) for b in batches)
    assert real / (6 * 8 * 96) > 0.9


def test_pairs(root) -> None:
    cfg = config(root, (("pairs", 1.0),), global_pairs=8, text_len=16)
    cfg.task = "contrastive"
    whole = batches_of(cfg, 4)
    first = build(cfg)
    take(first, 2)
    second = build(cfg)
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert same(take(second, 2), whole[2:])
    batch = whole[0]
    assert isinstance(batch, PairBatch)
    assert batch.images.shape == (8, 8, 8, 3) and batch.text_tokens.shape == (8, 16)
    tok = tokenizer()
    for image, ids, valid in zip(batch.images, batch.text_tokens, batch.text_valid, strict=True):
        assert tok.decode(ids[valid]) == f"film number {image[0, 0, 0]}" and ids[valid][-1] == tok.eos_id
        assert (ids[~valid] == tok.pad_id).all()
    heldout = build(cfg, "heldout")
    (last,) = list(heldout)
    assert last.text_valid.any(axis=1).sum() == 5 and last.images.shape[0] == 8
    for one in (first, second, heldout):
        one.close()


def test_experts_mixed_on_for_some(tmp_path) -> None:
    key = ct_volume(tmp_path / "films")
    write(tmp_path / "films", [ct_example(key, i, axis=i % 3, index=3 + i % 5) for i in range(12)])
    annotate(tmp_path / "said", [ct_annotation(key)])
    cfg = config(tmp_path, seq_len=900, annotations=str(tmp_path / "said"), experts="mixed")
    loader = build(cfg)
    take(loader, 3)
    loader.close()
    assert not loader.stats.skipped
    assert loader.stats.samples < loader.stats.images < 2 * loader.stats.samples
    off = build(cfg, experts="off")
    take(off, 1)
    off.close()
    assert off.stats.images == off.stats.samples
    cfg.data.annotations = ""
    with pytest.raises(UserError, match=r"data\.annotations is empty"):
        build(cfg)


def test_user_errors_name_the_key(root, tmp_path) -> None:
    for cfg, reason in (
        (config(root, (("nothing", 1.0),)), "vilam3 prepare"),
        (config(root, (("films", 0.0),)), "must be positive"),
        (config("", ()), r"data\.path is empty"),
    ):
        with pytest.raises(UserError, match=reason):
            build(cfg)
    with pytest.raises(UserError, match="no dataset of the mixture has a split 'heldout'"):
        build(config(root, (("reports", 1.0),)), "heldout")
    small = config(root)
    small.model.llm.vocab_size = 10
    with pytest.raises(UserError, match="the model 10"):
        build(small)
    with pytest.raises(UserError, match=r"model\.tokenizer is empty"):
        build(config(root), tokenizer=None)


def test_resume_in_a_new_process(root, tmp_path) -> None:
    cfg = config(root)
    tokenizer().save(tmp_path / "tok")
    cfg.model.tokenizer = str(tmp_path / "tok")
    loader = build(cfg, tokenizer=None)
    take(loader, 2)
    state = loader.get_state()
    expected = take(loader, 1)[0]
    loader.close()
    np.savez(tmp_path / "expected.npz", **arrays(expected))
    (tmp_path / "state.json").write_text(json.dumps(state))
    (tmp_path / "cfg.json").write_text(cfg.to_json())
    code = (
        "import json, sys, numpy, ml_collections\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from data_worlds import build\n"
        "from vilam3_jax.data.batches import arrays\n"
        "folder = sys.argv[1]\n"
        "cfg = ml_collections.ConfigDict(json.load(open(folder + '/cfg.json')))\n"
        "loader = build(cfg, tokenizer=None)\n"
        "loader.set_state(json.load(open(folder + '/state.json')))\n"
        "batch = arrays(next(iter(loader))); loader.close()\n"
        "expected = numpy.load(folder + '/expected.npz')\n"
        "assert all(numpy.array_equal(expected[k], batch[k]) for k in batch)\n"
        "print('same')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.stdout.strip() == "same", run.stderr
