"""The audit log of a server: every question, what the model and the experts did, and how it ended.

The log is a file of JSON lines, to which the server only appends. A request has a line `asked`, written
before the model reads anything, and then one of `answered`, `failed` and `cancelled`. A line is on the disk
(fsync) before the client gets what it is about: a server that cannot write its log refuses questions (503).

Every line is appended with one write to the file of that name, so logrotate may rename it at any time, and
several servers may share it. A line that a crash cut short is followed by a line end.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import stat
import threading
import time
from typing import Any

from vilam3_jax.data.experts.grammar import Call
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.inference.transcript import call_values, iso
from vilam3_jax.runtime import paths
from vilam3_jax.serving.answers import Answer
from vilam3_jax.serving.errors import as_api_error
from vilam3_jax.serving.inputs import Ask

SCHEMA_VERSION = 1
_KEY_DIGITS = 16  # of the hash of an API key
_LOG = logging.getLogger(__name__)


class AuditLog:
    """Appends lines to a file; thread-safe."""

    def __init__(self, path: paths.PathLike, *, content: bool = False):
        """Opens or creates the file, for this user alone.

        Args:
          path: a local file.
          content: whether lines hold texts: questions, answers, messages. They may identify patients.

        Raises:
          UserError: not a local file, or one that cannot be written.
        """
        self.content = content
        self._path, self._lock = paths.as_path(path), threading.Lock()
        if "://" in str(self._path):
            raise UserError(f"{path}: object stores cannot append; give a local file for the audit log")
        try:
            self._write(b"")
        except OSError as error:
            raise paths.write_error(self._path, error) from error

    def append(self, event: str, request: str, **values: Any) -> None:
        """Returns when the line is on the disk; raises `UnavailableError` if it cannot be written."""
        head = {
            "schema_version": SCHEMA_VERSION,
            "time": iso(time.time()),
            "event": event,
            "request": request,
        }
        line = json.dumps({**head, **values}, allow_nan=False) + "\n"
        with self._lock:
            try:
                self._write(line.encode())
            except OSError as error:
                _LOG.error("the audit log cannot be written: %s", error.strerror)
                raise UnavailableError(
                    "the audit log cannot be written, so nothing is answered; tell who runs the server"
                ) from error

    def _write(self, line: bytes) -> None:
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{self._path}: is no file; give another path for the audit log")
            if found.st_size and os.pread(file, 1, found.st_size - 1) != b"\n":
                line = b"\n" + line
            while line:
                line = line[os.write(file, line) :]
            os.fsync(file)
        finally:
            os.close(file)


class Trail:
    """The lines of one request; without a log, nothing is written."""

    def __init__(self, log: AuditLog | None, request: str, owner: str, model: str):
        """`request` is its id, `owner` the hash of the API key or ''."""
        self._log, self._request = log, request
        self._who = {"key": owner[:_KEY_DIGITS], "model": model}
        self._began = time.monotonic()
        self._ended = False

    async def asked(self, ask: Ask) -> None:
        """Writes what is asked; raises as `AuditLog.append`."""
        values: dict[str, Any] = {
            "messages": len(ask.said),
            "characters": sum(len(one.text) for one in ask.said),
            "images": sum(len(one.images) for one in ask.said),
            "experts": ask.options.experts,
        }
        if self._log is not None and self._log.content:
            values["said"] = [{"role": one.role, "text": one.text} for one in ask.said]
        await self._append("asked", **values)

    async def answered(self, answer: Answer) -> None:
        """Writes the dialogue; raises as `AuditLog.append`."""
        if self._log is None:
            return
        content, transcript = self._log.content, answer.reply.transcript
        values = await asyncio.to_thread(transcript.to_dict, content=content)
        usage = {"prompt_tokens": answer.usage.prompt, "completion_tokens": answer.usage.completion}
        await self._append("answered", usage=usage, transcript=values)
        self._ended = True

    async def annotated(self, annotation: Annotation) -> None:
        """Writes the result of a call that a client made; raises as `AuditLog.append`."""
        if self._log is None:
            return
        values = await asyncio.to_thread(call_values, annotation, content=self._log.content)
        await self._append("answered", call=values)
        self._ended = True

    async def called(self, call: Call) -> None:
        """Writes which of the listed experts a client calls; raises as `AuditLog.append`."""
        await self._append("asked", expert=call.expert, args=call.args)

    def ended(self, error: BaseException) -> None:
        """Writes, soon, that the request failed or was cancelled; never raises."""
        if self._log is None or self._ended:
            return
        self._ended = True
        log, seconds = self._log, round(time.monotonic() - self._began, 3)
        values: dict[str, Any] = {**self._who, "seconds": seconds}
        event = "cancelled"
        if not isinstance(error, GeneratorExit | asyncio.CancelledError):
            shown, event = as_api_error(error), "failed"
            values["code"] = shown.code
            if log.content:
                values["message"] = str(shown)

        def write() -> None:
            with contextlib.suppress(UnavailableError):  # the server's log has it, the client its own error
                log.append(event, self._request, **values)

        # A request that is being cancelled cannot wait.
        asyncio.get_running_loop().run_in_executor(None, write)

    async def _append(self, event: str, **values: Any) -> None:
        if self._log is not None:
            seconds = round(time.monotonic() - self._began, 3)
            await asyncio.to_thread(
                self._log.append, event, self._request, **self._who, seconds=seconds, **values
            )
