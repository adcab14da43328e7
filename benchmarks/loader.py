"""Does the loader keep a step of 100 ms waiting? One core, 8 images a step, against PyTorch's DataLoader.

Run: taskset -c 0 python benchmarks/loader.py [--side=384] [--steps=100]

Writes generated JPEGs (half of them grey, as films are) as a data set, then takes turns: our loader, and,
where torch and transformers are installed, `torch.utils.data.DataLoader` with `SiglipImageProcessor` in this
process and in one worker. The consumer sleeps 100 ms a step, as a host does while its accelerator works.
Every record is new: nothing comes from a cache. CPU time is of this process, without the worker.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vilam3_jax import config as config_lib
from vilam3_jax.data.examples import Example, ImageRef, Turn
from vilam3_jax.data.loader import build_loader
from vilam3_jax.data.records import ExampleWriter
from vilam3_jax.data.tokenizer import train_bpe
from vilam3_jax.models import vila

STEP_SECONDS = 0.1
IMAGES_A_STEP = 8
SIZE = 384


def jpegs(count: int, side: int) -> list[bytes]:
    """Pictures with structure and noise, so that their files are as large as those of films."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 12, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.integers(-6, 7, (side, side, 1)), 0, 255).astype(np.uint8)
        picture = Image.fromarray(noisy)
        buffer = io.BytesIO()
        (picture.convert("L") if number % 2 else picture).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def ours(folder: Path, steps: int) -> Iterator[int]:
    """Images of each batch of our loader."""
    config = config_lib.load("configs/stage3_instruct.py:vila_m3_8b")
    tokenizer = train_bpe(["What does this film show? No acute disease."] * 3, 400, folder / "tokenizer")
    config.model.template = "chatml"
    config.data.update(dict(path=str(folder), mixture=(), seq_len=2048, loader_shards=1, global_rows=1))
    config.data.update(dict(rows_per_group=1, images_per_group=IMAGES_A_STEP))
    loader = build_loader(
        config, "train", tokens_per_image=vila.tokens_per_image(config.model), tokenizer=tokenizer
    )
    try:
        for _, batch in zip(range(steps), loader, strict=False):
            yield int(batch["image_valid"].sum())
    finally:
        loader.close()


def theirs(files: Sequence[bytes], steps: int, workers: int) -> Iterator[int]:
    """Images of each batch of PyTorch's loader."""
    import torch
    from transformers import SiglipImageProcessor

    processor = SiglipImageProcessor(size={"height": SIZE, "width": SIZE})

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return steps * IMAGES_A_STEP

        def __getitem__(self, index: int) -> torch.Tensor:
            picture = Image.open(io.BytesIO(files[index])).convert("RGB")
            return processor(picture, return_tensors="pt")["pixel_values"][0]

    torch.set_num_threads(1)
    for batch in torch.utils.data.DataLoader(Pictures(), IMAGES_A_STEP, num_workers=workers):
        yield batch.shape[0]


def consume(name: str, batches: Iterator[int]) -> None:
    """Waits for every batch, then sleeps for a step; prints what the consumer met."""
    next(batches)  # threads and processes are up
    waits, images = [], 0
    cpu, began = time.process_time(), time.perf_counter()
    while True:
        asked = time.perf_counter()
        count = next(batches, 0)
        if not count:
            break
        waits.append(time.perf_counter() - asked)
        images += count
        time.sleep(STEP_SECONDS)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    late = np.mean(np.array(waits) > 0.01 * STEP_SECONDS)
    print(
        f"  {name:28} {images / cpu:7.0f} images a second of CPU time, {cpu / len(waits) * 1e3:5.1f} ms CPU "
        f"a step; waited for {sum(waits) / wall:6.2%} of the time, {late:.0%} of steps waited over 1 ms, "
        f"median wait {np.median(waits) * 1e3:.2f} ms",
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints one line for each loader and round."""
    parser = argparse.ArgumentParser(description="Does the loader keep a step of 100 ms waiting?")
    parser.add_argument("--side", type=int, default=SIZE, help="side of the JPEGs in pixels (default: 384)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args(argv)
    files = jpegs((args.steps + 16) * IMAGES_A_STEP, args.side)  # our loader reads ahead
    print(f"{args.side} x {args.side} JPEGs of {np.mean([len(file) for file in files]) / 1e3:.0f} kB")
    turns = (Turn("user", "<image>\nWhat does this film show?"), Turn("assistant", "No acute disease.", True))
    peers = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    with tempfile.TemporaryDirectory() as folder:
        with ExampleWriter(folder, "train") as writer:
            for number, file in enumerate(files):
                writer.write(Example(f"{number}", "conversation", (ImageRef(data=file),), turns))
        for _ in range(args.rounds):
            consume("vilam3_jax", ours(Path(folder), args.steps))
            if peers:
                consume("torch, in this process", theirs(files, args.steps, 0))
                consume("torch, one worker process", theirs(files, args.steps, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
