"""From a record to a sample that can be packed: text first, images once the sample is placed."""

from __future__ import annotations

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

Address = tuple[int, int]  # which dataset, which record of it
_Grids = tuple[tuple[int, int], ...]
_TEXT_BYTES = 8192  # assumed size of an example without its images
_EXAMPLE_CACHE_BYTES = 256 << 20  # of queued samples; beyond it records are read twice


class SampleReader:
    """Reads, renders and encodes records of one run; thread-safe."""

    def __init__(
        self,
        *,
        samples: stream.SampleStream,
        renderer: Renderer,
        batch_format: BatchFormat,
        tokenizer: TokenizerLike,
        template: Template,
        donors: Mapping[Address, Address],
        augment_seed: int | None,
    ) -> None:
        """Stores its parts.

        Args:
          samples: where records are.
          renderer: of turns and images.
          batch_format: of the run.
          tokenizer: of the model.
          template: of the model.
          donors: address → record whose images it takes instead of its own.
          augment_seed: of the augmentation of images; None for none.
        """
        self._samples, self._renderer, self._format = samples, renderer, batch_format
        self._tokenizer, self._template = tokenizer, template
        self._donors, self._augment_seed = donors, augment_seed
        self._examples: ByteLRU[Example] = ByteLRU(_EXAMPLE_CACHE_BYTES, _bytes_of)

    def sample(self, address: Address, position: int) -> Sample:
        """A sample whose images are not read yet.

        Args:
          address: of its record.
          position: in the order of samples; seeds what is random.

        Raises:
          UserError: the record cannot be used; names the example.
          UnavailableError: the data cannot be read now.
          StoppingError: the record cannot be used, and the settings do not allow it to be skipped.
        """
        source = self._samples.sources[address[0]]
        example = self._example(address, position)
        processor = self._format.processor
        try:
            outline = self._renderer.outline(example, source.data_root, position)
            tiled = processor.max_tiles > 1
            grids = [processor.grid_of(image.shape()) if tiled else (1, 1) for image in outline.pictures]
            encoded = self._format.encode(self._tokenizer, self._template, example, outline, grids)
        except UnavailableError:
            raise
        except StoppingError as error:
            raise StoppingError(f"{self._samples.name(address)} ({example.id}): {error}") from error
        except (UserError, ValueError, IndexError) as error:
            raise UserError(f"example {example.id}: {error}") from error
        # Queued samples hold no image bytes: the record comes from the cache or is read again when placed.
        read = functools.partial(self._inputs, address, position, tuple(grids))
        if not self._format.has_dialogues:  # pairs are not queued
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
            if self._augment_seed is not None:
                images = augment(images, np.random.default_rng((self._augment_seed, position)))
            # Images of another sample are tiled to fit the text.
            inputs = (
                self._format.processor.inputs(image, grid) for image, grid in zip(images, grids, strict=True)
            )
            return tuple(tile for tiles in inputs for tile in tiles)
        except (UnavailableError, StoppingError):
            raise
        except (UserError, ValueError, IndexError) as error:
            raise UserError(f"example {example.id}: {error}") from error


def _bytes_of(example: Example) -> int:
    return _TEXT_BYTES + sum(len(image.data or b"") for image in example.images)
