"""Attention by a chosen backend, on a mesh of virtual devices."""

from __future__ import annotations

import jax
import pytest

from vilam3_jax.ops.attention import backends, blockwise, splash, xla
from vilam3_jax.runtime import compat
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding.logical_axes import ACTIVATION_RULES

CHOICES = {"splash": "splash", "exchange_splash": "splash", "ring": "ring"}


@pytest.fixture
def run(monkeypatch):
    """`run(implementation, function, *args)`, jitted anew; blocks are small, so that rows have several."""
    monkeypatch.setattr(splash, "INTERPRET", True)
    monkeypatch.setattr(splash, "BLOCK", 128)
    monkeypatch.setattr(splash, "COMPUTE_BLOCK", 128)
    monkeypatch.setattr(splash, "MAX_FUSED", 128)
    monkeypatch.setattr(blockwise, "BLOCK", 16)

    def run(implementation, function, *args, fsdp=1, context=2, tensor=1, **rules):
        split = implementation in ("exchange", "exchange_splash", "ring")
        mesh = compat.make_mesh(
            (fsdp, context if split else 1, tensor),
            ("fsdp", "context", "tensor"),
            jax.devices()[: fsdp * tensor * (context if split else 1)],
        )
        rules = {**ACTIVATION_RULES, "batch": "fsdp", "length": "context" if split else None, **rules}
        monkeypatch.setattr(xla, "MAX_SHORT", 10**6 if implementation == "short" else 8)
        choice = CHOICES.get(implementation, "xla")
        with logical_axes.activation_rules(mesh, rules), backends.use(choice):
            return jax.jit(lambda *values: function(*values))(*args)

    return run
