"""Batched generation with a key-value cache that several turns share.

A `Session` holds the cache of a batch of dialogues. `append` adds the next piece of each row (a prompt, an
expert's words, nothing), `decode` lets the model speak. What was said stays cached, so an agent loop never
computes a prompt twice. Rows may differ in length and may sit out a call. All shapes are rounded up to a few
sizes, so that a handful of compiled programs serves everything.
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

_MIN_CHUNK = 16
_MIN_CACHE = 256
_MIN_NEW = 32
_STOP_SLOTS = 8


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The next piece of one dialogue.

    Attributes:
      tokens: int32 [n]; what stands under an image token is ignored.
      visual_index: int32 [n], which of this chunk's image tokens stands here (image * T + offset); -1: text.
      images: the vision tower's inputs, uint8 [S, S, 3] each, in the order of their markers.
      tile_map: int32 [inputs, 5], see `ImageProcessor.tile_map`.
    """

    tokens: np.ndarray
    visual_index: np.ndarray
    images: tuple[np.ndarray, ...] = ()
    tile_map: np.ndarray | None = None

    @classmethod
    def text(cls, tokens: Sequence[int]) -> Chunk:
        """A chunk without images."""
        return cls(np.asarray(tokens, np.int32), np.full(len(tokens), -1, np.int32))


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: 0 takes the likeliest token; otherwise logits are divided by it.
      top_p: keep the likeliest tokens that together reach this probability, and draw among them.
      seed: of the draws; the same seed and rows give the same texts.
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
    """What one row said in one `decode`.

    Attributes:
      ids: tokens without the stop token.
      stopped: a stop token came, rather than the bound on new tokens or the end of the cache.
    """

    ids: list[int]
    stopped: bool


def row_parts(rows: NamedSharding) -> int:
    """Into how many equal parts rows are split, one after the other."""
    devices = rows.mesh.size
    return devices // rows.shard_shape((devices,))[0]


class Generator:
    """A model ready to speak.

    Attributes:
      tokenizer: its tokenizer.
      processor: makes `Chunk.images` of pictures.
      image_size: S, side in pixels of these.
      tokens_per_image: T, positions one image takes.
      max_length: most positions of one dialogue.
      batch_size: most rows of one session.
      parts: into how many equal parts these are split over devices.
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
        """Prepares a generative model; nothing is compiled before it is needed.

        Args:
          model_config: the `model` section of a config.
          params: nested parameters, on their devices; shapes alone will do where `set_params` follows.
          tokenizer: the model's tokenizer.
          max_length: see the class.
          batch_size: see the class.
          rows: how the rows of a session are split over the mesh of the parameters; None: they live on the
            devices that the parameters are on. A session must then have as many rows as divide over it. With
            several processes each calls the same methods with the same arguments; a device is given its own
            rows and the images that these look at, and every process learns what all rows say.
        """
        self.tokenizer = tokenizer
        self.processor = image_processor(model_config)
        self.image_size = self.processor.size
        self.max_length, self.batch_size = max_length, batch_size
        self._params = params
        self._known_prefix: tuple[tuple[int, ...], Session] | None = None
        graphdef, _ = build.abstract_model(model_config, "generative")
        self.tokens_per_image = resolve(model_config).tokens_per_image
        self._rows, self.parts = rows, 1 if rows is None else row_parts(rows)
        cached, logits, whole = _placement(rows)
        self._start = jax.jit(
            functools.partial(_start, graphdef), static_argnums=(1, 2), out_shardings=(cached, logits)
        )
        self._repeat = jax.jit(_repeat, static_argnums=2)
        self._lengthen = jax.jit(_lengthen, static_argnums=1, out_shardings=cached)
        known = min(tokenizer.vocab_size, int(model_config.llm.vocab_size))
        self._prefill = jax.jit(
            functools.partial(_prefill, graphdef, known), donate_argnums=1, out_shardings=(cached, logits)
        )
        self._decode = jax.jit(
            functools.partial(_decode, graphdef, known),
            donate_argnums=1,
            static_argnames=("size", "sampling"),
            out_shardings=(cached, logits, whole, whole, whole),
        )

    def set_params(self, params: Mapping[str, Any]) -> None:
        """Speaks with other values of the same parameters from now on; sessions begun before are over."""
        self._params, self._known_prefix = params, None

    def _put(self, array: np.ndarray | None) -> Any:
        """An array whose leading axis is that of the rows, or of their parts, on its devices."""
        if array is None or self._rows is None:
            return array
        return jax.make_array_from_callback(array.shape, self._rows, lambda index: array[index])

    def start(self, rows: int, prefix: Sequence[int] = ()) -> Session:
        """A session whose rows all begin with the same text.

        Args:
          rows: number of dialogues.
          prefix: tokens that every row starts with, for example the cards. They are computed once, not once a
            row, and kept for later sessions with the same prefix.

        Raises:
          UserError: more rows than `batch_size`, or a prefix longer than `max_length`.
        """
        if not 1 <= rows <= self.batch_size:
            raise UserError(f"{rows} rows: must be 1 to the batch size, {self.batch_size}")
        tokens = tuple(int(token) for token in prefix)
        if not tokens:
            return Session(self, rows)
        if self._known_prefix is None or self._known_prefix[0] != tokens:
            single = Session(self, 1)
            single.append([Chunk.text(tokens)])
            self._known_prefix = (tokens, single)
        return Session(self, rows, self._known_prefix[1])


class Session:
    """Dialogues that grow together; see the module.

    Attributes:
      rows: number of dialogues.
      lengths: int64 [rows], positions cached of each.
    """

    def __init__(self, generator: Generator, rows: int, prefix: Session | None = None):
        """Made by `Generator.start`; `prefix` is a session of one row to begin from."""
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
        """Adds one chunk to each row; None or an empty chunk leaves a row as it is.

        Args:
          chunks: [rows].

        Raises:
          UserError: a row would become longer than the generator's `max_length`.
          ValueError: not one entry per row, or an image of another size than the model's.
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
        pictures = [_Pictures(generator.processor) for _ in range(generator.parts)]
        per_image = generator.tokens_per_image
        for row, chunk in enumerate(chunks):
            if chunk is None or not sizes[row]:
                continue
            tokens[row, : sizes[row]] = chunk.tokens
            # Questions about one image share its encoding: each distinct image enters the tower once, or
            # once for every part of the rows that looks at it.
            placed = pictures[row * generator.parts // self._batch].place(chunk)
            index = np.asarray(chunk.visual_index)
            seen = index >= 0
            image, offset = np.divmod(index[seen], per_image)
            visual[row, : sizes[row]][seen] = np.asarray(placed, int)[image] * per_image + offset
        self._cache, self._logits = generator._prefill(
            generator._params, self._cache, self._logits, self._padded(self.lengths), self._padded(sizes),
            generator._put(tokens), *(generator._put(array) for array in _picture_arrays(pictures, visual)),
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
        """Lets each active row speak until a stop token, `max_new_tokens`, or the end of the cache.

        What is said is cached, the stop token is not: the next `append` starts with the template's ending.

        Args:
          max_new_tokens: bound for each row, at least 1.
          stop_ids: tokens that end a turn; the tokenizer's by default. At most 8.
          active: [rows]; others say nothing. All by default. An active row must have been appended to.
          sampling: greedy by default.

        Returns:
          [rows].
        """
        generator = self._generator
        speaks = np.ones(self.rows, bool) if active is None else np.asarray(active, bool)
        stops = list(generator.tokenizer.stop_ids if stop_ids is None else stop_ids)
        if max_new_tokens < 1 or len(stops) > _STOP_SLOTS or speaks.shape != (self.rows,):
            raise ValueError(f"{max_new_tokens} new tokens, {len(stops)} stop ids, {speaks.shape} active")
        if not speaks.any():
            return [Decoded([], False) for _ in range(self.rows)]
        if not self.lengths[speaks].all():
            raise ValueError("an active row has no prompt yet")
        self._grow(min(int(self.lengths[speaks].max()) + max_new_tokens, generator.max_length))
        self._cache, self._logits, said, counts, stopped = generator._decode(
            generator._params,
            self._cache,
            self._logits,
            self._padded(self.lengths),
            self._padded(speaks),
            np.asarray(stops + [-1] * (_STOP_SLOTS - len(stops)), np.int32),
            np.int32(max_new_tokens),
            np.int32(min(self._size, generator.max_length)),
            np.asarray(jax.random.key_data(jax.random.key(sampling.seed))),
            size=_round_up(max_new_tokens, _MIN_NEW),
            sampling=dataclasses.replace(
                sampling, seed=0
            ),  # the seed is data: no new program for another one
        )
        said, counts, stopped = jax.device_get((said, counts, stopped))
        self.lengths = self.lengths + counts[: self.rows]
        return [Decoded(said[row, : counts[row]].tolist(), bool(stopped[row])) for row in range(self.rows)]

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


class _Pictures:
    """The images that one part of the rows looks at in one `append`, each once."""

    def __init__(self, processor: ImageProcessor):
        self.side, self.tiled = processor.size, bool(processor.sides)
        self._slots: dict[bytes, int] = {}
        self._images: list[np.ndarray] = []
        self._tiles: list[np.ndarray] = []

    def place(self, chunk: Chunk) -> list[int]:
        """The slots of a chunk's images.

        Raises:
          ValueError: an image of another size than the model's, or tiles without their map.
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
        placed: list[int] = []
        for first in np.unique(firsts):  # tiles that are merged stay together
            place = np.flatnonzero(firsts == first)
            key = b"".join(chunk.images[i].tobytes() for i in place)
            if key not in self._slots:
                start = self._slots[key] = len(self._images)
                self._images += [chunk.images[i] for i in place]
                if chunk.tile_map is not None:
                    self._tiles += [np.append(start, chunk.tile_map[i, 1:]) for i in place]
            placed += range(self._slots[key], self._slots[key] + len(place))
        return placed

    def __len__(self) -> int:
        return len(self._images)

    def fill(self, images: np.ndarray, tiles: np.ndarray) -> None:
        """Writes them to the first slots of uint8 [M, S, S, 3], and of int32 [M, 5] where there are tiles."""
        if self._images:
            images[: len(self)] = np.stack(self._images)
        if self._tiles:
            tiles[: len(self)] = np.stack(self._tiles)


def _picture_arrays(parts: Sequence[_Pictures], visual: np.ndarray) -> tuple[np.ndarray | None, ...]:
    """visual_index [B, L], images [G, M, S, S, 3], image_valid [G, M], image_tiles [G, M, 5] or None."""
    fullest = max(len(part) for part in parts)
    if not fullest:
        return None, None, None, None
    slots, side = (len(parts), _round_up(fullest, 1)), parts[0].side
    images = np.zeros((*slots, side, side, 3), np.uint8)
    tiles = np.tile(np.asarray((0, *NO_GRID), np.int32), (*slots, 1))
    for part, own_images, own_tiles in zip(parts, images, tiles, strict=True):
        part.fill(own_images, own_tiles)
    valid = np.arange(slots[1]) < np.asarray([len(part) for part in parts])[:, None]
    return visual, images, valid, tiles if parts[0].tiled else None


def _placement(rows: NamedSharding | None) -> tuple[Any, Any, Any]:
    """Shardings of a cache, of logits, and of what every process must be able to read."""
    if rows is None:
        return None, None, None
    cached = NamedSharding(rows.mesh, PartitionSpec(None, *rows.spec))  # layers come first
    return {"k": cached, "v": cached}, rows, NamedSharding(rows.mesh, PartitionSpec())


def _start(graphdef: Any, params: Any, rows: int, size: int) -> tuple[Any, jax.Array]:
    """An empty cache and logits [rows, V]."""
    llm = build.merge(graphdef, params).llm
    return llm.init_cache(rows, size), jnp.zeros((rows, llm.head_kernel().shape[1]), jnp.float32)


def _repeat(cache: Any, logits: jax.Array, rows: int) -> tuple[Any, jax.Array]:
    """Copies the only row of a cache and its logits `rows` times."""
    return jax.tree.map(lambda x: jnp.repeat(x, rows, axis=1), cache), jnp.repeat(logits, rows, axis=0)


def _lengthen(cache: Any, size: int) -> Any:
    """Room for `size` positions a row."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, size - x.shape[2]), (0, 0), (0, 0))), cache)


def _last_logits(model: Any, hidden: jax.Array, known: int) -> jax.Array:
    """Float32 [B, V] of hidden [B, D]; entries that the tokenizer does not know can never be chosen."""
    logits = model.llm.logits(hidden)
    return jnp.where(jnp.arange(logits.shape[-1]) < known, logits, -jnp.inf)


def _prefill(
    graphdef: Any, known: int, params: Any, cache: Any, logits: jax.Array, lengths: jax.Array,
    sizes: jax.Array, tokens: jax.Array, visual: jax.Array | None, images: jax.Array | None,
    image_valid: jax.Array | None, image_tiles: jax.Array | None,
) -> tuple[Any, jax.Array]:  # fmt: skip
    """Writes a padded chunk behind what is cached; rows with size 0 keep their logits."""
    model = build.merge(graphdef, params)
    embeds = model.embed(tokens, images, image_valid, visual, image_tiles)
    positions = lengths[:, None] + jnp.arange(tokens.shape[1])[None]
    hidden, cache = model.llm.forward_cached(embeds, positions, cache, lengths)
    last = jnp.take_along_axis(hidden, jnp.maximum(sizes - 1, 0)[:, None, None], axis=1)[:, 0]
    return cache, jnp.where((sizes > 0)[:, None], _last_logits(model, last, known), logits)


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
    graphdef: Any, known: int, params: Any, cache: Any, logits: jax.Array, lengths: jax.Array,
    active: jax.Array, stops: jax.Array, limit: jax.Array, room: jax.Array, key: jax.Array, *,
    size: int, sampling: Sampling,
) -> tuple[Any, jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The loop on the device; ends when every row has stopped. `key` holds the data of a random key.

    A row that is done keeps its length: what it writes later lands behind its end and is overwritten.
    """
    model = build.merge(graphdef, params)
    key = jax.random.wrap_key_data(key)

    def choose(logits: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        token = _choose(logits, jax.random.fold_in(key, step), sampling)
        return token, (token[:, None] == stops[None]).any(axis=1)

    def ready(state: dict[str, jax.Array]) -> jax.Array:
        return (state["step"] < limit) & ~state["done"].all()

    def advance(state: dict[str, Any]) -> dict[str, Any]:
        speaking, step, lengths = ~state["done"], state["step"], state["lengths"]
        said = state["said"].at[:, step].set(jnp.where(speaking, state["token"], state["said"][:, step]))
        hidden, cache = model.llm.forward_cached(
            model.embed(state["token"][:, None]), lengths[:, None], state["cache"], lengths
        )
        logits = jnp.where(speaking[:, None], _last_logits(model, hidden[:, 0], known), state["logits"])
        lengths = lengths + speaking
        token, stop = choose(logits, step + 1)
        return {
            "step": step + 1,
            "token": token,
            "stopped": state["stopped"] | (speaking & stop),
            "done": state["done"] | stop | (lengths >= room),
            "lengths": lengths,
            "logits": logits,
            "said": said,
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
        "said": jnp.zeros((logits.shape[0], size), jnp.int32),
        "cache": cache,
    }
    state = jax.lax.while_loop(ready, advance, state)
    return state["cache"], state["logits"], state["said"], state["lengths"] - lengths, state["stopped"]
