"""Batched generation with a key-value cache that is kept over several turns.

A `Session` holds the cache of a batch of dialogues. `append` adds the next chunk of each row (a prompt, an
expert's turn, nothing), `decode` generates. Both stay in the cache, so an agent loop never computes a prompt
twice. Rows may differ in length, and a call may skip some of them. A row can be copied from one session to
another (`extract`, `insert`), which is how `batching` refills the rows of finished dialogues. All shapes are
rounded up to a few sizes, so that few programs are compiled.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from vilam3_jax.data.examples import Turn
from vilam3_jax.data.image_processor import ImageProcessor, image_processor
from vilam3_jax.data.packing import NO_GRID
from vilam3_jax.data.templates import Encoded
from vilam3_jax.data.tokenizer import Tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.inference import programs
from vilam3_jax.inference.placement import head_columns, split_head
from vilam3_jax.inference.sampling import GREEDY, RowSampling, Sampling
from vilam3_jax.models import kv_cache
from vilam3_jax.models.model_config import resolve

_MIN_CHUNK = 16
_MIN_CACHE = 256
MIN_NEW = 32
MAX_STOP_IDS = 8
_PREFIXES = 8
PART = 512  # positions of a prompt that are computed together
MIN_PREFIX = 16  # tokens worth keeping for other dialogues


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The next part of one dialogue.

    Attributes:
      tokens: int32 [n]; ignored at image tokens.
      visual_index: int32 [n], index among the chunk's image tokens (image * T + offset); -1 for text.
      images: inputs of the vision tower, uint8 [S, S, 3] each, in the order of their markers.
      tile_map: int32 [inputs, 5], see `ImageProcessor.tile_map`.
    """

    tokens: np.ndarray
    visual_index: np.ndarray
    images: tuple[np.ndarray, ...] = ()
    tile_map: np.ndarray | None = None

    @classmethod
    def text(cls, tokens: Sequence[int] | np.ndarray) -> Chunk:
        """A chunk of text."""
        return cls(np.asarray(tokens, np.int32), np.full(len(tokens), -1, np.int32))

    @property
    def key(self) -> bytes:
        """Hash of everything that the model reads: tokens, places of images, their pixels and tiles."""
        digest = hashlib.sha256()
        parts = [self.tokens, self.visual_index, *self.images]
        for part in parts if self.tile_map is None else [*parts, self.tile_map]:
            array = np.ascontiguousarray(part)
            digest.update(f"{array.dtype.str} {array.shape};".encode() + array.tobytes())
        return digest.digest()

    def join(self, other: Chunk) -> Chunk:
        """This chunk followed by another one; only one of them may have images."""
        if self.images and other.images:
            raise ValueError("both chunks have images")
        return dataclasses.replace(
            self if self.images else other,
            tokens=np.concatenate([self.tokens, other.tokens]).astype(np.int32),
            visual_index=np.concatenate([self.visual_index, other.visual_index]).astype(np.int32),
        )

    def split(self, place: int) -> tuple[Chunk, Chunk]:
        """Cuts before token `place`; all images must lie on one side.

        Raises:
          ValueError: there are images on both sides.
        """
        parts = Chunk.text(self.tokens[:place]), Chunk.text(self.tokens[place:])
        sides = self.visual_index[:place], self.visual_index[place:]
        if all((side >= 0).any() for side in sides):
            raise ValueError(f"images before and after token {place}")
        return tuple(  # type: ignore[return-value]
            dataclasses.replace(self, tokens=part.tokens, visual_index=side) if (side >= 0).any() else part
            for part, side in zip(parts, sides, strict=True)
        )


def encoded_chunk(
    turns: Sequence[Turn],
    images: Sequence[np.ndarray],
    processor: ImageProcessor,
    tokens_per_image: int,
    encode: Callable[[Sequence[Turn]], Encoded],
) -> Chunk:
    """A chunk of text and images.

    Args:
      turns: with one `<image>` per image.
      images: uint8 [H, W, 3] each, in order.
      processor: of the model.
      tokens_per_image: T.
      encode: turns ↦ tokens, one of the functions of `data.templates`.

    Raises:
      ValueError: the numbers of markers and images differ.
    """
    grids = [processor.grid(image) for image in images]
    encoded = processor.merge(encode(processor.expand(turns, grids)), grids, tokens_per_image)
    index = encoded.image_of_token * tokens_per_image + encoded.visual_offset
    inputs = tuple(tile for image in images for tile in processor.inputs(image))
    visual = np.where(encoded.image_of_token >= 0, index, -1)
    return Chunk(encoded.tokens, visual, inputs, processor.tile_map(grids))


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one `decode` generated for one row.

    Attributes:
      ids: tokens without the stop token.
      stopped: whether a stop token ended it, rather than the token limit or the end of the cache.
      log_probs: of `ids`, under the model's own distribution.
      error: why the row ended early, such as logits that are not finite; "" without error.
    """

    ids: list[int]
    stopped: bool
    log_probs: tuple[float, ...] = dataclasses.field(default=(), compare=False)
    error: str = ""


def row_parts(rows: NamedSharding) -> int:
    """Number of equal, contiguous parts that a sharding splits rows into."""
    devices = rows.mesh.size
    return devices // rows.shard_shape((devices,))[0]


class Generator:
    """A generative model that is ready to run.

    Attributes:
      model: its config.
      tokenizer: its tokenizer.
      processor: makes `Chunk.images`.
      image_size: S, their side in pixels.
      tokens_per_image: T, positions of one image.
      vocab_size: V, tokens that can be generated.
      max_length: maximum positions of a dialogue.
      batch_size: maximum rows of a session.
      parts: number of equal parts that rows are split into over devices.
    """

    def __init__(
        self,
        model_config: Any,
        params: Mapping[str, Any],
        tokenizer: Tokenizer,
        *,
        max_length: int = 2048,
        batch_size: int = 16,
        rows: NamedSharding | None = None,
        mesh: Mesh | None = None,
        cache_dtype: str | None = None,
    ):
        """Compiles nothing before first use.

        Args:
          model_config: section `model` of a config, typed or not.
          params: nested parameters, on their devices; shapes suffice if `set_params` follows.
          tokenizer: tokenizer of the model.
          max_length: see the class.
          batch_size: see the class.
          rows: sharding of the rows of a session over the mesh of the parameters, which must divide them;
            None: rows are on the devices of the parameters. With several processes, all call the same methods
            with the same arguments. A device receives its own rows and their images; every process receives
            the output of all rows.
          mesh: mesh of the parameters if rows are not split over it; every device then computes its part of
            the heads and hidden units of all rows.
          cache_dtype: one of `kv_cache.CACHE_DTYPES`; by default the type of activations.

        Raises:
          UserError: unknown `cache_dtype`, or int8 without Qwix.
        """
        self.tokenizer = tokenizer
        self.model = model = resolve(model_config)
        self.processor = image_processor(model)
        self.image_size = self.processor.size
        self.max_length, self.batch_size = max_length, batch_size
        self._params = params if mesh is None else split_head(params, mesh)
        self._prefixes: collections.OrderedDict[bytes, _Prefix] = collections.OrderedDict()
        self.tokens_per_image = model.tokens_per_image
        self._rows, self.parts = rows, 1 if rows is None else row_parts(rows)
        self.vocab_size = min(tokenizer.vocab_size, model.llm.vocab_size)
        self._programs = programs.build_programs(
            model,
            self.vocab_size,
            head_columns(self._params),
            kv_cache.dtype_of(model.dtype if cache_dtype is None else cache_dtype),
            rows,
            mesh,
        )

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Replaces the values of the parameters; earlier sessions become invalid."""
        self._params = params
        self.forget_prefixes()

    def forget_prefixes(self) -> None:
        """Frees the caches of the prefixes that earlier sessions started with."""
        self._prefixes.clear()

    def _put(self, array: np.ndarray | None) -> Any:
        """Transfers an array whose leading axis is rows, or parts of rows, to its devices."""
        if array is None or self._rows is None:
            return array
        return jax.make_array_from_callback(array.shape, self._rows, lambda index: array[index])

    def embed_image(self, image: np.ndarray) -> np.ndarray:
        """Mean of the tokens of a uint8 [H, W, 3] image as the LLM reads them, float32 [D]."""
        grid = self.processor.grid(image)
        inputs, tiles = self.processor.inputs(image), self.processor.tile_map([grid])
        count = len(inputs) * self.tokens_per_image
        slots = _ImageSlots(self.processor)
        slots.add(Chunk(np.zeros(count, np.int32), np.arange(count, dtype=np.int32), tuple(inputs), tiles))
        visual = self._programs.encode(self._params, *_image_arrays([slots]))
        return np.asarray(visual[0, :count].mean(axis=0), np.float32)

    def start(self, rows: int, prefix: Chunk | None = None, *, size: int | None = None) -> Session:
        """Starts a session.

        Args:
          rows: number of dialogues.
          prefix: chunk that all rows start with, such as the cards and an image. It is computed once for all
            rows, and reused by later sessions with the same prefix: the same tokens and the same pixels.
          size: positions of the cache, at least those of `prefix`; by default it grows as needed.

        Raises:
          UserError: more rows than `batch_size`, or a prefix longer than `max_length`.
        """
        if not 1 <= rows <= self.batch_size:
            raise UserError(f"{rows} rows: must be 1 to the batch size, {self.batch_size}")
        session = Session(self, rows, size)
        if prefix is not None and len(prefix.tokens):
            found = self._prefix(prefix)
            _exhaust(self.read_prefix(prefix))
            assert found.session is not None
            session._start_with(found.session)
        return session

    def read_prefix(self, prefix: Chunk) -> Iterator[None]:
        """Computes a prefix for later sessions in parts, see `Session.read`; known parts are skipped.

        Several iterators of one prefix share the work.
        """
        try:
            # Not `yield from`, which would end the work of all if one of them is closed.
            for _ in self._prefix(prefix).parts:
                yield
        except Exception:
            self._prefixes.pop(prefix.key, None)
            raise

    def _prefix(self, chunk: Chunk) -> _Prefix:
        """What is computed of a prefix; the least recently used one is dropped beyond a few."""
        found = self._prefixes.setdefault(chunk.key, _Prefix(self, chunk))
        self._prefixes.move_to_end(chunk.key)
        while len(self._prefixes) > _PREFIXES:
            self._prefixes.popitem(last=False)
        return found


class _Prefix:
    """A session of one row that holds a prefix.

    Attributes:
      session: the session, once it has been started.
      parts: iterator that computes what is missing.
    """

    def __init__(self, generator: Generator, chunk: Chunk):
        self.session: Session | None = None
        self.parts = self._read(generator, chunk)

    def _read(self, generator: Generator, chunk: Chunk) -> Iterator[None]:
        # The text before the first image, such as the cards, is a prefix of its own.
        text, rest = chunk.split(int((chunk.visual_index >= 0).argmax()))
        if len(text.tokens) < MIN_PREFIX:
            text, rest = None, chunk
        else:
            yield from generator.read_prefix(text)
        self.session = generator.start(1, text)
        yield from self.session.read([rest])


class Session:
    """A batch of dialogues with its cache; see the module.

    Attributes:
      rows: number of dialogues.
      lengths: int64 [rows], cached positions of each.
    """

    def __init__(self, generator: Generator, rows: int, size: int | None = None):
        """Called by `Generator.start`."""
        self.rows = rows
        self.lengths = np.zeros(rows, np.int64)
        self._generator = generator
        self._batch = min(round_up(rows, 1), generator.batch_size)
        self._fixed = size is not None
        self._size = 0
        self._state: programs.State | None = None
        if size is not None:
            self._allocate(size)

    def _start_with(self, prefix: Session) -> None:
        """Copies the only row of `prefix` to all rows."""
        generator = self._generator
        self.lengths = np.repeat(prefix.lengths, self.rows)
        state = generator._programs.repeat(prefix._state, self._batch)
        if self._size > prefix._size:
            state = generator._programs.lengthen(state, self._size)
        self._state, self._size = state, max(self._size, prefix._size)

    def append(self, chunks: Sequence[Chunk | None]) -> None:
        """Adds a chunk to each row; None or an empty chunk leaves a row unchanged.

        Raises:
          UserError: a row would exceed the generator's `max_length`.
          ValueError: not one entry per row, or an image of the wrong size.
        """
        _exhaust(self.read(chunks))

    def read(self, chunks: Sequence[Chunk | None]) -> Iterator[None]:
        """`append` in parts of at most `PART` positions, which bound the memory of activations.

        Checks and raises at once. The iterator pauses between parts; until it ends, the session must not be
        used otherwise.
        """
        sizes = self._sizes(chunks)
        if not sizes.any():
            return iter(())
        self._grow(int((self.lengths + sizes).max()))
        return self._parts(sizes, *self._chunk_arrays(chunks, sizes))

    def _parts(
        self, sizes: np.ndarray, tokens: np.ndarray, index: np.ndarray, images: tuple[Any, ...]
    ) -> Iterator[None]:
        generator, first = self._generator, 0
        visual = generator._programs.encode(generator._params, *images) if images else None
        for width in part_widths(int(sizes.max())):
            if first:
                yield
            part = slice(first, first + width)
            new = np.clip(sizes - first, 0, width)
            shown = (index[:, part] >= 0).any()
            self._state = generator._programs.prefill(
                generator._params,
                self._state,
                self._padded(self.lengths),
                self._padded(new),
                generator._put(tokens[:, part]),
                generator._put(index[:, part]) if shown else None,
                visual if shown else None,
            )
            self.lengths = self.lengths + new
            first += width

    def score(self, continuations: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probabilities of the tokens of one text per row, in one pass; the session is unchanged.

        Args:
          continuations: [rows], tokens that may follow; empty for none.

        Returns:
          float32 [n] for each row, log-probabilities of its tokens, each given the row and those before it.

        Raises:
          UserError: a row would exceed the generator's `max_length`.
          ValueError: not one entry per row, or a row without a prompt.
        """
        generator = self._generator
        chunks = [Chunk.text(tokens) for tokens in continuations]
        sizes = self._sizes(chunks)
        if not self.lengths[sizes > 0].all():
            raise ValueError("a row to score has no prompt yet")
        if not sizes.any():
            return [np.zeros(0, np.float32) for _ in continuations]
        self._grow(int((self.lengths + sizes).max()))
        tokens, *_ = self._chunk_arrays(chunks, sizes)
        log_probs = jax.device_get(
            generator._programs.score(
                generator._params, self._state, self._padded(self.lengths), generator._put(tokens)
            )
        )
        return [log_probs[row, : sizes[row]] for row in range(self.rows)]

    def decode(
        self,
        max_new_tokens: int | Sequence[int],
        stop_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        *,
        active: Sequence[bool] | None = None,
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        allowed: np.ndarray | None = None,
        until: int | None = None,
    ) -> list[Decoded]:
        """Generates in each active row until a stop token, `max_new_tokens`, or the end of the cache.

        Returns one entry per row. The stop token is not cached: the next `append` starts with the template's
        end of turn. Generation may continue with another call, which gives the same tokens as one call.

        Args:
          max_new_tokens: limit, for all rows or for each, at least 1.
          stop_ids: up to 8 tokens that end a turn, for all rows or for each; the tokenizer's by default.
          active: [rows], rows that generate; all by default. Each needs a prompt.
          sampling: for all rows or for each; greedy by default.
          allowed: bool [rows, V], the tokens that each row may generate; for one token.
          until: return as soon as this many rows are done; by default when all are.
        """
        generator = self._generator
        mask = np.ones(self.rows, bool) if active is None else np.asarray(active, bool)
        limits = np.broadcast_to(np.asarray(max_new_tokens, np.int64), self.rows)
        stops = self._stops(generator.tokenizer.stop_ids if stop_ids is None else stop_ids)
        if limits.min() < 1 or mask.shape != (self.rows,):
            raise ValueError(f"{max_new_tokens} new tokens, {mask.shape} active")
        if not mask.any():
            return [Decoded([], False) for _ in range(self.rows)]
        if not self.lengths[mask].all():
            raise ValueError("an active row has no prompt yet")
        self._grow(min(int((self.lengths + limits)[mask].max()), generator.max_length))
        each = [sampling] * self.rows if isinstance(sampling, Sampling) else list(sampling)
        each += [GREEDY] * (self._batch - self.rows)
        self._state, out = generator._programs.decode(
            generator._params,
            self._state,
            self._padded(self.lengths),
            self._padded(mask),
            self._padded(limits),
            RowSampling(*map(generator._put, RowSampling.of(each))),
            None if allowed is None else self._padded(allowed),
            self._padded(stops),
            np.int32(min(self._size, generator.max_length)),
            np.int32(self._batch if until is None else until),
            size=round_up(int(limits.max()), MIN_NEW),
        )
        out = jax.device_get(out)
        self.lengths = self.lengths + out.counts[: self.rows]
        return [self._decoded(row, out) for row in range(self.rows)]

    def _stops(self, given: Sequence[int] | Sequence[Sequence[int]]) -> np.ndarray:
        """Stop tokens of each row, int32 [rows, 8], padded with -1."""
        if given and isinstance(given[0], Sequence):
            rows = [list(one) for one in given if isinstance(one, Sequence)]
        else:
            rows = [list(given)] * self.rows
        if len(rows) != self.rows or max(map(len, rows)) > MAX_STOP_IDS:
            raise ValueError(f"stop ids {given}: at most {MAX_STOP_IDS}, for all rows or for each")
        return np.asarray([row + [-1] * (MAX_STOP_IDS - len(row)) for row in rows], np.int32)

    def _decoded(self, row: int, out: programs.Generated) -> Decoded:
        count = out.counts[row]
        error = "" if out.finite[row] else self._first_not_finite(row)
        ids = out.ids[row, :count].tolist()
        return Decoded(ids, bool(out.stopped[row]), tuple(out.log_probs[row, :count].tolist()), error)

    def _first_not_finite(self, row: int) -> str:
        """Names the first activation that is not finite, from the keys and values in the cache."""
        cache = self._generator._programs.extract(self._state, row).cache
        by_layer = np.asarray(kv_cache.not_finite(cache))[:, 0, : self.lengths[row]]
        if not by_layer.any():
            return "the logits are not finite, unlike all keys and values; check the last layer and the head"
        position = int(by_layer.any(axis=0).argmax())
        layer = int(by_layer[:, position].argmax())
        where = "the embedding of the input" if layer == 0 else f"the output of layer {layer - 1} of the LLM"
        return (
            f"the logits are not finite; the first activation that is not is {where} at position {position}"
        )

    def insert(self, row: int, source: Session) -> None:
        """Replaces a row with the only row of another session, whose cache must not be longer."""
        if source.rows != 1 or source._size > self._size:
            raise ValueError(f"{source.rows} rows of {source._size} positions into {self._size}")
        self._state = self._generator._programs.insert(self._state, source._state, np.int32(row))
        self.lengths[row] = source.lengths[0]

    def extract(self, row: int, size: int | None = None) -> Session:
        """A copy of a row, with a cache of `size` positions; by default of this session's."""
        single = Session(self._generator, 1)
        single._state, single._size, single._fixed = self._copy(row), self._size, size is not None
        single.lengths = self.lengths[row : row + 1].copy()
        if size is not None and size > self._size:
            single._state, single._size = self._generator._programs.lengthen(single._state, size), size
        return single

    def _copy(self, row: int) -> programs.State:
        return self._generator._programs.extract(self._state, np.int32(row))

    def rewind(self, row: int, length: int) -> None:
        """Forgets the positions of a row from `length` on; the row needs a chunk before it can generate."""
        if not 0 <= length <= self.lengths[row]:
            raise ValueError(f"row {row} has {self.lengths[row]} positions, not {length}")
        self.lengths[row] = length

    def _sizes(self, chunks: Sequence[Chunk | None]) -> np.ndarray:
        """Int64 [rows], tokens of each chunk; checks that they fit."""
        if len(chunks) != self.rows:
            raise ValueError(f"{len(chunks)} chunks for {self.rows} rows")
        sizes = np.asarray([0 if chunk is None else len(chunk.tokens) for chunk in chunks], np.int64)
        after, limit = self.lengths + sizes, self._generator.max_length
        if after.max() > limit:
            row = int(after.argmax())
            raise UserError(
                f"dialogue {row} needs {after[row]} positions, more than max_length {limit}; "
                "ask something shorter or raise max_length"
            )
        return sizes

    def _chunk_arrays(
        self, chunks: Sequence[Chunk | None], sizes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, tuple[Any, ...]]:
        """Tokens [B, L], visual_index [B, L], and the arrays of `_image_arrays` on their devices."""
        generator = self._generator
        width = sum(part_widths(int(sizes.max())))
        tokens = np.zeros((self._batch, width), np.int32)
        visual = np.full((self._batch, width), -1, np.int32)
        slots = [_ImageSlots(generator.processor) for _ in range(generator.parts)]
        per_image = generator.tokens_per_image
        for row, chunk in enumerate(chunks):
            if chunk is None or not sizes[row]:
                continue
            tokens[row, : sizes[row]] = chunk.tokens
            # The tower encodes each distinct image once per part of the rows that uses it.
            own_slots = slots[row * generator.parts // self._batch].add(chunk)
            index = np.asarray(chunk.visual_index)
            is_image = index >= 0
            image, offset = np.divmod(index[is_image], per_image)
            visual[row, : sizes[row]][is_image] = np.asarray(own_slots, int)[image] * per_image + offset
        images = tuple(map(generator._put, _image_arrays(slots))) if (visual >= 0).any() else ()
        return tokens, visual, images

    def _padded(self, values: np.ndarray) -> Any:
        dtype = bool if values.dtype == bool else np.int32
        padding = [(0, self._batch - self.rows), *[(0, 0)] * (values.ndim - 1)]
        return self._generator._put(np.pad(values, padding).astype(dtype))

    def _grow(self, needed: int) -> None:
        if needed <= self._size:
            return
        if self._fixed:
            raise ValueError(f"a dialogue needs {needed} positions, the cache has {self._size}")
        size = cache_size(needed, self._generator.max_length)
        if self._state is None:
            self._allocate(size)
        elif size > self._size:
            self._state, self._size = self._generator._programs.lengthen(self._state, size), size

    def _allocate(self, size: int) -> None:
        generator = self._generator
        self._state, self._size = generator._programs.start(generator._params, self._batch, size), size


def cache_size(needed: int, max_length: int) -> int:
    """Positions of the cache of a dialogue that needs `needed`, one of a few sizes."""
    return min(round_up(needed, _MIN_CACHE), max(max_length, _MIN_CACHE))


def part_widths(positions: int) -> list[int]:
    """Widths of the parts in which a chunk is read, the last one padded to one of a few sizes."""
    whole, rest = divmod(positions, PART)
    return [PART] * whole + ([round_up(rest, _MIN_CHUNK)] if rest else [])


def _exhaust(parts: Iterator[None]) -> None:
    collections.deque(parts, maxlen=0)


def round_up(value: int, least: int) -> int:
    """The smallest 2^k or 3 * 2^k that is at least `value` and `least`."""
    wanted = max(value, least)
    power = 1 << (wanted - 1).bit_length()
    return power * 3 // 4 if power >= 4 and wanted <= power * 3 // 4 else power


class _ImageSlots:
    """The distinct images of one part of the rows in one `append`."""

    def __init__(self, processor: ImageProcessor):
        self.side, self.tiled = processor.size, bool(processor.sides)
        self.images: list[np.ndarray] = []
        self.tiles: list[np.ndarray] = []
        self._slots: dict[bytes, int] = {}

    def add(self, chunk: Chunk) -> list[int]:
        """Returns the slots of a chunk's images.

        Raises:
          ValueError: an image of the wrong size, or tiles without a map.
        """
        wanted = (self.side, self.side, 3)
        for image in chunk.images:
            if image.shape != wanted or image.dtype != np.uint8:
                raise ValueError(f"image {image.dtype} {image.shape}: the model needs uint8 {wanted}")
        if chunk.images and self.tiled == (chunk.tile_map is None):
            raise ValueError(
                f"tile_map {chunk.tile_map}: the model {'needs one' if self.tiled else 'has none'}"
            )
        count = len(chunk.images)
        firsts = np.arange(count) if chunk.tile_map is None else chunk.tile_map[:, 0]
        slots: list[int] = []
        for first in np.unique(firsts):  # tiles of one image stay together
            inputs = np.flatnonzero(firsts == first)
            key = b"".join(chunk.images[i].tobytes() for i in inputs)
            if key not in self._slots:
                start = self._slots[key] = len(self.images)
                self.images += [chunk.images[i] for i in inputs]
                if chunk.tile_map is not None:
                    self.tiles += [np.append(start, chunk.tile_map[i, 1:]) for i in inputs]
            slots += range(self._slots[key], self._slots[key] + len(inputs))
        return slots


def _image_arrays(parts: Sequence[_ImageSlots]) -> tuple[np.ndarray | None, ...]:
    """Images [G, M, S, S, 3], image_valid [G, M], image_tiles [G, M, 5] or None; at least one image."""
    counts = [len(part.images) for part in parts]
    slots, side = (len(parts), round_up(max(counts), 1)), parts[0].side
    images = np.zeros((*slots, side, side, 3), np.uint8)
    tiles = np.tile(np.asarray((0, *NO_GRID), np.int32), (*slots, 1))
    for group, part in enumerate(parts):
        for slot, image in enumerate(part.images):
            images[group, slot] = image
        for slot, tile in enumerate(part.tiles):
            tiles[group, slot] = tile
    valid = np.arange(slots[1]) < np.asarray(counts)[:, None]
    return images, valid, tiles if parts[0].tiled else None
