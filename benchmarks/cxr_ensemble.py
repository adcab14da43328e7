"""Throughput of the chest X-ray ensemble in films per second, compared with the reference.

    PYTHONPATH=tests/experts python benchmarks/cxr_ensemble.py [--films 16] [--side 2048] [--threads N]

The reference (VILA-M3's script) runs one network after the other over all films: each decodes every film
again, at batch 1, with torchxrayvision's networks. Here a film is decoded once and all networks get batches.
The eight networks have the sizes of the release and generated weights; the probabilities are compared, too.
Rounds alternate, and the median round counts. On a shared machine, trust the CPU time rather than the wall
clock.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import xrv_reference
from PIL import Image
from scipy import ndimage
from vilam3_experts.weights import Weights
from vilam3_experts.xrv.expert import ParityEnsemble
from vilam3_experts.xrv.members import load_table

from vilam3_jax.data.images import load_pixels

BATCH = 8


def make_films(folder: Path, number: int, side: int) -> list[Path]:
    """JPEG films of `side` × 0.9 `side` pixels, smooth with little noise, which compress like films."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(number):
        smooth = ndimage.zoom(rng.normal(128, 40, (16, 15)), side / 16, order=1)[:, : int(side * 0.9)]
        pixels = np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
        made.append(folder / f"{n}.jpg")
        Image.fromarray(pixels).save(made[-1], quality=92)
    return made


def run_reference(networks: dict[str, torch.nn.Module], films: list[Path]) -> np.ndarray:
    """Probabilities [networks, films, classes]; every network decodes every film."""
    xrv = xrv_reference.torchxrayvision()
    rows = []
    for member in load_table().members:
        thresholds = torch.tensor(member.thresholds)
        row = []
        for film in films:
            pixels = xrv.datasets.normalize(load_pixels(film), 255, reshape=True)
            square = torch.from_numpy(xrv.datasets.XRayCenterCrop()(pixels))[None]
            size = (member.resolution, member.resolution)
            square = torch.nn.functional.interpolate(square, size, mode="bilinear")  # as release 1.2.4
            row.append(xrv_reference.answer(networks[member.name], square, thresholds)[0].numpy())
        rows.append(row)
    return np.array(rows)


def run_ensemble(ensemble: ParityEnsemble, films: list[Path]) -> list[dict[str, float]]:
    """The ensemble's means of each film."""
    answers = []
    for start in range(0, len(films), BATCH):
        answers += ensemble.run_batch([load_pixels(film) for film in films[start : start + BATCH]], "")
    return [answer.probabilities for answer in answers]


def largest_difference(members: np.ndarray, ours: list[dict[str, float]]) -> float:
    """Largest difference between the reference's means and ours."""
    table = load_table()
    included = np.array([[table.includes(m.name, c) for c in table.classes] for m in table.members])
    means = (members * included[:, None]).sum(0) / included.sum(0)
    return float(np.abs(means - [[row[c] for c in table.classes] for row in ours]).max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--films", type=int, default=16)
    parser.add_argument("--side", type=int, default=2048, help="height of a film in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    networks = {
        m.name: xrv_reference.resnet(n) if m.architecture == "resnet50" else xrv_reference.densenet(n)
        for n, m in enumerate(load_table().members)
    }
    ensemble = ParityEnsemble(
        Weights({name: safetensors.torch.save(network.state_dict()) for name, network in networks.items()})
    )
    machine = platform.processor() or platform.machine()
    print(f"machine {machine}, {os.cpu_count()} CPUs, torch {torch.__version__}")
    print(f"threads {options.threads}, {options.films} films of {options.side} pixels, batches of {BATCH}")
    with tempfile.TemporaryDirectory() as folder:
        films = make_films(Path(folder), options.films, options.side)
        difference = largest_difference(run_reference(networks, films[:2]), run_ensemble(ensemble, films[:2]))
        print(f"largest difference of a mean probability {difference:.2e}")
        variants = {
            "reference": lambda: run_reference(networks, films),
            "ours": lambda: run_ensemble(ensemble, films),
        }
        wall: dict[str, list[float]] = {name: [] for name in variants}
        cpu: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(options.rounds):
            for name, variant in variants.items():
                start, used = time.perf_counter(), time.process_time()
                variant()
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - used)
    for kind, seconds in (("wall", wall), ("cpu", cpu)):
        rates = {name: options.films / statistics.median(times) for name, times in seconds.items()}
        for name, rate in rates.items():
            print(f"{name}_films_per_{kind}_second {rate:.3f}")
        rounds = [r / o for r, o in zip(seconds["reference"], seconds["ours"], strict=True)]
        ratios = ", ".join(f"{ratio:.2f}" for ratio in rounds)
        print(f"{kind}_ratio {rates['ours'] / rates['reference']:.2f} (rounds: {ratios})")


if __name__ == "__main__":
    main()
