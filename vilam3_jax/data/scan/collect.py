"""Looks at all files of a folder, in parallel, and groups what it found."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from vilam3_jax.data.folder_walk import list_files
from vilam3_jax.data.limits import Limits
from vilam3_jax.data.scan.records import FileRecord, SeriesRecord, describe, look
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import PathLike, as_path

_CHUNK = 64  # files that a worker gets at once
_FILES_FOR_A_WORKER = 400  # with fewer, starting it takes longer than it saves
_REMOTE_THREADS = 16
_QUEUED = 4  # chunks for each worker

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclasses.dataclass(frozen=True)
class Found:
    """What lies in a folder.

    Attributes:
      paths: of the files; `FileRecord.index` counts them.
      files: one record for each of `paths`.
      series: DICOM series, study by study in the order of their first file.
      skipped: reason -> how many entries are neither files nor folders that can be read.
    """

    paths: list[str]
    files: list[FileRecord]
    series: list[SeriesRecord]
    skipped: collections.Counter[str]


def collect(folder: PathLike, workers: int, limits: Limits) -> Found:
    """Looks at the headers of all files below `folder`. Progress goes to stderr.

    Args:
      folder: local or on an object store.
      workers: processes; for an object store, threads. 0: one for each core, or 16 threads.
      limits: of one header and one volume; `limits.files` bounds the folder.

    Raises:
      UserError: the folder cannot be listed, holds more than `limits.files` files, or a worker was killed.
    """
    with _bar("listing", None, "file") as bar:
        listing = list_files(folder, limits.files, bar.update)
    files = list(enumerate(listing.files))
    with _silent(), _executor("://" in str(as_path(folder)), workers, len(files)) as run:
        records: list[FileRecord] = []
        chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
        with _bar("reading headers", len(files), "file") as bar:
            for looked in run(look, chunks, limits):
                records += looked
                bar.update(len(looked))
        records.sort(key=lambda record: record.index)
        by_series: dict[str, list[tuple[int, int, bytes]]] = collections.defaultdict(list)
        for place, record in enumerate(records):
            if record.series is not None:
                by_series[record.series].append((record.index, record.size, record.header))
                records[place] = dataclasses.replace(record, header=b"")
        series: list[SeriesRecord] = []
        with _bar("grouping series", len(by_series), "series") as bar:
            for described in run(describe, list(by_series.values()), limits):
                series += described
                bar.update()
    return Found(listing.files, records, _by_study(series), listing.skipped)


def _by_study(series: Iterable[SeriesRecord]) -> list[SeriesRecord]:
    def first(one: SeriesRecord) -> int:
        return min((*one.files, *(index for indices in one.skipped.values() for index in indices)))

    studies: dict[str, list[SeriesRecord]] = {}
    for one in sorted(series, key=lambda one: (first(one), one.identifier)):
        studies.setdefault(one.study, []).append(one)
    return [one for group in studies.values() for one in group]


def _bar(name: str, total: int | None, unit: str) -> tqdm:
    """A progress bar for scans of more than a second; rarely renewed where stderr is a file."""
    return tqdm(
        desc=name,
        total=total,
        unit=unit,
        delay=1.0,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
        file=sys.stderr,
        leave=False,
    )


_Run = Callable[[Callable[[Any, Limits], list[Any]], Sequence[Any], Limits], Iterator[list[Any]]]


@contextlib.contextmanager
def _executor(remote: bool, workers: int, files: int) -> Iterator[_Run]:
    """Yields what runs a function over chunks: in this process, in threads, or in processes."""
    if remote:
        executor: Executor = ThreadPoolExecutor(workers or _REMOTE_THREADS)
        width = workers or _REMOTE_THREADS
    else:
        width = min(workers or _cores(), files // _FILES_FOR_A_WORKER)
        if width <= 1:
            yield lambda function, chunks, limits: (function(chunk, limits) for chunk in chunks)
            return
        context = multiprocessing.get_context(
            "spawn"
        )  # a fork would copy the threads' locks of the libraries
        executor = ProcessPoolExecutor(width, context, _start_worker)
    try:
        yield lambda function, chunks, limits: _results(executor, width, function, chunks, limits)
    except concurrent.futures.BrokenExecutor as error:
        raise UserError(
            "a worker of the scan was killed, probably for lack of memory; scan with fewer --workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps what libraries warn of and log from stderr: they quote the files and their names."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the main one ends the others
    _silent().__enter__()


def _results(
    executor: Executor, width: int, function: Callable[..., Any], chunks: Sequence[Any], limits: Limits
) -> Iterator[Any]:
    """Results as they come, with few chunks under way, so that neither queue grows with the folder."""
    waiting: set[Future[Any]] = set()
    for chunk in chunks:
        with _interrupts_later():
            waiting.add(executor.submit(function, chunk, limits))
        if len(waiting) >= _QUEUED * width:
            done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
            yield from (future.result() for future in done)
    for future in concurrent.futures.as_completed(waiting):
        yield future.result()


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """A worker inherits what is blocked when it starts, so that an interrupt cannot hit its first imports."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
