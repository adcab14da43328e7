import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from vilam3_jax.configs import models

from vilam3_jax.errors import UserError
from vilam3_jax.models import build, param_paths
from vilam3_jax.plan import topology
from vilam3_jax.sharding import mesh as mesh_lib


def mesh_config(**axes):
    return mesh_lib.MeshConfig(**axes)


def shapes_of(name, task="generative"):
    return param_paths.flatten(build.abstract_model(models.get(name), task)[1])


def test_open_axis_takes_what_is_left():
    mesh = mesh_lib.build_mesh(mesh_config(fsdp=-1, tensor=2))
    assert mesh.shape == {"data": 1, "fsdp": jax.device_count() // 2, "context": 1, "tensor": 2}


@pytest.mark.parametrize(
    "axes", [dict(fsdp=3), dict(fsdp=-1, tensor=3), dict(fsdp=0), dict(data=-1, fsdp=-1)]
)
def test_a_mesh_that_does_not_fit_names_the_axes(axes):
    with pytest.raises(UserError, match="mesh"):
        mesh_lib.build_mesh(mesh_config(**axes))


@pytest.mark.parametrize("kind", ["generative", "contrastive"])
def test_every_large_parameter_is_split(kind):
    mesh = mesh_lib.build_mesh(mesh_config(fsdp=4, tensor=2))
    shapes, rules = shapes_of("tiny", kind), build.parameter_rules(models.get("tiny"), kind)
    placed = mesh_lib.parameter_shardings(shapes, (), rules, mesh)
    for path, leaf in shapes.items():
        if leaf.size >= 2048:
            shard = placed[path].shard_shape(leaf.shape)
            assert np.prod(shard) < leaf.size, path
    size = {path: leaf.size for path, leaf in shapes.items()}
    whole = sum(size[path] for path, sharding in placed.items() if sharding.is_fully_replicated)
    assert whole < 0.05 * sum(size.values())


def test_rules_that_leave_a_model_whole_are_refused():
    rules = ((r"llm/layers/.*", ()),), build.parameter_rules(models.get("vila_m3_8b"), "generative")
    shapes = shapes_of("vila_m3_8b")
    with pytest.raises(UserError, match=r"MiB would be replicated on every device, such as llm/layers/mlp/"):
        mesh_lib.parameter_shardings(shapes, *rules, mesh_lib.build_mesh(mesh_config(fsdp=8)))
    mesh_lib.parameter_shardings(shapes, *rules, mesh_lib.build_mesh(mesh_config(data=8, fsdp=1)))


def test_a_row_of_ones_own_must_match():
    rules = ((r"llm/layrs/.*", ("fsdp",)),), build.parameter_rules(models.get("tiny"), "generative")
    with pytest.raises(UserError, match=r"no parameter matches the row\(s\) llm/layrs"):
        mesh_lib.parameter_shardings(shapes_of("tiny"), *rules, mesh_lib.build_mesh(mesh_config(fsdp=8)))


def test_a_rule_for_an_unknown_parameter_is_missing():
    mesh = mesh_lib.build_mesh(mesh_config(fsdp=8))
    with pytest.raises(UserError, match="novel/kernel"):
        mesh_lib.parameter_shardings(
            {"novel/kernel": jax.ShapeDtypeStruct((8, 8), np.float32)}, ((r"llm/.*", ()),), (), mesh
        )


def test_a_dimension_that_does_not_split_is_named():
    mesh = mesh_lib.build_mesh(mesh_config(fsdp=8))
    with pytest.raises(UserError, match=r"llm/x of shape \(9, 4\) cannot be split into 8"):
        mesh_lib.parameter_shardings(
            {"llm/x": jax.ShapeDtypeStruct((9, 4), np.float32)}, ((r"llm/.*", ("fsdp",)),), (), mesh
        )


def test_batch_rows_must_divide():
    mesh = mesh_lib.build_mesh(mesh_config(fsdp=4, tensor=2))
    assert mesh_lib.batch_sharding("tokens", (8, 3), mesh, True).spec == PartitionSpec(("data", "fsdp"))
    with pytest.raises(UserError, match="global_rows"):
        mesh_lib.batch_sharding("tokens", (6, 3), mesh, True)


class Chip:
    """A device of a slice with the attributes that the mesh reads."""

    def __init__(self, *coords, platform="tpu"):
        self.coords, self.platform = coords, platform


@pytest.mark.parametrize(
    "torus, fsdp, line",
    [
        ((4, 4, 4), 64, 4),
        ((4, 4, 4), 16, 1),  # the rest is `tensor`, and `fsdp` a plane
        ((4, 8, 8), 256, 4),
        ((4, 8, 8), 64, 1),
        ((8, 8, 8), 512, 8),
        ((2, 2, 2), 8, 2),
        ((16, 16, 1), 256, 1),
        ((16, 16), 256, 1),
    ],
)
def test_fsdp_over_a_torus_of_three_dimensions_is_a_plane_and_a_line(torus, fsdp, line):
    assert mesh_lib._line(fsdp, [Chip(*place) for place in np.ndindex(*torus)]) == line
    assert mesh_lib._line(fsdp, [Chip(*place, platform="cpu") for place in np.ndindex(*torus)]) == 1


def test_rules_that_say_fsdp_mean_both_of_its_axes(monkeypatch):
    monkeypatch.setattr(mesh_lib, "_line", lambda fsdp, devices: 2)
    mesh = mesh_lib.build_mesh(mesh_config(fsdp=4, tensor=2))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "fsdp_line": 2, "context": 1, "tensor": 2}
    rules = ((r".*", ("tensor", "fsdp"), (None, ("fsdp", "tensor"))),)
    shapes = {path: jax.ShapeDtypeStruct((size, 8), np.float32) for path, size in (("even", 4), ("odd", 3))}
    placed = mesh_lib.parameter_shardings(shapes, rules, (), mesh)
    assert placed["even"].spec == PartitionSpec("tensor", ("fsdp", "fsdp_line"))
    assert placed["odd"].spec == PartitionSpec(None, ("fsdp", "fsdp_line", "tensor"))
    tokens = mesh_lib.batch_sharding("tokens", (8, 3), mesh, True)
    assert tokens.spec == PartitionSpec(("data", "fsdp", "fsdp_line"))


def test_what_does_not_divide_by_plane_and_line_is_split_over_the_plane(monkeypatch):
    monkeypatch.setattr(mesh_lib, "_line", lambda fsdp, devices: 4)
    mesh = mesh_lib.build_mesh(mesh_config(fsdp=8))
    rules = ((r".*", (None, "fsdp", "tensor")),)
    shapes = {path: jax.ShapeDtypeStruct((3, size, 8), np.float32) for path, size in (("a", 16), ("b", 18))}
    placed = mesh_lib.parameter_shardings(shapes, rules, (), mesh)
    assert placed["a"].spec == PartitionSpec(None, ("fsdp", "fsdp_line"), "tensor")
    assert placed["b"].spec == PartitionSpec(None, "fsdp", "tensor")
    with pytest.raises(UserError, match=r"\(3, 9, 8\) cannot be split into 8"):
        mesh_lib.parameter_shardings({"c": jax.ShapeDtypeStruct((3, 9, 8), np.float32)}, rules, (), mesh)


@pytest.mark.parametrize("name", ["2xv5e:2x4", "2xv5p:2x2x2"])
def test_slices_lie_along_data(name):
    pytest.importorskip("libtpu")
    devices = topology.parse(name).devices()
    mesh = mesh_lib.build_mesh(mesh_config(data=-1, fsdp=4, tensor=2), devices[::2] + devices[1::2])
    assert mesh.shape["data"] == 2 and mesh.size == 16
    for index, part in enumerate(mesh.devices):
        assert {device.slice_index for device in part.flat} == {index}
    with pytest.raises(UserError, match=r"mesh\.data=1: 2 slices"):
        mesh_lib.build_mesh(mesh_config(fsdp=-1, tensor=2), devices)


def test_hosts_of_gpus_are_no_slices():
    """For GPUs, XLA's `slice_index` is the number of the host."""
    gpu = dataclasses.make_dataclass("Gpu", ["id", "slice_index", ("platform", str, "gpu")])
    devices = [gpu(number, number // 8) for number in range(16)]
    assert mesh_lib._slices(devices) == [devices]


@pytest.mark.parametrize(
    "name,axes,block",
    [
        ("v6e:16x16", dict(data=-1, fsdp=64), (16, 4, 1)),
        ("v6e:8x16", dict(data=-1, fsdp=64), (4, 16, 1)),
        ("v5p:4x8x8", dict(data=-1, fsdp=128), (2, 8, 8)),
    ],
)
def test_parts_of_a_torus_hold_the_parameters_once_each(name, axes, block):
    """Sides that `fsdp` does not fill are cut into contiguous blocks."""
    pytest.importorskip("libtpu")
    mesh = mesh_lib.build_mesh(mesh_config(**axes), topology.parse(name).devices())
    for part in mesh.devices:
        places = np.asarray([device.coords for device in part.flat])
        assert tuple(np.ptp(places, axis=0) + 1) == block and len(np.unique(places, axis=0)) == len(places)
