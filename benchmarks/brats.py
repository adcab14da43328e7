"""CPU seconds and peak memory of BRATS on a CPU, for the bundle's network and a head of BraTS's size.

    python benchmarks/brats.py

Each variant runs in a separate process. `monai` is the bundle's pipeline with MONAI's transforms and inferer;
`expert` is ours, from four `Volume`s to the label map; `expert, 3 mm slices` also resamples the scans to 1 mm
and back. Memory is the peak resident size minus that after the imports.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SegResNet
from monai.transforms import NormalizeIntensity
from vilam3_experts.brats.bundle import Settings
from vilam3_experts.brats.expert import Brats, label_map
from vilam3_experts.sequences import ROLES

from vilam3_jax.data.volumes import Volume

SHAPE = (240, 240, 155)
WAYS = ("monai", "expert", "expert, 3 mm slices")


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def head(shape: tuple[int, ...], thickness: float, seed: int) -> Volume:
    """A ball of noise on a background of 0."""
    grid = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    inside = sum(np.square(axis) for axis in grid) < 0.8
    noise = np.random.default_rng(seed).integers(100, 900, shape, np.int16)
    return Volume(noise * inside, np.diag([1.0, 1.0, thickness, 1.0]), "head", modality="MR")


def measure(way: str) -> None:
    """Prints CPU seconds and MiB."""
    torch.manual_seed(0)
    network = SegResNet(**Settings().network).eval()
    thickness = 3.0 if way.endswith("slices") else 1.0
    shape = (*SHAPE[:2], round(SHAPE[2] / thickness))
    scans = {role: head(shape, thickness, seed) for seed, role in enumerate(ROLES)}
    before, start = peak_mib(), time.process_time()
    if way == "monai":
        image = torch.as_tensor(np.stack([scan.voxels for scan in scans.values()]).astype(np.float32))
        image = NormalizeIntensity(nonzero=True, channel_wise=True)(image)
        with torch.no_grad():
            regions = SlidingWindowInferer((240, 240, 160), overlap=0.5)(image[None], network)[0].sigmoid()
        label_map(dict(zip(Settings().regions, regions.numpy(), strict=True)))
    else:
        label_map(Brats(network, Settings()).probabilities(scans)[0])
    print(f"{time.process_time() - start:.1f} {peak_mib() - before:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        measure(options.way)
        return
    print(f"{'way':20} {'CPU s':>8} {'MiB':>7}")
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way]
        seconds, mib = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        print(f"{way:20} {seconds:>8} {mib:>7}", flush=True)


if __name__ == "__main__":
    main()
