"""VISTA3D: the folder, the geometry compared with MONAI's pipeline, the windows, and refusals."""

import dataclasses
import hashlib
import json
import pathlib

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.apps.vista3d.transforms import VistaPostTransformd
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.inferers import sliding_window_inference
from monai.networks.nets import vista3d132
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
    Spacing,
    Spacingd,
)
from safetensors.torch import save_file
from torch import nn
from vilam3_experts import descriptors, monai_volumes
from vilam3_experts.base import ExpertFailure
from vilam3_experts.vista3d import bundle as bundles
from vilam3_experts.vista3d import expert as experts
from vilam3_experts.vista3d import windows
from vilam3_experts.vista3d.bundle import Bundle, read_bundle
from vilam3_experts.vista3d.pipeline import PreprocessedScan
from vilam3_experts.weights import Weights

from vilam3_jax.data.experts.cards import load_cards
from vilam3_jax.data.experts.labels import label_table
from vilam3_jax.data.volumes import Volume, load_volume
from vilam3_jax.errors import UserError

CT = (
    pathlib.Path(__file__).parents[2]
    / ".cache/samples/totalsegmentator-2.18.0/tests/reference_files/example_ct.nii.gz"
)
CPU = torch.device("cpu")
HU = (-963.8247715525971, 1053.678477684517)
PROMPTS = [1, 3, 115, 28, 22]


class WholeNetwork:
    """Wraps a module with the call `network(window, class_vector=prompts [P, 1])` -> [P, 1, x, y, z]."""

    prompt_chunk: int | None = None

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def encode(self, window: torch.Tensor) -> torch.Tensor:
        return window

    def decode(self, features: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        logits = self._network(features, class_vector=prompts[:, None])
        return logits.reshape(len(prompts), *features.shape[2:])


class Tiny(nn.Module):
    """VISTA3D's interface with one convolution, random and fixed."""

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
    """[3, 3], rotation by angles in radians about the three axes."""
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
    """Labels [X, Y, Z] of the expert's pipeline."""
    prepared = PreprocessedScan(volume, bundles.DEFAULT_STEPS)
    options = {"device": CPU, "sums_device": CPU, "memory_bytes": 0, "prompt_chunk": None, "amp": True}
    options |= changes
    positions = windows.argmax_labels(
        prepared.image.as_tensor()[None].contiguous(), network, prompts, settings, **options
    )
    table = np.array([0, *prompts], np.uint8)
    return prepared.to_input(torch.from_numpy(table[positions.numpy()]))


def compare(tmp_path, values, affine, settings):
    """Fraction of voxels in which the expert and MONAI differ; checks that both find several labels."""
    path = tmp_path / "scan.nii"
    nib.Nifti1Image(values, affine).to_filename(path)
    volume = load_volume(path, modality="CT")
    theirs = monai_pipeline(path, Tiny(), PROMPTS, settings)
    mine = ours(volume, WholeNetwork(Tiny()), PROMPTS, settings)
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
@pytest.mark.parametrize("grid", ["as it is", "axes permuted", "oblique"])
def test_the_whole_ct_agrees_with_monai(tmp_path, ct, grid):
    values, affine = ct
    settings = windows.WindowSettings((128, 128, 128), 0.3, "constant")
    assert compare(tmp_path, values, GRIDS[grid](affine), settings) <= 1e-5


def small_volume(shape=(40, 36, 30), spacing=1.5, **fields):
    """A ball of tissue in air."""
    x, y, z = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    random = np.random.default_rng(1).integers(-150, 250, shape)
    voxels = np.where(x**2 + y**2 + z**2 < 0.6, random, -1000).astype(np.int16)
    return Volume(voxels, np.diag([spacing] * 3 + [1.0]), "ball.nii", **{"modality": "CT", **fields})


@pytest.mark.parametrize("spacing", [0.75, 2.0])
@pytest.mark.parametrize("shear", [0.0, 0.1])
def test_slabs_are_monai_spacing_bit_for_bit(monkeypatch, spacing, shear):
    monkeypatch.setattr(monai_volumes, "_SLAB_POINTS", 500)
    affine = np.diag([spacing, spacing, 2.5, 1.0]) @ (np.eye(4) + np.diag([shear, 0, 0], 1))
    values = torch.from_numpy(np.random.default_rng(2).integers(-300, 300, (1, 30, 21, 17)))
    image = MetaTensor(values.float(), affine=torch.from_numpy(affine))
    spacer = Spacing((1.5, 1.5, 1.5), mode="bilinear")
    theirs = spacer(image)
    shape, target = monai_volumes.spacing_grid(image, (1.5, 1.5, 1.5))
    mine = monai_volumes.resample_linear(image, target, shape)
    assert torch.equal(mine.as_tensor(), theirs.as_tensor()) and torch.equal(mine.affine, theirs.affine)
    labels = torch.from_numpy(np.random.default_rng(3).integers(0, 9, theirs.shape, np.uint8))
    back = MetaTensor(labels.float(), meta=theirs.meta, applied_operations=theirs.applied_operations)
    back.applied_operations[-1]["extra_info"]["mode"] = "nearest"
    mine = monai_volumes.resample_nearest(
        MetaTensor(labels, affine=mine.affine), image.affine, image.shape[1:]
    )
    assert torch.equal(mine, spacer.inverse(back).as_tensor().to(torch.uint8))


@pytest.mark.parametrize(
    "shape, roi, overlap, padding, prompts",
    [
        ((40, 37, 25), (16, 16, 16), 0.3, "constant", [1, 2, 7]),
        ((33, 16, 20), (16, 16, 16), 0.625, "constant", [4, 9]),
        ((10, 40, 12), (16, 16, 16), 0.0, "replicate", list(range(1, 21))),
        ((12, 9, 16), (16, 16, 16), 0.3, "replicate", [5]),
    ],
)
@pytest.mark.parametrize("prompt_chunk", [None, 2])
@pytest.mark.parametrize("memory_bytes", [0, 1 << 30])
def test_windows_give_the_inferers_argmax(shape, roi, overlap, padding, prompts, prompt_chunk, memory_bytes):
    image = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(3))
    classes = torch.tensor(prompts)
    logits = sliding_window_inference(
        image, roi, 1, Tiny(), overlap, mode="gaussian", padding_mode=padding,
        transpose=True, class_vector=classes[:, None],
    )[0]  # fmt: skip
    expected = torch.where((logits > 0).any(0), logits.argmax(0) + 1, 0)
    found = windows.argmax_labels(
        image, WholeNetwork(Tiny()), prompts, windows.WindowSettings(roi, overlap, padding),
        device=CPU, sums_device=CPU, memory_bytes=memory_bytes, prompt_chunk=prompt_chunk, amp=True,
    )  # fmt: skip
    assert found.dtype == torch.uint8 and torch.equal(found.long(), expected)
    assert len(expected.unique()) > 1


class Greedy:
    """Runs out of memory above `most` prompts at once."""

    prompt_chunk = None

    def __init__(self, most):
        self.most, self.calls, self.encoded = most, [], 0

    def encode(self, window):
        self.encoded += 1
        return window

    def decode(self, features, prompts):
        self.calls.append(len(prompts))
        if len(prompts) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return features[0].expand(len(prompts), -1, -1, -1).clone()


def segment(network, **options):
    settings = windows.WindowSettings((16, 16, 16), 0.3, "constant")
    image = torch.ones(1, 1, 16, 16, 20)

    def run(prompt_chunk, sums_device, memory_bytes):
        return windows.argmax_labels(
            image, network, list(range(1, 13)), settings, device=CPU, sums_device=sums_device,
            memory_bytes=memory_bytes, prompt_chunk=prompt_chunk, amp=True,
        )  # fmt: skip

    return windows.retry_with_less_memory(run, network, CPU, options.get("host_bytes", 1 << 30))


def test_too_little_gpu_memory_is_retried_with_fewer_prompts():
    greedy = Greedy(8)
    assert bool((segment(greedy) == 1).all())
    assert greedy.calls == [12, 8, 4, 8, 4] and greedy.encoded == 3  # one window of the first try, two after
    with pytest.raises(ExpertFailure, match="even for one prompt"):
        segment(Greedy(0))


def test_no_room_for_the_scratch_file_is_said(monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def seek(self, _):
            pass

        def write(self, data):
            return len(data) // 2

    monkeypatch.setattr(windows.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(ExpertFailure, match="scratch file: No space left on device; make room in TMPDIR"):
        segment(Greedy(12), host_bytes=0)


def test_logits_that_are_no_numbers_are_no_background():
    class Broken(Greedy):
        def decode(self, features, prompts):
            return super().decode(features, prompts) * float("nan")

    with pytest.raises(ExpertFailure, match="returned NaN"):
        segment(Broken(99))


# The folder. Generated weights of the real network at a sixth of its width: same names, other shapes.


@pytest.fixture(scope="module")
def narrow():
    torch.manual_seed(0)
    return vista3d132(encoder_embed_dim=8).eval()


@pytest.fixture
def narrow_bundles(monkeypatch, narrow):
    """`read_bundle` expects the narrow network."""
    monkeypatch.setattr(bundles, "vista3d132", lambda: vista3d132(encoder_embed_dim=8))
    return narrow


def metadata(labels=None):
    labels = {"0": "background", **{str(i): n for i, n in (labels or label_table("VISTA3D")).items()}}
    return {
        "version": "0.5.4",
        "network_data_format": {"outputs": {"pred": {"type": "image", "channel_def": labels}}},
    }


def config():
    """`inference.json` of vista3d 0.5.4, without the parts that run it."""
    return {
        "imports": ["$import os", "$import scripts"],
        "image_key": "image",
        "everything_labels": "$list(set([i+1 for i in range(132)]) - set([2,16,18]))",
        "subclass": {
            "2": [14, 5],
            "20": [28, 29, 30, 31, 32],
            "21": "$list(range(33, 57)) + list(range(63, 98)) + [114, 120, 122]",
        },
        "resample_spacing": [1.5, 1.5, 1.5],
        "patch_size": [128, 128, 128],
        "network_def": "$monai.networks.nets.vista3d132(in_channels=@input_channels)",
        "preprocessing_transforms": [
            {"_target_": "LoadImaged", "keys": "@image_key", "image_only": True},
            {"_target_": "EnsureChannelFirstd", "keys": "@image_key"},
            {"_target_": "EnsureTyped", "keys": "@image_key", "device": "@device", "track_meta": True},
            {"_target_": "Spacingd", "keys": "@image_key", "pixdim": "@resample_spacing", "mode": "bilinear"},
            {"_target_": "CropForegroundd", "keys": "@image_key", "allow_smaller": True, "margin": 10,
             "source_key": "@image_key"},
            {"_target_": "monai.apps.vista3d.transforms.VistaPreTransformd", "keys": "@image_key",
             "subclass": "@subclass", "labels_dict": "@labels_dict"},
            {"_target_": "ScaleIntensityRanged", "keys": "@image_key", "a_min": HU[0], "a_max": HU[1],
             "b_min": 0, "b_max": 1, "clip": True},
            {"_target_": "Orientationd", "keys": "@image_key", "axcodes": "RAS"},
            {"_target_": "CastToTyped", "keys": "@image_key", "dtype": "$torch.float32"},
        ],
        "preprocessing": {"_target_": "Compose", "transforms": "$@preprocessing_transforms "},
        "inferer": {"_target_": "scripts.inferer.Vista3dInferer", "roi_size": "@patch_size", "overlap": 0.3},
        "evaluator": {"_target_": "scripts.evaluator.Vista3dEvaluator", "amp": True},
    }  # fmt: skip


def write_bundle(folder, state, change=lambda config: None, labels=None):
    for name in ("configs", "models"):
        (folder / name).mkdir(parents=True)
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata(labels)))
    content = config()
    change(content)
    (folder / "configs" / "inference.json").write_text(json.dumps(content))
    torch.save(state, folder / "models" / "model.pt")
    return folder


def write_hf(folder, state, where="vista3d_pretrained_model"):
    (folder / where).mkdir(parents=True, exist_ok=True)
    (folder / "metadata.json").write_text(json.dumps(metadata()))
    (folder / where / "config.json").write_text(
        json.dumps({"model_type": "VISTA3D", "encoder_embed_dim": 48, "input_channels": 1})
    )
    save_file({f"network.{key}": value for key, value in state.items()}, folder / where / "model.safetensors")
    return folder


def test_both_layouts_are_one_expert(tmp_path, narrow_bundles):
    state = narrow_bundles.state_dict()
    bundle = read_bundle(write_bundle(tmp_path / "zoo", state))
    assert bundle.steps == bundles.DEFAULT_STEPS and bundle.subclasses == bundles.SUBCLASSES
    assert bundle.windows == windows.WindowSettings((128, 128, 128), 0.3, "constant")
    assert bundle.version == "0.5.4" and bundle.labels == label_table("VISTA3D") and bundle.amp
    digest = hashlib.sha256((tmp_path / "zoo/models/model.pt").read_bytes()).hexdigest()
    assert bundle.weights_sha256 == digest
    for name, where in (("hf", "vista3d_pretrained_model"), ("flat", ".")):
        other = read_bundle(write_hf(tmp_path / name, state, where))
        assert other.weights_sha256 not in ("", digest)
        for field in ("steps", "subclasses", "windows", "labels", "amp"):
            assert getattr(other, field) == getattr(bundle, field)
        for key, value in other.network.state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, state[key])


def test_values_of_the_bundle_are_used(tmp_path, narrow_bundles):
    def change(config):
        config["resample_spacing"] = [2.0, 2.0, 3.0]
        config["patch_size"] = [96, 96, 64]
        config["inferer"]["overlap"] = 0.625
        config["subclass"]["20"] = [28, 29]
        config["evaluator"]["amp"] = False
        transforms = config.pop("preprocessing_transforms")
        transforms[3:5] = transforms[4:2:-1]  # crop, then resample
        config["preprocessing"]["transforms"] = transforms

    folder = write_bundle(tmp_path / "b", {"model": narrow_bundles.state_dict()}, change)
    text = (folder / "configs/metadata.json").read_text()
    (folder / "configs/metadata.json").write_text(text.replace("0.5.4", "0.5.10"))
    bundle = read_bundle(folder)
    assert bundle.windows == windows.WindowSettings((96, 96, 64), 0.625, "replicate")
    assert bundle.steps[:2] == (bundles.CropStep(10, True), bundles.SpacingStep((2.0, 2.0, 3.0)))
    assert bundle.subclasses[20] == (28, 29) and not bundle.amp


def transform(config, name):
    return next(t for t in config["preprocessing_transforms"] if t["_target_"] == name)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["inferer"].update(overlap="$0.3 if fast else 0.6"), "overlap is the expression"),
        (lambda c: c["inferer"].update(overlap=1.0), "overlap 1.0 is not from 0 to below 1"),
        (lambda c: c.update(patch_size=[100, 128, 128]), "multiples of 16"),
        (lambda c: c.update(patch_size="@patch_size"), "roi_size is the expression"),
        (lambda c: c["subclass"].update({"21": "$list(range(9))"}), "subclass '21'"),
        (lambda c: transform(c, "Spacingd").update(mode="nearest"), "Spacingd in mode 'nearest'"),
        (lambda c: transform(c, "Spacingd").update(diagonal=True), "Spacingd has 'diagonal'"),
        (lambda c: transform(c, "Spacingd").update(_target_="Zoomd"), "has Zoomd, which is not supported"),
        (lambda c: c["preprocessing_transforms"].pop(3), "0 times Spacingd"),
        (lambda c: transform(c, "ScaleIntensityRanged").update(a_max=float("nan")), "a_max is nan"),
        (lambda c: transform(c, "Orientationd").update(axcodes="RAX"), "Orientationd to 'RAX'"),
        (lambda c: c["evaluator"].update(amp="$True"), "amp is the expression"),
    ],
)
def test_a_configuration_that_is_not_followed_is_refused(tmp_path, narrow_bundles, change, message):
    folder = write_bundle(tmp_path / "b", {}, change)
    with pytest.raises(UserError, match=message) as error:
        read_bundle(folder)
    assert "inference.json" in str(error.value) and "; " in str(error.value)


class Harmful:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("harm"),)


def missing_one(state):
    return {key: value for key, value in list(state.items())[1:]}


@pytest.mark.parametrize(
    "spoil, message",
    [
        (missing_one, r"do not fit .*: 1 missing \(image_encoder.encoder.conv_init.weight\)"),
        (lambda state: {**state, "extra": torch.ones(1)}, r"1 unexpected \(extra\)"),
        (
            lambda state: {**state, next(iter(state)): torch.ones(3)},
            "1 of another shape .*MONAI 1.4 or newer",
        ),
        (lambda state: {key: value.long() for key, value in state.items()}, "not floating point"),
        (lambda state: {"model": 3}, "not a dict of named tensors"),
        (lambda state: {"a": Harmful()}, "contains more than tensors, not opened"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, narrow_bundles, spoil, message):
    folder = write_bundle(tmp_path / "b", spoil(narrow_bundles.state_dict()))
    with pytest.raises(UserError, match=message) as error:
        read_bundle(folder)
    assert "model.pt" in str(error.value)
    assert not pathlib.Path("harm").exists()


def test_a_folder_that_lacks_something_says_what(tmp_path, narrow_bundles):
    with pytest.raises(UserError, match="no such folder"):
        read_bundle(tmp_path / "none")
    with pytest.raises(UserError, match="lists labels"):
        read_bundle(tmp_path)
    folder = write_bundle(tmp_path / "b", {})
    (folder / "models/model.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match=r"model.pt: cannot be read \("):
        read_bundle(folder)
    (folder / "models/model.pt").unlink()
    with pytest.raises(UserError, match="no weights; it needs one of models/"):
        read_bundle(folder)
    (folder / "configs/metadata.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"metadata\.json: not valid JSON"):
        read_bundle(folder)
    (folder / "configs/metadata.json").write_text(json.dumps(metadata({1: "liver", 345: "left insula"})))
    with pytest.raises(UserError, match="label ids up to 345, VISTA3D for CT has 132"):
        read_bundle(folder)
    (folder / "configs/metadata.json").write_text(json.dumps(metadata({1: "liver", 2: "Liver"})))
    with pytest.raises(UserError, match="two labels share"):
        read_bundle(folder)


def test_labels_may_lie_in_a_file_of_their_own(tmp_path, narrow_bundles):
    folder = write_hf(tmp_path / "hf", narrow_bundles.state_dict())
    (folder / "metadata.json").unlink()
    (folder / "label_dict.json").write_text(json.dumps({n: i for i, n in label_table("VISTA3D").items()}))
    assert read_bundle(folder).labels == label_table("VISTA3D")
    (folder / "vista3d_pretrained_model/config.json").write_text('{"encoder_embed_dim": 64}')
    with pytest.raises(UserError, match="encoder_embed_dim is 64, expected 48"):
        read_bundle(folder)


def only_labels(labels=None):
    return Bundle(
        "b", "0.5.4", labels or label_table("VISTA3D"), bundles.SUBCLASSES, (), None, True, None, ""
    )  # type: ignore[arg-type]


def test_every_group_of_the_card_has_prompts():
    (card,) = [card for card in load_cards("vila_m3") if card.name == "VISTA3D"]
    ids = {a: [p.label_id for p in experts.prompt_table(only_labels(), a)] for a in card.args}
    assert len(card.args) == 10 and len(ids["everything"]) == 117
    assert ids["hepatic tumor"] == [1, 26]
    assert descriptors.VISTA3D.check_args("hepatoma") == "hepatic tumor"
    assert ids["organs"][:4] == [1, 14, 5, 3] and ids["organs"].count(5) == 1 and 2 not in ids["organs"]
    assert ids["lung tumor"] == [28, 29, 30, 31, 32, 23]
    assert len(ids["skeleton"]) == 64 and not {20, 21} & {i for group in ids.values() for i in group}
    with pytest.raises(ExpertFailure, match="no group of labels 'feet'"):
        experts.prompt_table(only_labels(), "feet")


def test_labels_are_found_by_name_not_by_number():
    other = {i + 1000: name.upper() for i, name in label_table("VISTA3D").items()}
    prompts = experts.prompt_table(only_labels(other), "hepatic tumor")
    assert [(p.class_id, p.label_id, p.name) for p in prompts] == [
        (1001, 1, "LIVER"),
        (1026, 26, "HEPATIC TUMOR"),
    ]
    with pytest.raises(ExpertFailure, match="list no label 'hepatic tumor' of the group"):
        experts.prompt_table(only_labels({1: "liver"}), "hepatic tumor")


@pytest.fixture
def vista(tmp_path, narrow_bundles):
    folder = write_bundle(
        tmp_path / "b", narrow_bundles.state_dict(), lambda config: config.update(patch_size=[32, 32, 32])
    )
    return experts.create(Weights(folder=folder))


def test_the_expert_answers_on_the_grid_of_the_scan(tmp_path, vista, narrow):
    volume = small_volume((26, 22, 18), spacing=2.0)
    output = vista.run(volume, "organs")
    assert output.labels.shape == volume.voxels.shape and output.labels.dtype == np.uint8
    assert set(np.unique(output.labels)) - {0} <= set(output.label_names)
    assert output.label_names[14] == "left kidney" and output.weights_sha256 == vista.bundle.weights_sha256
    path = tmp_path / "scan.nii"
    nib.Nifti1Image(volume.voxels, volume.affine).to_filename(path)
    prompts = [p.class_id for p in experts.prompt_table(vista.bundle, "organs")]
    theirs = monai_pipeline(path, narrow, prompts, vista.bundle.windows)
    assert len(np.unique(theirs)) > 2 and float((theirs != output.labels).mean()) <= 1e-5


def test_outside_the_crop_is_background(vista):
    volume = small_volume((70, 24, 24))
    volume.voxels[20:] = -1000
    positive = WholeNetwork(lambda window, class_vector: torch.ones(len(class_vector), 1, *window.shape[2:]))
    vista = experts.Vista3d(vista.bundle, positive, CPU)
    labels = vista.run(volume, "bone lesion").labels
    assert set(np.unique(labels[:30])) <= {0, 128} and (labels == 128).any()
    assert not labels[40:].any()


@pytest.mark.parametrize(
    "volume, message",
    [
        (small_volume(modality="MR"), "reads CT, and this is MR"),
        (small_volume(units="SUVbw"), "Hounsfield units, and this scan is in SUVbw"),
        (small_volume((20, 20, 1)), "20x20x1 voxels"),
        (
            dataclasses.replace(small_volume(), voxels=np.full((9, 9, 9), np.nan, np.float32)),
            "not finite numbers",
        ),
        (
            dataclasses.replace(small_volume(), voxels=np.full((9, 9, 9), -1000, np.int16)),
            "no voxel is above 0 HU",
        ),
        (small_volume(spacing=99.0), "more than 536870912; crop the scan"),
        (
            dataclasses.replace(small_volume(), voxels=np.broadcast_to(np.int16(1), (2000, 2000, 200))),
            "2000x2000x200 voxels, more than",
        ),
    ],
)
def test_scans_that_cannot_be_analysed_say_why(vista, volume, message):
    with pytest.raises(ExpertFailure, match=message):
        vista.run(volume, "everything")


def test_the_descriptor_is_registered():
    descriptor = descriptors.get("VISTA3D")
    assert descriptor.card.modalities == ("CT",) and descriptor.card.args[0] == "everything"
    with pytest.raises(UserError, match="VISTA3D needs"):
        descriptor.create(Weights())


@pytest.mark.slow
def test_the_real_network_on_the_real_layout(tmp_path):
    """Generated weights of full size: names, shapes, dtype, and one forward pass of 64^3 as by MONAI."""
    torch.manual_seed(0)
    network = vista3d132().eval()
    state = network.state_dict()
    assert len(state) == 259 and sum(v.numel() for v in state.values()) == 217_965_054
    bundle = read_bundle(write_bundle(tmp_path / "b", state))
    hf = read_bundle(write_hf(tmp_path / "hf", {k: v.to(torch.bfloat16) for k, v in state.items()}))
    for key, value in state.items():
        assert torch.equal(bundle.network.state_dict()[key], value)
        assert torch.equal(hf.network.state_dict()[key], value.to(torch.bfloat16).float())
    window = torch.rand(1, 1, 64, 64, 64)
    prompts = torch.tensor([1, 3, 117])
    with torch.inference_mode():
        expected = network(window, class_vector=prompts[:, None])[:, 0]
        split = windows.SplitNetwork(bundle.network)
        features = split.encode(window)
        found = torch.cat([split.decode(features, prompts[:2]), split.decode(features, prompts[2:])])
    assert found.shape == (3, 64, 64, 64) and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
