"""What a run says of itself, without holding it up.

The loop hands every step over as it is dispatched. A thread of its own follows the device: it waits for each
step, notes when it ended, and fetches and writes figures at the steps that are logged. So the loop may run a
few steps ahead, and times are those of the device, not of the dispatch.
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

from vilam3_jax.config import ConfigDict
from vilam3_jax.data.batches import Batch
from vilam3_jax.runtime import paths, processes
from vilam3_jax.training import chips, flops, measures, step_guard, writers
from vilam3_jax.training.profiler import Traces
from vilam3_jax.training.watchdog import Watchdog

read_metrics = writers.read_lines

_AHEAD = 2  # steps that may wait on the device behind the one that runs


@dataclasses.dataclass
class Clock:
    """What a run has done since its first start; saved with every checkpoint.

    Attributes:
      tokens: real tokens trained on, image tokens included.
      seconds: in the loop, evaluations and saves included.
      productive: seconds in which the device computed steps that the run kept.
    """

    tokens: int = 0
    seconds: float = 0.0
    productive: float = 0.0

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Clock:
        """Reads the clock of a checkpoint; older ones lack some of it."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in record.items() if key in known})


@dataclasses.dataclass(frozen=True)
class _Step:
    """A step on its way; times of `time.perf_counter`."""

    number: int
    asked: float
    dispatched: float
    slots: tuple[int, int]
    metrics: dict[str, jax.Array]


@dataclasses.dataclass
class _Window:
    """Sums since the last logged step; seconds leave out what happened beside the steps."""

    elapsed: float = 0.0
    waited: float = 0.0
    token_slots: int = 0
    image_slots: int = 0
    work: flops.Work = dataclasses.field(default_factory=lambda: flops.Work(0.0, 0.0, 0.0, 0.0))


class Telemetry:
    """Follows one run of the loop; a context that writes what is left when it ends.

    Attributes:
      clock: as of the last `flush`.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: paths.PathLike,
        start_step: int,
        clock: Clock,
        rates: Mapping[str, float],
        *,
        started: float,
        last: int,
        quiet: bool = False,
    ) -> None:
        """Opens the writers and starts to watch.

        Args:
          config: the run's config.
          workdir: folder of the run.
          start_step: of the checkpoint that the run goes on from; 0 for a new run.
          clock: as the checkpoint has it.
          rates: path → learning-rate multiplier of every parameter, 0 where frozen.
          started: when this start of the run began, in seconds since 1970.
          last: the step at which the loop will stop; it is always logged.
          quiet: no progress bar.

        Raises:
          UserError: a writer cannot be opened.
        """
        self.clock = clock
        self._config, self._last, self._step = config, last, start_step
        self._groups = learning_rate_groups(rates)
        self._speed = Speed(config)
        lead = processes.is_primary_process()
        self._writers = writers.open_writers(config, workdir, start_step, started) if lead else []
        self._first_start = writers.read_record(workdir).get("first_start", started)
        self._watchdog = Watchdog(workdir, config.telemetry.stall_seconds, jax.process_index())
        self._traces = Traces(workdir, config.telemetry.profile_steps)
        self._bar = progress_bar(config.name, config.num_steps, start_step, lead and not quiet)
        self._window, self._counts = _Window(), []
        self._began = time.perf_counter() - clock.seconds
        self._asked = self._dispatched = self._done = self._resumed = time.perf_counter()
        self._error: BaseException | None = None
        self._queue: queue.Queue[_Step | None] = queue.Queue(_AHEAD)
        self._thread = threading.Thread(target=self._follow, name="vilam3-telemetry", daemon=True)
        self._thread.start()

    # --- what the loop calls

    @contextlib.contextmanager
    def input(self) -> Iterator[None]:
        """Around what brings the next batch to the device."""
        self._asked = time.perf_counter()
        yield

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the call of the compiled step; `number` is what it will have finished."""
        self._traces.before(number)
        self._dispatched = time.perf_counter()
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def dispatched(self, number: int, batch: Batch, metrics: Mapping[str, jax.Array]) -> None:
        """Hands a step over; waits only if the loop is several steps ahead of the device.

        Raises:
          Exception: what an earlier step or a writer failed with.
        """
        self._raise()
        self._step = number
        slots = measures.slots(batch)
        self._queue.put(_Step(number, self._asked, self._dispatched, slots, dict(metrics)))
        if self._traces.due(number):
            self.flush()
            self._traces.stop()

    @contextlib.contextmanager
    def aside(self, name: str) -> Iterator[None]:
        """Around what is no step: waits for the device first, and logs the seconds spent inside as `name`."""
        self.flush()
        began = time.perf_counter()
        yield
        self._watchdog.beat()
        self._resumed = time.perf_counter()
        self.write(self._step, {name: self._resumed - began})

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes figures that do not come from a step; inside `aside` or before the first step only."""
        writers.write_all(self._writers, step, values)

    def flush(self) -> None:
        """Waits until all steps handed over are done and written, and brings the clock up to date.

        Raises:
          Exception: what a step or a writer failed with.
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
            except Exception as error:  # the others end well, and what ended the run is what is told
                failed = failed or error
        if kind is None:
            self._raise()
            if failed is not None:
                raise failed

    # --- the thread that follows the device

    def _follow(self) -> None:
        while (step := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._settle(step)
            except BaseException as error:  # raised in the loop, whatever it is
                self._error = error
            finally:
                self._queue.task_done()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _settle(self, step: _Step) -> None:
        jax.block_until_ready(step.metrics)
        now = time.perf_counter()
        self._watchdog.beat()
        window, free = self._window, max(self._done, self._resumed)
        # The device had nothing to do from `free` on; it waited for input as far as the loop did, too.
        window.waited += max(0.0, step.dispatched - max(step.asked, free))
        window.elapsed += now - free
        window.token_slots += step.slots[0]
        window.image_slots += step.slots[1]
        self._counts.append({name: step.metrics.pop(name) for name in measures.COUNTS})
        self.clock.productive += now - max(step.dispatched, free)
        self._done = now
        if step.number % self._config.log_every == 0 or step.number == self._last:
            self._log(step, now)
        self._bar.update(step.number - self._bar.n)

    def _add_counts(self) -> None:
        counts, self._counts = jax.device_get(self._counts), []
        done = {name: sum(float(one[name]) for one in counts) for name in measures.COUNTS}
        self.clock.tokens += int(done["tokens"])
        before = dataclasses.asdict(self._window.work)
        self._window.work = flops.Work(**{name: before[name] + done[name] for name in before})

    def _log(self, step: _Step, now: float) -> None:
        self._add_counts()
        window, self._window = self._window, _Window()
        values = {name: float(value) for name, value in jax.device_get(step.metrics).items()}
        for group, rate in self._groups.items():
            values[f"learning_rate/{group}"] = values["learning_rate"] * rate
        values |= {
            "tokens": self.clock.tokens,
            "tokens_per_second": window.work.tokens / window.elapsed,
            "images_per_second": window.work.images / window.elapsed,
            **self._speed.of(window.work, window.elapsed),
            "token_fill": window.work.tokens / window.token_slots,
            "image_fill": window.work.images / max(window.image_slots, 1),
            "input_wait": window.waited / window.elapsed,
            "goodput": self.clock.productive / max(time.time() - self._first_start, 1e-9),
            "seconds": now - self._began,
            **memory(),
        }
        writers.write_all(self._writers, step.number, values)
        step_guard.check_limit(self._config, step.number, values)
        self._bar.set_postfix(
            loss=f"{values['loss']:.3f}", tok_s=f"{values['tokens_per_second']:.0f}", refresh=False
        )


class Speed:
    """Operations a second of the model's own products, in the accounting of `flops`."""

    def __init__(self, config: ConfigDict) -> None:
        """Looks up what the run's devices can do."""
        self._flops = flops.model_flops(config)
        self._devices = jax.device_count()
        chip = chips.of_kind(jax.devices()[0].device_kind)
        self._peak = None if chip is None else chip.flops / chip.devices

    def of(self, work: flops.Work, seconds: float) -> dict[str, float]:
        """`tflops_per_device`, and `mfu`, its share of the peak, where that is known."""
        achieved = self._flops.of(work) / seconds / self._devices
        found = {"tflops_per_device": achieved / 1e12}
        return found if self._peak is None else found | {"mfu": achieved / self._peak}


def learning_rate_groups(rates: Mapping[str, float]) -> dict[str, float]:
    """Group → multiplier of the schedule's rate: one a component, more where it learns at several rates.

    Args:
      rates: path → multiplier; 0 is frozen and no group.

    Returns:
      Component → multiplier; where there are several, `<component>_x<multiplier>` for each.
    """
    found: dict[str, set[float]] = {}
    for path, rate in rates.items():
        if rate:
            found.setdefault(path.split("/")[0], set()).add(rate)
    return {
        component if len(several) == 1 else f"{component}_x{rate:g}": rate
        for component, several in sorted(found.items())
        for rate in sorted(several)
    }


def memory() -> dict[str, float]:
    """Peaks so far, bytes: `host_memory` of this process, `device_memory` of its fullest device if known."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [one["peak_bytes_in_use"] for one in stats if one and "peak_bytes_in_use" in one]
    return {"host_memory": peak_rss_bytes(), **({"device_memory": max(peaks)} if peaks else {})}


def progress_bar(name: str, total: int, done: int, shown: bool = True) -> tqdm:
    """A bar that tells stage, step, speed and time left; the loop adds the loss."""
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit="step",
        disable=not shown,
        dynamic_ncols=True,
        smoothing=0.1,
        mininterval=1.0,
    )


def peak_rss_bytes() -> int:
    """Largest resident size of this process so far, in bytes (Linux reports kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
