"""Runs an expert in the actors of a Ray cluster, fed by Ray Data.

Each actor owns a worker process of its own, as the local engine does: a scan that ends its process, hangs or
needs too much memory is dealt with there, by the same code, and the actor lives on. When an actor or its node
is killed, Ray starts it elsewhere and gives it the same block of inputs again; it opens the store anew and
skips what was committed. An actor writes what it computes; only names, reasons and counts travel through Ray.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from vilam3_experts.engine.child import Child
from vilam3_experts.engine.committer import Committer
from vilam3_experts.engine.work import Item, Outcome, Work, chunks, fatal
from vilam3_jax.errors import UnavailableError, UserError

try:
    import ray
    import ray.data
    import ray.exceptions
except ImportError as error:
    raise UserError(f"--engine ray needs Ray ({error}); pip install 'vilam3-experts[ray]'") from error

if TYPE_CHECKING:
    from vilam3_experts.annotate import Engine

# What an actor is given at once, and is given again when it was killed.
_BLOCK = {"image": 256, "volume": 8}
_BLOCKS_PER_WORKER = 8  # at least, so that all have work until the end
_WAIT_SECONDS = 60.0


def run_ray(work: Work, items: Iterable[Item], engine: Engine) -> Generator[Outcome]:
    """Yields the outcomes, in no fixed order.

    Raises:
      UserError: the expert cannot be built, or the store cannot be written.
      UnavailableError: the cluster cannot be reached, or has no room, or fails.
    """
    Committer(work).close()  # what is wrong with the folders is better said before the cluster starts
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # the progress is told here
    started = not ray.is_initialized()
    if started:
        _connect(engine.address)
    try:
        yield from _run(work, items, engine)
    finally:
        if started:
            ray.shutdown()


def _connect(address: str | None) -> None:
    """Joins a cluster, which may have been started at this moment; or starts one on this machine."""
    deadline = time.monotonic() + (0 if address is None else _WAIT_SECONDS)
    while True:
        try:
            ray.init(address=address, configure_logging=False, include_dashboard=None if address else False)
            return
        except (ConnectionError, ValueError, RuntimeError) as error:
            if time.monotonic() > deadline:
                told = (str(error).splitlines() or [type(error).__name__])[0]
                raise UnavailableError(
                    f"--address {address}: no Ray cluster answers ({told}); start it, then start again"
                ) from error
        time.sleep(2)


def _run(work: Work, items: Iterable[Item], engine: Engine) -> Iterator[Outcome]:
    gpus, room = _room(engine)
    workers = engine.workers or room
    rows = [pickle.dumps(item) for item in items]
    size = max(1, min(_BLOCK[work.descriptor.input], len(rows) // (workers * _BLOCKS_PER_WORKER)))
    tables = [
        pa.table({"item": pa.array(rows[n : n + size], pa.binary())}) for n in range(0, len(rows), size)
    ]
    del rows
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = False
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=engine.object_store_bytes
    )
    with ray.data.DataContext.current(context):
        data = ray.data.from_arrow(tables).map_batches(
            Annotator,
            fn_constructor_args=(work,),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=2
            ),
            num_cpus=engine.cpus_per_worker,
            num_gpus=gpus,
        )
        yield from _received(work, data)


def _received(work: Work, data: Any) -> Iterator[Outcome]:
    try:
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            for row in batch.column("outcome"):
                found = pickle.loads(row.as_py())  # noqa: S301 (from our own actors, over Ray, which pickles itself)
                if isinstance(found, Outcome):
                    yield found
                else:
                    raise fatal(*found)
    except ray.exceptions.RayError as error:
        raise UnavailableError(
            f"{work.descriptor.name}: the Ray cluster failed ({_first_line(error)}); start again"
        ) from error


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    lines = str(cause).strip().splitlines() or ["no reason given"]
    return f"{type(cause).__name__}: {lines[0]}"


def _room(engine: Engine) -> tuple[float, int]:
    """GPUs of each worker, and for how many workers there is room; waits for the first nodes of a cluster."""
    deadline = time.monotonic() + _WAIT_SECONDS
    cpus = engine.cpus_per_worker
    while True:
        there = ray.cluster_resources()
        gpus = engine.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if there.get("GPU", 0) > 0 else 0.0
        needed = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0}
        room = min((int(there.get(name, 0) / amount) for name, amount in needed.items()), default=1)
        if room:
            return gpus, room
        if time.monotonic() > deadline:
            raise UserError(
                f"the cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, too few for "
                f"one worker with {cpus:g} and {gpus:g}; see --cpus-per-worker and --gpus-per-worker"
            )
        time.sleep(1)


class Annotator:
    """One actor: owns a worker process, and writes what it says."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._committer = Committer(work)
        self._child = Child(work, self._committer.claim)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Runs a block.

        Args:
          table: column `item`, pickled `Item`s.

        Returns:
          Column `outcome`: pickled `Outcome`s, all of them committed; or one (exit code, message) that ends
          the run.
        """
        items = [pickle.loads(row.as_py()) for row in table.column("item")]  # noqa: S301 (from our own driver)
        try:
            found: list[Any] = []
            for chunk in chunks(items, self._work.batch):
                for outcome in self._child.run(chunk):
                    self._committer.write(outcome)
                    found.append(outcome if self._work.keep_records else _without_record(outcome))
            self._committer.flush()
        except UserError as error:
            found = [(error.exit_code, str(error))]
        return _table("outcome", [pickle.dumps(one) for one in found])


def _table(name: str, rows: list[bytes]) -> pa.Table:
    return pa.table({name: pa.array(rows, pa.binary())})


def _without_record(outcome: Outcome) -> Outcome:
    return Outcome(outcome.number, outcome.name, outcome.status, outcome.reason, outcome.notes)
