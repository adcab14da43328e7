"""BRATS: the bundle's layout, and the whole pipeline compared with MONAI's transforms and inferer."""

import dataclasses
import json
import pathlib
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SegResNet
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    Invertd,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    Spacingd,
)
from scipy import ndimage
from vilam3_experts.annotate import annotate
from vilam3_experts.base import ExpertFailure
from vilam3_experts.brats.bundle import Settings, find_bundle, load_network, read_settings
from vilam3_experts.brats.expert import Brats, create, label_map, smaller_window
from vilam3_experts.descriptors import BRATS
from vilam3_experts.engine.memory import RetrySmaller
from vilam3_experts.weights import Weights

from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.experts.host_client import ExpertHost
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.volumes import Volume, VolumeSource, read_volume
from vilam3_jax.errors import UserError

ROLES = ("t1c", "t1", "t2", "flair")
HEAD = (
    pathlib.Path(__file__).parents[2]
    / ".cache/samples/nilearn-0.14.1/nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
)
WINDOW = (32, 32, 24)


class Tiny(torch.nn.Module):
    """Four channels to three logits; sensitive to the order of channels and axes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("kernel", torch.randn(3, 4, 3, 3, 3, generator=generator) / 8)

    def forward(self, x):
        return torch.nn.functional.conv3d(x, self.kernel, padding=1) + 0.2 * x[:, :3]


# ---------------------------------------------------------------- scans


def smooth(shape, seed):
    """A random field without high frequencies, 0 outside of a ball: a skull-stripped head."""
    generator = np.random.default_rng(seed)
    coarse = torch.as_tensor(generator.uniform(50, 900, (1, 1, 6, 6, 6)), dtype=torch.float32)
    field = torch.nn.functional.interpolate(coarse, shape, mode="trilinear", align_corners=True)[0, 0].numpy()
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    return np.where((grid**2).sum(axis=0) < 0.9, field, 0).astype(np.float32)


def rotated(affine, degrees=17.0):
    a, b = np.radians(degrees), np.radians(degrees / 2)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    out = affine.copy()
    out[:3, :3] = turn @ tilt @ affine[:3, :3]
    return out


def stored(voxels, affine, axcodes):
    """The same scan in another index order."""
    image = nib.Nifti1Image(voxels, affine)
    now = nib.orientations.io_orientation(affine)
    wanted = nib.orientations.axcodes2ornt(axcodes)
    return image.as_reoriented(nib.orientations.ornt_transform(now, wanted))


def write_case(folder, shape, affine, axcodes="LPS"):
    folder.mkdir(exist_ok=True)
    for seed, role in enumerate(ROLES):
        nib.save(stored(smooth(shape, seed), affine, axcodes), folder / f"{role}.nii.gz")
    return {role: folder / f"{role}.nii.gz" for role in ROLES}


def read_case(files):
    return {role: read_volume(file) for role, file in files.items()}


# ---------------------------------------------------------------- MONAI's own way


def monai_pass(network, files, *, orientation=True, pixdim=None):
    """Probabilities [3, I, J, K] and labels [I, J, K] in the index order of the files, by MONAI alone."""
    steps = [LoadImaged("image", image_only=False, ensure_channel_first=False)]
    steps += [Orientationd("image", axcodes="LPS", labels=None)] if orientation else []
    steps += [Spacingd("image", pixdim=pixdim, mode="bilinear")] if pixdim else []
    steps += [NormalizeIntensityd("image", nonzero=True, channel_wise=True)]
    before = Compose(steps)
    data = before({"image": [str(files[role]) for role in ROLES]})
    inferer = SlidingWindowInferer(WINDOW, sw_batch_size=1, overlap=0.5)
    with torch.no_grad():
        data["pred"] = MetaTensor(inferer(data["image"][None], network)[0], meta=data["image"].meta)
    after = Compose(
        [
            Activationsd("pred", sigmoid=True),
            Invertd("pred", transform=before, orig_keys="image", nearest_interp=False, to_tensor=True),
        ]
    )
    data = after(data)
    probabilities = data["pred"].clone().numpy()
    paint = Compose(
        [
            AsDiscreted("pred", threshold=0.5),
            Lambdad(
                "pred",
                lambda x: torch.where(
                    x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, torch.where(x[[1]] > 0, 2, 0))
                ),
            ),
        ]
    )
    return probabilities, paint(data)["pred"].numpy()[0].astype(np.uint8)


def canonical(array, file):
    affine = nib.load(file).affine
    return nib.orientations.apply_orientation(array, nib.orientations.io_orientation(affine))


def agree(files, *, orientation=True, pixdim=None):
    probabilities, labels = monai_pass(Tiny(), files, orientation=orientation, pixdim=pixdim)
    found, verdicts = Brats(Tiny(), Settings(window=WINDOW)).probabilities(read_case(files))
    for channel, region in enumerate(("tc", "wt", "et")):
        expected = canonical(probabilities[channel], files["t1c"])
        assert found[region].shape == expected.shape
        np.testing.assert_allclose(found[region], expected, atol=1e-5, rtol=0)
    expected = canonical(labels, files["t1c"])
    # Rounding decides for probabilities at the threshold.
    differing = label_map(found) != expected
    near = np.min([np.abs(found[r] - 0.5) for r in found], axis=0) < 1e-5
    assert not (differing & ~near).any()
    assert len(np.unique(expected)) == 4
    return verdicts


ISOTROPIC = np.diag([-1.0, -1, 1, 1])


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "SLA", "PIR"])
def test_agrees_with_monai_in_every_index_order(tmp_path, axcodes):
    agree(write_case(tmp_path, (40, 44, 30), ISOTROPIC, axcodes))


def test_is_the_bundle_itself_on_scans_stored_as_brats_stores_them(tmp_path):
    agree(write_case(tmp_path, (40, 44, 30), ISOTROPIC), orientation=False)


def test_agrees_with_monai_on_an_oblique_grid(tmp_path):
    agree(write_case(tmp_path, (40, 44, 30), rotated(ISOTROPIC)))


@pytest.mark.parametrize("axcodes", ["LPS", "RAS", "ASL"])
def test_agrees_with_monai_where_the_spacing_is_changed(tmp_path, axcodes):
    affine = rotated(np.diag([-0.9, -1.3, 2.5, 1]))
    verdicts = agree(write_case(tmp_path, (44, 36, 18), affine, axcodes), pixdim=(1.0, 1.0, 1.0))
    assert [v.check for v in verdicts] == ["spacing"]
    assert "resampled" in verdicts[0].message


def test_one_scan_has_one_result_in_every_index_order(tmp_path):
    expert = Brats(Tiny(), Settings(window=WINDOW))
    maps = []
    for axcodes in ("LPS", "IAR"):
        files = write_case(tmp_path / axcodes, (30, 34, 26), ISOTROPIC, axcodes)
        maps.append(label_map(expert.probabilities(read_case(files))[0]))
    np.testing.assert_array_equal(*maps)


@pytest.mark.slow
@pytest.mark.skipif(not HEAD.exists(), reason="needs the samples of `make quickstart`")
def test_agrees_with_monai_on_a_real_head(tmp_path):
    """Four sequences of the MNI head, with different intensities of the same anatomy."""
    head = nib.load(HEAD)
    values = np.asarray(head.dataobj, np.float32)[30:130, 40:150, 30:110]
    affine = head.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [30, 40, 30]
    top = values.max()
    maps = {
        "t1c": values * 1.2,
        "t1": values,
        "t2": np.where(values > 0, top - values, 0),
        "flair": np.sqrt(values * top),
    }
    files = {role: tmp_path / f"{role}.nii.gz" for role in ROLES}
    for role, file in files.items():
        nib.save(stored(maps[role].astype(np.float32), rotated(affine), "RSA"), file)
    agree(files)


# ---------------------------------------------------------------- the place of the scans


def volume(values, affine, **fields):
    return Volume(values, np.asarray(affine, float), "scan", modality="MR", **fields)


def case(shape=(32, 36, 28)):
    return {role: volume(smooth(shape, seed), np.eye(4)) for seed, role in enumerate(ROLES)}


def segment(volumes):
    found, verdicts = Brats(Tiny(), Settings(window=WINDOW)).probabilities(volumes)
    return label_map(found), verdicts


def test_channels_are_found_by_role_and_not_by_order():
    scans = case()
    labels, _ = segment(scans)
    swapped, _ = segment({role: scans[role] for role in reversed(ROLES)})
    np.testing.assert_array_equal(labels, swapped)
    exchanged, _ = segment({**scans, "t1": scans["t2"], "t2": scans["t1"]})
    assert (labels != exchanged).any()


def test_another_grid_of_the_same_space_is_resampled_as_scipy_does():
    scans = case((32, 36, 28))
    assert not segment(scans)[1]
    coarse = smooth((20, 40, 24), 9)
    affine = np.array([[1.7, 0, 0, -0.3], [0, 0.9, 0, 0.2], [0, 0, 1.1, 1.4], [0, 0, 0, 1]])
    labels, verdicts = segment({**scans, "flair": volume(coarse, affine)})
    back = np.linalg.inv(affine)
    points = np.stack(np.meshgrid(*(np.arange(n) for n in (32, 36, 28)), indexing="ij"))
    index = np.einsum("ab,bxyz->axyz", back[:3, :3], points) + back[:3, 3, None, None, None]
    flair = ndimage.map_coordinates(coarse, index, order=1, mode="nearest")
    edges = np.array(coarse.shape)[:, None, None, None] - 0.5
    flair[~((index >= -0.5) & (index <= edges)).all(axis=0) | (flair < 1e-3)] = 0
    expected, _ = segment({**scans, "flair": volume(flair, np.eye(4))})
    assert np.mean(labels != expected) < 1e-4
    (verdict,) = [v for v in verdicts if v.check == "grid"]
    assert verdict.subject == "flair" and "another grid" in verdict.message


def test_header_rounding_is_no_other_grid():
    scans = case()
    moved = np.eye(4)
    moved[:3, 3] = 0.04
    labels, verdicts = segment({**scans, "t2": volume(scans["t2"].voxels, moved)})
    assert not verdicts
    np.testing.assert_array_equal(labels, segment(scans)[0])


def test_outside_of_a_field_of_view_is_background():
    scans = case()
    cut = volume(
        scans["t2"].voxels[:, :, 6:], np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 6], [0, 0, 0, 1]])
    )
    zeroed = scans["t2"].voxels.copy()
    zeroed[:, :, :6] = 0
    labels, verdicts = segment({**scans, "t2": cut})
    np.testing.assert_array_equal(labels, segment({**scans, "t2": volume(zeroed, np.eye(4))})[0])
    assert [v.status for v in verdicts if v.check == "grid"] == ["warn"]


def test_scans_of_two_places_are_refused():
    scans = case()
    away = np.eye(4)
    away[:3, 3] = 200
    with pytest.raises(ExpertFailure, match=r"t2 shows 0% of what t1c shows.*register"):
        segment({**scans, "t2": volume(scans["t2"].voxels, away)})


def test_heads_that_do_not_match_are_doubted():
    scans = case()
    moved = np.zeros_like(scans["t2"].voxels)
    moved[16:] = scans["t2"].voxels[:16]
    _, verdicts = segment({**scans, "t2": volume(moved, np.eye(4))})
    assert [v.check for v in verdicts if v.status == "warn"] == ["registration"]


def test_a_background_that_is_not_zero_is_told():
    scans = {role: volume(v.voxels + 20, v.affine) for role, v in case().items()}
    _, verdicts = segment(scans)
    (verdict,) = [v for v in verdicts if v.check == "skull stripping"]
    assert verdict.status == "unknown" and "skull-stripped" in verdict.message


def test_padding_is_background():
    scans = case()
    padded = scans["t1"].voxels.copy()
    valid = padded != 0
    padded[~valid] = -2000
    with_padding = {**scans, "t1": volume(padded, np.eye(4), valid=valid)}
    np.testing.assert_array_equal(segment(with_padding)[0], segment(scans)[0])


def test_a_uniform_scan_is_refused():
    scans = case()
    with pytest.raises(ExpertFailure, match="flair has no contrast"):
        segment({**scans, "flair": volume(np.full((32, 36, 28), 7.0, np.float32), np.eye(4))})


def test_a_grid_beyond_the_limit_is_refused():
    wide = np.diag([30.0, 30, 30, 1])
    scans = {role: volume(v.voxels, wide) for role, v in case().items()}
    with pytest.raises(ExpertFailure, match="crop the scans"):
        segment(scans)


def test_a_slice_is_refused():
    scans = {role: volume(v.voxels[:, :, 9:10], np.eye(4)) for role, v in case().items()}
    with pytest.raises(ExpertFailure, match="t1c covers 32 x 36 x 1 voxels"):
        segment(scans)


def test_later_regions_cover_earlier_ones():
    p = {"tc": [0, 0, 1, 1, 0.5], "wt": [0, 1, 1, 1, 1], "et": [0, 0, 0, 1, 0.499]}
    labels = label_map({name: np.array(values, np.float32)[:, None, None] for name, values in p.items()})
    assert labels.ravel().tolist() == [0, 2, 1, 4, 1]


# ---------------------------------------------------------------- memory


class Hungry(Tiny):
    """Runs out of memory above some number of voxels."""

    def __init__(self, most):
        super().__init__()
        self.most, self.seen = most, []

    def forward(self, x):
        self.seen.append(tuple(x.shape[2:]))
        if x[0, 0].numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_out_of_memory_is_tried_again_with_a_smaller_window():
    network = Hungry(64 * 64 * 64)
    expert = Brats(network, Settings(window=(128, 128, 96)))
    output = RetrySmaller(expert).run(case(), "")
    assert network.seen == [(128, 128, 96), (64, 64, 64)]
    assert [v.check for v in output.verdicts] == ["window"]
    assert "64 x 64 x 64" in output.verdicts[0].message
    with pytest.raises(ExpertFailure, match="memory"):
        RetrySmaller(Brats(Hungry(0), Settings(window=(128, 128, 96)))).run(case(), "")


def test_smaller_windows_end():
    windows, window = [], (240, 240, 160)
    while window := smaller_window(window):
        windows.append(window)
    assert windows == [(128, 128, 96), (64, 64, 64)]


# ---------------------------------------------------------------- the bundle

CONFIG = {
    "bundle_root": ".",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "network_def": {
        "_target_": "SegResNet",
        "blocks_down": [1, 2, 2, 4],
        "blocks_up": [1, 1, 1],
        "init_filters": 16,
        "in_channels": 4,
        "out_channels": 3,
        "dropout_prob": 0.2,
    },
    "network": "$@network_def.to(@device)",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image", "image_only": False},
            {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
        ],
    },
    "inferer": {
        "_target_": "SlidingWindowInferer",
        "roi_size": [240, 240, 160],
        "sw_batch_size": 1,
        "overlap": 0.5,
    },
}
METADATA = {
    "version": "0.5.2",
    "network_data_format": {
        "inputs": {
            "image": {"num_channels": 4, "channel_def": {"0": "T1c", "1": "T1", "2": "T2", "3": "FLAIR"}}
        },
        "outputs": {"pred": {"channel_def": {"0": "Tumor core", "1": "Whole tumor", "2": "Enhancing tumor"}}},
    },
}


def write_bundle(folder, state, *, config=CONFIG, metadata=METADATA, wrap=False):
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    (folder / "models").mkdir(exist_ok=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata))
    torch.save({"model": state, "epoch": 3} if wrap else state, folder / "models" / "model.pt")
    return folder


@pytest.fixture(scope="module")
def released():
    """MONAI's network as in the bundle, with generated weights."""
    torch.manual_seed(0)
    return SegResNet(
        blocks_down=[1, 2, 2, 4],
        blocks_up=[1, 1, 1],
        init_filters=16,
        in_channels=4,
        out_channels=3,
        dropout_prob=0.2,
    ).eval()


def test_the_real_network_on_the_real_layout(tmp_path, released):
    state = released.state_dict()
    # As in the paper and the bundle: 4.7 M parameters, four levels.
    assert sum(value.numel() for value in state.values()) == 4_702_227
    assert state["convInit.conv.weight"].shape == (16, 4, 3, 3, 3)
    assert state["down_layers.3.4.conv2.conv.weight"].shape == (128, 128, 3, 3, 3)
    assert state["conv_final.2.conv.weight"].shape == (3, 16, 1, 1, 1)
    bundle = find_bundle(write_bundle(tmp_path, state))
    settings = read_settings(bundle)
    assert settings == Settings()
    network, sha256 = load_network(bundle, settings)
    assert not network.training and len(sha256) == 64
    assert {k: (v.shape, v.dtype) for k, v in network.state_dict().items()} == {
        k: (v.shape, torch.float32) for k, v in state.items()
    }
    image = torch.randn(1, 4, 64, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(network(image), released(image), atol=0, rtol=0)


def test_the_expert_from_a_folder(tmp_path):
    torch.manual_seed(1)
    arguments = {
        "blocks_down": [1, 1],
        "blocks_up": [1],
        "init_filters": 8,
        "in_channels": 4,
        "out_channels": 3,
    }
    network = SegResNet(**arguments).eval()
    config = {
        **{name: value for name, value in CONFIG.items() if name != "network_def"},
        "network": {"_target_": "monai.networks.nets.SegResNet", **arguments},
        "inferer": {**CONFIG["inferer"], "roi_size": [32, 32, 24]},
    }
    write_bundle(tmp_path / "brats_mri_segmentation", network.state_dict(), config=config, wrap=True)
    output = create(Weights(folder=tmp_path)).run(case(), "")
    expected, _ = Brats(network, Settings(window=(32, 32, 24))).probabilities(case())
    np.testing.assert_array_equal(output.labels, label_map(expected))
    assert output.labels.dtype == np.uint8
    assert output.label_names == {1: "non-enhancing tumor core", 2: "peritumoral edema", 4: "enhancing tumor"}
    assert len(output.weights_sha256) == 64


def test_settings_follow_the_files(tmp_path):
    metadata = {
        "network_data_format": {
            "inputs": {"image": {"channel_def": {"0": "FLAIR", "1": "T1w", "2": "T1gd", "3": "T2w"}}},
            "outputs": {
                "pred": {"channel_def": {"0": "whole tumor", "1": "tumor core", "2": "enhancing tumor"}}
            },
        }
    }
    steps = [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
        {"_target_": "Spacingd", "keys": "image", "pixdim": [1.0, 1.0, 2.0]},
        {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
    ]
    config = {**CONFIG, "preprocessing": {"_target_": "Compose", "transforms": steps}}
    settings = read_settings(find_bundle(write_bundle(tmp_path, {}, config=config, metadata=metadata)))
    assert settings.channels == ("flair", "t1", "t1c", "t2")
    assert settings.regions == ("wt", "tc", "et")
    assert settings.axcodes == "RAS" and settings.pixdim == (1.0, 1.0, 2.0)


def test_weights_alone_are_enough(tmp_path, released):
    (tmp_path / "models").mkdir()
    torch.save(released.state_dict(), tmp_path / "models" / "model.pt")
    settings = read_settings(find_bundle(tmp_path))
    assert settings == Settings()
    load_network(tmp_path, settings)


def test_safetensors_go_before_pickles(tmp_path, released):
    import safetensors.torch

    write_bundle(tmp_path, {})
    safetensors.torch.save_file(released.state_dict(), tmp_path / "models" / "model.safetensors")
    load_network(find_bundle(tmp_path), Settings())


def _network(**changes):
    return {**CONFIG, "network_def": {**CONFIG["network_def"], **changes}}


def _step(step):
    return {**CONFIG, "preprocessing": {"_target_": "Compose", "transforms": [step]}}


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (_network(_target_="UNet"), "not a SegResNet"),
        (_network(in_channels=1), "channels"),
        (_network(init_filters="$__import__('os').system('true')"), "expression"),
        (_network(blocks_down=[1, 2, 2, 4, 4]), "blocks and filters"),
        (_network(init_filters=10**9), "blocks and filters"),
        (_network(surprise=1), r"unknown arguments \(surprise\)"),
        ({**CONFIG, "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [240, 240]}}, "three sizes"),
        (
            {**CONFIG, "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [44, 44, 44]}},
            "not divisible by 8",
        ),
        ({**CONFIG, "inferer": "$@something"}, "expression"),
        (_step({"_target_": "ScaleIntensityd"}), "unknown step ScaleIntensity"),
        (_step({"_target_": "NormalizeIntensityd", "nonzero": False}), "unknown step NormalizeIntensity"),
        ({**CONFIG, "network_def": "$get_network()"}, "network_def is not an object"),
        ([], "not a JSON object"),
    ],
)
def test_configs_that_are_refused(tmp_path, config, match):
    with pytest.raises(UserError, match=match) as error:
        read_settings(find_bundle(write_bundle(tmp_path, {}, config=config)))
    assert "inference.json" in str(error.value) and "\n" not in str(error.value)


def test_channels_that_are_refused(tmp_path):
    metadata = {"network_data_format": {"inputs": {"image": {"channel_def": {"0": "CT"}}}}}
    with pytest.raises(UserError, match=r"metadata.json: input channels are not T1c, T1, T2 and FLAIR"):
        read_settings(find_bundle(write_bundle(tmp_path, {}, metadata=metadata)))


class Evil:
    def __reduce__(self):
        return (print, ("code of the bundle ran",))


def test_weights_that_are_refused(tmp_path, released, capsys):
    def load(state):
        return load_network(find_bundle(write_bundle(tmp_path, state)), Settings())

    state = released.state_dict()
    missing = {k: v for k, v in state.items() if k != "convInit.conv.weight"}
    with pytest.raises(UserError, match=r"model.pt: tensors do not fit .*1 missing \(convInit.conv.weight\)"):
        load(missing)
    with pytest.raises(UserError, match=r"1 unexpected \(extra\)"):
        load({**state, "extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"1 of another shape \(convInit.conv.weight"):
        load({**state, "convInit.conv.weight": torch.zeros(16, 1, 3, 3, 3)})
    with pytest.raises(UserError, match=r"1 not finite \(convInit.conv.weight"):
        load({**state, "convInit.conv.weight": torch.full((16, 4, 3, 3, 3), torch.nan)})
    with pytest.raises(UserError, match="not a dict of named tensors"):
        load([1, 2])
    with pytest.raises(UserError, match="contains more than tensors, not opened"):
        load(Evil())
    (tmp_path / "models" / "model.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match=r"model.pt: cannot be read \("):
        load_network(tmp_path, Settings())
    assert "ran" not in capsys.readouterr().out


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(UserError, match=r"neither models/model\.pt nor"):
        find_bundle(tmp_path)
    with pytest.raises(UserError, match="--weights"):
        create(Weights())


# ---------------------------------------------------------------- offline and live


@pytest.mark.slow
def test_the_live_host_says_what_the_run_stored(tmp_path, environment):
    torch.manual_seed(2)
    arguments = {
        "blocks_down": [1, 1],
        "blocks_up": [1],
        "init_filters": 8,
        "in_channels": 4,
        "out_channels": 3,
    }
    config = {
        **CONFIG,
        "network_def": {"_target_": "SegResNet", **arguments},
        "inferer": {**CONFIG["inferer"], "roi_size": [32, 32, 24]},
    }
    write_bundle(tmp_path / "weights" / "BRATS", SegResNet(**arguments).state_dict(), config=config)
    files = write_case(tmp_path / "data", (32, 36, 28), ISOTROPIC)
    for file in files.values():
        (tmp_path / "data" / f"{file.name.split('.')[0]}.json").write_text(
            '{"Modality": "MR", "BodyPartExamined": "HEAD"}'
        )
    summary = annotate(BRATS, tmp_path / "data", tmp_path / "out", weights=tmp_path / "weights")
    assert summary.counts["annotated"] == 1
    key = inputs_key([(role, scan.content_key) for role, scan in read_case(files).items()])
    stored = AnnotationStore(tmp_path / "out").get(key, "BRATS", "")
    assert stored is not None and stored.label_map().any()
    command = [sys.executable, "-m", "vilam3_experts", "host"]
    with ExpertHost(command, weights=tmp_path / "weights", environment=environment) as host:
        sources = [(role, VolumeSource(str(file))) for role, file in files.items()]
        live = host.ask("BRATS", input_key=key, inputs=sources)
        assert dataclasses.replace(live, seconds=0) == dataclasses.replace(stored, seconds=0)
        first = read_volume(files["t1c"]).content_key
        wrong = host.ask("BRATS", input_key=first, inputs=[("", sources[0][1])])
        assert wrong.status == "failed" and "t1c, t1, t2, flair" in wrong.reason
