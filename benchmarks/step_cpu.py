"""Tokens per second of the quickstart's stage-4 step on virtual devices, with and without huge pages.

Run: python benchmarks/step_cpu.py [--fsdp=2] [--tensor=2] [--pairs=2]

Random weights of SmolLM2-135M's shape and a random batch; each measurement is a process of its own, taken in
turn, because malloc reads its settings at start. Prints the rate of each and their ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

HUGE_PAGES = "glibc.malloc.hugetlb=1"


def measure(fsdp: int, tensor: int, steps: int) -> float:
    """Best tokens per second of `steps` steps after compilation."""
    import jax
    import numpy as np
    from vilam3_jax.configs.quickstart import stage4_expert

    from vilam3_jax import compat
    from vilam3_jax.models import trees, vila
    from vilam3_jax.ops import partition
    from vilam3_jax.training import mesh as mesh_lib
    from vilam3_jax.training import optimizer as optimizer_lib
    from vilam3_jax.training import state as state_lib
    from vilam3_jax.training import step as step_lib

    config = stage4_expert.get_config("default")
    config.mesh.fsdp, config.mesh.tensor, config.mesh.cpu_devices = fsdp, tensor, fsdp * tensor
    compat.use_cpu_devices(fsdp * tensor)
    mesh = mesh_lib.build_mesh(config.mesh)
    graphdef, abstract_model = vila.abstract_model(config.model, "generative")
    rates = optimizer_lib.multipliers(config, list(trees.flatten(abstract_model)))
    optimizer = optimizer_lib.make_optimizer(config, {path: rate for path, rate in rates.items() if rate})
    abstract = state_lib.abstract_state(config, mesh, optimizer, rates)
    state, _ = state_lib.initial_state(config, abstract, optimizer)

    rows, length, images = config.data.global_rows, config.data.seq_len, config.data.images_per_group
    side, per_image = config.model.image_size, 9
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, 49_000, (rows, length), np.int32),
        "segment_ids": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_weights": (rng.random((rows, length)) < 0.1).astype(np.float32),
        "images": rng.integers(0, 255, (rows, images, side, side, 3), np.uint8),
        "image_valid": np.ones((rows, images), bool),
        "visual_index": np.full((rows, length), -1, np.int32),
    }
    batch["visual_index"][:, 10 : 10 + per_image * images] = np.arange(per_image * images)
    with partition.activation_rules(mesh, config.activation_rules.to_dict()):
        placed = jax.device_put(batch, mesh_lib.batch_shardings(batch, mesh))
        shardings = state_lib.shardings(abstract)
        step = jax.jit(
            step_lib.make_train_step(
                config,
                step_lib.make_loss(config, graphdef),
                optimizer,
                optimizer_lib.learning_rate(config),
            ),
            out_shardings=(shardings, None),
            donate_argnums=0,
        )
        state, _ = jax.block_until_ready(step(state, placed))
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, placed))
            seconds.append(time.perf_counter() - start)
    return rows * length / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--fsdp", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--one", action="store_true", help="measure once, in this process")
    options = parser.parse_args()
    if options.one:
        print(measure(options.fsdp, options.tensor, options.steps))
        return
    found: dict[str, list[float]] = {"": [], HUGE_PAGES: []}
    for _ in range(options.pairs):
        for tunables, rates in found.items():
            environment = dict(os.environ, JAX_PLATFORMS="cpu", GLIBC_TUNABLES=tunables)
            command = [sys.executable, __file__, "--one"]
            command += [f"--{name}={getattr(options, name)}" for name in ("fsdp", "tensor", "steps")]
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            rates.append(float(output.stdout.split()[-1]))
    plain, huge = (statistics.median(rates) for rates in found.values())
    print(f"small pages {plain:.0f} tokens/s, huge pages {huge:.0f} tokens/s, ratio {huge / plain:.2f}")


if __name__ == "__main__":
    main()
