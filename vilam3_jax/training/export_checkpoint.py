"""`vilam3 export`: an export of any checkpoint of a training run, on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
from etils import epath

from vilam3_jax.checkpoints import exports
from vilam3_jax.runtime import paths
from vilam3_jax.training.checkpoint_model import open_checkpoint


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
    model = open_checkpoint(workdir, step)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded: dict[str, jax.Array] = {}

    def make(leaf: exports.Leaf) -> jax.Array:
        if leaf.path not in loaded:  # consecutive leaves are rows of one parameter
            loaded.clear()
            loaded.update(model.read({leaf.path: model.shapes[leaf.path].update(sharding=place)}))
        value = loaded[leaf.path]
        return value if leaf.key == leaf.path else value[leaf.start : leaf.start + leaf.shape[0]]

    target = paths.as_path(out) if out else paths.as_path(workdir) / f"export_step_{model.step}"
    tokenizer = model.tokenizer or None
    exports.write_export(target, model.shapes, make, model.config, tokenizer, lambda: model.provenance)
    return target


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
