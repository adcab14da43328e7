"""Runs an expert in the actors of a Ray cluster, fed by Ray Data.

Each actor owns a worker process, as the local engine does, so a scan that crashes its process, hangs or runs
out of memory is handled by the same code and the actor survives. When an actor or its node dies, Ray starts
the actor elsewhere with the same block of inputs; it reopens the store and skips what was committed. Actors
write the records; only names, reasons and counts travel through Ray.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import time
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from vilam3_experts.engine.committer import Committer
from vilam3_experts.engine.job import Item, Job, Outcome, chunks, run_error
from vilam3_experts.engine.worker_process import WorkerProcess
from vilam3_jax.errors import UnavailableError, UserError

try:
    import ray
    import ray.data
    import ray.exceptions
except ImportError as error:
    raise UserError(f"--engine ray needs Ray ({error}); pip install 'vilam3-experts[ray]'") from error

if TYPE_CHECKING:
    from vilam3_experts.annotate import Engine

# Inputs per block. A block is the unit of scheduling, and of repetition after an actor died.
_BLOCK = {"image": 256, "volume": 8}
_BLOCKS_PER_WORKER = 8  # at least, to balance the load at the end
_WAIT_SECONDS = 60.0


def run_ray(job: Job, items: Iterable[Item], engine: Engine) -> Generator[Outcome]:
    """Yields the outcomes in no fixed order.

    Raises `UserError` as `local.run_here`, and `UnavailableError` if the cluster cannot be reached, has no
    room, or fails.
    """
    Committer(job).close()  # report unusable folders before the cluster starts
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # `annotate` shows the progress
    started = not ray.is_initialized()
    if started:
        _connect(engine.address)
    try:
        yield from _run(job, items, engine)
    finally:
        if started:
            ray.shutdown()


def _connect(address: str | None) -> None:
    """Joins a cluster, waiting for one that is still starting; or starts one on this machine."""
    deadline = time.monotonic() + (0 if address is None else _WAIT_SECONDS)
    while True:
        try:
            ray.init(address=address, configure_logging=False, include_dashboard=None if address else False)
            return
        except (ConnectionError, ValueError, RuntimeError) as error:
            if time.monotonic() > deadline:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UnavailableError(
                    f"--address {address}: no Ray cluster answers ({reason}); start it, then start again"
                ) from error
        time.sleep(2)


def _run(job: Job, items: Iterable[Item], engine: Engine) -> Iterator[Outcome]:
    gpus, room = _room(engine)
    workers = engine.workers or room
    rows = [pickle.dumps(item) for item in items]
    size = max(1, min(_BLOCK[job.descriptor.input], len(rows) // (workers * _BLOCKS_PER_WORKER)))
    tables = [_table("item", rows[n : n + size]) for n in range(0, len(rows), size)]
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
            fn_constructor_args=(job,),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=workers, initial_size=workers, max_tasks_in_flight_per_actor=2
            ),
            num_cpus=engine.cpus_per_worker,
            num_gpus=gpus,
        )
        yield from _received(job, data)


def _received(job: Job, data: Any) -> Iterator[Outcome]:
    try:
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
            for row in batch.column("outcome"):
                found = pickle.loads(row.as_py())  # noqa: S301 (from our own actors, over Ray, which pickles itself)
                if isinstance(found, Outcome):
                    yield found
                else:
                    raise run_error(*found)
    except ray.exceptions.RayError as error:
        cause = error.__cause__ or error
        lines = str(cause).strip().splitlines() or ["no reason given"]
        reason = f"{type(cause).__name__}: {lines[0]}"
        raise UnavailableError(
            f"{job.descriptor.name}: the Ray cluster failed ({reason}); start again"
        ) from error


def _room(engine: Engine) -> tuple[float, int]:
    """GPUs per worker, and the number of workers that fit; waits for the first nodes of a cluster."""
    deadline = time.monotonic() + _WAIT_SECONDS
    cpus = engine.cpus_per_worker
    while True:
        total = ray.cluster_resources()
        gpus = engine.gpus_per_worker
        if gpus is None:
            gpus = 1.0 if total.get("GPU", 0) > 0 else 0.0
        needed = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0}
        room = min((int(total.get(name, 0) / amount) for name, amount in needed.items()), default=1)
        if room:
            return gpus, room
        if time.monotonic() > deadline:
            raise UserError(
                f"the cluster has {total.get('CPU', 0):g} CPUs and {total.get('GPU', 0):g} GPUs, too few for "
                f"one worker with {cpus:g} and {gpus:g}; see --cpus-per-worker and --gpus-per-worker"
            )
        time.sleep(1)


class Annotator:
    """One actor: owns a worker process and writes its outcomes."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._committer = Committer(job)
        self._process = WorkerProcess(job, self._committer.claim)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Runs a block of pickled `Item`s in column `item`.

        Returns a column `outcome` of pickled `Outcome`s, all committed; or one pickled (exit code, message)
        that ends the run.
        """
        items = [pickle.loads(row.as_py()) for row in table.column("item")]  # noqa: S301 (from our own driver)
        try:
            found: list[Any] = []
            keep = self._job.keep_records
            for chunk in chunks(items, self._job.batch):
                for outcome in self._process.run(chunk):
                    self._committer.write(outcome)
                    found.append(outcome if keep else dataclasses.replace(outcome, record=None))
            self._committer.flush()
        except UserError as error:
            found = [(error.exit_code, str(error))]
        return _table("outcome", [pickle.dumps(one) for one in found])


def _table(name: str, rows: list[bytes]) -> pa.Table:
    return pa.table({name: pa.array(rows, pa.binary())})
