"""Runs one expert over a dataset and stores its answers."""

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
from vilam3_experts.engine.job import Item, Job, Outcome, in_shard
from vilam3_experts.engine.key_cache import KeyCache
from vilam3_experts.engine.local import run_here, run_processes
from vilam3_experts.engine.summary import ProblemLists, RunSummary
from vilam3_experts.inputs import Input, Inputs
from vilam3_experts.weights import load_weights, weights_folder
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import AnnotationWriter
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths


@dataclasses.dataclass(frozen=True)
class Engine:
    """Where and how an expert runs: in processes of this machine, or in the actors of a Ray cluster.

    Attributes:
      workers: number of processes. 0, only with 'local': run in this process. None, only with 'ray': as many
        as the cluster has room for.
      batch: inputs per call of an expert with `run_batch`.
      timeout: seconds per input; None for no limit.
      address: address of the Ray cluster; None starts one on this machine.
      cpus_per_worker, gpus_per_worker: reserved by a Ray actor; None for one GPU if the cluster has any.
      object_store_bytes: limit of the run in Ray's object store.
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
        """Raises `UserError` for an invalid setting."""
        if self.workers is not None and self.workers < (self.kind == "ray"):
            raise UserError(f"--workers {self.workers}: give a positive number")
        if self.workers is None and self.kind == "local":
            raise UserError("--workers: the local engine needs a number")
        if self.batch < 1:
            raise UserError(f"--batch {self.batch}: give a positive number")
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise UserError(f"--timeout {self.timeout:g}: give a positive number of seconds")
        if self.timeout is not None and self.workers == 0:
            raise UserError("--timeout needs a worker process; give --workers 1 or more")
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
    shard: tuple[int, int] = (1, 1),
    engine: Engine = Engine(),
    audit: paths.PathLike | None = None,
    calibration: Calibration | None = None,
    dry_run: bool = False,
    show: Callable[[str, Annotation], None] | None = None,
) -> RunSummary:
    """Annotates every input of `data` that the expert is meant for.

    The run may be interrupted and restarted at any time; stored inputs are skipped. An input that cannot be
    read or analysed is counted, listed in `problems-EXPERT.json` in the store, and does not end the run. What
    readers assumed or skipped is listed in `notes-EXPERT.json`.

    Args:
      data: a samples folder, or any folder or file.
      out: the annotation store.
      args: the expert's arguments; its first valid one by default.
      weights: folder of the model files; `data` by default if that is a samples folder.
      roles: which scan of a case has which role, see `cases.parse_roles`; None detects the roles.
      retry_failed: run inputs again whose stored record is a failure.
      shard: (i, n) for the i-th (from 1) of n disjoint shards of the inputs.
      audit: folder of the audit log.
      calibration: for this expert, version and weights; adds calibrated probabilities to the records.
      dry_run: report what would run; call nothing and write nothing.
      show: called with the name and the annotation of every input that was run.

    Raises:
      UserError: bad arguments, missing or wrong weights, no inputs, or a store that cannot be written.
      UnavailableError: disk, network or cluster failed; a restart resumes the run.
    """
    engine.check()
    chosen = descriptor.check_args(args)
    items = _Items(Inputs(data, descriptor, roles), limit, shard)
    weights = weights_folder(weights, data)
    job = Job(
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
        calibration.check(descriptor.name, descriptor.version, job.weights_sha256)
    key_cache = KeyCache(out)
    if len(key_cache):
        items.is_finished = _finished(key_cache, job)
    summary = RunSummary()
    lists = ProblemLists(out, descriptor.name)
    with (
        tqdm(total=items.estimate(), desc=descriptor.name, unit="scan", dynamic_ncols=True) as progress,
        contextlib.closing(_outcomes(job, items, engine)) as outcomes,
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


def _outcomes(job: Job, items: _Items, engine: Engine) -> Generator[Outcome]:
    if engine.kind == "ray":
        from vilam3_experts.engine.ray_engine import run_ray  # an optional dependency

        return run_ray(job, items, engine)
    if engine.workers:
        return run_processes(job, items, engine.workers)
    return run_here(job, items)


def _finished(key_cache: KeyCache, job: Job) -> Callable[[Input], bool]:
    writer = AnnotationWriter(job.out)

    def check(item: Input) -> bool:
        key = key_cache.key(item)
        return key is not None and job.is_done(writer.status(key, job.descriptor.name, job.args))

    return check


class _Items:
    """The numbered items of a run, listed lazily; `is_finished` leaves items out, which `finished` counts."""

    def __init__(self, inputs: Inputs, limit: int | None, shard: tuple[int, int]) -> None:
        """Finds the first input; raises `UserError` if there is none."""
        self.finished = 0
        self.is_finished: Callable[[Input], bool] = lambda item: False
        self._inputs, self._limit, self._shard = inputs, limit, shard
        rest = iter(inputs)
        self._rest = itertools.chain([next(rest)], rest)
        self._items = 0
        self._other_shards = 0
        self._exhausted = False

    def __iter__(self) -> Iterator[Item]:
        for item in self._rest:
            if not in_shard(item.name, self._shard):
                self._other_shards += 1
                continue
            if self._items == self._limit:
                break
            self._items += 1
            if self.is_finished(item):
                self.finished += 1
            else:
                yield Item(self._items, item)
        self._exhausted = True

    def estimate(self) -> int:
        """Number of items to look at; an upper bound until all are listed."""
        if self._exhausted:
            return max(0, self._items - self.finished)
        rest = max(0, self._inputs.at_most - self._items - self._other_shards)
        total = self._items + -(-rest // self._shard[1])
        return max(0, (total if self._limit is None else min(total, self._limit)) - self.finished)
