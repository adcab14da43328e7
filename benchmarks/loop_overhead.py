"""What the train loop adds to a step: the compiled step alone, and the same steps through telemetry and loop.

    python benchmarks/loop_overhead.py [--steps=20] [--rounds=6] [--rows=8] [--log_every=1]

Both run the same compiled step on the same batches in one process, in turns. `bare` calls it and nothing
else; `loop` does what `vilam3_jax/train.py` does around it: takes the batch, moves it to the device, follows
the step and writes every figure (JSON lines and TensorBoard) at each logged step. Reading images from a disk
is the loader's part and not in here. Prints the median of the rounds' ratios, and the processor time that the
loop takes on its own: on an accelerator it lies beside the step, on a CPU device it competes with it, and
where other programs run it is the figure to trust.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np
from vilam3_jax.configs import models

from vilam3_jax import config as config_lib
from vilam3_jax.data.batches import PackedBatch
from vilam3_jax.models import vila
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib
from vilam3_jax.training import state as state_lib
from vilam3_jax.training import telemetry


def batch_of(config: Any, seed: int) -> PackedBatch:
    """A full batch of random tokens, one sample a row that begins with its images."""
    rng = np.random.default_rng(seed)
    data, per_image = config.data, model_config_lib.resolve(config.model).tokens_per_image
    rows, length, groups = data.global_rows, data.seq_len, data.global_rows // data.rows_per_group
    side = config.model.image_size
    visual = np.full((rows, length), -1, np.int32)
    visual[:, :per_image] = np.arange(per_image)
    return PackedBatch(
        tokens=rng.integers(0, 300, (rows, length), dtype=np.int32),
        segment_ids=np.ones((rows, length), np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        loss_weights=(np.arange(length) > per_image).astype(np.float32) * np.ones((rows, 1), np.float32),
        visual_index=visual,
        images=rng.integers(0, 256, (groups, data.images_per_group, side, side, 3), dtype=np.uint8),
        image_valid=np.ones((groups, data.images_per_group), bool),
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--log_every", type=int, default=1)
    args = parser.parse_args()

    config = config_lib.base_config()
    config.name, config.model = "overhead", models.get("tiny")
    config.data.update(dict(global_rows=args.rows, seq_len=args.length, images_per_group=4))
    config.num_steps, config.log_every = args.steps, args.log_every
    config.telemetry.writers = ("tensorboard",)
    mesh = mesh_lib.build_mesh(config.mesh)
    program = program_lib.build(config, mesh)
    state, _ = state_lib.initial_state(config, program.state, program.optimizer)
    compiled = program.lower().compile()
    batches = [batch_of(config, seed) for seed in range(4)]
    placed = [jax.device_put(batch, mesh_lib.batch_shardings(batch, mesh)) for batch in batches]

    def bare(state: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        for step in range(args.steps):
            state, metrics = compiled(state, placed[step % len(placed)])
        jax.block_until_ready((state, metrics))
        return state, time.perf_counter() - began

    def looped(state: Any, workdir: str, run: Any = compiled) -> tuple[Any, float, float]:
        clock = telemetry.Clock()
        options: dict[str, Any] = dict(started=time.time(), last=args.steps, quiet=True)
        with telemetry.Telemetry(config, workdir, 0, clock, program.rates, **options) as monitor:
            began, work = time.perf_counter(), time.process_time()
            for step in range(1, args.steps + 1):
                with monitor.input():
                    batch = batches[step % len(batches)]
                    batch = jax.device_put(batch, mesh_lib.batch_shardings(batch, mesh))
                with monitor.step(step):
                    state, metrics = run(state, batch)
                monitor.dispatched(step, batch, metrics)
            monitor.flush()
            return state, time.perf_counter() - began, time.process_time() - work

    def host_work(folder: str) -> float:
        """Processor seconds a step, all threads, of the loop around a step that is done at once."""
        _, metrics = compiled(state, placed[0])
        jax.block_until_ready(metrics)
        return looped(None, folder, lambda state, batch: (state, metrics))[2] / args.steps

    ratios, alone = [], []
    with tempfile.TemporaryDirectory() as folder:
        state, _ = bare(state)
        state, *_ = looped(state, f"{folder}/first")
        for number in range(args.rounds):
            # The machine drifts: what comes first changes from round to round.
            if number % 2:
                state, seconds, _ = looped(state, f"{folder}/{number}")
                state, reference = bare(state)
            else:
                state, reference = bare(state)
                state, seconds, _ = looped(state, f"{folder}/{number}")
            ratios.append(seconds / reference)
            alone.append(reference / args.steps)
            print(f"round {number}: bare {1e3 * alone[-1]:.1f} ms a step, through the loop x{ratios[-1]:.4f}")
        work = host_work(f"{folder}/host")
    print(f"host work of the loop: {1e3 * work:.2f} ms of processor time a step, while the device computes")
    kind = jax.devices()[0].device_kind
    print(
        f"{kind}: {1e3 * statistics.median(alone):.1f} ms a step; through the loop "
        f"x{statistics.median(ratios):.4f} (rounds {min(ratios):.4f} to {max(ratios):.4f})"
    )


if __name__ == "__main__":
    main()
