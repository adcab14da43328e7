"""From a record to a sample for packing, or to a bad record: text first, images when the sample is packed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np

from vilam3_jax.data import packing, stream
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
# Errors that concern all records, so no record is skipped for them.
_FATAL = (UnavailableError, StoppingError, MemoryError)


@dataclasses.dataclass(frozen=True)
class BadRecord:
    """A record that is skipped."""

    name: str  # for messages
    reason: str  # why, in one sentence
    source: int  # number of its dataset


class Unreadable(Exception):
    """The images of a sample cannot be read."""

    def __init__(self, bad: BadRecord) -> None:
        super().__init__(f"{bad.name}: {bad.reason}")
        self.bad = bad


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

    def load(self, position: int, index: int) -> Sample | BadRecord:
        """The sample at a position of the stream; see `sample`."""
        return self.sample(self.samples.address(position), position, index)

    def load_again(self, position: int, index: int) -> Sample:
        """A sample that was readable before a restart; raises UserError if it no longer is."""
        sample = self.load(position, index)
        if isinstance(sample, BadRecord):
            raise UserError(
                f"{sample.name}: was readable before the restart, but now: {sample.reason}; restore the data"
            )
        return sample

    def sample(self, address: Address, position: int, index: int) -> Sample | BadRecord:
        """Renders and encodes a sample; errors of the record are returned as a `BadRecord`.

        Reading its images later raises `Unreadable` if they are damaged.

        Args:
          address: address of its record.
          position: position in the order of samples; seeds random choices.
          index: index of the sample in its loader shard.

        Raises:
          UnavailableError: the data cannot be read now.
          StoppingError: the settings do not allow skipping the record.
        """
        name = self.samples.name(address)
        try:
            sample = self._sample(address, position, index)
        except _FATAL:
            raise
        except Exception as error:  # the run continues, whatever is wrong with a record
            return BadRecord(name, _reason(error), address[0])
        if reason := packing.oversize_reason(self.batch_format.shape, sample):
            return BadRecord(f"{name} ({sample.id})", reason, address[0])
        return sample

    def _sample(self, address: Address, position: int, index: int) -> Sample:
        source = self.samples.sources[address[0]]
        example = self._example(address, position)
        processor = self.batch_format.processor
        with self._named_errors(address, example):
            outline = self.renderer.outline(example, source.data_root, position)
            tiled = processor.max_tiles > 1
            grids = [processor.grid_of(image.shape()) if tiled else (1, 1) for image in outline.lazy_images]
            encoded = self.batch_format.encode(self.tokenizer, self.template, example, outline, grids)
        # Queued samples hold no image bytes; packing takes the record from the cache or reads it again.
        read = functools.partial(self._read_images, address, position, tuple(grids))
        if not self.batch_format.has_dialogues:  # pairs are packed at once
            read = functools.partial(tuple, self._inputs(address, position, tuple(grids)))
        return Sample(
            example.id,
            index,
            encoded,
            read,
            processor.tile_map(grids),
            source=address[0],
            image_paths=tuple(image.path for image in example.images if image.path is not None),
            experts=outline.experts,
            missing=outline.missing,
        )

    def _example(self, address: Address, position: int) -> Example:
        source, with_experts = self.samples.sources[address[0]], self.renderer.experts_on(position)
        return self._examples.get(
            (address, position), lambda: dialogue_of(source, address[1], position, with_experts)
        )

    @contextlib.contextmanager
    def _named_errors(self, address: Address, example: Example) -> Iterator[None]:
        """Adds the id of an example to errors."""
        try:
            yield
        except UnavailableError:
            raise
        except StoppingError as error:
            raise StoppingError(f"{self.samples.name(address)} ({example.id}): {error}") from error
        except (UserError, ValueError, IndexError) as error:
            raise UserError(f"example {example.id}: {error}") from error

    def _read_images(self, address: Address, position: int, grids: _Grids) -> tuple[np.ndarray, ...]:
        try:
            return self._inputs(address, position, grids)
        except _FATAL:
            raise
        except Exception as error:
            name = self.samples.name(address)
            raise Unreadable(BadRecord(name, _reason(error), address[0])) from error

    def _inputs(self, address: Address, position: int, grids: _Grids) -> tuple[np.ndarray, ...]:
        """Inputs of the vision tower, uint8 [S, S, 3] each."""
        example = self._example(address, position)
        with self._named_errors(address, example):
            images = self._images(address, position)
            if images and address in self.donors:
                taken = self._images(self.donors[address], position)
                images = tuple(taken[i % len(taken)] for i in range(len(images)))
            if self.augment_seed is not None:
                images = augment(images, np.random.default_rng((self.augment_seed, position)))
            # Images of a donor use the grid of the sample's own, which its text was made for.
            cut = self.batch_format.processor.inputs
            return tuple(tile for image, grid in zip(images, grids, strict=True) for tile in cut(image, grid))

    def _images(self, address: Address, position: int) -> tuple[np.ndarray, ...]:
        root = self.samples.sources[address[0]].data_root
        return self.renderer.render(self._example(address, position), root, position).images


def _bytes_of(example: Example) -> int:
    return _TEXT_BYTES + sum(len(image.data or b"") for image in example.images)


def _reason(error: Exception) -> str:
    # Other errors may quote values of the record, such as patient data.
    if isinstance(error, UserError):
        return str(error)
    return f"a value in it cannot be used ({type(error).__name__})"
