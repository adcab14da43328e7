"""Compares the compiled train step of Llama-3-8B with MaxText's for the same TPU slice; needs no TPU.

    python benchmarks/vs_maxtext.py --maxtext=PYTHON [--dir=DIR] [--options=tuned|plain]

PYTHON is the interpreter of an environment with MaxText; this program runs in one with the same jax and
libtpu (Python 3.12; `pip install "maxtext[tpu]==0.2.5"` there, `pip install -e .[dev]` here). Both train on
text only: rows of 4,096 tokens, two per chip, bfloat16 matmuls, float32 AdamW, 64 chips of v5p, all weights
and gradients sharded over one FSDP axis. Both use the same compiler options: those of training
(`program.compiler_options`), or the defaults. The same parser reads both modules (`vilam3_jax/plan/hlo.py`);
the loop over chunks of our loss is counted at its maximum. Attention is a kernel in both, without an estimate
by the compiler; its roofline is added.

The comparison is refused if the operations of products or of attention differ by more than 3 %.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from vilam3_jax.runtime.chips import CHIPS
from vilam3_jax.training.program import ON_SPARSE_CORES

TOPOLOGY, PRODUCT, ROWS, LENGTH, CHUNK = "v5p:4x4x4", "v5p-128", 2, 4096, 1024
TUNED: dict[str, object] = dict.fromkeys(ON_SPARSE_CORES, True)
TUNED["xla_tpu_scoped_vmem_limit_kib"] = CHIPS["v5p"].scoped_vmem_kib
OPTIONS = {"plain": {}, "tuned": TUNED}
_ENVIRONMENT = """
import json, os, sys
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
import importlib.metadata as versions
import jax

def save(compiled, out):
    memory = compiled.memory_analysis()
    open(out + ".hlo", "w").write(compiled.as_text())
    sizes = {name: getattr(memory, name + "_size_in_bytes") for name in ("argument", "temp")}
    found = {name: versions.version(name) for name in ("jax", "libtpu")}
    json.dump({**sizes, **found}, open(out + ".json", "w"))
"""
_OURS = """
from vilam3_jax import config as config_lib
from vilam3_jax.plan import topology
from vilam3_jax.sharding import mesh
from vilam3_jax.training import program
out, chunk, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
program.compiler_options = lambda config, mesh: options
slice_ = topology.parse(TOPOLOGY)
config = config_lib.load(
    "configs/stage3_instruct.py:vila_m3_8b",
    {
        "trainable": ((r"llm/.*", 1.0), (r".*", 0.0)),
        "model.llm.vocab_size": 128256,
        "model.remat": "full",
        "data.images_per_group": 0,
        "data.rows_per_group": 1,
        "data.global_rows": ROWS * slice_.chips,
        "data.seq_len": LENGTH,
        "loss_chunk": chunk,
        "mesh.data": 1,
        "mesh.fsdp": -1,
    },
)
save(program.build(config, mesh.build_mesh(config.mesh, slice_.devices())).lower().compile(), out)
"""
_MAXTEXT = """
import maxtext
from maxtext.trainers.pre_train import train_compile
out, options = sys.argv[1], json.loads(sys.argv[2])
flags = " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
compile_ = train_compile.jit_and_compile

def noted(*args, **kwargs):
    compiled = compile_(*args, **kwargs)
    save(compiled, out)
    return compiled

train_compile.jit_and_compile = noted
base = os.path.join(list(maxtext.__path__)[0], "configs", "base.yml")
train_compile.main([
    "train_compile", base, "model_name=llama3-8b",
    "compile_topology=" + PRODUCT, "compile_topology_num_slices=1",
    f"per_device_batch_size={ROWS}", f"max_target_length={LENGTH}", "remat_policy=full",
    *(["compile_xla_flags=" + flags] if flags else []),
    "enable_checkpointing=false", "dataset_type=synthetic", "run_name=x", "base_output_directory=" + out,
])
"""


def main() -> int:
    """Compiles the modules that `--dir` lacks, and prints the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--maxtext", required=True, help="interpreter of an environment with maxtext[tpu]")
    parser.add_argument("--dir", type=Path, default=Path("vs_maxtext"), help="for the compiled modules")
    parser.add_argument("--options", default="tuned", choices=OPTIONS)
    values = parser.parse_args()
    values.dir.mkdir(parents=True, exist_ok=True)
    options = json.dumps(OPTIONS[values.options])
    sides = {
        "ours": (sys.executable, _OURS, [str(CHUNK), options]),
        "maxtext": (values.maxtext, _MAXTEXT, [options]),
    }
    constants = f"TOPOLOGY, PRODUCT, ROWS, LENGTH = {TOPOLOGY!r}, {PRODUCT!r}, {ROWS}, {LENGTH}\n"
    for name, (python, program, arguments) in sides.items():
        out = values.dir.resolve() / f"{name}-{values.options}"
        if not out.with_suffix(".json").exists():
            print(f"compiling {name}", flush=True)
            code = _ENVIRONMENT + constants + program
            subprocess.run([python, "-c", code, str(out), *arguments], check=True)
    return compare(values.dir, values.options)


def compare(folder: Path, options: str) -> int:
    """Prints the two modules of a folder; returns 1 if they cannot be compared."""
    from vilam3_jax.plan import estimate, hlo, topology

    chip = topology.parse(TOPOLOGY).chip
    rows = {}
    for name in ("ours", "maxtext"):
        said = json.loads((folder / f"{name}-{options}.json").read_text())
        cost = hlo.read((folder / f"{name}-{options}.hlo").read_text(), dynamic_trips=-(-LENGTH // CHUNK))
        kernels = [(estimate.attention_flops(kernel), times) for kernel, times in cost.kernels]
        if any(flops is None for flops, _ in kernels):
            print(f"{name}: a kernel of unknown shape: {[kernel.name for kernel, _ in cost.kernels]}")
            return 1
        attention = sum((flops or 0.0) * times for flops, times in kernels)
        waiting = sum(
            times * hlo.wire_bytes(item.kind, item.payload, len(item.group))
            for item, times in cost.collectives
            if not item.overlapped
        )
        rows[name] = {
            "cycles": cost.cycles,
            "kernels' roofline cycles": attention / chip.flops * chip.clock,
            "sum of both": cost.cycles + attention / chip.flops * chip.clock,
            "product FLOPs": cost.product_flops,
            "kernel FLOPs": attention,
            "temporary bytes": said["temp"],
            "argument bytes": said["argument"],
            **{f"wire bytes, {kind}": size for kind, size in cost.wire_bytes().items()},
            "wire bytes": sum(cost.wire_bytes().values()),
            "wire bytes beside no work": waiting,
            "jax": said["jax"],
            "libtpu": said["libtpu"],
        }
    ours, theirs = rows["ours"], rows["maxtext"]
    if (ours["jax"], ours["libtpu"]) != (theirs["jax"], theirs["libtpu"]):
        print("not comparable: other versions of jax or libtpu")
        return 1
    for part in (["product FLOPs"], ["kernel FLOPs"], ["product FLOPs", "kernel FLOPs"]):
        if abs(sum(ours[key] for key in part) / sum(theirs[key] for key in part) - 1) > 0.03:
            print(f"not comparable: {' and '.join(part)} differ by more than 3 %")
            return 1
    for key in dict.fromkeys((*ours, *theirs)):
        one, other = ours.get(key, 0.0), theirs.get(key, 0.0)
        if isinstance(one, str):
            print(f"{key:28} {one:>12} {other:>12}")
        else:
            print(
                f"{key:28} {one:12.4g} {other:12.4g}   {one / other:.3f}"
                if other
                else f"{key:28} {one:12.4g}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
