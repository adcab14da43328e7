"""Runs an expert in this process, or in worker processes on this machine."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Generator, Iterable
from pathlib import Path

from vilam3_experts.engine.committer import Committer
from vilam3_experts.engine.job import Item, Job, Outcome, chunks
from vilam3_experts.engine.worker import BrokenDeviceError, Worker
from vilam3_experts.engine.worker_process import StoppedError, WorkerProcess
from vilam3_jax.errors import UnavailableError

_QUEUED_PER_WORKER = 4


def run_here(job: Job, items: Iterable[Item]) -> Generator[Outcome]:
    """Runs the expert in this process, without protection from its crashes; yields the outcomes.

    Raises `UserError` if the expert cannot be built or the store cannot be written.
    """
    with Committer(job) as committer:
        worker = Worker(job, committer.claim)
        try:
            for chunk in chunks(items, job.batch):
                for outcome in worker.run(chunk):
                    committer.write(outcome)
                    yield outcome
        except BrokenDeviceError as error:
            message = f"{job.descriptor.name}: {error}; start again, with --workers 1"
            raise UnavailableError(message) from error


def run_processes(job: Job, items: Iterable[Item], workers: int) -> Generator[Outcome]:
    """Runs the expert in `workers` child processes; yields the outcomes in no fixed order.

    One thread owns each child; this process writes. Raises as `run_here`.
    """
    left = chunks(items, job.batch)
    lock, stopped = threading.Lock(), threading.Event()
    done: queue.Queue[Outcome | BaseException | None] = queue.Queue(workers * _QUEUED_PER_WORKER)

    def take() -> list[Item] | None:
        with lock:  # generators are not thread-safe
            return None if stopped.is_set() else next(left, None)

    def put(found: Outcome | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return done.put(found, timeout=0.5)

    def own(process: WorkerProcess) -> None:
        try:
            while (chunk := take()) is not None:
                for outcome in process.run(chunk):
                    committer.write(outcome)
                    put(outcome)
            put(None)
        except StoppedError:
            pass
        except BaseException as error:
            put(error)
        finally:
            process.close()

    with Committer(job) as committer:
        environments = worker_environments(workers, visible_gpus())
        processes = [WorkerProcess(job, committer.claim, environment) for environment in environments]
        threads = [threading.Thread(target=own, args=(process,), daemon=True) for process in processes]
        try:
            for thread in threads:
                thread.start()
            running = len(threads)
            while running:
                found = done.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    running -= 1
                else:
                    yield found
        finally:
            stopped.set()
            for process in processes:
                process.stop()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()


def visible_gpus() -> list[str]:
    """CUDA names of the GPUs that this process may use, found without loading a library."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip() and gpu.strip() != "-1"]
    return [str(n) for n, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def worker_environments(workers: int, gpus: list[str]) -> list[dict[str, str]]:
    """Environment of each worker: GPUs round-robin, and a share of the CPU cores unless the user set one."""
    threads = {}
    if "OMP_NUM_THREADS" not in os.environ:
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // workers))}
    return [threads | ({"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} if gpus else {}) for n in range(workers)]
