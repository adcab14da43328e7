"""`vilam3 plan --generate`: memory, speed and cost of answering questions on a TPU slice.

The programs are those of `inference.programs`, with bfloat16 weights split over all devices of the slice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vilam3_jax.data.image_processor import image_processor
from vilam3_jax.errors import UserError
from vilam3_jax.inference import generate, placement, programs
from vilam3_jax.inference.sampling import GREEDY, RowSampling
from vilam3_jax.models import kv_cache, param_paths
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.plan import estimate, hlo
from vilam3_jax.plan.compiler import Cache, Compiled
from vilam3_jax.plan.estimate import Speed
from vilam3_jax.plan.topology import Topology
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.sharding.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is asked.

    Attributes:
      slots: dialogues that are decoded together.
      prompt: tokens of a prompt, image tokens included.
      answer: tokens of an answer.
      images: inputs of the vision tower per prompt.
    """

    slots: int = 16
    prompt: int = 1024
    answer: int = 256
    images: int = 1

    def check(self, model: ModelConfig) -> None:
        """Raises UserError if the prompt does not hold its images, or the model no such dialogue."""
        image_tokens = self.images * model.tokens_per_image
        if self.prompt <= image_tokens:
            raise UserError(
                f"--prompt={self.prompt}: {self.images} image(s) alone take {image_tokens} tokens; raise it, "
                "or lower --images"
            )
        if self.prompt + self.answer > model.llm.max_positions:
            raise UserError(
                f"--prompt={self.prompt} and --answer={self.answer} exceed the {model.llm.max_positions} "
                f"positions of {model.name}; lower them"
            )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per chip.

    Attributes:
      weights: all parameters, those of the vision tower included.
      cache: keys and values of all slots.
      decode: temporary buffers of decoding, its program, and the logits of all slots.
      prefill: the same of reading one prompt, with the cache of its own row.
      needed: the larger of the two programs' totals.
      limit: memory of a chip.
    """

    weights: float
    cache: float
    decode: float
    prefill: float
    needed: float
    limit: float

    @property
    def fits(self) -> bool:
        """Whether both programs fit."""
        return self.needed <= self.limit


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """The plan of a model and a workload on one slice. Pairs are (best, worst), as in `estimate.Plan`.

    The figures after `memory` are None if the programs do not fit.

    Attributes:
      positions: size of the cache.
      token: one token in every slot, greedy.
      sampled: seconds that a token takes longer if any slot samples.
      prefill: one prompt.
      first: choosing the first token of an answer.
      read_bytes: weights and cache that a chip reads for a token in every slot.
      bandwidth_share: time to read them at full bandwidth, over the compiler's cycles and the roofline of
        kernels, without transfers.
      largest_transfer: bytes of the largest single transfer between chips for a token.
      seconds_per_token, time_to_first_token: seconds.
      tokens_per_second: of all slots.
      answers_per_hour: if every slot is always in use, and prompts are read between tokens.
      cost: of 1,000 answers, in the currency of the price.
    """

    model: str
    topology: str
    product: str
    chips: int
    devices: int
    workload: Workload
    positions: int
    memory: Memory
    token: Speed | None = None
    sampled: float = 0.0
    prefill: Speed | None = None
    first: Speed | None = None
    read_bytes: float = 0.0
    bandwidth_share: float = 0.0
    largest_transfer: float = 0.0
    seconds_per_token: tuple[float, float] | None = None
    time_to_first_token: tuple[float, float] | None = None
    tokens_per_second: tuple[float, float] | None = None
    answers_per_hour: tuple[float, float] | None = None
    cost: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {**dataclasses.asdict(self), "fits": self.memory.fits}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program and its abstract arguments, for `Cache.compile`."""

    mesh: Mesh
    jitted: Any
    arguments: tuple[Any, ...]
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """See `programs.compiler_options`."""
        return programs.compiler_options(self.mesh)

    def lower(self) -> Any:
        """Traces the program."""
        return self.jitted.lower(*self.arguments, **self.static)


class Generation:
    """The programs of a model for a slice.

    Attributes:
      params: nested ShapeDtypeStructs.
      state: of all slots.
      positions: size of the cache.
      decode: all slots.
      encode: the images of one prompt; None without images.
      prefill: the first part of one prompt; later ones cost at most as much, as all read the whole cache.
      parts: number of parts of a prompt.
    """

    def __init__(self, model: ModelConfig, mesh: Mesh, workload: Workload):
        """Traces and compiles nothing.

        Raises:
          UserError: the model cannot be split over the mesh.
        """
        self.mesh, self.model, self.workload = mesh, model, workload
        self.params = placement.abstract_params(model, mesh)
        columns, dtype = placement.head_columns(self.params), kv_cache.dtype_of(model.dtype)
        jitted = programs.build_programs(model, model.llm.vocab_size, columns, dtype, None, mesh)
        self.positions = generate.cache_size(workload.prompt + workload.answer, model.llm.max_positions)
        self.state, row = (
            jitted.start.eval_shape(self.params, rows, self.positions) for rows in (workload.slots, 1)
        )
        self.decode = Program(
            mesh,
            jitted.decode,
            (self.params, self.state, *self._decode_arguments()),
            {"size": generate.round_up(1, generate.MIN_NEW)},
        )
        self.encode, visual = None, None
        if workload.images:
            self.encode = Program(mesh, jitted.encode, (self.params, *self._images()))
            visual = jitted.encode.eval_shape(*self.encode.arguments)
        widths = generate.part_widths(workload.prompt)
        self.parts, tokens, one = len(widths), _shape((1, widths[0])), _shape((1,))
        index = None if visual is None else tokens
        self.prefill = Program(mesh, jitted.prefill, (self.params, row, one, one, tokens, index, visual))

    def _decode_arguments(self) -> tuple[Any, ...]:
        rows = self.workload.slots
        sampling = RowSampling(*(_shape(x.shape, x.dtype) for x in RowSampling.of([GREEDY] * rows)))
        lengths, active, stops = _shape((rows,)), _shape((rows,), bool), _shape((rows, generate.MAX_STOP_IDS))
        return lengths, active, lengths, sampling, None, stops, _shape(()), _shape(())

    def _images(self) -> tuple[Any, ...]:
        processor = image_processor(self.model)
        inputs = (1, generate.round_up(self.workload.images, 1))
        images = _shape((*inputs, processor.size, processor.size, 3), np.uint8)
        return images, _shape(inputs, bool), _shape((*inputs, 5)) if processor.sides else None

    def bytes_per_token(self) -> float:
        """Weights and cache, in bytes, that a device reads for a token in every slot."""
        llm = param_paths.flatten(self.params["llm"])
        read = [x for path, x in llm.items() if "lm_head" not in self.params["llm"] or "embed/" not in path]
        return estimate.shard_bytes(read) + estimate.shard_bytes(self.state.cache)


def make_plan(
    model: ModelConfig, topology: Topology, cache: Cache, workload: Workload, price: float | None = None
) -> GenerationPlan:
    """Compiles the programs of `model` for `topology` and estimates speed and cost.

    Args:
      model: section `model` of a config; its types become bfloat16.
      topology: one slice.
      cache: cache of compiled programs.
      workload: what is asked.
      price: price of a chip-hour.

    Raises:
      UserError: model, workload and slice do not match, or libtpu is missing.
    """
    if topology.slices > 1:
        raise UserError(f"{topology.name}: a model generates on one slice; plan for one and run several")
    workload.check(model)
    model = dataclasses.replace(model, dtype="bfloat16", param_dtype="bfloat16")
    devices = topology.devices()
    mesh = mesh_lib.build_mesh(MeshConfig(data=1, fsdp=1, tensor=len(devices)), devices)
    generation = Generation(model, mesh, workload)
    compiled = _Compiled(
        decode=cache.compile(generation.decode, topology),
        prefill=cache.compile(generation.prefill, topology),
        encode=None if generation.encode is None else cache.compile(generation.encode, topology),
    )
    plan = GenerationPlan(
        model=model.name,
        topology=topology.name,
        product=topology.product,
        chips=topology.chips,
        devices=len(devices),
        workload=workload,
        positions=generation.positions,
        memory=_memory(generation, topology, compiled),
    )
    if not plan.memory.fits:
        return plan
    return _with_speed(plan, generation, topology, compiled, price)


class _Compiled(NamedTuple):
    decode: Compiled
    prefill: Compiled
    encode: Compiled | None


def _memory(generation: Generation, topology: Topology, compiled: _Compiled) -> Memory:
    """All weights and slots stay on the chip; a program does not count the weights that it does not use."""
    chip = topology.chip
    weights, cache, slots = (
        estimate.shard_bytes(x) for x in (generation.params, generation.state.cache, generation.state)
    )
    tower = sum(estimate.shard_bytes(generation.params[part]) for part in ("vision_tower", "projector"))
    to_decode = compiled.decode.needed + tower - weights - cache
    to_read = compiled.prefill.needed + tower + slots - weights - cache
    if compiled.encode is not None:
        to_read = max(to_read, compiled.encode.needed - tower + slots - cache)
    found = [compiled.decode, compiled.prefill, *([compiled.encode] if compiled.encode else [])]
    limit = max(one.limit for one in found)
    return Memory(
        weights=chip.devices * weights,
        cache=chip.devices * cache,
        decode=chip.devices * to_decode,
        prefill=chip.devices * to_read,
        needed=chip.devices * (weights + cache + max(to_decode, to_read)),
        limit=chip.devices * limit or chip.hbm_bytes,
    )


def _with_speed(
    plan: GenerationPlan,
    generation: Generation,
    topology: Topology,
    compiled: _Compiled,
    price: float | None,
) -> GenerationPlan:
    chip, workload, devices = topology.chip, plan.workload, list(generation.mesh.devices.flat)
    # The loop over tokens is the only one whose trips depend on data.
    once, greedy, sampled = (
        hlo.read(compiled.decode.text, dynamic_trips=trips, costliest_branch=costliest)
        for trips, costliest in ((0, False), (1, False), (1, True))
    )
    largest = max((item.payload for item, _ in greedy.collectives), default=0.0)
    extra = estimate.speed(sampled, topology, devices).worst - estimate.speed(greedy, topology, devices).worst
    greedy.add(once, -1)
    prompt = hlo.Cost()
    prompt.add(hlo.read(compiled.prefill.text), generation.parts)
    if compiled.encode is not None:
        prompt.add(hlo.read(compiled.encode.text))
    token, first, reading = (estimate.speed(cost, topology, devices) for cost in (greedy, once, prompt))
    read = generation.bytes_per_token()
    steps, choosing, to_first = (np.array([one.best, one.worst]) for one in (token, first, reading))
    to_first = to_first + choosing
    answer = to_first + workload.answer * steps / workload.slots
    return dataclasses.replace(
        plan,
        token=token,
        sampled=extra,
        prefill=reading,
        first=first,
        read_bytes=chip.devices * read,
        bandwidth_share=read
        / (chip.hbm_bandwidth / chip.devices)
        / (token.cycles / chip.clock + token.kernels),
        largest_transfer=chip.devices * largest,
        seconds_per_token=_pair(steps),
        time_to_first_token=_pair(to_first),
        tokens_per_second=_pair(workload.slots / steps),
        answers_per_hour=_pair(3600 / answer),
        cost=None if price is None else _pair(1000 * answer / 3600 * topology.chips * price),
    )


def _shape(sizes: tuple[int, ...], dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _pair(values: np.ndarray) -> tuple[float, float]:
    return float(values[0]), float(values[1])
