"""Peak memory of VISTA3D's path over a 512 x 512 x 300 CT: all 117 prompts, a network of one layer.

Pre-processing, windows and inverse are the real ones; the network has VISTA3D's interface and one
convolution, so that what is measured is everything but the network. Each figure is the peak resident size of
a separate process, less that of a process that only imports. `one window` is the network called for all
prompts at once, as MONAI's inferer calls it; `one window, 8 prompts` is what the expert asks for.

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
    """One convolution, and VISTA3D's product of a feature map with the embeddings of the prompts."""

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
    """A body of water with noise in air, int16, made plane by plane."""
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
    """The expert's own `run`, with the one-layer network in place of the bundle's."""
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
    """One call of the network for the first `prompts` prompts."""
    with torch.inference_mode():
        network(torch.zeros(1, 1, *WINDOW), class_vector=torch.tensor(everything()[:prompts])[:, None])


PARTS = {
    "imports": lambda _: None,
    "input": scan,
    "network": lambda _: OneLayer(),
    "window": lambda _: window(OneLayer(), 117),
    "portion": lambda _: window(OneLayer(), 8),
    "run": run,
    "real network": lambda _: vista3d132(),
    "real window": lambda _: window(vista3d132().eval(), 117),
}


def peak(part: str, spacing: list[float]) -> float:
    """Peak resident MiB of a process that does one part."""
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
    names = ["network", "window", "portion", "run"] + ["real network", "real window"] * options.real
    figures = {name: peak(name, options.spacing) - base for name in names}
    figures["input"] = int(np.prod(SHAPE)) * 2 / MIB
    size, roi = ("x".join(map(str, shape)) for shape in (SHAPE, WINDOW))
    print(f"{size} int16 at {options.spacing} mm, 117 prompts, windows of {roi}")
    print(f"imports alone            {base:7.0f} MiB, taken off all figures below")
    print(f"input                    {figures['input']:7.0f} MiB")
    print(f"one-layer network        {figures['network']:7.0f} MiB")
    print(f"one window               {figures['window']:7.0f} MiB (with the network)")
    print(f"one window, 8 prompts    {figures['portion']:7.0f} MiB (with the network)")
    print(f"whole run                {figures['run']:7.0f} MiB")
    for name in ("window", "portion"):
        allowed = figures["input"] + figures[name]
        print(f"run / (input + network + {name:8})  {figures['run'] / allowed:.2f}")
    if options.real:
        real = figures["real window"]
        total = figures["run"] - figures["portion"] + real
        ratio = total / (figures["input"] + real)
        print(f"vista3d132, one window   {real:7.0f} MiB, of them weights {figures['real network']:.0f}")
        print(f"run with it, by addition {total:7.0f} MiB, {ratio:.2f} of input + network + window")


if __name__ == "__main__":
    main()
