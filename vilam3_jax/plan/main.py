"""`vilam3 plan`: compiles a run's step, or generation, for a TPU slice; reports memory, speed and cost.

vilam3 plan --config=configs/stage4_expert.py:vila_m3_8b --topology=v5p:4x4x4
vilam3 plan --generate --config=configs/stage4_expert.py:vila_m3_8b --topology=v6e:2x2 --slots=64
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any, cast

from absl import flags

from vilam3_jax import config as config_lib
from vilam3_jax.errors import UserError
from vilam3_jax.plan import compiler, estimate, generation
from vilam3_jax.plan import search as search_lib
from vilam3_jax.plan import topology as topology_lib
from vilam3_jax.plan.estimate import Plan
from vilam3_jax.plan.generation import GenerationPlan, Workload
from vilam3_jax.plan.topology import Topology
from vilam3_jax.runtime import paths
from vilam3_jax.runtime.chips import GIB
from vilam3_jax.training.run_config import RunConfig


def table(plan: Plan) -> str:
    """A plan as text."""
    memory, speed = plan.memory, plan.speed
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    devices = f", {plan.devices} devices" if plan.devices != plan.chips else ""
    lines = [
        f"{plan.run} of {plan.model} on {plan.topology} ({plan.product}): {plan.chips} chips{devices}",
        f"mesh {mesh}; {plan.rows} rows a step; remat {plan.remat}",
        *([f"changed: {search_lib.as_flags(plan.changes)}"] if plan.changes else []),
        "",
        f"memory of a chip      {_verdict(memory)}",
        f"  parameters          {_gib(memory.parameters)}",
        f"  optimizer           {_gib(memory.optimizer)}",
        f"  batch               {_gib(memory.batch)}",
        f"  gradients, activations, buffers {_gib(memory.temporary)}",
    ]
    if memory.fits:
        lines += [f"  left                {_gib(memory.limit - memory.needed)}"]
    if speed is None:
        return "\n".join(lines)
    assert plan.mfu and plan.tokens_per_second and plan.images_per_second and plan.hours and plan.chip_hours
    lines += [
        "",
        f"a step                {speed.best:.3f} s, {speed.worst:.3f} s if no transfer overlaps",
        f"  matrix products     {speed.products:.3f} s  compiler's cycles at {speed.clock / 1e9:g} GHz",
        f"  all else            {speed.others:.3f} s  compiler's cycles: element-wise, copies (HBM)",
        f"  kernels             {speed.kernels:.3f} s  roofline",
    ]
    for kind, seconds in speed.collectives.items():
        size = speed.wire_bytes.get(kind, 0.0)
        lines.append(f"  {kind:<19} {seconds:.3f} s  roofline, {size / 1e9:.2f} GB a chip sends")
    lines += [
        f"  overlapped          {speed.overlapped:.3f} s of these transfers",
        f"dominates             {plan.dominates}",
        f"MFU at most           {plan.mfu[0]:.1%}, {plan.mfu[1]:.1%} without overlap  ({plan.accounting})",
        f"tokens/s              {_span(plan.tokens_per_second)}",
        f"  of a chip           {_span(plan.tokens_per_second, plan.chips)}",
        f"images/s              {_span(plan.images_per_second)}",
        f"{plan.steps:,} steps".ljust(22)
        + f"{_span(plan.hours, digits=1)} hours, {_span(plan.chip_hours)} chip-hours",
    ]
    if plan.cost is not None:
        lines.append(f"cost                  {_span(plan.cost)}")
    lines += [f"note: {note}" for note in _notes(speed)]
    if slots := plan.changes.get("data.images_per_group"):
        lines.append(f"note: samples of more than {slots} images would be skipped; ask `vilam3 data stats`")
    return "\n".join(lines)


def generation_table(plan: GenerationPlan) -> str:
    """A plan of generation as text."""
    memory, work, token = plan.memory, plan.workload, plan.token
    devices = f", {plan.devices} devices" if plan.devices != plan.chips else ""
    lines = [
        f"{plan.model} on {plan.topology} ({plan.product}): {plan.chips} chips{devices}, bfloat16",
        f"{work.slots} slots of {plan.positions:,} positions; prompts of {work.prompt:,} tokens with "
        f"{work.images} image(s), answers of {work.answer:,}",
        "",
        f"memory of a chip      {_verdict(memory)}",
        f"  weights             {_gib(memory.weights)}",
        f"  cache               {_gib(memory.cache)}",
        f"  to decode           {_gib(memory.decode)}",
        f"  to read a prompt    {_gib(memory.prefill)}",
    ]
    if token is None:
        return "\n".join(lines)
    assert plan.prefill and plan.first and plan.seconds_per_token and plan.time_to_first_token
    assert plan.tokens_per_second and plan.answers_per_hour
    computing = token.products + token.others + token.kernels
    moving = sum(token.collectives.values())
    lines += [
        "",
        f"a token in each slot  {_milliseconds(plan.seconds_per_token)}, greedy",
        f"  computing           {1e3 * computing:.3f} ms; at full bandwidth, {plan.read_bytes / GIB:.2f} GiB "
        f"take {plan.bandwidth_share:.0%} of that",
        f"  transfers           {1e3 * moving:.3f} ms at full bandwidth; the largest has "
        f"{plan.largest_transfer / 2**20:.2f} MiB",
        f"  if a slot samples   {1e3 * plan.sampled:.3f} ms more",
        f"time to first token   {_milliseconds(plan.time_to_first_token)}, without a queue",
        f"tokens/s              {_span(plan.tokens_per_second)}",
        f"answers/h             {_span(plan.answers_per_hour)}, if all slots are in use",
    ]
    if plan.cost is not None:
        lines.append(f"cost of 1,000 answers {_span(plan.cost, digits=2)}")
    return "\n".join(lines + [f"note: {note}" for note in _estimate_notes(token)])


def _milliseconds(pair: tuple[float, float]) -> str:
    return f"{_span(pair, 1e-3, 3)} ms"


def _notes(speed: Any) -> list[str]:
    notes = []
    if loops := len(speed.dynamic_loops):
        notes.append(f"{loops} loop(s) with data-dependent trips (the loss) are counted at their maximum")
    return notes + _estimate_notes(speed)


def _estimate_notes(speed: Any) -> list[str]:
    notes = []
    if speed.without_estimate:
        notes.append(f"{speed.without_estimate:.0f} fusions without an estimate count as 0")
    if speed.unknown_kernels:
        notes.append(f"kernels counted by memory traffic alone: {', '.join(speed.unknown_kernels)}")
    return notes


def _verdict(memory: estimate.Memory | generation.Memory) -> str:
    needed = f"{memory.needed / GIB:.2f} of {memory.limit / GIB:.2f} GiB"
    if memory.fits:
        return f"fits: {needed}"
    held_only = isinstance(memory, estimate.Memory) and not memory.temporary
    return f"does not fit: needs {needed}{', without gradients and activations' if held_only else ''}"


def _gib(size: float) -> str:
    return f"{size / GIB:8.2f} GiB"


def _span(pair: tuple[float, float], divisor: float = 1, digits: int = 0) -> str:
    first, second = (f"{value / divisor:,.{digits}f}" for value in pair)
    return first if first == second else f"{first} to {second}"


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 plan`; returns 0 also if the step does not fit."""
    values = flags.FlagValues()
    names = "v5p:4x4x4 or v5p-128, 2xv5p-128 for two slices; several with commas, smallest first."
    flags.DEFINE_string("topology", None, names, values)
    flags.DEFINE_integer("slices", 0, "Number of slices, instead of the topology's.", 0, flag_values=values)
    flags.DEFINE_float("price", None, "Price of a chip-hour, in any currency.", 0, flag_values=values)
    flags.DEFINE_string("json", None, "Also write the plans to this file.", values)
    flags.DEFINE_boolean("search", False, "Try meshes, remat policies and rows; print the best.", values)
    flags.DEFINE_integer("compiles", 12, "Most compiles of a search, per topology.", 1, flag_values=values)
    flags.DEFINE_string("cache", "~/.cache/vilam3/plan", "Folder of compiled steps.", values)
    flags.DEFINE_boolean("generate", False, "Plan generation with the model instead of training.", values)
    texts = dict(slots="dialogues that are decoded together", prompt="tokens of a prompt, images included")
    texts |= dict(answer="tokens of an answer", images="inputs of the vision tower per prompt")
    for name, text in texts.items():
        least = 0 if name == "images" else 1
        flags.DEFINE_integer(name, getattr(Workload, name), f"--generate: {text}.", least, flag_values=values)
    purpose = "Compiles training, or generation, for TPUs on this CPU: memory, speed, cost. Needs libtpu."
    if text := config_lib.usage(argv, "plan", "--topology=NAME[,NAME ...]", purpose, values):
        print(text)
        return 0
    config = config_lib.parse(argv, values)
    if not values["topology"].value:
        raise UserError("--topology=NAME is missing, such as --topology=v5p:4x4x4 or --topology=v5p-128")
    wanted = [topology_lib.parse(name) for name in cast(str, values["topology"].value).split(",")]
    if slices := cast(int, values["slices"].value):
        wanted = [dataclasses.replace(topology, slices=slices) for topology in wanted]
    cache = compiler.Cache(paths.as_path(cast(str, values["cache"].value)).expanduser())
    price = cast("float | None", values["price"].value)
    if price is not None and not math.isfinite(price):
        raise UserError(f"--price={price}: must be a number")
    if not values["generate"].value:
        if given := [name for name in texts if values[name].present]:
            raise UserError(f"--{given[0]} needs --generate")
    elif values["search"].value:
        raise UserError("--search plans training; leave out --search or --generate")
    elif config.task != "generative":
        raise UserError(
            f"--generate: {config.name} trains a model that generates no text; name a later stage"
        )
    plans: list[Plan | GenerationPlan] = []
    for topology in wanted:
        plans += _answer(config, topology, cache, price, values)
        if values["json"].value:  # after each topology, as a search takes long
            text = json.dumps([plan.to_dict() for plan in plans], indent=1)
            paths.write_text_atomic(paths.as_path(cast(str, values["json"].value)), text + "\n")
    if len(wanted) > 1:
        fitting = [plan for plan in plans if plan.memory.fits]
        smallest = min(fitting, key=lambda plan: plan.chips, default=None)
        found = f"{smallest.topology}, {smallest.chips} chips" if smallest else ""
        print(f"\nsmallest that fits: {found}" if found else "\nnone fits")
    return 0


def _answer(
    config: RunConfig,
    topology: Topology,
    cache: compiler.Cache,
    price: float | None,
    values: flags.FlagValues,
) -> Sequence[Plan | GenerationPlan]:
    if values["generate"].value:
        names = [field.name for field in dataclasses.fields(Workload)]
        workload = Workload(**{name: cast(int, values[name].value) for name in names})
        answering = generation.make_plan(config.model, topology, cache, workload, price)
        print(generation_table(answering))
        return [answering]
    if not values["search"].value:
        plan = estimate.make_plan(config, topology, cache, price)
        print(table(plan))
        return [plan]
    limit = cast(int, values["compiles"].value)
    print(f"{topology.name}: at most {limit} compiles", file=sys.stderr)
    before = cache.compiled
    plans = search_lib.search(
        config, topology, cache, price, limit, lambda line: print(f"  {line}", file=sys.stderr)
    )
    fitting = [plan for plan in plans if plan.memory.fits]
    print(f"{topology.name}: {len(plans)} variants ({cache.compiled - before} compiled), {len(fitting)} fit")
    for plan in fitting[:3]:
        print("\n" + table(plan))
    if not fitting and plans:
        print("\n" + table(plans[0]))
    return plans
