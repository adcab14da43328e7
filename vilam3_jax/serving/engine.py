"""A thread that owns the model: requests of any thread are decoded together."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import math
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any, TypeVar

from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.inference import batching
from vilam3_jax.inference.generate import Generator

_EXPERT_THREADS = 4  # the expert host runs one request at a time; stored annotations need no waiting
LATE = "the answer took longer than the server's deadline; ask for fewer tokens, or try again later"
_LOG = logging.getLogger(__name__)

T = TypeVar("T")


class BusyError(UserError):
    """Too many requests are waiting; try again later."""


class ClosedError(UnavailableError):
    """The engine accepts no more requests."""


class DeadlineError(UserError):
    """A request took longer than its deadline."""


class EngineError(Exception):
    """The model failed; the log says how."""


@dataclasses.dataclass(eq=False)
class _Request:
    """A request that waits or runs; `inner` is its future in the batcher."""

    future: Future[Any]
    deadline: float  # of `time.monotonic`
    inner: Future[Any] | None = None


class Engine:
    """Runs scripts of a `Batcher` in a dedicated thread; close it, or use it in a `with` statement."""

    def __init__(self, generator: Generator, *, queue: int = 64):
        """Starts the thread; `queue` is the number of requests that may wait or run."""
        self._generator, self._limit = generator, queue
        self._calls = ThreadPoolExecutor(_EXPERT_THREADS, thread_name_prefix="vilam3-expert")
        self._batcher = batching.Batcher(generator, self._calls)
        self._commands: collections.deque[Callable[[], None]] = collections.deque()
        self._wake, self._closed = threading.Condition(), False
        self._open: set[_Request] = set()
        self._thread = threading.Thread(target=self._run, name="vilam3-engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """Number of requests that wait or run."""
        return len(self._open)

    @property
    def alive(self) -> bool:
        """Whether the engine accepts requests."""
        return self._thread.is_alive() and not self._closed

    def submit(self, script: batching.Script[T], *, seconds: float | None = None) -> Future[T]:
        """Adds a dialogue; its callbacks are called in the engine's thread.

        To cancel it, cancel the future: its row is freed before the next tokens are decoded.

        Args:
          script: the dialogue.
          seconds: its deadline, from now; None for none.

        Returns:
          Its future, which raises what the script raises; `DeadlineError`; or `EngineError` if the model
          failed, for all requests that were decoded together.

        Raises:
          BusyError: the queue is full.
          ClosedError: the engine is closed.
        """
        until = math.inf if seconds is None else time.monotonic() + seconds
        request = _Request(Future(), until)
        with self._wake:
            if self._closed:
                raise ClosedError("the server is stopping; ask again when it runs")
            if len(self._open) >= self._limit:
                raise BusyError("the server is busy; try again in a few seconds")
            self._open.add(request)
            self._commands.append(lambda: self._start(script, request))
            self._wake.notify()
        return request.future

    def _start(self, script: batching.Script[T], request: _Request) -> None:
        if request.future.done():
            script.close()
            self._forget(request)
            return
        inner = request.inner = self._batcher.add(script)

        def cancelled(outer: Future[T]) -> None:
            if outer.cancelled():
                self._command(lambda: self._batcher.cancel(inner))

        def done(inner: Future[T]) -> None:
            self._forget(request)
            if inner.cancelled():
                request.future.cancel()
            elif error := inner.exception():
                _fail(request.future, error)
            else:
                # The client may leave between a check and this.
                with contextlib.suppress(InvalidStateError):
                    request.future.set_result(inner.result())

        inner.add_done_callback(done)
        request.future.add_done_callback(cancelled)

    def _forget(self, request: _Request) -> None:
        with self._wake:
            self._open.discard(request)
            self._wake.notify_all()

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify_all()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._closed and not self._commands and not self._batcher.unfinished:
                    self._wake.wait()
                if self._closed and not self._batcher.unfinished and not self._commands:
                    return
                commands, self._commands = self._commands, collections.deque()
            try:
                for command in commands:
                    command()
                self._end_late_ones()
                self._batcher.step()
            except BaseException as error:  # also a panic of a library in Rust
                self._recover(error)

    def _end_late_ones(self) -> None:
        now = time.monotonic()
        with self._wake:
            late = [one for one in self._open if one.deadline < now and not one.future.done()]
        for request in late:
            _fail(request.future, DeadlineError(LATE))
            if request.inner is not None:
                self._batcher.cancel(request.inner)

    def _recover(self, error: BaseException) -> None:
        """Ends all dialogues, whose caches may be lost, and goes on with an empty batcher."""
        # Messages of libraries may quote what they failed on.
        trace = "".join(traceback.format_tb(error.__traceback__))
        _LOG.error("the engine failed: %s\n%s", type(error).__name__, trace)
        self._batcher = batching.Batcher(self._generator, self._calls)
        self._generator.forget_prefixes()
        with self._wake:
            lost = [one for one in self._open if one.inner is not None]
        for request in lost:
            _fail(request.future, EngineError("the model failed on this or another request; try again"))
            self._forget(request)

    def close(self, *, drain: bool = True, seconds: float | None = None) -> None:
        """Accepts nothing more; with `drain`, waits for the dialogues in progress, for `seconds` if given."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
            if drain:
                self._wake.wait_for(lambda: not self._open, seconds)
            left = [request.future for request in self._open]
        for future in left:
            future.cancel()
        self._thread.join()
        self._calls.shutdown(cancel_futures=True)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _fail(future: Future[Any], error: BaseException) -> None:
    """Sets an error, unless the client left."""
    with contextlib.suppress(InvalidStateError):
        future.set_exception(error)
