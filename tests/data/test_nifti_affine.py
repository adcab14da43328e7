"""Orientation and units of NIfTI files, against nibabel wherever it agrees."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nifti_files import AFFINE, SHAPE, TILTED, header_of, notes, save

from vilam3_jax.data.nifti_affine import read_affine
from vilam3_jax.data.volumes import load_volume
from vilam3_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::vilam3_jax.errors.InputWarning")


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (np.zeros((3, 4)), "all zero"),
        (np.full((3, 4), np.nan), "not finite"),
        (np.diag([1.0, 1, np.inf, 1])[:3], "not finite"),
        (np.array([[1.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]), "singular"),
        (np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]), "singular"),
    ],
)
def test_an_unusable_sform_gives_way_to_a_good_qform(tmp_path, rows, why):
    path = save(tmp_path / "a.nii", srow_x=rows[0], srow_y=rows[1], srow_z=rows[2])
    volume = load_volume(path)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert len(volume.notes) == 1 and why in volume.notes[0] and "the qform is used" in volume.notes[0]
    only = save(tmp_path / "b.nii", srow_x=rows[0], srow_y=rows[1], srow_z=rows[2], qform_code=0)
    with pytest.raises(UserError, match=rf"b\.nii: the header has no orientation \(sform: .*{why}"):
        load_volume(only)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"quatern_b": 0.9, "quatern_c": 0.9}, "quaternion has the length 1.273"),
        ({"quatern_b": np.nan}, "not finite"),
        ({"qoffset_y": np.inf}, "not finite"),
        ({"pixdim": [1, 0.8, 0.8, 0, 1, 1, 1, 1]}, "voxel size of 0"),
        ({"pixdim": [1, -0.8, 0.8, 2.5, 1, 1, 1, 1]}, "voxel size of -0.8"),
    ],
)
def test_an_unusable_qform_gives_way_to_a_good_sform(tmp_path, fields, why):
    volume = load_volume(save(tmp_path / "a.nii", **fields))
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert len(volume.notes) == 1 and why in volume.notes[0] and "the sform is used" in volume.notes[0]
    with pytest.raises(UserError, match=f"no orientation.*{why}"):
        load_volume(save(tmp_path / "b.nii", sform_code=0, **fields))


def test_codes_decide_and_two_codes_of_zero_are_refused(tmp_path):
    other = np.diag([-2.0, 3, 4, 1])
    path = save(
        tmp_path / "s.nii", header=header_of(qform=other), qform_code=0, pixdim=[1, 0.8, 0.8, 2.5] * 2
    )
    np.testing.assert_allclose(load_volume(path).affine, AFFINE, atol=1e-5)
    path = save(tmp_path / "q.nii", header=header_of(sform=other), sform_code=0)
    np.testing.assert_allclose(load_volume(path).affine, AFFINE, atol=1e-5)
    with pytest.raises(UserError, match="qform and sform codes are 0"):
        load_volume(save(tmp_path / "none.nii", sform_code=0, qform_code=0))
    with pytest.raises(UserError, match="no orientation"):
        load_volume(save(tmp_path / "negative.nii", sform_code=-1, qform_code=0))


@pytest.mark.parametrize(
    ("turn", "codes"),
    [
        (np.diag([-1.0, 1, 1, 1]), "LAS"),  # mirrored
        (np.diag([-1.0, -1, 1, 1]), "LPS"),  # LPS read as RAS has the same handedness
        (np.eye(4)[[1, 0, 2, 3]], "ARS"),
        (np.eye(4)[[1, 2, 0, 3]], "SRA"),  # rows of the affine: the first axis runs to the head
    ],
)
def test_contradictory_transforms_are_refused(tmp_path, turn, codes):
    path = save(tmp_path / "a.nii", header=header_of(sform=turn @ np.eye(4), qform=np.eye(4)))
    with pytest.raises(UserError, match=rf"a\.nii: sform \({codes}\) and qform \(RAS\) contradict .* code"):
        load_volume(path)


def test_other_voxel_sizes_in_sform_and_qform_are_refused(tmp_path):
    path = save(tmp_path / "a.nii", header=header_of(sform=np.eye(4), qform=np.diag([0.7, 0.7, 5.0, 1])))
    with pytest.raises(UserError, match=r"1 x 1 x 1 mm by the sform, but of 0\.7 x 0\.7 x 5 mm by the qform"):
        load_volume(path)
    path = save(
        tmp_path / "b.nii", header=header_of(sform=np.eye(4)), pixdim=[1, 0.7, 0.7, 5] * 2, qform_code=0
    )
    with pytest.raises(UserError, match=r"0\.7 x 0\.7 x 5 mm by the pixdim"):
        load_volume(path)


@settings(max_examples=100, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-np.pi, np.pi)] * 3),
    tilt=st.sampled_from([0.0, 1e-4, 1e-3, 1e-2]),
    half_turn=st.booleans(),
    mirrored=st.booleans(),
)
def test_what_rounding_leaves_between_two_transforms_is_silent(angles, tilt, half_turn, mirrored):
    rotation = nib.eulerangles.euler2mat(*angles)
    if half_turn:  # as scanners store it: left and back, with a slight tilt
        rotation = np.diag([-1, -1, 1]) @ nib.eulerangles.euler2mat(*(tilt * np.array(angles) / np.pi))
    affine = AFFINE.copy()
    affine[:3, :3] = rotation @ np.diag([0.5, 0.5, -0.8 if mirrored else 0.8])
    _, _, notes = read_affine(header_of(sform=affine, qform=affine), (512, 512, 400), "a.nii")
    assert notes == ()


def test_a_small_difference_takes_the_sform_and_says_so(tmp_path):
    turn = np.eye(4)
    turn[:3, :3] = nib.eulerangles.euler2mat(0, 0, np.deg2rad(5))
    turn[:3, 3] = [3, 0, 0]
    path = save(tmp_path / "a.nii", header=header_of(sform=turn @ AFFINE))
    volume = load_volume(path)
    np.testing.assert_allclose(volume.affine, nib.load(path).affine, atol=1e-5)  # nibabel takes the sform too
    (note,) = volume.notes
    assert "sform (scanner) and qform (scanner) differ" in note and "5 degrees" in note
    assert "template" not in note
    # Registered to a larger template: accepted, with a note that lengths are those of the template.
    path = save(
        tmp_path / "mni.nii", header=header_of(sform=np.diag([1.2, 1.1, 1.15, 1]) @ AFFINE), sform_code=4
    )
    (note,) = notes(path)
    assert "sform (MNI152)" in note and "those of the template" in note


def test_sheared_sform_is_kept_and_noted(tmp_path):
    sheared = AFFINE.copy()
    sheared[1, 2] = -0.7  # a tilted gantry
    volume = load_volume(save(tmp_path / "a.nii", header=header_of(sform=sheared, qform=None)))
    np.testing.assert_allclose(volume.affine, sheared, atol=1e-5)
    assert any("degrees off right angles" in note for note in volume.notes)
    nearly = AFFINE.copy()
    nearly[:3, :3] = nearly[:3, :3].round(3) + 1e-4
    assert notes(save(tmp_path / "b.nii", header=header_of(sform=nearly, qform=None))) == ()


@pytest.mark.parametrize("qfac", [1.0, -1.0, 0.0, -3.0])
def test_qfac(tmp_path, qfac):
    path = save(tmp_path / "a.nii", header=header_of(qform=TILTED, sform=None))
    path = save(
        tmp_path / "b.nii", header=header_of(qform=TILTED, sform=None), pixdim=[qfac, 0.8, 0.8, 2.5] * 2
    )
    expected = TILTED @ np.diag([1, 1, -1 if qfac < 0 else 1, 1])  # nifti1.h: 0 counts as 1
    found = load_volume(path)
    want = expected @ nib.orientations.inv_ornt_aff(nib.orientations.io_orientation(expected), SHAPE)
    np.testing.assert_allclose(found.affine, want, atol=1e-4)


def test_quaternion_slightly_too_long_is_repaired(tmp_path):
    header = header_of(sform=None, qform=np.diag([-0.8, -0.8, 2.5, 1]))  # half a turn: w is 0
    path = save(tmp_path / "a.nii", header=header, quatern_d=1.0001)
    np.testing.assert_allclose(load_volume(path).affine[:3, :3], AFFINE[:3, :3], atol=1e-4)


def test_pixdim_beside_an_sform(tmp_path):
    only = header_of(qform=None)
    assert notes(save(tmp_path / "a.nii", header=only.copy(), pixdim=[1, 0, np.nan, 0] * 2)) == ()
    (note,) = notes(save(tmp_path / "b.nii", header=only.copy(), pixdim=[1, 1, 1, 1] * 2))
    assert "0.8 x 0.8 x 2.5 mm by the sform and of 1 x 1 x 1 mm by pixdim" in note
    (note,) = notes(save(tmp_path / "c.nii", header=only.copy(), pixdim=[1, 0.8, 0.8, 2.4] * 2))
    assert "the sform is used" in note


# Units


@pytest.mark.parametrize(("code", "factor"), [(1, 1000), (3, 0.001)])
def test_units_of_length_are_converted(tmp_path, code, factor):
    affine = AFFINE.copy()
    affine[:3] /= factor
    path = save(tmp_path / "a.nii", header=header_of(sform=affine, qform=affine), xyzt_units=code + 16)
    volume = load_volume(path)
    np.testing.assert_allclose(volume.affine, AFFINE, rtol=1e-5)
    assert any("converted to millimetres" in note for note in volume.notes)


def test_units_that_cannot_be_are_refused(tmp_path):
    metres = np.diag([0.0005, 0.0005, 0.001, 1])
    with pytest.raises(UserError, match="probably in metres"):
        load_volume(save(tmp_path / "a.nii", header=header_of(sform=metres, qform=None)))
    with pytest.raises(UserError, match="probably in millimetres"):
        load_volume(save(tmp_path / "b.nii", header=header_of(unit="meter")))
    (note,) = notes(save(tmp_path / "c.nii", xyzt_units=7))
    assert "code 7 is not a unit of length" in note
