"""From a compiled step to answers: does it fit, how fast at best, what dominates, what does it cost."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from vilam3_jax.plan import hlo
from vilam3_jax.plan.compiler import Cache
from vilam3_jax.plan.topology import Topology
from vilam3_jax.runtime.settings import flatten
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import flops as flops_lib
from vilam3_jax.training import program as program_lib
from vilam3_jax.training.chips import Chip
from vilam3_jax.training.run_config import RunConfig

ACCOUNTING = "ViT + projector + LLM, causal attention halved, padding and recomputation excluded"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per chip.

    Attributes:
      parameters, optimizer, batch: what the step gets.
      temporary: gradients, activations and the compiler's buffers; for a step that does not fit, all but the
        three above.
      needed: the most that is held at a time.
      limit: the chip's memory, or the part of it that the compiler says a program may use.
    """

    parameters: float
    optimizer: float
    batch: float
    temporary: float
    needed: float
    limit: float

    @property
    def fits(self) -> bool:
        """Whether the step can run."""
        return self.needed <= self.limit


@dataclasses.dataclass(frozen=True)
class Speed:
    """Seconds of one step on one device, by part, and what follows from them.

    Attributes:
      cycles: the compiler's estimate, loops multiplied.
      clock: cycles per second.
      products, others: seconds of fusions with and without a matrix product, by `cycles`.
      kernels: seconds of kernels by roofline.
      collectives: kind of transfer → seconds by roofline, if nothing else ran meanwhile.
      overlapped: seconds of those that the compiler runs beside other work.
      wire_bytes: kind → bytes that a chip sends.
      best: everything that can overlap does.
      worst: nothing does.
      dynamic_loops: loops counted at the most they can run.
      without_estimate: fusions that the compiler gives no estimate for; they count nothing.
      unknown_kernels: kernels counted by the memory they touch alone.
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
    """The answer for one config on one topology; all figures per chip where nothing else is said.

    `speed` and what follows from it are None for a step that does not fit. Pairs are (best, worst). `changes`
    are settings, dotted, in which a search left the config that it was given.
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
    accounting: str = ACCOUNTING
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
    """Compiles the step of `config` for `topology` and reads it.

    Args:
      config: the run.
      topology: slice or slices.
      cache: of compiled steps.
      price: of a chip-hour.
      only_if_resident: compile nothing where parameters, optimizer and batch do not fit by themselves; `needed`
        is their sum then, and nothing is said of what the step holds beside them.

    Raises:
      UserError: config and topology do not go together, or libtpu is missing.
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
        memory = Memory(*resident, max(needed - sum(resident), 0.0), needed, chip.devices * compiled.limit)
        return dataclasses.replace(plan, memory=memory)
    plan = dataclasses.replace(plan, memory=Memory(*resident, temporary, needed, chip.hbm_bytes))
    if not plan.memory.fits:  # XLA limits only temporaries, so also check the total
        return plan
    length = config.data.seq_len // int(mesh.shape["context"])
    trips = -(-length // min(config.loss_chunk, length))
    cost = hlo.read(compiled.text, dynamic_trips=trips)
    return _with_speed(plan, program, topology, _speed(cost, topology, list(mesh.devices.flat)), price)


def _with_speed(
    plan: Plan, program: program_lib.Program, topology: Topology, speed: Speed, price: float | None
) -> Plan:
    config, task = program.config, program.task
    work = task.full_work(config.model, config.data)
    per_unit = flops_lib.model_flops(task, config.model, program.shapes, program.lr_multipliers)
    total = flops_lib.step_flops(per_unit, work)
    bounds = (speed.best, speed.worst)
    hours = _pair(config.num_steps * seconds / 3600 for seconds in bounds)
    chip_hours = _pair(topology.chips * value for value in hours)
    parts = {
        "matrix products": speed.products + speed.kernels,
        "HBM (element-wise work and copies)": speed.others,
        **{f"{kind} over the network": seconds for kind, seconds in speed.collectives.items()},
    }
    return dataclasses.replace(
        plan,
        speed=speed,
        model_flops=total,
        mfu=_pair(total / (seconds * topology.chips * topology.chip.flops) for seconds in bounds),
        tokens_per_second=_pair(work.tokens / seconds for seconds in bounds),
        images_per_second=_pair(work.images / seconds for seconds in bounds),
        dominates=max(parts, key=lambda name: parts[name]),
        hours=hours,
        chip_hours=chip_hours,
        cost=None if price is None else _pair(price * value for value in chip_hours),
    )


def _speed(cost: hlo.Cost, topology: Topology, devices: Sequence[Any]) -> Speed:
    chip = topology.chip
    rate = chip.clock
    kernels, unknown = _kernel_seconds(cost, chip)
    seconds: dict[str, float] = {}
    overlapped = 0.0
    for item, count in cost.collectives:
        one = count * transfer_seconds(item, topology, devices)
        seconds[item.kind] = seconds.get(item.kind, 0.0) + one
        overlapped += one if item.overlapped else 0.0
    computing = cost.cycles / rate + kernels
    moving = sum(seconds.values())
    return Speed(
        cycles=cost.cycles,
        clock=rate,
        products=cost.product_cycles / rate,
        others=(cost.cycles - cost.product_cycles) / rate,
        kernels=kernels,
        collectives=seconds,
        overlapped=overlapped,
        wire_bytes={kind: chip.devices * size for kind, size in cost.wire_bytes().items()},
        # What is not started asynchronously stands still in any case.
        best=max(computing, overlapped) + moving - overlapped,
        worst=computing + moving,
        dynamic_loops=sorted(set(cost.dynamic_loops)),
        without_estimate=cost.without_estimate,
        unknown_kernels=unknown,
    )


def transfer_seconds(item: hlo.Collective, topology: Topology, devices: Sequence[Any]) -> float:
    """Seconds of one collective at full bandwidth, without latencies.

    Every axis of the torus along which the group extends gives two links where it is a ring, else one. Over
    several slices a collective runs in two parts: inside each, and between them with what a device then has.
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
    """Roofline of kernels: (seconds, names of those whose operations are not known)."""
    seconds, unknown = 0.0, set()
    for kernel, count in cost.kernels:
        touched = sum(shape.bytes for shape in (*kernel.operands, *kernel.results))
        operations = attention_flops(kernel)
        if operations is None:
            unknown.add(kernel.name)
        by_compute = (operations or 0.0) / (chip.flops / chip.devices)
        by_memory = touched / (chip.hbm_bandwidth / chip.devices)
        seconds += count * max(by_compute, by_memory)
    return seconds, sorted(unknown)


# Products of one score matrix's size that a splash-attention kernel does.
_SPLASH_PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4, "dkv_fused": 5}


def attention_flops(kernel: hlo.Kernel) -> float | None:
    """Operations of a splash-attention kernel from its shapes; None for any other kernel.

    A causal one computes half of the scores. It is told by the places of the queries, which it alone gets
    beside the two arrays of segments. Scores computed again count, as they take time.
    """
    match = re.search(r"splash\w*?_(fwd|dq|dkv)", f"{kernel.name} {kernel.source}")
    arrays = [
        shape.dims for shape in kernel.operands if len(shape.dims) >= 3 and shape.dtype in ("bf16", "f32")
    ]
    if match is None or len(arrays) < 3:
        return None
    query, key, value = arrays[:3]
    phase = match[1]
    # Only the fused kernel gives a gradient of the queries too: one for each block of keys.
    if phase == "dkv" and any(len(shape.dims) > len(query) for shape in kernel.results):
        phase = "dkv_fused"
    scores = math.prod(query[:-1]) * key[-2]
    if sum(shape.dtype == "s32" for shape in kernel.operands) % 2:
        scores /= 2
    return 2 * scores * _SPLASH_PRODUCTS[phase] * (query[-1] + value[-1]) / 2


def _resident(program: program_lib.Program, chip: Chip) -> tuple[float, float, float]:
    """Bytes per chip of parameters, optimizer state (and average) and batch, by their shardings."""
    state = program.state
    parts = (
        (state.trainable, state.frozen),
        (state.opt_state, state.ema),
        program.batch,
    )
    return tuple(chip.devices * _shard_bytes(part) for part in parts)  # pyright: ignore[reportReturnType]


def _shard_bytes(tree: Any) -> float:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _pair(values: Any) -> tuple[float, float]:
    first, second = values
    return first, second
