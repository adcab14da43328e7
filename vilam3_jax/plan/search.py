"""Searches meshes, remat policies and batch sizes for the fastest step that fits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vilam3_jax.errors import UserError
from vilam3_jax.models.layers import REMAT_TAGS
from vilam3_jax.plan import estimate
from vilam3_jax.plan.compiler import Cache
from vilam3_jax.plan.estimate import Plan
from vilam3_jax.plan.topology import Topology
from vilam3_jax.runtime.settings import flatten
from vilam3_jax.tasks import TASKS
from vilam3_jax.training.run_config import RunConfig

_MOST_CONTEXT = 4


def search(
    config: RunConfig,
    topology: Topology,
    cache: Cache,
    price: float | None,
    limit: int,
    report: Callable[[str], None],
) -> list[Plan]:
    """Compiles up to `limit` variants of `config`; returns the fastest that fit first.

    If the rows do not divide over the devices, they are multiplied first. The first variant shards parameters
    over all devices and rematerialises everything; while it does not fit, `_smaller` reduces the work at a
    time. From the best so far follow other meshes, remat policies that keep more, and other numbers of rows
    per step, always with the same number of rows in total. "Best" means tokens per second without overlap, or
    memory before anything fits. A variant whose parameters and optimizer do not fit is not compiled. `report`
    is called with a line per variant; the other arguments are those of `estimate.make_plan`.
    """
    devices = topology.chips * topology.chip.devices
    given, given_rows = flatten(config.to_dict()), config.data.global_rows
    if more := _enough_rows(config, devices):
        report(f"too few rows for {devices} devices: {as_flags(more)}")
        config = config.replace(more)
    found: list[tuple[Plan, RunConfig]] = []
    stop = cache.compiled + limit

    def attempt(start: RunConfig, changes: Mapping[str, Any]) -> None:
        if cache.compiled >= stop:
            return
        what = as_flags(changes)
        try:
            changed = start.replace(changes)
            plan = estimate.make_plan(changed, topology, cache, price, only_if_resident=True)
        except UserError as error:
            report(f"{what}: left out: {error}")
            return
        differing = {key: x for key, x in flatten(changed.to_dict()).items() if x != given[key]}
        found.append((dataclasses.replace(plan, changes=differing), changed))
        report(f"{what}: {_outcome(plan)}")

    def best() -> RunConfig:
        return min(found, key=lambda item: _rank(item[0]))[1] if found else config

    def fits() -> bool:
        return any(plan.memory.fits for plan, _ in found)

    meshes = list(_meshes(devices, topology.slices))
    while meshes and not found:
        attempt(config, {**meshes.pop(0), "model.remat": "full"})
    start = best()
    for smaller in _smaller(start, topology.slices, given_rows) if found else ():
        memory = found[-1][0].memory
        if memory.fits or not memory.temporary:
            break
        attempt(start, smaller)
    start = best()
    for mesh in meshes:
        if fits() or mesh["mesh.tensor"] > 1:  # replicas over `data` need more memory
            attempt(start, mesh)
    start = best()
    for remat in (*itertools.accumulate(REMAT_TAGS, "{}+{}".format), "none"):
        if fits():
            attempt(start, {"model.remat": remat})
    start = best()
    for factor in (2, 4):
        for rows in _rows(start, factor):
            if fits() or not TASKS[config.task].can_accumulate:
                attempt(start, rows)
    return [plan for plan, _ in sorted(found, key=lambda item: _rank(item[0]))]


def as_flags(changes: Mapping[str, Any]) -> str:
    """Changed settings as flags of `vilam3 plan` and `vilam3 train`."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())


def _outcome(plan: Plan) -> str:
    size = f"{plan.memory.needed / 2**30:.1f} GiB"
    if plan.tokens_per_second:
        return f"{size}, {plan.tokens_per_second[1]:,.0f} tokens/s"
    if not plan.memory.temporary:
        return f"{size} for parameters, optimizer and batch alone, does not fit"
    return f"{size}, does not fit"


def _rank(plan: Plan) -> tuple[int, float]:
    if plan.tokens_per_second is None:  # without temporary bytes, `needed` is a lower bound
        return (1 if plan.memory.temporary else 2, plan.memory.needed)
    return (0, -plan.tokens_per_second[1])


def _meshes(devices: int, slices: int) -> Iterator[dict[str, int]]:
    """A whole slice under `fsdp`, then parts of it under `tensor` or `data`."""
    within = devices // slices
    for tensor, data in itertools.product((1, 2, 4, 8), repeat=2):
        fsdp, odd = divmod(within, tensor * data)
        if not odd and (tensor == 1 or data == 1):
            sizes = {"data": data * slices, "fsdp": fsdp, "context": 1, "tensor": tensor}
            yield {f"mesh.{axis}": size for axis, size in sizes.items()}


def _smaller(config: RunConfig, slices: int, own_rows: int) -> Iterator[dict[str, int]]:
    """Changes that compute the same in smaller and smaller parts.

    First more accumulation, down to one group per device; then groups of one row; then rows sharded over
    devices. Smaller groups have fewer image slots, so samples with many images may no longer fit. If the rows
    were multiplied, they first shrink towards `own_rows`. There is nothing for tasks that cannot accumulate.
    """
    if not TASKS[config.task].can_accumulate:
        return
    data, mesh = config.data, config.mesh.to_dict()
    accumulate, group, images = config.grad_accum, data.rows_per_group, data.images_per_group
    rows, steps = data.global_rows, config.num_steps
    changes: dict[str, int] = {}
    while True:
        groups = rows // (group * accumulate * mesh["data"] * mesh["fsdp"])
        axis = "data" if mesh["data"] % (2 * slices) == 0 else "fsdp"  # replicas before shards
        if groups > 1:
            accumulate *= 2 if groups % 2 == 0 else groups
        elif group % 2 == 0:
            group, images = group // 2, -(-images // 2)
            changes |= {"data.rows_per_group": group, "data.images_per_group": images}
            if rows % 2 == 0 and rows // 2 >= own_rows:
                rows, steps = rows // 2, steps * 2
                changes |= {"data.global_rows": rows, "num_steps": steps}
            else:
                accumulate *= 2
        elif mesh["context"] < _MOST_CONTEXT and mesh[axis] % 2 == 0:
            mesh["context"], mesh[axis], accumulate = 2 * mesh["context"], mesh[axis] // 2, accumulate * 2
            changes |= {"mesh.context": mesh["context"], f"mesh.{axis}": mesh[axis]}
        else:
            return
        changes |= {"grad_accum": accumulate}
        yield dict(changes)


def _enough_rows(config: RunConfig, devices: int) -> dict[str, int]:
    """The smallest multiple of the rows that divides over the devices, with fewer steps accordingly."""
    task = TASKS[config.task]
    units = task.batch_format(config.data, config.model).units
    factor = devices // math.gcd(units // config.grad_accum, devices)
    rows = flatten(config.to_dict())[task.batch_key] * factor
    return {task.batch_key: rows, "num_steps": max(1, config.num_steps // factor)} if factor > 1 else {}


def _rows(config: RunConfig, factor: int) -> Iterator[dict[str, int]]:
    """More rows in fewer steps, and fewer rows in more."""
    key = TASKS[config.task].batch_key
    rows = flatten(config.to_dict())[key]
    if config.num_steps % factor == 0 or config.num_steps > 100:
        yield {key: rows * factor, "num_steps": max(1, config.num_steps // factor)}
    if rows % factor == 0:
        yield {key: rows // factor, "num_steps": config.num_steps * factor}
