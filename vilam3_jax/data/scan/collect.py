"""Reads the headers of all files in a folder in parallel and groups DICOM files into series."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from vilam3_jax.data.folder_walk import list_files
from vilam3_jax.data.limits import Limits
from vilam3_jax.data.scan.records import FileRecord, SeriesRecord, group_series, read_records
from vilam3_jax.data.scan.redaction import library_output_suppressed
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path

_FILES_PER_BATCH = 64
_MIN_FILES_PER_WORKER = 400  # below this, starting a worker costs more time than it saves
_REMOTE_THREADS = 16


@dataclasses.dataclass(frozen=True)
class ScanResult:
    """The contents of a folder."""

    paths: list[str]  # file paths, indexed by `FileRecord.index`
    files: list[FileRecord]  # one record per path
    series: list[SeriesRecord]  # DICOM series, grouped by study and ordered by first file
    skipped: collections.Counter[str]  # reason -> number of entries, neither files nor readable folders


def collect(folder: PathLike, workers: int, limits: Limits) -> ScanResult:
    """Reads the headers of all files below `folder`, local or remote. Progress goes to stderr.

    `workers` is the number of processes, or of threads for an object store; 0: one per core, or 16 threads.
    Raises `UserError` if the folder cannot be listed, holds more than `limits.files` files, or a worker was
    killed.
    """
    with _progress_bar("listing", None, "file") as bar:
        listing = list_files(folder, limits.files, bar.update)
    files = list(enumerate(listing.files))
    with (
        library_output_suppressed(),
        _parallel_map("://" in str(as_path(folder)), workers, len(files)) as parallel_map,
    ):
        records: list[FileRecord] = []
        batches = [
            files[start : start + _FILES_PER_BATCH] for start in range(0, len(files), _FILES_PER_BATCH)
        ]
        with _progress_bar("reading headers", len(files), "file") as bar:
            for batch in parallel_map(read_records, batches, limits):
                records += batch
                bar.update(len(batch))
        by_series: dict[str, list[tuple[int, int, bytes]]] = collections.defaultdict(list)
        for index, record in enumerate(records):
            if record.series is not None:
                by_series[record.series].append((record.index, record.size, record.header))
                records[index] = dataclasses.replace(record, header=b"")
        series: list[SeriesRecord] = []
        with _progress_bar("grouping series", len(by_series), "series") as bar:
            for stacks in parallel_map(group_series, list(by_series.values()), limits):
                series += stacks
                bar.update()
    return ScanResult(listing.files, records, _by_study(series), listing.skipped)


def _by_study(series: list[SeriesRecord]) -> list[SeriesRecord]:
    def first_file(one: SeriesRecord) -> int:
        return min((*one.files, *(index for indices in one.skipped.values() for index in indices)))

    studies: dict[str, list[SeriesRecord]] = {}
    for one in sorted(series, key=lambda one: (first_file(one), one.id)):
        studies.setdefault(one.study, []).append(one)
    return [one for group in studies.values() for one in group]


def _progress_bar(name: str, total: int | None, unit: str) -> tqdm:
    """A bar that appears after one second and refreshes rarely if stderr is not a terminal."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    options: dict[str, Any] = {"delay": 1.0, "mininterval": interval, "dynamic_ncols": True, "leave": False}
    return tqdm(desc=name, total=total, unit=unit, file=sys.stderr, **options)


_Map = Callable[[Callable[[Any, Limits], list[Any]], Sequence[Any], Limits], Iterator[list[Any]]]


@contextlib.contextmanager
def _parallel_map(remote: bool, workers: int, files: int) -> Iterator[_Map]:
    """Yields a map over batches that runs in this process, in threads or in worker processes."""
    if remote:
        workers = workers or _REMOTE_THREADS
        executor: Executor = ThreadPoolExecutor(workers)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(workers or cores, files // _MIN_FILES_PER_WORKER)
        if workers <= 1:
            yield lambda function, batches, limits: (function(batch, limits) for batch in batches)
            return
        spawn = multiprocessing.get_context("spawn")  # a fork would copy locks held by library threads
        executor = ProcessPoolExecutor(workers, spawn, _start_worker)
    try:
        yield functools.partial(_ordered_map, executor)
    except concurrent.futures.BrokenExecutor as error:
        raise UserError("a scan worker was killed, probably out of memory; use fewer --workers") from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent stops workers
    library_output_suppressed().__enter__()


def _ordered_map(
    executor: Executor, function: Callable[..., Any], batches: Sequence[Any], limits: Limits
) -> Iterator[Any]:
    # Workers inherit the signal mask of the thread that starts them, so Ctrl-C cannot hit their imports.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.map(function, batches, itertools.repeat(limits))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
