"""The compiled program of a run, from config and mesh alone: what `train` runs and `plan` looks at.

Nothing here reads data or allocates a parameter, so the devices of the mesh need not exist.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vilam3_jax.config import ConfigDict
from vilam3_jax.data import batch_sizes
from vilam3_jax.data.batches import Batch
from vilam3_jax.errors import UserError
from vilam3_jax.models import param_paths, vila
from vilam3_jax.sharding import logical_axes
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import chips
from vilam3_jax.training import optimizer as optimizer_lib
from vilam3_jax.training import state as state_lib
from vilam3_jax.training import step as step_lib


@dataclasses.dataclass(frozen=True)
class Program:
    """A run's step and the shapes that it works on; made by `build`.

    Attributes:
      config: the run's config.
      mesh: of real devices, or of those of a topology that is only described.
      shapes: path → ShapeDtypeStruct of every parameter.
      rates: path → learning-rate multiplier, 0 for frozen parameters.
      optimizer: over the trainable parameters.
      loss_fn: (flat params, batch) → sums.
      state: ShapeDtypeStructs with shardings of the whole state.
      batch: the global batch, of ShapeDtypeStructs with shardings.
      step: jitted (state, batch) → (state, metrics); it donates the state.
    """

    config: ConfigDict
    mesh: Mesh
    shapes: Mapping[str, Any]
    rates: Mapping[str, float]
    optimizer: optax.GradientTransformation
    loss_fn: step_lib.LossFn
    state: state_lib.State
    batch: Batch
    step: Any

    def placing(self, whole_rows: bool = False) -> AbstractContextManager[None]:
        """Context in which steps of this program are traced: where activations and weights live.

        Args:
          whole_rows: no row is split over devices, as for generation with a cache.
        """
        weights = state_lib.shardings({**self.state["frozen"], **self.state["trainable"]})
        rules = self.config.activation_rules.to_dict() | ({"length": None} if whole_rows else {})
        return logical_axes.activation_rules(self.mesh, rules, self.config.attention, weights)

    def lower(self) -> Any:
        """Traces the step; `.compile()` of the result is what runs, `.as_text()` its StableHLO."""
        with self.placing():
            return self.step.lower(self.state, self.batch)


def build(config: ConfigDict, mesh: Mesh) -> Program:
    """Puts the program of a run together; neither traces nor compiles.

    Raises:
      UserError: model, tables, batch or mesh do not fit each other.
    """
    graphdef, nested = vila.abstract_model(config.model, config.kind)
    shapes = param_paths.flatten(nested)
    rates = optimizer_lib.multipliers(config, list(shapes))
    step_lib.check_quantization(config, graphdef, nested)
    optimizer = optimizer_lib.make_optimizer(config, {path: rate for path, rate in rates.items() if rate})
    loss_fn = step_lib.make_loss(config, graphdef)
    step = step_lib.make_train_step(config, loss_fn, optimizer, optimizer_lib.learning_rate(config))
    state = state_lib.abstract_state(config, mesh, optimizer, rates)
    batch = abstract_batch(config, mesh)
    placed = state_lib.shardings(state)
    jitted = jax.jit(
        step,
        in_shardings=(placed, jax.tree.map(lambda leaf: leaf.sharding, batch)),
        out_shardings=(placed, None),
        donate_argnums=0,
        compiler_options=compiler_options(config, mesh),
    )
    return Program(config, mesh, shapes, rates, optimizer, loss_fn, state, batch, jitted)


# The first two say how a program of both tensor cores shares the sparse cores; of the gathers, the second is
# the one over a plane of the torus.
ON_SPARSE_CORES = (
    "xla_sc_disable_megacore_partitioning",
    "xla_tpu_use_tc_device_shape_on_sc",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
)


def compiler_options(config: ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """What XLA is told beside the program; `config.compiler_options` has the last word.

    On TPUs an operation may use more of the vector memory than XLA gives it by itself, and where there are
    sparse cores, these gather weights and scatter gradients beside the products.
    """
    chip = chips.of_kind(mesh.devices.flat[0].device_kind)
    options: dict[str, Any] = {}
    if chip is not None and chip.scoped_vmem_kib:
        options["xla_tpu_scoped_vmem_limit_kib"] = chip.scoped_vmem_kib
    if chip is not None and chip.sparse_cores:
        options |= dict.fromkeys(ON_SPARSE_CORES, True)
    return options | dict(config.compiler_options)


def check_compiler_options(config: ConfigDict, mesh: Mesh) -> None:
    """Tries `config.compiler_options` on a program that does nothing.

    Raises:
      UserError: XLA does not know a name, or a value is not of its type.
    """
    placed = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(lambda: 0, out_shardings=placed, compiler_options=compiler_options(config, mesh))
    try:
        program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"config compiler_options: {str(error).splitlines()[0]}") from error


def abstract_batch(config: ConfigDict, mesh: Mesh) -> Batch:
    """The global batch of the loader of `config`, of ShapeDtypeStructs with shardings.

    Raises:
      UserError: a leading axis does not divide over the mesh.
    """
    shapes = batch_sizes.batch_shapes(config, vila.tokens_per_image(config.model))
    placed = mesh_lib.batch_shardings(shapes, mesh)
    ways = math.prod(size for axis, size in mesh.shape.items() if axis not in ("context", "tensor"))
    if config.kind == "generative":
        groups = config.data.global_rows // config.data.rows_per_group // config.grad_accum
        if groups % ways:
            raise UserError(
                f"config grad_accum={config.grad_accum}: {groups} groups of rows at a time do not divide "
                f"over the {ways} devices of data x fsdp; raise data.global_rows or lower grad_accum"
            )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, placed
    )
