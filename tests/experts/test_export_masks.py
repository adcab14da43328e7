"""Exported masks, read by nibabel, ITK and highdicom: same voxels and position, same patient or none."""

import dataclasses
import json
import shutil
import signal

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_series import write_series
from pydicom.data import get_testdata_file
from scipy.spatial.transform import Rotation
from vilam3_experts import export_masks as export
from vilam3_experts.base import measure
from vilam3_experts.cli import main
from vilam3_experts.imported.run import MaskOrigin, Options, import_masks

from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.experts.record import Annotation, LabelMap
from vilam3_jax.data.experts.store import AnnotationStore, AnnotationWriter
from vilam3_jax.data.volumes import load_volume
from vilam3_jax.datasets.samples import Sample

NAMES = {1: "liver", 2: "left kidney", 300: "liver tumor", 4: "strange thing"}
VERSION = "imported; tool: a network 1.0"


@pytest.fixture(autouse=True)
def _keep_signal_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def labels_on(shape, seed=0):
    """[X, Y, Z] uint16 with all labels, asymmetric along every axis."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint16)
    block = labels[1:40, :30, :]  # the rest of a large scan stays empty
    block[:] = rng.choice([0, 0, 0, *NAMES], size=block.shape)
    return labels


def store_for(scan, folder, labels=None, version=VERSION, expert="MINE"):
    labels = labels_on(scan.voxels.shape) if labels is None else labels
    record = Annotation(
        scan.content_key, expert, "", version=version, weights_sha256="f" * 64,
        segments=measure(labels, NAMES, scan.affine), labels=LabelMap.encode(labels, scan.affine),
    )  # fmt: skip
    with AnnotationWriter(folder) as writer:
        writer.write(record)
    return record


def by_world(labels, affine):
    """Label to the sorted RAS coordinates of its voxels."""
    out = {}
    for label in np.unique(labels[labels > 0]).tolist():
        points = np.argwhere(labels == label) @ affine[:3, :3].T + affine[:3, 3]
        out[label] = np.array(sorted(np.round(points, 2).tolist()))
    return out


def assert_same_place(found, record, renamed=None):
    expected = by_world(record.label_map(), record.label_affine)
    expected = {(renamed or {}).get(k, k): v for k, v in expected.items()}
    assert found.keys() == expected.keys()
    for label, points in expected.items():
        np.testing.assert_allclose(found[label], points, atol=0.02)


TURNED = Rotation.from_euler("xyz", [8, -12, 20], degrees=True).as_matrix() @ np.diag([1.9, 2.1, 2.9])
OBLIQUE = np.vstack([np.column_stack([TURNED, [-30, 12, 7]]), [0, 0, 0, 1]])
SHEARED = OBLIQUE @ (np.eye(4) + np.diag([0.1, 0, 0], k=1))  # as from a tilted gantry


@pytest.mark.parametrize("affine", [OBLIQUE, SHEARED], ids=["oblique", "sheared"])
@pytest.mark.parametrize("order", ["LPS", "RAS", "SAR", "IRP"])
def test_nifti_lies_on_the_voxels_of_the_file(tmp_path, order, affine):
    noise = np.random.default_rng(1).integers(-1000, 1000, (6, 7, 8)).astype(np.int16)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(order))
    )
    image = nib.Nifti1Image(noise, affine).as_reoriented(turn)
    nib.save(image, tmp_path / "scan.nii.gz")
    record = store_for(load_volume(tmp_path / "scan.nii.gz"), tmp_path / "store")
    summary = export.export_masks(tmp_path / "store", tmp_path / "scan.nii.gz", tmp_path / "out")
    ((name, file),) = summary.files
    assert name == "scan.nii.gz" and file == f"{record.input_key[:32]}-MINE-e3b0c442.nii.gz"
    mask = nib.load(tmp_path / "out" / file)
    assert mask.shape == image.shape
    np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
    assert_same_place(by_world(np.asanyarray(mask.dataobj), mask.affine), record)
    table = json.loads((tmp_path / "out" / file.replace(".nii.gz", ".json")).read_text())
    assert {int(i): n for i, n in table["labels"].items()} == NAMES and table["index_order"] == order
    if affine is OBLIQUE:  # ITK does not support shear
        index = (1, 2, 3)
        seen = sitk.ReadImage(str(tmp_path / "out" / file)).TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose(np.multiply(seen, [-1, -1, 1]), (mask.affine @ [*index, 1])[:3], atol=1e-3)


def test_what_is_exported_is_imported_again(tmp_path):
    noise = np.random.default_rng(1).integers(-1000, 1000, (6, 7, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(noise, np.diag([-2.0, -2.0, 3.0, 1.0])), tmp_path / "scan.nii.gz")
    record = store_for(load_volume(tmp_path / "scan.nii.gz"), tmp_path / "store")
    ((_, file),) = export.export_masks(tmp_path / "store", tmp_path / "scan.nii.gz", tmp_path / "out").files
    table = tmp_path / "out" / file.replace(".nii.gz", ".json")
    options = Options(labels=str(table))
    places = [tmp_path / "out" / file], tmp_path / "scan.nii.gz", "AGAIN", tmp_path / "again"
    assert import_masks(*places, MaskOrigin("tool", "x"), options).counts == {"imported": 1}
    again = AnnotationStore(tmp_path / "again").get(record.input_key, "AGAIN")
    assert again.labels == record.labels and again.segments == record.segments


@pytest.fixture
def ct(tmp_path):
    """Folder of a series whose files are not in the order of their slices."""
    write_series(tmp_path / "ct")
    return tmp_path / "ct"


def test_dicom_seg_lies_on_the_slices_of_the_series(ct, tmp_path):
    scan = load_volume(ct)
    record = store_for(scan, tmp_path / "store")
    summary = export.export_masks(tmp_path / "store", ct, tmp_path / "out", "dicom-seg")
    assert summary.problems == []
    ((_, file),) = summary.files
    seg = hd.seg.segread(tmp_path / "out" / file)
    names = {segment.SegmentNumber: str(segment.SegmentLabel) for segment in seg.SegmentSequence}
    assert names == {1: "liver", 2: "left kidney", 3: "strange thing", 4: "liver tumor"}
    volume = seg.get_volume(combine_segments=True)
    found = by_world(volume.array, np.diag([-1, -1, 1, 1]) @ volume.affine)
    assert_same_place(found, record, renamed={1: 1, 2: 2, 4: 3, 300: 4})
    # Each frame references the image at its position.
    sources = {}
    for path in ct.glob("*.dcm"):
        image = pydicom.dcmread(path)
        sources[image.SOPInstanceUID] = image.ImagePositionPatient[2]
    for frame in seg.PerFrameFunctionalGroupsSequence:
        (source,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert (
            sources[source.ReferencedSOPInstanceUID] == frame.PlanePositionSequence[0].ImagePositionPatient[2]
        )
    # SNOMED CT codes with sides for known structures, and private codes with the name for others.
    coded = [segment.SegmentedPropertyTypeCodeSequence[0] for segment in seg.SegmentSequence]
    assert [c.CodingSchemeDesignator for c in coded] == ["SCT", "SCT", "99VILAM3", "99VILAM3"]
    assert coded[1].CodeMeaning == "Kidney"
    assert coded[1].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert seg.SegmentSequence[3].SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"


def test_the_patient_is_that_of_the_source_and_nifti_has_none(ct, tmp_path):
    store_for(load_volume(ct), tmp_path / "store")
    ((_, file),) = export.export_masks(tmp_path / "store", ct, tmp_path / "out", "dicom-seg").files
    seg = pydicom.dcmread(tmp_path / "out" / file)
    source = pydicom.dcmread(next(ct.glob("*.dcm")))
    for keyword in ("PatientName", "PatientID", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert seg[keyword].value == source[keyword].value
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == source.SeriesInstanceUID
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID and "InstitutionName" not in seg
    export.export_masks(tmp_path / "store", ct, tmp_path / "nifti")
    for path in (tmp_path / "nifti").iterdir():
        content = path.read_bytes() if path.suffix == ".json" else nib.load(path).header.binaryblock
        assert (
            b"Doe" not in content
            and b"123" not in path.name.encode()[-20:]
            and b"Doe" not in path.name.encode()
        )


def test_an_export_is_the_same_object_again(ct, tmp_path):
    store_for(load_volume(ct), tmp_path / "store")
    uids = []
    for out in ("a", "b"):
        ((_, file),) = export.export_masks(tmp_path / "store", ct, tmp_path / out, "dicom-seg").files
        made = pydicom.dcmread(tmp_path / out / file)
        uids.append((made.SOPInstanceUID, made.SeriesInstanceUID))
    assert uids[0] == uids[1]


def test_dicom_seg_of_a_multi_frame_file(tmp_path):
    """pydicom's Enhanced CT, whose slices run towards the feet."""
    (tmp_path / "scans").mkdir()
    shutil.copy(get_testdata_file("eCT_Supplemental.dcm"), tmp_path / "scans" / "ct.dcm")
    scan = load_volume(tmp_path / "scans")
    assert scan.stored_orientation == "RPI"
    record = store_for(scan, tmp_path / "store")
    ((_, file),) = export.export_masks(
        tmp_path / "store", tmp_path / "scans", tmp_path / "out", "dicom-seg"
    ).files
    volume = hd.seg.segread(tmp_path / "out" / file).get_volume(combine_segments=True)
    found = by_world(volume.array, np.diag([-1, -1, 1, 1]) @ volume.affine)
    assert_same_place(found, record, renamed={1: 1, 2: 2, 4: 3, 300: 4})


def test_what_people_marked_is_manual(ct, tmp_path):
    store_for(load_volume(ct), tmp_path / "store", version="imported; ground-truth: a radiologist")
    ((_, file),) = export.export_masks(tmp_path / "store", ct, tmp_path / "out", "dicom-seg").files
    seg = pydicom.dcmread(tmp_path / "out" / file)
    assert {segment.SegmentAlgorithmType for segment in seg.SegmentSequence} == {"MANUAL"}


def test_headers_that_de_identification_emptied(ct, tmp_path):
    """The UIDs of the file meta information are used, as for the DICOM sample of TotalSegmentator."""
    for path in ct.glob("*.dcm"):
        image = pydicom.dcmread(path)
        image.SOPClassUID = image.SOPInstanceUID = ""
        image.save_as(path)
    record = store_for(load_volume(ct), tmp_path / "store")
    summary = export.export_masks(tmp_path / "store", ct, tmp_path / "out", "dicom-seg")
    assert summary.problems == [] and record.input_key[:32] in summary.files[0][1]


def test_what_cannot_be_exported_is_named(ct, tmp_path):
    noise = np.random.default_rng(1).integers(-1000, 1000, (6, 7, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(noise, np.diag([-2.0, -2.0, 3.0, 1.0])), tmp_path / "ct" / "scan.nii.gz")
    nib.save(nib.Nifti1Image(noise[::2], np.diag([-2.0, -2.0, 3.0, 1.0])), tmp_path / "ct" / "other.nii.gz")
    (tmp_path / "ct" / "broken.nii.gz").write_bytes(b"?")
    store_for(load_volume(tmp_path / "ct" / "scan.nii.gz"), tmp_path / "store")
    empty = load_volume(ct)
    store_for(empty, tmp_path / "store", labels=np.zeros(empty.voxels.shape, np.uint8))
    summary = export.export_masks(tmp_path / "store", ct, tmp_path / "out", "dicom-seg")
    reasons = dict(summary.problems)
    assert summary.files == [] and summary.without == 1
    assert "not a DICOM series" in reasons["scan.nii.gz"] and "broken" in reasons["broken.nii.gz"]
    assert any("is empty" in reason for reason in reasons.values())


def test_a_series_of_a_samples_folder_is_asked_for_by_its_own_folder(ct, tmp_path):
    fields = [field.name for field in dataclasses.fields(Sample)]
    sample = {**dict.fromkeys(fields), "name": "s", "path": "ct", "kind": "ct", "modality": "CT"}
    index = {"schema_version": 1, "samples": [sample], "assets": {}}
    (tmp_path / "samples.json").write_text(json.dumps(index))
    store_for(load_volume(ct), tmp_path / "store")
    summary = export.export_masks(tmp_path / "store", tmp_path, tmp_path / "out", "dicom-seg")
    assert summary.files == [] and f"give {ct} as --data" in summary.problems[0][1]


def test_labels_of_several_sequences_lie_on_the_first(tmp_path):
    """A BRATS record has the key of four scans; its label map is exported for the first."""
    scans = {}
    for number, role in enumerate(("t1c", "t1", "t2", "flair")):
        noise = np.random.default_rng(number).integers(0, 1000, (6, 7, 8)).astype(np.int16)
        nib.save(nib.Nifti1Image(noise, np.eye(4)), tmp_path / f"{role}.nii.gz")
        scans[role] = load_volume(tmp_path / f"{role}.nii.gz")
    keys = tuple((role, scan.content_key) for role, scan in scans.items())
    labels = labels_on((6, 7, 8))
    segments = measure(labels, NAMES, np.eye(4))
    coded = LabelMap.encode(labels, np.eye(4))
    with AnnotationWriter(tmp_path / "store") as writer:
        writer.write(Annotation(inputs_key(keys), "BRATS", inputs=keys, segments=segments, labels=coded))
    (tmp_path / "scans").mkdir()
    for role in scans:
        (tmp_path / f"{role}.nii.gz").rename(tmp_path / "scans" / f"{role}.nii.gz")
    summary = export.export_masks(tmp_path / "store", tmp_path / "scans", tmp_path / "out", expert="BRATS")
    assert [name for name, _ in summary.files] == ["t1c.nii.gz"] and summary.without == 3


def test_the_command(ct, tmp_path, capsys):
    store_for(load_volume(ct), tmp_path / "store")
    command = [
        "export",
        "--store",
        str(tmp_path / "store"),
        "--data",
        str(ct),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--format", "dicom-seg"]) == 0
    assert "1 label maps, 0 problems" in capsys.readouterr().out
    assert main([*command, "--expert", "NOBODY"]) == 2
    assert "has no record of it" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*command[:-1], str(tmp_path / "file")]) == 2
    assert "cannot be created" in capsys.readouterr().err
    assert main(["export", "--store", "/nonexistent", "--data", str(ct), "--out", str(tmp_path / "out")]) == 2
