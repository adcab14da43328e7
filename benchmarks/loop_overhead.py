"""Overhead of the train loop: the compiled step alone, and the same steps with telemetry and data transfer.

    python benchmarks/loop_overhead.py [--steps=20] [--rounds=6] [--rows=8] [--log_every=1]

Both run the same compiled step on the same batches in one process, alternately. `bare` only calls the step;
`loop` also does what `vilam3_jax/train.py` does around it: it moves the batch to the device, follows the step
and writes all figures (JSON lines and TensorBoard) at each logged step. Loading data is excluded. Prints the
median ratio of the rounds, and the CPU time of the loop alone: on an accelerator it overlaps with the step,
on a CPU device it competes with it. On a busy machine the CPU time is the more reliable figure.
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
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import program as program_lib
from vilam3_jax.training import telemetry
from vilam3_jax.training.device_put import DevicePut
from vilam3_jax.training.run_config import RunConfig


def batch_of(config: RunConfig, seed: int) -> PackedBatch:
    """A full batch of random tokens: one sample per row, which begins with its image."""
    rng = np.random.default_rng(seed)
    data, per_image = config.data, config.model.tokens_per_image
    rows, length, groups = data.global_rows, data.seq_len, data.groups
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
    resolved = config_lib.resolve(config)
    mesh = mesh_lib.build_mesh(resolved.mesh)
    program = program_lib.build(resolved, mesh)
    state, _ = program.initial_state()
    compiled = program.lower().compile()
    device_put = DevicePut(resolved.data.groups, mesh)
    batches = [batch_of(resolved, seed) for seed in range(4)]
    placed = [device_put(batch) for batch in batches]

    def bare(state: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        for step in range(args.steps):
            state, metrics = compiled(state, placed[step % len(placed)])
        jax.block_until_ready((state, metrics))
        return state, time.perf_counter() - began

    def looped(state: Any, workdir: str, run: Any = compiled) -> tuple[Any, float, float]:
        clock = telemetry.Clock()
        options: dict[str, Any] = dict(started=time.time(), last=args.steps, quiet=True)
        with telemetry.Telemetry(program, workdir, 0, clock, **options) as monitor:
            began, work = time.perf_counter(), time.process_time()
            for step in range(1, args.steps + 1):
                with monitor.input():
                    batch = device_put(batches[step % len(batches)])
                with monitor.step(step):
                    state, metrics = run(state, batch)
                monitor.dispatched(step, batch, metrics)
            monitor.flush()
            return state, time.perf_counter() - began, time.process_time() - work

    def host_work(folder: str) -> float:
        """CPU seconds per step, all threads, of the loop around a step that returns at once."""
        _, metrics = compiled(state, placed[0])
        jax.block_until_ready(metrics)
        return looped(None, folder, lambda state, batch: (state, metrics))[2] / args.steps

    ratios, alone = [], []
    with tempfile.TemporaryDirectory() as folder:
        state, _ = bare(state)
        state, *_ = looped(state, f"{folder}/first")
        for number in range(args.rounds):
            # The machine's speed drifts, so the order alternates.
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
    print(f"host work of the loop: {1e3 * work:.2f} ms of CPU time per step")
    kind = jax.devices()[0].device_kind
    print(
        f"{kind}: {1e3 * statistics.median(alone):.1f} ms a step; through the loop "
        f"x{statistics.median(ratios):.4f} (rounds {min(ratios):.4f} to {max(ratios):.4f})"
    )


if __name__ == "__main__":
    main()
