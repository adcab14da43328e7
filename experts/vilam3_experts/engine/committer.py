"""Writes what workers say: records to the store, calls to the audit log."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from vilam3_experts.audit import AuditLog
from vilam3_experts.engine.known import KnownWriter
from vilam3_experts.engine.work import Outcome, Work
from vilam3_experts.engine.worker import Keys
from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import AnnotationWriter
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

COMMIT_RECORDS = 256
COMMIT_SECONDS = 30.0


class Committer:
    """The writer of one process; threads share it.

    A record is on the disk at most `COMMIT_SECONDS` after it was written, even if nothing follows it.
    """

    def __init__(self, work: Work) -> None:
        """Opens the store and the audit log; a dry run makes neither.

        Raises:
          UserError: a folder cannot be written, or an index is damaged.
        """
        self._work = work
        self._lock = threading.Lock()
        self._claimed: dict[str, int] = {}
        self._oldest: float | None = None
        self._error: UserError | None = None
        absent = work.dry_run and not paths.as_path(work.out).is_dir()
        self._writer = (
            None
            if absent
            else AnnotationWriter(
                work.out, records_per_shard=COMMIT_RECORDS, seconds_per_shard=COMMIT_SECONDS
            )
        )
        self._known = KnownWriter(work.out)
        self._audit = None if work.audit is None or work.dry_run else AuditLog(work.audit)
        self._ended = threading.Event()
        threading.Thread(target=self._flush_in_time, daemon=True).start()

    def claim(self, number: int, keys: Keys) -> bool:
        """Whether item `number` is to be run: not stored, and no copy of it is being run.

        The same item may claim again, after its process ended.
        """
        key = inputs_key(keys)
        with self._lock:
            stored = self._writer and self._writer.status(key, self._work.descriptor.name, self._work.args)
            if stored == "ok" or (stored == "failed" and not self._work.retry_failed):
                return False
            return self._claimed.setdefault(key, number) == number

    def write(self, outcome: Outcome) -> None:
        """Stores the record of an outcome, if it has one, logs the call, and remembers the key of the input.

        Raises:
          UserError: the store or the log cannot be written, now or since the last call.
        """
        if self._writer is None or self._work.dry_run:
            return
        if outcome.mark:
            with self._lock:
                self._known.add(outcome.mark, outcome.key)
        if outcome.record is None:
            return
        annotation = Annotation.from_bytes(outcome.record)
        with self._lock:
            self._raise_late_error()
            if self._audit is not None:
                try:
                    self._audit.append(annotation)
                except ValueError as error:
                    raise UserError(f"{self._work.audit}: {error}; leave out --audit") from error
            if self._oldest is None:
                self._oldest = time.monotonic()
            if self._work.calibration is not None and annotation.status == "ok":
                annotation = self._work.calibration.apply(annotation)
            self._writer.write(annotation)
            self._claimed.pop(annotation.input_key, None)

    def flush(self) -> None:
        """Returns when all that was written is on the disk.

        Raises:
          UserError: as `write`.
        """
        with self._lock:
            self._raise_late_error()
            self._flush()

    def close(self) -> None:
        """Writes what is left and ends.

        Raises:
          UserError: as `write`.
        """
        self._ended.set()
        with self._lock:
            try:
                self._flush()
            finally:
                if self._audit is not None:
                    self._audit.close()

    def __enter__(self) -> Committer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Also after an error: every pending record is complete by itself.
        self.close()

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()
            self._known.flush()
        if self._audit is not None:
            self._audit.sync()
        self._oldest = None

    def _flush_in_time(self) -> None:
        while not self._ended.wait(1.0):
            with self._lock:
                if self._oldest is None or time.monotonic() - self._oldest < COMMIT_SECONDS:
                    continue
                try:
                    self._flush()
                except UserError as error:
                    self._error = error

    def _raise_late_error(self) -> None:
        if self._error is not None:
            raise self._error
