"""How full packed groups are on VILA-M3's mixtures: ours, first-fit by one row, and Grain's packers.

Run: python benchmarks/packing.py [--recipe=configs/stage4_expert.py:vila_m3_8b] [--samples=40000]

Packs the corpus of `benchmarks/corpus.py` with the settings of the recipes as the loader does: shard by
shard, with its lookahead. `padding` is the share of the matrix products of tower and LLM that is spent on
empty positions and slots (attention not counted). The image budget is that of one row for first-fit and
Grain, and that of a group for ours.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence

import corpus
import numpy as np

from vilam3_jax import config as config_lib
from vilam3_jax.data import stats, stream
from vilam3_jax.data.packing import LOOKAHEAD
from vilam3_jax.data.stats import Fill, Size
from vilam3_jax.training.run_config import RunConfig

RECIPES = (
    ("configs/stage2a_align.py", "align"),
    ("configs/stage2b_pretrain.py", "pretrain_medical"),
    ("configs/stage3_instruct.py", "instruct"),
    ("configs/stage4_expert.py", "expert"),
)
MODELS = ("vila_m3_3b", "vila_m3_8b", "vila_m3_13b", "vila_m3_40b")
_SAMPLES_OF_A_SHARD = 5000  # so many that the uncounted samples left at the end do not matter
TEMPLATES = {
    "llama_3": "llama_3",
    "vicuna_v1": "v1",
    "hermes-2": "v1",
}  # template → one with measured lengths


def shards_of(config: RunConfig, mixture: str, samples: int, seed: int = 0) -> list[list[Size]]:
    """The corpus as dealt to the loader shards of a run."""
    per_image = config.model.tokens_per_image
    order = corpus.stream(mixture, TEMPLATES[config.model.template], per_image, seed, samples)
    sizes = [Size(tokens, images) for _, tokens, images in order if tokens <= config.data.seq_len]
    count = max(1, min(config.data.loader_shards, samples // _SAMPLES_OF_A_SHARD))
    each = range(len(sizes) // count)
    return [[sizes[stream.dealt_position(n, shard, count)] for n in each] for shard in range(count)]


def padding(config: RunConfig, fill: Fill) -> float:
    """Share of the matrix products that is spent on padding."""
    llm, tower = config.model.llm, config.model.vision_tower
    width, heads, kv = llm.hidden_size, llm.num_heads * llm.head_dim, llm.num_kv_heads * llm.head_dim
    layer = width * (2 * heads + 2 * kv + 3 * llm.mlp_dim)
    of_tokens = fill.rows * config.data.seq_len * (llm.num_layers * layer + width * llm.vocab_size)
    patches = (tower.image_size // tower.patch_size) ** 2
    of_slot = patches * tower.num_layers * tower.hidden_size * (4 * tower.hidden_size + 2 * tower.mlp_dim)
    of_slots = fill.images * of_slot
    return ((1 - fill.tokens) * of_tokens + (1 - fill.slots) * of_slots) / (of_tokens + of_slots)


def first_fit(shards: Sequence[Sequence[Size]], seq_len: int, images: int, lookahead: int = 32) -> Fill:
    """First-fit by single rows: a sample goes to the open row or waits for the next one."""
    rows = tokens = slots = 0
    for sizes in shards:
        order, waiting = iter(sizes), []
        while True:
            room, free = seq_len, images
            left: list[Size] = []
            size: Size | None = None
            while len(left) < lookahead and room:
                size = waiting.pop(0) if waiting else next(order, None)
                if size is None:
                    break
                if size.num_tokens <= room and size.num_images <= free:
                    room, free = room - size.num_tokens, free - size.num_images
                else:
                    left.append(size)
            waiting = left + waiting
            if size is None:
                break
            rows, tokens, slots = rows + 1, tokens + seq_len - room, slots + images - free
    return Fill(1, images, tokens / (rows * seq_len), slots / (rows * images), 0)


def grain_fit(name: str, shards: Sequence[Sequence[Size]], seq_len: int, images: int, bins: int = 64) -> Fill:
    """Grain's packer over tokens and images together, `bins` rows open at a time."""
    import grain

    packer = getattr(grain.experimental, name)
    rows = tokens = slots = 0
    for sizes in shards:
        items = [
            {"tokens": np.ones(size.num_tokens, np.int8), "images": np.ones(size.num_images, np.int8)}
            for size in sizes
        ]
        packed = packer(
            grain.MapDataset.source(items).to_iter_dataset(),
            length_struct={"tokens": seq_len, "images": images},
            num_packing_bins=bins,
            shuffle_bins=False,
        )
        counts = [(int(row["tokens"].sum()), int(row["images"].sum())) for row in packed]
        counts = counts[: -bins or None]  # drop rows closed by the end of the data
        rows += len(counts)
        tokens += sum(count for count, _ in counts)
        slots += sum(count for _, count in counts)
    return Fill(1, images, tokens / (rows * seq_len), slots / (rows * images), 0)


def show(name: str, config: RunConfig, fill: Fill, note: str = "") -> None:
    """Prints one line of the table."""
    print(
        f"  {name:34} R {fill.rows} M {fill.images:3}  tokens {fill.tokens:6.2%}  "
        f"image slots {fill.slots:6.2%}  padding {padding(config, fill):5.1%}  {note}",
        flush=True,
    )


def measure(recipe: str, mixture: str, samples: int, compare: bool) -> bool:
    """Prints the table of one recipe; returns whether it meets the targets."""
    config = config_lib.load(recipe)
    data = config.data
    shards = shards_of(config, mixture, samples)
    number = sum(map(len, shards))
    counts = sum(size.num_images for shard in shards for size in shard)
    tokens = sum(size.num_tokens for shard in shards for size in shard)
    ratio = counts / tokens * data.seq_len
    print(
        f"{recipe}, mixture {mixture}: {number} samples of {tokens / number:.0f} tokens and "
        f"{counts / number:.2f} images, {config.model.tokens_per_image} tokens an image; "
        f"{ratio:.2f} images per {data.seq_len} tokens"
    )
    began = time.process_time()
    ours = stats.measure_fill(shards, data.seq_len, data.rows_per_group, data.images_per_group)
    spent = (time.process_time() - began) / (tokens / data.seq_len / ours.tokens)
    show(
        "as configured", config, ours, f"longest wait {ours.longest_wait} groups, {spent * 1e3:.2f} ms a row"
    )
    if compare:
        for lookahead in (LOOKAHEAD // 4, LOOKAHEAD * 4):
            fill = stats.measure_fill(
                shards, data.seq_len, data.rows_per_group, data.images_per_group, lookahead
            )
            show(f"lookahead {lookahead} instead of {LOOKAHEAD}", config, fill)
        for fill in stats.recommend(shards, data.seq_len):
            show(f"best M for R {fill.rows}", config, fill)
        for images in (math.floor(ratio), math.ceil(ratio)):
            show("first-fit by one row", config, first_fit(shards, data.seq_len, images))
            for name in ("FirstFitPackIterDataset", "BestFitPackIterDataset"):
                show(f"Grain {name}", config, grain_fit(name, shards, data.seq_len, images))
    return ours.shortfall <= 1


def main(argv: Sequence[str] | None = None) -> int:
    """Prints tables; returns 1 if a recipe misses the targets."""
    parser = argparse.ArgumentParser(description="How full packed groups are on VILA-M3's mixtures.")
    parser.add_argument("--recipe", help="one recipe alone (default: all stages and sizes)")
    parser.add_argument("--samples", type=int, default=40_000)
    args = parser.parse_args(argv)
    recipes = [(f"{file}:{model}", mixture) for file, mixture in RECIPES for model in MODELS]
    if args.recipe:
        recipes = [(args.recipe, dict(RECIPES)[args.recipe.partition(":")[0]])]
    full = ("configs/stage4_expert.py:vila_m3_8b", args.recipe)
    met = [measure(recipe, mixture, args.samples, recipe in full) for recipe, mixture in recipes]
    print(f"{sum(met)} of {len(met)} recipes meet the targets: tokens 97 %, image slots 95 %")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
