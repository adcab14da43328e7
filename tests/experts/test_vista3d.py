"""VISTA3D: the folder, the geometry against MONAI's own pipeline, the windows, and what is refused."""

import pathlib

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.apps.vista3d.transforms import VistaPostTransformd
from monai.data import decollate_batch, list_data_collate
from monai.inferers import sliding_window_inference
from monai.transforms import (
    CastToTyped,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    EnsureTyped,
    Invertd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)
from torch import nn
from vilam3_experts.vista3d import bundle as bundles
from vilam3_experts.vista3d import windows
from vilam3_experts.vista3d.pipeline import Prepared

from vilam3_jax.data.volumes import load_volume

CT = (
    pathlib.Path(__file__).parents[2]
    / ".cache/samples/totalsegmentator-2.18.0/tests/reference_files/example_ct.nii.gz"
)
CPU = torch.device("cpu")
HU = (-963.8247715525971, 1053.678477684517)
PROMPTS = [1, 3, 115, 28, 22]


class Tiny(nn.Module):
    """VISTA3D's call with one convolution, random and fixed."""

    def __init__(self, channels=6):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.kernel = torch.randn(channels, 1, 3, 3, 3, generator=generator)
        self.bias = torch.randn(channels, generator=generator)
        self.embeddings = torch.randn(133, channels, generator=generator)

    def forward(self, window, class_vector=None, transpose=False):
        features = torch.tanh(nn.functional.conv3d(window, self.kernel, self.bias, padding=1))
        logits = torch.einsum("pc,bcxyz->pbxyz", self.embeddings[class_vector[:, 0]], features)
        return logits.transpose(1, 0) if transpose else logits


def rotation(x, y, z):
    """[3, 3], turns by angles in radians about the three axes."""
    turns = []
    for axis, angle in enumerate((x, y, z)):
        turn = np.eye(3)
        a, b = [i for i in range(3) if i != axis]
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        turns.append(turn)
    return turns[0] @ turns[1] @ turns[2]


GRIDS = {
    "as it is": lambda affine: affine,
    "flipped": lambda affine: affine @ np.diag([-1, -1, 1, 1]),
    "axes permuted": lambda affine: np.eye(4)[[2, 0, 1, 3]] @ affine,
    "oblique": lambda affine: np.block(
        [[rotation(0.2, -0.3, 0.15) @ affine[:3, :3], affine[:3, 3:]], [np.zeros((1, 3)), np.ones((1, 1))]]
    ),
    "halves": lambda affine: affine @ np.diag([0.25, 0.25, 1.0, 1.0]),
    "sheared": lambda affine: affine @ (np.eye(4) + np.diag([0.1, 0.05, 0], 1)),
}


def monai_pipeline(path, network, prompts, settings):
    """The labels [I, J, K] of MONAI's dictionary transforms and inferer, in the order of the file."""
    keys = "image"
    before = Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            EnsureTyped(keys, track_meta=True),
            Spacingd(keys, pixdim=[1.5, 1.5, 1.5], mode="bilinear"),
            CropForegroundd(keys, source_key=keys, margin=10, allow_smaller=True),
            ScaleIntensityRanged(keys, *HU, b_min=0, b_max=1, clip=True),
            Orientationd(keys, axcodes="RAS", labels=None),
            CastToTyped(keys, dtype=torch.float32),
        ]
    )
    after = Compose(
        [
            VistaPostTransformd("pred"),
            Invertd("pred", transform=before, orig_keys=keys, nearest_interp=True, to_tensor=True),
        ]
    )
    batch = list_data_collate([before({keys: str(path)})])
    classes = torch.tensor(prompts)[:, None]
    with torch.no_grad():
        batch["pred"] = sliding_window_inference(
            batch[keys], settings.roi, 1, network, overlap=settings.overlap, mode="gaussian",
            padding_mode=settings.padding, transpose=True, class_vector=classes,
        )  # fmt: skip
    batch["label_prompt"] = classes[None]
    return after(decollate_batch(batch)[0])["pred"][0].numpy()


def ours(volume, network, prompts, settings, **changes):
    """Labels [X, Y, Z] of the expert's own path."""
    prepared = Prepared(volume, bundles._DEFAULT_STEPS)
    options = {"device": CPU, "sums_device": CPU, "memory_bytes": 0, "portion": None, "amp": True} | changes
    positions = windows.argmax_labels(
        prepared.image.as_tensor()[None].contiguous(), network, prompts, settings, **options
    )
    table = np.array([0, *prompts], np.uint8)
    return prepared.to_input(torch.from_numpy(table[positions.numpy()]))


def compare(tmp_path, values, affine, settings):
    """Share of voxels in which the expert and MONAI differ; both find several labels."""
    path = tmp_path / "scan.nii"
    nib.Nifti1Image(values, affine).to_filename(path)
    volume = load_volume(path, modality="CT")
    theirs = monai_pipeline(path, Tiny(), PROMPTS, settings)
    mine = ours(volume, windows.WholeNetwork(Tiny()), PROMPTS, settings)
    stored = nib.orientations.io_orientation(nib.load(path).affine)
    assert mine.shape == volume.voxels.shape and mine.dtype == np.uint8
    theirs = nib.orientations.apply_orientation(theirs, stored)
    assert len(np.unique(theirs)) >= 4
    return float((mine != theirs).mean())


@pytest.fixture(scope="module")
def ct():
    """The TotalSegmentator CT: int16 [122, 101, 112] at 3 mm, and its affine."""
    if not CT.exists():
        pytest.skip("run `make quickstart` once to fetch the samples")
    image = nib.load(CT)
    return np.asarray(image.dataobj).astype(np.int16), image.affine


@pytest.mark.parametrize("grid", GRIDS)
def test_a_crop_agrees_with_monai(tmp_path, ct, grid):
    values, affine = ct
    settings = windows.WindowSettings((32, 48, 32), 0.3, "constant")
    assert compare(tmp_path, values[30:64, 20:50, 40:66], GRIDS[grid](affine), settings) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
def test_the_whole_ct_agrees_with_monai(tmp_path, ct, grid):
    values, affine = ct
    settings = windows.WindowSettings((128, 128, 128), 0.3, "constant")
    assert compare(tmp_path, values, GRIDS[grid](affine), settings) <= 1e-5
