"""Checks the data of a run before its first step, and as `vilam3 data check`.

The first samples of the run are read as the loader reads them, without their images. A run whose samples have
no targets stops here; what makes it slow or its model talkative is reported.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from vilam3_jax.data.data_config import DataConfig
from vilam3_jax.data.loader import Loader
from vilam3_jax.data.packing import Sample, Size
from vilam3_jax.data.sample_reader import BadRecord
from vilam3_jax.data.stats import Fill, measure_fill, open_packed, recommend
from vilam3_jax.data.templates import Encoded, TokenizerLike
from vilam3_jax.errors import UserError

SAMPLES = 64  # of a run
_LEAST_FILL = 0.7
_LEAST_PROMPT = 3  # tokens; captions and documents have at most a first token
_SHOWN_CHARS = 1500
_TARGET = ("⟦", "⟧")


@dataclasses.dataclass(frozen=True)
class Preflight:
    """What the first samples of a run are like.

    Attributes:
      samples: number of samples.
      tokens, targets, image_tokens: their tokens, those among them that are supervised, and those of images.
      answers, ending: samples with a prompt of text, and those of them with a supervised stop token.
      refused: reason → number of records that were skipped for it.
      fill: how full the groups of the run are; None if the samples do not fill one.
      fuller: settings with the fullest groups; None unless the run's are emptier than 70 %.
      texts: the first samples as text, with targets between ⟦ and ⟧.
    """

    samples: int
    tokens: int
    targets: int
    image_tokens: int
    answers: int
    ending: int
    refused: dict[str, int]
    fill: Fill | None
    fuller: Fill | None
    texts: tuple[str, ...]

    def problem(self) -> str | None:
        """Why a run on this data would learn nothing; None if it may start."""
        if not self.samples:
            reasons = "; ".join(self.refused) or "the datasets are empty"
            return f"no sample can be used: {reasons}"
        if not self.targets:
            return (
                f"none of the {self.tokens} tokens of the first {self.samples} samples is a target, so there "
                "is nothing to learn; give the conversations assistant turns, and look at them with "
                "`vilam3 data check`"
            )
        return None

    def lines(self) -> list[str]:
        """Findings, one sentence each; warnings begin with `warning:`."""
        count = max(self.samples, 1)
        found = [
            f"{self.samples} samples read, {sum(self.refused.values())} skipped: "
            f"{self.tokens / count:.0f} tokens a sample, {self.image_tokens / count:.0f} of them of images; "
            f"{self.targets / max(self.tokens, 1):.1%} of all tokens are targets"
        ]
        alike: dict[str, list[str]] = {}
        for reason in self.refused:
            alike.setdefault(re.sub(r"\d+", "", reason), []).append(reason)
        for reasons in alike.values():
            number = sum(self.refused[reason] for reason in reasons)
            found.append(f"skipped {number}: {reasons[0]}" + (", and alike" if len(reasons) > 1 else ""))
        if self.fill is not None:
            found.append(f"packing fills {self.fill.tokens:.0%} of the tokens of a batch")
        if self.fuller is not None:
            assert self.fill is not None
            found.append(
                f"warning: {1 - self.fill.tokens:.0%} of each batch is padding; "
                f"data.rows_per_group={self.fuller.rows} data.images_per_group={self.fuller.images} fill "
                f"{self.fuller.tokens:.0%}, or change data.seq_len"
            )
        if self.answers and self.targets and not self.ending:
            found.append(
                "warning: no answer has a stop token as a target, so the model does not learn to end an "
                "answer; check model.template and the tokenizer"
            )
        return found


def check(loader: Loader, data: DataConfig, count: int, shown: int = 0) -> Preflight:
    """Reads about `count` samples of a generative run; the loader's position and counts do not change.

    Args:
      loader: of the run.
      data: its section of the config.
      count: samples to read.
      shown: number of samples to render as text.
    """
    shards = loader.first_samples(count)
    samples = [one for shard in shards for one in shard if isinstance(one, Sample)]
    refused = collections.Counter(
        one.reason for shard in shards for one in shard if isinstance(one, BadRecord)
    )
    sizes = [
        [Size(one.num_tokens, one.num_images) for one in shard if isinstance(one, Sample)] for shard in shards
    ]
    fill = _fill(sizes, data)
    stops = loader.records.template.stop_ids(loader.records.tokenizer)
    encoded = [one.encoded for one in samples]
    answers = [one for one in encoded if _prompt_tokens(one) >= _LEAST_PROMPT]
    return Preflight(
        samples=len(samples),
        tokens=sum(len(one) for one in encoded),
        targets=sum(int((one.loss_mask > 0).sum()) for one in encoded),
        image_tokens=sum(int((one.image_of_token >= 0).sum()) for one in encoded),
        answers=len(answers),
        ending=sum(bool(np.isin(one.tokens[one.loss_mask > 0], stops).any()) for one in answers),
        refused=dict(refused),
        fill=fill,
        fuller=_fuller(sizes, data) if fill is not None and fill.tokens < _LEAST_FILL else None,
        texts=tuple(text_of(one, loader.records.tokenizer) for one in samples[:shown]),
    )


def _prompt_tokens(encoded: Encoded) -> int:
    return int(((encoded.loss_mask == 0) & (encoded.image_of_token < 0)).sum())


def _fill(shards: Sequence[Sequence[Size]], data: DataConfig) -> Fill | None:
    try:
        return measure_fill(shards, data.seq_len, data.rows_per_group, data.images_per_group)
    except UserError:  # too few samples
        return None


def _fuller(shards: Sequence[Sequence[Size]], data: DataConfig) -> Fill | None:
    """Returns the recommended group size with the highest fill, or None if there are too few samples."""
    try:
        return max(recommend(shards, data.seq_len), key=lambda fill: fill.tokens)
    except UserError:  # too few samples for the larger groups
        return None


def text_of(sample: Sample, tokenizer: TokenizerLike) -> str:
    """The tokens of a sample as text, with targets between ⟦ and ⟧ and the number of tokens of an image."""
    encoded = sample.encoded
    kinds = np.where(encoded.image_of_token >= 0, 2, encoded.loss_mask > 0)
    owner = np.where(kinds == 2, encoded.image_of_token, -1)
    starts = np.flatnonzero(np.diff(kinds, prepend=-1) | np.diff(owner, prepend=-2))
    parts = []
    for start, end in zip(starts, [*starts[1:], len(encoded)], strict=True):
        if kinds[start] == 2:
            parts.append(f"<image of {end - start} tokens>")
            continue
        text = tokenizer.decode(encoded.tokens[start:end].tolist(), skip_special=False)
        parts.append(text.join(_TARGET) if kinds[start] else text)
    return f"{sample.id}: " + "".join(parts)[:_SHOWN_CHARS]


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 data check`; raises `UserError` for data that a run refuses."""
    parser = argparse.ArgumentParser(
        prog="vilam3 data check",
        description="What a run would read: targets, stop tokens, skipped records, padding, and the first "
        "samples with their targets marked. Takes --config=FILE:ARG and --config.key=value like a run.",
    )
    parser.add_argument("--samples", type=int, default=1000, help="samples to read (default: 1000)")
    parser.add_argument("--show", type=int, default=2, help="samples to print (default: 2)")
    options, rest = parser.parse_known_args(argv)
    if options.samples < 1:
        raise UserError(f"--samples={options.samples}: must be at least 1")
    data, loader = open_packed(rest)
    try:
        found = check(loader, data, options.samples, options.show)
    finally:
        loader.close()
    print("\n".join([*found.texts, *found.lines()]))
    if problem := found.problem():
        raise UserError(f"{data.path}: {problem}")
    return 0
