"""Multi-process runs, one process per host: start, agreement and a common end.

With one process all of this does nothing. With several, all run the same program; the *primary process*,
number 0, prints and writes for all.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from vilam3_jax.errors import UserError
from vilam3_jax.runtime import compat
from vilam3_jax.runtime.process_flags import FLAGS

BARRIER_SECONDS = 1800  # hosts of a pod start minutes apart
SILENT_SECONDS = 100  # a process without a heartbeat for this long is dead
_FAILURE = "vilam3/failed"  # key of the first process's error
_ACKNOWLEDGED = "vilam3/heard"  # prefix of the keys of the processes that read it
_INTERRUPTED = 130  # exit code of shells for SIGINT
_POLL_SECONDS = 1.0
_CAUSE_SECONDS = 5  # how long a process with a broken connection waits for another's error
_ACKNOWLEDGED_SECONDS = 10  # how long a failed process waits for the others
_PATIENCE_SECONDS = 7 * 86400  # for somebody to type a question
_made = itertools.count()  # calls of `made_by_primary_process`


def define_flags(values: flags.FlagValues) -> None:
    """Adds `FLAGS` to a program's flags."""
    flags.DEFINE_string("coordinator_address", None, FLAGS["coordinator_address"], flag_values=values)
    for name in ("num_processes", "process_id"):
        flags.DEFINE_integer(name, None, FLAGS[name], flag_values=values)
    flags.DEFINE_boolean("distributed", False, FLAGS["distributed"], flag_values=values)


def flag_values(values: flags.FlagValues) -> dict[str, Any]:
    """Values of `FLAGS`, the keyword arguments of `group`."""
    return {name: values[name].value for name in FLAGS}


@contextlib.contextmanager
def group(
    program: str,
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool = False,
) -> Iterator[None]:
    """Context of a program that may be one of several processes; enter it before the first use of a device.

    An error in one process ends all of them: the first to fail reports its error, the others refer to it.
    `program` is the name in messages; see `FLAGS` for the other arguments, which the environment can replace.

    Raises:
      UserError: the flags contradict each other, or the processes could not connect.
    """
    if not several(coordinator_address, num_processes, process_id, distributed):
        yield
        return
    _join(coordinator_address, num_processes, process_id)
    watch = _Watch(program)
    try:
        yield
    except BaseException as error:
        watch.fail(error)
    watch.stop()
    jax.distributed.shutdown()


def several(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    distributed: bool = False,
) -> bool:
    """Whether flags or the environment ask for several processes.

    Raises:
      UserError: the flags contradict each other.
    """
    address, count, number = coordinator_address, num_processes, process_id
    given = [value is not None for value in (address, count, number)]
    if any(given) and not all(given):
        raise UserError(
            "give all of --coordinator_address, --num_processes and --process_id; or none of them, and "
            "--distributed if the environment describes the processes"
        )
    if count is not None and number is not None and not 0 <= number < count:
        raise UserError(f"--process_id={number}: must be 0 to {count - 1}, below --num_processes")
    return count != 1 and (any(given) or distributed or _launched(os.environ))


def _join(address: str | None, count: int | None, number: int | None) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # ignored by other devices
    timeouts: dict[str, Any] = dict(
        initialization_timeout=BARRIER_SECONDS, heartbeat_timeout_seconds=SILENT_SECONDS
    )
    try:
        jax.distributed.initialize(address, count, number, **timeouts)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes could not connect ({' '.join(str(error).split())[:300]}); "
            "check --coordinator_address, and that every process was started"
        ) from error


def _launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX supports started several processes."""
    counts = [environment.get(name, "") for name in ("OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")]
    if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        counts.append(environment.get("SLURM_NTASKS", ""))
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return len(hosts) > 1 or any(count.isdigit() and int(count) > 1 for count in counts)


class _Watch:
    """Polls in the background for another process's failure."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._client = compat.coordination_client()
        self._ending = threading.Lock()  # the thread that takes it ends the process
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="vilam3-processes", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            failure = _try_get(self._client, _FAILURE)
            if failure is not None and not self._stopped.is_set():
                self._follow(json.loads(failure))

    def _follow(self, cause: Mapping[str, Any]) -> NoReturn:
        """Ends this process because another failed, with its exit code: launchers restart only crashes."""
        self._ending.acquire()
        with contextlib.suppress(Exception):
            self._acknowledge()
        self._end(f"stopped, because process {cause['process']} failed: {cause['message']}", cause["code"])

    def _acknowledge(self) -> None:
        self._client.key_value_set(f"{_ACKNOWLEDGED}/{jax.process_index()}", "")

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process and reports its error to the others."""
        known = isinstance(error, UserError | KeyboardInterrupt)
        code = error.exit_code if isinstance(error, UserError) else _INTERRUPTED if known else 1
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if known:
            message = str(error) or "interrupted"
        # A connection breaks because another process failed, which may not have reported its error yet.
        cause = _try_get(self._client, _FAILURE, 0 if known else _CAUSE_SECONDS)
        if cause is not None:
            self._follow(json.loads(cause))
        self._ending.acquire()
        with contextlib.suppress(Exception):
            failure = {"process": jax.process_index(), "message": message, "code": code}
            self._client.key_value_set(_FAILURE, json.dumps(failure))
            # A process that fails at the same time, as all do at Ctrl-C, need not wait for this one.
            self._acknowledge()
        if not known:
            traceback.print_exception(error)
        deadline = time.monotonic() + _ACKNOWLEDGED_SECONDS
        silent = []
        for number in range(jax.process_count()):
            seconds = max(deadline - time.monotonic(), 0)
            if number != jax.process_index():
                answer = _try_get(self._client, f"{_ACKNOWLEDGED}/{number}", seconds)
                silent += [str(number)] if answer is None else []
        if silent and code != _INTERRUPTED:  # after Ctrl-C, process 0 may end first, and the store with it
            message += f" (no answer from process {', '.join(silent)}: killed, or its machine is gone)"
        self._end(message, code)

    def _end(self, message: str, code: int) -> NoReturn:
        line = f"{self._program}: error: process {jax.process_index()}: {message}"
        print(line, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)  # a normal exit would wait for the other processes


def _try_get(client: Any, key: str, seconds: float = 0) -> str | None:
    try:
        if seconds:
            return client.blocking_key_value_get(key, int(1000 * seconds))
        return client.key_value_try_get(key)
    except Exception:  # absent, or process 0, which runs the store, has ended
        return None


def is_primary_process() -> bool:
    """Whether this is process 0, the only one that prints and writes shared files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def host_barrier(name: str, seconds: int = BARRIER_SECONDS) -> None:
    """Waits for the other processes without a device program; use each `name` once.

    On CPUs (gloo) the first program over several processes fails if one process starts it 30 seconds before
    another, and compile times can differ by that much.
    """
    if jax.process_count() > 1:
        client = compat.coordination_client()
        client.key_value_set(f"vilam3/{name}/{jax.process_index()}", "")
        for number in range(jax.process_count()):
            client.blocking_key_value_get(f"vilam3/{name}/{number}", 1000 * seconds)


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes in order; all processes must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.asarray([len(text)]))).reshape(-1)
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def from_primary_process(value: Any) -> Any:
    """The JSON value of the primary process."""
    return gather(value if is_primary_process() else None)[0]


def made_by_primary_process(make: Callable[[], Any]) -> Any:
    """The JSON value that the primary process makes, however long that takes; so is its `UserError`.

    All processes must call it; the others wait without a device program.
    """
    made = None
    if is_primary_process():
        try:
            made = {"value": make()}
        except UserError as error:
            made = {"error": str(error)}
    host_barrier(f"made {next(_made)}", _PATIENCE_SECONDS)
    made = from_primary_process(made)
    if "error" in made:
        raise UserError(made["error"])
    return made["value"]


class Preemption:
    """Context in which SIGTERM or Ctrl-C asks the run to save and stop, during startup and export too.

    With several processes, Ctrl-C ends them at once.

    Attributes:
      interrupted: Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self._event, self.interrupted = threading.Event(), False
        self._asked, self._reached = 0, False
        # With several processes JAX handles the signal and agrees on a step at which all stop.
        self._own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Preemption:
        if self._own:
            self._previous = {
                signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: self._event.set()),
                signal.SIGINT: signal.signal(signal.SIGINT, self._interrupt),
            }
        return self

    def __exit__(self, *_: object) -> None:
        if self._own:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def _interrupt(self, *_: object) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self._event.set()
        print(
            "stopping: the current step ends and is saved; Ctrl-C again stops without saving",
            file=sys.stderr,
            flush=True,
        )

    def reached(self, step: int) -> bool:
        """Whether to stop after `step` finished steps, equal in all processes; call it at every step."""
        if jax.process_count() == 1:
            return self._event.is_set()
        # JAX returns True for one number only: the first that no process has asked for when the signal
        # arrives. A resumed run may get it before its first call, so it asks for all numbers up to its step.
        asking, self._asked = range(self._asked, step + 1), step + 1
        self._reached |= any(multihost_utils.reached_preemption_sync_point(number) for number in asking)
        return self._reached
