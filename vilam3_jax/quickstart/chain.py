"""`make quickstart`: from real images to an answering model and a report, a chain of the project's commands.

Every step is an ordinary command in a process of its own, so what is shown here is what a user would type.
A step that finished with the same command, inputs and code is reused; a training run resumes from its
checkpoint.
"""

from __future__ import annotations

import argparse
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
# Whose label maps are imported as ORGANS, as the samples' index names them.
MAPS = "tool:TotalSegmentator reference map"
PHANTOM_MAPS = "ground-truth:generated label map"
MARKER = "quickstart.json"
CPUINFO = Path("/proc/cpuinfo")
EVAL_LIMIT = {"smoke": 6, "default": 5, "full": 20}


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the chain.

    Attributes:
      name: unique; also the name of its log file.
      argv: the command; its first word is a module of this project or `vilam3-experts`.
      makes: file or folder that exists when the step has finished.
      after: names of the steps whose results it reads.
      resumable: the command itself continues what an interrupted run left in `makes`.
    """

    name: str
    argv: tuple[str, ...]
    makes: Path
    after: tuple[str, ...] = ()
    resumable: bool = False


def samples_step(samples: Path, size: str) -> Step:
    """Fetches the samples, or draws phantoms for the smoke run."""
    module = "vilam3_jax.datasets.phantoms" if size == "smoke" else "vilam3_jax.datasets.samples"
    return Step("samples", ("-m", module, "--out", str(samples)), samples / "samples.json", resumable=True)


def plan(run: Path, samples: Path, size: str) -> list[Step]:
    """The chain of a size, after the samples are there."""
    phantoms = size == "smoke"
    data, annotations = run / "data", run / "annotations"
    vilam3 = ("-m", "vilam3_jax.cli")
    argv = ("-m", "vilam3_experts", "import", "--masks", str(samples), "--data", str(samples))
    argv += ("--source", PHANTOM_MAPS if phantoms else MAPS, "--expert", ORGANS, "--out", str(annotations))
    steps = [Step("import_organs", argv, annotations, ("samples",), resumable=True)]
    for expert in () if phantoms else EXPERTS:
        argv = ("-m", "vilam3_experts", "annotate", "--expert", expert, "--data", str(samples))
        name = f"annotate_{expert.lower()}"
        steps.append(
            Step(name, (*argv, "--out", str(annotations)), annotations, ("samples",), resumable=True)
        )
    annotated = tuple(step.name for step in steps)
    argv = (*vilam3, "prepare", "quickstart", "--source", str(samples), "--out", str(data), "--size", size)
    argv = (*argv, "--annotations", str(annotations))
    steps.append(Step("prepare", argv, data, annotated))
    if phantoms:
        tokenizer = run / "tokenizer"
        argv = (
            "-m",
            "vilam3_jax.datasets.train_tokenizer",
            "--data",
            str(data),
            "--out",
            str(tokenizer),
            "--vocab_size=2048",
        )
        steps.append(Step("tokenizer", argv, tokenizer, ("prepare",)))
    else:
        llm = run / "llm"
        tokenizer = llm / "tokenizer"
        gguf = samples_lib.asset(samples, "smollm2_gguf")
        argv = (*vilam3, "convert", "import", "--source", str(gguf), "--out", str(llm))
        steps.append(Step("import_llm", argv, llm, ("samples",)))
    base = ("prepare", "tokenizer" if phantoms else "import_llm")
    for index, stage in enumerate(STAGES):
        argv = [*vilam3, "train", f"--config=configs/quickstart/{stage}.py:{size}"]
        argv += [f"--workdir={run / 'stages' / stage}", f"--config.data.path={data}"]
        argv += [f"--config.data.annotations={annotations}", f"--config.model.tokenizer={tokenizer}"]
        if stage == "stage2a_align":
            argv.append(f"--config.init.vision_tower={run / 'stages' / STAGES[0] / 'export'}")
            if not phantoms:
                argv.append(f"--config.init.llm={run / 'llm'}")
        elif index > 1:
            argv.append(f"--config.init.everything={run / 'stages' / STAGES[index - 1] / 'export'}")
        before = (*base, STAGES[index - 1]) if index else base
        steps.append(Step(stage, tuple(argv), run / "stages" / stage / "result.json", before, resumable=True))
    steps += _evaluation(run, data, annotations, size, base)
    report = (*vilam3, "report", f"--workdir={run}")
    steps.append(Step("report", report, run / "report.html", tuple(step.name for step in steps)))
    return steps


def _evaluation(run: Path, data: Path, annotations: Path, size: str, base: tuple[str, ...]) -> list[Step]:
    evaluate = ("-m", "vilam3_jax.cli", "evaluate", f"--data={data}")
    exports = {stage: run / "stages" / stage / "export" for stage in STAGES}
    out = run / "eval"
    retrieval = (*evaluate, f"--checkpoint={exports['stage1_vision']}", "--protocol=retrieval@2")
    steps = [
        Step(
            "eval_retrieval",
            (*retrieval, f"--out={out / 'retrieval.json'}"),
            out / "retrieval.json",
            (*base, "stage1_vision"),
        )
    ]
    arms = {
        "stage3": ("stage3_instruct", ("--experts=off",)),
        "stage4_no_experts": ("stage4_expert", ("--experts=off",)),
        "stage4_experts": ("stage4_expert", ("--experts=on",)),
        "stage4_falsified": ("stage4_expert", ("--experts=falsified",)),
        "stage4_blank": ("stage4_expert", ("--experts=off", "--images=blank")),
        "majority": ("stage4_expert", ()),
    }
    for arm, (stage, flags) in arms.items():
        argv = (
            *evaluate,
            f"--checkpoint={exports[stage]}",
            "--protocol=quickstart@1",
            f"--arm={arm}",
            *flags,
        )
        argv = (*argv, f"--annotations={annotations}", f"--limit={EVAL_LIMIT[size]}", f"--out={out / arm}")
        steps.append(Step(f"eval_{arm}", argv, out / arm / "result.json", (*base, stage)))
    return steps


def run_chain(run: Path, samples: Path, size: str, fresh: bool) -> None:
    """Runs what is missing or stale, in order.

    Raises:
      UserError: a step failed; it has printed why.
    """
    run, samples = run.absolute(), samples.absolute()
    _claim(run, fresh)
    record = json.loads((run / MARKER).read_text())
    prints: dict[str, str] = {}
    code = _code_hash()
    steps = [samples_step(samples, size)]
    number = 0
    while number < len(steps):
        step = steps[number]
        number += 1
        prints[step.name] = _fingerprint(step, prints, code)
        done = record["steps"].get(step.name, {})
        total = len(steps) if number > 1 else "..."
        head = f"[{number}/{total}] {step.name}"
        if done.get("fingerprint") == prints[step.name] and done.get("finished") and step.makes.exists():
            print(f"{head}: reused", flush=True)
        else:
            _run_step(run, record, step, prints[step.name], head)
        if number == 1:
            steps += plan(run, samples, size)
    print(f"report: {run / 'report.html'}")
    print(f"summary: {run / 'summary.json'}")


def _run_step(run: Path, record: dict, step: Step, fingerprint: str, head: str) -> None:
    done = record["steps"].get(step.name, {})
    if step.name != "samples" and (done.get("fingerprint") != fingerprint or not step.resumable):
        _remove(step)
    _record(run, record, step, fingerprint, None)
    print(f"{head}: {_shown(step)}", flush=True)
    started = time.monotonic()
    _execute(step, run / "logs" / f"{step.name}.log", record)
    seconds = time.monotonic() - started
    _record(run, record, step, fingerprint, seconds)
    print(f"{head}: {seconds:.0f} s", flush=True)


def _claim(run: Path, fresh: bool) -> None:
    """Makes the run folder, or refuses one that something else owns."""
    if run.exists() and any(run.iterdir()) and not (run / MARKER).exists():
        raise UserError(f"{run}: exists and is no quickstart run; choose another --out")
    if fresh and run.exists():
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    if not (run / MARKER).exists():
        paths.write_text_atomic(run / MARKER, json.dumps({"steps": {}}))


def _fingerprint(step: Step, prints: dict[str, str], code: str) -> str:
    parts = [code, *step.argv, *(prints[name] for name in step.after)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _code_hash() -> str:
    """Hash of everything whose change could change a result."""
    digest = hashlib.sha256(json.dumps(run_checkpoints.versions(), sort_keys=True).encode())
    package = Path(__file__).parents[1]
    for root in (package, config_lib.configs_root()):
        for file in sorted(root.rglob("*.py")):
            # The report only shows results; editing it must not retrain.
            if "report" not in file.relative_to(root).parts[:1] and file != Path(__file__):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _remove(step: Step) -> None:
    target = step.makes.parent if step.name in STAGES else step.makes
    if target.name == "annotations" and _is_current(target):
        return  # several experts share the store; present keys are checked by the command
    if target.is_dir():
        shutil.rmtree(target)
    elif target.exists():
        target.unlink()


def _is_current(store: Path) -> bool:
    """Whether this version reads the annotations; those of another decoder are made again."""
    try:
        AnnotationStore(store)
    except UserError:
        return False
    return True


def matmul_precision() -> str:
    """The user's, else bfloat16 where the processor has matrix units for it (Linux: amx_bf16), or float32.

    With these units a step takes two thirds of the time; without, rounding costs a fifth more
    (benchmarks/step_cpu.py).
    """
    rounds = CPUINFO.exists() and "amx_bf16" in CPUINFO.read_text().split()
    return os.environ.get("JAX_DEFAULT_MATMUL_PRECISION") or ("bfloat16" if rounds else "float32")


def _execute(step: Step, log: Path, record: dict) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1", TF_CPP_MIN_LOG_LEVEL="3")
    environment["JAX_COMPILATION_CACHE_DIR"] = str(log.parent.parent / "compiled")
    # XLA gives a step's buffers back to malloc and malloc to the kernel; with huge pages getting them again
    # is cheaper: a step takes a seventh less (benchmarks/step_cpu.py). Other C libraries do not read this.
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
    if not code and not step.makes.exists():
        raise UserError(f"step {step.name} ended without {step.makes}; its output is in {log}")
    if code:
        raise UserError(f"step {step.name} failed with exit code {code}; its output is in {log}")


def _record(run: Path, record: dict, step: Step, fingerprint: str, seconds: float | None) -> None:
    record["steps"][step.name] = {
        "fingerprint": fingerprint,
        "finished": seconds is not None,
        "seconds": seconds,
        "command": _shown(step),
    }
    record["machine"] = summary.machine() | {"matmul_precision": matmul_precision()}
    record["versions"] = run_checkpoints.versions()
    paths.write_text_atomic(run / MARKER, json.dumps(record, indent=1))


def _shown(step: Step) -> str:
    """The command as a user would type it."""
    text = shlex.join(("python", *step.argv))
    return text.replace("python -m vilam3_jax.cli", "vilam3").replace(
        "python -m vilam3_experts", "vilam3-experts"
    )


def main(argv: Sequence[str]) -> int:
    """Entry of `python -m vilam3_jax.quickstart`."""
    parser = argparse.ArgumentParser(prog="quickstart", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", default="runs/quickstart", help="folder of the run; resumed or reused")
    parser.add_argument("--samples", default=".cache/samples", help="folder of the fetched samples; kept")
    parser.add_argument("--size", default="default", choices=("smoke", "default", "full"))
    parser.add_argument("--fresh", action="store_true", help="start over (the samples are kept)")
    options = parser.parse_args(argv)
    if options.size == "smoke":
        # Programs that run for seconds are not worth LLVM's optimising.
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    run_chain(Path(options.out), Path(options.samples), options.size, options.fresh)
    return 0
