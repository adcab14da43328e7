"""Tries settings one after the other; what was compiled before is not compiled again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
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


def search(
    config: ConfigDict,
    topology: Topology,
    cache: Cache,
    price: float | None,
    limit: int,
    report: Callable[[str], None],
) -> list[Plan]:
    """Compiles up to `limit` variants of `config`; the fastest that fit come first.

    Rows that do not give every device as many groups are multiplied first. Then come mesh splits with the
    remat policy that holds least, on the best of these policies that hold more, and other numbers of rows;
    always with as many rows in all, so that the run sees the same data. "Best" is by tokens per second if
    nothing overlaps; before anything fits, by memory.

    Args:
      config: where to start.
      topology: slice or slices.
      cache: of compiled steps.
      price: of a chip-hour.
      limit: of compiles.
      report: takes a line for each variant.
    """
    devices = topology.chips * topology.chip.devices
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
            plan = estimate.make_plan(changed, topology, cache, price)
        except UserError as error:
            report(f"{what}: left out: {error}")
            return
        found.append((plan, changed))
        speed = f"{plan.tokens_per_second[1]:,.0f} tokens/s" if plan.tokens_per_second else "does not fit"
        report(f"{what}: {plan.memory.needed / 2**30:.1f} GiB, {speed}")

    def best() -> ConfigDict:
        return min(found, key=lambda item: _rank(item[0]))[1] if found else config

    for mesh in _meshes(devices, topology.slices):
        attempt(_changed(config, {"model.remat": "full", **mesh}), _label({**mesh, "model.remat": "full"}))
    start = best()
    for tags in ("+".join(REMAT_TAGS[: n + 1]) for n in range(len(REMAT_TAGS))):
        attempt(_changed(start, {"model.remat": tags}), f"model.remat={tags}")
    attempt(_changed(start, {"model.remat": "none"}), "model.remat=none")
    start = best()
    for factor in (2, 4):
        for rows in _rows(start, factor):
            attempt(_changed(start, rows), _label(rows))
    return [plan for plan, _ in sorted(found, key=lambda item: _rank(item[0]))]


def _rank(plan: Plan) -> tuple[int, float]:
    if plan.tokens_per_second is None:
        return (1, plan.memory.needed)
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


def _label(changes: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in changes.items())
