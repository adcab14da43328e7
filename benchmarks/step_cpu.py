"""Tokens per second of the quickstart's stage-4 step on virtual devices: as configured, and with one change.

Run: python benchmarks/step_cpu.py [--fsdp=2] [--tensor=2] [--rounds=2] [--only=VARIANT]

Random weights of SmolLM2-135M's shape and a random batch. Each measurement runs in a separate process,
because malloc reads its settings at start; the variants alternate, because the machine's speed drifts. Prints
rates, and ratios to the first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

from vilam3_jax.quickstart import chain

AS_CONFIGURED = "as configured"
SMALL_PAGES = "small pages"
OTHER_PRECISION = "the other matmul precision"
WHOLE_ATTENTION = "queries not sharded"
LORA_EVERYWHERE = "LoRA on all seven matrices"
VARIANTS = (AS_CONFIGURED, SMALL_PAGES, OTHER_PRECISION, WHOLE_ATTENTION, LORA_EVERYWHERE)


def measure(variant: str, fsdp: int, tensor: int, steps: int) -> float:
    """Best tokens per second of `steps` steps after compilation."""
    import jax
    import numpy as np
    from vilam3_jax.configs.quickstart import stage4_expert

    from vilam3_jax import config as config_lib
    from vilam3_jax.data.batches import PackedBatch
    from vilam3_jax.models.decoder import LORA_TARGETS
    from vilam3_jax.runtime import compat
    from vilam3_jax.sharding import mesh as mesh_lib
    from vilam3_jax.training import program as program_lib

    config = stage4_expert.get_config("default")
    config.mesh.fsdp, config.mesh.tensor, config.mesh.cpu_devices = fsdp, tensor, fsdp * tensor
    if variant == WHOLE_ATTENTION:
        config.activation_rules.queries = ""
    if variant == LORA_EVERYWHERE:
        config.model.llm.lora_targets = LORA_TARGETS
    compat.use_cpu_devices(fsdp * tensor)
    config = config_lib.resolve(config)
    program = program_lib.build(config, mesh_lib.build_mesh(config.mesh))
    state, _ = program.initial_state()

    rows, length, images = config.data.global_rows, config.data.seq_len, config.data.images_per_group
    side, per_image = config.model.image_size, config.model.tokens_per_image
    rng = np.random.default_rng(0)
    batch = PackedBatch(
        tokens=rng.integers(0, 49_000, (rows, length), np.int32),
        segment_ids=np.ones((rows, length), np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        loss_weights=(rng.random((rows, length)) < 0.1).astype(np.float32),
        visual_index=np.full((rows, length), -1, np.int32),
        images=rng.integers(0, 255, (rows, images, side, side, 3), np.uint8),
        image_valid=np.ones((rows, images), bool),
    )
    batch.visual_index[:, 10 : 10 + per_image * images] = np.arange(per_image * images)
    placed = jax.device_put(batch, jax.tree.map(lambda leaf: leaf.sharding, program.batch))
    with program.context():
        state, _ = jax.block_until_ready(program.step(state, placed))
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(program.step(state, placed))
            seconds.append(time.perf_counter() - start)
    return rows * length / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--fsdp", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=VARIANTS, help="measure this one once, in this process")
    options = parser.parse_args()
    if options.only:
        print(measure(options.only, options.fsdp, options.tensor, options.steps))
        return
    precision = chain.matmul_precision()
    other = "float32" if precision == "bfloat16" else "bfloat16"
    print(f"as configured: {precision}")
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(options.rounds):
        for variant, rates in found.items():
            tunables = "" if variant == SMALL_PAGES else "glibc.malloc.hugetlb=1"
            environment = dict(os.environ, JAX_PLATFORMS="cpu", GLIBC_TUNABLES=tunables)
            environment["JAX_DEFAULT_MATMUL_PRECISION"] = other if variant == OTHER_PRECISION else precision
            command = [sys.executable, __file__, f"--only={variant}"]
            command += [f"--{name}={getattr(options, name)}" for name in ("fsdp", "tensor", "steps")]
            output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            rates.append(float(output.stdout.split()[-1]))
    first = statistics.median(found[AS_CONFIGURED])
    for variant, rates in found.items():
        rate = statistics.median(rates)
        print(f"{variant:<40} {rate:6.0f} tokens/s  {rate / first:.2f}")


if __name__ == "__main__":
    main()
