"""DICOM series in a folder: finding the volume, skipped files, malformed headers and real samples."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_slices import (
    CORONAL,
    LPS_TO_RAS,
    assert_same_volume,
    enhanced,
    only,
    plain_slice,
    rescale,
    save,
    save_stack,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.uid import (
    BasicTextSRStorage,
    DigitalXRayImageStorageForPresentation,
    NuclearMedicineImageStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from vilam3_jax.data.dicom.grouping import file_frames, group_files
from vilam3_jax.data.dicom.headers import read_header
from vilam3_jax.data.dicom.series import read_series, survey
from vilam3_jax.errors import UserError

SAMPLES = Path(__file__).parents[2] / ".cache" / "samples"


# A single odd file


ODD = {
    "coronal scout": ({"ImageOrientationPatient": CORONAL}, "another orientation (coronal)"),
    "localizer": ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a localizer (scout)"),
    "screen capture": ({"ImagePositionPatient": None}, "no slice position"),
    "position of text": ({"ImagePositionPatient": b"0\\0\\5,5 "}, "an invalid ImagePositionPatient"),
    "empty position": ({"ImagePositionPatient": []}, "no slice position"),
    "position of two numbers": ({"ImagePositionPatient": [0, 6]}, "an invalid ImagePositionPatient"),
    "colour": (
        {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0},
        "a colour image",
    ),
    "other class": (
        {"SOPClassUID": SecondaryCaptureImageStorage},
        "Secondary Capture Image beside CT Image",
    ),
    "dose sheet": ({"NumberOfFrames": 2}, "a file of 2 frames without frame positions"),
    "other grid": ({"Rows": 2, "Columns": 10}, "another grid (10 x 2 pixels)"),
    "other spacing": ({"PixelSpacing": [1, 1]}, "another pixel spacing (1 mm)"),
    "no spacing": ({"PixelSpacing": None}, "no PixelSpacing"),
    "zero spacing": ({"PixelSpacing": [0, 0]}, "a PixelSpacing that is zero, negative or implausible"),
    "one spacing": ({"PixelSpacing": [0.5]}, "an invalid PixelSpacing"),
    "spacing with commas": ({"PixelSpacing": b"0,5\\0,75"}, "an invalid PixelSpacing"),
    "radiograph with a position": (
        {"SOPClassUID": DigitalXRayImageStorageForPresentation, "Modality": "DX"},
        "a projection image, not a slice",
    ),
    "planar picture of nuclear medicine": (
        {"SOPClassUID": NuclearMedicineImageStorage, "ImageType": ["ORIGINAL", "PRIMARY", "WHOLE BODY"]},
        "a planar nuclear medicine image, not a slice",
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
def test_one_odd_file_is_skipped_with_its_reason(tmp_path, name, file_name):
    changes, reason = ODD[name]
    save_stack(tmp_path, AcquisitionNumber=1)
    save(plain_slice(6, **{"AcquisitionNumber": 1, **changes}), tmp_path / file_name)
    volume = read_series(tmp_path)
    assert volume.notes == (f"1 file skipped: {reason}",)
    expected = np.arange(6) * 100
    np.testing.assert_array_equal(volume.values[0, 0], expected)
    np.testing.assert_allclose(np.abs(np.diag(volume.affine)), [0.75, 0.5, 1, 1])
    ((path, why),) = only(survey(tmp_path)[0]).skipped
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
        ({"RescaleSlope": 0}, "Rescale Slope is 0; 1 is assumed"),
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
            "1 file skipped: symbolic link that is broken",
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


# Several series


def test_several_series_are_listed_and_one_is_chosen(tmp_path):
    save_stack(tmp_path / "thin", 6)
    save_stack(tmp_path / "thick", 3, SeriesInstanceUID="1.2.4", SliceThickness=5, z=lambda k: 5 * k)
    with pytest.raises(UserError, match="2 volumes to choose from") as error:
        read_series(tmp_path)
    thick, thin = survey(tmp_path)[0]
    assert (thick.slices, thin.slices) == (3, 6)
    for series in (thick, thin):
        assert f"{series.identifier} (CT, {series.slices} slices) {series.uid}" in str(error.value)
        for wanted in (series.identifier, series.uid):
            volume = read_series(tmp_path, series=wanted)
            assert volume.values.shape[2] == series.slices and volume.notes == ()
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no series '1\.2\.5'; choose from"):
        read_series(tmp_path, series="1.2.5")


def test_localizers_single_slices_and_images_do_not_hide_the_volume(tmp_path):
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
    for words in ("(CT, image)", "(CT, 1 slice", "(MR, 3 slices)", "(SR, not an image)"):
        assert words in note
    with pytest.raises(UserError, match=r"cannot be read as a volume: a localizer \(scout\)"):
        read_series(tmp_path, series="1.2.42")
    assert read_series(tmp_path, series="1.2.41").values.shape[2] == 1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"ImagePositionPatient": None}, "image.*no slice position"),
        ({"SOPClassUID": SegmentationStorage, "Modality": "SEG"}, "a segmentation, not a scan"),
        ({"Rows": None, "PixelData": None}, "CT Image without rows and columns"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"], "Modality": "MR"}, "mosaic.*dcm2niix"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2"}, "radiotherapy dose grid"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.2"}, "enhanced ultrasound volume"),
        ({"NumberOfFrames": 2, "Modality": "US"}, "cine.*2 frames without frame positions"),
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


# Real files


def test_series_of_totalsegmentator_as_simpleitk_reads_it():
    sitk = pytest.importorskip("SimpleITK")
    folder = SAMPLES / "totalsegmentator-2.18.0/tests/reference_files/example_ct_dicom"
    if not folder.is_dir():
        pytest.skip("run `make quickstart` once to fetch the samples")
    volume = read_series(folder)  # its files have no UIDs
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
    found = {series.identifier: series for series in survey(folder)[0] if series.kind == "volume"}
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


# Headers


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
    for series in survey(folder)[0]:
        try:
            volume = read_series(folder, series=series.identifier)
        except UserError as error:
            assert "\n" not in str(error) and "Doe" not in str(error)
        else:
            assert volume.values.ndim == 3 and np.isfinite(volume.affine).all()


def test_headers_alone_are_enough_for_grouping(tmp_path):
    save_stack(tmp_path)
    series = only(group_files(file_frames(path, read_header(path)) for path in sorted(tmp_path.iterdir())))
    assert (series.slices, series.spacing, series.orientation) == (6, (0.75, 0.5, 1.0), "axial")
    assert [Path(member.path).name for member in series.members] == [f"{k:03d}.dcm" for k in range(6)]
