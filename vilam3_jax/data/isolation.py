"""Decoding in a child process: a file that crashes, hangs or bloats a decoder costs one error message.

Decoders of medical formats are C code that processes untrusted input. `DecoderProcess` runs the readers of
this package in a child process with limits on time and memory, and converts every failure there to a
`UserError`. Requests and answers are `host_client` frames. Arrays pass through an anonymous in-memory file
shared by both processes; the parent copies it instead of mapping it, so the child cannot fault the parent.

This protects a long-running process (a chat, an expert host) from accidents. It is not a sandbox: the child
runs as the same user and can read all of that user's files.

Run this module as a program only through `DecoderProcess`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from vilam3_jax.data import images, volumes
from vilam3_jax.data.experts.host_client import FrameError, FrameProcess, Message, read_frame, write_frame
from vilam3_jax.data.images import LoadedImage
from vilam3_jax.data.limits import Limits
from vilam3_jax.data.volumes import Volume
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime.paths import PathLike, as_path

DEFAULT_SECONDS = 60.0
DEFAULT_MEMORY_BYTES = 8 << 30

_START_SECONDS = 60.0
_GRACE_SECONDS = 5.0  # after the parent's limit, the child assumes that its parent is gone and exits
_CHILD = (sys.executable, "-P", "-m", "vilam3_jax.data.isolation")
# No other variable is passed on, because variables may hold tokens and credentials.
_ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TMPDIR")
# Thread pools reserve memory per core, and files are decoded one at a time.
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
_MAX_OPEN_FILES = 64

_Result = TypeVar("_Result", Volume, LoadedImage)


class DecoderProcess(FrameProcess):
    """A child process that reads volumes and images, started at the first request and reused.

    After a crash, timeout or memory error, the next request starts a new process. Concurrent requests are
    processed one at a time. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        *,
        timeout: float = DEFAULT_SECONDS,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        command: Sequence[str] = _CHILD,
    ) -> None:
        """Configures the process without starting it.

        Args:
          timeout: seconds per file, after which the process is killed.
          memory_bytes: limit on allocations beyond the interpreter and its libraries, and on the size of the
            result. Enforced on Linux only.
          command: command line of the child.
        """
        super().__init__(timeout)
        self._memory_bytes = memory_bytes
        self._command = (*command,)

    def read_volume(self, path: PathLike, **keywords: Any) -> Volume:
        """`volumes.read_volume` in the child, with the same arguments, result and errors.

        Raises:
          UnavailableError: disk failure, or the process cannot be started.
          UserError: also if decoding takes too long, needs too much memory, or crashes; names the file. Paths
            of object stores are rejected, because the child has no credentials.
        """
        return self._decode(Volume, path, keywords)

    def load_image(self, path: PathLike, **keywords: Any) -> LoadedImage:
        """`images.load_image` in the child, with the same arguments and result; raises as `read_volume`."""
        return self._decode(LoadedImage, path, keywords)

    def _decode(self, kind: type[_Result], path: PathLike, keywords: dict[str, Any]) -> _Result:
        path = as_path(path)
        if "://" in str(path):
            raise UserError(
                f"{path}: a decoder process reads local files only; copy it to a local disk, or read it "
                "without a decoder process"
            )
        request: Message = {
            "id": next(self._ids),
            "kind": kind.__name__,
            "path": os.fspath(path),
            "seconds": self._timeout,
            "keywords": {
                key: dataclasses.asdict(value) if isinstance(value, Limits) else _without_numpy(value)
                for key, value in keywords.items()
            },
        }
        with self._lock:
            try:
                answer = self._exchange(request)
                if "error" not in answer:
                    return _unpack(kind, answer["result"], self._file)
            except _ChildError as error:
                self._stop()
                raise UserError(
                    f"{path}: {error}; the file is damaged or too large, export it again"
                ) from None
            except (FrameError, KeyError, TypeError, ValueError) as error:
                self._stop()
                raise UserError(
                    f"{path}: the decoder returned an invalid answer; the file is damaged, export it again"
                ) from error
            except OSError as error:
                self._stop()
                raise UnavailableError(
                    f"{path}: the decoder process does not start ({error}); check the installation and the "
                    "free memory"
                ) from error
        raise (UnavailableError if answer.get("unavailable") else UserError)(str(answer["error"]))

    def _exchange(self, request: Message) -> Message:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._start()
        answer = self._wait(request, self._timeout, f"decoding took more than {self._timeout:g} s")
        if answer.get("id") != request["id"]:
            raise FrameError("answer out of order")
        if "out_of_memory" in answer:
            raise _ChildError(f"decoding needs more than {self._memory_bytes / 2**30:.3g} GiB of memory")
        return answer

    def _start(self) -> None:
        self._file = _anonymous_file()
        number = self._file.fileno()
        self._process = subprocess.Popen(
            [*self._command, str(number), str(self._memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_child_environment(),
            pass_fds=(number,),
            start_new_session=True,  # Ctrl-C goes to the parent only
        )
        try:
            self._wait(None, _START_SECONDS, f"loading took more than {_START_SECONDS:g} s")
        except _ChildError as error:
            raise OSError(str(error)) from None

    def _wait(self, request: Message | None, seconds: float, too_late: str) -> Message:
        answer, late = self._receive(request, seconds)
        if late:
            raise _ChildError(too_late)
        if answer is None:
            assert self._process is not None  # it ended
            raise _ChildError(_exit_reason(self._process))
        return answer


class _ChildError(Exception):
    """A failure of the child, as part of a sentence."""


def _exit_reason(process: subprocess.Popen[bytes]) -> str:
    """How a process that closed its pipe ended."""
    try:
        code = process.wait(timeout=_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return "the decoder stopped answering"
    if code == -signal.SIGKILL:
        return "the decoder was killed (signal 9), most likely because memory ran out"
    if code < 0:
        return f"the decoder crashed (signal {-code})"
    return f"the decoder ended with exit code {code}"


def _child_environment() -> dict[str, str]:
    package = str(Path(__file__).parents[2])
    kept = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    search = [package, *filter(None, [kept.get("PYTHONPATH")])]
    return kept | _ONE_THREAD | {"PYTHONPATH": os.pathsep.join(search)}


def _anonymous_file() -> IO[bytes]:
    """An unnamed file for the arrays of one answer, in memory if the system supports it."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("decoded"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _pack(result: Volume | LoadedImage, store: IO[bytes]) -> Message:
    """Describes `result` as msgpack values, and writes its arrays to `store` one after the other."""
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    arrays = {key: value for key, value in fields.items() if isinstance(value, np.ndarray)}
    store.seek(0)
    for array in arrays.values():
        rest = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        while rest:
            rest = rest[store.write(rest) :]
    return {
        "arrays": [[key, array.dtype.str, array.shape] for key, array in arrays.items()],
        "fields": {key: _without_numpy(value) for key, value in fields.items() if key not in arrays},
    }


def _unpack(kind: type[_Result], message: Message, store: IO[bytes] | None) -> _Result:
    """The inverse of `_pack`; empties `store`. Raises `FrameError` or builtin errors for anything else."""
    assert store is not None
    left = os.fstat(store.fileno()).st_size
    store.seek(0)
    fields: dict[str, Any] = {key: _with_tuples(value) for key, value in message["fields"].items()}
    for key, code, shape in message["arrays"]:
        dtype = np.dtype(code)
        count = dtype.itemsize * int(np.prod([int(n) for n in shape], dtype=object))
        if dtype.kind not in "biuf" or min(shape, default=0) < 0 or count > left:
            raise FrameError(f"an array of {dtype} {shape} does not fit {left} bytes")
        left -= count
        array = np.empty(shape, dtype)
        rest = array.reshape(-1).view(np.uint8).data
        while rest:
            got = store.readinto(rest)  # type: ignore[attr-defined]
            if not got:
                raise FrameError("array cut short")
            rest = rest[got:]
        fields[key] = array
    store.truncate(0)
    return kind(**fields)


def _without_numpy(value: Any) -> Any:
    """Replaces NumPy scalars, which msgpack cannot write."""
    if isinstance(value, tuple):
        return tuple(_without_numpy(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def _with_tuples(value: Any) -> Any:
    """Restores tuples, which msgpack returns as lists."""
    return tuple(_with_tuples(item) for item in value) if isinstance(value, list) else value


def _answer(request: Message, store: IO[bytes]) -> Message:
    path = request["path"]
    keywords = {key: _with_tuples(value) for key, value in request["keywords"].items()}
    if "limits" in keywords:
        keywords["limits"] = Limits(**keywords["limits"])
    read = volumes.read_volume if request["kind"] == Volume.__name__ else images.load_image
    answer: Message = {"id": request["id"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of libraries may quote the file
        try:
            answer["result"] = _pack(read(path, **keywords), store)
        except MemoryError:
            answer["out_of_memory"] = True
        except UserError as error:
            answer |= {"error": str(error), "unavailable": isinstance(error, UnavailableError)}
        except Exception as error:
            # Omit the message, which may quote the file.
            reason = f"{type(error).__name__} in the reader"
            answer["error"] = f"{path}: cannot be decoded ({reason}); the file is damaged, export it again"
    return answer


def _limit_resources(memory_bytes: int) -> None:
    """Limits the memory, file size and open files of this process."""
    in_use = 0
    with contextlib.suppress(OSError):
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: in_use + memory_bytes,
        resource.RLIMIT_FSIZE: memory_bytes,
        resource.RLIMIT_NOFILE: _MAX_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        with contextlib.suppress(ValueError, OSError):  # a system without this limit, such as macOS
            resource.setrlimit(kind, (most, most))


def main(argv: Sequence[str]) -> int:
    """Answers requests on standard input, as the child, until the parent closes the pipe; returns 0.

    `argv`: file descriptor for arrays, and bytes of memory that decoding may allocate.
    """
    store_number, memory_bytes = (int(word) for word in argv)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Decoders print to standard output and error, and may quote the file.
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    _limit_resources(memory_bytes)
    with requests, answers, os.fdopen(store_number, "r+b", buffering=0) as store:
        write_frame(answers, {"ready": True})
        while (request := read_frame(requests)) is not None:
            signal.setitimer(signal.ITIMER_REAL, request["seconds"] + _GRACE_SECONDS)
            answer = _answer(request, store)
            signal.setitimer(signal.ITIMER_REAL, 0)
            write_frame(answers, answer)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
