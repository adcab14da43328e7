"""Batches for training and evaluation, with an exact place to resume from.

A Grain pipeline: S loader shards, a constant of the config, walk the one order of samples. Of every S
positions each takes one (`stream.dealt_position`), and packs them into groups (`loader_shards.PackIterator`).
Shards run in threads of this process or in worker processes (`data.workers`), whole shards in each. Their
elements carry their states, so a resumed run sees bitwise the batches that it would have seen, with any
number of threads, workers and processes.

What one shard gives to a batch lies together in it, so that a process whose devices hold a part of the batch
runs only the shards of that part. Yields NumPy arrays; what goes to which device is the caller's business.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any, cast

import grain
from absl import flags

from vilam3_jax.data import packing, stream
from vilam3_jax.data.batch_sizes import batch_shapes, check_room, empty_pairs, global_units, group_shape
from vilam3_jax.data.batches import Batch, arrays, join, of_arrays
from vilam3_jax.data.experts.cards import card_list
from vilam3_jax.data.experts.dialogues.rules import split_row
from vilam3_jax.data.experts.dialogues.scene import Setting
from vilam3_jax.data.experts.exchange import Style
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.image_processor import image_processor
from vilam3_jax.data.loader_records import BadRecord, RecordLoader, ShardOrder
from vilam3_jax.data.loader_shards import News, PackIterator, Place, Shards, Turns
from vilam3_jax.data.loader_state import Binding, State, from_state, to_state
from vilam3_jax.data.loader_stats import Stats
from vilam3_jax.data.loader_tally import Tally
from vilam3_jax.data.packing import Sample
from vilam3_jax.data.render import ImageReader, Renderer
from vilam3_jax.data.sample_reader import SampleReader
from vilam3_jax.data.templates import TokenizerLike
from vilam3_jax.data.tokenizer import load_tokenizer
from vilam3_jax.data.volume_slices import SliceRule
from vilam3_jax.errors import UnavailableError, UserError

_MAX_THREADS = 16
_BATCHES_AHEAD = 2
_SIZES_OF_A_SHARD = 1000
_SHARED_MEMORY = "/dev/shm"
_DIED = "Worker process was terminated unexpectedly"  # the beginning of Grain's message

_Elements = grain.DatasetIterator[dict[str, Any]]


class Loader:
    """Iterable over batches; `build_loader` makes it.

    `iter` continues at the loader's state: the start, where the last batch was returned, or where
    `set_state` put it. A held-out loader starts anew with every `iter`.

    Attributes:
      stats: counts of what was returned and skipped.
      provenance: name, split, records, licences and provenance of every dataset.
      samples: the order of samples.
      length: its positions; None if it is endless.
      shard_count: S.
    """

    def __init__(
        self,
        *,
        records: RecordLoader,
        tokenizer_fingerprint: str,
        annotations_digest: str,
        pairs: bool,
        units: int,
        shards: int,
        workers: int,
        held: Collection[int] | None,
    ) -> None:
        """See `build_loader`. `units` is the number of groups, or pairs, of the global batch."""
        self._records, self._pairs, self._workers = records, pairs, workers
        samples = self.samples = records.samples
        self.length = samples.length
        turns = Turns(units, shards, tuple(sorted(range(units) if held is None else held)))
        # Held-out data has one shard a stream: the end of one then says nothing of the order of others.
        self._turns = turns if self.length is None else Turns(units, turns.streams, turns.held)
        self.shard_count = self._turns.shards
        self.stats = Stats()
        self._binding = Binding(samples.fingerprint, tokenizer_fingerprint, annotations_digest)
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
        self._places = self._starts()
        self._running: list[_Elements] | None = None

    def _starts(self) -> dict[int, Place]:
        return {number: Place() for number in self._turns.own_shards}

    def get_state(self) -> State:
        """Returns the place after the batch returned last: a JSON value per loader shard of this process.

        The state is bound to the pictures that are files of the samples which wait for a place and of those
        placed last, by digests that are taken now.

        Raises:
          UnavailableError: such a file cannot be read now.
        """
        return to_state(self._places, self._binding, self._records.samples.sources)

    def set_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Goes to a place that `get_state` named, in whatever process.

        Raises:
          UserError: the state is of other data, another mixture, seed, tokenizer or number of shards, or a
            picture that it is bound to has changed.
        """
        self._stop()
        numbers = self._turns.own_shards
        self._places = from_state(state, numbers, self.shard_count, self._binding, self._records)

    def sample_of(self, address: tuple[int, int], position: int) -> Sample | BadRecord:
        """The sample that (number of a dataset, record) is at a position; see `RecordLoader.sample`."""
        return self._records.sample(address, position, 0)

    def load(self, position: int, index: int) -> Sample | BadRecord:
        """The sample at a position, see `RecordLoader.load`."""
        return self._records.load(position, index)

    def sizes(self, count: int) -> list[list[tuple[int, int]]]:
        """(tokens, images) of the first samples of some loader shards, about `count` in all."""
        numbers = self._turns.own_shards[: max(1, count // _SIZES_OF_A_SHARD)]
        each, tally = -(-count // len(numbers)), Tally(self._records.samples.sources)
        drawn = []
        for number in numbers:
            order = ShardOrder(self._records, number, self.shard_count)
            with contextlib.closing(PackIterator(order, self._records, True, tally, Place())) as single:
                rows = [row for _, unit in zip(range(each), single, strict=False) for row in unit]
                drawn.append([(sample.num_tokens, sample.num_images) for row in rows for sample in row])
        for name, reason in tally.take():
            self.stats.skip(name, reason)
        return drawn

    def empty_batch(self) -> Batch:
        """A batch without a sample, for a process whose held-out shards end before those of others."""
        return join([self._empty_unit()] * len(self._turns.held))

    def _empty_unit(self) -> Any:
        shape = self._records.shape
        return empty_pairs(shape, 1) if self._pairs else packing.assemble_group(shape, [[]] * shape.rows)

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yields batches; see the class.

        Raises:
          UserError: a dataset seems to have no usable record.
          UnavailableError: the data cannot be read now, or a worker process died.
          RuntimeError: a record met an error in the program; the message names the record.
        """
        self._stop()
        if self.length is not None:
            self._places = self._starts()
        running = self._running = self._start()
        before = self.stats.samples
        try:
            while running is self._running and (batch := self._next_batch(running)) is not None:
                self.stats.add(batch)
                yield batch
            ended = running is self._running
        finally:
            if running is self._running:
                self._stop()
        whole = len(self._turns.own_streams) == self._turns.streams
        if ended and whole and self.stats.samples == before:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.stats.skipped[:3])
            raise UserError(f"no usable record in the held-out data: {reasons}")

    def _start(self) -> list[_Elements]:
        """Starts the workers, or one thread; shard `own_shards[i]` runs in number i % n of them."""
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its settings from there
        grain.config.update("py_traceback_filtering", "off")  # it adds sentences of its own to errors
        count = min(self._workers, len(self._turns.own_shards))
        ahead = max(1, -(-_BATCHES_AHEAD * len(self._turns.held) // max(count, 1)))
        shards = [
            Shards(
                self._records,
                pairs=self._pairs,
                turns=self._turns,
                own=self._turns.own_shards[number :: max(count, 1)],
                starts=self._places,
                threads=max(1, min(_MAX_THREADS, _cores()) // max(count, 1)),
            )
            for number in range(max(count, 1))
        ]
        if not count:
            return [iter(grain.experimental.ThreadPrefetchIterDataset(shards[0], prefetch_buffer_size=ahead))]
        options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=ahead)
        started = [iter(one.mp_prefetch(options)) for one in shards]
        for elements in started:
            elements.get_state()  # makes the iterator that the next line starts
            elements.start_prefetch()
        return started

    def _next_batch(self, running: Sequence[_Elements]) -> Batch | None:
        """The next batch and the places after it; None at the end of held-out data."""
        numbers = self._turns.own_shards
        worker_of = {number: running[place % len(running)] for place, number in enumerate(numbers)}
        groups = {number: place.groups for number, place in self._places.items()}
        places, units = dict(self._places), []
        for turn in self._turns.batch(groups):
            element = _next(worker_of[turn.shard])
            news = cast(News, element["news"])
            assert news.shard == turn.shard, (news.shard, turn.shard)
            places[turn.shard] = news.place
            for name, reason in news.skipped:
                self.stats.skip(name, reason)
            self.stats.missing.update(news.missing)
            if turn.held:
                units.append(element["unit"])
        self._places = places
        if all(unit is None for unit in units):
            return None
        return join([self._empty_unit() if unit is None else of_arrays(unit) for unit in units])

    def _stop(self) -> None:
        running, self._running = self._running, None
        for elements in running or ():
            elements.close()

    def close(self) -> None:
        """Stops and joins all threads and workers."""
        self._stop()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _next(elements: _Elements) -> dict[str, Any]:
    try:
        return next(elements)
    except RuntimeError as error:
        if not str(error).startswith(_DIED):
            raise
        raise UnavailableError(
            f"a worker process of the data loader died ({error}); it may have had too little memory: "
            "lower data.workers and start again"
        ) from error


def _check_shared_memory(cfg: Any, tokens_per_image: int) -> None:
    """Batches of worker processes travel through shared memory, of which containers often have 64 MB.

    Raises:
      UserError: there is too little of it.
    """
    if not cfg.data.workers or not os.path.isdir(_SHARED_MEMORY):
        return
    batch = sum(value.nbytes for value in arrays(batch_shapes(cfg, tokens_per_image)).values())
    needed, free = (_BATCHES_AHEAD + 2) * batch, shutil.disk_usage(_SHARED_MEMORY).free
    if free < needed:
        raise UserError(
            f"config data.workers={cfg.data.workers}: {_SHARED_MEMORY} has {free >> 20} MiB, "
            f"batches need {needed >> 20}; start the container with a larger --shm-size, or set "
            "data.workers=0"
        )


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
      The loader; it yields a `PackedBatch` ('generative') or a `PairBatch` ('contrastive').

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
    # Pairs have one image; slices around findings need annotations with experts on or off.
    choice = "even" if pairs and data.slice_choice == "finding" else data.slice_choice
    slices = SliceRule(1 if pairs else data.volume_slices, choice)
    store = None
    if mode != "off":
        if not data.annotations:
            raise UserError(
                f"config data.annotations is empty, but experts are {mode}; set it, or set data.experts=off"
            )
        store = AnnotationStore(data.annotations)
    elif choice == "finding" and data.annotations:
        store = AnnotationStore(data.annotations)
    renderer = Renderer(
        image_reader=ImageReader(processor.kept_size, processor.preprocessing),
        experts=mode,
        expert_share=data.expert_share,
        cards=() if store is None else card_list(model),
        annotations=store,
        style=Style.of(model),
        seed=cfg.seed,
        missing=data.missing_annotation,
        slices=slices,
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
    shape = group_shape(cfg, processor, tokens_per_image, tokenizer.pad_id)
    if split == "train":
        _check_shared_memory(cfg, tokens_per_image)
    return Loader(
        records=RecordLoader(samples, reader.sample, shape),
        tokenizer_fingerprint=tokenizer.fingerprint,
        annotations_digest="" if store is None else store.digest(),
        pairs=pairs,
        units=global_units(cfg),
        shards=data.loader_shards,
        workers=data.workers if split == "train" else 0,
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
