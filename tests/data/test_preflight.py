"""`vilam3 data check`, and the same check before the first step of a run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from data_worlds import TOKENS_PER_IMAGE, build, config, film, report, tokenizer, write

from vilam3_jax import train
from vilam3_jax.data import main as data_main
from vilam3_jax.data import preflight
from vilam3_jax.data.examples import Example
from vilam3_jax.errors import UserError


def without_targets(example):
    turns = tuple(dataclasses.replace(turn, supervised=False) for turn in example.turns)
    return dataclasses.replace(example, turns=turns)


def too_long(example):
    long = dataclasses.replace(example.turns[-1], text="word " * 4000)
    return dataclasses.replace(example, id="long", turns=(*example.turns[:-1], long))


@pytest.fixture
def films():
    rng = np.random.default_rng(0)
    return [film(i, rng) for i in range(20)]


def checked(tmp_path, examples, count=40, **data):
    write(tmp_path / "films", examples)
    loader = build(config(tmp_path, **data))
    before = loader.get_state()
    try:
        found = preflight.check(loader, config(tmp_path, **data).data, count, shown=2)
        assert loader.get_state() == before and loader.stats.skipped_total == 0
    finally:
        loader.close()
    return found


def test_counts_are_those_of_the_samples(tmp_path, films):
    found = checked(tmp_path, films)
    assert (found.samples, found.refused, found.problem()) == (40, {}, None)
    assert found.image_tokens == 40 * TOKENS_PER_IMAGE and found.answers == found.ending == 40
    assert 0 < found.targets < found.tokens - found.image_tokens
    assert all(not line.startswith("warning") for line in found.lines())
    for text in found.texts:
        name, _, rest = text.partition(": ")
        answer = next(one for one in films if one.id == name).turns[1].text
        assert rest.count("⟦") == 1 and f"⟦{answer}" in rest
        assert f"<image of {TOKENS_PER_IMAGE} tokens>" in rest


def test_a_refused_record_is_counted_with_its_reason(tmp_path, films):
    found = checked(tmp_path, [*films, too_long(films[0])], count=63)
    (reason,) = found.refused
    number = found.refused[reason]
    assert number in (2, 3, 4) and found.samples == 63 - number  # three epochs of a shuffle, more or less
    assert f"skipped {number}: {reason}" in found.lines() and "tokens" in reason


def test_padding_is_a_warning_with_settings_that_fill_more(tmp_path, films):
    found = checked(tmp_path, films, count=200, images_per_group=1, rows_per_group=4, global_rows=4)
    assert found.fill.tokens < 0.7 < found.fuller.tokens
    (warning,) = [line for line in found.lines() if line.startswith("warning")]
    assert f"data.images_per_group={found.fuller.images}" in warning


def test_data_without_targets_stops_command_and_run(tmp_path, films, capsys, monkeypatch):
    monkeypatch.setattr(Example, "problem", lambda self: None)  # `vilam3 prepare` refuses such records
    write(tmp_path / "films", [without_targets(one) for one in films])
    tokenizer().save(tmp_path / "tokenizer")
    flags = [
        "--config=configs/stage3_instruct.py:tiny",
        f"--config.data.path={tmp_path}",
        "--config.data.mixture=(('films',1.0),)",
        f"--config.model.tokenizer={tmp_path / 'tokenizer'}",
        "--config.data.seq_len=256",
        "--config.num_steps=1",
    ]
    with pytest.raises(UserError, match=r"none of the \d+ tokens of the first 1000 samples is a target"):
        data_main.main(["check", *flags])
    assert "0.0% of all tokens are targets" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"config data\.path=.*is a target"):
        train.main([*flags, f"--workdir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match="pairs are not packed"):
        data_main.main(["check", "--config=configs/stage1_vision.py:tiny"])


def test_documents_need_no_stop_token(tmp_path):
    rng = np.random.default_rng(0)
    found = checked(tmp_path, [report(i, rng) for i in range(20)])
    assert found.answers == 0 and not any("stop token" in line for line in found.lines())


def test_answers_without_a_stop_token_are_a_warning():
    found = preflight.Preflight(3, 60, 20, 0, 3, 0, {}, None, None, ())
    assert found.problem() is None
    assert [line.split(":")[0] for line in found.lines()] == ["3 samples read, 0 skipped", "warning"]
    assert (
        "no sample can be used" in preflight.Preflight(0, 0, 0, 0, 0, 0, {"x": 2}, None, None, ()).problem()
    )
