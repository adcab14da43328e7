"""Several DICOM stacks in one series or multi-frame file: separated and never mixed."""

from __future__ import annotations

import shutil

import highdicom
import numpy as np
import pydicom
import pytest
from dicom_slices import (
    AXIAL,
    COLUMNS,
    CORONAL,
    ORIENTATIONS,
    ROWS,
    SAGITTAL,
    assert_same_volume,
    enhanced,
    item,
    plain_slice,
    positions_of,
    rescale,
    save,
    save_stack,
)
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom.uid import NuclearMedicineImageStorage, generate_uid
from scipy.spatial.transform import Rotation

from vilam3_jax.data.dicom.series import read_series, survey
from vilam3_jax.errors import UserError

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
    found = survey(tmp_path)[0]
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
    found = survey(tmp_path / "a")[0]
    assert [series.label for series in found] == [
        f"echo {echo}, image type ORIGINAL/PRIMARY/{part}" for echo in (1, 2) for part in "MP"
    ]
    for index, series in enumerate(found):
        values = read_series(tmp_path / "a", series=series.identifier).values
        np.testing.assert_array_equal(values[0, 0], 100 * (np.arange(3) + 10 * (index + 2)))

    for k in range(3):  # dynamic series: each slice has a different time
        for phase in range(4):
            time = f"1200{phase}{k}.5"
            save(plain_slice(k + 10 * phase, z=k, ContentTime=time), tmp_path / "b" / f"{phase}{k}")
    found = survey(tmp_path / "b")[0]
    assert [series.label for series in found] == [f"time point {n} of 4" for n in (1, 2, 3, 4)]
    for phase, series in enumerate(found):
        values = read_series(tmp_path / "b", series=series.identifier).values
        np.testing.assert_array_equal(values[0, 0], 100 * (np.arange(3) + 10 * phase))


def test_copies_are_dropped_and_noted(tmp_path):
    save_stack(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "again")  # the same instances again
    volume = read_series(tmp_path)
    assert volume.values.shape[2] == 6
    assert volume.notes == ("6 files skipped: a copy of another file (same SOPInstanceUID)",)
    shutil.rmtree(tmp_path / "again")
    save_stack(tmp_path / "new_uids", InstanceNumber=None)  # equal pixels in other instances
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
        "1 slice skipped: different pixels under the SOPInstanceUID of another, which is used"
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
    for number, series in enumerate(survey(tmp_path)[0]):
        values = read_series(tmp_path, series=series.identifier).values
        assert values.shape[2] == 5 and values.any() == (number == 0)
    save_stack(tmp_path / "a", 6, first=20, z=lambda k: k + 5)  # one stack is now clearly larger
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
    for n, series in enumerate(survey(tmp_path)[0]):
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
    assert [series.label for series in survey(tmp_path)[0]] == ["acquisition 1", "acquisition 2"]


# Multi-frame


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
    found = survey(tmp_path / "e.dcm")[0]
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
    assert [series.orientation for series in survey(tmp_path / "e.dcm")[0]] == ["axial", "sagittal"]


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
    """PS3.3 C.8.4.15: positive spacings point along the normal, here towards the head."""
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
