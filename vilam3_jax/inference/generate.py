"""Batched generation with a key-value cache that is kept over several turns.

A `Session` holds the cache of a batch of dialogues. `append` adds the next chunk of each row (a prompt, an
expert's turn, nothing), `decode` generates. Both stay in the cache, so an agent loop never computes a prompt
twice. Rows may differ in length, and a call may skip some of them. All shapes are rounded up to a few sizes,
so that few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vilam3_jax.data.image_processor import ImageProcessor, image_processor
from vilam3_jax.data.packing import NO_GRID
from vilam3_jax.data.tokenizer import Tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.models import build
from vilam3_jax.models.model_config import resolve
from vilam3_jax.sharding.weights import as_weight

_MIN_CHUNK = 16
_MIN_CACHE = 256
_MIN_NEW = 32
_STOP_SLOTS = 8


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
    def text(cls, tokens: Sequence[int]) -> Chunk:
        """A chunk of text."""
        return cls(np.asarray(tokens, np.int32), np.full(len(tokens), -1, np.int32))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is sampled.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_p: sample from the most probable tokens that together reach this probability.
      seed: the same seed and rows give the same texts.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"temperature {self.temperature} must be >= 0 and top_p {self.top_p} in (0, 1]")


GREEDY = Sampling()


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What one `decode` generated for one row.

    Attributes:
      ids: tokens without the stop token.
      stopped: whether a stop token ended it, rather than the token limit or the end of the cache.
    """

    ids: list[int]
    stopped: bool


def row_parts(rows: NamedSharding) -> int:
    """Number of equal, contiguous parts that a sharding splits rows into."""
    devices = rows.mesh.size
    return devices // rows.shard_shape((devices,))[0]


class Generator:
    """A generative model that is ready to run.

    Attributes:
      tokenizer: its tokenizer.
      processor: makes `Chunk.images`.
      image_size: S, their side in pixels.
      tokens_per_image: T, positions of one image.
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
        """
        self.tokenizer = tokenizer
        model = resolve(model_config)
        self.processor = image_processor(model)
        self.image_size = self.processor.size
        self.max_length, self.batch_size = max_length, batch_size
        self._params = params
        self._last_prefix: tuple[tuple[int, ...], Session] | None = None
        graphdef, _ = build.abstract_model(model, "generative")
        self.tokens_per_image = model.tokens_per_image
        self._rows, self.parts = rows, 1 if rows is None else row_parts(rows)
        cached, logits, whole = _shardings(rows)
        self._start = jax.jit(
            functools.partial(_start, graphdef), static_argnums=(1, 2), out_shardings=(cached, logits)
        )
        self._repeat = jax.jit(_repeat, static_argnums=2)
        self._lengthen = jax.jit(_lengthen, static_argnums=1, out_shardings=cached)
        vocab_size = min(tokenizer.vocab_size, model.llm.vocab_size)
        self._prefill = jax.jit(
            functools.partial(_prefill, graphdef, vocab_size),
            donate_argnums=1,
            out_shardings=(cached, logits),
        )
        self._decode = jax.jit(
            functools.partial(_decode, graphdef, vocab_size),
            donate_argnums=1,
            static_argnames=("size", "sampling"),
            out_shardings=(cached, logits, whole, whole, whole),
        )

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Replaces the values of the parameters; earlier sessions become invalid."""
        self._params, self._last_prefix = params, None

    def _put(self, array: np.ndarray | None) -> Any:
        """Transfers an array whose leading axis is rows, or parts of rows, to its devices."""
        if array is None or self._rows is None:
            return array
        return jax.make_array_from_callback(array.shape, self._rows, lambda index: array[index])

    def start(self, rows: int, prefix: Sequence[int] = ()) -> Session:
        """Starts a session.

        Args:
          rows: number of dialogues.
          prefix: tokens that all rows start with, such as the cards. They are computed once for all rows, and
            reused by the next session with the same prefix.

        Raises:
          UserError: more rows than `batch_size`, or a prefix longer than `max_length`.
        """
        if not 1 <= rows <= self.batch_size:
            raise UserError(f"{rows} rows: must be 1 to the batch size, {self.batch_size}")
        tokens = tuple(int(token) for token in prefix)
        if not tokens:
            return Session(self, rows)
        if self._last_prefix is None or self._last_prefix[0] != tokens:
            single = Session(self, 1)
            single.append([Chunk.text(tokens)])
            self._last_prefix = (tokens, single)
        return Session(self, rows, self._last_prefix[1])


class Session:
    """A batch of dialogues with its cache; see the module.

    Attributes:
      rows: number of dialogues.
      lengths: int64 [rows], cached positions of each.
    """

    def __init__(self, generator: Generator, rows: int, prefix: Session | None = None):
        """Called by `Generator.start`; `prefix` is a session of one row that is copied."""
        self.rows = rows
        self.lengths = np.zeros(rows, np.int64)
        self._generator = generator
        self._batch = min(_round_up(rows, 1), generator.batch_size)
        self._size = 0
        self._cache: Any = None
        self._logits: jax.Array | None = None
        if prefix is not None:
            self._size, self.lengths = prefix._size, np.repeat(prefix.lengths, rows)
            self._cache, self._logits = generator._repeat(prefix._cache, prefix._logits, self._batch)

    def append(self, chunks: Sequence[Chunk | None]) -> None:
        """Adds a chunk to each row; None or an empty chunk leaves a row unchanged.

        Raises:
          UserError: a row would exceed the generator's `max_length`.
          ValueError: not one entry per row, or an image of the wrong size.
        """
        generator = self._generator
        if len(chunks) != self.rows:
            raise ValueError(f"{len(chunks)} chunks for {self.rows} rows")
        sizes = np.asarray([0 if chunk is None else len(chunk.tokens) for chunk in chunks], np.int64)
        if not sizes.any():
            return
        after = self.lengths + sizes
        if after.max() > generator.max_length:
            row = int(after.argmax())
            raise UserError(
                f"dialogue {row} needs {after[row]} positions, more than max_length {generator.max_length}; "
                "ask something shorter or raise max_length"
            )
        self._grow(int(after.max()))
        width = _round_up(int(sizes.max()), _MIN_CHUNK)
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
        self._cache, self._logits = generator._prefill(
            generator._params, self._cache, self._logits, self._padded(self.lengths), self._padded(sizes),
            generator._put(tokens), *(generator._put(array) for array in _image_arrays(slots, visual)),
        )  # fmt: skip
        self.lengths = after

    def decode(
        self,
        max_new_tokens: int,
        stop_ids: Sequence[int] | None = None,
        *,
        active: Sequence[bool] | None = None,
        sampling: Sampling = GREEDY,
    ) -> list[Decoded]:
        """Generates in each active row until a stop token, `max_new_tokens`, or the end of the cache.

        Returns one entry per row. The stop token is not cached: the next `append` starts with the template's
        end of turn.

        Args:
          max_new_tokens: limit for each row, at least 1.
          stop_ids: up to 8 tokens that end a turn; the tokenizer's by default.
          active: [rows], rows that generate; all by default. Each needs a prompt.
          sampling: greedy by default.
        """
        generator = self._generator
        mask = np.ones(self.rows, bool) if active is None else np.asarray(active, bool)
        stops = list(generator.tokenizer.stop_ids if stop_ids is None else stop_ids)
        if max_new_tokens < 1 or len(stops) > _STOP_SLOTS or mask.shape != (self.rows,):
            raise ValueError(f"{max_new_tokens} new tokens, {len(stops)} stop ids, {mask.shape} active")
        if not mask.any():
            return [Decoded([], False) for _ in range(self.rows)]
        if not self.lengths[mask].all():
            raise ValueError("an active row has no prompt yet")
        self._grow(min(int(self.lengths[mask].max()) + max_new_tokens, generator.max_length))
        self._cache, self._logits, ids, counts, stopped = generator._decode(
            generator._params,
            self._cache,
            self._logits,
            self._padded(self.lengths),
            self._padded(mask),
            np.asarray(stops + [-1] * (_STOP_SLOTS - len(stops)), np.int32),
            np.int32(max_new_tokens),
            np.int32(min(self._size, generator.max_length)),
            np.asarray(jax.random.key_data(jax.random.key(sampling.seed))),
            size=_round_up(max_new_tokens, _MIN_NEW),
            # The seed is an argument above, so that another seed needs no new program.
            sampling=dataclasses.replace(sampling, seed=0),
        )
        ids, counts, stopped = jax.device_get((ids, counts, stopped))
        self.lengths = self.lengths + counts[: self.rows]
        return [Decoded(ids[row, : counts[row]].tolist(), bool(stopped[row])) for row in range(self.rows)]

    def _padded(self, values: np.ndarray) -> Any:
        dtype = bool if values.dtype == bool else np.int32
        return self._generator._put(np.pad(values, (0, self._batch - self.rows)).astype(dtype))

    def _grow(self, needed: int) -> None:
        size = min(_round_up(needed, _MIN_CACHE), max(self._generator.max_length, _MIN_CACHE))
        if size <= self._size:
            return
        if self._cache is None:
            self._cache, self._logits = self._generator._start(self._generator._params, self._batch, size)
        else:
            self._cache = self._generator._lengthen(self._cache, size)
        self._size = size


def _round_up(value: int, least: int) -> int:
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


def _image_arrays(parts: Sequence[_ImageSlots], visual: np.ndarray) -> tuple[np.ndarray | None, ...]:
    """visual_index [B, L], images [G, M, S, S, 3], image_valid [G, M], image_tiles [G, M, 5] or None."""
    counts = [len(part.images) for part in parts]
    if not any(counts):
        return None, None, None, None
    slots, side = (len(parts), _round_up(max(counts), 1)), parts[0].side
    images = np.zeros((*slots, side, side, 3), np.uint8)
    tiles = np.tile(np.asarray((0, *NO_GRID), np.int32), (*slots, 1))
    for group, part in enumerate(parts):
        for slot, image in enumerate(part.images):
            images[group, slot] = image
        for slot, tile in enumerate(part.tiles):
            tiles[group, slot] = tile
    valid = np.arange(slots[1]) < np.asarray(counts)[:, None]
    return visual, images, valid, tiles if parts[0].tiled else None


def _shardings(rows: NamedSharding | None) -> tuple[Any, Any, Any]:
    """Shardings of the cache, of logits, and of outputs that every process reads."""
    if rows is None:
        return None, None, None
    cached = NamedSharding(rows.mesh, PartitionSpec(None, *rows.spec))  # the first axis is layers
    return {"k": cached, "v": cached}, rows, NamedSharding(rows.mesh, PartitionSpec())


def _start(graphdef: Any, params: Any, rows: int, size: int) -> tuple[Any, jax.Array]:
    """An empty cache and logits [rows, V]."""
    llm = build.merge(graphdef, params).llm
    vocab_size = as_weight(llm.head_kernel()).value.shape[1]
    return llm.init_cache(rows, size), jnp.zeros((rows, vocab_size), jnp.float32)


def _repeat(cache: Any, logits: jax.Array, rows: int) -> tuple[Any, jax.Array]:
    """Repeats the only row of a cache and its logits `rows` times."""
    return jax.tree.map(lambda x: jnp.repeat(x, rows, axis=1), cache), jnp.repeat(logits, rows, axis=0)


def _lengthen(cache: Any, size: int) -> Any:
    """Pads the cache to `size` positions."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]), (0, 0), (0, 0))), cache)


def _last_logits(model: Any, hidden: jax.Array, vocab_size: int) -> jax.Array:
    """Float32 [B, V] of hidden [B, D]; -inf for ids outside the tokenizer's vocabulary."""
    logits = model.llm.logits(hidden)
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)


def _prefill(
    graphdef: Any, vocab_size: int, params: Any, cache: Any, logits: jax.Array, lengths: jax.Array,
    sizes: jax.Array, tokens: jax.Array, visual: jax.Array | None, images: jax.Array | None,
    image_valid: jax.Array | None, image_tiles: jax.Array | None,
) -> tuple[Any, jax.Array]:  # fmt: skip
    """Appends a padded chunk to the cache; rows with size 0 keep their logits."""
    model = build.merge(graphdef, params)
    embeds = model.embed(tokens, images, image_valid, visual, image_tiles)
    positions = lengths[:, None] + jnp.arange(tokens.shape[1])[None]
    hidden, cache = model.llm.forward_cached(embeds, positions, cache, lengths)
    last = jnp.take_along_axis(hidden, jnp.maximum(sizes - 1, 0)[:, None, None], axis=1)[:, 0]
    return cache, jnp.where((sizes > 0)[:, None], _last_logits(model, last, vocab_size), logits)


def _choose(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Int32 [B] next tokens of float32 [B, V]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        sorted_logits = jnp.take_along_axis(logits, order, axis=-1)
        probability = jax.nn.softmax(sorted_logits, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        sorted_logits = jnp.where(before < sampling.top_p, sorted_logits, -jnp.inf)
        picked = jax.random.categorical(key, sorted_logits)
        return jnp.take_along_axis(order, picked[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _decode(
    graphdef: Any, vocab_size: int, params: Any, cache: Any, logits: jax.Array, lengths: jax.Array,
    active: jax.Array, stops: jax.Array, limit: jax.Array, room: jax.Array, key: jax.Array, *,
    size: int, sampling: Sampling,
) -> tuple[Any, jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The decoding loop on the device, until every row is done. `key` is the data of a random key.

    A row that is done keeps its length; later cache entries beyond that length are overwritten.
    """
    model = build.merge(graphdef, params)
    key = jax.random.wrap_key_data(key)

    def choose(logits: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = _choose(logits, jax.random.fold_in(key, step), sampling)
        return token, (token[:, None] == stops[None]).any(axis=1)

    def unfinished(state: dict[str, jax.Array]) -> jax.Array:
        return (state["step"] < limit) & ~state["done"].all()

    def advance(state: dict[str, Any]) -> dict[str, Any]:
        running, step, lengths = ~state["done"], state["step"], state["lengths"]
        ids = state["ids"].at[:, step].set(jnp.where(running, state["token"], state["ids"][:, step]))
        hidden, cache = model.llm.forward_cached(
            model.embed(state["token"][:, None]), lengths[:, None], state["cache"], lengths
        )
        logits = jnp.where(running[:, None], _last_logits(model, hidden[:, 0], vocab_size), state["logits"])
        lengths = lengths + running
        token, stop = choose(logits, step + 1)
        return {
            "step": step + 1,
            "token": token,
            "stopped": state["stopped"] | (running & stop),
            "done": state["done"] | stop | (lengths >= room),
            "lengths": lengths,
            "logits": logits,
            "ids": ids,
            "cache": cache,
        }

    token, stop = choose(logits, jnp.int32(0))
    state = {
        "step": jnp.int32(0),
        "token": token,
        "stopped": active & stop,
        "done": ~active | stop | (lengths >= room),
        "lengths": lengths,
        "logits": logits,
        "ids": jnp.zeros((logits.shape[0], size), jnp.int32),
        "cache": cache,
    }
    state = jax.lax.while_loop(unfinished, advance, state)
    return state["cache"], state["logits"], state["ids"], state["lengths"] - lengths, state["stopped"]
