"""Writes the outcomes of workers: records to the store, calls to the audit log."""

from __future__ import annotations

import contextlib
import threading
import time

from vilam3_experts.audit import AuditLog
from vilam3_experts.engine.job import Job, Outcome
from vilam3_experts.engine.key_cache import KeyCacheWriter
from vilam3_experts.engine.worker import Keys
from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import AnnotationWriter
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

COMMIT_RECORDS = 256
COMMIT_SECONDS = 30.0


class Committer(contextlib.AbstractContextManager):
    """The writer of one process, shared by its threads.

    A record is on disk at most `COMMIT_SECONDS` after it was written, even if no other record follows.
    """

    def __init__(self, job: Job) -> None:
        """Opens the store and the audit log; a dry run creates neither.

        Raises `UserError` if a folder cannot be written or an index is damaged.
        """
        self._job = job
        self._lock = threading.Lock()
        self._claimed: dict[str, int] = {}
        self._oldest: float | None = None
        self._error: UserError | None = None
        self._writer = None
        if not job.dry_run or paths.as_path(job.out).is_dir():
            self._writer = AnnotationWriter(
                job.out, records_per_shard=COMMIT_RECORDS, seconds_per_shard=COMMIT_SECONDS
            )
        self._key_cache = KeyCacheWriter(job.out)
        self._audit = None if job.audit is None or job.dry_run else AuditLog(job.audit)
        self._closed = threading.Event()
        threading.Thread(target=self._flush_periodically, daemon=True).start()

    def claim(self, number: int, keys: Keys) -> bool:
        """Whether item `number` must run: it is not stored, and no other item with the same keys is running.

        An item whose process died may claim again.
        """
        key = inputs_key(keys)
        with self._lock:
            status = self._writer and self._writer.status(key, self._job.descriptor.name, self._job.args)
            return not self._job.is_done(status) and self._claimed.setdefault(key, number) == number

    def write(self, outcome: Outcome) -> None:
        """Stores the record of an outcome if it has one, logs the call, and caches the key of the input.

        Raises `UserError` if the store or the log cannot be written, now or in a flush since the last call.
        """
        if self._writer is None or self._job.dry_run:
            return
        if outcome.fingerprint:
            with self._lock:
                self._key_cache.add(outcome.fingerprint, outcome.key)
        if outcome.record is None:
            return
        annotation = Annotation.from_bytes(outcome.record)
        with self._lock:
            self._raise_flush_error()
            if self._audit is not None:
                try:
                    self._audit.append(annotation)
                except ValueError as error:
                    raise UserError(f"{self._job.audit}: {error}; leave out --audit") from error
            if self._oldest is None:
                self._oldest = time.monotonic()
            if self._job.calibration is not None and annotation.status == "ok":
                annotation = self._job.calibration.apply(annotation)
            self._writer.write(annotation)
            self._claimed.pop(annotation.input_key, None)

    def flush(self) -> None:
        """Returns when everything written is on disk; raises as `write`."""
        with self._lock:
            self._raise_flush_error()
            self._flush()

    def close(self) -> None:
        """Flushes and closes; raises as `write`."""
        self._closed.set()
        with self._lock:
            try:
                self._flush()
            finally:
                if self._audit is not None:
                    self._audit.close()

    def __exit__(self, *_: object) -> None:
        self.close()  # also after an error: every pending record is complete

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()
            self._key_cache.flush()
        if self._audit is not None:
            self._audit.sync()
        self._oldest = None

    def _flush_periodically(self) -> None:
        while not self._closed.wait(1.0):
            with self._lock:
                if self._oldest is None or time.monotonic() - self._oldest < COMMIT_SECONDS:
                    continue
                try:
                    self._flush()
                except UserError as error:
                    self._error = error

    def _raise_flush_error(self) -> None:
        if self._error is not None:
            raise self._error
