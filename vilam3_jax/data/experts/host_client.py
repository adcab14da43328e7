"""Client of the expert host: a child process that may run in another virtual environment.

A frame is a 4-byte big-endian length and a msgpack map. A request is {id, expert, args, inputs}, where an
input is {role, volume} or {role, image_bytes} and a volume is {path, series, modality}. A response is
{id, annotation | error}. A host that crashes, hangs or answers garbage yields a failed annotation, and the
next request starts a new host.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import struct
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any, Self, cast

import msgpack

from vilam3_jax.data import child_process
from vilam3_jax.data.experts.record import Annotation, failed
from vilam3_jax.data.volumes import VolumeSource
from vilam3_jax.errors import UserError

Message = dict[str, Any]

MAX_FRAME_BYTES = 256 << 20
DEFAULT_COMMAND = ("vilam3-experts", "host")
_STDERR_TAIL = 300  # bytes


class FrameError(Exception):
    """The stream does not contain a valid frame."""


def write_frame(sink: IO[bytes], message: Message) -> None:
    """Sends a message; raises `FrameError` above `MAX_FRAME_BYTES`, `OSError` if the reader is gone."""
    body = cast(bytes, msgpack.packb(message))
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"message of {len(body)} bytes, the limit is {MAX_FRAME_BYTES}")
    sink.write(struct.pack(">I", len(body)) + body)
    sink.flush()


def read_frame(source: IO[bytes]) -> Message | None:
    """Reads one message; None at the end of the stream.

    Raises `FrameError` for a frame that is too large, truncated, or not a msgpack map with text keys.
    """
    head = source.read(4)
    if not head:
        return None
    if len(head) < 4:
        raise FrameError("frame cut short")
    (size,) = struct.unpack(">I", head)
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"frame of {size} bytes, the limit is {MAX_FRAME_BYTES}")
    body = source.read(size)
    if len(body) < size:
        raise FrameError("frame cut short")
    try:
        message = msgpack.unpackb(body, raw=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise FrameError(f"frame is not msgpack ({error})") from error
    if not isinstance(message, dict) or not all(isinstance(k, str) for k in message):
        raise FrameError("frame is not a map with text keys")
    return message


class FrameProcess:
    """A child process that answers frames, one at a time; a context manager. Subclasses start it."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._file: IO[bytes] | None = None  # shared with the process, and closed after it
        self._ids = itertools.count()
        self._lock = threading.Lock()

    def _receive(self, request: Message | None, seconds: float) -> tuple[Message | None, bool]:
        """Sends `request`, if any, and reads a frame; None if the process ended, and True if it was late.

        A late process is killed. Raises `FrameError` or `OSError` for anything but a frame.
        """
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        answer = None
        with child_process.killed_after(process, seconds) as timed_out:
            try:
                if request is not None:
                    write_frame(process.stdin, request)
                answer = read_frame(process.stdout)
            except BrokenPipeError:
                pass
            except (OSError, FrameError):
                if not timed_out.is_set():
                    raise
        return answer, timed_out.is_set()

    def _stop(self) -> None:
        if self._process is not None:
            child_process.kill(self._process)
            self._process = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ExpertHost(FrameProcess):
    """Starts the host at the first request, and sends one request at a time; a context manager."""

    def __init__(
        self,
        command: Sequence[str] = DEFAULT_COMMAND,
        *,
        weights: str | os.PathLike[str] | None = None,
        timeout: float = 300.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Prepares a host without starting it.

        Args:
          command: command line of the host, such as the `vilam3-experts` of another virtual environment.
          weights: folder of the model files, passed as `--weights`.
          timeout: seconds for one answer, including loading the expert; the host is killed after that.
          environment: environment variables of the host, instead of those of this process.
        """
        super().__init__(timeout)
        self._command = [*command, *(("--weights", os.fspath(weights)) if weights is not None else ())]
        self._environment = environment

    def ask(
        self,
        expert: str,
        args: str = "",
        *,
        input_key: str,
        inputs: Sequence[tuple[str, VolumeSource | bytes]],
    ) -> Annotation:
        """Runs an expert on one input, or on several that form one case.

        Args:
          expert, args: name and arguments of the call.
          input_key: `content_keys.inputs_key` of the inputs, which the answer must have.
          inputs: (role, source) pairs in the order of the expert's roles. A source is a local file or DICOM
            folder that the host can read, or an encoded image. The role of a single input is "".

        Returns:
          The annotation; a failed one with the reason if the host gave none.
        """
        sent = [
            {"role": role, "image_bytes": source}
            if isinstance(source, bytes)
            else {"role": role, "volume": dataclasses.asdict(source)}
            for role, source in inputs
        ]
        request: Message = {"id": next(self._ids), "expert": expert, "args": args, "inputs": sent}
        with self._lock:
            try:
                response = self._exchange(request)
            except (FrameError, OSError) as error:
                reason = f"expert host: {error}" if isinstance(error, FrameError) else self._crash(error)
                self._stop()
                return failed(input_key, expert, args, reason)
        if not isinstance(response.get("annotation"), bytes):
            return failed(input_key, expert, args, str(response.get("error")))
        try:
            annotation = Annotation.from_bytes(response["annotation"])
        except UserError as error:
            return failed(input_key, expert, args, f"expert host: {error}")
        if annotation.key != (input_key, expert, args):
            return failed(input_key, expert, args, "expert host: the answer is about another input")
        return annotation

    def _exchange(self, request: Message) -> Message:
        if self._process is None or self._process.poll() is not None:
            self._start()
        response, late = self._receive(request, self._timeout)
        if late:
            raise FrameError(f"no answer within {self._timeout:g} s")
        if response is None:
            raise OSError("it ended without an answer")
        if response.get("id") != request["id"]:
            raise FrameError(f"answer out of order ({response.get('error')})")
        return response

    def _start(self) -> None:
        self._stop()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by _stop
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, stderr=self._file, env=self._environment
        )

    def _crash(self, error: OSError) -> str:
        """Describes a crash: exit code and last line of stderr."""
        if self._process is None or self._file is None:
            return f"expert host does not start ({error}); install vilam3-experts or give its path"
        try:
            code: int | None = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, self._file.tell() - _STDERR_TAIL))
        last = self._file.read().decode(errors="replace").strip().splitlines()[-1:]
        return f"expert host crashed (exit code {code}): {' '.join(last) or error}"
