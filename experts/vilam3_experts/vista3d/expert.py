"""The CT expert: VISTA3D over a volume, for one of VILA-M3's label groups."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch

from vilam3_experts.base import ExpertFailure, Output
from vilam3_experts.vista3d import windows
from vilam3_experts.vista3d.bundle import Bundle, read_bundle
from vilam3_experts.vista3d.pipeline import PreprocessedScan
from vilam3_experts.weights import Weights
from vilam3_jax.data.experts.labels import label_group, label_table
from vilam3_jax.data.limits import DEFAULT_LIMITS
from vilam3_jax.data.stored_volume import UNKNOWN
from vilam3_jax.data.volumes import Volume
from vilam3_jax.errors import UserError

_NAME = "VISTA3D"
_MIN_VOXELS = 4  # along an axis
_HOST_BYTES = 256 << 20  # of sums in memory; more go to a scratch file


def create(weights: Weights) -> Vista3d:
    """Loads a vista3d bundle or a VISTA3D-HF folder, onto the GPU if torch finds one.

    Raises `UserError` if the folder is missing or unusable.
    """
    if weights.folder is None:
        raise UserError("VISTA3D needs its bundle; give --weights with a vista3d or VISTA3D-HF folder")
    bundle = read_bundle(weights.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Vista3d(bundle, windows.SplitNetwork(bundle.network.to(device)), device)


class Vista3d:
    """Segments whole scans in bounded memory, with a `network` on `device` and the settings of `bundle`."""

    def __init__(self, bundle: Bundle, network: windows.PromptNetwork, device: torch.device) -> None:
        self.bundle = bundle
        self._network = network
        self._device = device

    def run(self, data: Volume, args: str) -> Output:
        """Segments the labels of one group of VILA-M3, such as `organs`, in a CT in Hounsfield units.

        Returns labels uint8 on the grid of `data`, with the ids of VILA-M3; 0 outside the body's box. Raises
        `ExpertFailure` if this volume cannot be analysed.
        """
        check_volume(data)
        prompts = prompt_table(self.bundle, args)
        scan = PreprocessedScan(data, self.bundle.steps)
        run = functools.partial(
            windows.argmax_labels,
            scan.image.as_tensor()[None].contiguous(),
            self._network,
            [p.class_id for p in prompts],
            self.bundle.windows,
            device=self._device,
            amp=self.bundle.amp,
        )
        positions = windows.retry_with_less_memory(run, self._network, self._device, _HOST_BYTES)
        table = np.array([0, *(p.label_id for p in prompts)], np.uint8)
        return Output(
            labels=scan.to_input(torch.from_numpy(table[positions.numpy()])),
            label_names={p.label_id: p.name for p in prompts},
            weights_sha256=self.bundle.weights_sha256,
        )


class Prompt(NamedTuple):
    """A class prompt: its id in the bundle, its id in VILA-M3's table, and its name in the bundle."""

    class_id: int
    label_id: int
    name: str


def prompt_table(bundle: Bundle, args: str) -> list[Prompt]:
    """The prompts of one label group, with kidney, lung and bone replaced by their parts.

    Raises `ExpertFailure` if there is no such group, or the bundle lacks one of its labels.
    """
    group = label_group(_NAME, args)
    if group is None:
        raise ExpertFailure(f"VISTA3D has no group of labels {args!r}")
    table = label_table(_NAME)
    ours = {name.lower(): i for i, name in table.items()}
    theirs = {name.lower(): i for i, name in bundle.labels.items()}
    wanted = [table[i] for i in group.target]
    missing = [name for name in wanted if name.lower() not in theirs]
    if missing:
        raise ExpertFailure(f"{bundle.name}: its metadata list no label {missing[0]!r} of the group {args!r}")
    class_ids: dict[int, None] = {}  # an ordered set
    for name in wanted:
        class_id = theirs[name.lower()]
        class_ids |= dict.fromkeys(bundle.subclasses.get(class_id, (class_id,)))
    prompts = []
    for class_id in class_ids:
        name = bundle.labels.get(class_id, "")
        if name.lower() not in ours:
            raise ExpertFailure(f"{bundle.name}: class {class_id} has no name that VILA-M3 knows")
        prompts.append(Prompt(class_id, ours[name.lower()], name))
    return prompts


def check_volume(volume: Volume) -> None:
    """Raises `ExpertFailure` for volumes that are not CT by their header, shape or values."""
    if volume.modality not in ("CT", UNKNOWN):
        raise ExpertFailure(f"VISTA3D reads CT, and this is {volume.modality}")
    if volume.units not in ("HU", UNKNOWN):
        raise ExpertFailure(f"VISTA3D reads Hounsfield units, and this scan is in {volume.units}")
    shape = "x".join(map(str, volume.voxels.shape))
    if volume.voxels.ndim != 3 or min(volume.voxels.shape) < _MIN_VOXELS:
        raise ExpertFailure(
            f"{shape} voxels; VISTA3D needs a volume of at least {_MIN_VOXELS} along each axis"
        )
    if volume.voxels.size > DEFAULT_LIMITS.voxels:
        raise ExpertFailure(f"{shape} voxels, more than {DEFAULT_LIMITS.voxels}; crop the scan")
    if volume.voxels.dtype.kind == "f" and not np.isfinite(volume.voxels.sum(dtype=np.float64)):
        raise ExpertFailure("voxels that are not finite numbers; export the scan again")
