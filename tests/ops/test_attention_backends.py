"""The registry of attention backends: which one computes a call, and the reasons given."""

from __future__ import annotations

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention_reference import dense, inputs, packed, self_attention
from vilam3_jax.errors import UserError
from vilam3_jax.ops.attention import MaskInfo, attention, backends, splash
from vilam3_jax.ops.attention.backends import AttentionCall, Support


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, so that what a test registers is forgotten."""
    copy = dict(backends._loaded())
    monkeypatch.setattr(backends, "_registry", copy)
    return copy


def call_on(platform, dtype=jnp.bfloat16, shape=(2, 512, 8, 64), automatic=True, query_shards=1, **mask):
    return AttentionCall(
        platform=platform,
        q=jax.ShapeDtypeStruct(shape, dtype),
        kv_len=shape[1],
        mask=MaskInfo(**{"causal": True, **mask}),
        query_shards=query_shards,
        automatic=automatic,
    )


class Toy:
    """Returns its values for the queries, if the head size is 8."""

    name = "toy"

    def __init__(self):
        self.calls = []

    def supports(self, call):
        return Support(call.q.shape[3] == 8, f"needs heads of 8, not {call.q.shape[3]}")

    def __call__(self, q, k, v, mask, sharded):
        self.calls.append((mask, sharded))
        return jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)


def test_kernels_come_before_xla():
    assert list(backends._loaded())[:3] == ["xla", "cudnn", "splash"]
    assert backends.names() == ("auto", "ring", "cudnn", "splash", "xla")


@pytest.mark.parametrize(
    "call, name",
    [
        (call_on("cpu"), "xla"),
        (call_on("tpu"), "splash"),
        (call_on("tpu", shape=(2, 1, 8, 64), causal=False), "xla"),  # pooling probe
        (call_on("tpu", jnp.float32, (2, 128, 8, 72)), "splash"),
        (call_on("gpu"), "cudnn"),
        (call_on("gpu", jnp.float32), "xla"),
        (call_on("gpu", shape=(2, 512, 8, 256)), "xla"),
        (call_on("gpu", shape=(2, 100, 8, 64)), "xla"),
        (call_on("gpu", query_shards=4), "xla"),
        (call_on("gpu", window=100), "cudnn"),
        (call_on("tpu", window=100), "splash"),
        (call_on("tpu", q_positions=jnp.zeros((2, 512)), kv_positions=jnp.zeros((2, 512))), "xla"),
    ],
)
def test_the_first_that_supports_a_call_is_chosen(call, name):
    assert backends.select(call).name == name


@pytest.mark.parametrize(
    "call, lines",
    [
        (
            call_on("cpu"),
            [
                "splash: is a kernel for TPUs, and the devices are cpu",
                "cudnn: is a kernel for NVIDIA GPUs, and the devices are cpu",
                "xla: supported",
            ],
        ),
        (
            call_on("gpu", jnp.float32),
            [
                "splash: is a kernel for TPUs, and the devices are gpu",
                "cudnn: needs bfloat16 or float16, not float32; set model.dtype",
                "xla: supported",
            ],
        ),
        (
            call_on("gpu", shape=(2, 512, 8, 160)),
            [
                "splash: is a kernel for TPUs, and the devices are gpu",
                "cudnn: needs a head size up to 128 that is a multiple of 8, not 160",
                "xla: supported",
            ],
        ),
        (
            call_on("gpu", query_shards=2),
            [
                "splash: is a kernel for TPUs, and the devices are gpu",
                "cudnn: supports only whole rows; set activation_rules.queries to ''",
                "xla: supported",
            ],
        ),
        (
            call_on("tpu", shape=(2, 127, 8, 64)),
            [
                "splash: pads 127 queries, fewer than 128, to a block",
                "cudnn: is a kernel for NVIDIA GPUs, and the devices are tpu",
                "xla: supported",
            ],
        ),
        (
            call_on("gpu", shape=(2, 127, 8, 64)),
            [
                "splash: is a kernel for TPUs, and the devices are gpu",
                "cudnn: is not worth it for 127 queries",
                "xla: supported",
            ],
        ),
    ],
)
def test_explain_gives_reasons_in_the_order_tried(call, lines):
    assert backends.explain(call) == lines


def test_a_named_backend_takes_calls_that_it_declines_by_default():
    few = dict(shape=(2, 5, 8, 64))
    assert backends.select(call_on("tpu", **few)).name == "xla"
    with backends.use("splash"):
        assert backends.select(call_on("tpu", automatic=False, **few)).name == "splash"
    with backends.use("cudnn"):
        assert backends.select(call_on("gpu", automatic=False, **few)).name == "cudnn"


def test_a_named_backend_that_cannot_is_refused_with_its_reason():
    message = (
        r"config attention='cudnn' needs bfloat16 or float16, not float32; set model\.dtype; "
        "or set attention to 'auto' or 'xla'"
    )
    with backends.use("cudnn"), pytest.raises(UserError, match=message):
        backends.select(call_on("gpu", jnp.float32, automatic=False))


def test_declined_calls_are_logged(caplog):
    with caplog.at_level(logging.DEBUG, logger=backends.logger.name):
        backends.select(call_on("cpu"))
    assert [record.message for record in caplog.records] == [
        "attention of bfloat16 (2, 512, 8, 64): splash is a kernel for TPUs, and the devices are cpu",
        "attention of bfloat16 (2, 512, 8, 64): cudnn is a kernel for NVIDIA GPUs, and the devices are cpu",
    ]


def test_an_interpreted_kernel_runs_only_if_named(monkeypatch):
    monkeypatch.setattr(splash, "INTERPRET", True)
    assert splash.SPLASH.supports(call_on("cpu", automatic=False))
    assert not splash.SPLASH.supports(call_on("cpu"))


def test_unknown_names_are_refused():
    with pytest.raises(
        UserError, match="config attention='flash': must be one of auto, ring, cudnn, splash, xla"
    ):
        backends.check_choice("flash")
    for name in backends.names():
        backends.check_choice(name)


def test_the_choice_ends_with_its_context():
    assert backends.choice() == "auto"
    with backends.use("xla"):
        with backends.use("ring"):
            assert backends.choice() == "ring"
        assert backends.choice() == "xla"
    assert backends.choice() == "auto"


def test_a_registered_backend_is_tried_first(registry):
    toy = Toy()
    backends.register(toy)
    assert backends.names() == ("auto", "ring", "cudnn", "splash", "toy", "xla")
    backends.check_choice("toy")
    assert backends.explain(call_on("cpu"))[0] == "toy: needs heads of 8, not 64"
    q, k, v = inputs(heads=6, kv_heads=2, width=8)
    ids = packed(9)
    np.testing.assert_array_equal(self_attention(ids, causal=True)(q, k, v), np.repeat(v, 3, axis=2))
    ((mask, sharded),) = toy.calls
    assert sharded and mask.causal and mask.window is None
    np.testing.assert_array_equal(mask.segment_ids_q, ids)


def test_a_registered_backend_is_passed_over_or_refused(registry):
    toy = Toy()
    backends.register(toy)
    q, k, v = inputs(width=16)
    want = self_attention(causal=True)(q, k, v)
    assert not toy.calls
    with backends.use("xla"):
        np.testing.assert_array_equal(self_attention(causal=True)(q, k, v), want)
    message = "config attention='toy' needs heads of 8, not 16; or set attention to 'auto' or 'xla'"
    with backends.use("toy"), pytest.raises(UserError, match=message):
        self_attention(causal=True)(q, k, v)


def test_cached_generation_goes_to_xla_whatever_is_named(registry):
    toy = Toy()
    backends.register(toy)
    q, k, v = inputs(q_len=1, kv_len=6)
    mask = MaskInfo(q_positions=jnp.full((2, 1), 3), kv_positions=jnp.arange(6)[None], causal=True)
    with backends.use("toy"):
        got = attention(q, k, v, mask)
    assert not toy.calls
    np.testing.assert_allclose(got, dense(q, k[:, :4], v[:, :4], np.ones((2, 1, 4), bool)), atol=2e-6)


def test_a_later_backend_replaces_an_earlier_one_of_its_name(registry):
    first, second = Toy(), Toy()
    backends.register(first)
    backends.register(second)
    assert list(registry).count("toy") == 1
    self_attention(causal=True)(*inputs())
    assert not first.calls and len(second.calls) == 1


def test_an_entry_point_is_loaded_once(registry, monkeypatch):
    loads = []
    entry = types.SimpleNamespace(name="toy", load=lambda: loads.append(Toy()) or loads[-1])
    monkeypatch.setattr(backends.importlib.metadata, "entry_points", lambda group: [entry])
    backends.check_choice("toy")
    assert "toy" in backends.names() and backends.explain(call_on("cpu"))[0].startswith("toy:")
    self_attention(causal=True)(*inputs())
    assert len(loads) == 1 and len(loads[0].calls) == 1
