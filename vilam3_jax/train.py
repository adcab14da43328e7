"""Train any stage: reads top to bottom what a run does.

    vilam3 train --config=configs/stage3_instruct.py:tiny --workdir=DIR [--config.key=value]

mesh → data → model → optimizer → step → restore → loop (evaluate → save → next batch → step → log).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np
from absl import flags

from vilam3_jax import checkpoints, compat, exports, paths, processes
from vilam3_jax import config as config_lib
from vilam3_jax.config import ConfigDict
from vilam3_jax.data import loader as loader_lib
from vilam3_jax.errors import UserError
from vilam3_jax.models import vila
from vilam3_jax.training import batches as batches_lib
from vilam3_jax.training import mesh as mesh_lib
from vilam3_jax.training import program as program_lib
from vilam3_jax.training import state as state_lib
from vilam3_jax.training import step as step_lib
from vilam3_jax.training import telemetry

RESULT_FILE = "result.json"


@dataclasses.dataclass
class Result:
    """What a finished run reports (`<workdir>/result.json`).

    Losses are means per supervised token (per pair for stage 1). `loss_first` and `loss_last` average the
    first and the last tenth of the steps. `heldout_*` are measured after the last step, with the true images
    and with images exchanged between samples; None without held-out data or images.
    """

    name: str
    steps: int
    tokens: int
    loss_first: float
    loss_last: float
    heldout_first: float | None
    heldout_true: float | None
    heldout_swapped: float | None
    seconds: float
    tokens_per_second: float
    peak_rss: int
    finished: bool


def train(config: ConfigDict, workdir: paths.PathLike, stop_after: int = 0, quiet: bool = False) -> Result:
    """Runs `config` in `workdir`, resuming from its newest complete checkpoint.

    Args:
      config: a checked config.
      workdir: folder of the run; checkpoints, metrics and, at the end, the export go there.
      stop_after: save and stop after this step of the configured run (0: run to the end).
      quiet: no progress bar.

    Several processes call it alike; see `processes`. Only the lead one prints, and writes metrics.

    Raises:
      UserError: the config, data, mesh or an earlier checkpoint does not fit.
    """
    workdir = paths.as_path(workdir)
    if config.mesh.cpu_devices:
        compat.use_cpu_devices(config.mesh.cpu_devices)
    mesh = mesh_lib.build_mesh(config.mesh)
    quiet = quiet or not processes.lead()

    # Model, optimizer and step.
    program = program_lib.build(config, mesh)

    # Data.
    image_tokens = vila.tokens_per_image(config.model)
    placement = batches_lib.Placement(config, mesh)
    loader = loader_lib.build_loader(
        config, "train", tokens_per_image=image_tokens, experts=config.data.experts, held=placement.held
    )

    # Restore, or start from the exports that the config names.
    saved = checkpoints.RunCheckpoints(workdir, config.checkpoints_kept, config.checkpoints_kept_every)
    restored = saved.restore(program.state)
    start, clock = 0, {"tokens": 0, "seconds": 0.0}
    if restored:
        start, state, clock = restored.step, restored.state, restored.run["clock"]
        loader.set_state(restored.data)
    else:
        state, origin = state_lib.initial_state(config, program.state, program.optimizer)
        _print_start(program, origin, quiet)
    if processes.lead():
        paths.write_text_atomic(workdir / "config.json", config_lib.to_json(config))

    with program.placing():
        evaluate = _heldout_evaluator(program, placement, image_tokens)
        compiled = None
        batches = iter(loader)
        writer = telemetry.MetricsWriter(workdir, start) if processes.lead() else telemetry.NoWriter()
        bar = telemetry.progress_bar(config.name, config.num_steps, start, not quiet)
        last = min(config.num_steps, stop_after or config.num_steps)
        began = time.perf_counter() - clock["seconds"]

        uncounted: list[jax.Array] = []

        def count_tokens() -> None:
            clock["tokens"] += sum(int(tokens) for tokens in jax.device_get(uncounted))
            uncounted.clear()

        def save(step: int) -> None:
            clock["seconds"] = time.perf_counter() - began
            count_tokens()
            saved.save(step, state, loader.get_state(), _run_record(config, clock))

        if not start and config.eval_every:
            writer.write(0, evaluate(state, swapped=False))
        with processes.Preemption() as preemption:
            step = start
            while step < last and not preemption.reached(step):
                waited = time.perf_counter()
                batch = next(batches)
                device_batch = placement.put(batch)
                waited = time.perf_counter() - waited
                if compiled is None:
                    compiled = program.lower().compile()
                    stepped = time.perf_counter()
                state, metrics = compiled(state, device_batch)
                step += 1
                uncounted.append(metrics.pop("tokens"))
                if step % config.log_every == 0 or step == last:
                    values = {key: float(value) for key, value in jax.device_get(metrics).items()}
                    before = clock["tokens"]
                    count_tokens()
                    now = time.perf_counter()
                    values |= {
                        "tokens": clock["tokens"],
                        "tokens_per_second": (clock["tokens"] - before) / (now - stepped),
                        "input_wait": waited,
                        "seconds": now - began,
                    }
                    stepped = now
                    writer.write(step, values)
                    bar.set_postfix(loss=f"{values['loss']:.3f}", tok_s=f"{values['tokens_per_second']:.0f}")
                bar.update(step - bar.n)
                if config.eval_every and (step % config.eval_every == 0 or step == config.num_steps):
                    writer.write(step, evaluate(state))
                    stepped = time.perf_counter()
                if config.checkpoint_every and step % config.checkpoint_every == 0 and step < last:
                    save(step)
        bar.close()
        writer.close()
        if step > start or not start:
            save(step)
        saved.wait()
    finished = step >= config.num_steps
    aside = dict(record for part in processes.gather(loader.stats.skipped) for record in part)
    if aside and not quiet:
        print(f"put aside {len(aside)} record(s), the first: {': '.join(next(iter(aside.items())))}")
    loader.close()
    if finished:
        params = {**state["frozen"], **state["trainable"]}
        model_config = {**config.model.to_dict(), "kind": config.kind}
        exports.export_model(
            workdir / "export",
            params,
            model_config,
            config.model.tokenizer or None,
            {"run": config.name, "data": loader.provenance, "init": config.init.to_dict()},
        )
    result = _result(config, workdir, step, clock, finished)
    if finished and processes.lead():
        paths.write_text_atomic(workdir / RESULT_FILE, json.dumps(dataclasses.asdict(result), indent=1))
    return result


def _heldout_evaluator(
    program: program_lib.Program, placement: batches_lib.Placement, image_tokens: int
) -> Callable[..., dict[str, float]]:
    """Returns `evaluate(state, swapped=True)` -> held-out losses, always over the same batches."""
    config, placed = program.config, state_lib.shardings(program.state)
    jitted = jax.jit(step_lib.make_eval_step(program.loss_fn), in_shardings=(placed, None))

    def batches(swap: bool) -> Iterator[dict[str, np.ndarray]]:
        loader = loader_lib.build_loader(
            config,
            "heldout",
            tokens_per_image=image_tokens,
            swap_images=swap,
            experts=config.data.experts,
            held=placement.held,
        )
        try:
            own = iter(loader)
            for _ in range(config.eval_batches):
                batch = next(own, None)
                if not any(processes.gather(batch is not None)):
                    break
                yield loader.empty_batch() if batch is None else batch
        finally:
            loader.close()

    def mean_loss(state: Any, swap: bool) -> float:
        loss = weight = 0.0
        for batch in batches(swap):
            sums = jitted(state, placement.put(batch))
            loss += float(sums["loss"])
            weight += float(sums["weight"])
        return loss / max(weight, 1.0)

    def evaluate(state: Any, swapped: bool = True) -> dict[str, float]:
        values = {"heldout_true": mean_loss(state, False)}
        return values | {"heldout_swapped": mean_loss(state, True)} if swapped else values

    return evaluate


def _run_record(config: ConfigDict, clock: dict[str, Any]) -> dict[str, Any]:
    return {"config": config.to_dict(), "versions": checkpoints.versions(), "clock": dict(clock)}


def _result(
    config: ConfigDict, workdir: paths.PathLike, step: int, clock: dict[str, Any], finished: bool
) -> Result:
    rows = telemetry.read_metrics(workdir)
    losses = [row["loss"] for row in rows if "loss" in row]
    heldout = [row for row in rows if "heldout_true" in row]
    part = max(1, len(losses) // 10)
    return Result(
        name=config.name,
        steps=step,
        tokens=clock["tokens"],
        loss_first=float(np.mean(losses[:part])) if losses else float("nan"),
        loss_last=float(np.mean(losses[-part:])) if losses else float("nan"),
        heldout_first=heldout[0]["heldout_true"] if heldout else None,
        heldout_true=heldout[-1]["heldout_true"] if heldout else None,
        heldout_swapped=heldout[-1].get("heldout_swapped") if heldout else None,
        seconds=clock["seconds"],
        tokens_per_second=clock["tokens"] / max(clock["seconds"], 1e-9),
        peak_rss=telemetry.peak_rss_bytes(),
        finished=finished,
    )


def _print_start(program: program_lib.Program, origin: dict[str, str], quiet: bool) -> None:
    if quiet:
        return
    total = sum(leaf.size for leaf in program.shapes.values())
    moving = sum(leaf.size for path, leaf in program.shapes.items() if program.rates[path])
    axes = (
        " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1) or "one device"
    )
    print(f"{program.config.name}: {total / 1e6:.1f} M parameters, {moving / 1e6:.2f} M trained; mesh {axes}")
    for component, source in origin.items():
        print(f"  {component}: {source}")


def _usage(values: flags.FlagValues) -> str:
    lines = [
        "usage: vilam3 train --config=FILE[:ARG] --workdir=DIR [--config.KEY=VALUE ...]",
        "",
        "Trains any stage; run the same command again to resume.",
        "",
        "  --config=FILE[:ARG]  recipe and its argument, such as configs/stage3_instruct.py:tiny",
        "  --config.KEY=VALUE   change one key, such as --config.num_steps=10 or --config.mesh.fsdp=4",
    ]
    names = ("workdir", "stop_after", "quiet", *processes.FLAGS)
    lines += [f"  --{name:<20} {values[name].help}" for name in names]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Entry of `vilam3 train`."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run; created, or resumed from.", flag_values=values)
    flags.DEFINE_integer(
        "stop_after", 0, "Save and stop after this step (0: to the end).", flag_values=values
    )
    flags.DEFINE_boolean("quiet", False, "No progress bar.", flag_values=values)
    processes.define_flags(values)
    if {"-h", "--help", "--helpfull"} & set(argv):
        print(_usage(values))
        return 0
    config = config_lib.parse(argv, values)
    if not values["workdir"].value:
        raise UserError("--workdir=DIR is missing; the run's checkpoints and export go there")
    stop_after, quiet = cast(int, values["stop_after"].value), cast(bool, values["quiet"].value)
    with processes.group("vilam3 train", **processes.flag_values(values)):
        result = train(config, values["workdir"].value, stop_after, quiet)
        if processes.lead():
            print(json.dumps(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    from vilam3_jax.cli import guarded

    sys.exit(guarded("train", main, sys.argv[1:]))
