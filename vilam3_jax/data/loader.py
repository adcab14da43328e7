"""Batches for training and evaluation, with an exact place to resume from.

S loader shards, a constant of the config, walk the one order of samples: of every S positions each takes one
(`stream.dealt_position`), and packs them into groups. What one shard gives to a batch lies together in it, so
that a process whose devices hold a part of the batch runs only the shards of that part. A shard's state is
the next position and the positions that wait for a place, so a resumed run sees bitwise the batches it would
have seen, with any number of threads and processes. Texts are made first; images are read once their sample
has a place, so what waits costs little memory. Yields numpy arrays; what goes to which device is the caller's
business.
"""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import dataclasses
import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vilam3_jax.data import packing, stream
from vilam3_jax.data.batch_layout import Batch, check_room, empty_pairs, global_units, group_shape
from vilam3_jax.data.experts.cards import card_list
from vilam3_jax.data.experts.dialogues.rules import split_row
from vilam3_jax.data.experts.dialogues.scene import Setting
from vilam3_jax.data.experts.exchange import Style
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.image_processor import image_processor
from vilam3_jax.data.packing import GroupShape, Sample
from vilam3_jax.data.prefetch import Producer
from vilam3_jax.data.render import ImageReader, Renderer
from vilam3_jax.data.sample_reader import SampleReader
from vilam3_jax.data.templates import TokenizerLike
from vilam3_jax.data.tokenizer import load_tokenizer
from vilam3_jax.errors import UnavailableError, UserError

State = dict[str, dict[str, Any]]

_READ_AHEAD = 4  # samples rendered ahead, per shard
_MAX_THREADS = 16
# Bad records of one dataset in a row before giving up: all of a small one, enough to know of a large one.
_BAD_IN_A_ROW = (16, 1000)
_NAMED_RECORDS = 100_000
_SIZES_OF_A_SHARD = 1000
_TEXT, _IMAGES = "text", "images"  # the two parts of a record, read one after the other


@dataclasses.dataclass
class Stats:
    """What was returned so far, and what was set aside.

    Attributes:
      batches, samples, tokens, images: counts of what was returned.
      positions, slots: token positions and image slots of the batches, filled or not.
      skipped: (id, reason) of the records set aside, each once, the first hundred thousand.
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
    source: int


class Unreadable(Exception):
    """The images of a sample cannot be read."""

    def __init__(self, bad: _Bad) -> None:
        super().__init__(bad)
        self.bad = bad


_Images = Sequence[np.ndarray]
_Placed = list[list[tuple[Sample, "concurrent.futures.Future[_Images]"]]]  # a group whose images are read


class _Shard:
    """One walk through a shard's positions, with its packer's waiting samples."""

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
            "tokenizer": self._loader.tokenizer_fingerprint,
            "annotations": self._loader.annotations_digest,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._ahead.clear()
        self.next, self.groups = int(state["next"]), int(state["groups"])
        self.pending = []
        for sample in self._loader.pool.map(
            lambda index: self._loader.load(self._position(index), index), state["pending"]
        ):
            if isinstance(sample, _Bad):
                raise UserError(
                    f"{sample.name}: was read before the restart, now: {sample.reason}; restore the data"
                )
            self.pending.append(sample)

    def _position(self, index: int) -> int:
        return stream.dealt_position(index, self._number, self._loader.shard_count)

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
                self._loader.note_good(_TEXT, sample.source)
                return sample
            self._loader.note_bad(_TEXT, sample)

    def next_pair(self) -> Sample | None:
        sample = self.pull()
        self.groups += sample is not None
        return sample

    def next_group(self, shape: GroupShape) -> list[list[Sample]] | None:
        rows, self.pending = packing.next_group(shape, self.pending, self.pull)
        if not any(rows):
            return None
        self.groups += 1
        return rows


class Loader:
    """Iterable over batches; `build_loader` makes it.

    `iter` continues at the loader's state: the start, where the last batch was returned, or where
    `set_state` put it. A held-out loader starts anew with every `iter`.

    Attributes:
      stats: counts of what was returned and set aside.
      provenance: name, split, records, licences and provenance of every dataset.
      fingerprint: hash of datasets, weights and seed; a state fits only this order.
      tokenizer_fingerprint: of the tokenizer; a state fits only this one.
      annotations_digest: of what the experts said, "" with experts off; a state fits only these answers.
    """

    def __init__(
        self,
        *,
        samples: stream.SampleStream,
        load: Callable[[tuple[int, int], int], Sample],
        tokenizer_fingerprint: str,
        annotations_digest: str,
        shape: GroupShape,
        pairs: bool,
        units: int,
        shards: int,
        prefetch: int,
        held: Collection[int] | None,
    ) -> None:
        """See `build_loader`. `units` is the number of groups, or pairs, of the global batch."""
        self._samples = samples
        self._load = load
        self._shape = shape
        self._pairs = pairs
        self._units = units
        self._prefetch = prefetch
        self.length = samples.length
        # Every run of units // streams units of the batch is fed by its own shards, which take turns.
        self._streams = math.gcd(shards, units)
        self._held = sorted(range(units) if held is None else held)
        self.shard_count = shards if self.length is None else self._streams
        self.stats = Stats()
        self.fingerprint, self.tokenizer_fingerprint = samples.fingerprint, tokenizer_fingerprint
        self.annotations_digest = annotations_digest
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
        self._skipped: dict[str, str] = {}
        self._skipped_total = 0
        self._bad_run: collections.Counter[tuple[str, int]] = collections.Counter()
        self._noting = threading.Lock()
        self._producers: tuple[Producer, ...] = ()
        self._state: State = self._snapshot(self._new_shards(None))

    def _own_streams(self) -> list[int]:
        return sorted({unit * self._streams // self._units for unit in self._held})

    def _shard_numbers(self) -> list[int]:
        own = set(self._own_streams())
        return [number for number in range(self.shard_count) if number % self._streams in own]

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
          UserError: the state is of other data, another mixture, seed, tokenizer or number of shards.
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
            # Both are absent in older checkpoints.
            if state[str(number)].get("tokenizer", self.tokenizer_fingerprint) != self.tokenizer_fingerprint:
                raise UserError(
                    "data state is of another tokenizer; set model.tokenizer to the one that the run began "
                    "with, or start a new workdir"
                )
            if state[str(number)].get("annotations", self.annotations_digest) != self.annotations_digest:
                raise UserError(
                    "data state is of other annotations; restore data.annotations and data.experts as they "
                    "were, or start a new workdir"
                )
        self._state = {str(n): copy.deepcopy(dict(state[str(n)])) for n in self._shard_numbers()}

    def load(self, position: int, index: int) -> Sample | _Bad:
        """Renders and encodes a sample; what is wrong with a record is returned, not raised.

        Raises:
          UnavailableError: the data cannot be read now.
        """
        address = self._samples.address(position)
        name, source = self._samples.name(address), address[0]
        try:
            sample = self._load(address, position)
        except UnavailableError:
            raise
        except (UserError, ValueError, IndexError) as error:
            return _Bad(name, str(error), source)
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
        if reason := packing.oversize_reason(self._shape, sample):
            return _Bad(f"{name} ({sample.id})", reason, source)
        read = functools.partial(self._read_images, name, source, sample.read_images)
        return dataclasses.replace(sample, index=index, source=source, read_images=read)

    def _read_images(self, name: str, source: int, read: Callable[[], _Images]) -> _Images:
        try:
            return read()
        except UnavailableError:
            raise
        except (UserError, ValueError, IndexError) as error:
            raise Unreadable(_Bad(name, str(error), source)) from error
        except Exception as error:
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error

    def note_good(self, part: str, source: int) -> None:
        """Notes that a part of a record of a dataset, its text or its images, could be used."""
        self._bad_run[part, source] = 0

    def note_bad(self, part: str, bad: _Bad) -> None:
        """Counts a record that was set aside.

        Raises:
          UserError: a dataset seems to have no good record.
        """
        with self._noting:
            self._bad_run[part, bad.source] += 1
            self._skipped_total += 1
            if len(self._skipped) < _NAMED_RECORDS:
                self._skipped.setdefault(bad.name, bad.reason)  # in the order in which they were met
        tried, source = self._bad_run[part, bad.source], self._samples.sources[bad.source]
        least, most = _BAD_IN_A_ROW
        if tried >= max(least, min(len(source), most)):
            raise UserError(
                f"no usable record of {source.name} in {tried} tried; the last: {bad.name}: {bad.reason}"
            )

    def sizes(self, count: int) -> list[list[tuple[int, int]]]:
        """(tokens, images) of the first samples of some loader shards, about `count` in all."""
        shards = list(self._new_shards(None).values())
        shards = shards[: max(1, count // _SIZES_OF_A_SHARD)]
        each = -(-count // len(shards))
        drawn = [[shard.pull() for _ in range(each)] for shard in shards]
        self._update_stats(None)
        return [[(s.num_tokens, s.num_images) for s in samples if s is not None] for samples in drawn]

    def _plans(self, state: State | None) -> Iterator[tuple[list[Any], State]]:
        """Which samples stand where, batch by batch; their images are being read."""
        shards = self._new_shards(state)
        while any(units := self._next_units(shards)):
            if not self._pairs:
                units = [None if rows is None else self._place(rows) for rows in units]
            yield units, self._snapshot(shards)

    def _place(self, rows: list[list[Sample]]) -> _Placed:
        return [[(sample, self.pool.submit(sample.read_images)) for sample in row] for row in rows]

    def _batches(self, plans: Iterable[tuple[list[Any], State]]) -> Iterator[tuple[Batch, State]]:
        for units, state in plans:
            yield self._assemble(units), state

    def _next_units(self, shards: Mapping[int, _Shard]) -> list[Any]:
        """The groups, or pairs, held of one batch; None where a held-out shard is at its end."""
        each = self._units // self._streams
        units: dict[int, Any] = {}
        for stream_number in self._own_streams():
            ring = [shards[n] for n in shards if n % self._streams == stream_number]
            first = sum(shard.groups for shard in ring)  # the shards' own counters say whose turn it is
            for turn in range(each):
                shard = ring[(first + turn) % len(ring)]
                unit = shard.next_pair() if self._pairs else shard.next_group(self._shape)
                units[stream_number * each + turn] = unit
        return [units[number] for number in self._held]

    def empty_batch(self) -> Batch:
        """A batch without a sample, for a process whose held-out shards end before those of others."""
        return self._assemble([None] * len(self._held))

    def _assemble(self, units: Sequence[Any]) -> Batch:
        if self._pairs:
            return self._pair_batch(units)
        empty: _Placed = [[] for _ in range(self._shape.rows)]
        return packing.stack_groups([self._group(empty if rows is None else rows) for rows in units])

    def _group(self, rows: _Placed) -> Batch:
        """A group without the samples whose images cannot be read; their places stay empty."""
        readable: list[list[Sample]] = []
        for row in rows:
            readable.append([])
            for sample, images in row:
                try:
                    images.result()
                except Unreadable as error:
                    self.note_bad(_IMAGES, error.bad)
                    continue
                if sample.num_images:
                    self.note_good(_IMAGES, sample.source)
                readable[-1].append(dataclasses.replace(sample, read_images=images.result))
        return packing.assemble_group(self._shape, readable)

    def _pair_batch(self, samples: Sequence[Sample | None]) -> Batch:
        batch = empty_pairs(self._shape, len(samples))
        for row, sample in enumerate(samples):
            if sample is not None:
                (batch["images"][row],) = sample.read_images()
                batch["text_tokens"][row, : len(sample.encoded)] = sample.encoded.tokens
                batch["text_valid"][row, : len(sample.encoded)] = True
        return batch

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yields batches; see the class.

        Raises:
          UserError: a dataset seems to have no usable record.
          UnavailableError: the data cannot be read now.
          RuntimeError: a record met an error in the program; the message names the record.
        """
        self._stop()
        # Two threads: while the images of one batch are awaited, the samples of the next are found.
        planner = Producer(
            self._plans(None if self.length is not None else self._state), min(self._prefetch, 1)
        )
        producer = Producer(self._batches(planner), self._prefetch)
        self._producers = (planner, producer)
        before = self.stats.samples
        try:
            for batch, state in producer:
                self._state = state
                self._update_stats(batch)
                yield batch
        finally:
            planner.close()
            producer.close()
        self._update_stats(None)
        if (
            self.stats.samples == before
            and not producer.called_off
            and len(self._own_streams()) == self._streams
        ):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.stats.skipped[:3])
            raise UserError(f"no usable record in the held-out data: {reasons}")

    def _update_stats(self, batch: Batch | None) -> None:
        if batch is not None:
            self.stats._add(batch)
        with self._noting:
            named = itertools.islice(self._skipped.items(), len(self.stats.skipped), None)
            self.stats.skipped.extend(named)
        self.stats.skipped_total = self._skipped_total

    def _stop(self) -> None:
        for producer in self._producers:
            producer.close()
        self._producers = ()

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
    held: Collection[int] | None = None,
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
      held: which groups (pairs, for 'contrastive') of the global batch to yield, those that the devices of
        this process hold; None: all. Only the loader shards that feed them are read.
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
        check_room(data, processor, tokens_per_image)
    store = None
    if mode != "off":
        if not data.annotations:
            raise UserError(
                f"config data.annotations is empty, but experts are {mode}; set it, or experts=off"
            )
        store = AnnotationStore(data.annotations)
    renderer = Renderer(
        image_reader=ImageReader(processor.kept_size, processor.preprocessing),
        experts=mode,
        expert_share=data.expert_share,
        cards=() if store is None else card_list(model),
        annotations=store,
        style=Style.of(model),
        seed=cfg.seed,
    )
    sources = stream.open_sources(
        data.path, tuple(data.mixture), split, None if pairs else _dialogues(cfg, store), cfg.seed
    )
    samples = stream.SampleStream(sources, cfg.seed, endless=split == "train")
    reader = SampleReader(
        cfg,
        samples=samples,
        renderer=renderer,
        processor=processor,
        tokenizer=tokenizer,
        tokens_per_image=tokens_per_image,
        donors=stream.choose_donors(samples.sources) if swap_images else {},
        alter=data.augment and split == "train",
    )
    return Loader(
        samples=samples,
        load=reader.sample,
        tokenizer_fingerprint=tokenizer.fingerprint,
        annotations_digest="" if store is None else store.digest(),
        shape=group_shape(cfg, processor, tokens_per_image, tokenizer.pad_id),
        pairs=pairs,
        units=global_units(cfg),
        shards=data.loader_shards,
        prefetch=data.prefetch,
        held=held,
    )


def _dialogues(cfg: Any, store: AnnotationStore | None) -> Setting | None:
    """What rules of the mixture make dialogues with; their truth is in annotations, experts on or off."""
    data, model = cfg.data, cfg.model
    if not data.annotations or all(split_row(str(row[0]))[1] is None for row in data.mixture):
        return None
    if data.dialogue_parity and model.expert_wording != "vila_m3":
        raise UserError(
            "config data.dialogue_parity: the reference's dialogues are in its own wording; "
            "set model.expert_wording='vila_m3'"
        )
    return Setting.of(
        card_list(model),
        AnnotationStore(data.annotations) if store is None else store,
        style=Style.of(model),
        parity=data.dialogue_parity,
        min_lesion_ml=data.dialogue_min_lesion_ml,
    )
