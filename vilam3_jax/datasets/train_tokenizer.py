"""Trains a tokenizer for models that are trained from scratch.

python -m vilam3_jax.datasets.train_tokenizer --data DIR --out DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

from vilam3_jax.data.experts import cards
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.data.tfds_folder import datasets_in
from vilam3_jax.data.tokenizer import train_bpe
from vilam3_jax.runtime import paths


def dataset_texts(root: paths.PathLike) -> Iterator[str]:
    """Yields the expert cards and the texts of all training records below `root`.

    Raises:
      UserError: `root` holds no dataset.
    """
    folders = datasets_in(root)
    yield cards.render_cards(cards.load_cards("quickstart"))
    for folder in folders:
        source = ExampleSource(folder, "train")
        for index in range(len(source)):
            yield from (turn.text for turn in source[index].turns)


def main(argv: Sequence[str]) -> int:
    """Trains and saves the tokenizer."""
    parser = argparse.ArgumentParser(
        prog="train_tokenizer", description="Train a byte-level BPE on datasets."
    )
    parser.add_argument("--data", required=True, help="folder of datasets, as `vilam3 prepare` writes it")
    parser.add_argument("--out", required=True, help="tokenizer folder to write")
    parser.add_argument("--vocab_size", type=int, default=2048)
    options = parser.parse_args(argv)
    tokenizer = train_bpe(dataset_texts(options.data), options.vocab_size, options.out)
    print(f"{options.out}: {tokenizer.vocab_size} tokens")
    return 0


if __name__ == "__main__":
    from vilam3_jax.cli import guarded

    sys.exit(guarded("train_tokenizer", main, sys.argv[1:]))
