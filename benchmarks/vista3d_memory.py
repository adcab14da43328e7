"""Peak memory of the VISTA3D expert for a 512 x 512 x 300 CT and all 117 prompts, without the network's own.

Pre-processing, windows and inverse are the real ones; the network has VISTA3D's interface and only one
convolution. Each figure is the peak resident size of a separate process, minus that of a process that only
imports. `one window` calls the network for all prompts at once, as MONAI's inferer does; `one window, 8
prompts` is one call of the expert.

    python benchmarks/vista3d_memory.py [--real] [--spacing 0.8 0.8 1.0]

`--real` also measures one window of `vista3d132` itself (about 7 GB and some minutes on one core).
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from typing import Any, cast

import numpy as np
import torch
from monai.networks.nets import vista3d132
from torch import nn
from vilam3_experts.vista3d import expert, windows
from vilam3_experts.vista3d.bundle import DEFAULT_STEPS, SUBCLASSES, Bundle

from vilam3_jax.data.experts.labels import label_table
from vilam3_jax.data.volumes import Volume

SHAPE = (512, 512, 300)
WINDOW = (128, 128, 128)
MIB = 1 << 20


class OneLayer(nn.Module):
    """One convolution, and VISTA3D's product of the feature map with the prompt embeddings."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv3d(1, channels, 3, padding=1)
        self.class_head = nn.Module()
        self.class_head.image_post_mapping = nn.Identity()
        self.class_head.use_mlp = False
        self.class_head.class_embeddings = nn.Embedding(133, channels)

    def image_encoder(self, window: torch.Tensor, **_: bool) -> tuple[None, torch.Tensor]:
        return None, self.layer(window)

    def forward(self, window: torch.Tensor, class_vector: torch.Tensor) -> torch.Tensor:
        split = windows.SplitNetwork(self)
        return split.decode(split.encode(window), class_vector[:, 0])[:, None]


def scan(spacing: list[float]) -> Volume:
    """A noisy body of water in air, int16, generated plane by plane."""
    voxels = np.empty(SHAPE, np.int16)
    x, y = np.ogrid[-1 : 1 : SHAPE[0] * 1j, -1 : 1 : SHAPE[1] * 1j]
    body = x**2 + y**2 < 0.9
    random = np.random.default_rng(0)
    for z in range(SHAPE[2]):
        voxels[:, :, z] = np.where(body, random.integers(-200, 400, SHAPE[:2]), -1000)
    return Volume(voxels, np.diag([*spacing, 1.0]), "generated", modality="CT", units="HU")


def everything() -> list[int]:
    group = expert.label_group("VISTA3D", "everything")
    assert group is not None
    return list(group.target)


def run(spacing: list[float]) -> None:
    """The expert's `run`, with the one-layer network instead of the bundle's."""
    network = OneLayer()
    settings = windows.WindowSettings(WINDOW, 0.3, "constant")
    names = label_table("VISTA3D")
    bundle = Bundle("one layer", "", names, SUBCLASSES, DEFAULT_STEPS, settings, True, cast(Any, network), "")
    vista = expert.Vista3d(bundle, windows.SplitNetwork(network), torch.device("cpu"))
    volume = scan(spacing)
    start = time.perf_counter()
    labels = vista.run(volume, "everything").labels
    assert labels is not None and labels.shape == SHAPE
    print(
        f"{len(np.unique(labels[::8, ::8, ::8]))} labels, {time.perf_counter() - start:.0f} s",
        file=sys.stderr,
    )


def window(network: nn.Module, prompts: int) -> None:
    """One call of the network for `prompts` prompts."""
    with torch.inference_mode():
        network(torch.zeros(1, 1, *WINDOW), class_vector=torch.tensor(everything()[:prompts])[:, None])


LABELS = {"network": "one-layer network", "window": "one window", "chunk": "one window, 8 prompts"}
PARTS = {
    "imports": lambda _: None,
    "input": scan,
    "network": lambda _: OneLayer(),
    "window": lambda _: window(OneLayer(), 117),
    "chunk": lambda _: window(OneLayer(), 8),
    "run": run,
    "real network": lambda _: vista3d132(),
    "real window": lambda _: window(vista3d132().eval(), 117),
}


def peak(part: str, spacing: list[float]) -> float:
    """Peak resident MiB of a process that runs one part."""
    command = [sys.executable, __file__, "--part", part, "--spacing", *map(str, spacing)]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(out.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--spacing", type=float, nargs=3, default=[0.8, 0.8, 1.0])
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        torch.set_num_threads(1)
        PARTS[options.part](options.spacing)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB)
        return
    base = peak("imports", options.spacing)
    names = ["network", "window", "chunk", "run"] + ["real network", "real window"] * options.real
    figures = {name: peak(name, options.spacing) - base for name in names}
    figures["input"] = int(np.prod(SHAPE)) * 2 / MIB
    size, roi = ("x".join(map(str, shape)) for shape in (SHAPE, WINDOW))
    print(f"{size} int16 at {options.spacing} mm, 117 prompts, windows of {roi}")
    print(f"imports alone            {base:7.0f} MiB, subtracted from all figures below")
    for name in ("input", *names):
        print(f"{LABELS.get(name, name):24} {figures[name]:7.0f} MiB")
    for name in ("window", "chunk"):
        allowed = figures["input"] + figures[name]
        print(f"run / (input + network + {name:8})  {figures['run'] / allowed:.2f}")
    if options.real:
        real = figures["real window"]
        total = figures["run"] - figures["chunk"] + real
        ratio = total / (figures["input"] + real)
        print(f"run with it, estimated   {total:7.0f} MiB, {ratio:.2f} of input + network + window")


if __name__ == "__main__":
    main()
