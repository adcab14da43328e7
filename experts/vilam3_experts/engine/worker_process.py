"""The owner of one worker process: starts it again, ends it when it hangs, gives up on poison.

Over a socket go, to the child: the `Work` once, then (items, smallest) for each chunk and a bool for each
claim; from the child: ('claim', number, keys), ('building',), ('built',), ('outcome', Outcome), ('broken',
reason), ('fatal', exit code, message), and ('end',) after each chunk.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from vilam3_experts.engine.work import ATTEMPTS, Item, Outcome, Work, fatal
from vilam3_experts.engine.worker import Claim, Keys
from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.experts.record import failed
from vilam3_jax.errors import UnavailableError

_GRACE_SECONDS = 5.0
# The path of this process, and not as PYTHONPATH: what an expert starts may have an environment of its own.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from vilam3_experts.engine.worker import main; main()"
)


class StoppedError(Exception):
    """`Child.stop` was called."""


class _DiedError(Exception):
    """The child ended; the message says how, and `hung` whether it was ended because it took too long."""

    def __init__(self, reason: str, *, hung: bool = False) -> None:
        super().__init__(reason)
        self.hung = hung


class Child:
    """One worker process at a time."""

    def __init__(self, work: Work, claim: Claim, environment: Mapping[str, str] | None = None) -> None:
        """Starts nothing yet.

        Args:
          work: the run.
          claim: asked for every input that could be read.
          environment: variables of the child besides those of this process.
        """
        self._work, self._claim, self._environment = work, claim, dict(environment or {})
        self._nursery: _Nursery | None = None
        self._connection: Connection | None = None
        self._stopped = False
        self._building = False
        self._failed_builds = 0
        self._keys: dict[int, Keys] = {}

    def run(self, items: Sequence[Item]) -> Iterator[Outcome]:
        """Yields one outcome for each item. A chunk that ends its process is run again, item by item.

        Raises:
          UserError: the expert cannot be built.
          UnavailableError: its process ends while it is built.
          StoppedError: see there.
        """
        left = {item.number: item for item in items}
        if len(left) > 1:
            # Which item ends the process comes out when they are run alone.
            with contextlib.suppress(_DiedError):
                yield from self._settle(left, smallest=False)
        for item in list(left.values()):
            yield from self._alone(item)

    def _alone(self, item: Item) -> Iterator[Outcome]:
        for attempt in range(1, ATTEMPTS + 1):
            began = time.perf_counter()
            try:
                yield from self._settle({item.number: item}, smallest=attempt == ATTEMPTS)
                return
            except _DiedError as error:
                if error.hung:
                    # Another try would take as long.
                    yield self._given_up(item, str(error), time.perf_counter() - began)
                    return
                if attempt == ATTEMPTS:
                    reason = f"{error}, {ATTEMPTS} times"
                    yield self._given_up(item, reason, time.perf_counter() - began)

    def _given_up(self, item: Item, reason: str, seconds: float) -> Outcome:
        name, keys = item.input.name, self._keys.pop(item.number, None)
        if keys is None:
            return Outcome(item.number, name, "unreadable", f"while it was read: {reason}")
        record = failed(
            inputs_key(keys),
            self._work.descriptor.name,
            self._work.args,
            reason,
            version=self._work.descriptor.version,
            weights_sha256=self._work.weights_sha256,
            seconds=seconds,
            inputs=() if [role for role, _ in keys] == [""] else keys,
        )
        return Outcome(item.number, name, "failed", reason, (), record.to_bytes())

    def _settle(self, left: dict[int, Item], *, smallest: bool) -> Iterator[Outcome]:
        """Sends a chunk and yields its outcomes; takes out of `left` what is done.

        Raises:
          _DiedError: the child ended before it had done all.
        """
        limit = None if self._work.timeout is None else self._work.timeout * len(left)
        connection = self._started()
        self._send(connection, (list(left.values()), smallest))
        deadline = None if limit is None else time.monotonic() + limit
        while True:
            message = self._receive(connection, deadline)
            match message:
                case ("claim", number, keys):
                    self._keys[number] = keys
                    self._send(connection, self._claim(number, keys))
                case ("outcome", outcome):
                    self._keys.pop(outcome.number, None)
                    if left.pop(outcome.number, None) is not None:
                        yield outcome
                case ("building",):
                    self._building, deadline = True, None
                case ("built",):
                    self._building, self._failed_builds = False, 0
                    deadline = None if limit is None else time.monotonic() + limit
                case ("fatal", code, told):
                    raise fatal(code, told)
                case ("broken", reason):
                    self._end()
                    raise _DiedError(reason)
                case ("end",):
                    return
                case _:
                    raise RuntimeError(f"message {message[0]!r} of a worker")

    def _started(self) -> Connection:
        if self._stopped:
            raise StoppedError
        if self._connection is None:
            if self._nursery is None:
                self._nursery = _Nursery(self._environment)
            try:
                self._connection = self._nursery.fork()
            except OSError:
                raise self._died() from None
            if self._stopped:  # since it was asked above
                self._end()
                raise StoppedError
            self._send(self._connection, self._work)
        return self._connection

    def _send(self, connection: Connection, message: Any) -> None:
        try:
            connection.send(message)
        except OSError:
            raise self._died() from None

    def _receive(self, connection: Connection, deadline: float | None) -> Any:
        try:
            if connection.poll(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        self._end()
        raise _DiedError(f"took longer than the {self._work.timeout:g} s of --timeout", hung=True)

    def _died(self) -> Exception:
        """What a broken connection means."""
        if self._stopped:
            return StoppedError()
        code = self._end(patient=True)
        if code < 0:
            with contextlib.suppress(ValueError):
                name = signal.Signals(-code).name
                reason = f"its process was ended by signal {-code} ({name})"
                if -code == signal.SIGKILL:
                    reason += ", as the system does when memory is short"
                return self._counted(reason)
        return self._counted(f"its process ended with code {code}")

    def _counted(self, reason: str) -> Exception:
        if not self._building:
            return _DiedError(reason)
        self._building = False
        self._failed_builds += 1
        if self._failed_builds < ATTEMPTS:
            return _DiedError(reason)
        return UnavailableError(
            f"{self._work.descriptor.name}: {reason} while the expert was built, {ATTEMPTS} times; "
            "give it more memory, or fewer --workers"
        )

    def _end(self, *, patient: bool = False) -> int:
        """Ends the child and all that it started; returns its exit code.

        Args:
          patient: it is ending by itself, and its own exit code tells how.
        """
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._nursery is None:
            return 0
        code = self._nursery.end(patient=patient)
        if code is None:  # the nursery itself is gone
            code = self._nursery.close()
            self._nursery = None
        return code

    def stop(self) -> None:
        """Ends the child from another thread; `run` then raises `StoppedError`."""
        self._stopped = True
        if (nursery := self._nursery) is not None:
            nursery.kill()

    def close(self) -> None:
        """Ends the child; the thread that calls `run` does this."""
        self._stopped = True
        self._end()
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None


class _Nursery:
    """The process that forks workers, see `worker.main`; and the worker that lives."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._pid = 0  # of the worker; 0: none lives
        ours, theirs = socket.socketpair()
        life, self._life = os.pipe()
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, path, str(theirs.fileno()), str(life)],
                pass_fds=(theirs.fileno(), life),
                stdin=subprocess.DEVNULL,
                stdout=2,  # whatever libraries print
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C of a terminal is for the owner
            )
        finally:
            theirs.close()
            os.close(life)
        self._control = ours

    def fork(self) -> Connection:
        """Starts a worker.

        Raises:
          OSError: the nursery is gone.
        """
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        connection = Connection(ours.detach())
        self._pid = self._number() or 0
        if not self._pid:
            connection.close()
            raise ConnectionError("the nursery is gone")
        return connection

    def end(self, *, patient: bool) -> int | None:
        """Ends the worker; returns its exit code, None if the nursery is gone."""
        if not self._pid:
            return None
        code = None
        if patient:
            self._control.settimeout(_GRACE_SECONDS)
            with contextlib.suppress(TimeoutError):
                code = self._number()
            self._control.settimeout(None)
        _kill_group(self._pid)  # what it started lives on without it
        if code is None:
            code = self._number()
        self._pid = 0
        return code

    def kill(self) -> None:
        """Kills worker and nursery; any thread may call it."""
        for pid in (self._pid, self._process.pid):
            _kill_group(pid)

    def close(self) -> int:
        """Kills both; returns the exit code of the nursery."""
        self.kill()
        code = self._process.wait()
        self._pid = 0
        self._control.close()
        os.close(self._life)
        return code

    def _number(self) -> int | None:
        data = b""
        while len(data) < 8:
            try:
                part = self._control.recv(8 - len(data))
            except ConnectionError:
                return None
            if not part:
                return None
            data += part
        return int.from_bytes(data, "big", signed=True)


def _kill_group(pid: int) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
