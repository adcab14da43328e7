"""Reads pickles of plain values without unpickling, which can execute arbitrary code.

It interprets the opcodes of dict, list, tuple, str, int, float, bool and None, and refuses all others.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_MAX_FILE_BYTES = 256 << 20
_MAX_OPCODES = 10_000_000
_MAX_DEPTH = 32  # nesting of containers
_MAX_EXPANDED = 1 << 30  # values and characters with every reference followed: shared values count each time
_MAX_INT = 1 << 8192
_CONTAINERS = (dict, list, tuple)


class PickleError(ValueError):
    """The bytes are not a pickle of plain values; the message says where and why."""


def read(path: paths.PathLike) -> Any:
    """The value in a pickle file.

    Raises:
      UserError: it holds other values, is damaged or exceeds a limit.
      UnavailableError: the disk or the network fails.
    """
    data = paths.read_bytes(path, _MAX_FILE_BYTES)
    try:
        return parse(data)
    except PickleError as error:
        raise UserError(f"{path}: {error}; download it again from its authors") from error


def parse(data: bytes) -> Any:
    """The value in a pickle of any protocol.

    Raises:
      PickleError: it holds other values, is damaged or exceeds a limit.
    """
    machine = _Machine()
    place = end = 0
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
            place, end = position or 0, (position or 0) + 1
            if count >= _MAX_OPCODES:
                raise PickleError(f"has more than {_MAX_OPCODES} opcodes")
            action = _ACTIONS.get(opcode.name)
            if action is None:
                raise PickleError(
                    f"opcode {opcode.name} at byte {place} is refused; only dict, list, tuple, str, int, "
                    "float, bool and None are read"
                )
            action(machine, argument)
    except PickleError:
        raise
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise PickleError(f"is damaged near byte {place} ({type(error).__name__})") from error
    if end != len(data):
        raise PickleError(f"has {len(data) - end} bytes after its end")
    if machine.mark_stack or len(machine.stack) != 1:
        raise PickleError(f"holds {len(machine.stack)} values where it should hold one")
    value = machine.stack[0]
    _check_size(value)
    return value


class _Machine:
    """Stack, marks and memo. `stack` holds the values after the last mark."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.mark_stack: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_int(self, value: int) -> None:
        if abs(value) > _MAX_INT:
            raise PickleError("holds an integer of more than 8192 bits")
        self.push(value)

    def push_python2_text(self, value: str) -> None:
        # pickletools shows the bytes of a Python 2 text as Latin-1.
        self.push(value.encode("latin-1").decode("utf-8"))

    def mark(self) -> None:
        self.mark_stack.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.mark_stack.pop()
        return items

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise LookupError
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def remember(self, place: int) -> None:
        self.memo[place] = self.stack[-1]

    def recall(self, place: int) -> None:
        self.push(self.memo[place])

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise TypeError
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a nested tuple has no bounds on depth or repetition.
            if any(type(part) in _CONTAINERS for part in (key if type(key) is tuple else (key,))):
                raise PickleError("a key of a dict is not a text, a number or a flat tuple of them")
            target[key] = value

    def make_dict(self) -> None:
        items = self.pop_mark()
        self.push({})
        self.set_items(items)


def _pushes(make: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(make())


_ACTIONS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, _: None),
    **dict.fromkeys(("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2"), _Machine.push_int),
    **dict.fromkeys(("FLOAT", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING"), _Machine.push),
    **dict.fromkeys(("BINSTRING", "SHORT_BINSTRING"), _Machine.push_python2_text),
    "NONE": _pushes(lambda: None),
    "NEWTRUE": _pushes(lambda: True),
    "NEWFALSE": _pushes(lambda: False),
    "EMPTY_LIST": _pushes(list),
    "EMPTY_DICT": _pushes(dict),
    "EMPTY_TUPLE": _pushes(tuple),
    "MARK": lambda machine, _: machine.mark(),
    "LIST": lambda machine, _: machine.push(machine.pop_mark()),
    "DICT": lambda machine, _: machine.make_dict(),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_mark())),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop(3))),
    "APPEND": lambda machine, _: machine.extend(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.extend(machine.pop_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.remember),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
}


def _check_size(root: Any) -> None:
    """Checks depth and expanded size, and refuses cycles; visits each container once, after its parts."""
    sizes: dict[int, tuple[int, int]] = {}  # id of a container → (expanded size, depth)
    open_now: set[int] = set()
    pending: list[tuple[Any, bool]] = [(root, False)]
    while pending:
        value, is_done = pending.pop()
        parts = _parts(value)
        if is_done:
            measured = [_measure(part, sizes) for part in parts]
            size = 1 + sum(size for size, _ in measured)
            depth = 1 + max((depth for _, depth in measured), default=0)
            if size > _MAX_EXPANDED:
                raise PickleError(f"refers to its values more than {_MAX_EXPANDED} times")
            if depth > _MAX_DEPTH:
                raise PickleError(f"is nested more than {_MAX_DEPTH} deep")
            sizes[id(value)] = size, depth
            open_now.discard(id(value))
        elif id(value) not in sizes:
            if id(value) in open_now:
                raise PickleError("holds a container that contains itself")
            open_now.add(id(value))
            pending.append((value, True))
            pending.extend((part, False) for part in parts if type(part) in _CONTAINERS)


def _parts(value: Any) -> list[Any]:
    if type(value) is dict:
        return [part for item in value.items() for part in item]
    return list(value) if type(value) in (list, tuple) else []


def _measure(value: Any, sizes: dict[int, tuple[int, int]]) -> tuple[int, int]:
    if type(value) in _CONTAINERS:
        return sizes[id(value)]
    return 1 + (len(value) if type(value) is str else 0), 0
