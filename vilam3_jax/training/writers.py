"""Writers of metrics: JSON lines always; TensorBoard, Weights & Biases and MLflow by config.

A resumed run repeats the steps after its checkpoint, but no writer shows a step twice: JSON lines and
TensorBoard drop the steps after the checkpoint, the two services keep what they received first.
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
from typing import TYPE_CHECKING, Any, Protocol

from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths
from vilam3_jax.runtime.settings import Section, flatten, setting

if TYPE_CHECKING:  # it has `TelemetryConfig` as a section
    from vilam3_jax.training.run_config import RunConfig

# Writer → the package that it needs.
WRITERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
METRICS_FILE = "metrics.jsonl"
# First start of the run, its ids at the services, and what was sent to them.
RECORD_FILE = "telemetry.json"

_MLFLOW_PARAMS = 100  # limit of a request
_MLFLOW_CHARACTERS = 500  # limit of a parameter
_MLFLOW_PENDING = 64  # requests without an answer
_REWRITE_SECONDS = 60.0  # object stores limit writes to one file to about one per second
_RECORD_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class TelemetryConfig(Section):
    """The section `telemetry`: where the metrics of a run go.

    Attributes:
      writers: of `WRITERS`, besides metrics.jsonl.
      project: project or experiment at the services.
      wandb_offline: write W&B runs to the run's folder.
      stall_seconds: time without a step after which all stacks are dumped; 0 for never.
      profile_steps: first and last step to trace, or empty.
    """

    key = "telemetry"
    writers: tuple[str, ...] = ()
    project: str = "vilam3_jax"
    wandb_offline: bool = False
    stall_seconds: float = setting(default=1800.0, at_least=0)
    profile_steps: tuple[int, ...] = ()

    def validate(self) -> None:
        """Checks writers and steps."""
        if unknown := sorted({str(name) for name in self.writers} - set(WRITERS)):
            raise UserError(
                f"config telemetry.writers names {', '.join(unknown)}; known are {', '.join(WRITERS)}"
            )
        steps = self.profile_steps
        whole = all(isinstance(step, int) for step in steps)
        if steps and not (whole and len(steps) == 2 and 1 <= steps[0] <= steps[1]):
            raise self.error(
                "profile_steps", "must be the first and the last step to trace, such as (10, 12)"
            )


@dataclasses.dataclass(frozen=True)
class Sent:
    """Metrics sent to the services: all before `step`, and `keys` at `step`."""

    step: int = -1
    keys: frozenset[str] = frozenset()

    def missing(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """The metrics of a step that were not sent."""
        sent = values.keys() if step < self.step else self.keys if step == self.step else ()
        return {key: value for key, value in values.items() if key not in sent}

    @classmethod
    def of(cls, record: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> Sent:
        """Combines the record of the last start and the lines written since."""
        known = cls(record["sent"]["step"], frozenset(record["sent"]["keys"])) if "sent" in record else cls()
        last = max((row["step"] for row in before), default=-1)
        if last < known.step:
            return known
        keys = frozenset(key for row in before if row["step"] == last for key in row)
        return cls(last, keys | (known.keys if last == known.step else frozenset()))


class Writer(Protocol):
    """Receives the metrics of one step after another; services skip what was sent before a restart."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes metrics of a step; a step may be repeated with other keys."""
        ...

    def flush(self) -> None:
        """Called before a checkpoint; a run resumed from it does not repeat earlier metrics."""
        ...

    def close(self) -> None:
        """Writes pending metrics."""
        ...


def check(telemetry: TelemetryConfig) -> None:
    """Checks that the packages of all writers are installed.

    Raises:
      UserError: a package is not installed.
    """
    for name in telemetry.writers:
        package = WRITERS[name]
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"config telemetry.writers names {name!r}, but the package {package} is not installed; "
                f"pip install -e '.[{name}]', or leave {name!r} out"
            )


def open_writers(config: RunConfig, workdir: paths.PathLike, start_step: int, started: float) -> list[Writer]:
    """Opens JSON lines and the writers of `config.telemetry`.

    Args:
      config: config of the run.
      workdir: folder of the run.
      start_step: step of the checkpoint that the run resumes from; 0 for a new run.
      started: time of this start, in seconds since 1970.

    Raises:
      UserError: a writer cannot be opened.
    """
    before = read_lines(workdir)
    record = read_record(workdir) or {"first_start": started}
    writers: list[Writer] = [JsonLines(workdir, METRICS_FILE, start_step)]
    # JSON lines drop the steps after the checkpoint, so what was sent is recorded for the next start.
    sent = Sent.of(record, before)
    record["sent"] = {"step": sent.step, "keys": sorted(sent.keys)}
    for name in config.telemetry.writers:
        if name == "tensorboard":
            writers.append(TensorBoard(config, workdir, start_step))
        else:
            writers.append({"wandb": Wandb, "mlflow": Mlflow}[name](config, workdir, record, sent))
    paths.write_text_atomic(paths.as_path(workdir) / RECORD_FILE, json.dumps(record))
    return writers


def read_record(workdir: paths.PathLike) -> dict[str, Any]:
    """Reads `telemetry.json`; empty for a new run.

    Returns:
      `first_start`: time of the first start, in seconds since 1970; `wandb`, `mlflow`: ids of the run at the
      services; `sent`: what they had received at the last start.

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
            f"{path}: not readable ({error}); remove it to start a new W&B or MLflow run"
        ) from error


class JsonLines:
    """One JSON object per line; a resumed run first drops the lines after its checkpoint.

    Object stores cannot append (gcsfs treats mode 'a' as 'w') and publish a file when it is closed. There the
    whole file is rewritten at `flush`, `close`, and once a minute.
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
        """Publishes the written lines.

        Raises:
          UserError: the disk is full or not writable.
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
            with contextlib.suppress(OSError):  # the error of `flush` again
                self._file.close()


def json_text(values: Mapping[str, Any], indent: int | None = None) -> str:
    """A JSON object; NaN and infinity become null."""
    lost = {key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)}
    finite = {key: None if key in lost else value for key, value in values.items()}
    return json.dumps(finite, indent=indent, allow_nan=False)


def read_lines(workdir: paths.PathLike, name: str = METRICS_FILE) -> list[dict[str, Any]]:
    """Reads the lines written so far, without a last line torn by a kill; values not finite are None."""
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
    """Event files in `<workdir>/tensorboard`; a resumed run makes TensorBoard drop the later steps."""

    def __init__(self, config: RunConfig, workdir: paths.PathLike, start_step: int) -> None:
        import tensorboardX

        folder = paths.as_path(workdir) / "tensorboard"
        # Files are read in order of their names, which begin with a time in seconds.
        before = len(list(folder.iterdir())) if folder.exists() else 0
        first = start_step + 1 if start_step else 0  # a new run evaluates before its first step
        purge = first if before else None
        self._writer = tensorboardX.SummaryWriter(
            os.fspath(folder), purge_step=purge, filename_suffix=f".{before:04d}", flush_secs=30
        )
        if not start_step:
            self._writer.add_text("config", f"```\n{config.snapshot()}```", 0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run at Weights & Biases, or in `<workdir>/wandb` for `wandb sync`.

    For a workdir in an object store, an online run uses a temporary folder.
    """

    def __init__(
        self, config: RunConfig, workdir: paths.PathLike, record: dict[str, Any], sent: Sent
    ) -> None:
        import wandb

        run_id = record.setdefault("wandb", uuid.uuid4().hex[:12])
        self._scratch = tempfile.TemporaryDirectory(prefix="vilam3-wandb-")
        temporary = "://" in os.fspath(workdir) and not config.telemetry.wandb_offline
        try:
            self._run = wandb.init(
                project=config.telemetry.project,
                name=config.name,
                id=run_id,
                resume="allow",
                mode="offline" if config.telemetry.wandb_offline else None,
                dir=self._scratch.name if temporary else _local(workdir, "wandb"),
                config=config.to_dict(),
            )
        except (wandb.errors.Error, OSError) as error:
            raise UserError(
                f"config telemetry.writers: W&B refuses the run ({' '.join(str(error).split())}); "
                "`wandb login`, or set telemetry.wandb_offline=True"
            ) from error
        self._sent = sent

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if new := self._sent.missing(step, values):
            self._run.log(new, step=step)

    def flush(self) -> None:
        pass  # a separate process sends, and outlives this one

    def close(self) -> None:
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
        self._pending: collections.deque[Any] = collections.deque()
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
        now, new = int(time.time() * 1000), self._sent.missing(step, values)
        metrics = [self._metric(key, value, now, step) for key, value in new.items()]
        if metrics:
            self._pending.append(self._client.log_batch(self._run_id, metrics=metrics, synchronous=False))
            while len(self._pending) > _MLFLOW_PENDING:
                self._pending.popleft().wait()

    def flush(self) -> None:
        while self._pending:
            self._pending.popleft().wait()

    def close(self) -> None:
        self.flush()
        self._client.set_terminated(self._run_id)


def _local(workdir: paths.PathLike, what: str) -> str:
    """The run's folder, for packages that need local files.

    Raises:
      UserError: it is in an object store.
    """
    folder = os.fspath(paths.as_path(workdir))
    if "://" in folder:
        raise UserError(
            f"{folder}: {what} needs a local folder for its files; choose a local --workdir, or remove it "
            "from telemetry.writers"
        )
    os.makedirs(folder, exist_ok=True)
    return folder


def write_all(writers: Sequence[Writer], step: int, values: Mapping[str, float]) -> None:
    """Writes metrics of a step to all writers."""
    for writer in writers:
        writer.write(step, values)
