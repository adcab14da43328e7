"""Skipped steps and the moving average, also with accumulation and after a restart."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from tests.training.helpers import tiny_config
from vilam3_jax import config as config_lib
from vilam3_jax.checkpoints import run_checkpoints
from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import compat
from vilam3_jax.sharding.mesh import MESH_AXES
from vilam3_jax.tasks import TASKS
from vilam3_jax.tasks.task import LossSums
from vilam3_jax.training import optimizer as optimizer_lib
from vilam3_jax.training import step as step_lib
from vilam3_jax.training import step_guard
from vilam3_jax.training.optimizer import LrGroup
from vilam3_jax.training.train_state import TrainState

KERNEL, BIAS, FROZEN = "projector/fc1/kernel", "projector/fc1/bias", "llm/scale"


def config_of(**changes):
    config = tiny_config()
    config.trainable = ((r"llm/.*", 0.0), (r"projector/.*", 1.0))
    config.schedule.update(dict(peak=0.05, warmup_fraction=0.2, name="cosine"))
    config.update_from_flattened_dict(
        {"ema_decay": 0.8, "optimizer.weight_decay": 0.1, "skip.window": 4, "skip.spike": 5.0, **changes}
    )
    return config_lib.resolve(config)


def regression(params, batch):
    """Weighted squared error of a linear model; the weights stand for supervised tokens."""
    y, weights = batch.tokens, batch.loss_weights[:, 0]
    error = (batch.images * params[FROZEN] @ params[KERNEL] + params[BIAS] - y) ** 2
    return LossSums((error.sum(axis=1) * weights).sum(), weights.sum(), jnp.zeros(()))


def batch_of(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=(16, 4)).astype(np.float32)
    weights = rng.integers(0, 4, (16, 1)).astype(np.float32)
    ids, valid = np.ones((16, 1), np.int32), np.ones((16, 1), bool)
    return PackedBatch(y, ids, ids, weights, ids, x * np.float32(scale), valid)


_made = {}


def optimizer_and_step(config):
    """Compiled once for each config."""
    if (key := config.to_json()) not in _made:
        schedule = optimizer_lib.learning_rate(config.schedule, config.num_steps)
        groups = dict.fromkeys((KERNEL, BIAS), LrGroup())
        optimizer = optimizer_lib.make_optimizer(config.optimizer, schedule, groups)
        step = step_lib.make_train_step(
            regression,
            partial(TASKS["generative"].work, config.model),
            optimizer,
            schedule,
            config.skip,
            grad_accum=config.grad_accum,
            ema_decay=config.ema_decay,
        )
        _made[key] = optimizer, jax.jit(step)
    return _made[key]


class Toy:
    """The real train step around `regression`, on `devices` devices."""

    def __init__(self, config, devices=1):
        self.config, self.log = config, []
        self.mesh = compat.make_mesh([1, devices, 1, 1], MESH_AXES, jax.devices()[:devices])
        whole, split = (NamedSharding(self.mesh, PartitionSpec(*axes)) for axes in ((), ("fsdp",)))
        kernel = np.random.default_rng(0).normal(size=(8, 4))
        trainable = {
            KERNEL: jax.device_put(jnp.asarray(kernel, config.model.param_dtype), split),
            BIAS: jax.device_put(jnp.zeros(4, config.model.param_dtype), whole),
        }
        optimizer, self._step = optimizer_and_step(config)
        rest = {
            "step": jnp.zeros((), jnp.int32),
            "rng": jax.random.key_data(jax.random.key(0)),
            "frozen": {FROZEN: jnp.ones(())},
            "guard": step_guard.fresh(config.skip),
        }
        self.state = TrainState(
            **jax.device_put(rest, whole),
            trainable=trainable,
            opt_state=jax.device_put(optimizer.init(trainable), whole),
            ema=jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), trainable),
        )

    def step(self, batch):
        rows = NamedSharding(self.mesh, PartitionSpec("fsdp"))
        self.state, metrics = self._step(self.state, jax.device_put(batch, rows))
        self.log.append({key: float(value) for key, value in metrics.items()})
        return self.log[-1]


def learned(toy):
    """The state that a skipped step must not change."""
    kept = ("trainable", "opt_state", "ema", "frozen")
    return jax.tree.map(np.asarray, {name: getattr(toy.state, name) for name in kept})


def assert_equal(one, two, **tolerance):
    def check(a, b):
        np.testing.assert_allclose(a, b, **{"rtol": 0, "atol": 0, **tolerance})

    jax.tree.map(check, one, two)


def poisoned(value, row=5):
    batch = batch_of(99)
    batch.images[row] = value
    batch.loss_weights[row] = 1
    return batch


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("accumulated", [1, 4])
@pytest.mark.parametrize("bad", [np.nan, 1e30])
def test_a_step_that_is_not_finite_leaves_no_trace(bad, accumulated, devices):
    """Parameters, moments, average and rates are bitwise those of a run without the batch."""
    with_bad, without = (Toy(config_of(grad_accum=accumulated), devices) for _ in range(2))
    for index in range(3):
        with_bad.step(batch_of(index))
        without.step(batch_of(index))
    before = learned(with_bad)
    metrics = with_bad.step(poisoned(bad))
    assert_equal(learned(with_bad), before)
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (1, 1)
    assert int(with_bad.state.step) == 4
    for index in range(3, 6):
        assert with_bad.step(batch_of(index)) == without.step(batch_of(index)) | {"skipped": 1.0}
    assert_equal(learned(with_bad), learned(without))
    assert np.any(learned(without)["trainable"][KERNEL] != before["trainable"][KERNEL])


def test_spikes_are_skipped_once_there_is_a_median_and_not_remembered():
    toy = Toy(config_of())
    assert toy.step(batch_of(0, scale=100))["skipped"] == 0  # the window is not full
    for index in range(1, 5):
        toy.step(batch_of(index))
    norms = np.asarray(toy.state.guard.norms)
    np.testing.assert_allclose(
        sorted(norms), sorted(row["grad_norm"] for row in toy.log[1:]), rtol=1e-6
    )  # the first fell out
    usual, before = np.median(norms), learned(toy)
    for count in (1, 2, 3):
        spike = toy.step(batch_of(5, scale=30))
        assert spike["grad_norm"] > 5 * usual
        assert (spike["skipped"], spike["skipped_in_row"]) == (count, count)
    assert_equal(learned(toy), before)
    np.testing.assert_array_equal(toy.state.guard.norms, norms)
    after = toy.step(batch_of(6))
    assert after["grad_norm"] < 5 * usual and (after["skipped"], after["skipped_in_row"]) == (3, 0)


def test_without_a_factor_spikes_pass():
    toy = Toy(config_of(**{"skip.spike": 0.0}))
    for index in range(6):
        toy.step(batch_of(index))
    assert toy.step(batch_of(6, scale=30))["skipped"] == 0


def test_the_limit_ends_the_run():
    toy = Toy(config_of(**{"skip.limit": 3}))
    for index in range(2):
        step_guard.check_limit(toy.config.skip, index, toy.step(poisoned(np.nan)))
    with pytest.raises(UserError, match=r"step 7: the last 3 steps were skipped.*norm nan.*skip.limit"):
        step_guard.check_limit(toy.config.skip, 7, toy.step(poisoned(np.nan)))


@pytest.mark.parametrize("bad", [None, np.nan, 40.0])
def test_accumulation_equals_one_large_batch_with_clip_skip_and_average(bad):
    """Uneven weights, effective clipping, and bad rows in one of four micro-batches."""
    one, four = (Toy(config_of(grad_accum=n, **{"optimizer.clip_norm": 0.3}), 2) for n in (1, 4))
    for index in range(8):
        batch = poisoned(bad) if bad is not None and index == 5 else batch_of(index)
        a, b = one.step(batch), four.step(batch)
        np.testing.assert_allclose([*b.values()], [*a.values()], rtol=1e-5)
    assert min(row["grad_norm"] for row in one.log) > 0.3
    assert one.log[-1]["skipped"] == (bad is not None)
    assert_equal(learned(four), learned(one), atol=1e-6)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_the_average_equals_pytorch(param_dtype):
    toy = Toy(config_of(**{"model.param_dtype": param_dtype}))

    def theirs():
        weights = np.asarray(toy.state.trainable[KERNEL], np.float32)
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(weights))

    module = torch.nn.Linear(4, 8, bias=False)
    theirs()
    update = torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    average = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=update)
    average.update_parameters(module)  # the first call copies
    for index in range(10):
        toy.step(batch_of(index))
        theirs()
        average.update_parameters(module)
    want = average.module.weight.detach().numpy()
    assert toy.state.ema[KERNEL].dtype == jnp.float32
    np.testing.assert_allclose(toy.state.ema[KERNEL], want, atol=1e-6)
    assert np.abs(want - np.asarray(toy.state.trainable[KERNEL], np.float32)).max() > 1e-3


def test_the_average_is_what_is_evaluated_and_exported():
    toy = Toy(config_of(), 8)
    for index in range(5):
        toy.step(batch_of(index))
    params = toy.state.params()
    assert set(params) == {KERNEL, BIAS, FROZEN}
    np.testing.assert_array_equal(params[KERNEL], toy.state.ema[KERNEL])
    assert toy.state.ema[KERNEL].sharding == toy.state.trainable[KERNEL].sharding
    evaluate = step_lib.make_eval_step(regression, grad_accum=1)
    held_out = batch_of(50)
    averaged, want = evaluate(toy.state, held_out).loss, regression(params, held_out).loss
    np.testing.assert_allclose(averaged, want, rtol=1e-6)
    plain = dataclasses.replace(toy.state, ema=None)
    assert abs(evaluate(plain, held_out).loss - averaged) > 1e-3
    np.testing.assert_array_equal(plain.params()[KERNEL], plain.trainable[KERNEL])


def test_resumed_equals_uninterrupted_with_average_and_counters(tmp_path):
    """Resumed between skipped steps, with a half-full window."""
    batches = [batch_of(i) for i in range(3)] + [poisoned(np.nan)] * 4 + [batch_of(i) for i in range(7, 14)]
    batches[11] = batch_of(11, scale=30)
    whole = Toy(config_of(), 8)
    for batch in batches:
        whole.step(batch)
    first = Toy(config_of(), 8)
    for batch in batches[:5]:
        first.step(batch)
    saved = run_checkpoints.RunCheckpoints(tmp_path)
    saved.save(5, first.state.to_tree(), {}, {})
    saved.wait()
    resumed = Toy(config_of(), 8)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), resumed.state.to_tree()
    )
    restored = run_checkpoints.RunCheckpoints(tmp_path).restore(abstract)
    assert restored is not None
    resumed.state = TrainState.from_tree(restored.state)
    for batch in batches[5:]:
        resumed.step(batch)
    assert str(resumed.log) == str(whole.log[5:])  # as text, since nan != nan
    assert whole.log[-1]["skipped"] == 5 and whole.log[6]["skipped_in_row"] == 4
    assert_equal(jax.tree.map(np.asarray, resumed.state), jax.tree.map(np.asarray, whole.state))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"skip.spike": 0.5}, "skip.spike=0.5"),
        ({"skip.window": 0}, "skip.window=0"),
        ({"skip.limit": 0}, "skip.limit=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        config_of(**change)
