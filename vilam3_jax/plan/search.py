"""Tries settings one after the other; what was compiled before is not compiled again."""

from __future__ import annotations

import dataclasses
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

_TENSOR = (1, 2, 4, 8)
_MOST_CONTEXT = 4


def search(
    config: RunConfig,
    topology: Topology,
    cache: Cache,
    price: float | None,
    limit: int,
    report: Callable[[str], None],
) -> list[Plan]:
    """Compiles up to `limit` variants of `config`; the fastest that fit come first.

    Rows that do not give every device as many groups are multiplied first. The first variant holds parameters
    on as many devices as possible and recomputes all. While that does not fit, less is computed at a time
    (`_smaller`). Then come other mesh splits, on the best of these remat policies that hold more, and other
    numbers of rows; always with as many rows in all, so that the run sees the same data. "Best" is by tokens
    per second if nothing overlaps; before anything fits, by memory. What cannot hold parameters and optimizer
    is not compiled.

    Args:
      config: where to start.
      topology: slice or slices.
      cache: of compiled steps.
      price: of a chip-hour.
      limit: of compiles.
      report: takes a line for each variant.
    """
    devices = topology.chips * topology.chip.devices
    given = config
    if more := _enough_rows(config, devices):
        report(f"too few rows for {devices} devices: {_label(more)}")
        config = config.replace(more)
    found: list[tuple[Plan, RunConfig]] = []
    stop = cache.compiled + limit

    def attempt(start: RunConfig, changes: Mapping[str, Any]) -> None:
        if cache.compiled >= stop:
            return
        what = _label(changes)
        try:
            changed = start.replace(changes)
            plan = estimate.make_plan(changed, topology, cache, price, only_if_resident=True)
        except UserError as error:
            report(f"{what}: left out: {error}")
            return
        found.append((dataclasses.replace(plan, changes=_changes(given, changed)), changed))
        report(f"{what}: {_outcome(plan)}")

    def best() -> RunConfig:
        return min(found, key=lambda item: _rank(item[0]))[1] if found else config

    def fits() -> bool:
        return any(plan.memory.fits for plan, _ in found)

    meshes = list(_meshes(devices, topology.slices))
    while meshes and not found:
        mesh = {**meshes.pop(0), "model.remat": "full"}
        attempt(config, mesh)
    start = best()
    for smaller in _smaller(start, topology.slices, given.data.global_rows) if found else ():
        memory = found[-1][0].memory
        if memory.fits or not memory.temporary:
            break
        attempt(start, smaller)
    start = best()
    for mesh in meshes:
        if fits() or mesh["mesh.tensor"] > 1:  # copies over `data` hold more
            attempt(start, mesh)
    start = best()
    for remat in (*("+".join(REMAT_TAGS[: n + 1]) for n in range(len(REMAT_TAGS))), "none"):
        if fits():
            attempt(start, {"model.remat": remat})
    start = best()
    for factor in (2, 4):
        for rows in _rows(start, factor):
            if fits() or not TASKS[config.task].can_accumulate:
                attempt(start, rows)
    return [plan for plan, _ in sorted(found, key=lambda item: _rank(item[0]))]


def as_flags(changes: dict[str, Any]) -> str:
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
    if plan.tokens_per_second is None:  # without temporary bytes: `needed` is only what is held
        return (1 if plan.memory.temporary else 2, plan.memory.needed)
    return (0, -plan.tokens_per_second[1])


def _meshes(devices: int, slices: int) -> Iterator[dict[str, int]]:
    """All of a slice under `fsdp`, then parts of it under `tensor` or `data`."""
    within = devices // slices
    for tensor in _TENSOR:
        for data in (1, 2, 4, 8):
            fsdp, odd = divmod(within, tensor * data)
            if not odd and (tensor == 1 or data == 1):
                yield {
                    "mesh.data": data * slices,
                    "mesh.fsdp": fsdp,
                    "mesh.context": 1,
                    "mesh.tensor": tensor,
                }


def _smaller(config: RunConfig, slices: int, own_rows: int) -> Iterator[dict[str, int]]:
    """What computes the same with less at a time, more and more so.

    More steps of accumulation, down to a group a device; then groups of a row; then rows that devices share.
    Groups of a row have half of the image slots, so samples of many images may lose their place. Where the
    rows were multiplied for larger groups they go back towards `own_rows`, which takes no accumulation. A run
    of pairs compares all of a batch at once and has nothing of the kind.
    """
    if not TASKS[config.task].can_accumulate:
        return
    data, mesh = config.data, config.mesh.to_dict()
    accumulate, group, images = config.grad_accum, data.rows_per_group, data.images_per_group
    rows, steps = data.global_rows, config.num_steps
    changes: dict[str, int] = {}
    while True:
        groups = rows // (group * accumulate * mesh["data"] * mesh["fsdp"])
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
        elif mesh["context"] < _MOST_CONTEXT and (axis := _halved(mesh, slices)):
            mesh["context"], mesh[axis], accumulate = 2 * mesh["context"], mesh[axis] // 2, accumulate * 2
            changes |= {"mesh.context": mesh["context"], f"mesh.{axis}": mesh[axis]}
        else:
            return
        changes |= {"grad_accum": accumulate}
        yield dict(changes)


def _halved(mesh: Mapping[str, int], slices: int) -> str:
    """The axis that gives half of its devices to `context`: copies before parts of the parameters."""
    if mesh["data"] % (2 * slices) == 0:
        return "data"
    return "fsdp" if mesh["fsdp"] % 2 == 0 else ""


def _enough_rows(config: RunConfig, devices: int) -> dict[str, int]:
    """The least multiple of the rows that gives every device as many groups, in as many fewer steps."""
    key = TASKS[config.task].batch_key
    units = TASKS[config.task].batch_format(config.data, config.model).units
    groups = units // config.grad_accum
    factor = devices // math.gcd(groups, devices)
    rows = flatten(config.to_dict())[key]
    return {key: rows * factor, "num_steps": max(1, config.num_steps // factor)} if factor > 1 else {}


def _rows(config: RunConfig, factor: int) -> Iterator[dict[str, int]]:
    """More rows in fewer steps, and fewer rows in more."""
    key = TASKS[config.task].batch_key
    rows = flatten(config.to_dict())[key]
    if config.num_steps % factor == 0 or config.num_steps > 100:
        yield {key: rows * factor, "num_steps": max(1, config.num_steps // factor)}
    if rows % factor == 0:
        yield {key: rows // factor, "num_steps": config.num_steps * factor}


def _changes(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    old = flatten(before.to_dict())
    return {key: value for key, value in flatten(after.to_dict()).items() if value != old[key]}


def _label(changes: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items())
