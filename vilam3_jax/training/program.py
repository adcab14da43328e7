"""The program of a run, built from config and mesh: `train` runs it, `plan` analyses it.

Nothing here reads data or allocates parameters, so it also works for ahead-of-time topologies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vilam3_jax.data.batch_formats import batch_shapes
from vilam3_jax.data.batches import SEQUENCE_FIELDS, Batch, PackedBatch, map_fields
from vilam3_jax.errors import UserError
from vilam3_jax.models import build as build_lib
from vilam3_jax.models import param_paths
from vilam3_jax.ops import quantized
from vilam3_jax.ops.attention import backends
from vilam3_jax.runtime import chips
from vilam3_jax.sharding import logical_axes, weights
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.tasks import TASKS, Task
from vilam3_jax.training import frozen_kernels, initialization, train_state
from vilam3_jax.training import optimizer as optimizer_lib
from vilam3_jax.training import step as step_lib
from vilam3_jax.training.run_config import RunConfig
from vilam3_jax.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Program:
    """The step of a run and its shapes; made by `build`.

    Attributes:
      config, task: of the run.
      mesh: mesh of real devices, or of a described topology.
      shapes: path → ShapeDtypeStruct of every parameter.
      lr_multipliers: path → learning-rate multiplier, 0 for frozen parameters.
      optimizer: optimizer of the trainable parameters.
      loss_fn: (parameters by path, batch) → sums.
      state, batch: ShapeDtypeStructs with shardings of the global arrays.
      step: jitted (state, batch) → (state, metrics); donates the state.
    """

    config: RunConfig
    task: Task
    mesh: Mesh
    shapes: Mapping[str, Any]
    lr_multipliers: Mapping[str, float]
    optimizer: optax.GradientTransformation
    loss_fn: step_lib.LossFn
    state: TrainState
    batch: Batch
    step: Any

    @property
    def compiler_options(self) -> dict[str, Any]:
        """XLA options of the step."""
        return compiler_options(self.config.compiler_options, self.mesh)

    @contextlib.contextmanager
    def context(self, whole_rows: bool = False) -> Iterator[None]:
        """Context for tracing; `whole_rows` does not split rows over devices, as for generation."""
        rules = {**self.config.activation_rules, **({"length": None} if whole_rows else {})}
        with logical_axes.activation_rules(self.mesh, rules), backends.use(self.config.attention):
            yield

    def annotate(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters by path, with matrices as `sharding.weights.Weight`."""
        return weights.annotate(params, train_state.shardings(self.state.all_params()))

    def initial_state(self) -> tuple[TrainState, dict[str, str]]:
        """See `initialization.initial_state`."""
        config = self.config
        return initialization.initial_state(
            config.init,
            config.model,
            lambda key: build_lib.init_params(config.model, config.task, key),
            config.seed,
            config.skip,
            self.state,
            self.optimizer,
        )

    def lower(self) -> Any:
        """Traces the step; call `.compile()` on the result to run it, `.as_text()` for its StableHLO."""
        with self.context():
            return self.step.lower(self.state, self.batch)


def build(config: RunConfig, mesh: Mesh) -> Program:
    """Builds the program of a run, without tracing or compiling.

    Raises:
      UserError: model, rules, batch and mesh do not match.
    """
    task, model = TASKS[config.task], config.model
    graphdef, nested = build_lib.abstract_model(model, config.task)
    shapes = param_paths.flatten(nested)
    groups = optimizer_lib.lr_groups(config.trainable, list(shapes))
    lr_multipliers = {path: group.rate for path, group in groups.items()}
    schedule = optimizer_lib.learning_rate(config.schedule, config.num_steps)
    optimizer = optimizer_lib.make_optimizer(
        config.optimizer, schedule, {path: group for path, group in groups.items() if group.rate}
    )
    state = _abstract_state(config, mesh, shapes, lr_multipliers, optimizer)
    loss_fn = _loss_fn(config, task, graphdef, state, shapes)
    step = step_lib.make_train_step(
        loss_fn,
        functools.partial(task.work, model),
        optimizer,
        schedule,
        config.skip,
        grad_accum=config.grad_accum,
        ema_decay=config.ema_decay,
    )
    batch = abstract_batch(config, task, mesh)
    state_shardings = train_state.shardings(state)
    jitted = jax.jit(
        step,
        in_shardings=(state_shardings, train_state.shardings(batch)),
        out_shardings=(state_shardings, None),
        donate_argnums=0,
        compiler_options=compiler_options(config.compiler_options, mesh),
    )
    return Program(config, task, mesh, shapes, lr_multipliers, optimizer, loss_fn, state, batch, jitted)


def _abstract_state(
    config: RunConfig,
    mesh: Mesh,
    shapes: Mapping[str, Any],
    lr_multipliers: Mapping[str, float],
    optimizer: optax.GradientTransformation,
) -> TrainState:
    family_rules = build_lib.parameter_rules(config.model, config.task)
    shardings = mesh_lib.parameter_shardings(shapes, config.parameter_rules, family_rules, mesh)
    params = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in shapes.items()
    }
    stored = {**params, **frozen_kernels.abstract(config.quantization, params, lr_multipliers)}
    return train_state.abstract_state(
        {path: leaf for path, leaf in params.items() if lr_multipliers[path]},
        {path: leaf for path, leaf in stored.items() if not lr_multipliers[path]},
        optimizer,
        config.skip,
        mesh,
        with_ema=bool(config.ema_decay),
    )


def _loss_fn(
    config: RunConfig, task: Task, graphdef: Any, state: TrainState, shapes: Mapping[str, Any]
) -> step_lib.LossFn:
    """The loss as a function of parameters by path and a batch, with quantised products if configured."""
    quantization, einsums = config.quantization, {}
    if quantization.matmul:
        quantized.check_installed("config quantization.matmul", "leave the key empty")
        how = quantized.QuantizedMatmul(quantization.matmul, quantization.gradients)
        einsums = dict.fromkeys(quantization.matching(shapes), how)
    shardings = train_state.shardings(state.all_params())

    def loss_fn(params: step_lib.Flat, batch: Any) -> step_lib.LossSums:
        annotated = weights.annotate(params, shardings, einsums)
        return task.loss(
            build_lib.merge(graphdef, param_paths.unflatten(annotated)), batch, config.loss_chunk
        )

    return loss_fn


# The first two control how the tensor cores share the sparse cores; `2d_all_gather` covers gathers over a
# plane of the torus.
ON_SPARSE_CORES = (
    "xla_sc_disable_megacore_partitioning",
    "xla_tpu_use_tc_device_shape_on_sc",
    "xla_tpu_enable_sparse_core_collective_offload_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
)


def compiler_options(overrides: Sequence[Any], mesh: Mesh) -> dict[str, Any]:
    """XLA options; `overrides` are the rows of `config.compiler_options`.

    On TPUs, operations may use more vector memory than by default. Sparse cores, if any, gather weights and
    scatter gradients in parallel with products.
    """
    chip = chips.of_kind(mesh.devices.flat[0].device_kind)
    options: dict[str, Any] = {}
    if chip is not None and chip.scoped_vmem_kib:
        options["xla_tpu_scoped_vmem_limit_kib"] = chip.scoped_vmem_kib
    if chip is not None and chip.sparse_cores:
        options |= dict.fromkeys(ON_SPARSE_CORES, True)
    return options | dict(overrides)


def check_compiler_options(overrides: Sequence[Any], mesh: Mesh) -> None:
    """Tries `config.compiler_options` on an empty program.

    Raises:
      UserError: an option is unknown, or a value has the wrong type.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    program = jax.jit(lambda: 0, out_shardings=sharding, compiler_options=compiler_options(overrides, mesh))
    try:
        program.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"config compiler_options: {str(error).splitlines()[0]}") from error


def abstract_batch(config: RunConfig, task: Task, mesh: Mesh) -> Batch:
    """The global batch of a run, of ShapeDtypeStructs with shardings.

    Raises:
      UserError: a leading axis is not divisible over the mesh.
    """

    def abstract(name: str, leaf: Any) -> Any:
        sharding = field_sharding(name, leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    batch = map_fields(abstract, batch_shapes(task.batch_format(config.data, config.model)))
    devices = math.prod(size for axis, size in mesh.shape.items() if axis not in ("context", "tensor"))
    groups = config.data.groups // config.grad_accum
    if isinstance(batch, PackedBatch) and groups % devices:
        raise UserError(
            f"config grad_accum={config.grad_accum}: {groups} groups of rows at a time are not divisible by "
            f"the {devices} devices of data x fsdp; raise data.global_rows or lower grad_accum"
        )
    return batch


def field_sharding(name: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """The sharding of a batch field."""
    return mesh_lib.batch_sharding(name, shape, mesh, name in SEQUENCE_FIELDS)
