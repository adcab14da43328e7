"""A thread-safe least-recently-used cache with a byte budget."""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class ByteLRU(Generic[Value]):
    """Keeps the most recently used values within `budget` bytes, and always the newest one."""

    def __init__(self, budget: int, size_of: Callable[[Value], int]) -> None:
        """`size_of` returns the size of a value in bytes."""
        self._budget = budget
        self._size_of = size_of
        self._values: collections.OrderedDict[Hashable, Value] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[Hashable, threading.Lock] = {}
        self.bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy in another process starts empty."""
        return ByteLRU, (self._budget, self._size_of)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Returns the value of `key`; concurrent callers wait for one call of `make`."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:
                    return self._values[key]
            try:
                value = make()
                with self._lock:
                    self._values[key] = value
                    self.bytes += self._size_of(value)
                    while self.bytes > self._budget and len(self._values) > 1:
                        _, old = self._values.popitem(last=False)
                        self.bytes -= self._size_of(old)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return value

    def discard(self, key: Hashable, value: Value) -> None:
        """Removes `value`, unless another one is stored under `key` by now."""
        with self._lock:
            if self._values.get(key) is value:
                del self._values[key]
                self.bytes -= self._size_of(value)
