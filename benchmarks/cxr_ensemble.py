"""Films a second of the chest X-ray ensemble, beside the reference's way, in one run.

    PYTHONPATH=tests/experts python benchmarks/cxr_ensemble.py [--films 16] [--side 2048] [--threads N]

The reference (VILA-M3's script) runs one network after the other over all films: each decodes every film
again, at batch 1, with torchxrayvision's networks. Here a film is decoded once and all networks see batches.
Weights are generated, so eight networks of the release's sizes are timed; the probabilities of the two ways
are compared, too. Rounds alternate, and the median round counts. The processor time of both is told beside
the time on the clock: on a machine that others use, it is the one to believe.
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
    """JPEG films of `side` × 0.9 `side` pixels, smooth with a little noise, as films compress."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(number):
        smooth = ndimage.zoom(rng.normal(128, 40, (16, 15)), side / 16, order=1)[:, : int(side * 0.9)]
        pixels = np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)
        made.append(folder / f"{n}.jpg")
        Image.fromarray(pixels).save(made[-1], quality=92)
    return made


def reference_way(networks: dict[str, torch.nn.Module], films: list[Path]) -> np.ndarray:
    """Probabilities [networks, films, classes]: every network reads every film."""
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


def our_way(ensemble: ParityEnsemble, films: list[Path]) -> list[dict[str, float]]:
    """The ensemble's means, film by film."""
    answers = []
    for start in range(0, len(films), BATCH):
        answers += ensemble.run_batch([load_pixels(film) for film in films[start : start + BATCH]], "")
    return [answer.probabilities for answer in answers]


def largest_difference(members: np.ndarray, ours: list[dict[str, float]]) -> float:
    """Between the reference's means and ours."""
    table = load_table()
    asked = np.array([[table.asked(m.name, c) for c in table.classes] for m in table.members])
    means = (members * asked[:, None]).sum(0) / asked.sum(0)
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
        difference = largest_difference(reference_way(networks, films[:2]), our_way(ensemble, films[:2]))
        print(f"largest difference of a mean probability {difference:.2e}")
        ways = {"reference": lambda: reference_way(networks, films), "ours": lambda: our_way(ensemble, films)}
        clock: dict[str, list[float]] = {name: [] for name in ways}
        processor: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                start, used = time.perf_counter(), time.process_time()
                way()
                clock[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - used)
    for kind, seconds in (("clock", clock), ("processor", processor)):
        rates = {name: options.films / statistics.median(times) for name, times in seconds.items()}
        for name, rate in rates.items():
            print(f"{name}_films_a_{kind}_second {rate:.3f}")
        rounds = [r / o for r, o in zip(seconds["reference"], seconds["ours"], strict=True)]
        told = ", ".join(f"{ratio:.2f}" for ratio in rounds)
        print(f"{kind}_ratio {rates['ours'] / rates['reference']:.2f} (rounds: {told})")


if __name__ == "__main__":
    main()
