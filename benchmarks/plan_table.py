"""The planned steps of docs/performance.md: all sizes and stages on five slices, a process per cell.

    python benchmarks/plan_table.py --out runs/plan_table [--only stage4_expert,vila_m3_8b]

Two rows of 4,096 tokens per device, with the number of steps that gives the recipe's samples; parameters
sharded over 64 devices and replicated over the rest. If that does not fit: parameters over as many devices as
divide them, then one row per device, then one row per two devices (`mesh.context`), with more steps
accordingly. Existing cells are not compiled again. A compilation takes one core two to ten minutes.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from vilam3_jax import config as config_lib
from vilam3_jax.plan import topology as topology_lib

MODELS = ("vila_m3_3b", "vila_m3_8b", "vila_m3_13b", "vila_m3_40b")
STAGES = ("stage4_expert", "stage3_instruct", "stage2b_pretrain", "stage2a_align", "stage1_vision")
TOPOLOGIES = ("v5e:16x16", "v6e:16x16", "v5p:4x4x4", "v5p:4x8x8", "tpu7x:4x4x4")
COLUMNS = ("run", "model", "slice", "fsdp x data, rows a device", "GiB a chip", "s a step", "MFU at most")
COLUMNS += ("tokens/s/chip", "chip-hours")
RECIPE_ROWS = 128  # of configs/pods.py
STEPS = {"stage4_expert": 3600, "stage2a_align": 260}  # of the recipes that set a length
# Stage 1 has no LLM: 3B, 8B and 13B share their towers, and InternViT has no pooled output.
STAGE_1_MODEL = "vila_m3_8b"
WIDEST = {"vila_m3_40b": 128}  # devices that a parameter is sharded over: InternViT's 3,200 = 25 x 128


def cells():
    """(stage, model, topology), stage 4 first."""
    for stage in STAGES:
        for model in MODELS:
            if stage != "stage1_vision" or model == STAGE_1_MODEL:
                yield from ((stage, model, topology) for topology in TOPOLOGIES)


def attempts(stage, model, devices):
    """Flags of the recipe on `devices`, then of variants that need less memory."""
    config = config_lib.load(f"configs/{stage}.py:{model}", {})
    fsdp = min(devices, WIDEST.get(model, devices))
    everywhere = [f"--config.mesh.data={devices // fsdp}", f"--config.mesh.fsdp={fsdp}"]
    if config.task == "contrastive":
        return [[], everywhere]

    def rows(per_device):
        count = int(per_device * devices)
        length = [f"--config.num_steps={STEPS[stage] * RECIPE_ROWS // count}"] if stage in STEPS else []
        return [f"--config.data.global_rows={count}", *length]

    single = ["--config.data.rows_per_group=1"]
    single += [f"--config.data.images_per_group={-(-config.data.images_per_group // 2)}"]
    pairs = [
        "--config.mesh.context=2",
        "--config.mesh.data=-1",
        f"--config.mesh.fsdp={min(fsdp, devices // 2)}",
    ]
    return [rows(2), rows(2) + everywhere, rows(1) + everywhere + single, rows(1 / 2) + pairs + single]


def compile_cell(stage, model, topology, file):
    """Runs `vilam3 plan` until an attempt fits; returns the error, or ''."""
    slices, part = topology_lib.parse(topology), file.with_suffix(".part")
    for flags in attempts(stage, model, slices.chips * slices.chip.devices):
        argv = ["plan", f"--config=configs/{stage}.py:{model}", f"--topology={topology}", f"--json={part}"]
        done = subprocess.run(
            [sys.executable, "-m", "vilam3_jax.cli", *argv, *flags], capture_output=True, text=True
        )
        if done.returncode:
            return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        if json.loads(part.read_text())[0]["fits"]:
            break
    part.rename(file)
    return ""


def row(plan):
    """A line of the table."""
    memory, mfu = plan["memory"], plan["mfu"]
    needed = f"{memory['needed'] / 2**30:.1f} of {memory['limit'] / 2**30:.1f}"
    fsdp = plan["mesh"]["fsdp"] * plan["mesh"].get("fsdp_line", 1)
    split = f"{fsdp} x {plan['mesh']['data']}, {plan['rows'] / plan['devices']:g}"
    slice_ = f"{plan['topology']} ({plan['chips']} chips)"
    place = f"{plan['run']} | {plan['model']} | {slice_} | {split} | {needed}"
    if not plan["fits"]:
        return f"| {place} | does not fit | | | |"
    speed = plan["speed"]
    hours = "{:,.0f} to {:,.0f}".format(*plan["chip_hours"]) if plan["run"] in STEPS else ""
    slow, fast = sorted(value / plan["chips"] for value in plan["tokens_per_second"])
    return (
        f"| {place} | {speed['best']:.2f} to {speed['worst']:.2f} | {mfu[1]:.0%} to {mfu[0]:.0%} | "
        f"{slow:,.0f} to {fast:,.0f} | {hours} |"
    )


def summary(stage, out):
    """A summary of one stage, models by slices: seconds per step, MFU at most, GiB per chip."""
    lines = [f"| {stage} | {' | '.join(TOPOLOGIES)} |", "|---" * (len(TOPOLOGIES) + 1) + "|"]
    for model in MODELS:
        shown = []
        for topology in TOPOLOGIES:
            file = cell_file(out, stage, model, topology)
            shown.append(short(json.loads(file.read_text())[0]) if file.exists() else "")
        if any(shown):
            name = ", ".join(MODELS[:3]) if model == STAGE_1_MODEL and stage == "stage1_vision" else model
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def short(plan):
    """A cell of `summary`."""
    memory, mfu = plan["memory"], plan["mfu"]
    needed = f"{memory['needed'] / 2**30:.1f} GiB"
    if not plan["fits"]:
        return f"does not fit, {needed}"
    rows = plan["rows"] / plan["devices"]
    fewer = "" if rows == 2 or plan["run"] == "stage1_vision" else f", {rows:g} rows a device"
    speed = plan["speed"]
    times = f"{speed['best']:.2f} to {speed['worst']:.2f} s"
    return f"{times}, {100 * mfu[1]:.0f} to {mfu[0]:.0%}, {needed}{fewer}"


def cell_file(out, stage, model, topology):
    """Where a cell's plan is kept."""
    return out / f"{stage}-{model}-{topology.replace(':', '-')}.json"


def main():
    """Compiles missing cells, then prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/plan_table"))
    parser.add_argument("--only", default="", help="words that a cell's name must all have, with commas")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for stage, model, topology in cells():
        file = cell_file(arguments.out, stage, model, topology)
        if not all(word in file.stem for word in arguments.only.split(",")):
            continue
        problem = "" if file.exists() else compile_cell(stage, model, topology, file)
        if problem:
            print(f"| {stage} | {model} | {topology} | | | {problem} | | | |", flush=True)
        else:
            print(row(json.loads(file.read_text())[0]), flush=True)
    for stage in STAGES:
        print(f"\n{summary(stage, arguments.out)}")


if __name__ == "__main__":
    main()
