"""DICOM series: geometry as highdicom and SimpleITK have it, odd files put aside, stacks never mixed, SUV."""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from highdicom.spatial import PixelToReferenceTransformer, get_volume_positions
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    DigitalXRayImageStorageForPresentation,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    NuclearMedicineImageStorage,
    PositronEmissionTomographyImageStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    generate_uid,
)
from scipy.spatial.transform import Rotation

from vilam3_jax.data.dicom import suv
from vilam3_jax.data.dicom.geometry import plane_of, stack_slices
from vilam3_jax.data.dicom.grouping import group_headers
from vilam3_jax.data.dicom.headers import read_header
from vilam3_jax.data.dicom.series import list_series, read_series
from vilam3_jax.data.limits import Limits
from vilam3_jax.errors import UserError

SAMPLES = Path(__file__).parents[2] / ".cache" / "samples"
ROWS, COLUMNS = 4, 5
AXIAL = [1, 0, 0, 0, 1, 0]
CORONAL = [1, 0, 0, 0, 0, -1]
SAGITTAL = [0, 1, 0, 0, 0, -1]
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])


def plain_slice(k=0, z=None, **changes):
    """A CT slice of `ROWS` x `COLUMNS` whose pixels are 100 k, 100 k + 1, ...; None removes an element."""
    d = Dataset()
    d.file_meta = FileMetaDataset()
    d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    d.SOPClassUID, d.SOPInstanceUID, d.Modality = CTImageStorage, generate_uid(), "CT"
    d.StudyInstanceUID, d.SeriesInstanceUID, d.FrameOfReferenceUID = "1.2.9", "1.2.3", "1.2.8"
    d.Rows, d.Columns, d.SamplesPerPixel, d.PhotometricInterpretation = ROWS, COLUMNS, 1, "MONOCHROME2"
    d.BitsAllocated, d.BitsStored, d.HighBit, d.PixelRepresentation = 16, 16, 15, 1
    d.PixelData = (100 * k + np.arange(ROWS * COLUMNS)).astype("<i2").tobytes()
    d.RescaleSlope, d.RescaleIntercept, d.RescaleType = 1, 0, "HU"
    d.ImagePositionPatient, d.ImageOrientationPatient = [0, 0, k if z is None else z], AXIAL
    d.PixelSpacing, d.SliceThickness, d.InstanceNumber = ["0.5", "0.75"], 1, k + 1
    d.PatientName, d.PatientID, d.PatientBirthDate = "Doe^Jane", "4711", "19700101"
    for keyword, value in changes.items():
        if value is None:
            d.pop(keyword, None)
        elif isinstance(value, bytes) and keyword != "PixelData":  # as it stands in a file, valid or not
            tag = Tag(keyword)
            d[tag] = RawDataElement(tag, dictionary_VR(tag), len(value), value, 0, False, True)
        else:
            setattr(d, keyword, value)
    d.file_meta.MediaStorageSOPClassUID = d.SOPClassUID
    d.file_meta.MediaStorageSOPInstanceUID = d.SOPInstanceUID
    return d


def save(dataset, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return path


def save_stack(folder, count=6, first=0, **changes):
    for k in range(count):
        own = {key: value(k) if callable(value) else value for key, value in changes.items()}
        save(plain_slice(k, **own), folder / f"{first + k:03d}.dcm")
    return folder


def item(**values):
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def assert_same_volume(ours, theirs):
    """`theirs`: highdicom's [slices, rows, columns] in LPS, which may count slices from the other end."""
    affine = LPS_TO_RAS @ theirs.affine @ np.eye(4)[[2, 1, 0, 3]]
    values = theirs.array.transpose(2, 1, 0)
    if affine[:3, 2] @ ours.affine[:3, 2] < 0:
        affine[:3, 3] += affine[:3, 2] * (values.shape[2] - 1)
        affine[:3, 2] *= -1
        values = values[:, :, ::-1]
    np.testing.assert_allclose(ours.affine, affine, atol=1e-5)
    np.testing.assert_array_equal(ours.values, values)


def only(found):
    (series,) = found
    return series


# Geometry


def positions_of(orientation, count, distance, origin=(-20.5, 31.25, -700.0), sideways=(0.0, 0.0)):
    across, down = np.reshape(orientation, (2, 3))
    step = distance * np.cross(across, down) + sideways[0] * across + sideways[1] * down
    return [(np.array(origin) + k * step).round(9).tolist() for k in range(count)]


ORIENTATIONS = {
    "axial": AXIAL,
    "axial, prone": [-1, 0, 0, 0, -1, 0],
    "axial from above": [1, 0, 0, 0, -1, 0],
    "coronal": CORONAL,
    "sagittal": SAGITTAL,
    "oblique": Rotation.from_euler("xyz", [20, -35, 50], degrees=True).as_matrix()[:2].ravel().tolist(),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_affine_agrees_with_highdicom_and_simpleitk(tmp_path, name):
    sitk = pytest.importorskip("SimpleITK")
    orientation = ORIENTATIONS[name]
    places = positions_of(orientation, 6, 2.5)
    shuffled = np.random.default_rng(0).permutation(6)
    slices = [
        plain_slice(k, ImagePositionPatient=places[k], ImageOrientationPatient=orientation) for k in shuffled
    ]
    files = [save(dataset, tmp_path / f"{n}.dcm") for n, dataset in enumerate(slices)]
    volume = read_series(tmp_path)
    assert volume.values.shape == (COLUMNS, ROWS, 6)
    assert only(list_series(tmp_path)).orientation == name.split()[0].rstrip(",")

    assert_same_volume(volume, highdicom.get_volume_from_series(slices))
    reader = sitk.ImageSeriesReader()
    order = np.argsort([s.ImagePositionPatient @ np.cross(*np.reshape(orientation, (2, 3))) for s in slices])
    reader.SetFileNames([str(files[n]) for n in order])
    image = reader.Execute()
    direction = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    np.testing.assert_allclose(volume.affine[:3, :3], LPS_TO_RAS[:3, :3] @ direction, atol=1e-6)
    np.testing.assert_allclose(volume.affine[:3, 3], LPS_TO_RAS[:3, :3] @ image.GetOrigin(), atol=1e-6)
    np.testing.assert_array_equal(volume.values, sitk.GetArrayFromImage(image).T)


@settings(max_examples=25, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    spacing=st.tuples(st.floats(0.2, 3), st.floats(0.2, 3)),
    distance=st.floats(0.3, 10),
    tilt=st.floats(-30, 30),
    count=st.integers(2, 9),
)
@example(angles=(0.0, 0.0, 0.0), spacing=(1.0, 1.0), distance=1.0, tilt=1.25, count=7)
def test_every_corner_of_every_slice_is_where_highdicom_puts_it(angles, spacing, distance, tilt, count):
    """Also with a tilted gantry: the shear of the affine follows each slice's own position."""
    orientation = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()[:2].ravel()
    shift = distance * math.tan(math.radians(tilt))
    places = np.array(positions_of(orientation, count, distance, sideways=(0, shift)))
    shuffled = np.random.default_rng(count).permutation(count)
    plane = plane_of(orientation)
    stack = stack_slices(places[shuffled], plane, spacing, distance=None, thickness=distance)
    assert stack.problem is None
    assert shuffled[list(stack.order)].tolist() == list(range(count))
    corners = np.array([(c, r) for c in (0, 511) for r in (0, 511)])
    for k in range(count):
        theirs = PixelToReferenceTransformer(places[k], orientation, spacing)(corners)
        index = np.column_stack([corners, np.full(4, k), np.ones(4)])
        np.testing.assert_allclose(
            (index @ stack.affine.T)[:, :3] * [-1, -1, 1], theirs, atol=2e-5 * max(1, count)
        )
    if abs(tilt) > 1 and abs(shift) * (count - 1) > 0.1 * min(spacing):
        stated = re.search(r"gantry tilt of ([\d.]+) degrees", " ".join(stack.notes))
        assert stated and float(stated[1]) == pytest.approx(abs(tilt), abs=0.051)
    elif tilt == 0:
        assert not stack.notes and get_volume_positions(places, orientation)[0] == pytest.approx(distance)


def along_z(distances, x=0.0):
    distances = np.asarray(distances, float)
    return np.column_stack([np.full(len(distances), x), np.zeros(len(distances)), distances])


def stacked(positions, spacing=(0.5, 0.5), **more):
    header = {"distance": None, "thickness": None, **more}
    return stack_slices(np.asarray(positions, float), plane_of(AXIAL), spacing, **header)


@pytest.mark.parametrize(
    "distances",
    [
        np.arange(30) * 2.5,
        -np.arange(30) * 2.5,
        np.round(np.arange(60) * 0.625, 1),  # steps of 0.6 and 0.7
        np.round(np.arange(60) * 0.625, 2),
        np.round(np.arange(40) * 1.3333333, 1) - 712.3,
        np.float32(np.arange(200) * 0.7 - 1234.56),
        [0, 1, 2.02, 3, 4],  # 1 % off
        np.arange(5) * 0.004,  # micro-CT
    ],
)
def test_rounded_positions_are_even(distances):
    stack = stacked(along_z(distances))
    assert stack.problem is None
    first, last = min(distances), max(distances)
    assert stack.spacing[2] == pytest.approx((last - first) / (len(distances) - 1))


@pytest.mark.parametrize(
    ("distances", "problem"),
    [
        ([0, 1, 2, 4, 5], r"2\.00 mm between slices 3 and 4 of 5, elsewhere 1\.00 mm; a slice is missing"),
        ([0, 2.5, 5, 12.5], "2 slices are missing"),
        ([0, 1, 2, 3.2], "uneven distances of 1.00 to 1.20 mm"),
        ([0, 5, 10, 13, 18, 23], "uneven distances of 3.00 to 5.00 mm"),
        (np.cumsum(np.linspace(1, 1.2, 50)), "uneven distances"),
        ([0, 1, 2, 3, 4, 4.6], "uneven distances"),
        ([0, 1, 2, 3, 40.4], "missing or belong to another stack"),
        (np.delete(np.arange(100), 98), "a slice is missing"),
    ],
)
def test_missing_and_uneven_slices_are_refused(distances, problem):
    stack = stacked(along_z(distances))
    assert stack.affine is None
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(stack.problem)
    assert get_volume_positions(along_z(distances), AXIAL)[0] is None  # so says highdicom


def test_jump_within_the_plane_is_no_tilt():
    positions = along_z(np.arange(8) * 5.0)
    positions[5:, 0] += 12
    assert "by 12.00 mm between slices 5 and 6 of 8" in stacked(positions).problem
    positions = along_z(np.arange(8) * 5.0)
    positions[:, 1] += np.arange(8) * 6.0
    assert stacked(positions).problem is not None  # slides further than it advances


def test_header_against_positions():
    positions = along_z(np.arange(8) * 5.0)
    assert stacked(positions, distance=5.0, thickness=5.0).notes == ()
    assert stacked(positions, thickness=7.5).notes == ()  # overlapping slices are usual
    (note,) = stacked(positions, distance=2.5).notes
    assert note.startswith("the header states 2.5 mm between slices, the positions 5 mm")
    (note,) = stacked(positions, thickness=1.0).notes
    assert note == "slices of 1 mm thickness lie 5 mm apart"
    (note,) = stacked(positions, tilt=-12.0).notes
    assert "states a gantry tilt of 12.0 degrees, the slice positions show none" in note
    positions[:, 1] += np.arange(8) * 5 * math.tan(math.radians(12))
    assert stacked(positions, tilt=-12.0).notes == (
        "gantry tilt of 12.0 degrees, kept in the affine as shear",
    )


def test_tilt_as_dcm2niix_sees_it():
    """A gantry tilted by 15 degrees about x: rows stay along x, columns lean, the table moves along z."""
    tilt = math.radians(15)
    orientation = [1, 0, 0, 0, math.cos(tilt), -math.sin(tilt)]
    positions = along_z(np.arange(10) * 4.0)
    stack = stack_slices(
        positions, plane_of(orientation), (0.5, 0.5), distance=None, thickness=4.0, tilt=15.0
    )
    np.testing.assert_allclose(stack.affine[:3, 2], [0, 0, 4], atol=1e-12)  # as the table moved
    assert stack.spacing[2] == pytest.approx(4 * math.cos(tilt))
    assert stack.notes == ("gantry tilt of 15.0 degrees, kept in the affine as shear",)


@pytest.mark.parametrize(
    ("header", "thickness", "note"),
    [
        ({"distance": 3.0, "thickness": 2.0}, 3.0, None),
        ({"distance": None, "thickness": 2.0}, 2.0, None),
        ({"distance": -4.0, "thickness": None}, 4.0, None),
        ({"distance": 0.0, "thickness": None}, 1.0, "1 mm is assumed"),
    ],
)
def test_thickness_of_one_slice(header, thickness, note):
    stack = stacked([[0, 0, 0]], **header)
    np.testing.assert_allclose(stack.affine[:3, 2], [0, 0, thickness])
    assert (note is None and not stack.notes) or note in stack.notes[0]


def test_orientation_is_repaired_or_refused():
    exact = plane_of(ORIENTATIONS["oblique"])
    rounded = plane_of(np.round(ORIENTATIONS["oblique"], 2))
    assert exact.note is None and "was corrected" in rounded.note
    np.testing.assert_allclose(rounded.across @ rounded.down, 0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(rounded.down), 1)
    np.testing.assert_allclose(rounded.normal, exact.normal, atol=0.01)
    for bad in ([0] * 6, [1, 0, 0, 0.2, 1, 0], [2, 0, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0]):
        assert isinstance(plane_of(bad), str)


@pytest.mark.parametrize(
    "changes",
    [
        {"SliceThickness": b"2.5mm "},
        {"SpacingBetweenSlices": b"- "},
        {"GantryDetectorTilt": b"0 deg "},
        {"SliceLocation": b"??"},
        {"WindowCenter": b"40,0", "WindowWidth": b"400,0 "},
        {"WindowCenter": b"\\40 ", "WindowWidth": b"\\400"},
        {"KVP": b"120 kV"},
        {"EchoTime": b"none"},
        {"InstanceNumber": b"A1"},
        {"AcquisitionNumber": b"1.5 "},
        {"ContentTime": b"99:99 "},
        {"PhotometricInterpretation": b" monochrome2"},
        {"RescaleType": b"hu"},
        {"RescaleType": b"Hounsfield Units"},
        {"Modality": b"ct"},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("which", ["all", "one"])
def test_a_bad_word_or_number_that_is_not_needed_stops_nothing(tmp_path, changes, which):
    save_stack(tmp_path)
    for k in range(6) if which == "all" else [2]:
        save(plain_slice(k, **changes), tmp_path / f"{k:03d}.dcm")
    volume = read_series(tmp_path)
    assert (volume.modality, volume.units) == ("CT", "HU")
    assert volume.values[0, 0].tolist() == [0, 100, 200, 300, 400, 500]


# One odd file


ODD = {
    "coronal scout": ({"ImageOrientationPatient": CORONAL}, "another orientation (coronal)"),
    "localizer": ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a localizer (scout)"),
    "screen capture": ({"ImagePositionPatient": None}, "no slice position"),
    "position of text": ({"ImagePositionPatient": b"0\\0\\5,5 "}, "an unusable ImagePositionPatient"),
    "empty position": ({"ImagePositionPatient": []}, "no slice position"),
    "position of two numbers": ({"ImagePositionPatient": [0, 6]}, "an unusable ImagePositionPatient"),
    "colour": (
        {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0},
        "a colour picture",
    ),
    "other class": (
        {"SOPClassUID": SecondaryCaptureImageStorage},
        "Secondary Capture Image beside CT Image",
    ),
    "dose sheet": ({"NumberOfFrames": 2}, "a file of 2 frames without the position of each"),
    "other grid": ({"Rows": 2, "Columns": 10}, "another grid (10 x 2 pixels)"),
    "other spacing": ({"PixelSpacing": [1, 1]}, "another pixel spacing (1 mm)"),
    "no spacing": ({"PixelSpacing": None}, "no PixelSpacing"),
    "zero spacing": ({"PixelSpacing": [0, 0]}, "a PixelSpacing that is zero, negative or absurd"),
    "one spacing": ({"PixelSpacing": [0.5]}, "an unusable PixelSpacing"),
    "spacing with commas": ({"PixelSpacing": b"0,5\\0,75"}, "an unusable PixelSpacing"),
    "radiograph with a position": (
        {"SOPClassUID": DigitalXRayImageStorageForPresentation, "Modality": "DX"},
        "a picture in projection, not a slice",
    ),
    "planar picture of nuclear medicine": (
        {"SOPClassUID": NuclearMedicineImageStorage, "ImageType": ["ORIGINAL", "PRIMARY", "WHOLE BODY"]},
        "a planar picture of nuclear medicine, not a slice",
    ),
    "detector spacing": (
        {"PixelSpacing": None, "ImagerPixelSpacing": [0.5, 0.5]},
        "no PixelSpacing (ImagerPixelSpacing is measured at the detector)",
    ),
    "thick-slab MIP": (
        {"ImageType": ["DERIVED", "SECONDARY", "AXIAL", "MIP"], "ImagePositionPatient": [0, 0, 2.5]},
        "a projection (MIP)",
    ),
    "segmentation": ({"SOPClassUID": SegmentationStorage}, "a segmentation, not a scan"),
    "report": (
        {"SOPClassUID": BasicTextSRStorage, "Rows": None, "PixelData": None},
        "Basic Text SR, not an image",
    ),
    "other acquisition": ({"AcquisitionNumber": 7, "z": 50}, "another stack (acquisition 7)"),
    "second phase of one slice": (
        {"AcquisitionNumber": 7, "z": 3},
        "another stack (acquisition 7)",
    ),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("file_name", ["000-first", "zzz-last.dcm"])
def test_one_odd_file_is_put_aside_with_its_reason(tmp_path, name, file_name):
    changes, reason = ODD[name]
    save_stack(tmp_path, AcquisitionNumber=1)
    save(plain_slice(6, **{"AcquisitionNumber": 1, **changes}), tmp_path / file_name)
    volume = read_series(tmp_path)
    assert volume.notes == (f"1 file skipped: {reason}",)
    expected = np.arange(6) * 100
    np.testing.assert_array_equal(volume.values[0, 0], expected)
    np.testing.assert_allclose(np.abs(np.diag(volume.affine)), [0.75, 0.5, 1, 1])
    ((path, why),) = only(list_series(tmp_path)).skipped
    assert Path(path).name == file_name and why == reason


@pytest.mark.parametrize(
    "changes",
    [
        {"PixelSpacing": ["0.500", "0.7500001"]},
        {"ImageOrientationPatient": [0.99999, 0.0001, 0, -0.0001, 0.99999, 0]},
        {"SliceThickness": None, "InstanceNumber": 1},
        {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5"]},
        {"FrameOfReferenceUID": "1.2.8"},
        {"BodyPartExamined": "CHEST"},
    ],
)
def test_a_digit_of_rounding_does_not_stop_a_series(tmp_path, changes):
    save_stack(tmp_path)
    save(plain_slice(6, **changes), tmp_path / "6.dcm")
    volume = read_series(tmp_path)
    assert volume.values.shape[2] == 7 and volume.notes == ()
    np.testing.assert_array_equal(volume.affine[:3, 1], [0, -0.5, 0])


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"PixelSpacing": ["0.502", "0.75"]}, "pixel spacings differ by 0.4%"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 1, 0.004]}, "slice orientations differ by 0.23 degrees"),
        ({"FrameOfReferenceUID": "1.2.88"}, "the slices name 2 frames of reference"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "inverted display (MONOCHROME1)"),
        ({"RescaleSlope": 0}, "a Rescale Slope of 0 is taken as 1"),
    ],
)
def test_a_slice_that_differs_a_little_is_kept_and_noted(tmp_path, changes, note):
    save_stack(tmp_path)
    save(plain_slice(6, **changes), tmp_path / "6.dcm")
    volume = read_series(tmp_path)
    assert volume.values.shape[2] == 7 and volume.values[0, 0, 6] == 600
    (found,) = volume.notes
    assert note in found


def test_files_that_belong_to_no_series_are_counted_by_kind(tmp_path):
    save_stack(tmp_path / "a" / "b")
    (tmp_path / "LICENSE.txt").write_text("text")
    (tmp_path / "notes.txt").write_text("more text")
    (tmp_path / "a" / "plain").write_bytes(bytes(300))
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    cut = (tmp_path / "a" / "b" / "000.dcm").read_bytes()[:400]
    (tmp_path / "cut.dcm").write_bytes(cut)
    shutil.copy(get_testdata_file("DICOMDIR"), tmp_path / "DICOMDIR")
    os.symlink(tmp_path / "a", tmp_path / "link")
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "DICOMDIR"):
        volume = read_series(path)
        assert volume.values.shape[2] == 6
        assert sorted(volume.notes) == [
            "1 file skipped: a DICOMDIR; its paths are not followed",
            "1 file skipped: a damaged DICOM header",
            "1 file skipped: not DICOM (a hidden file)",
            "1 file skipped: not DICOM (no suffix)",
            "1 file skipped: pipe, socket or device, not opened",
            "1 file skipped: symbolic link that leads nowhere",
            "1 file skipped: symbolic link to a folder, not followed",
            "2 files skipped: not DICOM (.txt)",
        ]


def test_damaged_slice_inside_leaves_a_hole_that_is_refused(tmp_path):
    save_stack(tmp_path)
    path = tmp_path / "003.dcm"
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(UserError, match=r"2\.00 mm between slices 3 and 4 of 5.*a slice is missing"):
        read_series(tmp_path)


def test_slice_of_damaged_pixels(tmp_path):
    save_stack(tmp_path)
    for name in ("000.dcm", "003.dcm"):
        path, whole = tmp_path / name, (tmp_path / name).read_bytes()
        path.write_bytes(whole[:-10])
        if name == "003.dcm":
            with pytest.raises(UserError, match=r"003\.dcm"):
                read_series(tmp_path)
        else:
            volume = read_series(tmp_path)
            assert volume.notes == ("1 slice at the end of the stack skipped: damaged",)
            assert volume.affine[2, 3] == 1 and volume.values[0, 0, 0] == 100
        path.write_bytes(whole)


# Several series, several stacks


def test_several_series_are_listed_and_one_is_chosen(tmp_path):
    save_stack(tmp_path / "thin", 6)
    save_stack(tmp_path / "thick", 3, SeriesInstanceUID="1.2.4", SliceThickness=5, z=lambda k: 5 * k)
    with pytest.raises(UserError, match="2 volumes to choose from") as error:
        read_series(tmp_path)
    thick, thin = list_series(tmp_path)
    assert (thick.slices, thin.slices) == (3, 6)
    for series in (thick, thin):
        assert f"{series.identifier} (CT, {series.slices} slices) {series.uid}" in str(error.value)
        for wanted in (series.identifier, series.uid):
            volume = read_series(tmp_path, series=wanted)
            assert volume.values.shape[2] == series.slices and volume.notes == ()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no series '1\.2\.5'; choose from"):
        read_series(tmp_path, series="1.2.5")


def test_localizers_single_slices_and_pictures_do_not_hide_the_volume(tmp_path):
    save_stack(tmp_path / "volume")
    save(plain_slice(SeriesInstanceUID="1.2.41"), tmp_path / "monitor.dcm")
    scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}
    save(plain_slice(SeriesInstanceUID="1.2.42", **scout), tmp_path / "scout.dcm")
    save_stack(tmp_path / "mr", 3, SeriesInstanceUID="1.2.43", Modality="MR", **scout)
    save(plain_slice(SeriesInstanceUID="1.2.44", ImagePositionPatient=None), tmp_path / "capture.dcm")
    report = {"SOPClassUID": BasicTextSRStorage, "Rows": None, "PixelData": None, "Modality": "SR"}
    save(plain_slice(SeriesInstanceUID="1.2.45", **report), tmp_path / "report.dcm")
    volume = read_series(tmp_path)
    assert volume.values.shape[2] == 6
    (note,) = volume.notes
    assert note.startswith("5 other series skipped: ")
    for words in ("(CT, picture)", "(CT, 1 slice", "(MR, 3 slices)", "(SR, not an image)"):
        assert words in note
    with pytest.raises(UserError, match=r"cannot be read as a volume: a localizer \(scout\)"):
        read_series(tmp_path, series="1.2.42")
    assert read_series(tmp_path, series="1.2.41").values.shape[2] == 1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"ImagePositionPatient": None}, "picture.*no slice position"),
        ({"SOPClassUID": SegmentationStorage, "Modality": "SEG"}, "a segmentation, not a scan"),
        ({"Rows": None, "PixelData": None}, "CT Image without rows and columns"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"], "Modality": "MR"}, "mosaic.*dcm2niix"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2"}, "radiotherapy dose grid"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.2"}, "enhanced ultrasound volume"),
        ({"NumberOfFrames": 2, "Modality": "US"}, "cine.*2 frames without the position of each"),
    ],
)
def test_what_is_no_volume_is_refused_by_name(tmp_path, what, message):
    save(plain_slice(**what), tmp_path / "odd.dcm")
    for path in (tmp_path, tmp_path / "odd.dcm"):
        with pytest.raises(UserError, match=message) as error:
            read_series(path)
        assert "\n" not in str(error.value) and "Doe" not in str(error.value)


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="no DICOM volume here; the folder is empty"):
        read_series(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"1 file skipped: not DICOM \(\.txt\)"):
        read_series(tmp_path)
    with pytest.raises(UserError, match="not a DICOM file"):
        read_series(tmp_path / "a.txt")


STACKS = {
    "echoes": ("EchoTime", [4.6, 9.2], ["echo time 4.6", "echo time 9.2"]),
    "acquisitions": ("AcquisitionNumber", [1, 2, 3], ["acquisition 1", "acquisition 2", "acquisition 3"]),
    "time points": ("TemporalPositionIdentifier", [1, 2], ["time point 1", "time point 2"]),
    "b-values": ("DiffusionBValue", [0.0, 1000.0], ["b-value 0", "b-value 1000"]),
    "magnitude and phase": (
        "ImageType",
        [["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]],
        ["image type ORIGINAL/PRIMARY/M", "image type ORIGINAL/PRIMARY/P"],
    ),
    "dual energy": ("KVP", [80, 140], ["kVp 80", "kVp 140"]),
    "trigger times": ("TriggerTime", [0, 420], ["trigger time 0", "trigger time 420"]),
}


@pytest.mark.parametrize("name", STACKS)
def test_stacks_at_the_same_positions_are_listed_and_never_mixed(tmp_path, name):
    keyword, values, labels = STACKS[name]
    n = len(values)
    for k in range(4):
        for index, value in enumerate(values):  # interleaved, as scanners write them
            dataset = plain_slice(k + 10 * index, z=k * 3.0, **{keyword: value})
            save(dataset, tmp_path / f"{k * n + index:03d}")
    with pytest.raises(UserError, match=f"{n} volumes to choose from"):
        read_series(tmp_path)
    found = list_series(tmp_path)
    assert [series.label for series in found] == labels
    for index, series in enumerate(found):
        assert series.identifier.endswith(f"/{index + 1}") and series.problem is None
        for wanted in (series.identifier, f"1.2.3/{index + 1}"):
            volume = read_series(tmp_path, series=wanted)
            np.testing.assert_array_equal(volume.values[0, 0], 100 * (np.arange(4) + 10 * index))
    with pytest.raises(UserError, match="volumes to choose from"):
        read_series(tmp_path, series=found[0].identifier.partition("/")[0])


def test_stacks_told_apart_by_two_values_or_by_their_order(tmp_path):
    for k in range(3):
        for echo in (1, 2):
            for part in "MP":
                values = {"EchoNumbers": echo, "ImageType": ["ORIGINAL", "PRIMARY", part]}
                number = 2 * echo + (part == "P")
                save(plain_slice(k + 10 * number, z=k, **values), tmp_path / "a" / f"{k}{echo}{part}")
    found = list_series(tmp_path / "a")
    assert [series.label for series in found] == [
        f"echo {echo}, image type ORIGINAL/PRIMARY/{part}" for echo in (1, 2) for part in "MP"
    ]
    for index, series in enumerate(found):
        values = read_series(tmp_path / "a", series=series.identifier).values
        np.testing.assert_array_equal(values[0, 0], 100 * (np.arange(3) + 10 * (index + 2)))

    for k in range(3):  # dynamic: each slice has a time of its own
        for phase in range(4):
            time = f"1200{phase}{k}.5"
            save(plain_slice(k + 10 * phase, z=k, ContentTime=time), tmp_path / "b" / f"{phase}{k}")
    found = list_series(tmp_path / "b")
    assert [series.label for series in found] == [f"time point {n} of 4" for n in (1, 2, 3, 4)]
    for phase, series in enumerate(found):
        values = read_series(tmp_path / "b", series=series.identifier).values
        np.testing.assert_array_equal(values[0, 0], 100 * (np.arange(3) + 10 * phase))


def test_copies_are_dropped_and_noted(tmp_path):
    save_stack(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "again")  # the same instances once more
    volume = read_series(tmp_path)
    assert volume.values.shape[2] == 6
    assert volume.notes == ("6 files skipped: a copy of another file (same SOPInstanceUID)",)
    shutil.rmtree(tmp_path / "again")
    save_stack(tmp_path / "new_uids", InstanceNumber=None)  # equal pixels, other instances
    for path in tmp_path.glob("*.dcm"):
        dataset = pydicom.dcmread(path)
        del dataset.InstanceNumber
        dataset.save_as(path)
    assert read_series(tmp_path).notes == ("6 slices skipped: equal to another at its position",)
    save(plain_slice(77, z=3, InstanceNumber=None), tmp_path / "other.dcm")
    with pytest.raises(UserError, match="different slices at one position"):
        read_series(tmp_path)


def test_copies_that_are_damaged_or_differ_are_noted(tmp_path):
    save_stack(tmp_path)
    uid = pydicom.dcmread(tmp_path / "003.dcm").SOPInstanceUID
    short = plain_slice(3, SOPInstanceUID=uid, PixelData=bytes(4))
    save(short, tmp_path / "zzz.dcm")
    volume = read_series(tmp_path)
    assert volume.notes[-1] == "1 slice skipped: a damaged copy of another"
    assert volume.values[0, 0].tolist() == [0, 100, 200, 300, 400, 500]
    save(plain_slice(3, SOPInstanceUID=uid, PixelData=bytes(2 * ROWS * COLUMNS)), tmp_path / "zzz.dcm")
    volume = read_series(tmp_path)
    assert volume.notes[-1] == (
        "1 slice skipped: the SOPInstanceUID of another, which is used, but other pixels"
    )
    assert volume.values[0, 0].tolist() == [0, 100, 200, 300, 400, 500]


@pytest.mark.parametrize(
    ("keyword", "word"), [("StudyInstanceUID", "study"), ("FrameOfReferenceUID", "frame of reference")]
)
@pytest.mark.parametrize("shift", [5.0, 0.5, 2.0, 0.0])
def test_positions_of_two_studies_or_spaces_are_never_compared(tmp_path, keyword, word, shift):
    save_stack(tmp_path / "a", 5)
    save_stack(tmp_path / "b", 5, z=lambda k: k + shift, PixelData=bytes(40), **{keyword: "1.2.77"})
    with pytest.raises(UserError, match=f"2 volumes to choose from.*{word} 1 of 2.*{word} 2 of 2"):
        read_series(tmp_path)
    for number, series in enumerate(list_series(tmp_path)):
        values = read_series(tmp_path, series=series.identifier).values
        assert values.shape[2] == 5 and values.any() == (number == 0)
    save_stack(tmp_path / "a", 6, first=20, z=lambda k: k + 5)  # one is now clearly the volume
    volume = read_series(tmp_path)
    assert volume.values.shape[2] == 11
    assert volume.notes == ("5 files skipped: another study or frame of reference",)


@pytest.mark.parametrize(
    ("keyword", "words"), [("StudyInstanceUID", "studies"), ("FrameOfReferenceUID", "frames of reference")]
)
def test_identifiers_that_differ_in_every_file_say_nothing(tmp_path, keyword, words):
    save_stack(tmp_path, **{keyword: lambda k: f"1.2.{k + 1}"})
    volume = read_series(tmp_path)
    assert volume.values.shape[2] == 6 and volume.notes == (f"the slices name 6 {words}",)


def test_slices_without_a_frame_of_reference_join_the_others(tmp_path):
    save_stack(tmp_path, FrameOfReferenceUID=lambda k: "1.2.8" if k % 2 else None)
    volume = read_series(tmp_path)
    assert volume.values.shape[2] == 6 and not volume.notes


def test_equal_stacks_under_other_numbers_are_one(tmp_path):
    save_stack(tmp_path)
    save_stack(tmp_path / "again", AcquisitionNumber=2)
    assert read_series(tmp_path).notes == ("1 equal copies of the series skipped",)


def test_one_uid_for_all_slices_is_no_copy(tmp_path):
    save_stack(tmp_path, SOPInstanceUID="1.2.3.4")
    assert read_series(tmp_path).values.shape[2] == 6


def test_lost_positions_are_refused(tmp_path):
    save_stack(tmp_path, 20, ImagePositionPatient=[0, 0, 0])
    with pytest.raises(UserError, match="20 slices at one position"):
        read_series(tmp_path)


def test_three_planes_of_one_series_are_three_stacks(tmp_path):
    planes = {"axial": AXIAL, "coronal": CORONAL, "sagittal": SAGITTAL}
    for n, (name, orientation) in enumerate(planes.items()):
        places = positions_of(orientation, 3, 10.0)
        for k in range(3):
            own = {"ImagePositionPatient": places[k], "ImageOrientationPatient": orientation}
            save(plain_slice(k + 10 * n, Modality="MR", **own), tmp_path / f"{name}{k}")
    with pytest.raises(UserError, match="3 volumes to choose from") as error:
        read_series(tmp_path)
    assert all(f"{name} 5 x 4" in str(error.value) for name in planes)
    for n, series in enumerate(list_series(tmp_path)):
        assert read_series(tmp_path, series=series.identifier).values[0, 0, 0] % 1000 in (0, 200)
        assert series.orientation == list(planes)[n]


def test_radial_slices_are_no_stack(tmp_path):
    for k in range(12):
        turn = Rotation.from_euler("z", 15 * k, degrees=True).as_matrix()
        orientation = [*turn[:, 0], 0, 0, -1]
        save(plain_slice(k, z=0, ImageOrientationPatient=orientation), tmp_path / f"{k}")
    with pytest.raises(UserError, match="12 different orientations"):
        read_series(tmp_path)


def test_interleaved_acquisitions_at_other_positions_are_told_apart(tmp_path):
    save_stack(tmp_path / "a", AcquisitionNumber=1, z=lambda k: 5.0 * k)
    save_stack(tmp_path / "b", AcquisitionNumber=2, z=lambda k: 5.0 * k + 1.3)
    assert [series.label for series in list_series(tmp_path)] == ["acquisition 1", "acquisition 2"]


# Multi-frame


def enhanced(positions, frames, shared=None, orientation=AXIAL, **changes):
    """Enhanced MR: `frames` are the functional groups of each frame beside its position."""
    d = plain_slice(SOPClassUID=EnhancedMRImageStorage, Modality="MR", NumberOfFrames=len(positions))
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(d, keyword)
    for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
        delattr(d, keyword)
    d.PixelData = b"".join(
        (100 * k + np.arange(ROWS * COLUMNS)).astype("<i2").tobytes() for k in range(len(positions))
    )
    d.SharedFunctionalGroupsSequence = [
        shared
        or item(
            PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.75], SliceThickness=2)],
            PlaneOrientationSequence=[item(ImageOrientationPatient=orientation)],
        )
    ]
    d.PerFrameFunctionalGroupsSequence = [
        item(PlanePositionSequence=[item(ImagePositionPatient=list(position))], **groups)
        for position, groups in zip(positions, frames, strict=True)
    ]
    for keyword, value in changes.items():
        setattr(d, keyword, value)
    return d


def rescale(slope, intercept, kind="US"):
    transformation = item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType=kind)
    return {"PixelValueTransformationSequence": [transformation]}


def test_legacy_converted_series_of_highdicom_equals_its_slices(tmp_path):
    places = positions_of(ORIENTATIONS["oblique"], 6, 2.5)
    slices = [
        plain_slice(
            k,
            ImagePositionPatient=places[k],
            ImageOrientationPatient=ORIENTATIONS["oblique"],
            PatientSex="O",
            StudyID="1",
            StudyDate="20200101",
            StudyTime="120000",
            AccessionNumber="",
            ReferringPhysicianName="",
            Manufacturer="Acme",
            ContentDate="20200101",
            ContentTime="120000",
            PatientPosition="HFS",
            PositionReferenceIndicator="",
            ImageType=["ORIGINAL", "PRIMARY", "AXIAL"],
            BodyPartExamined="CHEST",
            WindowCenter=40,
            WindowWidth=400,
            AcquisitionNumber=1,
            Laterality="",
            SeriesNumber=1,
        )
        for k in (4, 0, 2, 5, 1, 3)
    ]
    for n, dataset in enumerate(slices):
        save(dataset, tmp_path / "slices" / f"{n}.dcm")
    converted = LegacyConvertedEnhancedCTImage(slices, generate_uid(), 2, generate_uid(), 1)
    save(converted, tmp_path / "enhanced.dcm")
    one, other = read_series(tmp_path / "slices"), read_series(tmp_path / "enhanced.dcm")
    np.testing.assert_array_equal(one.values, other.values)
    np.testing.assert_allclose(one.affine, other.affine, atol=1e-9)
    assert (one.units, one.window) == (other.units, other.window) == ("HU", (40, 400))
    assert_same_volume(other, highdicom.Image.from_dataset(converted).get_volume())


def test_frames_in_any_order_with_values_of_their_own(tmp_path):
    order = [3, 0, 4, 1, 2]
    frames = [rescale(1 + z, 10 * z) for z in order]
    save(enhanced([(0, 0, 2 * z) for z in order], frames), tmp_path / "e.dcm")
    volume = read_series(tmp_path / "e.dcm")
    expected = [100 * order.index(z) * (1 + z) + 10 * z for z in range(5)]
    np.testing.assert_array_equal(volume.values[0, 0], expected)
    np.testing.assert_allclose(np.diag(volume.affine), [-0.75, -0.5, 2, 1])
    assert volume.modality == "MR" and volume.units == "unknown"


def test_time_points_and_echoes_of_one_file_are_split(tmp_path):
    content = [(z, t, e) for z in range(3) for t in (1, 2) for e in (2.5, 5.0)]
    frames = [
        {
            "FrameContentSequence": [item(TemporalPositionIndex=t, InStackPositionNumber=z + 1)],
            "MREchoSequence": [item(EffectiveEchoTime=e)],
        }
        for z, t, e in content
    ]
    save(enhanced([(0, 0, 2 * z) for z, _, _ in content], frames), tmp_path / "e.dcm")
    found = list_series(tmp_path / "e.dcm")
    assert [series.label for series in found] == [
        f"time point {t}, echo time {e:g}" for t in (1, 2) for e in (2.5, 5.0)
    ]
    for series, (t, e) in zip(found, [(t, e) for t in (1, 2) for e in (2.5, 5.0)], strict=True):
        volume = read_series(tmp_path / "e.dcm", series=series.identifier)
        indices = [n for n, (_, *other) in enumerate(content) if other == [t, e]]
        np.testing.assert_array_equal(volume.values[0, 0], 100 * np.array(indices))


def test_two_stacks_of_one_file(tmp_path):
    positions = positions_of(AXIAL, 4, 2.0) + positions_of(SAGITTAL, 4, 2.0)
    frames = [
        {"PlaneOrientationSequence": [item(ImageOrientationPatient=o)]} for o in [AXIAL] * 4 + [SAGITTAL] * 4
    ]
    save(enhanced(positions, frames), tmp_path / "e.dcm")
    assert [series.orientation for series in list_series(tmp_path / "e.dcm")] == ["axial", "sagittal"]


def test_parts_of_a_concatenation_are_joined(tmp_path):
    for part in range(3):
        positions = [(0, 0, 2 * (2 * part + k)) for k in range(2)]
        own = {
            "ConcatenationUID": "1.2.77",
            "InConcatenationNumber": part + 1,
            "InConcatenationTotalNumber": 3,
            "ConcatenationFrameOffsetNumber": 2 * part,
        }
        save(enhanced(positions, [{}, {}], **own), tmp_path / f"{part}.dcm")
    volume = read_series(tmp_path)
    np.testing.assert_array_equal(volume.values[0, 0], [0, 100] * 3)
    assert volume.notes == ()
    (tmp_path / "2.dcm").unlink()
    with pytest.raises(UserError, match="2 of 3 files of a concatenation"):
        read_series(tmp_path)


def test_multi_frame_without_positions_is_refused(tmp_path):
    spacing = item(PixelMeasuresSequence=[item(PixelSpacing=[1, 1])])
    save(enhanced([(0, 0, 0), (0, 0, 1)], [{}] * 2, shared=spacing), tmp_path / "e.dcm")
    with pytest.raises(UserError, match="no slice orientation"):
        read_series(tmp_path / "e.dcm")
    short = enhanced([(0, 0, z) for z in range(3)], [{}] * 3)
    del short.PerFrameFunctionalGroupsSequence[2]
    save(short, tmp_path / "short.dcm")
    with pytest.raises(UserError, match="a file of 3 frames with functional groups for 2"):
        read_series(tmp_path / "short.dcm")
    many = enhanced([(0, 0, 0)], [{}], NumberOfFrames=2_000_000_000)
    save(many, tmp_path / "many.dcm")
    with pytest.raises(UserError, match="a file of 2000000000 frames"):
        read_series(tmp_path / "many.dcm")


@pytest.mark.parametrize(("distance", "head_first"), [(4.0, True), (-4.0, False)])
def test_nuclear_tomography_stacks_along_its_signed_spacing(tmp_path, distance, head_first):
    """PS3.3 C.8.4.15: positive stacks along the normal, here towards the head."""
    d = plain_slice(
        SOPClassUID=NuclearMedicineImageStorage,
        Modality="NM",
        NumberOfFrames=3,
        ImageType=["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"],
        SpacingBetweenSlices=distance,
        SliceVector=[1, 2, 3],
        DetectorInformationSequence=[item(ImagePositionPatient=[1, 2, 30], ImageOrientationPatient=AXIAL)],
        ImagePositionPatient=None,
        ImageOrientationPatient=None,
        PixelData=np.repeat([0, 100, 200], ROWS * COLUMNS).astype("<i2").tobytes(),
    )
    volume = read_series(save(d, tmp_path / "nm.dcm"))
    np.testing.assert_array_equal(volume.values[0, 0], [0, 100, 200] if head_first else [200, 100, 0])
    assert volume.affine[2, 2] == 4 and volume.affine[2, 3] == (30 if head_first else 22)
    d.ImageType = ["ORIGINAL", "PRIMARY", "TOMO", "EMISSION"]
    with pytest.raises(UserError, match="nuclear medicine of 3 frames without slice positions"):
        read_series(save(d, tmp_path / "raw.dcm"))


# Values and units


def test_each_slice_has_its_own_scale_sign_and_bits(tmp_path):
    save(plain_slice(0, RescaleSlope=2, RescaleIntercept=-7), tmp_path / "0")
    unsigned = np.full(ROWS * COLUMNS, 40_000, "<u2").tobytes()
    save(plain_slice(1, PixelRepresentation=0, PixelData=unsigned), tmp_path / "1")
    twelve = np.full(ROWS * COLUMNS, 0x0FFF, "<u2").tobytes()  # -1 in 12 bits
    save(plain_slice(2, BitsStored=12, HighBit=11, PixelData=twelve), tmp_path / "2")
    np.testing.assert_array_equal(read_series(tmp_path).values[1, 0], [-5, 40_000, -1])


@pytest.mark.parametrize(
    ("changes", "units", "note"),
    [
        ({}, "HU", None),
        ({"RescaleType": None}, "HU", None),
        ({"RescaleType": "US"}, "unknown", None),
        ({"RescaleType": "MGML"}, "MGML", None),
        ({"Modality": "MR", "RescaleType": None}, "unknown", None),
        ({"RescaleSlope": None, "RescaleIntercept": None}, "HU", "no rescale slope and intercept"),
        ({"RescaleType": lambda k: ["HU", "US"][k % 2]}, "unknown", "different rescale types"),
    ],
)
def test_units(tmp_path, changes, units, note):
    save_stack(tmp_path, **changes)
    volume = read_series(tmp_path)
    assert volume.units == units
    assert (note is None and volume.notes == ()) or note in volume.notes[0]


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"WindowCenter": [40, -600], "WindowWidth": [400, 1500]}, (40, 400)),
        ({"WindowCenter": lambda k: 10 * k, "WindowWidth": 100}, (30, 100)),
        ({"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"}, None),
        ({"WindowCenter": 40, "WindowWidth": 0}, None),
        ({"WindowCenter": b"40 HU\\-600", "WindowWidth": b"400\\1500"}, (-600, 1500)),  # never 400 about -600
        ({}, None),
    ],
)
def test_window_of_the_series(tmp_path, changes, window):
    assert read_series(save_stack(tmp_path, **changes)).window == window


def test_what_the_files_state_is_carried(tmp_path):
    save_stack(tmp_path, Modality="mr", BodyPartExamined="Abdomen")
    volume = read_series(tmp_path)
    assert (volume.modality, volume.body_part) == ("MR", "ABDOMEN")
    save_stack(tmp_path, Modality="", BodyPartExamined="see Dr. O'Neill, room 4")
    assert (read_series(tmp_path).modality, read_series(tmp_path).body_part) == ("unknown", "unknown")


def test_padding_is_marked_for_each_file(tmp_path):
    save_stack(tmp_path, PixelPaddingValue=lambda k: 100 * k if k else None)
    valid = read_series(tmp_path).valid
    assert valid[:, :, 0].all() and not valid[0, 0, 1:].any() and valid[1:, :, 1:].all()


def test_limits_are_checked_before_pixels(tmp_path, monkeypatch):
    save_stack(tmp_path)
    monkeypatch.setattr("vilam3_jax.data.dicom.series.read_dataset", None)
    for limits, message in [
        (Limits(voxels=100), "120 voxels, more than the limit of 100"),
        (Limits(file_bytes=2000), "bytes in one series, more than the limit of 2000"),
        (Limits(files=5), "more than 5 files"),
    ]:
        with pytest.raises(UserError, match=message):
            read_series(tmp_path, limits=limits)


# PET


def pet_slice(k=0, tracer=None, **changes):
    start = {
        "RadionuclideTotalDose": 370e6,
        "RadionuclideHalfLife": 6586.2,
        "RadiopharmaceuticalStartTime": "100000",
        **(tracer or {}),
    }
    own = {
        "SOPClassUID": PositronEmissionTomographyImageStorage,
        "Modality": "PT",
        "Units": "BQML",
        "DecayCorrection": "START",
        "CorrectedImage": ["NORM", "DTIM", "ATTN", "SCAT", "DECY"],
        "PatientWeight": 74,
        "SeriesDate": "20200102",
        "SeriesTime": "110000",
        "AcquisitionDate": "20200102",
        "AcquisitionTime": "110000" if k < 2 else "110500",
        "RescaleType": None,
        "RadiopharmaceuticalInformationSequence": [
            item(**{key: value for key, value in start.items() if value is not None})
        ],
        **changes,
    }
    return plain_slice(k, **own)


# 370 MBq an hour before the scan are 370e6 * 2^(-3600 / 6586.2) = 253.30e6 Bq; 74 kg: 74000 / 253.30e6.
AFTER_AN_HOUR = 2.9213e-4
AT_INJECTION = 2.0e-4


@pytest.mark.parametrize(
    ("changes", "tracer", "factor", "units", "note"),
    [
        ({}, {}, AFTER_AN_HOUR, "SUVbw", None),
        ({"DecayCorrection": "ADMIN"}, {}, AT_INJECTION, "SUVbw", None),
        (
            {},
            {"RadiopharmaceuticalStartTime": None, "RadiopharmaceuticalStartDateTime": "20200102100000"},
            AFTER_AN_HOUR,
            "SUVbw",
            None,
        ),
        ({"CorrectedImage": None}, {}, AFTER_AN_HOUR, "SUVbw", "CorrectedImage is not stated"),
        ({"Units": "GML"}, {}, 1, "SUVbw", None),
        ({"Units": "GML", "SUVType": "LBM"}, {}, 1, "SUVlbm", None),
        ({"PatientWeight": None}, {}, 1, "Bq/ml", "PatientWeight missing"),
        ({"PatientWeight": 0}, {}, 1, "Bq/ml", "PatientWeight missing"),
        ({"PatientWeight": 74000}, {}, 1, "Bq/ml", "PatientWeight is no plausible weight in kg"),
        ({}, {"RadionuclideTotalDose": None}, 1, "Bq/ml", "RadionuclideTotalDose missing"),
        ({}, {"RadionuclideTotalDose": 370}, 1, "Bq/ml", "RadionuclideTotalDose is no plausible dose"),
        ({}, {"RadionuclideHalfLife": None}, 1, "Bq/ml", "RadionuclideHalfLife missing"),
        ({}, {"RadiopharmaceuticalStartTime": None}, 1, "Bq/ml", "RadiopharmaceuticalStartTime missing"),
        ({}, {"RadiopharmaceuticalStartTime": "113000"}, 1, "Bq/ml", "injection is stated after the scan"),
        ({"DecayCorrection": "NONE"}, {}, 1, "Bq/ml", "DecayCorrection is NONE"),
        ({"CorrectedImage": ["NORM", "DECY"]}, {}, 1, "Bq/ml", "does not contain ATTN"),
        ({"Units": "CNTS"}, {}, 1, "counts", "units are CNTS"),
        ({"Units": None}, {}, 1, "unknown", "units are not stated"),
        ({"SeriesTime": "150000"}, {}, 1, "Bq/ml", "no time of the scan"),
        ({"RadiopharmaceuticalInformationSequence": None}, {}, 1, "Bq/ml", "RadionuclideTotalDose"),
    ],
)
def test_suv(tmp_path, changes, tracer, factor, units, note):
    for k in range(3):
        save(
            pet_slice(k, tracer, RescaleSlope=1 + k, WindowCenter=100, WindowWidth=200, **changes),
            tmp_path / f"{k}",
        )
    volume = read_series(tmp_path)
    stored = np.array([100 * k * (1 + k) for k in range(3)])  # slopes differ from slice to slice
    np.testing.assert_allclose(volume.values[0, 0], stored * factor, rtol=1e-4)
    np.testing.assert_allclose(volume.window, [100 * factor, 200 * factor], rtol=1e-4)
    assert volume.units == units
    assert (note is None and volume.notes == ()) or note in volume.notes[0]
    assert not any(secret in " ".join(volume.notes) for secret in ("2020", "1000", "74", "4711"))


def test_suv_of_series_whose_time_was_altered():
    """QIBA's variant: the scan began before the acquisition, by the frame's reference time."""
    half_life, duration = 6586.2, 180.0
    rate = math.log(2) / half_life
    average = math.log(rate * duration / (1 - math.exp(-rate * duration))) / rate
    assert average == pytest.approx(duration / 2, rel=0.01)  # a short frame: about its middle
    slices = [
        pet_slice(
            k,
            SeriesTime="150000",
            AcquisitionTime=f"11{3 * k:02d}00",
            ActualFrameDuration=int(duration * 1000),
            FrameReferenceTime=(180.0 * k + average) * 1000,
        )
        for k in range(3)
    ]
    found = suv.uptake([suv.facts_of(dataset) for dataset in slices])
    assert found.units == "SUVbw" and found.factor == pytest.approx(AFTER_AN_HOUR, rel=1e-4)


def test_suv_of_private_elements(tmp_path):
    philips = pet_slice(Units="CNTS")
    block = philips.private_block(0x7053, "Philips PET Private Group", create=True)
    block.add_new(0x00, "DS", "0.000587")
    volume = read_series(save(philips, tmp_path / "p.dcm"))
    assert volume.units == "SUVbw"
    np.testing.assert_allclose(volume.values[1, 0, 0], 0.000587)

    activity = pet_slice(Units="CNTS")
    block = activity.private_block(0x7053, "Philips PET Private Group", create=True)
    block.add_new(0x09, "DS", "3.5")
    volume = read_series(save(activity, tmp_path / "a.dcm"))
    np.testing.assert_allclose(volume.values[1, 0, 0], 3.5 * AFTER_AN_HOUR, rtol=1e-4)

    ge = pet_slice(SeriesTime="150000")
    block = ge.private_block(0x0009, "GEMS_PETD_01", create=True)
    block.add_new(0x0D, "DT", "20200102110000.00")
    volume = read_series(save(ge, tmp_path / "g.dcm"))
    assert volume.units == "SUVbw"
    np.testing.assert_allclose(volume.values[1, 0, 0], AFTER_AN_HOUR, rtol=1e-4)


# Real files


def test_series_of_totalsegmentator_as_simpleitk_reads_it():
    sitk = pytest.importorskip("SimpleITK")
    folder = SAMPLES / "totalsegmentator-2.18.0/tests/reference_files/example_ct_dicom"
    if not folder.is_dir():
        pytest.skip("run `make quickstart` once to fetch the samples")
    volume = read_series(folder)  # its files state no UIDs at all
    reader = sitk.ImageSeriesReader()
    files = sorted(folder.iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    reader.SetFileNames([str(path) for path in files])
    image = reader.Execute()
    np.testing.assert_array_equal(volume.values, sitk.GetArrayFromImage(image).T)
    direction = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    np.testing.assert_allclose(volume.affine[:3, :3], LPS_TO_RAS[:3, :3] @ direction, atol=1e-6)
    assert (volume.modality, volume.units, volume.window) == ("CT", "HU", (40, 300))


def test_file_set_of_pydicom():
    folder = Path(get_testdata_file("DICOMDIR")).parent
    found = {series.identifier: series for series in list_series(folder) if series.kind == "volume"}
    usable = [series for series in found.values() if series.problem is None and series.slices > 1]
    ct = only(usable)
    assert (ct.modality, ct.slices, ct.orientation) == ("CT", 5, "axial")
    slices = [pydicom.dcmread(member.path) for member in ct.members]
    assert_same_volume(read_series(folder, series=ct.uid), highdicom.get_volume_from_series(slices))
    gaps = [series.problem for series in found.values() if series.problem]
    assert any("202.50 mm between slices 1 and 2 of 4" in problem for problem in gaps)
    assert sum(series.label.startswith(("axial", "coronal", "sagittal")) for series in found.values()) == 6


def test_enhanced_ct_of_pydicom():
    path = get_testdata_file("eCT_Supplemental.dcm", download=False)
    if path is None:
        pytest.skip("needs pydicom-data")
    volume = read_series(path)
    theirs = highdicom.Image.from_dataset(pydicom.dcmread(path)).get_volume(
        apply_palette_color_lut=False, apply_icc_profile=False
    )
    assert theirs.array.shape == (2, 512, 512)
    assert_same_volume(volume, theirs)


@pytest.mark.parametrize(
    "name", ["emri_small.dcm", "liver_1frame.dcm", "rtdose.dcm", "examples_ybr_color.dcm"]
)
def test_real_files_that_are_no_volume(name):
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip("needs pydicom-data")
    with pytest.raises(UserError, match="no DICOM volume here"):
        read_series(path)


# Hostile headers


@settings(max_examples=60, deadline=None)
@given(
    file=st.integers(0, 3),
    keep=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
)
def test_damage_ends_in_one_line_or_a_volume(tmp_path_factory, file, keep, changes):
    folder = tmp_path_factory.mktemp("damage")
    save_stack(folder, 3)
    save(enhanced([(0, 0, 0), (0, 0, 2)], [rescale(1, 0)] * 2, SeriesInstanceUID="1.2.5"), folder / "003.dcm")
    path = folder / f"{file:03d}.dcm"
    raw = bytearray(path.read_bytes())
    for place, value in changes:
        raw[128 + int(place * (len(raw) - 128))] = value
    path.write_bytes(raw if changes else raw[: int(keep * len(raw))])
    for series in list_series(folder):
        try:
            volume = read_series(folder, series=series.identifier)
        except UserError as error:
            assert "\n" not in str(error) and "Doe" not in str(error)
        else:
            assert volume.values.ndim == 3 and np.isfinite(volume.affine).all()


def test_headers_alone_are_enough_for_grouping(tmp_path):
    save_stack(tmp_path)
    items = ((path, read_header(path, frames=True)) for path in sorted(tmp_path.iterdir()))
    series = only(group_headers(items))
    assert (series.slices, series.spacing, series.orientation) == (6, (0.75, 0.5, 1.0), "axial")
    assert [Path(member.path).name for member in series.members] == [f"{k:03d}.dcm" for k in range(6)]
