"""Tries settings one after the other; what was compiled before is not compiled again."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vilam3_jax import config as config_lib
from vilam3_jax.config import ConfigDict
from vilam3_jax.errors import UserError
from vilam3_jax.models.layers import REMAT_TAGS
from vilam3_jax.plan import estimate
from vilam3_jax.plan.compiler import Cache
from vilam3_jax.plan.estimate import Plan
from vilam3_jax.plan.topology import Topology

_TENSOR = (1, 2, 4, 8)
_MOST_CONTEXT = 4


def search(
    config: ConfigDict,
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
        config = _changed(config, more)
    found: list[tuple[Plan, ConfigDict]] = []
    stop = cache.compiled + limit

    def attempt(changed: ConfigDict, what: str) -> None:
        if cache.compiled >= stop:
            return
        try:
            config_lib.check(changed)
            plan = estimate.make_plan(changed, topology, cache, price, only_if_held=True)
        except UserError as error:
            report(f"{what}: left out: {error}")
            return
        found.append((dataclasses.replace(plan, changes=_changes(given, changed)), changed))
        report(f"{what}: {_outcome(plan)}")

    def best() -> ConfigDict:
        return min(found, key=lambda item: _rank(item[0]))[1] if found else config

    def fits() -> bool:
        return any(plan.memory.fits for plan, _ in found)

    meshes = list(_meshes(devices, topology.slices))
    while meshes and not found:
        mesh = {**meshes.pop(0), "model.remat": "full"}
        attempt(_changed(config, mesh), _label(mesh))
    start = best()
    for smaller in _smaller(start, topology.slices, given.data.global_rows) if found else ():
        memory = found[-1][0].memory
        if memory.fits or not memory.temporary:
            break
        attempt(_changed(start, smaller), _label(smaller))
    start = best()
    for mesh in meshes:
        if fits() or mesh["mesh.tensor"] > 1:  # copies over `data` hold more
            attempt(_changed(start, mesh), _label(mesh))
    start = best()
    for remat in (*("+".join(REMAT_TAGS[: n + 1]) for n in range(len(REMAT_TAGS))), "none"):
        if fits():
            attempt(_changed(start, {"model.remat": remat}), f"model.remat={remat}")
    start = best()
    for factor in (2, 4):
        for rows in _rows(start, factor):
            if fits() or config.kind == "contrastive":
                attempt(_changed(start, rows), _label(rows))
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


def _smaller(config: ConfigDict, slices: int, own_rows: int) -> Iterator[dict[str, int]]:
    """What computes the same with less at a time, more and more so.

    More steps of accumulation, down to a group a device; then groups of a row; then rows that devices share.
    Groups of a row have half of the image slots, so samples of many images may lose their place. Where the
    rows were multiplied for larger groups they go back towards `own_rows`, which takes no accumulation. A run
    of pairs compares all of a batch at once and has nothing of the kind.
    """
    if config.kind == "contrastive":
        return
    data, mesh = config.data, dict(config.mesh)
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


def _enough_rows(config: ConfigDict, devices: int) -> dict[str, int]:
    """The least multiple of the rows that gives every device as many groups, in as many fewer steps."""
    if config.kind == "contrastive":
        key, groups = "data.global_pairs", config.data.global_pairs
    else:
        key, groups = (
            "data.global_rows",
            config.data.global_rows // (config.data.rows_per_group * config.grad_accum),
        )
    factor = devices // math.gcd(groups, devices)
    rows = config_lib.flatten(config)[key]
    return {key: rows * factor, "num_steps": max(1, config.num_steps // factor)} if factor > 1 else {}


def _rows(config: ConfigDict, factor: int) -> Iterator[dict[str, int]]:
    """More rows in fewer steps, and fewer rows in more."""
    key = "data.global_pairs" if config.kind == "contrastive" else "data.global_rows"
    rows = config_lib.flatten(config)[key]
    if config.num_steps % factor == 0 or config.num_steps > 100:
        yield {key: rows * factor, "num_steps": max(1, config.num_steps // factor)}
    if rows % factor == 0:
        yield {key: rows // factor, "num_steps": config.num_steps * factor}


def _changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    changed: Any = copy.deepcopy(config)
    changed.update_from_flattened_dict(changes)
    return changed


def _changes(before: ConfigDict, after: ConfigDict) -> dict[str, Any]:
    old = config_lib.flatten(before)
    return {key: value for key, value in config_lib.flatten(after).items() if value != old[key]}


def _label(changes: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items())
