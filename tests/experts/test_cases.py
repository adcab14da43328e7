"""Cases of several scans: detected from names and headers, stated by the user, or refused."""

import dataclasses
import json
import pathlib

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid
from vilam3_experts import descriptors
from vilam3_experts.annotate import annotate
from vilam3_experts.base import Output
from vilam3_experts.cases import parse_roles
from vilam3_experts.inputs import Inputs

from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.errors import UserError

ROLES = ("t1c", "t1", "t2", "flair")


def write(root, *names, shape=(3, 4, 5)):
    """Writes small volumes with different voxels."""
    for number, name in enumerate(names, 1):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        values = np.arange(np.prod(shape), dtype=np.int16).reshape(shape) * number
        nib.save(nib.Nifti1Image(values, np.diag([-1.0, -1, 1, 1])), path)


def find(root, roles=None):
    return {item.name: item for item in Inputs(root, descriptors.BRATS, roles)}


def files(item):
    return {role: part.name for role, part in item.parts}


# ---------------------------------------------------------------- files


def test_a_folder_for_each_case(tmp_path):
    for case in ("BraTS20_Training_001", "BraTS20_Training_002"):
        write(tmp_path, *(f"{case}/{case}_{s}.nii.gz" for s in ("flair", "seg", "t1", "t1ce", "t2")))
    found = find(tmp_path)
    assert list(found) == ["BraTS20_Training_001", "BraTS20_Training_002"]
    assert files(found["BraTS20_Training_001"]) == {
        "t1c": "BraTS20_Training_001/BraTS20_Training_001_t1ce.nii.gz",
        "t1": "BraTS20_Training_001/BraTS20_Training_001_t1.nii.gz",
        "t2": "BraTS20_Training_001/BraTS20_Training_001_t2.nii.gz",
        "flair": "BraTS20_Training_001/BraTS20_Training_001_flair.nii.gz",
    }


def test_all_cases_in_one_folder(tmp_path):
    for case in ("A-000", "A-001"):
        write(tmp_path, *(f"BraTS-GLI-{case}-{s}.nii.gz" for s in ("t1c", "t1n", "t2w", "t2f")))
    found = find(tmp_path)
    assert [sorted(files(item)) for item in found.values()] == [sorted(ROLES)] * 2
    assert files(found["brats_gli_a_001"])["flair"] == "BraTS-GLI-A-001-t2f.nii.gz"


def test_scans_of_two_patients_are_never_one_case(tmp_path):
    write(tmp_path, "p1_t1c.nii", "p1_t1.nii", "p2_t2.nii", "p2_flair.nii")
    found = find(tmp_path)
    assert [bool(item.parts) for item in found.values()] == [False, False]
    assert "no t2, no flair; found t1c: p1_t1c.nii; t1: p1_t1.nii" in found["p1"].problem


def test_bids(tmp_path):
    names = ("ce-gadolinium_T1w", "T1w", "T2w", "FLAIR", "dwi")
    for subject in ("sub-01", "sub-02"):
        write(tmp_path, *(f"{subject}/ses-1/anat/{subject}_ses-1_{n}.nii.gz" for n in names))
    found = find(tmp_path)
    assert [sorted(files(item)) for item in found.values()] == [sorted(ROLES)] * 2


def test_a_folder_for_each_sequence(tmp_path):
    write(
        tmp_path,
        "EGD-1/1_T1/NIFTI/T1.nii.gz",
        "EGD-1/2_T1GD/NIFTI/T1GD.nii.gz",
        "EGD-1/3_T2/NIFTI/T2.nii.gz",
        "EGD-1/4_FLAIR/NIFTI/FLAIR.nii.gz",
        "EGD-1/5_MASK/NIFTI/MASK.nii.gz",
    )
    (item,) = find(tmp_path).values()
    assert item.name == "EGD-1" and files(item)["t1c"] == "EGD-1/2_T1GD/NIFTI/T1GD.nii.gz"


def test_folders_speak_where_files_do_not(tmp_path):
    write(tmp_path, *(f"x/{s}/scan.nii.gz" for s in ("T1_post", "T1_native", "T2", "FLAIR")))
    (item,) = find(tmp_path).values()
    assert item.name == "x" and files(item)["t1c"] == "x/T1_post/scan.nii.gz"


def test_what_was_assumed_is_noted(tmp_path):
    write(tmp_path, "a_t1ce.nii", "a_t1.nii", "a_t2.nii", "a_flair.nii")
    (item,) = find(tmp_path).values()
    inputs = item.load()
    assert inputs.roles == ROLES
    notes = " | ".join(inputs.notes)
    assert "t1: is a_t1.nii, because its name says t1; nothing says that contrast was given" in notes
    assert "t1c: is a_t1ce.nii, because its name says t1, ce" in notes


def test_incomplete_and_unclear_cases_are_listed_with_their_reason(tmp_path):
    write(tmp_path / "a", "t1.nii", "t2.nii", "flair.nii", "thing.nii")
    write(tmp_path / "b", "t1c.nii", "t1.nii", "t2.nii", "flair.nii", "t1_se.nii")
    write(tmp_path / "c", "t1_to_t1c.nii", "t1.nii", "t2.nii", "flair.nii")
    write(tmp_path / "d", "scan.nii")
    problems = {name: item.problem for name, item in find(tmp_path).items()}
    assert "no t1c; found t1: a/t1.nii" in problems["a"] and "not recognised: a/thing.nii" in problems["a"]
    assert "several for t1; found" in problems["b"] and "b/t1.nii, b/t1_se.nii" in problems["b"]
    assert "unclear: c/t1_to_t1c.nii (its name names one sequence in" in problems["c"]
    assert "tells which MRI sequence it is; state the roles with --roles" in problems["d/scan.nii"]
    with pytest.raises(UserError, match="no t1c"):
        find(tmp_path)["a"].load()


def test_sidecars_decide_and_contradict(tmp_path):
    write(tmp_path, "a_t1ce.nii", "a_t1.nii", "a_t2.nii", "a_flair.nii")
    (tmp_path / "a_t1.json").write_text('{"SeriesDescription": "t1 native"}')
    (tmp_path / "a_t2.json").write_text("{broken")
    assert find(tmp_path)["a"].parts
    (tmp_path / "a_flair.json").write_text(
        '{"SeriesDescription": "T1", "EchoTime": 0.01, "RepetitionTime": 0.5}'
    )
    problem = find(tmp_path)["a"].problem
    assert "no flair" in problem and "named as flair, but its JSON file says t1" in problem


def test_a_four_dimensional_file_needs_a_mapping(tmp_path):
    write(tmp_path, "BRATS_001.nii.gz", "BRATS_002.nii.gz", shape=(3, 4, 5, 4))
    problems = [item.problem for item in find(tmp_path).values()]
    assert len(problems) == 2
    assert all("4-D file does not tell" in p and "t1c=*.nii.gz#2" in p for p in problems)
    # The order of MSD's Task01_BrainTumour: FLAIR, T1w, t1gd, T2w.
    roles = "flair=*.nii.gz#0,t1=*.nii.gz#1,t1c=*.nii.gz#2,t2=*.nii.gz#3"
    found = find(tmp_path, roles)
    assert list(found) == ["BRATS_001", "BRATS_002"]
    inputs = dict(found["BRATS_002"].load().items)
    values = np.asarray(nib.load(tmp_path / "BRATS_002.nii.gz").dataobj)
    for channel, role in enumerate(("flair", "t1", "t1c", "t2")):
        np.testing.assert_array_equal(inputs[role].voxels, values[::-1, ::-1, :, channel])
    assert list(inputs) == list(ROLES)


def test_patterns(tmp_path):
    write(tmp_path, *(f"{case}/{n}.nii" for case in ("k", "m") for n in ("x1", "x2", "x3", "x4")))
    roles = "t1c=x1.nii,t1=X2.nii,t2=x3.nii,flair=x4.nii"
    found = find(tmp_path, roles)
    assert list(found) == ["k", "m"] and files(found["m"])["t1"] == "m/x2.nii"
    whole = ",".join(f"{role}=*/x{n}.nii" for n, role in enumerate(ROLES, 1))
    assert [files(item) for item in find(tmp_path, whole).values()] == [files(i) for i in found.values()]
    with pytest.raises(UserError, match=r"k/x1.nii matches .* and x\*; write patterns"):
        find(tmp_path, "t1c=x1.nii,t1=x*,t2=x3.nii,flair=x4.nii")
    incomplete = find(tmp_path, "t1c=x1.nii,t1=x2.nii,t2=x3.nii,flair=y.nii")
    assert "no flair" in incomplete["k"].problem
    with pytest.raises(UserError, match=r"--roles: no scan below .* matches a pattern"):
        find(tmp_path, "t1c=a,t1=b,t2=c,flair=d")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("t1c=a", "no pattern for t1, t2, flair"),
        ("t1c=a,t1=b,t2=c,flair=d,pd=e", "'pd=e' does not state one of the roles"),
        ("t1c=a,t1c=b", "does not state"),
        ("t1c", "does not state"),
        ("t1c=", "does not state"),
    ],
)
def test_patterns_that_are_refused(text, match):
    with pytest.raises(UserError, match=match):
        parse_roles(text, ROLES)


def test_manifest(tmp_path):
    write(tmp_path / "data", "w/1.nii", "w/2.nii", "w/3.nii")
    write(tmp_path / "data", "w/4.nii", shape=(3, 4, 5, 2))
    case = {"name": "first", "t1c": "w/1.nii", "t1": "w/2.nii", "t2": "w/3.nii", "flair": "w/4.nii#1"}

    def manifest(*rows):
        path = tmp_path / "cases.json"
        path.write_text(json.dumps({"cases": rows}))
        return find(tmp_path / "data", str(path))

    found = manifest(case, {**case, "name": "second", "t1": "w/gone.nii"})
    assert list(found) == ["first", "second"]
    assert found["first"].load().roles == ROLES
    with pytest.raises(UserError, match=r"gone.nii: no such file"):
        found["second"].load()
    for wrong, match in (
        ({**case, "t1": "../../etc/passwd"}, "leaves the data root"),
        ({**case, "t1": "/etc/passwd"}, "not relative"),
        ({k: v for k, v in case.items() if k != "t2"}, "must state only t1c, t1, t2, flair"),
        ({**case, "name": ""}, "no unique name"),
    ):
        with pytest.raises(UserError, match=match):
            manifest(wrong)
    with pytest.raises(UserError, match="no unique name"):
        manifest(case, case)
    (tmp_path / "cases.json").write_text("[]")
    with pytest.raises(UserError, match='no list "cases"'):
        find(tmp_path, str(tmp_path / "cases.json"))


def test_single_scans_have_no_roles(tmp_path):
    write(tmp_path, "a.nii")
    with pytest.raises(UserError, match="BRAINSEG reads single scans"):
        Inputs(tmp_path, descriptors.BRAINSEG, "t1c=a.nii")


# ---------------------------------------------------------------- DICOM


def write_series(folder, description, *, study, frame, agent="", echo=10, repetition=500, inversion=None):
    folder.mkdir(parents=True)
    uid = generate_uid()
    for z in range(4):
        item = Dataset()
        item.file_meta = FileMetaDataset()
        item.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        item.file_meta.MediaStorageSOPClassUID = item.SOPClassUID = MRImageStorage
        item.file_meta.MediaStorageSOPInstanceUID = item.SOPInstanceUID = generate_uid()
        item.StudyInstanceUID, item.SeriesInstanceUID, item.FrameOfReferenceUID = study, uid, frame
        item.Modality, item.PatientName, item.SeriesDescription = "MR", "Doe^Jane", description
        item.ScanningSequence, item.EchoTime, item.RepetitionTime = "SE", str(echo), str(repetition)
        if inversion:
            item.InversionTime = str(inversion)
        item.ContrastBolusAgent = agent
        item.Rows = item.Columns = 4
        item.ImagePositionPatient, item.ImageOrientationPatient = [0, 0, z], [1, 0, 0, 0, 1, 0]
        item.PixelSpacing, item.SliceThickness, item.InstanceNumber = [1, 1], "1", str(z + 1)
        item.SamplesPerPixel, item.PhotometricInterpretation = 1, "MONOCHROME2"
        item.BitsAllocated, item.BitsStored, item.HighBit, item.PixelRepresentation = 16, 16, 15, 0
        item.PixelData = np.full((4, 4), z + 1, np.uint16).tobytes()
        item.save_as(folder / f"{z}.dcm", enforce_file_format=True)


def write_study(root, **frames):
    study, frame = generate_uid(), generate_uid()
    for name, settings in {
        "t1c": {"description": "Ax T1", "agent": "Dotarem"},
        "t1": {"description": "Ax T1"},
        "t2": {"description": "Ax T2 TSE DOE JANE", "agent": "Dotarem", "echo": 95, "repetition": 5000},
        "flair": {"description": "FLAIR", "echo": 120, "repetition": 9000, "inversion": 2500},
    }.items():
        write_series(root / name, study=study, frame=frames.get(name, frame), **settings)


def test_a_dicom_study(tmp_path):
    write_study(tmp_path / "p")
    write_study(tmp_path / "q")
    found = find(tmp_path)
    assert [name.partition("/")[0] for name in found] == ["p", "q"] or sorted(
        name.partition("/")[0] for name in found
    ) == ["p", "q"]
    for item in found.values():
        assert {role: pathlib.PurePath(part.name).parts[1] for role, part in item.parts} == {
            r: r for r in ROLES
        }
        inputs = item.load()
        assert "a contrast agent is recorded" in " ".join(inputs.notes)
        assert "Doe" not in " ".join(inputs.notes) and "DOE" not in " ".join(inputs.notes)


def test_different_frames_of_reference_are_refused(tmp_path):
    write_study(tmp_path, t2=generate_uid())
    (item,) = find(tmp_path).values()
    assert item.problem == (
        "t1c, t1, flair and t2 have different frames of reference, so their positions cannot be compared; "
        "register them first"
    )


def test_patterns_fit_series_descriptions(tmp_path):
    write_study(tmp_path)
    flair = next((tmp_path / "flair").iterdir())
    assert pydicom.dcmread(flair).SeriesDescription == "FLAIR"
    found = find(tmp_path, "t1c=t1c/*,t1=t1/*,t2=ax t2*,flair=flair")
    (item,) = found.values()
    assert [role for role, _ in item.parts] == list(ROLES)


# ---------------------------------------------------------------- a run


class Fake:
    """Labels voxels that are brighter in the T1c than in the T1."""

    def __init__(self, weights):
        pass

    def run(self, data, args):
        assert list(data) == list(ROLES)
        labels = (data["t1c"].voxels > data["t1"].voxels).astype(np.uint8) * 4
        return Output(labels=labels, label_names={4: "enhancing tumor"})


def test_a_run_over_cases(tmp_path):
    write(tmp_path / "data", "a/t1.nii", "a/t1ce.nii", "a/t2.nii", "a/flair.nii", "b/t1.nii")
    for path in (tmp_path / "data" / "a").glob("*.nii"):
        path.with_suffix(".json").write_text('{"Modality": "MR", "BodyPartExamined": "HEAD"}')
    fake = dataclasses.replace(descriptors.BRATS, needs_folder=False, factory=f"{__name__}:Fake")
    summary = annotate(fake, tmp_path / "data", tmp_path / "out")
    assert summary.counts["annotated"] == 1 and summary.counts["unreadable"] == 1
    (item,) = [item for item in Inputs(tmp_path / "data", fake) if item.parts]
    key = inputs_key(item.load().keys)
    annotation = AnnotationStore(tmp_path / "out").get(key, "BRATS", "")
    assert annotation is not None
    assert [role for role, _ in annotation.inputs] == list(ROLES)
    assert annotation.segments[0].name == "enhancing tumor"
    assert annotate(fake, tmp_path / "data", tmp_path / "out").counts["skipped"] == 1
