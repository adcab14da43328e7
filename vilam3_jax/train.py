"""Trains any stage: mesh → model and step → data → state → loop.

vilam3 train --config=configs/stage3_instruct.py:tiny --workdir=DIR [--config.key=value]
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from absl import flags
from etils import epath

from vilam3_jax import config as config_lib
from vilam3_jax.checkpoints import exports, run_checkpoints
from vilam3_jax.data import leaks, preflight
from vilam3_jax.data.experts.cards import with_card_list
from vilam3_jax.data.loader import Loader, build_loader
from vilam3_jax.errors import UserError
from vilam3_jax.inference import heldout
from vilam3_jax.runtime import compat, paths, processes
from vilam3_jax.runtime import workdir as workdir_lib
from vilam3_jax.runtime.settings import describe
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import evaluation, initialization, resumption, telemetry, writers
from vilam3_jax.training import program as program_lib
from vilam3_jax.training.device_put import DevicePut
from vilam3_jax.training.hooks import Hook, run_hooks
from vilam3_jax.training.program import Program
from vilam3_jax.training.run_config import RunConfig
from vilam3_jax.training.train_state import TrainState

RESULT_FILE = "result.json"
logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Result:
    """Summary of a run (`<workdir>/result.json`).

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


def train(config: RunConfig, workdir: paths.PathLike, stop_after: int = 0, quiet: bool = False) -> Result:
    """Runs `config` in `workdir`, resuming from its newest complete checkpoint.

    Collective: all processes call it with the same arguments, see `runtime.processes`.

    Args:
      config: config of the run.
      workdir: folder of the run, for checkpoints, metrics and, at the end, the export.
      stop_after: save and stop after this step (0: run to the end).
      quiet: no progress bar.

    Raises:
      UserError: config, data, mesh or an earlier checkpoint do not fit, or another run uses `workdir`.
      KeyboardInterrupt: Ctrl-C was pressed; the run is saved unless it was pressed twice.
    """
    if config.mesh.cpu_devices:
        compat.use_cpu_devices(config.mesh.cpu_devices)
    with workdir_lib.claimed(workdir), processes.Preemption() as preemption:
        result = _train(config, paths.as_path(workdir), stop_after, quiet, preemption)
    if preemption.interrupted and not result.finished:
        logger.warning("%s: saved step %d; the same command resumes", config.name, result.steps)
        raise KeyboardInterrupt
    return result


def _train(
    config: RunConfig, workdir: epath.Path, stop_after: int, quiet: bool, preemption: processes.Preemption
) -> Result:
    started = time.time()
    quiet = quiet or not processes.is_primary_process()
    writers.check(config.telemetry)

    # Mesh, model and step.
    mesh = mesh_lib.build_mesh(config.mesh)
    program_lib.check_compiler_options(config.compiler_options, mesh)
    program = program_lib.build(config, mesh)

    # Data.
    device_put = DevicePut(program.task.batch_format(config.data, config.model).units, mesh)
    loader = build_loader(
        config.data,
        config.model,
        program.task.batch_format,
        "train",
        seed=config.seed,
        local_units=device_put.local_units,
    )

    if program.task.batch_format.has_dialogues:
        _preflight(config, loader, workdir, quiet)

    # State: from the newest checkpoint, or fresh.
    checkpoints = run_checkpoints.RunCheckpoints(
        workdir, config.checkpoints_kept, config.checkpoints_kept_every
    )
    start, state, clock, origin, changed = _restore(program, checkpoints, loader, workdir)
    if start and not quiet:
        _print_resumption(config, start, changed)
    elif not quiet:
        _print_start(program, origin)
    provenance = _provenance(config, loader, origin)
    last = min(config.num_steps, stop_after or config.num_steps)
    if processes.is_primary_process():
        _write_config(config, workdir, start, bool(changed))
        if start < last:
            (workdir / RESULT_FILE).unlink(missing_ok=True)  # of a shorter run that is continued

    # Loop.
    losses = evaluation.HeldoutLosses(program, device_put)
    evaluate = evaluation.Evaluation(losses, _answers(program), workdir, start)
    skipped = workdir_lib.SkippedRecords(workdir)
    batches, step_fn, step = iter(loader), None, start
    with telemetry.Telemetry(
        program, workdir, start, clock, started=started, last=last, quiet=quiet
    ) as monitor:

        def measure(step: int, state: TrainState) -> None:
            monitor.write(step, evaluate(step, state, swapped=step > 0))

        def save(step: int, state: TrainState) -> None:
            record = {
                "config": config.to_dict(),
                "versions": run_checkpoints.versions(),
                "clock": dataclasses.asdict(monitor.clock),
                "provenance": provenance,
            }
            checkpoints.save(step, state.to_tree(), loader.get_state(), record)
            if counted := skipped.add(loader.stats.skipped, loader.stats.missing.total()):
                monitor.write(step, counted)

        evaluating = functools.partial(monitor.pause, "evaluation_seconds")
        saving = functools.partial(monitor.pause, "checkpoint_stall")
        hooks = (
            Hook(measure, every=config.eval_every, final=config.num_steps, around=evaluating),
            Hook(save, every=config.checkpoint_every, around=saving),
        )
        if not start and not preemption.reached(0):
            run_hooks(hooks[:1], 0, state)
        while step < last and not preemption.reached(step):
            with monitor.input():
                batch = device_put(next(batches))
            if step_fn is None:
                with monitor.pause("compile_seconds"):
                    step_fn = program.lower().compile()
                    processes.host_barrier("compiled")
            step += 1
            with monitor.step(step):
                state, metrics = step_fn(state, batch)
            monitor.dispatched(step, batch, metrics)
            run_hooks(hooks, step, state)
        if step > start or not start:
            with saving():
                save(step, state)
        checkpoints.wait()

    # Results.
    loader.close()
    losses.close()
    if processes.is_primary_process() and skipped.records:
        named = workdir / workdir_lib.SKIPPED_FILE
        logger.warning("%d record(s) were skipped, see %s", len(skipped.records), named)
    finished = step >= config.num_steps
    if finished:
        model = {**with_card_list(config.model.to_dict()), "kind": config.task}
        tokenizer = config.model.tokenizer or None
        exports.export_model(workdir / "export", state.params(), model, tokenizer, provenance)
    result = _result(config, workdir, step, monitor.clock, finished)
    if finished and processes.is_primary_process():
        paths.write_text_atomic(workdir / RESULT_FILE, writers.json_text(dataclasses.asdict(result), 1))
    return result


def _preflight(config: RunConfig, loader: Loader, workdir: epath.Path, quiet: bool) -> None:
    """Refuses data without targets, and says what else looks wrong; texts go to `preflight.txt`."""
    found = preflight.check(loader, config.data, preflight.SAMPLES, shown=3)
    problems = processes.gather(found.problem())
    if all(problems):
        raise UserError(f"config data.path={config.data.path}: {problems[0]}")
    if processes.is_primary_process():
        paths.write_text_atomic(workdir / "preflight.txt", "\n\n".join([*found.lines(), *found.texts, ""]))
    if not quiet:
        print("\n".join(f"data: {line}" for line in found.lines()))


def _restore(
    program: Program, checkpoints: run_checkpoints.RunCheckpoints, loader: Loader, workdir: epath.Path
) -> tuple[int, TrainState, telemetry.Clock, dict[str, str], dict[str, str]]:
    """Step, state, clock, origin of each component, and changed settings; restores the loader too."""
    config = program.config
    changes_of_state = functools.partial(resumption.changes_of_state, config=config)
    restored = checkpoints.restore(program.state.to_tree(), changes_of_state)
    if restored is None:
        state, origin = program.initial_state()
        return 0, state, telemetry.Clock(), origin, {}
    changed = resumption.changes(restored.run["config"], config)
    resumption.check_init(changed)
    stored, components = restored.run["config"]["model"], set(config.init.to_dict())
    if differences := initialization.architecture_differences(
        stored, config.model, components, bool(config.model.llm.lora_rank)
    ):
        raise UserError(initialization.mismatch(f"{workdir}/checkpoints", differences))
    # Absent in older checkpoints.
    origin = restored.run.get("provenance", {}).get("init", config.init.to_dict())
    loader.set_state(restored.data)
    clock = telemetry.Clock.of(restored.run["clock"])
    return restored.step, TrainState.from_tree(restored.state), clock, origin, changed


def _write_config(config: RunConfig, workdir: epath.Path, start: int, changed: bool) -> None:
    """Writes `config.json`, or `config_from_step_N.json` beside it if a resumed run changes settings."""
    target = workdir / "config.json"
    if start and target.exists():
        if not changed:
            return
        target = workdir / f"config_from_step_{start}.json"
    paths.write_text_atomic(target, config.to_json())


def _provenance(config: RunConfig, loader: Loader, origin: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"run": config.name, "data": loader.provenance, "init": origin}
    if checked := leaks.provenance(config.data.path, loader.samples.sources):
        found["leaks"] = checked
    return found


def _answers(program: Program) -> evaluation.Answer | None:
    config = program.config
    if not config.eval_generate:
        return None
    return heldout.HeldoutAnswers(
        config.data,
        config.model,
        config.seed,
        config.eval_generate,
        mesh_lib.rows(program.mesh),
        functools.partial(program.context, whole_rows=True),
        program.annotate,
    )


def _result(
    config: RunConfig, workdir: paths.PathLike, step: int, clock: telemetry.Clock, finished: bool
) -> Result:
    rows = telemetry.read_metrics(workdir)
    losses = [row["loss"] for row in rows if row.get("loss") is not None]  # None: was not finite
    measured = [row for row in rows if "heldout_true" in row]
    part = max(1, len(losses) // 10)
    return Result(
        name=config.name,
        steps=step,
        tokens=clock.tokens,
        loss_first=float(np.mean(losses[:part])) if losses else float("nan"),
        loss_last=float(np.mean(losses[-part:])) if losses else float("nan"),
        heldout_first=measured[0]["heldout_true"] if measured else None,
        heldout_true=measured[-1]["heldout_true"] if measured else None,
        heldout_swapped=measured[-1].get("heldout_swapped") if measured else None,
        seconds=clock.seconds,
        tokens_per_second=clock.tokens / max(clock.seconds, 1e-9),
        peak_rss=telemetry.peak_rss_bytes(),
        finished=finished,
    )


def _sentences(result: Result, config: RunConfig, workdir: str) -> list[str]:
    """What a run did, what it shows, where it is, and the next command."""
    generative = config.task == "generative"
    lines = [
        f"{result.name}: step {result.steps} of {config.num_steps}; training loss "
        f"{result.loss_first:.4g} → {result.loss_last:.4g}; {result.tokens / 1e3:,.1f} thousand tokens in "
        f"{result.seconds:,.0f} s ({result.tokens_per_second:,.0f} a second); at most "
        f"{result.peak_rss / 1e9:.1f} GB of memory"
    ]
    if result.heldout_true is not None:
        unit = "supervised token" if generative else "pair"
        held_out = f"held-out loss per {unit}: {result.heldout_first:.4g} → {result.heldout_true:.4g}"
        if result.heldout_swapped is not None:
            held_out += f"; {result.heldout_swapped:.4g} with the images of other samples"
        lines.append(held_out)
    if not result.finished:
        return [*lines, f"saved in {workdir}; the same command resumes"]
    lines.append(f"written: {workdir}/export (the model), {workdir}/{RESULT_FILE} (these figures)")
    lines.append(f"next: vilam3 report --workdir={workdir}")
    if generative:
        lines.append(f"      vilam3 chat --checkpoint={workdir} --image=IMAGE --prompt=QUESTION")
    return lines


def _print_resumption(config: RunConfig, start: int, changed: dict[str, str]) -> None:
    if start < config.num_steps:
        print(f"{config.name}: resuming at step {start} of {config.num_steps}")
    else:
        print(f"{config.name}: finished at step {start}; nothing to do")
        if changed:
            print("  the settings below are not those of the run; use another --workdir to train with them")
    for key, change in changed.items():
        print(f"  {key}: {change}")


def _print_start(program: Program, origin: dict[str, str]) -> None:
    total = sum(leaf.size for leaf in program.shapes.values())
    trained = sum(leaf.size for path, leaf in program.shapes.items() if program.lr_multipliers[path])
    axes = (
        " x ".join(f"{axis} {size}" for axis, size in program.mesh.shape.items() if size > 1) or "one device"
    )
    print(
        f"{program.config.name}: {total / 1e6:.1f} M parameters, {trained / 1e6:.2f} M trained; mesh {axes}"
    )
    for component, source in origin.items():
        print(f"  {component}: {source}")


def main(argv: Sequence[str]) -> int:
    """Runs `vilam3 train`."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run; created, or resumed from.", flag_values=values)
    flags.DEFINE_integer(
        "stop_after", 0, "Save and stop after this step (0: to the end).", lower_bound=0, flag_values=values
    )
    flags.DEFINE_boolean("quiet", False, "No progress bar.", flag_values=values)
    flags.DEFINE_boolean(
        "print", False, "Print every key with its value and meaning, and stop.", flag_values=values
    )
    processes.define_flags(values)
    purpose = "Trains any stage; run the same command again to resume."
    if text := config_lib.usage(argv, "train", "--workdir=DIR", purpose, values):
        print(text)
        return 0
    config = config_lib.parse(argv, values)
    if values["print"].value:
        for key, value, meaning in describe(config):
            print(f"{key} = {value!r}\n    {meaning}")
        return 0
    if not values["workdir"].value:
        raise UserError("--workdir=DIR is missing; the run's checkpoints and export go there")
    stop_after, quiet = cast(int, values["stop_after"].value), cast(bool, values["quiet"].value)
    with processes.group("vilam3 train", **processes.flag_values(values)):
        result = train(config, values["workdir"].value, stop_after, quiet)
        if processes.is_primary_process():
            print("\n".join(_sentences(result, config, values["workdir"].value)))
    return 0


if __name__ == "__main__":
    from vilam3_jax.cli import guarded

    sys.exit(guarded("train", main, sys.argv[1:]))
