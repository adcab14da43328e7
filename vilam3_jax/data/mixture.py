"""`vilam3 data mixture`: what a run would see of each dataset."""

from __future__ import annotations

import argparse
import dataclasses
import math
import string
from collections.abc import Sequence
from typing import Any

from absl import flags

from vilam3_jax.data.batch_formats import FORMATS
from vilam3_jax.data.loader import Loader, build_loader
from vilam3_jax.data.packing import Sample
from vilam3_jax.errors import UserError

_LETTERS = string.ascii_uppercase + string.ascii_lowercase
_LINE = 50  # positions per line
_HEAD = [
    "", "dataset", "records", "epochs/pass", "samples/pass", "share", "epochs/run",
    "tokens/sample", "of all tokens", "images/sample", "experts",
]  # fmt: skip
_TEXT_COLUMNS = 2


@dataclasses.dataclass(frozen=True)
class Row:
    """One dataset of a mixture."""

    name: str  # dataset, with its rule
    records: int  # records of its training split that the rule applies to
    epochs: float  # its weight, in epochs per pass
    samples: float  # samples per pass
    measured: int  # number of samples that were measured
    unusable: int  # number of records that were tried and could not be used
    tokens: float  # estimated average per sample, as images; NaN without a usable record
    images: float
    experts: float  # estimated share of samples with an expert result
    missing: int  # requests without an annotation among the measured samples


def rows_of(loader: Loader, tried: int) -> list[Row]:
    """Measures each dataset on evenly spaced records.

    Args:
      loader: loader of the training split.
      tried: maximum records of each dataset.
    """
    rows = []
    for number, (source, weight) in enumerate(
        zip(loader.samples.sources, loader.samples.weights, strict=True)
    ):
        size = len(source)
        count = min(size, tried)
        # Positions differ, as `data.expert_share` depends on them.
        found = [loader.records.sample((number, part * size // count), part, 0) for part in range(count)]
        good = [sample for sample in found if isinstance(sample, Sample)]
        rows.append(
            Row(
                source.name,
                size,
                float(weight),
                float(weight * size),
                len(good),
                count - len(good),
                _mean([sample.num_tokens for sample in good]),
                _mean([sample.num_images for sample in good]),
                _mean([bool(sample.experts) for sample in good]),
                sum(len(sample.missing) for sample in good),
            )
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def samples_of_a_step(config: Any, rows: Sequence[Row]) -> float:
    """Samples of a batch: its pairs, or what fits into its tokens and image slots."""
    if config.task == "contrastive":
        return config.data.global_pairs
    tokens, images, data = _average(rows, "tokens"), _average(rows, "images"), config.data
    slots = data.images_per_group * data.global_rows / data.rows_per_group
    return min(data.seq_len * data.global_rows / tokens, slots / images if images else math.inf)


def _average(rows: Sequence[Row], field: str) -> float:
    """The mean of a field over the samples of a pass."""
    measured = [row for row in rows if row.measured]
    total = sum(row.samples for row in measured)
    return sum(row.samples * getattr(row, field) for row in measured) / total


def order_of(loader: Loader, count: int) -> list[str]:
    """Lines with a letter per position, which stands for its dataset."""
    letters = "".join(_LETTERS[loader.samples.address(n)[0] % len(_LETTERS)] for n in range(count))
    return [letters[start : start + _LINE] for start in range(0, count, _LINE)]


def table(config: Any, rows: Sequence[Row]) -> list[str]:
    """The lines of the table and of its notes; raises `UserError` if no record that was tried is usable."""
    usable = [row for row in rows if row.measured]
    if not usable:
        raise UserError(
            "no record that was tried can be used; `vilam3 data show` reports what is wrong with one"
        )
    all_samples = sum(row.samples for row in rows)
    all_tokens = sum(row.samples * row.tokens for row in usable)
    step = samples_of_a_step(config, rows)
    passes = config.num_steps * step / all_samples
    cells = [_HEAD]
    for number, row in enumerate(rows):
        measured = ["-"] * 4
        if row.measured:
            share = row.samples * row.tokens / all_tokens
            measured = [f"{row.tokens:.0f}", f"{share:.1%}", f"{row.images:.2f}", f"{row.experts:.0%}"]
        cells.append(
            [
                _LETTERS[number % len(_LETTERS)],
                row.name,
                f"{row.records:,}",
                f"{row.epochs:.4g}",
                f"{row.samples:,.10g}",
                f"{row.samples / all_samples:.1%}",
                f"{passes * row.epochs:.3g}",
                *measured,
            ]
        )
    lines = [
        *_aligned(cells),
        "",
        f"a pass: {all_samples:,.10g} samples, about {_short(all_tokens)} tokens; "
        f"{_average(rows, 'experts'):.0%} of the samples with expert results",
        f"the run: {config.num_steps:,} steps of about {step:,.0f} samples, {passes:.3g} passes",
        f"Tokens, images, experts and the run are estimates from up to {max(row.measured for row in rows)} "
        "records of each dataset; epochs and samples of a pass are exact.",
    ]
    for row in rows:
        if row.unusable:
            tried = row.unusable + row.measured
            lines.append(f"{row.name}: {row.unusable} of {tried} records tried could not be used")
        if row.missing:
            lines.append(f"{row.name}: {row.missing} requests of {row.measured} samples have no annotation")
    return lines


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < _TEXT_COLUMNS else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _short(number: float) -> str:
    for size, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return f"{number:.0f}"


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 data mixture`; raises `UserError` for bad input."""
    parser = argparse.ArgumentParser(
        prog="vilam3 data mixture",
        description="What a run sees of each dataset of its mixture: epochs in a pass and in the run, "
        "tokens, the share with expert results, and the order of the first positions. Takes "
        "--config=FILE:ARG and --config.key=value like `vilam3 train`.",
    )
    parser.add_argument("--count", type=int, default=100, help="positions of the order (default: 100)")
    parser.add_argument(
        "--samples", type=int, default=32, help="records of each dataset to measure (default: 32)"
    )
    options, rest = parser.parse_known_args(argv)
    for name in ("count", "samples"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: must be at least 1")
    from vilam3_jax import config as config_lib  # imports jax, which --help should not wait for

    config = config_lib.parse(rest, flags.FlagValues())
    loader = build_loader(config.data, config.model, FORMATS[config.task], "train", seed=config.seed)
    try:
        lines = table(config, rows_of(loader, options.samples))
        lines += ["", f"The first {options.count} positions:", *order_of(loader, options.count)]
    finally:
        loader.close()
    print("\n".join(lines))
    return 0
