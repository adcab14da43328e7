"""What a server keeps in memory for a client for a while: by name, for its owner alone, up to some bytes."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from vilam3_jax.serving.errors import ApiError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Entry(Generic[T]):
    value: T
    owner: str
    expires: float  # Unix time
    size: int


class Kept(Generic[T]):
    """Values by name; thread-safe. The oldest go first if they take too much memory; the newest one stays."""

    def __init__(self, what: str, fix: str, *, seconds: float, max_bytes: int, size: Callable[[T], int]):
        """`what` names a value in errors, such as "mask"; `fix` says what to do; `size` returns its bytes."""
        self._what, self._fix = what, fix
        self._seconds, self._max_bytes, self._size = seconds, max_bytes, size
        self._entries: dict[str, _Entry[T]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def add(self, name: str, value: T, owner: str) -> None:
        """Keeps a value under a new name."""
        entry = _Entry(value, owner, time.time() + self._seconds, self._size(value))
        with self._lock:
            self._entries[name] = entry
            self._bytes += entry.size
            while len(self._entries) > 1 and self._bytes > self._max_bytes:
                self._drop(next(iter(self._entries)))

    def get(self, name: str, owner: str) -> T:
        """A value of an owner; raises `ApiError` (404) without one."""
        with self._lock:
            found = self._entries.get(name)
        if found is None or found.owner != owner or found.expires < time.time():
            raise ApiError(404, f"no such {self._what}; {self._fix}", f"no_such_{self._what}")
        return found.value

    def delete(self, name: str, owner: str) -> None:
        """Forgets a value; raises as `get`."""
        self.get(name, owner)
        with self._lock:
            if name in self._entries:
                self._drop(name)

    def sweep(self) -> None:
        """Forgets what expired."""
        now = time.time()
        with self._lock:
            for name in [name for name, entry in self._entries.items() if entry.expires < now]:
                self._drop(name)

    def _drop(self, name: str) -> None:
        self._bytes -= self._entries.pop(name).size
