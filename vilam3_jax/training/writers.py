"""Writers of a run's figures: JSON lines always; TensorBoard, Weights & Biases and MLflow by config.

A resumed run repeats the steps after its checkpoint, but no writer shows a step twice: JSON lines and
TensorBoard drop what came after the checkpoint, the two services keep what they received first.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import importlib.util
import io
import json
import math
import os
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths
from vilam3_jax.runtime.settings import flatten
from vilam3_jax.training.run_config import RunConfig
from vilam3_jax.training.telemetry_config import TelemetryConfig

METRICS_FILE = "metrics.jsonl"
# First start of the run, its ids at the services, and what was sent to them.
RECORD_FILE = "telemetry.json"

# Name → the package that it needs.
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
_MLFLOW_PARAMS = 100  # most that one request may carry
_MLFLOW_CHARACTERS = 500  # of a parameter
_MLFLOW_UNDER_WAY = 64  # requests without an answer
_REWRITE_SECONDS = 60.0  # a store allows a file to be written once a second

_RECORD_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Sent:
    """What was sent to the services: all figures before `step`, and those of `keys` at `step`."""

    step: int = -1
    keys: frozenset[str] = frozenset()

    def has(self, step: int, key: str) -> bool:
        """Whether a figure was sent."""
        return step < self.step or (step == self.step and key in self.keys)

    @classmethod
    def of(cls, record: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> Sent:
        """Combines the record of the last start with the lines written since."""
        known = cls(record["sent"]["step"], frozenset(record["sent"]["keys"])) if "sent" in record else cls()
        last = max((row["step"] for row in before), default=-1)
        if last < known.step:
            return known
        keys = frozenset(key for row in before if row["step"] == last for key in row)
        return cls(last, keys | (known.keys if last == known.step else frozenset()))


class Writer(Protocol):
    """Receives the figures of one step after another."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """`step` counts finished optimizer steps; it may be repeated with other keys."""
        ...

    def flush(self) -> None:
        """Called before a checkpoint: a run resumed from it does not rewrite earlier figures."""
        ...

    def close(self) -> None:
        """Sends what is left."""
        ...


def check(telemetry: TelemetryConfig) -> None:
    """Checks that the packages of all writers are installed.

    Raises:
      UserError: a package is not installed.
    """
    for name in telemetry.writers:
        package = _PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"config telemetry.writers names {name!r}, but the package {package} is not installed; "
                f"pip install -e '.[{name}]', or leave {name!r} out"
            )


def open_writers(config: RunConfig, workdir: paths.PathLike, start_step: int, started: float) -> list[Writer]:
    """Opens JSON lines and the writers of `config.telemetry`.

    Args:
      config: the run's config.
      workdir: folder of the run.
      start_step: step of the checkpoint that the run resumes from; 0 for a new run.
      started: when this start of the run began, in seconds since 1970.

    Raises:
      UserError: a writer cannot be opened.
    """
    before = read_lines(workdir)
    record = read_record(workdir) or {"first_start": started}
    writers: list[Writer] = [JsonLines(workdir, METRICS_FILE, start_step)]
    # JSON lines drop what came after the checkpoint; the record of what was sent must survive the next start.
    sent = Sent.of(record, before)
    record["sent"] = {"step": sent.step, "keys": sorted(sent.keys)}
    for name in config.telemetry.writers:
        if name == "tensorboard":
            writers.append(TensorBoard(config, workdir, start_step))
        elif name == "wandb":
            writers.append(Wandb(config, workdir, record, sent))
        else:
            writers.append(Mlflow(config, workdir, record, sent))
    paths.write_text_atomic(paths.as_path(workdir) / RECORD_FILE, json.dumps(record))
    return writers


def read_record(workdir: paths.PathLike) -> dict[str, Any]:
    """Reads `telemetry.json`.

    Returns:
      `first_start`: seconds since 1970 when the run was started first; `wandb`, `mlflow`: its ids there;
      `sent`: what they had been sent when it was started last. Nothing of a new run.

    Raises:
      UserError: the file is damaged.
    """
    path = paths.as_path(workdir) / RECORD_FILE
    if not path.exists():
        return {}
    try:
        return dict(json.loads(paths.read_bytes(path, _RECORD_BYTES)))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not readable ({error}); remove it, and W&B and MLflow get the run as a new one"
        ) from error


class JsonLines:
    """One JSON object a line; a resumed run first drops the lines after its checkpoint.

    Object stores cannot append (gcsfs takes mode 'a' for 'w'), and show a file when it is closed. There the
    whole file is written anew, at `flush`, `close`, and once a minute.
    """

    def __init__(self, workdir: paths.PathLike, name: str, start_step: int) -> None:
        self._path = paths.as_path(workdir) / name
        kept = [row for row in read_lines(workdir, name) if row["step"] <= start_step] if start_step else []
        text = "".join(json_text(row) + "\n" for row in kept)
        paths.write_text_atomic(self._path, text)
        self._remote = "://" in os.fspath(self._path)
        self._file: Any = io.StringIO() if self._remote else self._path.open("a")
        if self._remote:
            self._file.write(text)
        self._written = time.monotonic()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line."""
        self._file.write(json_text({"step": step, **values}) + "\n")
        if not self._remote or time.monotonic() > self._written + _REWRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Shows what was written.

        Raises:
          UserError: the disk is full or cannot be written.
          UnavailableError: the disk or the network fails.
        """
        try:
            self._file.flush()
            if self._remote:
                self._path.write_text(self._file.getvalue())
                self._written = time.monotonic()
        except OSError as error:
            raise paths.write_error(self._path, error) from error

    def close(self) -> None:
        """Closes the file."""
        try:
            self.flush()
        finally:
            with contextlib.suppress(OSError):  # the same, of the line that could not be written
                self._file.close()


def json_text(values: Mapping[str, Any], indent: int | None = None) -> str:
    """A JSON object; JSON has no NaN and no infinity, which become null."""
    lost = {key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    finite = {key: None if key in lost else value for key, value in values.items()}
    return json.dumps(finite, indent=indent, allow_nan=False)


def read_lines(workdir: paths.PathLike, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """Reads the lines written so far; a torn last line (the process was killed) is dropped.

    A figure that was not finite is None.
    """
    path = paths.as_path(workdir) / name
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class TensorBoard:
    """Event files in `<workdir>/tensorboard`; a resumed run tells TensorBoard to drop the later steps."""

    def __init__(self, config: RunConfig, workdir: paths.PathLike, start_step: int) -> None:
        import tensorboardX

        folder = paths.as_path(workdir) / "tensorboard"
        # Files are read in the order of their names, which begin with the second of their start.
        before = len(list(folder.iterdir())) if folder.exists() else 0
        suffix = f".{before:04d}"
        first = start_step + 1 if start_step else 0  # a new run measures before its first step
        purge = first if before else None
        self._writer = tensorboardX.SummaryWriter(
            os.fspath(folder), purge_step=purge, filename_suffix=suffix, flush_secs=30
        )
        if not start_step:
            self._writer.add_text("config", f"```\n{config.snapshot()}```", 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one scalar a key."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def flush(self) -> None:
        """Writes what is buffered."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is buffered."""
        self._writer.close()


class Wandb:
    """A run at Weights & Biases, or in `<workdir>/wandb`, to be sent later by `wandb sync`.

    What is sent at once passes through a temporary folder where the workdir is in an object store.
    """

    def __init__(
        self, config: RunConfig, workdir: paths.PathLike, record: dict[str, Any], sent: Sent
    ) -> None:
        import wandb

        run_id = record.setdefault("wandb", uuid.uuid4().hex[:12])
        self._scratch = tempfile.TemporaryDirectory(prefix="vilam3-wandb-")
        passing = "://" in os.fspath(workdir) and not config.telemetry.wandb_offline
        try:
            self._run = wandb.init(
                project=config.telemetry.project,
                name=config.name,
                id=run_id,
                resume="allow",
                mode="offline" if config.telemetry.wandb_offline else None,
                dir=self._scratch.name if passing else _local(workdir, "wandb"),
                config=config.to_dict(),
            )
        except (wandb.errors.Error, OSError) as error:
            raise UserError(
                f"config telemetry.writers: W&B refuses the run ({' '.join(str(error).split())}); "
                "`wandb login`, or set telemetry.wandb_offline=True"
            ) from error
        self._sent = sent

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends what was not sent before the restart."""
        if new := _unsent(self._sent, step, values):
            self._run.log(new, step=step)

    def flush(self) -> None:
        """Nothing: a process of its own sends, and outlives this one."""

    def close(self) -> None:
        """Waits until all is sent."""
        self._run.finish()
        self._scratch.cleanup()


class Mlflow:
    """A run of MLflow's experiment `telemetry.project`, at `MLFLOW_TRACKING_URI` or `<workdir>/mlflow.db`."""

    def __init__(
        self, config: RunConfig, workdir: paths.PathLike, record: dict[str, Any], sent: Sent
    ) -> None:
        import mlflow

        place = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{_local(workdir, 'mlflow')}/mlflow.db"
        self._metric, self._sent = mlflow.entities.Metric, sent
        self._under_way: collections.deque[Any] = collections.deque()
        try:
            self._client = mlflow.MlflowClient(place)
            if "mlflow" not in record:
                record["mlflow"] = self._new_run(config, mlflow.entities.Param)
            self._run_id = record["mlflow"]
            self._client.update_run(self._run_id, status="RUNNING")
        except (mlflow.MlflowException, OSError) as error:
            raise UserError(
                f"config telemetry.writers: MLflow at {place} refuses the run "
                f"({' '.join(str(error).split())[:300]}); set MLFLOW_TRACKING_URI"
            ) from error

    def _new_run(self, config: RunConfig, param: Any) -> str:
        project = config.telemetry.project
        experiment = self._client.get_experiment_by_name(project)
        number = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        run_id = self._client.create_run(number, run_name=config.name).info.run_id
        settings = [
            param(key, json.dumps(value)[:_MLFLOW_CHARACTERS])
            for key, value in sorted(flatten(config.to_dict()).items())
        ]
        for first in range(0, len(settings), _MLFLOW_PARAMS):
            self._client.log_batch(run_id, params=settings[first : first + _MLFLOW_PARAMS])
        return run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends, without waiting for an answer, what was not sent before the restart."""
        now = int(time.time() * 1000)
        new = _unsent(self._sent, step, values)
        metrics = [self._metric(key, value, now, step) for key, value in new.items()]
        if metrics:
            self._under_way.append(self._client.log_batch(self._run_id, metrics=metrics, synchronous=False))
            while len(self._under_way) > _MLFLOW_UNDER_WAY:
                self._under_way.popleft().wait()

    def flush(self) -> None:
        """Waits until all is sent."""
        while self._under_way:
            self._under_way.popleft().wait()

    def close(self) -> None:
        """Waits until all is sent."""
        self.flush()
        self._client.set_terminated(self._run_id)


def _unsent(sent: Sent, step: int, values: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if not sent.has(step, key)}


def _local(workdir: paths.PathLike, what: str) -> str:
    """The run's folder, for packages that know local files only.

    Raises:
      UserError: it is in an object store.
    """
    folder = os.fspath(paths.as_path(workdir))
    if "://" in folder:
        raise UserError(
            f"{folder}: {what} keeps files of its own beside the run, and only on a local disk; choose a "
            "local --workdir, or leave it out of telemetry.writers"
        )
    os.makedirs(folder, exist_ok=True)
    return folder


def write_all(writers: Sequence[Writer], step: int, values: Mapping[str, float]) -> None:
    """Writes one step's figures everywhere."""
    for writer in writers:
        writer.write(step, values)
