import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from vilam3_jax.configs import models

from vilam3_jax import config as config_lib
from vilam3_jax.errors import UserError
from vilam3_jax.models import trees, vila
from vilam3_jax.training import mesh as mesh_lib


def mesh_config(**axes):
    config = config_lib.base_config().mesh
    config.update(axes)
    return config


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
    _, nested = vila.abstract_model(models.get("tiny"), kind)
    shapes = trees.flatten(nested)
    placed = mesh_lib.parameter_shardings(shapes, config_lib.PARAMETER_RULES, mesh)
    for path, leaf in shapes.items():
        if leaf.size >= 2048:
            shard = placed[path].shard_shape(leaf.shape)
            assert np.prod(shard) < leaf.size, path
    assert mesh_lib.replicated_fraction(shapes, placed) < 0.05


def test_a_rule_for_an_unknown_parameter_is_missing():
    mesh = mesh_lib.build_mesh(mesh_config(fsdp=8))
    with pytest.raises(UserError, match="novel/kernel"):
        mesh_lib.parameter_shardings(
            {"novel/kernel": jax.ShapeDtypeStruct((8, 8), np.float32)}, ((r"llm/.*", ()),), mesh
        )


def test_a_dimension_that_does_not_split_is_named():
    mesh = mesh_lib.build_mesh(mesh_config(fsdp=8))
    with pytest.raises(UserError, match=r"llm/x.*\(9, 4\).*8 ways"):
        mesh_lib.parameter_shardings(
            {"llm/x": jax.ShapeDtypeStruct((9, 4), np.float32)}, ((r"llm/.*", ("fsdp",)),), mesh
        )


def test_batch_rows_must_divide():
    mesh = mesh_lib.build_mesh(mesh_config(fsdp=4, tensor=2))
    placed = mesh_lib.batch_shardings({"tokens": np.zeros((8, 3))}, mesh)
    assert placed["tokens"].spec == PartitionSpec(("data", "fsdp"))
    with pytest.raises(UserError, match="global_rows"):
        mesh_lib.batch_shardings({"tokens": np.zeros((6, 3))}, mesh)
