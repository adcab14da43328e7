"""From a record to a sample for packing: text first, images when the sample is packed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from vilam3_jax.data import stream
from vilam3_jax.data.batch_formats import BatchFormat
from vilam3_jax.data.caches import ByteLRU
from vilam3_jax.data.examples import Example
from vilam3_jax.data.experts.dialogues.source import dialogue_of
from vilam3_jax.data.images import augment
from vilam3_jax.data.packing import Sample
from vilam3_jax.data.render import Renderer
from vilam3_jax.data.templates import Template, TokenizerLike
from vilam3_jax.errors import StoppingError, UnavailableError, UserError

Address = tuple[int, int]  # (number of the dataset, record in it)
_Grids = tuple[tuple[int, int], ...]
_TEXT_BYTES = 8192  # assumed size of an example without its images
_EXAMPLE_CACHE_BYTES = 256 << 20  # of queued samples; beyond it, records are read twice


@dataclasses.dataclass(frozen=True, eq=False)
class SampleReader:
    """Reads, renders and encodes records of one run; thread-safe.

    Attributes:
      samples, renderer, batch_format, tokenizer, template: those of the run.
      donors: address → record whose images replace its own.
      augment_seed: seed of image augmentation; None for none.
    """

    samples: stream.SampleStream
    renderer: Renderer
    batch_format: BatchFormat
    tokenizer: TokenizerLike
    template: Template
    donors: Mapping[Address, Address]
    augment_seed: int | None
    _examples: ByteLRU[Example] = dataclasses.field(
        init=False, default_factory=lambda: ByteLRU(_EXAMPLE_CACHE_BYTES, _bytes_of)
    )

    def sample(self, address: Address, position: int) -> Sample:
        """A sample whose images are read later.

        Args:
          address: address of its record.
          position: position in the order of samples; seeds random choices.

        Raises:
          UserError: the record cannot be used; names the example.
          UnavailableError: the data cannot be read now.
          StoppingError: the record cannot be used, and the settings do not allow skipping it.
        """
        source = self.samples.sources[address[0]]
        example = self._example(address, position)
        processor = self.batch_format.processor
        try:
            outline = self.renderer.outline(example, source.data_root, position)
            tiled = processor.max_tiles > 1
            grids = [processor.grid_of(image.shape()) if tiled else (1, 1) for image in outline.lazy_images]
            encoded = self.batch_format.encode(self.tokenizer, self.template, example, outline, grids)
        except UnavailableError:
            raise
        except StoppingError as error:
            raise StoppingError(f"{self.samples.name(address)} ({example.id}): {error}") from error
        except (UserError, ValueError, IndexError) as error:
            raise UserError(f"example {example.id}: {error}") from error
        # Queued samples hold no image bytes; packing takes the record from the cache or reads it again.
        read = functools.partial(self._inputs, address, position, tuple(grids))
        if not self.batch_format.has_dialogues:  # pairs are packed at once
            read = functools.partial(tuple, read())
        paths = tuple(image.path for image in example.images if image.path is not None)
        return Sample(
            example.id,
            position,
            encoded,
            read,
            processor.tile_map(grids),
            image_paths=paths,
            experts=outline.experts,
            missing=outline.missing,
        )

    def _example(self, address: Address, position: int) -> Example:
        source, with_experts = self.samples.sources[address[0]], self.renderer.experts_on(position)
        return self._examples.get(
            (address, position), lambda: dialogue_of(source, address[1], position, with_experts)
        )

    def _inputs(self, address: Address, position: int, grids: _Grids) -> tuple[np.ndarray, ...]:
        """Inputs of the vision tower, uint8 [S, S, 3] each."""
        source = self.samples.sources[address[0]]
        example = self._example(address, position)
        try:
            images = self.renderer.render(example, source.data_root, position).images
            if images and address in self.donors:
                donor = self.donors[address]
                root = self.samples.sources[donor[0]].data_root
                taken = self.renderer.render(self._example(donor, position), root, position).images
                images = tuple(taken[i % len(taken)] for i in range(len(images)))
            if self.augment_seed is not None:
                images = augment(images, np.random.default_rng((self.augment_seed, position)))
            # Images of a donor use the grid of the sample's own, which its text was made for.
            inputs = (
                self.batch_format.processor.inputs(image, grid)
                for image, grid in zip(images, grids, strict=True)
            )
            return tuple(tile for tiles in inputs for tile in tiles)
        except (UnavailableError, StoppingError):
            raise
        except (UserError, ValueError, IndexError) as error:
            raise UserError(f"example {example.id}: {error}") from error


def _bytes_of(example: Example) -> int:
    return _TEXT_BYTES + sum(len(image.data or b"") for image in example.images)
