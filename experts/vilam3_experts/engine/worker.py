"""Decodes inputs and calls the expert, in the owner's process or in a child of it.

A child talks to its owner over a socket, see `worker_process`, and ends when the owner does.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from vilam3_experts.base import Expert, ExpertFailure, ExpertInputs, KnownAnswer, annotate_one, is_refused
from vilam3_experts.descriptors import Descriptor
from vilam3_experts.engine.job import Item, Job, Outcome
from vilam3_experts.engine.key_cache import fingerprint
from vilam3_experts.engine.memory import RetrySmaller, free_memory
from vilam3_experts.weights import Weights, load_weights
from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.errors import UnavailableError, UserError, use_one_line_notes

logger = logging.getLogger(__name__)

Keys = tuple[tuple[str, str], ...]
"""(role, content key) of each input of a call."""

Claim = Callable[[int, Keys], bool]
"""Asks the owner whether the item with this number and these keys must run."""

_MAX_REASON = 500


class BrokenDeviceError(Exception):
    """The device is unusable for this process; a fresh process may work."""


def create_expert(descriptor: Descriptor, weights: Weights) -> Expert:
    """Builds an expert; raises `UserError` if a library is missing or the weights do not load."""
    try:
        return descriptor.create(weights)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{descriptor.name} cannot start ({error}); install what it needs") from error
    except Exception as error:
        raise UserError(f"{descriptor.name} cannot start ({type(error).__name__}: {error})") from error


class Worker:
    """Runs one expert, built for the first input that needs it.

    `notify` is called with 'building' before the expert is built, and with 'built' after.
    """

    def __init__(self, job: Job, claim: Claim, notify: Callable[[str], object] = lambda event: None) -> None:
        self._job, self._claim, self._notify = job, claim, notify
        self._expert: Expert | None = None
        self._fingerprints: dict[int, bytes | None] = {}

    def run(self, items: Sequence[Item], *, smallest: bool = False) -> Iterator[Outcome]:
        """Yields one outcome per item as soon as it is known.

        Several items form a batch for the expert's `run_batch`; `smallest` uses the expert's smallest form.
        Raises `UserError` if the expert cannot be built, and `BrokenDeviceError`.
        """
        opened: list[tuple[Item, ExpertInputs]] = []
        for item in items:
            found = self._open(item)
            if isinstance(found, Outcome):
                yield found
            elif is_refused(self._job.descriptor, found):
                yield self._annotate(KnownAnswer(ExpertFailure("not run")), item, found)
            else:
                opened.append((item, found))
        if not opened:
            return
        expert = self._built()
        experts: Sequence[Expert] = [RetrySmaller(expert, smallest=smallest)] * len(opened)
        if len(opened) > 1 and hasattr(expert, "run_batch"):
            experts = self._run_batch(expert, [inputs for _, inputs in opened]) or experts
        for (item, inputs), one in zip(opened, experts, strict=True):
            yield self._annotate(one, item, inputs)

    def _open(self, item: Item) -> ExpertInputs | Outcome:
        number, name = item.number, item.input.name
        current = fingerprint(item.input)  # before reading, so that a file changed meanwhile is read again
        try:
            inputs = item.input.load()
            keys = inputs.keys
        except UnavailableError as error:
            return Outcome(number, name, "unavailable", _one_line(str(error)))
        except UserError as error:
            return Outcome(number, name, "unreadable", _one_line(str(error)))
        except Exception as error:  # one bad file must not end a run over a hundred thousand
            return Outcome(number, name, "unreadable", _one_line(f"{type(error).__name__}: {error}"))
        if not self._claim(number, keys):
            return _with_key(Outcome(number, name, "skipped", notes=inputs.notes), inputs, current)
        if self._job.dry_run:
            return Outcome(number, name, "planned", notes=inputs.notes)
        self._fingerprints[number] = current
        return inputs

    def _built(self) -> Expert:
        if self._expert is None:
            self._notify("building")
            weights = load_weights(self._job.descriptor, self._job.weights)
            if weights.sha256 != self._job.weights_sha256:
                raise UserError(f"{self._job.weights}: the model files changed during the run; start again")
            self._expert = create_expert(self._job.descriptor, weights)
            self._notify("built")
        return self._expert

    def _run_batch(self, expert: Any, inputs: list[ExpertInputs]) -> list[Expert] | None:
        """Runs a batch; returns one stand-in expert per answer, or None if the batch failed."""
        try:
            answers = expert.run_batch([one.data for one in inputs], self._job.args)
        except Exception:  # the failing input raises again when the inputs run one by one
            answers = None
        if answers is None or len(answers) != len(inputs):
            free_memory()
            return None
        return [KnownAnswer(answer) for answer in answers]

    def _annotate(self, expert: Expert, item: Item, inputs: ExpertInputs) -> Outcome:
        job = self._job
        annotation = annotate_one(expert, job.descriptor, inputs, job.args, weights_sha256=job.weights_sha256)
        if annotation.status == "failed" and "CUDA error" in annotation.reason:
            raise BrokenDeviceError(annotation.reason)
        status = "annotated" if annotation.status == "ok" else "failed"
        outcome = Outcome(
            item.number, item.input.name, status, annotation.reason, inputs.notes, annotation.to_bytes()
        )
        return _with_key(outcome, inputs, self._fingerprints.pop(item.number))


def _with_key(outcome: Outcome, inputs: ExpertInputs, fingerprint: bytes | None) -> Outcome:
    if outcome.notes or fingerprint is None:
        return outcome
    return dataclasses.replace(outcome, key=inputs_key(inputs.keys), fingerprint=fingerprint)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_REASON] or "no reason given"


def _exit_with_owner(life: int) -> None:
    """Ends this process when the owner's end of the pipe `life` closes, whatever ended the owner."""

    def wait() -> None:
        os.read(life, 1)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def serve(connection: Connection) -> None:
    """Serves the owner until it hangs up; `worker_process` documents the messages."""
    job = connection.recv()

    def claim(number: int, keys: Keys) -> bool:
        connection.send(("claim", number, keys))
        return connection.recv()

    worker = Worker(job, claim, lambda event: connection.send((event,)))
    while True:
        items, smallest = connection.recv()
        try:
            for outcome in worker.run(items, smallest=smallest):
                connection.send(("outcome", outcome))
        except UserError as error:
            connection.send(("fatal", error.exit_code, str(error)))
        except BrokenDeviceError as error:
            connection.send(("broken", str(error)))
            os._exit(1)
        connection.send(("end",))


def _run_forked(connection: Connection, life: int) -> NoReturn:
    os.setsid()  # a new process group: the owner kills it together with its children
    _exit_with_owner(life)
    try:
        serve(connection)
    except (EOFError, ConnectionError):
        os._exit(0)
    except BaseException:
        logger.exception("the worker process failed")
    finally:
        os._exit(1)


def main() -> None:
    """Fork server: forks one worker after the other, so that none has to load the libraries again.

    The command-line arguments are two file descriptors. The first is a socket that receives the sockets of
    workers, and returns the process id and exit code of each (8 bytes, signed, big-endian). The second is a
    pipe that closes when the owner ends.
    """
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the owner's to handle
    use_one_line_notes()
    control, life = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            _run_forked(Connection(descriptors[0]), life)
        os.close(descriptors[0])
        try:
            control.sendall(pid.to_bytes(8, "big"))
            _, status = os.waitpid(pid, 0)
            control.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
        except ConnectionError:
            return
