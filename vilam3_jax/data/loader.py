"""Batches for training and evaluation, with an exact place to resume from.

S loader shards, a constant of the config, walk the one order of samples: shard s takes positions s, s + S,
... and packs them into groups. Group n comes from shard n mod S. A shard's state is the next position and the
positions that wait for a place, so a resumed run sees bitwise the batches it would have seen, with any number
of threads. Yields numpy arrays; what goes to which device is the caller's business.
"""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from vilam3_jax.data import packing, stream
from vilam3_jax.data.annotations import AnnotationStore
from vilam3_jax.data.cards import load_cards
from vilam3_jax.data.image_processor import ImageProcessor, image_processor
from vilam3_jax.data.images import augment
from vilam3_jax.data.packing import GroupShape, Sample
from vilam3_jax.data.prefetch import Producer
from vilam3_jax.data.render import ImageReader, Renderer, encode_example
from vilam3_jax.data.templates import TokenizerLike, encode_caption, model_template
from vilam3_jax.data.tokenizer import load_tokenizer
from vilam3_jax.errors import UserError

Batch = dict[str, np.ndarray]
State = dict[str, dict[str, Any]]

_READ_AHEAD = 4  # samples rendered ahead, per shard
_MAX_THREADS = 16
_BAD_IN_A_ROW = 16  # at least; small datasets are walked through once before giving up
_NAMED_RECORDS = 1000


@dataclasses.dataclass
class Stats:
    """What was returned so far, and what was set aside.

    Attributes:
      batches, samples, tokens, images: counts of what was returned.
      positions, slots: token positions and image slots of the batches, filled or not.
      skipped: (id, reason) of the records set aside, each once, the first thousand.
      skipped_total: how often a record was set aside.
    """

    batches: int = 0
    samples: int = 0
    tokens: int = 0
    images: int = 0
    positions: int = 0
    slots: int = 0
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    skipped_total: int = 0

    @property
    def token_fill(self) -> float:
        """Share of the token positions that hold a token."""
        return self.tokens / max(self.positions, 1)

    @property
    def image_fill(self) -> float:
        """Share of the image slots that hold an image."""
        return self.images / max(self.slots, 1)

    def _add(self, batch: Batch) -> None:
        self.batches += 1
        if "segment_ids" in batch:
            self.samples += int(batch["segment_ids"].max(axis=1).sum())
            mask, valid = batch["segment_ids"] > 0, batch["image_valid"]
        else:
            mask, valid = batch["text_valid"], batch["text_valid"].any(axis=1)
            self.samples += int(valid.sum())
        self.tokens += int(mask.sum())
        self.images += int(valid.sum())
        self.positions += mask.size
        self.slots += valid.size


@dataclasses.dataclass(frozen=True)
class _Bad:
    name: str
    reason: str


class _Shard:
    """One walk through every S-th position, with its packer's waiting samples."""

    def __init__(self, number: int, loader: Loader) -> None:
        self._number = number
        self._loader = loader
        self._ahead: dict[int, concurrent.futures.Future[Sample | _Bad]] = {}
        self.next = 0
        self.groups = 0
        self.pending: list[Sample] = []

    def state(self) -> dict[str, Any]:
        return {
            "next": self.next,
            "pending": [sample.index for sample in self.pending],
            "groups": self.groups,
            "order": self._loader.fingerprint,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._ahead.clear()
        self.next, self.groups = int(state["next"]), int(state["groups"])
        self.pending = []
        for index in state["pending"]:
            sample = self._loader.load(self._position(index), index)
            if isinstance(sample, _Bad):
                raise UserError(
                    f"{sample.name}: was read before the restart, now: {sample.reason}; restore the data"
                )
            self.pending.append(sample)

    def _position(self, index: int) -> int:
        return index * self._loader.shard_count + self._number

    def _read(self, index: int) -> Sample | _Bad | None:
        length = self._loader.length
        pool = self._loader.pool
        for ahead in range(index, index + _READ_AHEAD):
            if ahead not in self._ahead and (length is None or self._position(ahead) < length):
                self._ahead[ahead] = pool.submit(self._loader.load, self._position(ahead), ahead)
        future = self._ahead.pop(index, None)
        return None if future is None else future.result()

    def pull(self) -> Sample | None:
        while True:
            sample = self._read(self.next)
            if sample is None:
                return None
            self.next += 1
            if isinstance(sample, Sample):
                self._loader.note_good()
                return sample
            self._loader.note_bad(sample)

    def next_group(self, shape: GroupShape) -> Batch | None:
        rows, self.pending = packing.next_group(shape, self.pending, self.pull)
        if not any(rows):
            return None
        self.groups += 1
        return packing.assemble_group(shape, rows)


class Loader:
    """Iterable over batches; `build_loader` makes it.

    `iter` continues at the loader's state: the start, where the last batch was returned, or where
    `set_state` put it. A held-out loader starts anew with every `iter`.

    Attributes:
      stats: counts of what was returned and set aside.
      provenance: name, split, records, licences and provenance of every dataset.
      fingerprint: hash of datasets, weights and seed; a state fits only this order.
    """

    def __init__(
        self,
        *,
        samples: stream.SampleStream,
        load: Callable[[tuple[int, int], int], Sample],
        shape: GroupShape,
        pairs: bool,
        units: int,
        shards: int,
        prefetch: int,
        process_index: int,
        process_count: int,
    ) -> None:
        """See `build_loader`. `units` is the number of groups, or pairs, of the global batch."""
        self._samples = samples
        self._load = load
        self._shape = shape
        self._pairs = pairs
        self._units = units
        self._prefetch = prefetch
        self._process = (process_index, process_count)
        self.length = samples.length
        self.shard_count = shards if self.length is None else 1
        dealt = self.length is not None or not (shards % process_count or units % shards)
        if process_count > 1 and (units % process_count or not dealt):
            raise UserError(
                f"config data.loader_shards={shards} with {units} groups a batch cannot be dealt to "
                f"{process_count} processes; these must divide loader_shards, and loader_shards the groups"
            )
        self.stats = Stats()
        self.fingerprint = samples.fingerprint
        self.provenance = [
            {
                "name": source.name,
                "split": source.split,
                "records": len(source),
                "licences": source.info.get("licences", []),
                "provenance": source.info.get("provenance", {}),
            }
            for source in samples.sources
        ]
        threads = min(_MAX_THREADS, os.cpu_count() or 1)
        self.pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="vilam3-decode")
        self._skipped: collections.OrderedDict[str, str] = collections.OrderedDict()
        self._skipped_total = 0
        self._bad_run = 0
        self._producer: Producer | None = None
        self._state: State = self._snapshot(self._new_shards(None))

    def _shard_numbers(self) -> range:
        index, count = self._process
        if self.length is not None:
            return range(
                self.shard_count
            )  # held-out data: every process packs all of it and yields its own part
        each = self.shard_count // count
        return range(index * each, (index + 1) * each)

    def _new_shards(self, state: State | None) -> dict[int, _Shard]:
        shards = {number: _Shard(number, self) for number in self._shard_numbers()}
        if state is not None:
            for number, shard in shards.items():
                shard.restore(state[str(number)])
        return shards

    @staticmethod
    def _snapshot(shards: Mapping[int, _Shard]) -> State:
        return {str(number): shard.state() for number, shard in shards.items()}

    def get_state(self) -> State:
        """Returns the place after the batch returned last: a JSON value per loader shard of this process."""
        return copy.deepcopy(self._state)

    def set_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes to a place that `get_state` named, in whatever process.

        Raises:
          UserError: the state is of other data, another mixture, seed or number of shards.
        """
        self._stop()
        for number in self._shard_numbers():
            if str(number) not in state or any(int(key) >= self.shard_count for key in state):
                raise UserError(
                    f"data state has shards {', '.join(sorted(state, key=int))}, this run has "
                    f"{self.shard_count}; set data.loader_shards as it was"
                )
            if state[str(number)].get("order") != self.fingerprint:
                raise UserError(
                    "data state is of other data; restore the datasets, data.mixture and seed as they were, "
                    "or start a new workdir"
                )
        self._state = {str(n): copy.deepcopy(dict(state[str(n)])) for n in self._shard_numbers()}

    def load(self, position: int, index: int) -> Sample | _Bad:
        """Renders and encodes a sample; what is wrong with a record is returned, not raised."""
        address = self._samples.address(position)
        name = self._samples.name(address)
        try:
            sample = dataclasses.replace(self._load(address, position), index=index)
        except (UserError, ValueError, IndexError) as error:
            return _Bad(name, str(error))
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
        reason = packing.oversize_reason(self._shape, sample)
        return _Bad(f"{name} ({sample.id})", reason) if reason else sample

    def note_good(self) -> None:
        """Notes that a sample could be used."""
        self._bad_run = 0

    def note_bad(self, bad: _Bad) -> None:
        """Counts a record that was set aside.

        Raises:
          UserError: a whole epoch without one good record.
        """
        self._bad_run += 1
        self._skipped_total += 1
        if len(self._skipped) < _NAMED_RECORDS:
            self._skipped.setdefault(bad.name, bad.reason)
        if self._bad_run >= max(self._samples.records, _BAD_IN_A_ROW):
            raise UserError(f"no usable record in {self._bad_run} tried; the last: {bad.name}: {bad.reason}")

    def _batches(self, state: State | None) -> Iterator[tuple[Batch, State]]:
        shards = self._new_shards(state)
        build = self._pair_batch if self._pairs else self._packed_batch
        while (batch := build(shards)) is not None:
            yield batch, self._snapshot(shards)

    def _turns(self, shards: Mapping[int, _Shard]) -> Iterator[_Shard]:
        """Shards in turn for one batch of this process; their own counters say whose turn it is."""
        ring = list(shards.values())
        whole = self._units if self.length is not None else self._units // self._process[1]
        first = sum(shard.groups for shard in ring)
        return (ring[(first + turn) % len(ring)] for turn in range(whole))

    def _mine(self, units: list[Any]) -> list[Any]:
        """The part of a held-out batch that belongs to this process."""
        if self.length is None:
            return units
        index, count = self._process
        each = self._units // count
        return units[index * each : (index + 1) * each]

    def _packed_batch(self, shards: Mapping[int, _Shard]) -> Batch | None:
        groups = [shard.next_group(self._shape) for shard in self._turns(shards)]
        if not any(groups):
            return None
        empty = packing.assemble_group(self._shape, [[] for _ in range(self._shape.rows)])
        return packing.stack_groups(self._mine([empty if group is None else group for group in groups]))

    def _pair_batch(self, shards: Mapping[int, _Shard]) -> Batch | None:
        samples = []
        for shard in self._turns(shards):
            sample = shard.pull()
            shard.groups += sample is not None
            samples.append(sample)
        if not any(samples):
            return None
        samples = self._mine(samples)
        batch = _empty_pairs(self._shape, len(samples))
        for row, sample in enumerate(samples):
            if sample is not None:
                batch["images"][row] = sample.images[0]
                batch["text_tokens"][row, : len(sample.encoded)] = sample.encoded.tokens
                batch["text_valid"][row, : len(sample.encoded)] = True
        return batch

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches; see the class.

        Raises:
          UserError: not one record is usable.
          RuntimeError: a record met an error in the program; the message names the record.
        """
        self._stop()
        source = self._batches(None if self.length is not None else self._state)
        producer = self._producer = Producer(source, self._prefetch)
        returned = 0
        try:
            for batch, state in producer:
                self._state = state
                self._update_stats(batch)
                returned += 1
                yield batch
        finally:
            producer.close()
        self._update_stats(None)
        if not returned and not producer.called_off:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.stats.skipped[:3])
            raise UserError(f"no usable record in the held-out data: {reasons}")

    def _update_stats(self, batch: Batch | None) -> None:
        if batch is not None:
            self.stats._add(batch)
        self.stats.skipped = list(self._skipped.items())
        self.stats.skipped_total = self._skipped_total

    def _stop(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def close(self) -> None:
        """Stops and joins all threads."""
        self._stop()
        self.pool.shutdown(wait=True, cancel_futures=True)


def build_loader(
    cfg: Any,
    split: str,
    *,
    tokens_per_image: int,
    swap_images: bool = False,
    experts: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
    tokenizer: TokenizerLike | None = None,
) -> Loader:
    """Opens the data of a run.

    Args:
      cfg: the run's config.
      split: 'train' is endless; any other split is one pass in a fixed order, its last batch padded with
        empty rows.
      tokens_per_image: T, the projector's output length.
      swap_images: every sample takes the images of another one, of another patient where possible.
      experts: 'on', 'off', 'falsified' or 'mixed'; None: as the config says.
      process_index: which part of the batch to yield.
      process_count: number of parts; whole loader shards each.
      tokenizer: opened already; None: `cfg.model.tokenizer`.

    Returns:
      The loader. Packed batches ('generative'): `tokens`, `segment_ids`, `positions`, `visual_index` int32
      [B, L], `loss_weights` float32 [B, L], `images` uint8 [G, M, S, S, 3], `image_valid` bool [G, M] and,
      with 'dynamic_s2', `image_tiles` int32 [G, M, 5]. Pairs
      ('contrastive'): `images` uint8 [B, S, S, 3], `text_tokens` int32 [B, T], `text_valid` bool [B, T].

    Raises:
      UserError: data, annotations or tokenizer are missing or do not fit the config.
    """
    data, model = cfg.data, cfg.model
    pairs = cfg.kind == "contrastive"
    if tokenizer is None:
        if not model.tokenizer:
            raise UserError("config model.tokenizer is empty; set it to a tokenizer's folder")
        tokenizer = load_tokenizer(model.tokenizer)
    table = (model.text_tower if pairs else model.llm).vocab_size
    if tokenizer.vocab_size > table:
        raise UserError(
            f"tokenizer {model.tokenizer} has {tokenizer.vocab_size} tokens, the model {table}; "
            "use the tokenizer of this model or set the model's vocab_size"
        )
    mode: str = "off" if pairs else data.experts if experts is None else experts
    processor = image_processor(model, pairs=pairs)
    if not pairs:
        _check_room(data, processor, tokens_per_image)
    store = None
    if mode != "off":
        if not data.annotations:
            raise UserError(
                f"config data.annotations is empty, but experts are {mode}; set it, or experts=off"
            )
        store = AnnotationStore(data.annotations)
    reader = ImageReader(processor.kept_size)
    cards = load_cards(model.get("cards", "quickstart")) if store is not None else ()
    renderer = Renderer(image_reader=reader, experts=mode, cards=cards, annotations=store, seed=cfg.seed)
    samples = stream.SampleStream(
        stream.open_sources(data.path, tuple(data.mixture), split), cfg.seed, endless=split == "train"
    )
    donors = stream.choose_donors(samples.sources) if swap_images else {}
    template = model_template(model)

    def load(address: tuple[int, int], position: int) -> Sample:
        source = samples.sources[address[0]]
        example = source[address[1]].validate()
        try:
            rendered = renderer.render(example, source.data_root, position)
            grids = [processor.grid(image) for image in rendered.images]
            if pairs:
                encoded = encode_caption(tokenizer, stream.pair_caption(example), data.text_len)
            else:
                turns = processor.expand(rendered.turns, grids)
                encoded = encode_example(tokenizer, template, example.format, turns, tokens_per_image)
                encoded = processor.merge(encoded, grids, tokens_per_image)
        except (UserError, ValueError, IndexError) as error:
            raise UserError(f"example {example.id}: {error}") from error
        images = rendered.images
        if images and address in donors:
            other = samples.sources[donors[address][0]]
            taken = renderer.render(other[donors[address][1]], other.data_root, position).images
            images = tuple(taken[i % len(taken)] for i in range(len(images)))
        if data.augment and split == "train":
            images = augment(images, np.random.default_rng((cfg.seed, position)))
        # Images of another sample are cut as the text has room for.
        inputs = (processor.inputs(image, grid) for image, grid in zip(images, grids, strict=True))
        tiles = tuple(tile for tiles in inputs for tile in tiles)
        return Sample(example.id, position, encoded, tiles, processor.tile_map(grids))

    return Loader(
        samples=samples,
        load=load,
        shape=_group_shape(cfg, processor, tokens_per_image, tokenizer.pad_id),
        pairs=pairs,
        units=_units(cfg),
        shards=data.loader_shards,
        prefetch=data.prefetch,
        process_index=process_index,
        process_count=process_count,
    )


def batch_shapes(cfg: Any, tokens_per_image: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of the global batches of a config's loader; opens no data.

    Raises:
      UserError: a picture has no place in a group.
    """
    pairs = cfg.kind == "contrastive"
    processor = image_processor(cfg.model, pairs=pairs)
    shape = _group_shape(cfg, processor, tokens_per_image, pad_id=0)
    if pairs:
        unit = _empty_pairs(shape, 1)
    else:
        _check_room(cfg.data, processor, tokens_per_image)
        unit = packing.stack_groups([packing.assemble_group(shape, [[] for _ in range(shape.rows)])])
    units = _units(cfg)
    return {name: ((units * x.shape[0], *x.shape[1:]), x.dtype) for name, x in unit.items()}


def _units(cfg: Any) -> int:
    """Groups, or pairs, of the global batch."""
    data = cfg.data
    return data.global_pairs if cfg.kind == "contrastive" else data.global_rows // data.rows_per_group


def _group_shape(cfg: Any, processor: ImageProcessor, tokens_per_image: int, pad_id: int) -> GroupShape:
    pairs = cfg.kind == "contrastive"
    return GroupShape(
        rows=cfg.data.rows_per_group,
        seq_len=cfg.data.text_len if pairs else cfg.data.seq_len,
        images=1 if pairs else cfg.data.images_per_group,
        tokens_per_image=tokens_per_image,
        image_size=processor.size,
        pad_id=pad_id,
        tiled=bool(processor.sides),
    )


def _empty_pairs(shape: GroupShape, count: int) -> Batch:
    """A batch of pairs that are none yet."""
    size, length = shape.image_size, shape.seq_len
    return {
        "images": np.zeros((count, size, size, 3), np.uint8),
        "text_tokens": np.full((count, length), shape.pad_id, np.int32),
        "text_valid": np.zeros((count, length), bool),
    }


def _check_room(data: Any, processor: ImageProcessor, tokens_per_image: int) -> None:
    """Refuses sizes of groups in which a picture with the most tiles has no place."""
    inputs, markers = processor.max_inputs, processor.max_markers
    if inputs > max(data.images_per_group, 1):
        raise UserError(
            f"config data.images_per_group={data.images_per_group}, but an image may take {inputs} inputs "
            f"({processor.max_tiles} tiles and the whole in small); raise it or lower model.max_tiles"
        )
    if inputs > 1 and markers * tokens_per_image > data.seq_len:
        raise UserError(
            f"config data.seq_len={data.seq_len}, but an image may take {markers} x {tokens_per_image} = "
            f"{markers * tokens_per_image} tokens; raise it or lower model.max_tiles"
        )
