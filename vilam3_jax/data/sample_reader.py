"""What makes a sample ready to be packed out of a record: text first, images when it has a place."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from vilam3_jax.data import stream
from vilam3_jax.data.caches import ByteLRU
from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.dialogues.source import dialogue_of
from vilam3_jax.data.image_processor import ImageProcessor
from vilam3_jax.data.images import augment
from vilam3_jax.data.packing import Sample
from vilam3_jax.data.render import Renderer, encode_example
from vilam3_jax.data.templates import TokenizerLike, encode_caption, model_template
from vilam3_jax.errors import StoppingError, UnavailableError, UserError

Address = tuple[int, int]  # which dataset, which record of it
_Grids = tuple[tuple[int, int], ...]
_TEXT_BYTES = 8192  # taken for an example without its pictures
_EXAMPLE_CACHE_BYTES = 256 << 20  # of samples that wait for a place; more of them are read twice


class SampleReader:
    """Reads, renders and encodes records of one run; calls do not disturb each other."""

    def __init__(
        self,
        cfg: Any,
        *,
        samples: stream.SampleStream,
        renderer: Renderer,
        processor: ImageProcessor,
        tokenizer: TokenizerLike,
        tokens_per_image: int,
        donors: Mapping[Address, Address],
        alter: bool,
    ) -> None:
        """Puts the parts together.

        Args:
          cfg: the run's config.
          samples: where records are.
          renderer: of turns and pictures.
          processor: of pictures.
          tokenizer: of the model.
          tokens_per_image: T, the projector's output length.
          donors: whose images a record takes instead of its own.
          alter: whether pictures are altered (`data.augment`).
        """
        self._samples, self._renderer, self._processor = samples, renderer, processor
        self._tokenizer, self._tokens_per_image = tokenizer, tokens_per_image
        self._template = model_template(cfg.model)
        self._pair_length = cfg.data.text_len if cfg.kind == "contrastive" else None
        self._seed, self._donors, self._alter = cfg.seed, donors, alter
        self._examples: ByteLRU[Example] = ByteLRU(_EXAMPLE_CACHE_BYTES, _bytes_of)

    def sample(self, address: Address, position: int) -> Sample:
        """A sample whose images are still to be read.

        Args:
          address: of its record.
          position: in the order of samples; decides what is left to chance.

        Raises:
          UserError: the record cannot be used; names the example.
          UnavailableError: the data cannot be read now.
          StoppingError: the record cannot be used, and the settings forbid to put it aside.
        """
        source = self._samples.sources[address[0]]
        example = self._example(address, position)
        processor = self._processor
        try:
            outline = self._renderer.outline(example, source.data_root, position)
            shaped = processor.max_tiles > 1
            grids = [processor.grid_of(p.shape()) if shaped else (1, 1) for p in outline.pictures]
            if self._pair_length is not None:
                caption = stream.pair_caption(example)
                encoded = encode_caption(self._tokenizer, caption, self._pair_length)
            else:
                turns = processor.expand(outline.turns, grids)
                encoded = encode_example(
                    self._tokenizer, self._template, example.format, turns, self._tokens_per_image
                )
                encoded = processor.merge(encoded, grids, self._tokens_per_image)
        except UnavailableError:
            raise
        except StoppingError as error:
            raise StoppingError(f"{self._samples.name(address)} ({example.id}): {error}") from error
        except (UserError, ValueError, IndexError) as error:
            raise UserError(f"example {example.id}: {error}") from error
        # What waits for a place holds no image, encoded or not: the record comes from the cache, or is read
        # again.
        read = functools.partial(self._inputs, address, position, tuple(grids))
        if self._pair_length is not None:  # pairs do not wait
            read = functools.partial(tuple, read())
        paths = tuple(image.path for image in example.images if image.path is not None)
        return Sample(
            example.id,
            position,
            encoded,
            read,
            processor.tile_map(grids),
            picture_paths=paths,
            experts=outline.experts,
            missing=outline.missing,
        )

    def _example(self, address: Address, position: int) -> Example:
        return self._examples.get((address, position), lambda: self._read(address, position))

    def _read(self, address: Address, position: int) -> Example:
        source = self._samples.sources[address[0]]
        return dialogue_of(source, address[1], position, self._renderer.experts_on(position))

    def _inputs(self, address: Address, position: int, grids: _Grids) -> tuple[np.ndarray, ...]:
        """The inputs of the vision tower, uint8 [S, S, 3] each."""
        source = self._samples.sources[address[0]]
        example = self._example(address, position)
        try:
            images = self._renderer.render(example, source.data_root, position).images
            if images and address in self._donors:
                donor = self._donors[address]
                root = self._samples.sources[donor[0]].data_root
                taken = self._renderer.render(self._example(donor, position), root, position).images
                images = tuple(taken[i % len(taken)] for i in range(len(images)))
            if self._alter:
                images = augment(images, np.random.default_rng((self._seed, position)))
            # Images of another sample are cut as the text has room for.
            inputs = (self._processor.inputs(image, grid) for image, grid in zip(images, grids, strict=True))
            return tuple(tile for tiles in inputs for tile in tiles)
        except (UnavailableError, StoppingError):
            raise
        except (UserError, ValueError, IndexError) as error:
            raise UserError(f"example {example.id}: {error}") from error


def _bytes_of(example: Example) -> int:
    return _TEXT_BYTES + sum(len(image.data or b"") for image in example.images)
