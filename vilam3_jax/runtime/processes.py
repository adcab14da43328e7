"""Several processes, one for each host: how they find each other, agree, and end together.

With one process nothing here does anything, and no service is started. With several, every process runs the
same program; a *lead* process (number 0) speaks and writes for all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from vilam3_jax.errors import UserError
from vilam3_jax.runtime import compat

BARRIER_SECONDS = 1800  # hosts of a pod start minutes apart
SILENT_SECONDS = 100  # a process that gives no sign of life for so long counts as gone
_LAST_WORDS = "vilam3/failed"
_HEARD = "vilam3/heard"
_INTERRUPTED = 130  # as shells report SIGINT
_POLL_SECONDS = 1.0
_CAUSE_SECONDS = 5  # how long a process whose partner broke off waits to hear why
_HEARD_SECONDS = 10  # how long a failed process waits until the others know

FLAGS = {
    "coordinator_address": "HOST:PORT of process 0; only with several processes.",
    "num_processes": "How many processes train together.",
    "process_id": "Number of this process, from 0.",
    "distributed": "Several processes that the environment tells of (TPU pods, Slurm, Open MPI).",
}


def define_flags(values: flags.FlagValues) -> None:
    """Adds `FLAGS` to a program's flags."""
    flags.DEFINE_string("coordinator_address", None, FLAGS["coordinator_address"], flag_values=values)
    flags.DEFINE_integer("num_processes", None, FLAGS["num_processes"], flag_values=values)
    flags.DEFINE_integer("process_id", None, FLAGS["process_id"], flag_values=values)
    flags.DEFINE_boolean("distributed", False, FLAGS["distributed"], flag_values=values)


def flag_values(values: flags.FlagValues) -> dict[str, Any]:
    """What the user gave for `FLAGS`: keyword arguments of `group`."""
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
    """Context of a program that may be one of several processes; enter it before any use of a device.

    An error in one process ends all of them: the first to fail says why, the others name it. None waits for a
    partner that will not come.

    Args:
      program: its name, for messages.
      coordinator_address: see `FLAGS`, as for the others.
      num_processes: None: one process, or what the environment tells.
      process_id: of this process.
      distributed: several processes, though no known variable of the environment says so.

    Raises:
      UserError: the flags contradict each other, or the processes do not meet.
    """
    if not _join(coordinator_address, num_processes, process_id, distributed):
        yield
        return
    watch = _Watch(program)
    try:
        yield
    except BaseException as error:
        watch.fail(error)
    watch.stop()
    jax.distributed.shutdown()


def _join(address: str | None, count: int | None, number: int | None, distributed: bool) -> bool:
    given = [value is not None for value in (address, count, number)]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator_address, --num_processes and --process_id go together; or give none of them, and "
            "--distributed where the environment tells of the processes"
        )
    if count is not None and number is not None and not 0 <= number < count:
        raise UserError(f"--process_id={number}: must be 0 to {count - 1}, below --num_processes")
    if count == 1 or not (any(given) or distributed or _environment_tells(os.environ)):
        return False
    # Only processors need it; other devices have collectives of their own.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            initialization_timeout=BARRIER_SECONDS,
            heartbeat_timeout_seconds=SILENT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes did not meet ({' '.join(str(error).split())[:300]}); "
            "check --coordinator_address, and that every process was started"
        ) from error
    return True


def _environment_tells(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX understands started several processes."""
    counts = [environment.get(name, "") for name in ("OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")]
    if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        counts.append(environment.get("SLURM_NTASKS", ""))
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return len(hosts) > 1 or any(count.isdigit() and int(count) > 1 for count in counts)


class _Watch:
    """Listens in the background for a process that failed."""

    def __init__(self, program: str) -> None:
        self._program = program
        self._client = compat.coordination_client()
        self._ending = threading.Lock()  # the first to take it ends the process
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="vilam3-processes", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _listen(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            said = _try_get(self._client, _LAST_WORDS)
            if said is not None and not self._stopped.is_set():
                self._follow(json.loads(said))

    def _follow(self, cause: Mapping[str, Any]) -> NoReturn:
        """Ends this process because of another."""
        self._ending.acquire()
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_HEARD}/{jax.process_index()}", "")
        # With the cause's code: a launcher starts again what crashed, not what a user must mend.
        self._end(f"stopped, because process {cause['process']} failed: {cause['message']}", cause["code"])

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process, and says why to the others."""
        known = isinstance(error, UserError | KeyboardInterrupt)
        code = error.exit_code if isinstance(error, UserError) else _INTERRUPTED if known else 1
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if known:
            message = str(error) or "interrupted"
        # A broken connection is the consequence of what befell a partner, who may just be telling.
        cause = _try_get(self._client, _LAST_WORDS, 0 if known else _CAUSE_SECONDS)
        if cause is not None:
            self._follow(json.loads(cause))
        self._ending.acquire()
        with contextlib.suppress(Exception):
            said = {"process": jax.process_index(), "message": message, "code": code}
            self._client.key_value_set(_LAST_WORDS, json.dumps(said))
            # Another that fails at the same time, as all do at Ctrl-C, need not wait for this one.
            self._client.key_value_set(f"{_HEARD}/{jax.process_index()}", "")
        if not known:
            traceback.print_exception(error)
        others = [number for number in range(jax.process_count()) if number != jax.process_index()]
        deadline = time.monotonic() + _HEARD_SECONDS
        silent = [
            number
            for number in others
            if _try_get(self._client, f"{_HEARD}/{number}", max(deadline - time.monotonic(), 0)) is None
        ]
        if silent and code != _INTERRUPTED:  # Ctrl-C reaches all, and the first to end keeps the store
            shown = ", ".join(map(str, silent))
            message += f" (no answer from process {shown}: killed, or its machine is gone)"
        self._end(message, code)

    def _end(self, message: str, code: int) -> NoReturn:
        # The ordinary way out of a program would wait for the other processes.
        print(
            f"{self._program}: error: process {jax.process_index()}: {message}", file=sys.stderr, flush=True
        )
        sys.stdout.flush()
        os._exit(code)


def _try_get(client: Any, key: str, seconds: float = 0) -> str | None:
    try:
        if seconds:
            return client.blocking_key_value_get(key, int(1000 * seconds))
        return client.key_value_try_get(key)
    except Exception:  # not there, or the process that keeps the store is gone
        return None


def is_primary_process() -> bool:
    """Whether this is process 0, which alone prints and writes shared files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for the other processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def host_barrier(name: str) -> None:
    """Waits for the other processes through the coordination service; use each `name` once.

    It runs no device program. On CPUs (gloo) the first program over several processes fails if one process
    starts it 30 seconds before another, and compile times can differ by that much.
    """
    if jax.process_count() > 1:
        client = compat.coordination_client()
        client.key_value_set(f"vilam3/{name}/{jax.process_index()}", "")
        for number in range(jax.process_count()):
            client.blocking_key_value_get(f"vilam3/{name}/{number}", 1000 * BARRIER_SECONDS)


def gather(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order; every process must call it."""
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


class Preemption:
    """Context in which SIGTERM asks the run to save and stop, instead of ending the process.

    Also while a run starts, and while it exports: what is begun is finished, so that nothing is half-written.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._asked, self._reached = 0, False
        # With several processes JAX catches the signal and finds the step at which all can stop.
        self._own = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Preemption:
        if self._own:
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._event.set())
        return self

    def __exit__(self, *_: object) -> None:
        if self._own:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self, step: int) -> bool:
        """Whether to stop after `step` finished steps, alike in all processes; ask at every step."""
        if jax.process_count() == 1:
            return self._event.is_set()
        # JAX says so at one number only, the first that no process has asked for when the signal comes. That
        # is 1 before a run that goes on has asked at all, so it asks for every number up to its own.
        asking, self._asked = range(self._asked, step + 1), step + 1
        self._reached |= any(multihost_utils.reached_preemption_sync_point(number) for number in asking)
        return self._reached
