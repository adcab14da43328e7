"""Decodes inputs and calls the expert: in the process of its owner, or as a child of it.

A child talks through a socket of its owner, see `child`; it ends when the owner does.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from vilam3_experts.base import Expert, ExpertFailure, ExpertInputs, Output, annotate_one, is_refused
from vilam3_experts.descriptors import Descriptor
from vilam3_experts.engine.known import fingerprint
from vilam3_experts.engine.memory import Shrinking, release
from vilam3_experts.engine.work import Item, Outcome, Work
from vilam3_experts.weights import Weights, load_weights
from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.errors import UnavailableError, UserError, use_one_line_notes

Keys = tuple[tuple[str, str], ...]
"""(role, content key) of each input of a call."""

Claim = Callable[[int, Keys], bool]
"""Asks the owner whether the item with this number and these keys is still to be run."""

_MAX_REASON = 500


class BrokenDeviceError(Exception):
    """The device is of no more use to this process; a fresh one may go on."""


def create_expert(descriptor: Descriptor, weights: Weights) -> Expert:
    """Builds an expert.

    Raises:
      UserError: a library is missing or the weights do not load.
    """
    try:
        return descriptor.create(weights)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{descriptor.name} cannot start ({error}); install what it needs") from error
    except Exception as error:
        raise UserError(f"{descriptor.name} cannot start ({type(error).__name__}: {error})") from error


class Worker:
    """Runs one expert, built when the first input needs it: a run with nothing to do loads no network."""

    def __init__(self, work: Work, claim: Claim, tell: Callable[[str], object] = lambda event: None) -> None:
        """Makes a worker.

        Args:
          work: the run.
          claim: see `Claim`.
          tell: called with 'building' and 'built' around the construction of the expert.
        """
        self._work, self._claim, self._tell = work, claim, tell
        self._expert: Expert | None = None
        self._marks: dict[int, bytes | None] = {}

    def run(self, items: Sequence[Item], *, smallest: bool = False) -> Iterator[Outcome]:
        """Yields one outcome for each item, as soon as it is known.

        Args:
          items: one, or as many as the expert is to be given at once.
          smallest: use the expert's smallest form.

        Raises:
          UserError: the expert cannot be built.
          BrokenDeviceError: see there.
        """
        opened: list[tuple[Item, ExpertInputs]] = []
        for item in items:
            found = self._open(item)
            if isinstance(found, Outcome):
                yield found
            else:
                opened.append((item, found))
        refused = [is_refused(self._work.descriptor, inputs) for _, inputs in opened]
        for (item, inputs), no in zip(opened, refused, strict=True):
            if no:
                yield self._annotate(_Answered(ExpertFailure("not run")), item, inputs)
        opened = [one for one, no in zip(opened, refused, strict=True) if not no]
        if not opened:
            return
        expert = self._built()
        given: Sequence[Expert] = [Shrinking(expert, smallest=smallest)] * len(opened)
        if len(opened) > 1 and hasattr(expert, "run_batch"):
            given = self._answered(expert, [inputs for _, inputs in opened]) or given
        for (item, inputs), one in zip(opened, given, strict=True):
            yield self._annotate(one, item, inputs)

    def _open(self, item: Item) -> ExpertInputs | Outcome:
        number, name = item.number, item.input.name
        mark = fingerprint(item.input)  # before it is read: what is written meanwhile is read again
        try:
            inputs = item.input.load()
            keys = inputs.keys
        except UnavailableError as error:
            return Outcome(number, name, "unavailable", _line(str(error)))
        except UserError as error:
            return Outcome(number, name, "unreadable", _line(str(error)))
        except Exception as error:  # one bad file must not end a run over a hundred thousand
            return Outcome(number, name, "unreadable", _line(f"{type(error).__name__}: {error}"))
        if not self._claim(number, keys):
            return _marked(Outcome(number, name, "skipped", notes=inputs.notes), inputs, mark)
        if self._work.dry_run:
            return Outcome(number, name, "planned", notes=inputs.notes)
        self._marks[number] = mark
        return inputs

    def _built(self) -> Expert:
        if self._expert is None:
            self._tell("building")
            weights = load_weights(self._work.descriptor, self._work.weights)
            if weights.sha256 != self._work.weights_sha256:
                raise UserError(f"{self._work.weights}: the model files changed during the run; start again")
            self._expert = create_expert(self._work.descriptor, weights)
            self._tell("built")
        return self._expert

    def _answered(self, expert: Any, inputs: list[ExpertInputs]) -> list[Expert] | None:
        """The answers to a batch, each as an expert that knows it; None if the batch failed."""
        try:
            answers = expert.run_batch([one.data for one in inputs], self._work.args)
        except Exception:  # whatever it is, it comes again where the input is run alone
            answers = None
        if answers is None or len(answers) != len(inputs):
            release()
            return None
        return [_Answered(answer) for answer in answers]

    def _annotate(self, expert: Expert, item: Item, inputs: ExpertInputs) -> Outcome:
        work = self._work
        annotation = annotate_one(
            expert, work.descriptor, inputs, work.args, weights_sha256=work.weights_sha256
        )
        if annotation.status == "failed" and "CUDA error" in annotation.reason:
            raise BrokenDeviceError(annotation.reason)
        status = "annotated" if annotation.status == "ok" else "failed"
        outcome = Outcome(
            item.number, item.input.name, status, annotation.reason, inputs.notes, annotation.to_bytes()
        )
        return _marked(outcome, inputs, self._marks.pop(item.number))


@dataclasses.dataclass(frozen=True)
class _Answered:
    """Stands for the expert when its answer to one input of a batch becomes a record."""

    answer: Output | ExpertFailure

    def run(self, data: Any, args: str) -> Output:
        del data, args
        if isinstance(self.answer, ExpertFailure):
            raise self.answer
        return self.answer


def _marked(outcome: Outcome, inputs: ExpertInputs, mark: bytes | None) -> Outcome:
    if outcome.notes or mark is None:
        return outcome
    return dataclasses.replace(outcome, key=inputs_key(inputs.keys), mark=mark)


def _line(text: str) -> str:
    return " ".join(text.split())[:_MAX_REASON] or "no reason given"


def _end_with(life: int) -> None:
    """Ends this process when the owner's end of the pipe `life` is closed, however the owner ended."""

    def wait() -> None:
        os.read(life, 1)
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def serve(connection: Connection) -> None:
    """Answers the owner until it hangs up, see `child.Child`."""
    work = connection.recv()

    def claim(number: int, keys: Keys) -> bool:
        connection.send(("claim", number, keys))
        return connection.recv()

    worker = Worker(work, claim, lambda event: connection.send((event,)))
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


def _forked(connection: Connection, life: int) -> NoReturn:
    os.setsid()  # a group of its own, so that what it starts can be ended with it
    _end_with(life)
    try:
        serve(connection)
    except (EOFError, ConnectionError):
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def main() -> None:
    """Forks workers for an owner, one after the other, so that they need not load libraries again.

    The arguments are two file descriptors: a socket, through which come the sockets of workers, and go the
    process id and the exit code of each (8 bytes, signed, big-endian); and a pipe that is closed when the
    owner ends.
    """
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the owner says when to end
    use_one_line_notes()
    control, life = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            _forked(Connection(descriptors[0]), life)
        os.close(descriptors[0])
        try:
            control.sendall(pid.to_bytes(8, "big"))
            _, status = os.waitpid(pid, 0)
            control.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
        except ConnectionError:
            return
