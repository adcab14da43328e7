"""Metrics of a run, collected without blocking it.

The loop reports every step when it is dispatched. A separate thread waits for the device to finish the step,
takes the time and runs the logging hooks. The loop may thus run a few steps ahead, and times are those of the
device, not of the dispatch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import resource
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from tqdm import tqdm

from vilam3_jax.runtime import chips, paths, processes
from vilam3_jax.tasks.task import Work
from vilam3_jax.training import flops, step_guard, writers
from vilam3_jax.training.hooks import Hook, run_hooks
from vilam3_jax.training.profiler import Traces
from vilam3_jax.training.program import Program
from vilam3_jax.training.watchdog import Watchdog

read_metrics = writers.read_lines

_AHEAD = 2  # steps queued on the device behind the running one


@dataclasses.dataclass
class Clock:
    """Totals of a run over all its starts; saved with every checkpoint.

    Attributes:
      tokens: real tokens trained on, image tokens included.
      seconds: in the loop, including evaluations and saves.
      productive: seconds in which the device computed steps.
    """

    tokens: int = 0
    seconds: float = 0.0
    productive: float = 0.0

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Clock:
        """Reads the clock of a checkpoint; fields may be absent in older ones."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in record.items() if key in known})


@dataclasses.dataclass(frozen=True)
class _Step:
    """A dispatched step; times are from `time.perf_counter`."""

    number: int
    input_requested: float
    dispatched: float
    slots: tuple[int, int]
    metrics: dict[str, jax.Array]


@dataclasses.dataclass
class _Window:
    """Sums since the last logged step; seconds exclude evaluations and saves."""

    elapsed: float = 0.0
    waited: float = 0.0
    token_slots: int = 0
    image_slots: int = 0
    work: Work = dataclasses.field(default_factory=lambda: Work(0.0, 0.0, 0.0, 0.0))


class Telemetry:
    """Records the steps of a run's loop; a context manager that writes pending metrics on exit.

    Attributes:
      clock: as of the last `flush`.
    """

    def __init__(
        self,
        program: Program,
        workdir: paths.PathLike,
        start_step: int,
        clock: Clock,
        *,
        started: float,
        last: int,
        quiet: bool = False,
    ) -> None:
        """Opens the writers and starts the thread.

        Args:
          program: program of the run.
          workdir: folder of the run.
          start_step: step of the checkpoint that the run resumes from; 0 for a new run.
          clock: from the checkpoint.
          started: time of this start, in seconds since 1970.
          last: the last step of the loop; always logged.
          quiet: no progress bar.

        Raises:
          UserError: a writer cannot be opened.
        """
        config = program.config
        self.clock = clock
        self._program, self._step = program, start_step
        self._lr_groups = lr_by_group(program.lr_multipliers)
        self._speed = Speed(program)
        is_primary = processes.is_primary_process()
        self._writers = writers.open_writers(config, workdir, start_step, started) if is_primary else []
        self._first_start = writers.read_record(workdir).get("first_start", started)
        self._watchdog = Watchdog(workdir, config.telemetry.stall_seconds, jax.process_index())
        self._traces = Traces(workdir, config.telemetry.profile_steps)
        style: dict[str, Any] = dict(unit="step", dynamic_ncols=True, smoothing=0.1, mininterval=1.0)
        style |= dict(desc=config.name, disable=quiet or not is_primary)
        self._bar = tqdm(total=config.num_steps, initial=start_step, **style)
        # Run by the thread, with the step's metrics.
        self._hooks = (
            Hook(lambda step, _: self._watchdog.beat()),
            Hook(self._log, every=config.log_every, final=last),
            Hook(lambda step, _: self._bar.update(step - self._bar.n)),
        )
        self._window, self._counts = _Window(), []
        self._began = time.perf_counter() - clock.seconds
        self._input_requested = self._dispatched = self._done = self._resumed = time.perf_counter()
        self._error: BaseException | None = None
        self._queue: queue.Queue[_Step | None] = queue.Queue(_AHEAD)
        self._thread = threading.Thread(target=self._follow, name="vilam3-telemetry", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def input(self) -> Iterator[None]:
        """Context around the transfer of the next batch to the device."""
        self._input_requested = time.perf_counter()
        yield

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Context around the call of the compiled step `number`."""
        self._traces.before(number)
        self._dispatched = time.perf_counter()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def dispatched(self, number: int, batch: Any, metrics: Mapping[str, jax.Array]) -> None:
        """Reports a step; blocks only if the loop is several steps ahead of the device.

        Raises:
          Exception: the error of an earlier step or of a writer.
        """
        self._raise()
        self._step = number
        slots = self._program.task.slots(batch)
        self._queue.put(_Step(number, self._input_requested, self._dispatched, slots, dict(metrics)))
        if self._traces.due(number):
            self.flush()
            self._traces.stop()

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Context for work between steps: waits for the device, and logs its duration as `name`."""
        self.flush()
        began = time.perf_counter()
        yield
        self._watchdog.beat()
        self._resumed = time.perf_counter()
        self.write(self._step, {name: self._resumed - began})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes other metrics; only inside `pause` or before the first step."""
        writers.write_all(self._writers, step, values)

    def flush(self) -> None:
        """Waits until all steps are done and logged, and updates the clock.

        Raises:
          Exception: the error of a step or of a writer.
        """
        self._queue.join()
        self._raise()
        for writer in self._writers:
            writer.flush()
        self._add_counts()
        self.clock.seconds = time.perf_counter() - self._began

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._queue.put(None)
        self._thread.join()
        closing = [self._traces.close, self._watchdog.close, self._bar.close]
        failed = None
        for close in (*closing, *(writer.close for writer in self._writers)):
            try:
                close()
            except Exception as error:  # close the others too; the error of the run has priority
                failed = failed or error
        if kind is None:
            self._raise()
            if failed is not None:
                raise failed

    def _follow(self) -> None:
        while (step := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._settle(step)
            except BaseException as error:  # raised again in the loop
                self._error = error
            finally:
                self._queue.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _settle(self, step: _Step) -> None:
        jax.block_until_ready(step.metrics)
        now = time.perf_counter()
        window, free = self._window, max(self._done, self._resumed)
        # The device was idle since `free`; the part in which the loop waited for input counts as waiting.
        window.waited += max(0.0, step.dispatched - max(step.input_requested, free))
        window.elapsed += now - free
        window.token_slots += step.slots[0]
        window.image_slots += step.slots[1]
        self._counts.append({name: step.metrics.pop(name) for name in Work._fields})
        self.clock.productive += now - max(step.dispatched, free)
        self._done = now
        run_hooks(self._hooks, step.number, step.metrics)

    def _add_counts(self) -> None:
        counts, self._counts = jax.device_get(self._counts), []
        done = Work(*(sum(float(one[name]) for one in counts) for name in Work._fields))
        self.clock.tokens += int(done.tokens)
        self._window.work = Work(*(a + b for a, b in zip(self._window.work, done, strict=True)))

    def _log(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self._add_counts()
        window, self._window = self._window, _Window()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for group, multiplier in self._lr_groups.items():
            values[f"learning_rate/{group}"] = values["learning_rate"] * multiplier
        values |= {
            "tokens": self.clock.tokens,
            "tokens_per_second": window.work.tokens / window.elapsed,
            "images_per_second": window.work.images / window.elapsed,
            **self._speed.of(window.work, window.elapsed),
            "token_fill": window.work.tokens / window.token_slots,
            "image_fill": window.work.images / max(window.image_slots, 1),
            "input_wait": window.waited / window.elapsed,
            "goodput": self.clock.productive / max(time.time() - self._first_start, 1e-9),
            "seconds": self._done - self._began,
            **memory(),
        }
        writers.write_all(self._writers, step, values)
        step_guard.check_limit(self._program.config.skip, step, values)
        self._bar.set_postfix(
            loss=f"{values['loss']:.3f}", tok_s=f"{values['tokens_per_second']:.0f}", refresh=False
        )


class Speed:
    """Operations per second of the model's matrix products, as counted by `flops`."""

    def __init__(self, program: Program) -> None:
        model = program.config.model
        self._flops = flops.model_flops(program.task, model, program.shapes, program.lr_multipliers)
        self._devices = jax.device_count()
        chip = chips.of_kind(jax.devices()[0].device_kind)
        self._peak = None if chip is None else chip.flops / chip.devices

    def of(self, work: Work, seconds: float) -> dict[str, float]:
        """`tflops_per_device` and, for known chips, `mfu`, its share of the peak."""
        achieved = flops.step_flops(self._flops, work) / seconds / self._devices
        found = {"tflops_per_device": achieved / 1e12}
        return found if self._peak is None else found | {"mfu": achieved / self._peak}


def lr_by_group(lr_multipliers: Mapping[str, float]) -> dict[str, float]:
    """Component → its learning-rate multiplier; `<component>_x<multiplier>` each if there are several.

    Args:
      lr_multipliers: path → multiplier; 0 is frozen.
    """
    found: dict[str, set[float]] = {}
    for path, multiplier in lr_multipliers.items():
        if multiplier:
            found.setdefault(path.split("/")[0], set()).add(multiplier)
    return {
        component if len(several) == 1 else f"{component}_x{multiplier:g}": multiplier
        for component, several in sorted(found.items())
        for multiplier in sorted(several)
    }


def memory() -> dict[str, float]:
    """Peak bytes: `host_memory` of this process, and `device_memory` of its fullest device if known."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if one and "peak_bytes_in_use" in one]
    return {"host_memory": peak_rss_bytes(), **({"device_memory": max(peaks)} if peaks else {})}


def peak_rss_bytes() -> int:
    """Peak resident memory of this process in bytes (Linux reports kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
