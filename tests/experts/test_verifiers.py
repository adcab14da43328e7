"""Checks of the inputs and results of experts, in calls and on real scans."""

import dataclasses
import functools
import json
import pathlib

import nibabel as nib
import numpy as np
import pydicom
import pytest
from scipy.spatial.transform import Rotation
from vilam3_experts import descriptors
from vilam3_experts import host as host_module
from vilam3_experts.annotate import Engine, annotate
from vilam3_experts.base import ExpertInputs, ImageMetadata, Output, annotate_one, is_refused, measure
from vilam3_experts.calibrate import Calibration, ClassCalibration, load_calibration
from vilam3_experts.cli import main
from vilam3_experts.inputs import find_inputs
from vilam3_experts.weights import load_weights

from vilam3_jax.data.experts.cards import load_cards
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.experts.verify import Evidence, Finding, check_input, check_result, refusal
from vilam3_jax.data.volumes import Volume, load_label_map, read_volume
from vilam3_jax.datasets.samples import read_samples
from vilam3_jax.errors import UserError

SAMPLES = pathlib.Path(__file__).parents[2] / ".cache" / "samples"
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="needs the sample images that `make quickstart` fetches"
)
CARDS = {card.name: card for card in load_cards("quickstart")}
RAN = []  # inputs that reached an expert


class Spy:
    """Labels every bright voxel as brain."""

    def __init__(self, weights):
        del weights

    def run(self, data, args):
        RAN.append(data)
        if isinstance(data, Volume):
            return Output(labels=(data.voxels > -500).astype(np.uint8), label_names={1: "brain"})
        return Output(probabilities={"pneumonia": float(data.mean()) / 255})

    def run_batch(self, items, args):
        return [self.run(item, args) for item in items]


def spied(descriptor):
    return dataclasses.replace(descriptor, factory=f"{__name__}:Spy", weights=(), needs_folder=False)


@pytest.fixture(autouse=True)
def _forget():
    RAN.clear()


def trunk(modality="unknown"):
    """A CT of an abdomen, 340 x 230 mm."""
    x, y, _ = np.indices((100, 80, 30))
    inside = ((x - 50) / 42.5) ** 2 + ((y - 40) / 28.75) ** 2 < 1
    voxels = np.where(inside, 40, -1000).astype(np.int16)
    return Volume(voxels, np.diag([4.0, 4.0, 4.0, 1.0]), "abdomen.nii.gz", modality=modality)


def saved(volume, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(volume.voxels, volume.affine), path)
    return path


@pytest.mark.parametrize("modality", ["CT", "unknown"])
def test_a_wrong_scan_is_refused_before_the_expert_runs(modality):
    brainseg = descriptors.get("BRAINSEG")
    inputs = ExpertInputs.of(trunk(modality))
    record = annotate_one(Spy(None), brainseg, inputs, "", weights_sha256="w")
    assert record.status == "failed" and not RAN and is_refused(brainseg, inputs)
    assert record.reason.startswith("BRAINSEG was not run: ") and "BRAINSEG reads MR" in record.reason
    assert {(v.stage, v.status) for v in record.verdicts} == {("before", "fail")}
    assert "abdomen" not in record.reason and "\n" not in record.reason
    assert Annotation.from_bytes(record.to_bytes()) == record


def test_a_wrong_answer_on_an_unclear_scan_is_caught_after():
    """The same abdomen, declared as MR without a body part, so that no check refuses it."""
    volume = trunk("MR")
    small = dataclasses.replace(volume, voxels=volume.voxels[:, 16:64])  # too narrow to decide
    small = dataclasses.replace(small, affine=np.diag([4.0, 2.0, 4.0, 1.0]))
    record = annotate_one(
        Spy(None), descriptors.get("BRAINSEG"), ExpertInputs.of(small), "", weights_sha256=""
    )
    assert record.status == "ok" and len(RAN) == 1
    failed = {v.check for v in record.verdicts if v.status == "fail"}
    assert failed == {"volume_ml"} and {v.stage for v in record.verdicts} == {"before", "after"}
    assert {v.check: v.status for v in record.verdicts if v.stage == "before"} == {
        "modality": "pass",
        "intensities": "warn",
        "region": "unknown",
    }


def test_offline_and_live_refuse_alike(tmp_path, monkeypatch):
    brainseg = spied(descriptors.get("BRAINSEG"))
    path = saved(trunk(), tmp_path / "in" / "abdomen.nii.gz")
    (tmp_path / "in" / "abdomen.json").write_text(json.dumps({"Modality": "CT"}))
    summary = annotate(brainseg, tmp_path / "in", tmp_path / "store")
    assert +summary.counts == {"failed": 1}
    (key,) = AnnotationStore(tmp_path / "store").keys()
    offline = AnnotationStore(tmp_path / "store").get(*key)
    monkeypatch.setattr(host_module.registry, "get", lambda name: brainseg)
    request = {
        "id": 1,
        "expert": "BRAINSEG",
        "inputs": [{"role": "", "volume": {"path": str(path), "series": None, "modality": None}}],
    }
    live = Annotation.from_bytes(host_module.Host(None).answer(request)["annotation"])
    assert not RAN and "the image is CT" in live.reason
    assert dataclasses.replace(live, seconds=0) == dataclasses.replace(offline, seconds=0)


def write_film(path, level, body_part):
    header = pydicom.Dataset()
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    header.SOPClassUID = pydicom.uid.ComputedRadiographyImageStorage
    header.SOPInstanceUID, header.SeriesInstanceUID = pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    header.Modality, header.BodyPartExamined = "CR", body_part
    header.Rows = header.Columns = 16
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 8
    header.HighBit, header.PixelRepresentation = 7, 0
    values = np.full((16, 16), level, np.uint8)
    values[0, :2] = 0, 255
    header.PixelData = values.tobytes()
    path.parent.mkdir(exist_ok=True)
    header.save_as(path, enforce_file_format=True)


def test_films_are_judged_by_their_headers_and_refused_ones_join_no_batch(tmp_path):
    for number, part in enumerate(("CHEST", "FOOT", "CHEST")):
        write_film(tmp_path / "in" / f"{number}.dcm", 60 * number, part)
    pneumonia = spied(descriptors.get("PNEUMONIA"))
    metadata = [item.load().metadata for item in find_inputs(tmp_path / "in", pneumonia)]
    assert metadata == [(ImageMetadata("CR", part),) for part in ("CHEST", "FOOT", "CHEST")]
    summary = annotate(pneumonia, tmp_path / "in", tmp_path / "store", engine=Engine(batch=3))
    assert +summary.counts == {"annotated": 2, "failed": 1} and len(RAN) == 2
    store = AnnotationStore(tmp_path / "store")
    (refused,) = (a for a in map(lambda k: store.get(*k), store.keys()) if a.status == "failed")
    assert "shows the limb" in refused.reason


def test_calibration_is_applied_while_annotating(plugin, images, tmp_path, capsys):
    fake = descriptors.get("FAKE")
    weights = load_weights(fake, None).sha256
    mild = ClassCalibration("temperature", 2.0)
    Calibration("FAKE", "1", weights, "temperature", {"bright": mild}).save(tmp_path / "c.json")
    command = ["annotate", "--expert", "FAKE", "--data", str(images), "--out", str(tmp_path / "store")]
    assert main([*command, "--calibration", str(tmp_path / "c.json")]) == 0
    store = AnnotationStore(tmp_path / "store")
    records = [store.get(*key) for key in store.keys()]  # noqa: SIM118
    found = sorted(r.calibrated["bright"] for r in records)
    assert found == pytest.approx([1 / 3, 2 / 3]) and all(r.calibration for r in records)
    (key,) = (k for k in store.keys() if store.get(*k).probabilities["bright"] > 0.5)  # noqa: SIM118
    calibration = load_calibration(tmp_path / "c.json")
    live = host_module.Host(None, calibrations=[calibration])
    png = (images / "deeper" / "c bright.png").read_bytes()
    request = {"id": 1, "expert": "FAKE", "inputs": [{"role": "", "image_bytes": png}]}
    answer = Annotation.from_bytes(live.answer(request)["annotation"])
    assert dataclasses.replace(answer, seconds=0) == dataclasses.replace(store.get(*key), seconds=0)
    with pytest.raises(UserError, match="two calibrations"):
        host_module.Host(None, calibrations=[calibration, calibration])
    Calibration("FAKE", "2", weights, "temperature", {"bright": mild}).save(tmp_path / "c.json")
    assert main([*command, "--calibration", str(tmp_path / "c.json")]) == 2
    assert "the calibration is of FAKE 2" in capsys.readouterr().err


def test_verdicts_on_probabilities_follow_the_calibration():
    film = np.full((8, 8, 3), 204, np.uint8)
    record = annotate_one(
        Spy(None), descriptors.get("PNEUMONIA"), ExpertInputs.of(film), "", weights_sha256="w"
    )
    assert [v.status for v in record.verdicts] == ["unknown", "unknown", "pass"]
    flat = Calibration(
        "PNEUMONIA", record.version, "w", "temperature", {"pneumonia": ClassCalibration("temperature", 20.0)}
    )
    told = flat.apply(record)
    assert [v.status for v in told.verdicts] == ["unknown", "unknown", "warn"]
    assert told.verdicts[-1].message == "pneumonia at 0.52 is near the threshold of 0.5"


@pytest.mark.parametrize("turned", [(0, 0, 0), (20, -15, 30)])
def test_measured_balls_are_as_large_as_they_are(turned):
    """Two balls, one voxel of a third label, on an anisotropic, oblique grid."""
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", turned, degrees=True).as_matrix() @ np.diag([0.8, 1.1, 2.0])
    at = np.stack(np.indices((90, 70, 40)), -1) @ affine[:3, :3].T
    middle = affine[:3, :3] @ (25, 35, 20)
    second = affine[:3, :3] @ (65, 35, 20)
    labels = np.zeros((90, 70, 40), np.uint16)
    labels[np.linalg.norm(at - middle, axis=-1) < 12] = 1
    labels[np.linalg.norm(at - second, axis=-1) < 9] = 1
    labels[0, 0, 0] = 300
    ball, dot = measure(labels, {1: "balls", 300: "dot"}, affine)
    assert ball.volume_ml == pytest.approx(4 / 3 * np.pi * (12**3 + 9**3) / 1000, rel=0.01)
    assert (ball.components, dot.voxels, dot.volume_ml) == (2, 1, pytest.approx(0.00176))
    where = np.argwhere(labels == 1)
    assert ball.bbox == (*where.min(0), *(where.max(0) + 1)) and dot.bbox == (0, 0, 0, 1, 1, 1)


# Real scans


@functools.cache
def loaded(path):
    return read_volume(path)


@functools.cache
def real(name):
    """(scan, label map, names) of a sample."""
    known = next(s for s in read_samples(SAMPLES) if s.name == name)
    volume = dataclasses.replace(loaded(known.path), modality="CT" if known.kind == "ct" else "MR")
    labels = load_label_map(known.label_map, volume)
    return volume, labels, {int(i): n for i, n in known.label_names.items()}


def judged(volume, labels, names, expert):
    found = Finding(
        expert,
        "",
        Evidence.of("", volume),
        {},
        measure(labels, names, volume.affine),
        labels,
        volume.affine,
    )
    return check_result(CARDS[expert].checks, found)


@needs_samples
@pytest.mark.parametrize(
    ("name", "expert", "cut_off"),
    [
        ("totalseg_ct", "ORGANS", {"liver", "spleen", "stomach", "prostate"}),
        ("totalseg_ct_small", "ORGANS", {"liver", "spleen", "stomach", "right kidney", "left kidney"}),
        ("totalseg_ct_dicom", "ORGANS", {"liver", "spleen", "stomach", "pancreas"}),
        (
            "totalseg_mr_abdomen",
            "ORGANS",
            {"liver", "spleen", "stomach", "pancreas", "right kidney", "left kidney"},
        ),
        ("pyradiomics_lung2", "ORGANS", set()),
        ("mni152_head", "BRAINSEG", {"brain"}),
    ],
)
def test_real_maps_pass_and_what_is_cut_off_is_told(name, expert, cut_off):
    verdicts = judged(*real(name), expert)
    assert not [v.message for v in verdicts if v.status == "fail"]
    assert {v.subject for v in verdicts if v.status == "warn" and "lobe" not in v.subject} == cut_off


@needs_samples
@pytest.mark.parametrize(
    ("corrupt", "caught"),
    [
        (lambda v, m: (v, m[::-1].copy()), "right_of_mm"),
        (lambda v, m: (v, m[::-1].copy()), "sides_mm"),
        (lambda v, m: (v, m[:, :, ::-1].copy()), "above_mm"),
        (lambda v, m: (v, np.roll(m, 10, axis=0)), "hu_deviation"),
        (lambda v, m: (v, np.roll(m, 12, axis=2)), "hu_mean"),
        (lambda v, m: (dataclasses.replace(v, affine=v.affine @ np.diag([2.0, 2, 2, 1])), m), "volume_ml"),
        (lambda v, m: (v, np.where(m == 5, 2, np.where(m == 2, 5, m))), "volume_ml"),  # liver, right kidney
        (lambda v, m: (v, np.where(m == 5, 1, np.where(m == 1, 5, m))), "right_of_mm"),  # liver, spleen
    ],
)
def test_corrupted_maps_of_a_real_ct_are_caught(corrupt, caught):
    volume, labels, names = real("totalseg_ct")
    volume, labels = corrupt(volume, labels)
    assert caught in {v.check for v in judged(volume, labels, names, "ORGANS") if v.status == "fail"}


@needs_samples
def test_the_reported_case_and_its_neighbours():
    """(sample, expert) pairs that the checks must accept or refuse from the content alone."""
    refused = {}
    for known in read_samples(SAMPLES):
        if known.kind == "film":
            continue
        evidence = [Evidence.of("", loaded(known.path))]
        for expert in ("BRAINSEG", "ORGANS"):
            refused[known.name, expert] = bool(refusal(CARDS[expert], check_input(CARDS[expert], evidence)))
    cts = [s for s in read_samples(SAMPLES) if s.kind == "ct" and s.body_region != "head"]
    assert all(refused[s.name, "BRAINSEG"] for s in cts) and len(cts) == 6
    right = {s.name: "ORGANS" if s.kind == "ct" else "BRAINSEG" for s in read_samples(SAMPLES)}
    right["totalseg_mr_abdomen"] = None  # a trunk, which BRAINSEG must refuse
    assert refused["totalseg_mr_abdomen", "BRAINSEG"] and refused["mni152_head", "ORGANS"]
    assert not [name for (name, expert), no in refused.items() if no and right[name] == expert]


def test_phantoms_of_the_quickstart_are_accepted(tmp_path):
    from vilam3_jax.datasets.phantoms import make_phantoms

    make_phantoms(tmp_path, num=2)
    for known in read_samples(tmp_path):
        if known.kind == "film":
            continue
        card = CARDS["ORGANS" if known.kind == "ct" else "BRAINSEG"]
        volume = read_volume(known.path, modality="CT" if known.kind == "ct" else "MR")
        assert refusal(card, check_input(card, [Evidence.of("", volume)])) is None
