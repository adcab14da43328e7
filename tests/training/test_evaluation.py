"""Held-out losses in the loop: the micro-batches of training, and data that is opened once."""

from __future__ import annotations

import dataclasses
import threading

import jax
import numpy as np
import pytest

from tests.data.data_worlds import WORDS, config, film, write
from tests.training.helpers import packed_batch, tiny_config
from vilam3_jax import config as config_lib
from vilam3_jax.data import shards
from vilam3_jax.data.tokenizer import train_bpe
from vilam3_jax.errors import UserError
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import evaluation
from vilam3_jax.training import program as program_lib
from vilam3_jax.training import step as step_lib
from vilam3_jax.training.device_put import DevicePut


def build(cfg):
    cfg = config_lib.resolve(cfg)
    return program_lib.build(cfg, mesh_lib.build_mesh(cfg.mesh, jax.devices()[:1]))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split in ("train", "heldout"):
        write(folder / "films", [film(i, rng) for i in range(12)], split)
    train_bpe([WORDS] * 3, 400, folder / "tokenizer")
    return folder


def losses_of(root, **data):
    cfg = config(root, **data)
    cfg.model.tokenizer, cfg.eval_batches = str(root / "tokenizer"), 2
    program = build(cfg)
    units = program.task.batch_format(program.config.data, program.config.model).units
    return evaluation.HeldoutLosses(program, DevicePut(units, program.mesh)), program.initial_state()[0]


def test_no_more_is_computed_at_a_time_than_in_training():
    batch, memory, sums = packed_batch(0, rows=32), {}, {}
    for accumulate in (1, 8):
        cfg = tiny_config()
        cfg.grad_accum, cfg.data.rows_per_group, cfg.data.global_rows = accumulate, 1, 32
        program = build(cfg)
        state, _ = program.initial_state()
        with program.context():
            evaluate = jax.jit(step_lib.make_eval_step(program.loss_fn, accumulate))
            compiled = evaluate.lower(state, batch).compile()
            sums[accumulate] = compiled(state, batch)
        memory[accumulate] = compiled.memory_analysis().temp_size_in_bytes
    assert memory[8] < memory[1] / 4, memory
    for name, value in vars(sums[1]).items():
        np.testing.assert_allclose(getattr(sums[8], name), value, rtol=1e-5, err_msg=name)
    assert sums[1].weight > 100


def test_the_data_is_opened_once(root, monkeypatch):
    opened = []
    whole = shards.open_reader
    monkeypatch.setattr(shards, "open_reader", lambda path: opened.append(path) or whole(path))
    before = set(threading.enumerate())
    losses, state = losses_of(root)
    first = losses(state)
    assert first.keys() == {"heldout_true", "heldout_swapped"} and np.isfinite(list(first.values())).all()
    known = len(opened)
    assert losses(state) == first and len(opened) == known
    started = {thread.name for thread in set(threading.enumerate()) - before}
    # No read-ahead in between.
    assert not any("prefetch" in name or "vilam3-decode" in name for name in started), started
    losses.close()
    assert not {t for t in set(threading.enumerate()) - before if t.name.startswith("vilam3")}


def test_held_out_data_without_a_usable_record_is_an_error(root):
    """An error, not a loss of 0; each process sees only a part of the data."""
    losses, state = losses_of(root, seq_len=16)
    part = losses._loader(False)
    # As if another process had the other groups.
    part._turns = dataclasses.replace(part._turns, local_units=part._turns.local_units[:1])
    with pytest.raises(UserError, match=r"data: films/heldout record \d+.*; set eval_every=0"):
        losses(state, swapped=False)
    losses.close()
