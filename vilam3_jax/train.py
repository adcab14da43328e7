"""Train any stage: reads top to bottom what a run does.

    vilam3 train --config=configs/stage3_instruct.py:tiny --workdir=DIR [--config.key=value]

mesh → data → model → optimizer → step → restore → loop (evaluate → save → next batch → step → log).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from absl import flags
from etils import epath

from vilam3_jax import config as config_lib
from vilam3_jax.checkpoints import exports, run_checkpoints
from vilam3_jax.config import COMPONENTS, ConfigDict
from vilam3_jax.data import leaks
from vilam3_jax.data import loader as loader_lib
from vilam3_jax.data.experts.cards import with_card_list
from vilam3_jax.errors import UserError
from vilam3_jax.inference import heldout
from vilam3_jax.models import vila
from vilam3_jax.runtime import compat, paths, processes
from vilam3_jax.runtime import workdir as workdir_lib
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.training import device_put as batches_lib
from vilam3_jax.training import evaluation, telemetry, writers
from vilam3_jax.training import program as program_lib
from vilam3_jax.training import state as state_lib

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
      UserError: the config, data, mesh or an earlier checkpoint does not fit, or another run has `workdir`.
    """
    if config.mesh.cpu_devices:
        compat.use_cpu_devices(config.mesh.cpu_devices)
    with workdir_lib.claimed(workdir), processes.Preemption() as preemption:
        return _train(config, paths.as_path(workdir), stop_after, quiet, preemption)


def _train(
    config: ConfigDict, workdir: epath.Path, stop_after: int, quiet: bool, preemption: processes.Preemption
) -> Result:
    started = time.time()
    mesh = mesh_lib.build_mesh(config.mesh)
    writers.check(config)
    quiet = quiet or not processes.is_primary_process()

    # Model, optimizer and step.
    program = program_lib.build(config, mesh)
    program_lib.check_compiler_options(config, mesh)

    # Data.
    image_tokens = vila.tokens_per_image(config.model)
    placement = batches_lib.Placement(config, mesh)
    loader = loader_lib.build_loader(
        config, "train", tokens_per_image=image_tokens, experts=config.data.experts, held=placement.held
    )

    # Restore, or start from the exports that the config names.
    saved = run_checkpoints.RunCheckpoints(workdir, config.checkpoints_kept, config.checkpoints_kept_every)
    restored = saved.restore(program.state)
    start, clock = 0, telemetry.Clock()
    if restored:
        stored = restored.run["config"]["model"]
        state_lib.check_architecture(
            f"{workdir}/checkpoints", stored, config.model, set(COMPONENTS), bool(config.model.llm.lora_rank)
        )
        start, state, clock = restored.step, restored.state, telemetry.Clock.of(restored.run["clock"])
        # Checkpoints of before do not say.
        origin = restored.run.get("provenance", {}).get("init", config.init.to_dict())
        loader.set_state(restored.data)
    else:
        state, origin = state_lib.initial_state(config, program.state, program.optimizer)
        _print_start(program, origin, quiet)
    provenance = {"run": config.name, "data": loader.provenance, "init": origin}
    if checked := leaks.provenance(config.data.path, loader.samples.sources):
        provenance["leaks"] = checked
    if processes.is_primary_process():
        paths.write_text_atomic(workdir / "config.json", config_lib.to_json(config))

    heldout_losses = evaluation.HeldoutLosses(program, placement, image_tokens)
    evaluate = evaluation.Evaluation(heldout_losses, _answers(config, program), workdir, start)
    skipped = workdir_lib.SkippedRecords(workdir)
    batches, compiled = iter(loader), None
    last = min(config.num_steps, stop_after or config.num_steps)
    step = start
    if processes.is_primary_process() and step < last:
        (workdir / RESULT_FILE).unlink(missing_ok=True)  # of a shorter run that goes on
    with telemetry.Telemetry(
        config, workdir, start, clock, program.rates, started=started, last=last, quiet=quiet
    ) as monitor:

        def save(step: int) -> None:
            with monitor.aside("checkpoint_stall"):
                saved.save(step, state, loader.get_state(), _run_record(config, monitor.clock, provenance))
                if counted := skipped.add(loader.stats.skipped, loader.stats.missing.total()):
                    monitor.write(step, counted)

        if not start and config.eval_every and not preemption.reached(0):
            with monitor.aside("evaluation_seconds"):
                monitor.write(0, evaluate(0, state, swapped=False))
        while step < last and not preemption.reached(step):
            with monitor.input():
                batch = placement.put(next(batches))
            if compiled is None:
                with monitor.aside("compile_seconds"):
                    compiled = program.lower().compile()
                    processes.host_barrier("compiled")
            step += 1
            with monitor.step(step):
                state, metrics = compiled(state, batch)
            monitor.dispatched(step, batch, metrics)
            if config.eval_every and (step % config.eval_every == 0 or step == config.num_steps):
                with monitor.aside("evaluation_seconds"):
                    monitor.write(step, evaluate(step, state))
            if config.checkpoint_every and step % config.checkpoint_every == 0 and step < last:
                save(step)
        if step > start or not start:
            save(step)
        saved.wait()
    finished = step >= config.num_steps
    loader.close()
    heldout_losses.close()
    if processes.is_primary_process() and skipped.records:
        named = workdir / workdir_lib.SKIPPED_FILE
        print(f"{len(skipped.records)} record(s) were skipped, named in {named}", file=sys.stderr)
    if finished:
        params = state_lib.model_params(state)
        model_config = {**with_card_list(config.model.to_dict()), "kind": config.kind}
        exports.export_model(
            workdir / "export",
            params,
            model_config,
            config.model.tokenizer or None,
            provenance,
        )
    result = _result(config, workdir, step, clock, finished)
    if finished and processes.is_primary_process():
        paths.write_text_atomic(workdir / RESULT_FILE, writers.json_text(dataclasses.asdict(result), 1))
    return result


def _answers(config: ConfigDict, program: program_lib.Program) -> evaluation.Answer | None:
    if not config.eval_generate:
        return None
    placing = functools.partial(program.placing, whole_rows=True)
    return heldout.HeldoutAnswers(config, mesh_lib.rows(program.mesh), placing)


def _run_record(config: ConfigDict, clock: telemetry.Clock, provenance: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": config.to_dict(),
        "versions": run_checkpoints.versions(),
        "clock": dataclasses.asdict(clock),
        "provenance": provenance,
    }


def _result(
    config: ConfigDict, workdir: paths.PathLike, step: int, clock: telemetry.Clock, finished: bool
) -> Result:
    rows = telemetry.read_metrics(workdir)
    losses = [row["loss"] for row in rows if row.get("loss") is not None]  # None: was not finite
    heldout = [row for row in rows if "heldout_true" in row]
    part = max(1, len(losses) // 10)
    return Result(
        name=config.name,
        steps=step,
        tokens=clock.tokens,
        loss_first=float(np.mean(losses[:part])) if losses else float("nan"),
        loss_last=float(np.mean(losses[-part:])) if losses else float("nan"),
        heldout_first=heldout[0]["heldout_true"] if heldout else None,
        heldout_true=heldout[-1]["heldout_true"] if heldout else None,
        heldout_swapped=heldout[-1].get("heldout_swapped") if heldout else None,
        seconds=clock.seconds,
        tokens_per_second=clock.tokens / max(clock.seconds, 1e-9),
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


def main(argv: Sequence[str]) -> int:
    """Entry of `vilam3 train`."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run; created, or resumed from.", flag_values=values)
    flags.DEFINE_integer(
        "stop_after", 0, "Save and stop after this step (0: to the end).", lower_bound=0, flag_values=values
    )
    flags.DEFINE_boolean("quiet", False, "No progress bar.", flag_values=values)
    processes.define_flags(values)
    if {"-h", "--help", "--helpfull"} & set(argv):
        purpose = "Trains any stage; run the same command again to resume."
        names = ("workdir", "stop_after", "quiet", *processes.FLAGS)
        print(config_lib.usage("train", "--workdir=DIR", purpose, values, names))
        return 0
    config = config_lib.parse(argv, values)
    if not values["workdir"].value:
        raise UserError("--workdir=DIR is missing; the run's checkpoints and export go there")
    stop_after, quiet = cast(int, values["stop_after"].value), cast(bool, values["quiet"].value)
    with processes.group("vilam3 train", **processes.flag_values(values)):
        result = train(config, values["workdir"].value, stop_after, quiet)
        if processes.is_primary_process():
            print(writers.json_text(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    from vilam3_jax.cli import guarded

    sys.exit(guarded("train", main, sys.argv[1:]))
