"""NIfTI: orientation, scaling, types, pairs, sidecars and damage, against nibabel wherever it agrees."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import warnings

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.testing import data_path

from vilam3_jax.data.limits import Limits
from vilam3_jax.data.nifti_affine import read_affine
from vilam3_jax.data.volumes import load_label_map, load_volume, read_volume
from vilam3_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::vilam3_jax.errors.InputWarning")

SHAPE = (4, 5, 6)
VOXELS = np.random.default_rng(0).integers(-1000, 1500, SHAPE).astype(np.int16)
AFFINE = np.array([[0.8, 0, 0, -30.25], [0, 0.8, 0, -41.5], [0, 0, 2.5, 107.0], [0, 0, 0, 1]])
TILTED = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, 0.3)) @ AFFINE
NO_UNIT = "the file states no unit of length; millimetres are assumed"


def header_of(shape=SHAPE, dtype=np.int16, kind=nib.Nifti1Header, sform=AFFINE, qform=AFFINE, unit="mm"):
    """A header with both transforms where they are not None."""
    image = {nib.Nifti1Header: nib.Nifti1Image, nib.Nifti2Header: nib.Nifti2Image}[kind](
        np.zeros(shape, dtype), None, dtype=dtype
    )
    if sform is not None:
        image.set_sform(sform, 1)
    if qform is not None:
        image.set_qform(qform, 1, strip_shears=False)
    header = image.header.copy()
    if qform is None and sform is not None:
        header.set_zooms(np.sqrt((sform[:3, :3] ** 2).sum(axis=0)))
    header.set_xyzt_units(unit)
    header["vox_offset"] = kind.template_dtype.itemsize + 4
    return header


def save(path, voxels=VOXELS, tail=b"", header=None, **fields):
    """A file whose header is changed field by field; nibabel would repair such fields on writing."""
    header = header_of(voxels.shape, voxels.dtype) if header is None else header
    for name, value in fields.items():
        header[name] = value
    ordered = voxels.astype(voxels.dtype.newbyteorder(header.endianness))
    data = header.binaryblock + bytes(4) + ordered.tobytes(order="F") + tail
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)
    return path


def notes(path, **more):
    return load_volume(path, **more).notes


def test_a_sound_file_has_no_notes_and_a_warning_names_those_of_others(tmp_path):
    volume = load_volume(save(tmp_path / "a.nii"))
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    assert volume.notes == () and volume.modality == volume.units == "unknown"
    path = save(tmp_path / "b.nii", xyzt_units=0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert load_volume(path).notes == (NO_UNIT,)
    assert [str(w.message) for w in said] == [f"{path}: {NO_UNIT}"]


@pytest.mark.parametrize(
    "name", ["anatomical.nii", "standard.nii.gz", "reoriented_anat_moved.nii", "resampled_anat_moved.nii"]
)
def test_real_files_as_nibabel_reads_them(name):
    path = os.path.join(data_path, name)
    volume, image = load_volume(path), nib.as_closest_canonical(nib.load(path))
    valid = np.isfinite(image.get_fdata())
    np.testing.assert_allclose(volume.voxels[valid], image.get_fdata()[valid], rtol=1e-6)
    np.testing.assert_array_equal(valid, True if volume.valid is None else volume.valid)
    np.testing.assert_allclose(volume.affine, image.affine, atol=1e-5)


# Orientation


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
        (np.diag([-1.0, -1, 1, 1]), "LPS"),  # LPS taken for RAS: handedness is the same
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
    # Registered to a template whose head is larger: read, with the warning that millimetres are not true.
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


# Scaling, types, shapes


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [
        (0, 0, VOXELS),
        (np.nan, np.nan, VOXELS),
        (1, 0, VOXELS),
        (1, -1024, VOXELS - 1024),
        (2, 0, VOXELS * 2),
        (-1, 0, -VOXELS),
    ],
)
@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
def test_scaling(tmp_path, slope, intercept, expected, kind):
    path = save(tmp_path / "a.nii.gz", header=header_of(kind=kind), scl_slope=slope, scl_inter=intercept)
    volume = load_volume(path)
    np.testing.assert_array_equal(volume.voxels, expected)
    np.testing.assert_array_equal(volume.voxels, nib.load(path).get_fdata())
    assert volume.notes == () and volume.voxels.dtype == np.int16


def test_scaling_that_makes_no_sense(tmp_path):
    (note,) = notes(save(tmp_path / "a.nii", scl_slope=0, scl_inter=-1024))
    assert "scl_inter -1024 is ignored" in note
    for slope, intercept in ((1, np.nan), (1, np.inf), (np.inf, 0), (2, -np.inf)):
        with pytest.raises(UserError, match=r"scl_slope .* is invalid"):
            load_volume(save(tmp_path / "b.nii", scl_slope=slope, scl_inter=intercept))
    huge = save(tmp_path / "c.nii", header=header_of(kind=nib.Nifti2Header), scl_slope=1e300)
    with pytest.raises(UserError, match="scl_slope inf"):
        load_volume(huge)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [nib.Nifti1Header, nib.Nifti2Header])
def test_types_and_byte_orders(tmp_path, dtype, order, kind):
    values = np.random.default_rng(3).integers(0, 120, SHAPE).astype(dtype)
    header = header_of(dtype=dtype, kind=kind).as_byteswapped(order)
    path = save(tmp_path / "a.nii", values, header=header)
    np.testing.assert_array_equal(np.asanyarray(nib.load(path).dataobj), values)
    np.testing.assert_array_equal(load_volume(path).voxels, values)


def test_whole_numbers_beyond_float32(tmp_path):
    exact = np.where(VOXELS > 0, 2**40, 0).astype(np.int64)
    volume = load_volume(save(tmp_path / "a.nii", exact))
    np.testing.assert_array_equal(volume.voxels, exact)
    assert volume.notes == ()
    volume = load_volume(save(tmp_path / "b.nii", exact + 1))
    assert volume.notes == ("whole numbers beyond 24 bits are rounded to float32",)


@pytest.mark.parametrize(
    ("code", "bits", "word"),
    [
        (128, 24, "RGB colours"),
        (2304, 32, "RGBA"),
        (32, 64, "complex"),
        (1, 1, "single bits"),
        (77, 16, "77"),
    ],
)
def test_types_that_are_no_numbers_are_named(tmp_path, code, bits, word):
    with pytest.raises(UserError, match=f"voxels of .*{word}.*plain numbers are needed"):
        load_volume(save(tmp_path / "a.nii", datatype=code, bitpix=bits))


def test_bitpix(tmp_path):
    with pytest.raises(UserError, match="datatype int16 contradicts its bitpix 32"):
        load_volume(save(tmp_path / "a.nii", bitpix=32))
    np.testing.assert_array_equal(load_volume(save(tmp_path / "b.nii", bitpix=0)).voxels, VOXELS)


def test_shapes(tmp_path):
    def with_dim(name, *dim):
        return save(tmp_path / name, dim=[*dim, *[1] * (8 - len(dim))])

    for dim in ((4, 4, 5, 6, 1), (5, 4, 5, 6, 1, 1), (4, 4, 5, 6, 0), (3, 4, 5, 6, 9)):
        np.testing.assert_array_equal(load_volume(with_dim("one.nii", *dim)).voxels, VOXELS)
    for dim, words in {
        (4, 2, 5, 6, 2): "4-D data with 2 volumes .*save each",
        (5, 4, 5, 2, 1, 3): "3 values per voxel",
        (4, 4, 5, 1, 6): "6 volumes",
        (5, 4, 5, 2, 3, 2): "6 volumes",
        (1, 120): "1 axes",
        (9, 4, 5, 6): "axes",
        (3, 4, -5, 6): "a 3-D volume is needed",
        (3, 0, 5, 6): "a 3-D volume is needed",
        (4, 4, 5, 6, -1): "are impossible",
    }.items():
        with pytest.raises(UserError, match=rf"many\.nii: .*{words}"):
            load_volume(with_dim("many.nii", *dim))


@pytest.mark.parametrize("dim", [(4, 2, 5, 6, 2), (5, 2, 5, 6, 1, 2)])
@pytest.mark.parametrize("packed", [False, True])
def test_channels(tmp_path, dim, packed):
    path = save(tmp_path / "a.nii", dim=[*dim, *[1] * (8 - len(dim))])
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    halves = [read_volume(path, channel=channel).voxels for channel in (0, 1)]
    # VOXELS are stored with their first axis fastest, and that of the file is half as long.
    stored = VOXELS.ravel(order="F").reshape((2, 5, 6, 2), order="F")
    for channel, half in enumerate(halves):
        np.testing.assert_array_equal(half, stored[..., channel])
    for channel in (2, -1):
        with pytest.raises(UserError, match=rf"a\.nii: has 2 volumes and no channel {channel}"):
            read_volume(path, channel=channel)


def test_channels_of_one_volume(tmp_path):
    with pytest.raises(UserError, match="has one volume and no channel 0"):
        read_volume(save(tmp_path / "a.nii"), channel=0)


@pytest.mark.parametrize("dim", [(2, 4, 5), (3, 4, 5, 0), (3, 4, 5, 1)])
def test_one_slice(tmp_path, dim):
    flat = np.ascontiguousarray(VOXELS[:, :, :1])
    header = header_of(flat.shape)
    path = save(tmp_path / "a.nii", flat, header=header, dim=[*dim, *[1] * (8 - len(dim))])
    volume = load_volume(path)
    np.testing.assert_array_equal(volume.voxels, flat)
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert bool(volume.notes) == (dim != (3, 4, 5, 1))
    # Without a thickness one is invented, and said.
    path = save(tmp_path / "b.nii", flat, header=header, srow_z=[0, 0, 0, 107], pixdim=[1, 0.8, 0.8, 0] * 2)
    volume = load_volume(path)
    np.testing.assert_allclose(volume.spacing, [0.8, 0.8, 1], rtol=1e-6)
    assert any("1 mm is assumed" in note for note in volume.notes)


# Files


def test_pairs_are_found_from_either_half(tmp_path):
    nib.Nifti1Pair(VOXELS, AFFINE).to_filename(tmp_path / "scan.img")
    nib.Nifti2Pair(VOXELS, AFFINE).to_filename(tmp_path / "two.hdr")
    nib.Nifti1Pair(VOXELS, AFFINE).to_filename(tmp_path / "packed.img.gz")
    for half in ("hdr", "img"):
        shutil.copy(tmp_path / f"scan.{half}", tmp_path / f"UPPER.{half.upper()}")
    shutil.copy(tmp_path / "packed.hdr.gz", tmp_path / "mixed.hdr.gz")
    shutil.copy(tmp_path / "scan.img", tmp_path / "mixed.img")
    names = ["scan.hdr", "scan.img", "two.hdr", "two.img", "packed.hdr.gz", "packed.img.gz", "UPPER.HDR"]
    for name in [*names, "UPPER.IMG", "mixed.hdr.gz", "mixed.img"]:
        volume = load_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.voxels, VOXELS)
        assert volume.source == name
    (tmp_path / "scan.img").unlink()
    with pytest.raises(UserError, match=r"scan\.hdr: \.hdr of a pair without its \.img"):
        load_volume(tmp_path / "scan.hdr")
    shutil.copy(tmp_path / "two.img", tmp_path / "packed.img")
    with pytest.raises(UserError, match="keep one of them"):
        load_volume(tmp_path / "packed.hdr.gz")
    (tmp_path / "two.hdr").unlink()
    with pytest.raises(UserError, match=r"two\.img: .*put the \.hdr"):
        load_volume(tmp_path / "two.img")
    (tmp_path / "UPPER.IMG").write_bytes(VOXELS.tobytes()[:-2])
    with pytest.raises(UserError, match="cut short"):
        load_volume(tmp_path / "UPPER.HDR")


def test_a_single_file_header_beside_an_img_is_refused(tmp_path):
    save(tmp_path / "a.hdr")  # which says that it holds the voxels itself
    (tmp_path / "a.img").write_bytes(VOXELS.tobytes(order="F") + bytes(400))
    with pytest.raises(UserError, match=r"a\.img: the \.hdr beside it is a single file with its own voxels"):
        load_volume(tmp_path / "a.img")


def test_analyze_is_refused(tmp_path):
    nib.AnalyzeImage(VOXELS, AFFINE).to_filename(tmp_path / "old.img")
    for name in ("old.img", "old.hdr"):
        with pytest.raises(UserError, match=rf"{name}: Analyze 7.5 .*where left is"):
            load_volume(tmp_path / name)


def test_content_decides_and_not_the_suffix(tmp_path):
    plain, packed = save(tmp_path / "a.nii"), save(tmp_path / "a.nii.gz")
    for name, source in {
        "SCAN.NII.GZ": packed,
        "SCAN.NII": plain,
        "download": packed,
        "named.nii": packed,
        "plain.nii.gz": plain,
        "scan.dcm": plain,
        "scan.img.nii": plain,
    }.items():
        shutil.copy(source, tmp_path / name)
        np.testing.assert_array_equal(load_volume(tmp_path / name).voxels, VOXELS)


def test_gzip_members_and_what_follows_them(tmp_path):
    data = save(tmp_path / "a.nii").read_bytes()
    path = tmp_path / "b.nii.gz"
    path.write_bytes(gzip.compress(data[:300]) + gzip.compress(data[300:500]) + gzip.compress(data[500:]))
    np.testing.assert_array_equal(load_volume(path).voxels, VOXELS)
    path.write_bytes(gzip.compress(data) + b"garbage")
    assert notes(path) == ("bytes after the compressed data are ignored",)
    tiny = save(tmp_path / "d.nii", VOXELS[:2, :2, :2]).read_bytes()  # shorter than a header of NIfTI-2
    path.write_bytes(gzip.compress(tiny) + b"garbage")
    assert notes(path) == ("bytes after the compressed data are ignored",)
    path.write_bytes(gzip.compress(data + bytes(30)))
    assert notes(path) == ("at least 30 bytes after the voxels are ignored",)
    assert notes(save(tmp_path / "c.nii", tail=bytes(7))) == (
        "at least 7 bytes after the voxels are ignored",
    )
    for cut in (1, 8, 20, 100):
        path.write_bytes(gzip.compress(data)[:-cut])
        with pytest.raises(UserError, match=r"b\.nii\.gz: .*(cut short|damaged)"):
            load_volume(path)
    path.write_bytes(gzip.compress(gzip.compress(data)))
    with pytest.raises(UserError, match="compressed twice"):
        load_volume(path)
    wrong = bytearray(gzip.compress(data))
    wrong[-6] ^= 1  # the checksum
    path.write_bytes(wrong)
    with pytest.raises(UserError, match=r"b\.nii\.gz: .*damaged"):
        load_volume(path)


def test_cifti_is_called_by_its_name(tmp_path):
    axes = (
        nib.cifti2.ScalarAxis(["a", "b"]),
        nib.cifti2.BrainModelAxis.from_surface(np.arange(10), 10, "CORTEX_LEFT"),
    )
    path = tmp_path / "x.dscalar.nii"
    nib.Cifti2Image(np.zeros((2, 10), np.float32), header=axes).to_filename(path)
    with pytest.raises(UserError, match=r"x\.dscalar\.nii: CIFTI file with values on brain surfaces"):
        load_volume(path)


def test_extensions_and_offsets(tmp_path):
    image = nib.Nifti1Image(VOXELS, AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 100_000))
    image.to_filename(tmp_path / "extended.nii.gz")
    np.testing.assert_array_equal(load_volume(tmp_path / "extended.nii.gz").voxels, VOXELS)
    path = save(tmp_path / "zero.nii", vox_offset=0)
    np.testing.assert_array_equal(load_volume(path).voxels, VOXELS)
    assert "vox_offset is 0" in notes(path)[0]
    for offset in (-352, 100, 352.5, np.nan, np.inf, 1e12):
        with pytest.raises(UserError, match=r"data offset .* is invalid"):
            load_volume(save(tmp_path / "odd.nii", vox_offset=offset))
    with pytest.raises(UserError, match="cut short"):
        load_volume(save(tmp_path / "far.nii", vox_offset=100_000))


def test_header_that_promises_more_than_the_file_holds(tmp_path):
    for name in ("a.nii", "a.nii.gz"):
        path = save(tmp_path / name, np.zeros((1, 1, 1), np.int16), dim=[3, 600, 600, 600, 1, 1, 1, 1])
        with pytest.raises(UserError, match=r"432000352; it is cut short"):
            load_volume(path)
    with pytest.raises(UserError, match="bytes of voxels, more than the limit of 100"):
        load_volume(save(tmp_path / "b.nii"), limits=Limits(decoded_bytes=100))


def test_text_mode_transfer_is_named(tmp_path):
    path = save(tmp_path / "a.nii", header=header_of(kind=nib.Nifti2Header))
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + b"\n\n\x1a\n" + raw[12:])
    with pytest.raises(UserError, match="by a transfer in text mode"):
        load_volume(path)


# What the sidecar states


@pytest.mark.parametrize(
    ("fields", "modality", "units", "body_part"),
    [
        ({"Modality": "CT", "BodyPartExamined": "Chest"}, "CT", "HU", "CHEST"),
        ({"Modality": "MR"}, "MR", "unknown", "unknown"),
        ({"Modality": "PT", "Units": "Bq/mL"}, "PT", "Bq/ml", "unknown"),
        ({"Modality": "PET"}, "PT", "unknown", "unknown"),
        ({"PatientName": "Doe^Jane", "EchoTime": 0.1}, "unknown", "unknown", "unknown"),
    ],
)
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "scan.v2.nii"])
def test_sidecar(tmp_path, fields, modality, units, body_part, name):
    path = save(tmp_path / name)
    (tmp_path / name.replace(".nii", "").replace(".gz", "")).with_name(
        name.removesuffix(".gz").removesuffix(".nii") + ".json"
    ).write_text(json.dumps(fields))
    volume = load_volume(path)
    assert (volume.modality, volume.units, volume.body_part) == (modality, units, body_part)
    assert volume.notes == ()


@pytest.mark.parametrize(
    "text", ["{", "[1]", '"CT"', '{"Modality": 3}', '{"Modality": "holiday"}', "[" * 100_000, "\udcff"]
)
def test_damaged_sidecar_becomes_a_note(tmp_path, text):
    path = save(tmp_path / "a.nii")
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    volume = load_volume(path)
    assert volume.modality == "unknown"
    assert len(volume.notes) == 1 and "ignored" in volume.notes[0] and "holiday" not in volume.notes[0]


def test_sidecar_against_the_caller(tmp_path):
    path = save(tmp_path / "a.nii")
    assert load_volume(path, modality="CT").units == "HU"
    assert load_volume(path, modality="mri").modality == "MR"
    (tmp_path / "a.json").write_text('{"Modality": "MR"}')
    with pytest.raises(UserError, match="declared as CT, but the file states MR"):
        load_volume(path, modality="CT")


# Label maps


def test_label_maps_keep_their_values(tmp_path):
    labels = np.random.default_rng(2).integers(0, 300, SHAPE)
    grid = load_volume(save(tmp_path / "scan.nii"))
    stored = {
        "int64.nii": labels.astype(np.int64),
        "uint16.nii": labels.astype(np.uint16),
        "float.nii": labels.astype(np.float32),
        "double.nii": labels.astype(np.float64),
    }
    for name, values in stored.items():
        found = load_label_map(save(tmp_path / name, values), grid)
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, labels)
    tenths = save(tmp_path / "scaled.nii", (labels * 10).astype(np.int16), scl_slope=0.1, scl_inter=0)
    np.testing.assert_array_equal(load_label_map(tenths, grid), labels)
    # One label everywhere but in voxels without a value: those are background, not that label.
    holes = np.full(SHAPE, 7, np.float32)
    holes[0] = np.nan
    found = load_label_map(save(tmp_path / "holes.nii", holes), grid)
    assert (found[0] == 0).all() and (found[1:] == 7).all()
    for name, values in {"probability": labels / 300, "negative": -labels, "large": labels * 1000}.items():
        with pytest.raises(UserError, match=f"{name}.*whole numbers from 0 to 65535"):
            load_label_map(save(tmp_path / f"{name}.nii", values), grid)


# Damage


@settings(max_examples=150, deadline=None)
@given(
    start=st.sampled_from([0, 40, 70, 100, 108, 112, 252, 280, 344]),
    junk=st.binary(min_size=1, max_size=12),
    kind=st.sampled_from([nib.Nifti1Header, nib.Nifti2Header]),
    suffix=st.sampled_from([".nii", ".nii.gz"]),
)
def test_damaged_headers_give_one_line(tmp_path_factory, start, junk, kind, suffix):
    raw = bytearray(save(tmp_path_factory.mktemp("good") / "a.nii", header=header_of(kind=kind)).read_bytes())
    raw[start : start + len(junk)] = junk
    path = tmp_path_factory.mktemp("bad") / f"a{suffix}"
    path.write_bytes(gzip.compress(raw, 1) if suffix == ".nii.gz" else raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            volume = load_volume(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert volume.voxels.ndim == 3 and np.isfinite(volume.voxels).all()
