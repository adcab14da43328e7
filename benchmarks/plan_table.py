"""The table of docs/plan.md: every size and run on five slices, each cell compiled in a process of its own.

    python benchmarks/plan_table.py --out runs/plan_table [--only stage4_expert,vila_m3_8b]

Two rows of 4,096 tokens a device, in as many steps as give the recipe's samples; parameters over 64 devices,
and once more over the next 64. Most valuable cells first; a cell that is there is not compiled again. An 8B
step takes about two minutes on two free cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from vilam3_jax.plan import topology as topology_lib

MODELS = ("vila_m3_8b", "vila_m3_40b", "vila_m3_3b", "vila_m3_13b")
STAGES = ("stage4_expert", "stage3_instruct", "stage2b_pretrain", "stage2a_align", "stage1_vision")
TOPOLOGIES = ("v5p:4x4x4", "v5p:4x8x8", "v6e:16x16", "v5e:16x16", "tpu7x:4x4x4")
RECIPE_ROWS = 128  # of configs/pods.py
STEPS = {"stage4_expert": 3600, "stage2a_align": 260}  # of the recipes that have a length of their own
NO_STAGE_1 = ("vila_m3_40b",)  # InternViT has no pooled output to train against texts


def cells():
    """(stage, model, topology), the most asked for first."""
    for stage in STAGES:
        for model in MODELS:
            if not (stage == "stage1_vision" and model in NO_STAGE_1):
                yield from ((stage, model, topology) for topology in TOPOLOGIES)


def compile_cell(stage, model, topology, file):
    """One `vilam3 plan`; returns what went wrong, or ''."""
    argv = ["plan", f"--config=configs/{stage}.py:{model}", f"--topology={topology}", f"--json={file}"]
    slices = topology_lib.parse(topology)
    rows = 2 * slices.chips * slices.chip.devices
    argv += [f"--config.data.global_rows={rows}"] if stage != "stage1_vision" else []
    argv += [f"--config.num_steps={STEPS[stage] * RECIPE_ROWS // rows}"] if stage in STEPS else []
    done = subprocess.run([sys.executable, "-m", "vilam3_jax.cli", *argv], capture_output=True, text=True)
    return (
        "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    )


def row(plan):
    """A line of the table."""
    memory, mfu = plan["memory"], plan["mfu"]
    needed = f"{memory['needed'] / 2**30:.1f} of {memory['limit'] / 2**30:.1f}"
    place = f"{plan['run']} | {plan['model']} | {plan['topology']} ({plan['chips']} chips) | {needed}"
    if mfu is None:
        return f"| {place} | does not fit | | | |"
    speed = plan["speed"]
    hours = "{:,.0f} to {:,.0f}".format(*plan["chip_hours"]) if plan["run"] in STEPS else ""
    slow, fast = sorted(value / plan["chips"] for value in plan["tokens_per_second"])
    return (
        f"| {place} | {speed['best']:.2f} to {speed['worst']:.2f} | {mfu[1]:.0%} to {mfu[0]:.0%} | "
        f"{slow:,.0f} to {fast:,.0f} | {hours} |"
    )


def main():
    """Compiles what is missing, then prints the table of what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/plan_table"))
    parser.add_argument("--only", default="", help="words that a cell's name must all have, with commas")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print("| run | model | slice | GiB a chip | s a step | MFU at most | tokens/s/chip | chip-hours |")
    print("|---|---|---|---|---|---|---|---|")
    for stage, model, topology in cells():
        name = f"{stage}-{model}-{topology.replace(':', '-')}"
        if not all(word in name for word in arguments.only.split(",")):
            continue
        file = arguments.out / f"{name}.json"
        problem = "" if file.exists() else compile_cell(stage, model, topology, file)
        if problem:
            print(f"| {stage} | {model} | {topology} | | {problem} | | | |", flush=True)
        else:
            print(row(json.loads(file.read_text())[0]), flush=True)


if __name__ == "__main__":
    main()
