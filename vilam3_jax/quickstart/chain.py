"""`make quickstart`: from real images to an answering model and a report, by a chain of commands.

Each step is an ordinary command in its own process, exactly as a user would type it. A finished step with the
same command, inputs and code is reused; a training run resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vilam3_jax import config as config_lib
from vilam3_jax.checkpoints import run_checkpoints
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.datasets import samples as samples_lib
from vilam3_jax.errors import UserError
from vilam3_jax.report import summary
from vilam3_jax.runtime import paths

STAGES = ("stage1_vision", "stage2a_align", "stage2b_pretrain", "stage3_instruct", "stage4_expert")
EXPERTS = ("BRAINSEG", "BRAINTUMOR", "PNEUMONIA")
ORGANS = "ORGANS"
# Label sources whose maps are imported as ORGANS records.
MAPS = "tool:TotalSegmentator reference map"
PHANTOM_MAPS = "ground-truth:generated label map"
RUN_FILE = "quickstart.json"
CPUINFO = Path("/proc/cpuinfo")
STAGE4_ARMS = ("stage4_no_experts", "stage4_experts", "stage4_falsified", "majority")
# Questions of each type that an expert can answer, and of each other type.
EVAL_LIMITS = {"smoke": (6, 6), "default": (12, 12), "full": (20, 20)}
_VILAM3, _EXPERTS = ("-m", "vilam3_jax.cli"), ("-m", "vilam3_experts")


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the chain.

    Attributes:
      name: unique; also the name of its log file.
      argv: arguments of the Python interpreter.
      makes: file or folder that exists when the step has finished.
      after: names of the steps whose results it reads.
      resumable: the command continues from what an interrupted run left in `makes`.
    """

    name: str
    argv: tuple[str, ...]
    makes: Path
    after: tuple[str, ...] = ()
    resumable: bool = False


def samples_step(samples: Path, size: str) -> Step:
    """Fetches the samples, or generates phantoms for the smoke run."""
    module = "vilam3_jax.datasets.phantoms" if size == "smoke" else "vilam3_jax.datasets.samples"
    return Step("samples", ("-m", module, "--out", str(samples)), samples / "samples.json", resumable=True)


def plan(run: Path, samples: Path, size: str, seed: int) -> list[Step]:
    """The steps that follow `samples_step`; `seed` is that of the training runs."""
    phantoms = size == "smoke"
    data, annotations = run / "data", run / "annotations"
    into = ("--data", str(samples), "--out", str(annotations))
    maps = PHANTOM_MAPS if phantoms else MAPS
    argvs: dict[str, tuple[str, ...]] = {
        "import_organs": ("import", "--masks", str(samples), "--source", maps, "--expert", ORGANS, *into)
    }
    for expert in () if phantoms else EXPERTS:
        argvs[f"annotate_{expert.lower()}"] = ("annotate", "--expert", expert, *into)
    steps = [
        Step(name, (*_EXPERTS, *argv), annotations, ("samples",), resumable=True)
        for name, argv in argvs.items()
    ]
    argv = (*_VILAM3, "prepare", "quickstart", "--source", str(samples), "--out", str(data), "--size", size)
    annotated = tuple(step.name for step in steps)
    steps.append(Step("prepare", (*argv, "--annotations", str(annotations)), data, annotated))
    if phantoms:
        tokenizer = run / "tokenizer"
        argv = ("-m", "vilam3_jax.datasets.train_tokenizer", "--data", str(data), "--out", str(tokenizer))
        steps.append(Step("tokenizer", (*argv, "--vocab_size=2048"), tokenizer, ("prepare",)))
    else:
        llm = run / "llm"
        tokenizer = llm / "tokenizer"
        gguf = samples_lib.asset(samples, "smollm2_gguf")
        argv = (*_VILAM3, "convert", "import", "--source", str(gguf), "--out", str(llm))
        steps.append(Step("import_llm", argv, llm, ("samples",)))
    base = ("prepare", steps[-1].name)
    for index, stage in enumerate(STAGES):
        folder, before = run / "stages" / stage, STAGES[:index][-1:]
        argv = (*_VILAM3, "train", f"--config=configs/quickstart/{stage}.py:{size}", f"--workdir={folder}")
        argv += (
            f"--config.seed={seed}",
            f"--config.data.path={data}",
            f"--config.data.annotations={annotations}",
        )
        argv += (f"--config.model.tokenizer={tokenizer}",)
        if before:
            part = "vision_tower" if stage == "stage2a_align" else "everything"
            argv += (f"--config.init.{part}={run / 'stages' / before[0] / 'export'}",)
        if stage == "stage2a_align" and not phantoms:
            argv += (f"--config.init.llm={run / 'llm'}",)
        steps.append(Step(stage, argv, folder / "result.json", (*base, *before), resumable=True))
    steps += _evaluation(run, data, annotations, size, base)
    report = (*_VILAM3, "report", f"--workdir={run}")
    steps.append(Step("report", report, run / "report.html", tuple(step.name for step in steps)))
    return steps


def _evaluation(run: Path, data: Path, annotations: Path, size: str, base: tuple[str, ...]) -> list[Step]:
    def step(name: str, stage: str, flags: tuple[str, ...], out: Path, makes: Path) -> Step:
        export = run / "stages" / stage / "export"
        argv = (*_VILAM3, "evaluate", f"--data={data}", f"--checkpoint={export}", *flags, f"--out={out}")
        return Step(f"eval_{name}", argv, makes, (*base, stage))

    folder = run / "eval"
    scores = folder / "retrieval.json"
    steps = [step("retrieval", "stage1_vision", ("--protocol=retrieval@2",), scores, scores)]
    limit, other = EVAL_LIMITS[size]
    questions = ("--protocol=quickstart@1", f"--limit={limit}", f"--limit_other={other}")
    questions += (f"--annotations={annotations}",)
    arms = STAGE4_ARMS
    if size != "default":  # has no time for them
        out, arms = folder / "stage3", ("stage4_blank", *arms)
        flags = ("--arm=stage3", *questions)
        steps.append(step("stage3", "stage3_instruct", flags, out, out / "result.json"))
    flags = (f"--arm={','.join(arms)}", *questions)  # one process: the model is compiled once
    steps.append(step("stage4", "stage4_expert", flags, folder, folder / arms[-1] / "result.json"))
    return steps


def run_chain(run: Path, samples: Path, size: str, fresh: bool, seed: int = 0) -> None:
    """Runs the missing and outdated steps, in order.

    Raises:
      UserError: a step failed; it has printed why.
    """
    run, samples = run.absolute(), samples.absolute()
    _claim(run, fresh)
    record = json.loads((run / RUN_FILE).read_text())
    fingerprints: dict[str, str] = {}
    code = _code_hash()
    steps = [samples_step(samples, size)]
    number = 0
    while number < len(steps):
        step = steps[number]
        number += 1
        parts = [code, *step.argv, *(fingerprints[name] for name in step.after)]
        fingerprints[step.name] = hashlib.sha256("\0".join(parts).encode()).hexdigest()
        done = record["steps"].get(step.name, {})
        total = len(steps) if number > 1 else "..."
        head = f"[{number}/{total}] {step.name}"
        current = done.get("fingerprint") == fingerprints[step.name]
        if current and done.get("finished") and step.makes.exists():
            print(f"{head}: reused", flush=True)
        else:
            if step.name != "samples" and not (current and step.resumable):
                _remove(step)
            _record(run, record, step, fingerprints[step.name], None)
            print(f"{head}: {_shown(step)}", flush=True)
            started = time.monotonic()
            _execute(step, run / "logs" / f"{step.name}.log", record)
            seconds = time.monotonic() - started
            _record(run, record, step, fingerprints[step.name], seconds)
            print(f"{head}: {seconds:.0f} s", flush=True)
        if number == 1:
            steps += plan(run, samples, size, seed)
    print(f"written: {run / 'report.html'} (open it in a browser), {run / 'summary.json'} (the same figures)")
    images = sorted(path for path in (run / "data" / "images").glob("*") if path.suffix in (".jpg", ".png"))
    shown = images[0] if images else "IMAGE"
    flags = (f"--checkpoint={run}", f"--annotations={run / 'annotations'}", f"--image={shown}")
    asked = shlex.join(("vilam3", "chat", *flags, "--prompt=Is a tumor visible in this image?"))
    print(f"next: {asked}")
    print("      your own data: docs/your_own_data.md")


def _claim(run: Path, fresh: bool) -> None:
    """Creates the run folder, or refuses a folder of something else."""
    if paths.children(run) and not (run / RUN_FILE).exists():
        raise UserError(f"{run}: exists and is not a quickstart run; choose another --out")
    if fresh and run.exists():
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    if not (run / RUN_FILE).exists():
        paths.write_text_atomic(run / RUN_FILE, json.dumps({"steps": {}}))


def _code_hash() -> str:
    """Hash of all code that can change a result."""
    digest = hashlib.sha256(json.dumps(run_checkpoints.versions(), sort_keys=True).encode())
    for root in (Path(__file__).parents[1], config_lib.configs_root()):
        for file in sorted(root.rglob("*.py")):
            # The report only shows results; editing it must not retrain.
            if "report" not in file.relative_to(root).parts[:1] and file != Path(__file__):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _remove(step: Step) -> None:
    target = step.makes.parent if step.name in STAGES else step.makes
    if target.name == "annotations":
        with contextlib.suppress(UserError):  # annotations of another decoder are regenerated
            AnnotationStore(target)
            return  # several experts share the store, and the command checks existing keys
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


def matmul_precision() -> str:
    """The user's setting, else bfloat16 on processors with matrix units for it (Linux: amx_bf16), or float32.

    With these units a step takes two thirds of the time; without them, rounding makes it a fifth slower
    (benchmarks/step_cpu.py).
    """
    has_units = CPUINFO.exists() and "amx_bf16" in CPUINFO.read_text().split()
    return os.environ.get("JAX_DEFAULT_MATMUL_PRECISION") or ("bfloat16" if has_units else "float32")


def _execute(step: Step, log: Path, record: dict) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1", TF_CPP_MIN_LOG_LEVEL="3")
    environment["JAX_COMPILATION_CACHE_DIR"] = str(log.parent.parent / "compiled")
    # XLA frees a step's buffers to malloc, and malloc to the kernel. Huge pages make reallocation cheaper: a
    # step takes a seventh less time (benchmarks/step_cpu.py). Only glibc reads this variable.
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    environment["JAX_DEFAULT_MATMUL_PRECISION"] = matmul_precision()
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *step.argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
        )
        assert isinstance(process.stdout, io.BufferedReader)
        try:
            while chunk := process.stdout.read1(4096):
                file.write(chunk)
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    record["peak_rss"] = max(record.get("peak_rss", 0), children)
    if code:
        raise UserError(f"step {step.name} failed with exit code {code}; its output is in {log}")
    if not step.makes.exists():
        raise UserError(f"step {step.name} ended without {step.makes}; its output is in {log}")


def _record(run: Path, record: dict, step: Step, fingerprint: str, seconds: float | None) -> None:
    record["steps"][step.name] = {
        "fingerprint": fingerprint,
        "finished": seconds is not None,
        "seconds": seconds,
        "command": _shown(step),
    }
    record["machine"] = summary.machine() | {"matmul_precision": matmul_precision()}
    record["versions"] = run_checkpoints.versions()
    paths.write_text_atomic(run / RUN_FILE, json.dumps(record, indent=1))


def _shown(step: Step) -> str:
    """The command as a user would type it."""
    text = shlex.join(("python", *step.argv)).replace("python -m vilam3_jax.cli", "vilam3")
    return text.replace("python -m vilam3_experts", "vilam3-experts")


def main(argv: Sequence[str]) -> int:
    """Entry of `python -m vilam3_jax.quickstart`."""
    parser = argparse.ArgumentParser(prog="quickstart", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="runs/quickstart", help="folder of the run; resumed or reused")
    parser.add_argument("--samples", default=".cache/samples", help="folder of the fetched samples; kept")
    parser.add_argument("--size", default="default", choices=("smoke", "default", "full"))
    parser.add_argument("--fresh", action="store_true", help="start over (the samples are kept)")
    parser.add_argument("--seed", type=int, default=0, help="of the training runs; the data stay the same")
    options = parser.parse_args(argv)
    if options.size == "smoke":
        # Programs that run for seconds do not repay LLVM's optimisation.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    run_chain(Path(options.out), Path(options.samples), options.size, options.fresh, options.seed)
    return 0
