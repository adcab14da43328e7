"""Geometry of DICOM series: affines compared with highdicom and SimpleITK, missing slices, gantry tilt."""

from __future__ import annotations

import math
import re

import highdicom
import numpy as np
import pytest
from dicom_slices import (
    AXIAL,
    COLUMNS,
    LPS_TO_RAS,
    ORIENTATIONS,
    ROWS,
    assert_same_volume,
    only,
    plain_slice,
    positions_of,
    save,
)
from highdicom.spatial import PixelToReferenceTransformer, get_volume_positions
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from vilam3_jax.data.dicom.geometry import plane_of, stack_slices
from vilam3_jax.data.dicom.series import read_series, survey


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
    assert only(survey(tmp_path)[0]).orientation == name.split()[0].rstrip(",")

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
    """Includes tilted gantries: the shear of the affine reproduces the position of each slice."""
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
    assert get_volume_positions(along_z(distances), AXIAL)[0] is None  # highdicom agrees


def test_jump_within_the_plane_is_no_tilt():
    positions = along_z(np.arange(8) * 5.0)
    positions[5:, 0] += 12
    assert "by 12.00 mm between slices 5 and 6 of 8" in stacked(positions).problem
    positions = along_z(np.arange(8) * 5.0)
    positions[:, 1] += np.arange(8) * 6.0
    assert stacked(positions).problem is not None  # larger shifts than slice distances


def test_header_against_positions():
    positions = along_z(np.arange(8) * 5.0)
    assert stacked(positions, distance=5.0, thickness=5.0).notes == ()
    assert stacked(positions, thickness=7.5).notes == ()  # overlapping slices are common
    (note,) = stacked(positions, distance=2.5).notes
    assert note.startswith("the header states 2.5 mm between slices, the positions 5 mm")
    (note,) = stacked(positions, thickness=1.0).notes
    assert note == "slices of 1 mm thickness are 5 mm apart"
    (note,) = stacked(positions, tilt=-12.0).notes
    assert "states a gantry tilt of 12.0 degrees, the slice positions show none" in note
    positions[:, 1] += np.arange(8) * 5 * math.tan(math.radians(12))
    assert stacked(positions, tilt=-12.0).notes == (
        "gantry tilt of 12.0 degrees, kept in the affine as shear",
    )


def test_tilt_as_dcm2niix_sees_it():
    """A gantry tilted by 15 degrees about x: rows along x, tilted columns, table motion along z."""
    tilt = math.radians(15)
    orientation = [1, 0, 0, 0, math.cos(tilt), -math.sin(tilt)]
    positions = along_z(np.arange(10) * 4.0)
    stack = stack_slices(
        positions, plane_of(orientation), (0.5, 0.5), distance=None, thickness=4.0, tilt=15.0
    )
    np.testing.assert_allclose(stack.affine[:3, 2], [0, 0, 4], atol=1e-12)  # the table motion
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
