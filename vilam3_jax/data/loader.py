"""Batches for training and evaluation, with exact resumption.

A Grain pipeline: S loader shards, a constant of the config, share one order of samples. Each takes one of
every S positions (`stream.dealt_position`) and packs samples into units (`loader_shards.PackIterator`).
Shards run in threads of this process or in worker processes (`data.workers`). Elements carry the state of
their shard, so a resumed run yields bitwise the same batches with any number of threads, workers, processes.

The units of a shard are contiguous in a batch, so a process runs only the shards of its part of the batch.
Batches are NumPy arrays; `training.device_put` transfers them to devices.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import Any, cast

import grain
from absl import flags

from vilam3_jax.data import stream
from vilam3_jax.data.batch_formats import BatchFormat, batch_shapes
from vilam3_jax.data.batches import Batch, arrays, join
from vilam3_jax.data.data_config import DataConfig
from vilam3_jax.data.experts.cards import card_list
from vilam3_jax.data.experts.dialogues.rules import split_row
from vilam3_jax.data.experts.dialogues.scene import Setting
from vilam3_jax.data.experts.exchange import Style
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.loader_records import ShardOrder, Stats, Tally
from vilam3_jax.data.loader_shards import Place, Shards, Turns, UnitInfo
from vilam3_jax.data.loader_state import Binding, State, from_state, to_state
from vilam3_jax.data.packing import Sample, Size
from vilam3_jax.data.render import ImageReader, Renderer
from vilam3_jax.data.sample_reader import BadRecord, SampleReader
from vilam3_jax.data.templates import TokenizerLike, model_template
from vilam3_jax.data.tokenizer import load_tokenizer
from vilam3_jax.data.volume_slices import SliceRule
from vilam3_jax.errors import UnavailableError, UserError

_MAX_THREADS = 16
_BATCHES_AHEAD = 2
_SIZES_PER_SHARD = 1000
_SHARED_MEMORY = "/dev/shm"
_DIED = "Worker process was terminated unexpectedly"  # start of Grain's message

_Elements = grain.DatasetIterator[dict[str, Any]]


class Loader:
    """Iterable over batches; made by `build_loader`.

    `iter` continues after the last batch, or from `set_state`. A held-out loader restarts with every `iter`.

    Attributes:
      stats: counts of what was yielded and skipped.
      provenance: name, split, records, licences and provenance of every dataset.
      records: reader of samples by position.
      samples: the order of samples.
      length: its positions; None if it is endless.
    """

    def __init__(
        self,
        *,
        records: SampleReader,
        binding: Binding,
        batch_format: BatchFormat,
        shards: int,
        workers: int,
        local_units: Collection[int] | None,
    ) -> None:
        self.records, self._format, self._workers = records, batch_format, workers
        units = batch_format.units
        samples = self.samples = records.samples
        self.length = samples.length
        turns = Turns(units, shards, tuple(sorted(range(units) if local_units is None else local_units)))
        # Held-out data has one shard per stream, so that the end of one does not reorder the others.
        self._turns = turns if self.length is None else Turns(units, turns.streams, turns.local_units)
        self.stats = Stats()
        self._binding = binding
        self.provenance = [
            {"name": source.name, "split": source.split, "records": len(source)}
            | {"licences": source.info.get("licences", []), "provenance": source.info.get("provenance", {})}
            for source in samples.sources
        ]
        self._places = dict.fromkeys(self._turns.own_shards, Place())
        self._running: list[_Elements] | None = None

    def get_state(self) -> State:
        """The state after the last batch, a JSON value per loader shard of this process.

        It contains digests, computed now, of the image files of queued and recently packed samples; raises
        `UnavailableError` if one of them cannot be read.
        """
        return to_state(self._places, self._binding, self.samples.sources)

    def set_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Continues from `get_state` of any process.

        Raises `UserError` if data, mixture, seed, tokenizer, number of shards or an image file differ.
        """
        self.close()
        turns = self._turns
        self._places = from_state(state, turns.own_shards, turns.shards, self._binding, self.records)

    def first_samples(self, count: int) -> list[list[Sample | BadRecord]]:
        """The first samples and bad records of some loader shards, about `count` in total."""
        numbers = self._turns.own_shards[: max(1, count // _SIZES_PER_SHARD)]
        drawn = []
        for number in numbers:
            order = ShardOrder(self.records, number, self._turns.shards)
            drawn.append([order.load(index) for index in range(min(len(order), -(-count // len(numbers))))])
        return drawn

    def sizes(self, count: int) -> list[list[Size]]:
        """Sizes of the `first_samples`; bad records are counted and skipped."""
        tally = Tally(self.samples.sources)
        drawn: list[list[Size]] = []
        for shard in self.first_samples(count):
            found = []
            for sample in shard:
                if isinstance(sample, BadRecord):
                    tally.bad(sample)
                else:
                    tally.good(sample.source)
                    found.append(Size(sample.num_tokens, sample.num_images))
            drawn.append(found)
        for name, reason in tally.take():
            self.stats.skip(name, reason)
        return drawn

    def empty_batch(self) -> Batch:
        """A batch without samples, for a process whose held-out shards end before those of others."""
        return join([self._format.assemble(())] * len(self._turns.local_units))

    def __iter__(self) -> Generator[Batch, None, None]:
        """Yields batches; see the class.

        Raises:
          UserError: a dataset seems to have no usable record.
          UnavailableError: the data cannot be read now, or a worker process died.
          RuntimeError: a bug; the message names the record.
        """
        self.close()
        if self.length is not None:
            self._places = dict.fromkeys(self._turns.own_shards, Place())
        running = self._running = self._start()
        before = self.stats.samples
        try:
            while running is self._running and (batch := self._next_batch(running)) is not None:
                self.stats.add(batch)
                yield batch
            ended = running is self._running
        finally:
            if running is self._running:
                self.close()
        whole = len(self._turns.own_streams) == self._turns.streams
        if ended and whole and self.stats.samples == before:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.stats.skipped[:3])
            raise UserError(f"no usable record in the held-out data: {reasons}")

    def _start(self) -> list[_Elements]:
        """Starts n workers, or one thread; shard `own_shards[i]` runs in worker i % n."""
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads its settings from absl flags
        grain.config.update("py_traceback_filtering", "off")  # keeps error messages unchanged
        count = min(self._workers, len(self._turns.own_shards))
        ahead = max(1, -(-_BATCHES_AHEAD * len(self._turns.local_units) // max(count, 1)))
        shards = [
            Shards(
                self.records,
                self._format,
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
        """The next batch; None at the end of held-out data."""
        numbers = self._turns.own_shards
        worker_of = {number: running[place % len(running)] for place, number in enumerate(numbers)}
        groups = {number: place.groups for number, place in self._places.items()}
        places, units = dict(self._places), []
        for turn in self._turns.batch(groups):
            element = _next(worker_of[turn.shard])
            info = cast(UnitInfo, element["info"])
            assert info.shard == turn.shard, (info.shard, turn.shard)
            places[turn.shard] = info.place
            for name, reason in info.skipped:
                self.stats.skip(name, reason)
            self.stats.missing.update(info.missing)
            if turn.is_local:
                units.append(element["unit"])
        self._places = places
        if all(unit is None for unit in units):
            return None
        return join([self._format.assemble(()) if unit is None else unit for unit in units])

    def close(self) -> None:
        """Stops and joins all threads and workers."""
        running, self._running = self._running, None
        for elements in running or ():
            elements.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _next(elements: _Elements) -> dict[str, Any]:
    try:
        return next(elements)
    except RuntimeError as error:
        if not str(error).startswith(_DIED):
            raise
        raise UnavailableError(
            f"a worker process of the data loader died ({error}), maybe for lack of memory; "
            "lower data.workers and start again"
        ) from error


def _check_shared_memory(workers: int, batch_format: BatchFormat) -> None:
    """Raises UserError if shared memory is too small for worker batches; containers often have 64 MB."""
    if not workers or not os.path.isdir(_SHARED_MEMORY):
        return
    batch = sum(value.nbytes for value in arrays(batch_shapes(batch_format)).values())
    needed, free = (_BATCHES_AHEAD + 2) * batch, shutil.disk_usage(_SHARED_MEMORY).free
    if free < needed:
        raise UserError(
            f"config data.workers={workers}: {_SHARED_MEMORY} has {free >> 20} MiB, batches need "
            f"{needed >> 20}; start the container with a larger --shm-size, or set data.workers=0"
        )


def build_loader(
    data: DataConfig,
    model: Any,
    make_format: type[BatchFormat],
    split: str,
    *,
    seed: int,
    swap_images: bool = False,
    experts: str | None = None,
    local_units: Collection[int] | None = None,
    tokenizer: TokenizerLike | None = None,
) -> Loader:
    """Opens the data of a run.

    Args:
      data: section `data` of the config.
      model: section `model`.
      make_format: batch format of the task.
      split: 'train' is endless; any other split is one pass in a fixed order, and its last batch is padded
        with empty rows.
      seed: seed of the run.
      swap_images: replace the images of every sample by those of another patient if possible.
      experts: 'on', 'off', 'falsified' or 'mixed'; None takes `data.experts`.
      local_units: units of the global batch on the devices of this process; None yields all. Only the loader
        shards that contribute to them are read.
      tokenizer: None opens `model.tokenizer`.

    Raises:
      UserError: data, annotations or tokenizer are missing or do not match the config.
    """
    if tokenizer is None:
        if not model.tokenizer:
            raise UserError("config model.tokenizer is empty; set it to the folder of a tokenizer")
        tokenizer = load_tokenizer(model.tokenizer)
    vocab_size = getattr(model, make_format.vocabulary).vocab_size
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {model.tokenizer} has {tokenizer.vocab_size} tokens, the model {vocab_size}; "
            "use the tokenizer of this model or set the model's vocab_size"
        )
    batch_format = make_format(data, model, tokenizer.pad_id)
    has_dialogues = make_format.has_dialogues
    mode = "off" if not has_dialogues else data.experts if experts is None else experts
    store = _annotations(data, mode) if has_dialogues else None
    renderer = Renderer(
        image_reader=ImageReader(batch_format.processor.kept_size, batch_format.processor.preprocessing),
        experts=mode,
        expert_share=data.expert_share,
        cards=() if store is None else card_list(model),
        annotations=store,
        style=Style.of(model),
        seed=seed,
        missing=data.missing_annotation,
        slices=SliceRule(data.volume_slices, data.slice_choice) if has_dialogues else SliceRule(1),
    )
    dialogues = _dialogues(data, model, store) if has_dialogues else None
    sources = stream.open_sources(data.path, tuple(data.mixture), split, dialogues, seed)
    samples = stream.SampleStream(sources, seed, endless=split == "train")
    records = SampleReader(
        samples=samples,
        renderer=renderer,
        batch_format=batch_format,
        tokenizer=tokenizer,
        template=model_template(model),
        donors=stream.choose_donors(samples.sources) if swap_images else {},
        augment_seed=seed if data.augment and split == "train" else None,
    )
    workers = data.workers if split == "train" else 0
    _check_shared_memory(workers, batch_format)
    digest = "" if store is None else store.digest()
    return Loader(
        records=records,
        binding=Binding(samples.fingerprint, tokenizer.fingerprint, digest),
        batch_format=batch_format,
        shards=data.loader_shards,
        workers=workers,
        local_units=local_units,
    )


def _annotations(data: DataConfig, experts: str) -> AnnotationStore | None:
    """The annotation store, if dialogues show experts or slices around findings."""
    if experts != "off" and not data.annotations:
        raise UserError(
            f"config data.annotations is empty, but experts are {experts}; set it, or set data.experts=off"
        )
    is_needed = data.annotations and (experts != "off" or data.slice_choice == "finding")
    return AnnotationStore(data.annotations) if is_needed else None


def _dialogues(data: DataConfig, model: Any, store: AnnotationStore | None) -> Setting | None:
    """The setting of rules of the mixture, which make dialogues from annotations, with experts on or off."""
    if not data.annotations or all(split_row(str(row[0]))[1] is None for row in data.mixture):
        return None
    if data.dialogue_parity and model.expert_wording != "vila_m3":
        raise UserError(
            "config data.dialogue_parity: the reference's dialogues use its own wording; "
            "set model.expert_wording='vila_m3'"
        )
    return Setting.of(
        card_list(model),
        AnnotationStore(data.annotations) if store is None else store,
        style=Style.of(model),
        parity=data.dialogue_parity,
        min_lesion_ml=data.dialogue_min_lesion_ml,
    )
