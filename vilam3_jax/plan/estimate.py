"""Estimates from a compiled step: memory, bounds on its speed, the dominant part, and cost."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from vilam3_jax.ops.attention.cached import KERNEL as CACHED_ATTENTION
from vilam3_jax.plan import hlo
from vilam3_jax.plan.compiler import Cache
from vilam3_jax.plan.topology import Topology
from vilam3_jax.runtime.chips import Chip
from vilam3_jax.runtime.settings import flatten
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import flops as flops_lib
from vilam3_jax.training import program as program_lib
from vilam3_jax.training.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per chip.

    Attributes:
      parameters, optimizer, batch: arguments of the step.
      temporary: gradients, activations and other buffers; for a step that does not fit, all but the above.
      needed: the total.
      limit: the chip's memory, or the part of it that the compiler reports as available.
    """

    parameters: float
    optimizer: float
    batch: float
    temporary: float
    needed: float
    limit: float

    @property
    def fits(self) -> bool:
        """Whether the step fits."""
        return self.needed <= self.limit


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of one step on one device, by part, and their bounds.

    Attributes:
      cycles: the compiler's estimate, times loop trips.
      clock: cycles per second.
      products, others: seconds of fusions with and without a matrix product, by `cycles`.
      kernels: seconds of kernels by roofline.
      collectives: kind of transfer → seconds by roofline.
      overlapped: seconds of asynchronous transfers.
      wire_bytes: kind → bytes that a chip sends.
      best, worst: seconds of the step if all asynchronous transfers overlap, and if none does.
      dynamic_loops: loops counted with the most trips they can have.
      without_estimate: number of fusions without an estimate, which count as 0.
      unknown_kernels: kernels counted by memory traffic alone.
    """

    cycles: float
    clock: float
    products: float
    others: float
    kernels: float
    collectives: dict[str, float]
    overlapped: float
    wire_bytes: dict[str, float]
    best: float
    worst: float
    dynamic_loops: list[str]
    without_estimate: float
    unknown_kernels: list[str]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of one config on one topology. Pairs are (best, worst).

    `speed` and the figures after it are None for a step that does not fit. `changes` are the settings, by
    dotted key, that a search changed.
    """

    run: str
    model: str
    topology: str
    product: str
    chips: int
    devices: int
    mesh: dict[str, int]
    remat: str
    rows: int
    memory: Memory
    speed: Speed | None = None
    model_flops: float = 0.0
    mfu: tuple[float, float] | None = None
    tokens_per_second: tuple[float, float] | None = None
    images_per_second: tuple[float, float] | None = None
    dominates: str = ""
    steps: int = 0
    hours: tuple[float, float] | None = None
    chip_hours: tuple[float, float] | None = None
    cost: tuple[float, float] | None = None
    accounting: str = "ViT + projector + LLM, causal attention halved, padding and recomputation excluded"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**dataclasses.asdict(self), "fits": self.memory.fits}


def make_plan(
    config: RunConfig,
    topology: Topology,
    cache: Cache,
    price: float | None = None,
    only_if_resident: bool = False,
) -> Plan:
    """Compiles the step of `config` for `topology` and estimates its cost.

    Args:
      config: the run.
      topology: slice or slices.
      cache: cache of compiled steps.
      price: price of a chip-hour.
      only_if_resident: do not compile if parameters, optimizer and batch alone do not fit; `needed` is then
        their sum, and `temporary` 0.

    Raises:
      UserError: config and topology do not match, or libtpu is missing.
    """
    devices = topology.devices()
    mesh = mesh_lib.build_mesh(config.mesh, devices)
    program = program_lib.build(config, mesh)
    chip = topology.chip
    resident = _resident(program, chip)
    plan = Plan(
        run=config.name,
        model=config.model.name,
        topology=topology.name,
        product=topology.product,
        chips=topology.chips,
        devices=len(devices),
        mesh={axis: int(size) for axis, size in mesh.shape.items()},
        remat=config.model.remat,
        rows=flatten(config.to_dict())[program.task.batch_key],
        memory=Memory(*resident, 0.0, sum(resident), chip.hbm_bytes),
        steps=config.num_steps,
    )
    if only_if_resident and not plan.memory.fits:
        return plan
    compiled = cache.compile(program, topology)
    needed, temporary = chip.devices * compiled.needed, chip.devices * compiled.temporary
    if not compiled.text:
        temporary = max(needed - sum(resident), 0.0)
    memory = Memory(*resident, temporary, needed, chip.devices * compiled.limit or chip.hbm_bytes)
    plan = dataclasses.replace(plan, memory=memory)
    if not compiled.text or not memory.fits:  # XLA limits only temporaries, so also check the total
        return plan
    length = config.data.seq_len // int(mesh.shape["context"])
    trips = -(-length // min(config.loss_chunk, length))
    cost = hlo.read(compiled.text, dynamic_trips=trips)
    return _with_speed(plan, program, topology, speed(cost, topology, list(mesh.devices.flat)), price)


def _with_speed(
    plan: Plan, program: program_lib.Program, topology: Topology, speed: Speed, price: float | None
) -> Plan:
    config, task = program.config, program.task
    work = task.full_work(config.model, config.data)
    per_unit = flops_lib.model_flops(task, config.model, program.shapes, program.lr_multipliers)
    total = flops_lib.step_flops(per_unit, work)
    steps = np.array([speed.best, speed.worst])  # seconds
    hours = config.num_steps * steps / 3600
    chip_hours = topology.chips * hours
    parts = {
        "matrix products": speed.products + speed.kernels,
        "HBM (element-wise work and copies)": speed.others,
        **{f"{kind} over the network": seconds for kind, seconds in speed.collectives.items()},
    }
    return dataclasses.replace(
        plan,
        speed=speed,
        model_flops=total,
        mfu=_pair(total / (steps * topology.chips * topology.chip.flops)),
        tokens_per_second=_pair(work.tokens / steps),
        images_per_second=_pair(work.images / steps),
        dominates=max(parts, key=lambda name: parts[name]),
        hours=_pair(hours),
        chip_hours=_pair(chip_hours),
        cost=None if price is None else _pair(price * chip_hours),
    )


def speed(cost: hlo.Cost, topology: Topology, devices: Sequence[Any]) -> Speed:
    """Seconds of a program on one device; `devices` are those of the mesh, in its order."""
    chip = topology.chip
    kernels, unknown = _kernel_seconds(cost, chip)
    seconds: dict[str, float] = {}
    overlapped = 0.0
    for item, count in cost.collectives:
        one = count * transfer_seconds(item, topology, devices)
        seconds[item.kind] = seconds.get(item.kind, 0.0) + one
        overlapped += one if item.overlapped else 0.0
    computing = cost.cycles / chip.clock + kernels
    moving = sum(seconds.values())
    return Speed(
        cycles=cost.cycles,
        clock=chip.clock,
        products=cost.product_cycles / chip.clock,
        others=(cost.cycles - cost.product_cycles) / chip.clock,
        kernels=kernels,
        collectives=seconds,
        overlapped=overlapped,
        wire_bytes={kind: chip.devices * size for kind, size in cost.wire_bytes().items()},
        # Synchronous transfers never overlap.
        best=max(computing, overlapped) + moving - overlapped,
        worst=computing + moving,
        dynamic_loops=sorted(set(cost.dynamic_loops)),
        without_estimate=cost.without_estimate,
        unknown_kernels=unknown,
    )


def transfer_seconds(item: hlo.Collective, topology: Topology, devices: Sequence[Any]) -> float:
    """Seconds of one collective at full bandwidth, without latencies.

    Each torus axis that the group spans contributes two links if it is a ring, otherwise one. A collective
    over several slices runs in two parts: within each slice, then between slices on each device's share.
    """
    chip = topology.chip
    places = [devices[index] for index in item.group]
    slices = {getattr(place, "slice_index", 0) for place in places}
    within = len(places) // len(slices)
    seconds = 0.0
    if within > 1 or item.kind == "collective-permute":
        links = 0
        for axis in range(chip.torus_axes):
            extent = len({place.coords[axis] for place in places})
            if extent > 1:
                links += 2 if extent == topology.shape[axis] and topology.wrapped(axis) else 1
        if item.kind == "collective-permute":
            links = min(links, 1) if len(slices) == 1 else 0
        bandwidth = max(links, 1) * chip.link_bandwidth / chip.devices
        seconds += hlo.wire_bytes(item.kind, item.payload, within) / bandwidth
    if len(slices) > 1:
        between = hlo.wire_bytes(item.kind, item.payload / within, len(slices))
        seconds += between / (chip.dcn_bandwidth / chip.devices)
    return seconds


def _kernel_seconds(cost: hlo.Cost, chip: Chip) -> tuple[float, list[str]]:
    """Roofline of the kernels: (seconds, names of kernels with unknown operations)."""
    seconds, unknown = 0.0, set()
    for kernel, count in cost.kernels:
        touched = kernel_bytes(kernel)
        operations = attention_flops(kernel)
        if operations is None:
            unknown.add(kernel.name)
        by_compute = (operations or 0.0) / (chip.flops / chip.devices)
        by_memory = touched / (chip.hbm_bandwidth / chip.devices)
        seconds += count * max(by_compute, by_memory)
    return seconds, sorted(unknown)


def kernel_bytes(kernel: hlo.Kernel) -> float:
    """Bytes that a kernel reads and writes; of a stacked cache, it reads one layer."""
    shapes = (*kernel.operands, *kernel.results)
    if not kernel.name.startswith(CACHED_ATTENTION):
        return sum(shape.bytes for shape in shapes)
    return sum(shape.bytes / (shape.dims[0] if len(shape.dims) == 5 else 1) for shape in shapes)


# Products of the size of the score matrix in each splash-attention kernel.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "dkv_fused": 5}


def attention_flops(kernel: hlo.Kernel) -> float | None:
    """Operations of an attention kernel from its shapes, recomputed scores included; None for others.

    A causal splash kernel computes half of the scores. Only it takes query positions besides the two arrays
    of segment ids.
    """
    if kernel.name.startswith(CACHED_ATTENTION):
        *_, query, key, _ = (shape.dims for shape in kernel.operands)
        return 4 * math.prod(query) * key[-2]
    match = re.search(r"splash\w*?_(fwd|dq|dkv)", f"{kernel.name} {kernel.source}")
    arrays = [
        shape.dims for shape in kernel.operands if len(shape.dims) >= 3 and shape.dtype in ("bf16", "f32")
    ]
    if match is None or len(arrays) < 3:
        return None
    query, key, value = arrays[:3]
    phase = match[1]
    # Only the fused kernel also returns a gradient of the queries, one per block of keys.
    if phase == "dkv" and any(len(shape.dims) > len(query) for shape in kernel.results):
        phase = "dkv_fused"
    scores = math.prod(query[:-1]) * key[-2]
    if sum(shape.dtype == "s32" for shape in kernel.operands) % 2:
        scores /= 2
    return 2 * scores * _SPLASH_PRODUCTS[phase] * (query[-1] + value[-1]) / 2


def _resident(program: program_lib.Program, chip: Chip) -> tuple[float, float, float]:
    """Bytes per chip of parameters, optimizer state (and average) and batch, by their shardings."""
    state = program.state
    parts = ((state.trainable, state.frozen), (state.opt_state, state.ema), program.batch)
    return tuple(chip.devices * shard_bytes(part) for part in parts)  # pyright: ignore[reportReturnType]


def shard_bytes(tree: Any) -> float:
    """Bytes per device of arrays or ShapeDtypeStructs, by their shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _pair(values: np.ndarray) -> tuple[float, float]:
    return float(values[0]), float(values[1])
