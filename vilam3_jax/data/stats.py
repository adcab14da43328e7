"""`vilam3 data stats`: sizes of samples, fill of groups, and group sizes that would be fuller."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from absl import flags

from vilam3_jax.data.batch_formats import PackedRows
from vilam3_jax.data.data_config import DataConfig
from vilam3_jax.data.loader import Loader, build_loader
from vilam3_jax.data.packing import LOOKAHEAD, GroupShape, Size, next_group
from vilam3_jax.errors import UserError

TOKEN_TARGET, IMAGE_TARGET = 0.97, 0.95
_ROWS = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Fill:
    """How full groups are."""

    rows: int  # R of the groups
    images: int  # M of the groups
    tokens: float  # share of token positions with a token
    slots: float  # share of image slots with an image
    longest_wait: int  # maximum number of groups of a shard that a sample waited in the queue

    @property
    def shortfall(self) -> float:
        """The larger empty share, relative to its target; both targets are met up to 1."""
        return max((1 - self.tokens) / (1 - TOKEN_TARGET), (1 - self.slots) / (1 - IMAGE_TARGET))


def measure_fill(
    shards: Iterable[Sequence[Size]], seq_len: int, rows: int, images: int, lookahead: int = LOOKAHEAD
) -> Fill:
    """Packs like the loader, shard by shard.

    Args:
      shards: samples of each shard in order; incomplete groups at the end are not counted.
      seq_len, rows, images, lookahead: L, R, M, and as in `next_group`.

    Raises:
      UserError: the samples do not fill one group.
    """
    shape = GroupShape(rows, seq_len, images, tokens_per_image=1, image_size=1)
    groups = tokens = slots = longest = 0
    for sizes in shards:
        for number, placed in enumerate(_whole_groups(shape, sizes, lookahead)):
            groups += 1
            tokens += sum(sample.num_tokens for sample in placed)
            slots += sum(sample.num_images for sample in placed)
            longest = max(longest, *(number - sample.drawn_for for sample in placed))
    if not groups:
        raise UserError("too few samples to fill a group; measure more of them")
    return Fill(rows, images, tokens / (groups * rows * seq_len), slots / (groups * images), longest)


@dataclasses.dataclass(frozen=True)
class _Drawn(Size):
    drawn_for: int  # number of the group that was being filled


def _whole_groups(shape: GroupShape, sizes: Sequence[Size], lookahead: int) -> Iterator[list[_Drawn]]:
    """The samples of each group that was filled before the end of the shard."""
    order = iter(sizes)
    waiting: list[_Drawn] = []
    number = 0
    ended = False

    def pull() -> _Drawn | None:
        nonlocal ended
        size = next(order, None)
        ended = size is None
        return None if size is None else _Drawn(size.num_tokens, size.num_images, number)

    while True:
        packed, waiting = next_group(shape, waiting, pull, lookahead)
        if ended:
            return
        yield [sample for row in packed for sample in row]
        number += 1


def recommend(shards: Sequence[Sequence[Size]], seq_len: int, rows: Sequence[int] = _ROWS) -> list[Fill]:
    """For each number of rows R in `rows`, the number of image slots with the smallest shortfall."""
    sizes = [size for shard in shards for size in shard]
    ratio = sum(size.num_images for size in sizes) / max(sum(size.num_tokens for size in sizes), 1)
    least = max([1, *(size.num_images for size in sizes)])
    best = []
    for count in rows:
        middle = ratio * seq_len * count
        tried = {max(m, least) for m in range(math.floor(0.96 * middle), math.ceil(1.06 * middle) + 1)}
        fills = [measure_fill(shards, seq_len, count, images) for images in sorted(tried)]
        best.append(min(fills, key=lambda fill: fill.shortfall))
    return best


def _describe(data: DataConfig, sizes: Sequence[Size], skipped: int) -> list[str]:
    lengths = np.array([size.num_tokens for size in sizes])
    counts = np.array([size.num_images for size in sizes])
    shares = ", ".join(f"{n}: {np.mean(counts == n):.1%}" for n in np.unique(counts))
    low, middle, high = np.percentile(lengths, (5, 50, 95))
    return [
        f"{len(sizes)} samples, {skipped} skipped",
        f"tokens of a sample: {lengths.mean():.0f} on average, {low:.0f} / {middle:.0f} / {high:.0f} at "
        f"5 / 50 / 95 %, {lengths.max()} at most; a row has {data.seq_len}",
        f"images of a sample: {counts.mean():.2f} on average; {shares}",
    ]


def _line(name: str, fill: Fill) -> str:
    return (
        f"{name} data.rows_per_group={fill.rows} data.images_per_group={fill.images}: "
        f"{fill.tokens:.1%} of tokens, {fill.slots:.1%} of image slots"
    )


def open_packed(flags_of_run: Sequence[str]) -> tuple[DataConfig, Loader]:
    """Opens the training data of a run from its flags; raises `UserError` for a contrastive run."""
    from vilam3_jax import config as config_lib  # imports jax, which --help should not wait for

    config = config_lib.parse(flags_of_run, flags.FlagValues())
    if config.task != "generative":
        raise UserError("config task='contrastive': pairs are not packed and have no targets")
    return config.data, build_loader(config.data, config.model, PackedRows, "train", seed=config.seed)


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 data stats`; raises `UserError` for bad input."""
    parser = argparse.ArgumentParser(
        prog="vilam3 data stats",
        description="Sizes of a run's samples, how full its groups are, and group sizes that would be "
        "fuller. Takes --config=FILE:ARG and --config.key=value like `vilam3 train`.",
    )
    parser.add_argument("--samples", type=int, default=4000, help="samples to measure (default: 4000)")
    options, rest = parser.parse_known_args(argv)
    if options.samples < 1:
        raise UserError(f"--samples={options.samples}: must be at least 1")
    data, loader = open_packed(rest)
    try:
        shards = loader.sizes(options.samples)
    finally:
        loader.close()
    sizes = [size for shard in shards for size in shard]
    current = measure_fill(shards, data.seq_len, data.rows_per_group, data.images_per_group)
    best = recommend(shards, data.seq_len, tuple(dict.fromkeys((data.rows_per_group, *_ROWS))))
    fitting = (fill for fill in sorted(best, key=lambda fill: fill.rows) if fill.shortfall <= 1)
    chosen = next(fitting, None) or min(best, key=lambda fill: fill.shortfall)
    lines = [
        *_describe(data, sizes, loader.stats.skipped_total),
        _line("now:      ", current),
        *(_line("possible: ", fill) for fill in best),
        _line("take:     ", chosen),
    ]
    print("\n".join(lines))
    return 0
