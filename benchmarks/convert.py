"""Import and export compared with copying the same bytes: seconds, ratios and peak memory.

    python benchmarks/convert.py --dir=EMPTY_FOLDER [--model=vila_m3_8b] [--layers=N] [--rounds=1]

Writes the LLM of a published size as a Hugging Face folder in bfloat16 (shapes real, values random), copies
it with fsync, imports it and exports the result, each with and without verification, each in a separate
process. Before each measurement the input files are flushed and dropped from the page cache; the time
includes the sync of the output. Needs three times the size of the model on the disk, and removes its files.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from vilam3_jax.checkpoints import exports
from vilam3_jax.convert.exporter import FILE_BYTES, export_folder
from vilam3_jax.convert.huggingface import llm_folder_config
from vilam3_jax.convert.importer import import_model, target_shapes
from vilam3_jax.convert.safetensors_files import SafetensorsWriter
from vilam3_jax.models import families
from vilam3_jax.runtime.settings import Section


def write_source(folder: Path, llm: Section) -> None:
    """A Hugging Face folder of finite random bfloat16 values."""
    folder.mkdir(parents=True)
    shapes = {}
    targets = target_shapes("llm", {"llm": llm.to_dict()})
    for rule in families.get("llm", llm.get("type")).hugging_face.tensors(llm):
        shape = targets[rule.target]
        shapes |= dict.fromkeys(rule.sources, rule.layout.foreign(shape[1:] if rule.stacked else shape))
    writer = SafetensorsWriter(folder, shapes, ml_dtypes.bfloat16, FILE_BYTES)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        bits = rng.integers(0, 1 << 16, math.prod(shape), np.uint16) & 0xBFFF  # below 2: finite
        writer.write(name, 0, bits.view(ml_dtypes.bfloat16).reshape(shape))
    (folder / "config.json").write_text(json.dumps(llm_folder_config(llm, None, "bfloat16")))


def copy(source: Path, out: Path) -> None:
    """Copies a folder and waits for the disk."""
    out.mkdir()
    for file in source.iterdir():
        with file.open("rb") as read, (out / file.name).open("wb") as write:
            shutil.copyfileobj(read, write, 16 << 20)
            os.fsync(write.fileno())


ACTIONS = {
    "copy": copy,
    "import": lambda source, out: import_model(source, out, verify=False),
    "import, verified": lambda source, out: import_model(source, out, verify=True),
    "export": lambda source, out: export_folder(source, out, verify=False),
    "export, verified": lambda source, out: export_folder(source, out, verify=True),
}


def act(action: str, source: Path, out: Path) -> None:
    """The measured process; prints seconds and bytes of peak memory."""
    start = time.perf_counter()
    ACTIONS[action](source, out)
    os.sync()
    seconds = time.perf_counter() - start
    # The maximum of getrusage is inherited from the parent process.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps([seconds, 1024 * int(peak[1]) if peak else 0]))


def measure(action: str, source: Path, out: Path) -> tuple[float, int]:
    """Runs `act` in a new process with a cold page cache."""
    os.sync()
    for file in source.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--act", action, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        sys.exit(done.stderr)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--model", default="vila_m3_8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--act", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.act:
        act(options.act[0], Path(options.act[1]), Path(options.act[2]))
        return
    if options.dir is None or (options.dir.exists() and any(options.dir.iterdir())):
        parser.error("--dir: an empty or new folder is needed")
    from vilam3_jax.configs import models

    section = models.get(options.model).llm
    section.num_layers = options.layers or section.num_layers
    llm = families.config_of("llm", section)
    folder = options.dir
    source, ours = folder / "source", folder / "ours"
    write_source(source, llm)
    size = sum(file.stat().st_size for file in source.iterdir())
    if shutil.disk_usage(folder).free < 2.1 * size:
        shutil.rmtree(folder)
        parser.error(f"--dir: {2.1 * size / 1e9:.0f} GB more are needed on this disk; use fewer --layers")
    print(f"{options.model}, {section.num_layers} layers: {size / 1e9:.2f} GB in bfloat16")
    for _ in range(options.rounds):
        rows = {"copy": measure("copy", source, folder / "copied")}
        shutil.rmtree(folder / "copied")
        for action in ("import, verified", "import"):
            shutil.rmtree(ours, ignore_errors=True)
            rows[action] = measure(action, source, ours)
        largest = max(
            math.prod(rows.shape) * 2 for ranges in exports.stored_rows(ours).values() for rows in ranges
        )
        for action in ("export", "export, verified"):
            rows[action] = measure(action, ours, folder / "back")
            shutil.rmtree(folder / "back")
        limit = 1.5 * largest + 1e9
        print(f"largest stored leaf {largest / 1e9:.2f} GB; 1.5 times that + 1 GB: {limit / 1e9:.2f} GB")
        for action, (seconds, peak) in rows.items():
            ratio = seconds / rows["copy"][0]
            print(f"{action:<17} {seconds:7.1f} s  {ratio:5.2f} x copy  peak {peak / 1e9:5.2f} GB")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
