"""`vilam3 export`: an export of any checkpoint of a training run, on this machine."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from vilam3_jax.checkpoints import exports, run_checkpoints
from vilam3_jax.data.experts.cards import with_card_list
from vilam3_jax.ops.quantized import QuantizedKernel
from vilam3_jax.runtime import paths
from vilam3_jax.runtime.settings import from_mapping
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib
from vilam3_jax.training.run_config import RENAMED_KEYS, RunConfig
from vilam3_jax.training.train_state import TrainState


def export_checkpoint(
    workdir: paths.PathLike, step: int | None = None, out: paths.PathLike | None = None
) -> epath.Path:
    """Writes an export of a run's checkpoint; the run may be in progress.

    One parameter is in memory at a time. With `config.ema_decay`, the moving average is exported.

    Args:
      workdir: folder of the run.
      step: which checkpoint; the newest one by default.
      out: folder to write, by default `<workdir>/export_step_N`.

    Raises:
      UserError: the run has no such checkpoint, or it is damaged.
    """
    folder, step = run_checkpoints.find(workdir, step)
    run = run_checkpoints.read_run(folder)
    config = from_mapping(RunConfig, run["config"], RENAMED_KEYS)
    mesh_config = mesh_lib.MeshConfig()
    mesh = mesh_lib.build_mesh(mesh_config, jax.devices()[:1])
    program = program_lib.build(dataclasses.replace(config, mesh=mesh_config, compiler_options=()), mesh)
    places = _places(program.state)
    loaded: dict[str, Any] = {}

    def make(leaf: exports.Leaf) -> Any:
        if leaf.path not in loaded:  # consecutive leaves are rows of one parameter
            loaded.clear()
            field, wanted = places[leaf.path]
            value = run_checkpoints.read_state(folder, {field: {leaf.path: wanted}})[field][leaf.path]
            loaded[leaf.path] = value.dequantize() if isinstance(value, QuantizedKernel) else value
        value = loaded[leaf.path].astype(leaf.dtype)
        return value if leaf.key == leaf.path else value[leaf.start : leaf.start + leaf.shape[0]]

    target = paths.as_path(out) if out else paths.as_path(workdir) / f"export_step_{step}"
    model = {**with_card_list(config.model.to_dict()), "kind": config.task}
    provenance = {**run.get("provenance", {}), "step": step}
    tokenizer = config.model.tokenizer or None
    exports.write_export(target, program.shapes, make, model, tokenizer, lambda: provenance)
    return target


def _places(state: TrainState) -> dict[str, tuple[str, Any]]:
    """Path of a parameter → (field of the state, abstract value), as `TrainState.params` chooses them."""
    fields: Mapping[str, Mapping[str, Any]] = {
        "frozen": state.frozen,
        "trainable": state.trainable,
        "ema": state.ema or {},
    }
    return {path: (name, leaf) for name, leaves in fields.items() for path, leaf in leaves.items()}


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 export`."""
    parser = argparse.ArgumentParser(
        prog="vilam3 export", description="Make an export of any checkpoint of a training run."
    )
    parser.add_argument("--workdir", required=True, help="folder of the run; it may still be training")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--out", help="folder to write (default: WORKDIR/export_step_N)")
    options = parser.parse_args(argv)
    print(export_checkpoint(options.workdir, options.step, options.out))
    return 0
