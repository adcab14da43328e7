"""Names of slices, and durations of transfers."""

import pytest

from vilam3_jax.errors import UserError
from vilam3_jax.plan import estimate, hlo, topology
from vilam3_jax.runtime.chips import CHIPS


@pytest.mark.parametrize(
    "name,other,chips",
    [
        ("v5p:4x4x4", "v5p-128", 64),
        ("v5p:4x8x8", "v5p-512", 256),
        ("v5p:8x8x8", "v5p-1024", 512),
        ("v5p:2x2x1", "v5p-8", 4),
        ("v5p:4x4x12", "v5p-384", 192),
        ("v5p:4x8x12", "v5p-768", 384),
        ("tpu7x:2x4x4", "tpu7x-64", 32),
        ("v4:2x2x4", "v4-32", 16),
        ("v5e:16x16", "v5litepod-256", 256),
        ("v5e:2x4", "v5e-8", 8),
        ("v6e:16x16", "v6e-256", 256),
        ("tpu7x:4x4x4", "tpu7x-128", 64),
        ("2xv5p:4x4x4", "2xv5p-128", 128),
    ],
)
def test_both_names_are_the_same_slice(name, other, chips):
    one, two = topology.parse(name), topology.parse(other)
    assert one == two and one.chips == chips
    assert topology.parse(one.name) == topology.parse(one.product) == one


@pytest.mark.parametrize(
    "name,message",
    [
        ("v5x:4x4x4", "did you mean v5p:4x4x4"),
        ("h100-8", "Generations are v4, v5e, v5p, v6e, tpu7x"),
        ("v5p-129", "two a chip"),
        ("v5e-7", "slices have 1, 4, 8, 16, 32, 64, 128, 256 chips"),
        ("v5p-96", "slices have .* or a multiple of 64 chips"),
        ("v5p:16x16", "3 axes"),
        ("v5e:4x4x4", "2 axes"),
        ("", "unknown"),
        ("v5e-512", "slices have .* 256 chips. Several are named like 2xv5e:16x16"),
        ("v6e:32x8", "at most 16x16"),
        ("v5p:2x2x3", "no such slice; those of v5p are .*2x4x4, or multiples of 4"),
        ("v5p:2x2x8", "no such slice"),
        ("v5p:1x4x4", "no such slice"),
        ("v5e:16x2", "no such slice; those of v5e are .*8x16, 16x16$"),
        ("v6e:6x6", "no such slice"),
        ("v5e-2", "counts chips; slices have 1, 4, 8"),
        ("v5p-0", "slices have"),
        ("v5p-128000000000", "slices have"),
    ],
)
def test_other_names_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        topology.parse(name)


def test_libtpu_knows_the_slices_and_their_chips():
    for name in ("v4-32", "v5litepod-16", "v5p-16", "v6e-16", "tpu7x-16", "v5e-1", "2xv5p-16"):
        wanted = topology.parse(name)
        devices = wanted.devices()
        assert len(devices) == wanted.chips * wanted.chip.devices, name
        assert all(device.device_kind in wanted.chip.kinds for device in devices), name


def test_a_slice_that_libtpu_refuses_and_a_missing_libtpu_are_named(monkeypatch):
    with pytest.raises(UserError, match="3x3x3"):
        topology.Topology(CHIPS["v5p"], (3, 3, 3)).devices()
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"\.\[tpu\]"):
        topology.parse("v5p-16").devices()


def seconds(name, kind, payload, group):
    wanted = topology.parse(name)
    devices = sorted(wanted.devices(), key=lambda d: (getattr(d, "slice_index", 0) or 0, *d.coords, d.id))
    group = range(len(devices)) if group is None else group
    return estimate.transfer_seconds(hlo.Collective(kind, payload, tuple(group), False), wanted, devices)


def test_transfers_by_hand():
    # 64 chips, rings on three axes: six links of 100 GB/s.
    assert seconds("v5p:4x4x4", "all-gather", 6.4e9, None) == pytest.approx(6.3e9 / 600e9)
    # Along one axis of the cube: two links; an all-reduce sends twice.
    assert seconds("v5p:4x4x4", "all-reduce", 4e9, range(4)) == pytest.approx(2 * 3e9 / 200e9)
    # No ring in a slice of 4 x 4: one link of 50 GB/s on each axis.
    assert seconds("v5e:4x4", "reduce-scatter", 1.6e9, None) == pytest.approx(1.5e9 / 100e9)
    assert seconds("v5e:16x16", "all-gather", 2.56e9, None) == pytest.approx(2.55e9 / 200e9)
    assert seconds("v5p:4x4x4", "collective-permute", 1e9, (0, 1)) == pytest.approx(1e9 / 100e9)
    # Two slices: an all-reduce inside, then of an eighth between them at 6.25 GB/s.
    inside = 2 * 0.8e9 * 7 / 8 / 300e9
    assert seconds("2xv5p-16", "all-reduce", 0.8e9, None) == pytest.approx(inside + 0.1e9 / 6.25e9)
