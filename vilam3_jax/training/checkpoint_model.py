"""The model in a checkpoint of a training run, as an export of it would be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from vilam3_jax.checkpoints import run_checkpoints
from vilam3_jax.checkpoints.exports import Abstract, Flat
from vilam3_jax.data.experts.cards import with_card_list
from vilam3_jax.ops import quantized_loading
from vilam3_jax.ops.quantized import QuantizedKernel
from vilam3_jax.runtime import paths
from vilam3_jax.runtime.settings import from_mapping
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib
from vilam3_jax.training.run_config import RENAMED_KEYS, RunConfig
from vilam3_jax.training.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class CheckpointModel:
    """An opened checkpoint; with `config.ema_decay`, its parameters are the moving average.

    Attributes:
      folder: the checkpoint.
      step: its step.
      config: model config with `kind`, as an export has it.
      tokenizer: folder of the tokenizer; "" for none.
      shapes: path → ShapeDtypeStruct of every parameter.
      provenance: data and licences of the run, and the step.
      places: path → (field of the state, ShapeDtypeStruct or a `QuantizedKernel` of them).
    """

    folder: epath.Path
    step: int
    config: dict[str, Any]
    tokenizer: str
    shapes: Abstract
    provenance: dict[str, Any]
    places: Mapping[str, tuple[str, Any]]

    def read(self, wanted: Abstract) -> Flat:
        """Reads parameters one by one, straight onto their devices.

        Args:
          wanted: path → ShapeDtypeStruct with sharding; dtypes are converted.

        Raises:
          UserError: the checkpoint is damaged.
        """
        return {path: self._read(path, leaf) for path, leaf in wanted.items()}

    def _read(self, path: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        field, stored = self.places[path]
        if isinstance(stored, QuantizedKernel):
            placed: Any = quantized_loading.abstract(path, wanted.update(dtype=stored.dtype), stored.kind)
        else:
            placed = stored.update(sharding=wanted.sharding)
        value = run_checkpoints.read_state(self.folder, {field: {path: placed}})[field][path]
        if isinstance(value, QuantizedKernel):
            value = jax.jit(QuantizedKernel.dequantize, out_shardings=wanted.sharding)(value)
        return value.astype(wanted.dtype)


def open_checkpoint(workdir: paths.PathLike, step: int | None = None) -> CheckpointModel:
    """Opens a checkpoint of a run, which may be in progress, without reading its parameters.

    Args:
      workdir: folder of the run.
      step: which checkpoint; the newest one by default.

    Raises:
      UserError: the run has no such checkpoint, or it is damaged.
    """
    folder, step = run_checkpoints.find(workdir, step)
    run = run_checkpoints.read_run(folder)
    config = from_mapping(RunConfig, run["config"], RENAMED_KEYS)
    mesh_config = mesh_lib.MeshConfig()
    mesh = mesh_lib.build_mesh(mesh_config, jax.devices()[:1])
    program = program_lib.build(dataclasses.replace(config, mesh=mesh_config, compiler_options=()), mesh)
    return CheckpointModel(
        folder,
        step,
        {**with_card_list(config.model.to_dict()), "kind": config.task},
        config.model.tokenizer,
        program.shapes,
        {**run.get("provenance", {}), "step": step},
        _places(program.state),
    )


def _places(state: TrainState) -> dict[str, tuple[str, Any]]:
    """`CheckpointModel.places`, as `TrainState.params` chooses them."""
    fields: Mapping[str, Mapping[str, Any]] = {
        "frozen": state.frozen,
        "trainable": state.trainable,
        "ema": state.ema or {},
    }
    return {path: (name, leaf) for name, leaves in fields.items() for path, leaf in leaves.items()}
