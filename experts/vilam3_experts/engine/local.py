"""Runs an expert in processes of this machine, or in this process."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

from vilam3_experts.engine.child import Child, StoppedError
from vilam3_experts.engine.committer import Committer
from vilam3_experts.engine.work import Item, Outcome, Work, chunks
from vilam3_experts.engine.worker import BrokenDeviceError, Worker
from vilam3_jax.errors import UnavailableError

_QUEUED_PER_WORKER = 4


def run_here(work: Work, items: Iterable[Item]) -> Generator[Outcome]:
    """Yields the outcomes, of an expert in this process: what ends the expert ends the run.

    Raises:
      UserError: the expert cannot be built, or the store cannot be written.
    """
    with Committer(work) as committer:
        worker = Worker(work, committer.claim)
        try:
            for chunk in chunks(items, work.batch):
                for outcome in worker.run(chunk):
                    committer.write(outcome)
                    yield outcome
        except BrokenDeviceError as error:
            told = f"{work.descriptor.name}: {error}; start again, with --workers 1"
            raise UnavailableError(told) from error


def run_processes(work: Work, items: Iterable[Item], workers: int) -> Generator[Outcome]:
    """Yields the outcomes, in no fixed order, of an expert in `workers` child processes.

    Each child is owned by a thread; this process writes.

    Raises:
      UserError: the expert cannot be built, or the store cannot be written.
    """
    pool = _Pool(work, items, workers)
    with pool.committer:
        try:
            yield from pool.outcomes()
        finally:
            pool.stop()


class _Pool:
    def __init__(self, work: Work, items: Iterable[Item], workers: int) -> None:
        self.committer = Committer(work)
        self._chunks = chunks(items, work.batch)
        self._lock = threading.Lock()
        self._done: queue.Queue[Outcome | BaseException | None] = queue.Queue(workers * _QUEUED_PER_WORKER)
        self._stopped = threading.Event()
        self._children = [
            Child(work, self.committer.claim, environment)
            for environment in worker_environments(workers, visible_gpus())
        ]
        self._threads = [
            threading.Thread(target=self._own, args=(child,), daemon=True) for child in self._children
        ]

    def outcomes(self) -> Iterator[Outcome]:
        for thread in self._threads:
            thread.start()
        left = len(self._threads)
        while left:
            found = self._done.get()
            if found is None:
                left -= 1
            elif isinstance(found, BaseException):
                raise found
            else:
                yield found

    def stop(self) -> None:
        self._stopped.set()
        for child in self._children:
            child.stop()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _next(self) -> list[Item] | None:
        with self._lock:  # a generator runs in one thread at a time
            return None if self._stopped.is_set() else next(self._chunks, None)

    def _own(self, child: Child) -> None:
        try:
            while (chunk := self._next()) is not None:
                for outcome in child.run(chunk):
                    self.committer.write(outcome)
                    self._put(outcome)
            self._put(None)
        except StoppedError:
            pass
        except BaseException as error:
            self._put(error)
        finally:
            child.close()

    def _put(self, found: Outcome | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                self._done.put(found, timeout=0.5)
                return
            except queue.Full:
                continue


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA names them; found without loading a library."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu.strip() and gpu.strip() != "-1"]
    return [str(n) for n, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def worker_environments(workers: int, gpus: list[str]) -> list[dict[str, str]]:
    """Variables of each worker: a GPU, in turn, and its share of the CPU cores unless the user set it."""
    threads = {}
    if "OMP_NUM_THREADS" not in os.environ:
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // workers))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} if gpus else {}) for n in range(workers)]
