"""Train any stage: reads top to bottom what a run does.

    vilam3 train --config=configs/stage3_instruct.py:tiny --workdir=DIR [--config.key=value]

mesh → data → model → optimizer → step → restore → loop (evaluate → save → next batch → step → log).
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np
from absl import flags

from vilam3_jax import checkpoints, compat, exports, paths
from vilam3_jax import config as config_lib
from vilam3_jax.config import ConfigDict
from vilam3_jax.data import loader as loader_lib
from vilam3_jax.errors import UserError
from vilam3_jax.models import trees, vila
from vilam3_jax.ops import partition
from vilam3_jax.training import mesh as mesh_lib
from vilam3_jax.training import optimizer as optimizer_lib
from vilam3_jax.training import state as state_lib
from vilam3_jax.training import step as step_lib
from vilam3_jax.training import step_guard, telemetry

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

    Raises:
      UserError: the config, data, mesh or an earlier checkpoint does not fit.
    """
    workdir = paths.as_path(workdir)
    if config.mesh.cpu_devices:
        compat.use_cpu_devices(config.mesh.cpu_devices)
    mesh = mesh_lib.build_mesh(config.mesh)

    # Data.
    graphdef, nested = vila.abstract_model(config.model, config.kind)
    image_tokens = vila.tokens_per_image(config.model)
    loader = loader_lib.build_loader(
        config, "train", tokens_per_image=image_tokens, experts=config.data.experts
    )

    # Optimizer and step.
    shapes = trees.flatten(nested)
    rates = optimizer_lib.multipliers(config, list(shapes))
    optimizer = optimizer_lib.make_optimizer(config, {path: rate for path, rate in rates.items() if rate})
    loss_fn = step_lib.make_loss(config, graphdef)
    train_step = step_lib.make_train_step(config, loss_fn, optimizer, optimizer_lib.learning_rate(config))
    abstract = state_lib.abstract_state(config, mesh, optimizer, rates)
    placed = state_lib.shardings(abstract)

    # Restore, or start from the exports that the config names.
    saved = checkpoints.RunCheckpoints(workdir, config.checkpoints_kept)
    start = saved.latest() or 0
    clock = {"tokens": 0, "seconds": 0.0}
    if start:
        state, data_state, run = saved.restore(start, abstract)
        loader.set_state(data_state)
        clock = run["clock"]
    else:
        state, origin = state_lib.initial_state(config, abstract, optimizer)
        _print_start(config, mesh, shapes, rates, origin, quiet)
    paths.write_text_atomic(workdir / "config.json", config_lib.to_json(config))

    with partition.activation_rules(mesh, config.activation_rules.to_dict()):
        evaluate = _heldout_evaluator(config, mesh, loss_fn, placed, image_tokens)
        compiled = None
        batches = iter(loader)
        writer = telemetry.MetricsWriter(workdir, start)
        bar = telemetry.progress_bar(config.name, config.num_steps, start, not quiet)
        last = min(config.num_steps, stop_after or config.num_steps)
        began = time.perf_counter() - clock["seconds"]

        def save(step: int) -> None:
            clock["seconds"] = time.perf_counter() - began
            saved.save(step, state, loader.get_state(), _run_record(config, clock))

        if not start and config.eval_every:
            writer.write(0, evaluate(state, swapped=False))
        with _preemption() as preempted:
            step = start
            while step < last and not preempted.is_set():
                waited = time.perf_counter()
                batch = next(batches)
                device_batch = jax.device_put(batch, mesh_lib.batch_shardings(batch, mesh))
                waited = time.perf_counter() - waited
                if compiled is None:
                    compiled = _compile(train_step, state, placed, device_batch)
                    stepped = time.perf_counter()
                state, metrics = compiled(state, device_batch)
                step += 1
                tokens = (
                    int(np.sum(batch["segment_ids"] > 0))
                    if "segment_ids" in batch
                    else int(np.sum(batch["text_valid"]))
                )
                clock["tokens"] += tokens
                if step % config.log_every == 0 or step == last:
                    values = {key: float(value) for key, value in jax.device_get(metrics).items()}
                    now = time.perf_counter()
                    values |= {
                        "tokens": clock["tokens"],
                        "tokens_per_second": tokens * config.log_every / (now - stepped),
                        "input_wait": waited,
                        "seconds": now - began,
                    }
                    stepped = now
                    writer.write(step, values)
                    step_guard.check_limit(config, step, values)
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
    if loader.stats.skipped_total and not quiet:
        name, reason = loader.stats.skipped[0]
        print(f"put aside {loader.stats.skipped_total} record(s), the first: {name}: {reason}")
    loader.close()
    if finished:
        params = state_lib.model_params(state)
        model_config = {**config.model.to_dict(), "kind": config.kind}
        exports.export_model(
            workdir / "export",
            params,
            model_config,
            config.model.tokenizer or None,
            {"run": config.name, "data": loader.provenance, "init": config.init.to_dict()},
        )
    result = _result(config, workdir, step, clock, finished)
    if finished:
        paths.write_text_atomic(workdir / RESULT_FILE, json.dumps(dataclasses.asdict(result), indent=1))
    return result


def _compile(train_step: Callable[..., Any], state: Any, placed: Any, batch: dict[str, jax.Array]) -> Any:
    """Compiles ahead of the loop, so that a shape or placement error comes before the first step."""
    jitted = jax.jit(
        train_step,
        in_shardings=(placed, {name: value.sharding for name, value in batch.items()}),
        out_shardings=(placed, None),
        donate_argnums=0,
    )
    return jitted.lower(state, batch).compile()


def _heldout_evaluator(
    config: ConfigDict, mesh: jax.sharding.Mesh, loss_fn: step_lib.LossFn, placed: Any, image_tokens: int
) -> Callable[..., dict[str, float]]:
    """Returns `evaluate(state, swapped=True)` -> held-out losses, always over the same batches."""
    jitted = jax.jit(step_lib.make_eval_step(loss_fn), in_shardings=(placed, None))

    def batches(swap: bool) -> Iterator[dict[str, np.ndarray]]:
        loader = loader_lib.build_loader(
            config, "heldout", tokens_per_image=image_tokens, swap_images=swap, experts=config.data.experts
        )
        try:
            for index, batch in enumerate(loader):
                if index == config.eval_batches:
                    break
                yield batch
        finally:
            loader.close()

    def mean_loss(state: Any, swap: bool) -> float:
        loss = weight = 0.0
        for batch in batches(swap):
            sums = jitted(state, jax.device_put(batch, mesh_lib.batch_shardings(batch, mesh)))
            loss += float(sums["loss"])
            weight += float(sums["weight"])
        return loss / max(weight, 1.0)

    def evaluate(state: Any, swapped: bool = True) -> dict[str, float]:
        values = {"heldout_true": mean_loss(state, False)}
        return values | {"heldout_swapped": mean_loss(state, True)} if swapped else values

    return evaluate


class _preemption:
    """Context in which SIGTERM sets an event instead of ending the process: the loop saves, then returns."""

    def __enter__(self) -> threading.Event:
        self._event = threading.Event()
        self._in_main = threading.current_thread() is threading.main_thread()
        if self._in_main:
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._event.set())
        return self._event

    def __exit__(self, *_: object) -> None:
        if self._in_main:
            signal.signal(signal.SIGTERM, self._previous)


def _run_record(config: ConfigDict, clock: dict[str, Any]) -> dict[str, Any]:
    return {"config": config.to_dict(), "versions": checkpoints.versions(), "clock": dict(clock)}


def _result(
    config: ConfigDict, workdir: paths.PathLike, step: int, clock: dict[str, Any], finished: bool
) -> Result:
    rows = telemetry.read_metrics(workdir)
    losses = [row["loss"] for row in rows if "loss" in row and math.isfinite(row["loss"])]
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
        heldout_swapped=heldout[-1]["heldout_swapped"] if heldout else None,
        seconds=clock["seconds"],
        tokens_per_second=clock["tokens"] / max(clock["seconds"], 1e-9),
        peak_rss=telemetry.peak_rss_bytes(),
        finished=finished,
    )


def _print_start(
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    shapes: dict[str, Any],
    rates: dict[str, float],
    origin: dict[str, str],
    quiet: bool,
) -> None:
    if quiet:
        return
    total = sum(leaf.size for leaf in shapes.values())
    moving = sum(leaf.size for path, leaf in shapes.items() if rates[path])
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    print(f"{config.name}: {total / 1e6:.1f} M parameters, {moving / 1e6:.2f} M trained; mesh {axes}")
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
    lines += [f"  --{name:<18} {values[name].help}" for name in ("workdir", "stop_after", "quiet")]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Entry of `vilam3 train`."""
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of the run; created, or resumed from.", flag_values=values)
    flags.DEFINE_integer(
        "stop_after", 0, "Save and stop after this step (0: to the end).", flag_values=values
    )
    flags.DEFINE_boolean("quiet", False, "No progress bar.", flag_values=values)
    if {"-h", "--help", "--helpfull"} & set(argv):
        print(_usage(values))
        return 0
    config = config_lib.parse(argv, values)
    if not values["workdir"].value:
        raise UserError("--workdir=DIR is missing; the run's checkpoints and export go there")
    stop_after, quiet = cast(int, values["stop_after"].value), cast(bool, values["quiet"].value)
    result = train(config, values["workdir"].value, stop_after, quiet)
    print(json.dumps(dataclasses.asdict(result)))
    return 0


if __name__ == "__main__":
    from vilam3_jax.cli import guarded

    sys.exit(guarded("train", main, sys.argv[1:]))
