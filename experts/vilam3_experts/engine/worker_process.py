"""The owner of one worker process: restarts it, kills it on timeout, gives up on inputs that crash it.

Messages over the socket. To the child: the `Job` once, then (items, smallest) for each chunk and a bool for
each claim. From the child: ('claim', number, keys), ('building',), ('built',), ('outcome', Outcome),
('broken', reason), ('fatal', exit code, message), and ('end',) after each chunk.
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

from vilam3_experts.engine.job import ATTEMPTS, Item, Job, Outcome, run_error
from vilam3_experts.engine.worker import Claim, Keys
from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.experts.record import failed
from vilam3_jax.errors import UnavailableError

_GRACE_SECONDS = 5.0
# Passes sys.path as an argument: PYTHONPATH would leak into programs that an expert starts.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from vilam3_experts.engine.worker import main; main()"
)


class StoppedError(Exception):
    """`WorkerProcess.stop` was called."""


class _WorkerDiedError(Exception):
    """The child died; the message is the cause, and `timed_out` tells whether its owner killed it."""

    def __init__(self, reason: str, *, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.timed_out = timed_out


class WorkerProcess:
    """One child process at a time, started on demand, with additional `environment` variables."""

    def __init__(self, job: Job, claim: Claim, environment: Mapping[str, str] | None = None) -> None:
        self._job, self._claim, self._environment = job, claim, dict(environment or {})
        self._server: _ForkServer | None = None
        self._connection: Connection | None = None
        self._stopped = False
        self._building = False
        self._failed_builds = 0
        self._keys: dict[int, Keys] = {}

    def run(self, items: Sequence[Item]) -> Iterator[Outcome]:
        """Yields one outcome per item. After a crash, the remaining items run one by one.

        Raises `UserError` if the expert cannot be built, `UnavailableError` if its process repeatedly dies
        meanwhile, and `StoppedError` after `stop`.
        """
        left = {item.number: item for item in items}
        if len(left) > 1:
            with contextlib.suppress(_WorkerDiedError):
                yield from self._run_chunk(left, smallest=False)
        for item in list(left.values()):
            yield from self._run_single(item)

    def _run_single(self, item: Item) -> Iterator[Outcome]:
        for attempt in range(1, ATTEMPTS + 1):
            began = time.perf_counter()
            try:
                yield from self._run_chunk({item.number: item}, smallest=attempt == ATTEMPTS)
                return
            except _WorkerDiedError as error:
                if error.timed_out or attempt == ATTEMPTS:  # a retry would time out again
                    reason = str(error) if error.timed_out else f"{error}, {ATTEMPTS} times"
                    yield self._failed_outcome(item, reason, time.perf_counter() - began)
                    return

    def _failed_outcome(self, item: Item, reason: str, seconds: float) -> Outcome:
        name, keys = item.input.name, self._keys.pop(item.number, None)
        if keys is None:
            return Outcome(item.number, name, "unreadable", f"while it was read: {reason}")
        record = failed(
            inputs_key(keys),
            self._job.descriptor.name,
            self._job.args,
            reason,
            version=self._job.descriptor.version,
            weights_sha256=self._job.weights_sha256,
            seconds=seconds,
            inputs=() if [role for role, _ in keys] == [""] else keys,
        )
        return Outcome(item.number, name, "failed", reason, (), record.to_bytes())

    def _run_chunk(self, left: dict[int, Item], *, smallest: bool) -> Iterator[Outcome]:
        """Sends a chunk and yields its outcomes; removes finished items from `left`.

        Raises `_WorkerDiedError` if the worker dies first.
        """
        limit = None if self._job.timeout is None else self._job.timeout * len(left)
        connection = self._connect()
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
                case ("fatal", code, text):
                    raise run_error(code, text)
                case ("broken", reason):
                    self._end()
                    raise _WorkerDiedError(reason)
                case ("end",):
                    return
                case _:
                    raise RuntimeError(f"unknown message {message[0]!r} from a worker")

    def _connect(self) -> Connection:
        if self._stopped:
            raise StoppedError
        if self._connection is None:
            if self._server is None:
                self._server = _ForkServer(self._environment)
            try:
                self._connection = self._server.fork()
            except OSError:
                raise self._died() from None
            if self._stopped:  # set by another thread since the first check
                self._end()
                raise StoppedError
            self._send(self._connection, self._job)
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
        raise _WorkerDiedError(f"took longer than the {self._job.timeout:g} s of --timeout", timed_out=True)

    def _died(self) -> Exception:
        """The exception to raise for a broken connection."""
        if self._stopped:
            return StoppedError()
        code = self._end(wait=True)
        reason = f"its process ended with code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                reason = f"its process was ended by signal {-code} ({signal.Signals(-code).name})"
                if -code == signal.SIGKILL:
                    reason += ", as the system does when memory is short"
        if not self._building:
            return _WorkerDiedError(reason)
        self._building = False
        self._failed_builds += 1
        if self._failed_builds < ATTEMPTS:
            return _WorkerDiedError(reason)
        return UnavailableError(
            f"{self._job.descriptor.name}: {reason} while the expert was built, {ATTEMPTS} times; "
            "give it more memory, or fewer --workers"
        )

    def _end(self, *, wait: bool = False) -> int:
        """Kills the child and its process group; returns its exit code.

        `wait` first gives a dying child time to exit, so that the exit code is its own.
        """
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._server is None:
            return 0
        code = self._server.end(wait=wait)
        if code is None:  # the fork server itself died
            code = self._server.close()
            self._server = None
        return code

    def stop(self) -> None:
        """Kills the child from another thread; `run` then raises `StoppedError`."""
        self._stopped = True
        if (server := self._server) is not None:
            server.kill()

    def close(self) -> None:
        """Kills the child; called by the thread that calls `run`."""
        self._stopped = True
        self._end()
        if self._server is not None:
            self._server.close()
            self._server = None


class _ForkServer:
    """The process that forks workers, see `worker.main`, and its current worker."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._pid = 0  # of the worker; 0 if there is none
        ours, theirs = socket.socketpair()
        life, self._life = os.pipe()
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, path, str(theirs.fileno()), str(life)],
                pass_fds=(theirs.fileno(), life),
                stdin=subprocess.DEVNULL,
                stdout=2,  # libraries may print
                env={**os.environ, **environment},
                start_new_session=True,  # Ctrl-C is the owner's to handle
            )
        finally:
            theirs.close()
            os.close(life)
        self._control = ours

    def fork(self) -> Connection:
        """Starts a worker; raises `OSError` if the fork server died."""
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self._control, [b"+"], [theirs.fileno()])
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        connection = Connection(ours.detach())
        self._pid = self._read_number() or 0
        if not self._pid:
            connection.close()
            raise ConnectionError("the fork server died")
        return connection

    def end(self, *, wait: bool) -> int | None:
        """Kills the worker; returns its exit code, or None if the fork server died."""
        if not self._pid:
            return None
        code = None
        if wait:
            self._control.settimeout(_GRACE_SECONDS)
            with contextlib.suppress(TimeoutError):
                code = self._read_number()
            self._control.settimeout(None)
        _kill_group(self._pid)  # also after the worker exited: its children may still run
        if code is None:
            code = self._read_number()
        self._pid = 0
        return code

    def kill(self) -> None:
        """Kills the worker and the fork server; any thread may call it."""
        for pid in (self._pid, self._process.pid):
            _kill_group(pid)

    def close(self) -> int:
        """Kills both; returns the exit code of the fork server."""
        self.kill()
        code = self._process.wait()
        self._pid = 0
        self._control.close()
        os.close(self._life)
        return code

    def _read_number(self) -> int | None:
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
