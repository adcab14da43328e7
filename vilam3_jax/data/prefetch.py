"""An iterator run ahead in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

_POLL_SECONDS = 0.1  # how long a full or empty queue keeps a thread from seeing that it shall stop


class Producer:
    """Runs an iterator at most `depth` items ahead; depth 0 runs it in place.

    Attributes:
      called_off: `close` came before the iterator's end.
    """

    def __init__(self, source: Iterator[Any], depth: int) -> None:
        """Starts the thread."""
        self.called_off = False
        self._finished = False
        self._source = source
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(max(depth, 1))
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if depth > 0:
            self._thread = threading.Thread(target=self._run, name="vilam3-batches", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        try:
            for item in self._source:
                if not self._put("item", item):
                    return
            self._put("end", None)
        except BaseException as error:  # handed over to the consumer, whatever it is
            self._put("error", error)

    def _put(self, kind: str, value: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put((kind, value), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[Any]:
        """Yields the items; raises what the iterator raised."""
        if self._thread is None:
            yield from self._source
            self._finished = True
            return
        while not self._stopped.is_set():
            try:
                kind, value = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if kind == "error":
                raise value
            if kind == "end":
                self._finished = True
                return
            yield value

    def close(self) -> None:
        """Stops and joins the thread; the iterator is not run further."""
        self.called_off = self.called_off or not self._finished
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
