"""Runs one expert over a dataset and stores what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Generator, Iterator
from typing import Literal

from tqdm import tqdm

from vilam3_experts.calibrate import Calibration
from vilam3_experts.descriptors import Descriptor
from vilam3_experts.engine.known import KnownInputs
from vilam3_experts.engine.local import run_here, run_processes
from vilam3_experts.engine.summary import Lists, Summary
from vilam3_experts.engine.work import Item, Outcome, Work, in_part
from vilam3_experts.engine.worker import create_expert
from vilam3_experts.inputs import Input, Inputs
from vilam3_experts.weights import is_samples_folder, load_weights
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import AnnotationWriter
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

__all__ = ["Engine", "Summary", "annotate", "create_expert"]


@dataclasses.dataclass(frozen=True)
class Engine:
    """Where and how an expert is run.

    Attributes:
      kind: 'local', this machine; or 'ray', the actors of a Ray cluster.
      workers: number of processes. 0, with 'local' only: in this process. None, with 'ray' only: as many as
        the cluster has room for.
      batch: inputs that an expert that offers `run_batch` is given at once.
      timeout: seconds that one input may take; None for no limit.
      address: of the Ray cluster; None starts one on this machine.
      cpus_per_worker: what a Ray actor reserves.
      gpus_per_worker: likewise; None: one if the cluster has any.
      object_store_bytes: what the run may keep in Ray's object store.
    """

    kind: Literal["local", "ray"] = "local"
    workers: int | None = 0
    batch: int = 1
    timeout: float | None = None
    address: str | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    object_store_bytes: int = 1 << 30

    def check(self) -> None:
        """Refuses what makes no sense.

        Raises:
          UserError: says what.
        """
        if self.workers is not None and self.workers < (self.kind == "ray"):
            raise UserError(f"--workers {self.workers}: give a positive number")
        if self.workers is None and self.kind == "local":
            raise UserError("--workers: the local engine needs a number")
        if self.batch < 1:
            raise UserError(f"--batch {self.batch}: give a positive number")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise UserError(f"--timeout {self.timeout:g}: give a positive number of seconds")
        if self.timeout is not None and self.workers == 0:
            raise UserError("--timeout needs a process that can be ended; give --workers 1 or more")
        for option, amount in (("cpus", self.cpus_per_worker), ("gpus", self.gpus_per_worker)):
            if amount is not None and not 0 <= amount < float("inf"):
                raise UserError(f"--{option}-per-worker {amount:g}: give a number, at least 0")


def annotate(
    descriptor: Descriptor,
    data: paths.PathLike,
    out: paths.PathLike,
    *,
    args: str | None = None,
    weights: paths.PathLike | None = None,
    roles: str | None = None,
    retry_failed: bool = False,
    limit: int | None = None,
    part: tuple[int, int] = (1, 1),
    engine: Engine = Engine(),
    audit: paths.PathLike | None = None,
    calibration: Calibration | None = None,
    dry_run: bool = False,
    show: Callable[[str, Annotation], None] | None = None,
) -> Summary:
    """Annotates every input of `data` that `descriptor` is meant for.

    May be stopped at any moment and started again: what is stored is skipped. An input that cannot be read
    or analysed is counted, named in `problems-<EXPERT>.json` of the store, and the run goes on. What readers
    assumed or skipped is in `notes-<EXPERT>.json`.

    Args:
      descriptor: the expert.
      data: a samples folder, or any folder or file.
      out: the annotation store.
      args: the expert's arguments; its first valid one by default.
      weights: folder of the model files; `data` by default if that is a samples folder.
      roles: which scan of a case has which role, see `cases.parse_roles`; None finds it out.
      retry_failed: run again where the store holds a failure.
      limit: at most this many inputs.
      part: (i, n): the i-th (from 1) of n disjoint parts of the inputs.
      engine: where and how.
      audit: folder of the audit log; None for none.
      calibration: of this expert, version and weights; records are stored with calibrated probabilities.
      dry_run: tell what would be run; call nothing and write nothing.
      show: called with the name and the annotation of every input that was run.

    Raises:
      UserError: bad arguments, missing or wrong weights, no inputs, or a store that cannot be written.
      UnavailableError: disk, network or cluster fail; starting again goes on.
    """
    engine.check()
    chosen = descriptor.check_args(args)
    items = _Items(Inputs(data, descriptor, roles), limit, part)
    if weights is None and paths.as_path(data).is_dir() and is_samples_folder(data):
        weights = data
    work = Work(
        descriptor=descriptor,
        args=chosen,
        weights=None if weights is None else os.fspath(weights),
        weights_sha256=load_weights(descriptor, weights).sha256,
        out=os.fspath(out),
        audit=None if audit is None else os.fspath(audit),
        retry_failed=retry_failed,
        batch=engine.batch,
        timeout=engine.timeout,
        dry_run=dry_run,
        keep_records=show is not None,
        calibration=calibration,
    )
    if calibration is not None:
        calibration.check(descriptor.name, descriptor.version, work.weights_sha256)
    known = KnownInputs(out)
    if len(known):
        items.leave_out(_finished(known, work))
    summary = Summary()
    lists = Lists(out, descriptor.name)
    with (
        tqdm(total=items.estimate(), desc=descriptor.name, unit="scan", dynamic_ncols=True) as progress,
        contextlib.closing(_outcomes(work, items, engine)) as outcomes,
    ):
        for outcome in outcomes:
            summary.add(outcome)
            lists.add(outcome)
            if show is not None and outcome.record is not None:
                show(outcome.name, Annotation.from_bytes(outcome.record))
            progress.total = items.estimate()
            progress.set_postfix_str(outcome.name[-40:], refresh=False)
            progress.update()
    if items.finished:
        summary.counts["skipped"] += items.finished
    if not dry_run:
        lists.publish(skipped=summary.counts["skipped"] > 0)
    return summary


def _outcomes(work: Work, items: _Items, engine: Engine) -> Generator[Outcome]:
    if engine.kind == "ray":
        from vilam3_experts.engine.ray_engine import run_ray  # an optional library

        return run_ray(work, items, engine)
    if engine.workers:
        return run_processes(work, items, engine.workers)
    return run_here(work, items)


def _finished(known: KnownInputs, work: Work) -> Callable[[Input], bool]:
    writer = AnnotationWriter(work.out)

    def check(item: Input) -> bool:
        key = known.key(item)
        status = None if key is None else writer.status(key, work.descriptor.name, work.args)
        return status == "ok" or (status == "failed" and not work.retry_failed)

    return check


class _Items:
    """The items of a run, numbered as they are found, and how many they will be.

    Attributes:
      finished: number of those left out, because the store has their answers.
    """

    def __init__(self, found: Inputs, limit: int | None, part: tuple[int, int]) -> None:
        """Lists nothing yet.

        Raises:
          UserError: there is no input.
        """
        self.finished = 0
        self._is_finished: Callable[[Input], bool] = lambda item: False
        self._found, self._limit, self._part = found, limit, part
        rest = iter(found)
        self._rest = itertools.chain([next(rest)], rest)  # without any, this is where it is noticed
        self._items = 0
        self._others = 0  # of other parts
        self._ended = False

    def __iter__(self) -> Iterator[Item]:
        for item in self._rest:
            if not in_part(item.name, self._part):
                self._others += 1
                continue
            if self._items == self._limit:
                break
            self._items += 1
            if self._is_finished(item):
                self.finished += 1
            else:
                yield Item(self._items, item)
        self._ended = True

    def leave_out(self, is_finished: Callable[[Input], bool]) -> None:
        """Leaves out items of which `is_finished` knows, unread, that the store has the answer."""
        self._is_finished = is_finished

    def estimate(self) -> int:
        """How many items are to be looked at; before all are found, at a guess from above."""
        return max(0, self._estimate() - self.finished)

    def _estimate(self) -> int:
        if self._ended:
            return self._items
        rest = max(0, self._found.at_most - self._items - self._others)
        guess = self._items + -(-rest // self._part[1])
        return guess if self._limit is None else min(guess, self._limit)
