"""Volumes: one orientation and one key in every format, radiological display, hostile files rejected."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys

import nibabel as nib
import nrrd
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from vilam3_jax.data.intensity import window_to_uint8
from vilam3_jax.data.limits import Limits
from vilam3_jax.data.preprocessing import DEFAULT_PREPROCESSING
from vilam3_jax.data.volumes import (
    Volume,
    load_label_map,
    load_volume,
    slice_2d,
)
from vilam3_jax.errors import UserError

SHAPE = (5, 6, 7)
AFFINE = np.array([[0.8, 0, 0, -30.25], [0, 0.8, 0, -41.5], [0, 0, 2.5, 107.0], [0, 0, 0, 1]])


def ct_voxels(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)


def save_nifti(path, voxels, affine=AFFINE, slope=None, intercept=None):
    image = nib.Nifti1Image(voxels, affine)
    if slope is None:
        image.to_filename(path)
    else:  # nibabel would rescale on writing; store values and slope as a scanner's converter does
        header = image.header.copy()
        header["scl_slope"], header["scl_inter"] = slope, intercept
        header["vox_offset"] = 352
        path.write_bytes(header.binaryblock + b"\0\0\0\0" + voxels.tobytes(order="F"))
    return path


def save_nrrd(path, voxels, affine=AFFINE, space="left-posterior-superior", **more):
    signs = {"left-posterior-superior": (-1, -1, 1), "RAS": (1, 1, 1)}[space]
    own = np.diag([*signs, 1]) @ affine
    header = {"space": space, "space directions": own[:3, :3].T, "space origin": own[:3, 3], **more}
    nrrd.write(str(path), voxels, header)
    return path


def save_dicom(folder, voxels, affine=AFFINE, *, slope=1, intercept=-1024, series=None, order=None):
    """Writes `voxels` [X, Y, Z] in RAS as scanners do, with rows and columns towards left and back."""
    folder.mkdir(exist_ok=True)
    flip = nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt("RAS")
    turn = nib.orientations.ornt_transform(flip[1], flip[0])
    stored = nib.orientations.apply_orientation(voxels, turn)
    lps = np.diag([-1, -1, 1, 1]) @ affine @ nib.orientations.inv_ornt_aff(turn, voxels.shape)
    series = series or generate_uid()
    for k in range(stored.shape[2]):
        d = pydicom.Dataset()
        d.file_meta = FileMetaDataset()
        d.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        d.SOPClassUID, d.SOPInstanceUID, d.SeriesInstanceUID = CTImageStorage, generate_uid(), series
        d.Rows, d.Columns = stored.shape[1], stored.shape[0]
        d.ImagePositionPatient = [float(x) for x in (lps @ [0, 0, k, 1])[:3]]
        d.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        d.PixelSpacing = [float(lps[1, 1]), float(lps[0, 0])]
        d.SliceThickness = float(lps[2, 2])
        d.RescaleSlope, d.RescaleIntercept = slope, intercept
        d.SamplesPerPixel, d.PhotometricInterpretation, d.PixelRepresentation = 1, "MONOCHROME2", 0
        d.BitsAllocated, d.BitsStored, d.HighBit = 16, 16, 15
        raw = np.round((stored[:, :, k].T.astype(np.float64) - intercept) / slope)
        d.PixelData = raw.astype("<u2").tobytes()
        name = k if order is None else order[k]
        d.save_as(folder / f"{name:03d}.dcm", enforce_file_format=True)
    return folder


def test_same_scan_in_all_formats_has_one_key(tmp_path):
    voxels = ct_voxels()
    paths = [
        save_nifti(tmp_path / "int16.nii.gz", voxels),
        save_nifti(tmp_path / "int32.nii", voxels.astype(np.int32)),
        save_nifti(tmp_path / "float.nii.gz", voxels.astype(np.float32)),
        save_nifti(tmp_path / "scaled.nii", (voxels + 1024).astype(np.uint16), slope=1, intercept=-1024),
        save_nrrd(tmp_path / "lps.nrrd", voxels),
        save_nrrd(tmp_path / "ras_raw.nrrd", voxels, space="RAS", encoding="raw"),
        save_nrrd(tmp_path / "double.nrrd", voxels.astype(np.float64), encoding="bzip2"),
        save_dicom(tmp_path / "series", voxels, order=[3, 0, 6, 1, 5, 2, 4]),
    ]
    volumes = [load_volume(path) for path in paths]
    for volume in volumes:
        np.testing.assert_array_equal(volume.voxels, voxels)
        assert volume.voxels.dtype == np.int16
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-4)
    assert len({volume.content_key for volume in volumes}) == 1
    np.testing.assert_allclose(volumes[-1].spacing, [0.8, 0.8, 2.5], rtol=1e-6)
    assert volumes[-1].source == "series"


def test_fractional_rescale_gives_one_key_in_nifti_and_dicom(tmp_path):
    stored = np.random.default_rng(1).integers(0, 4000, SHAPE).astype(np.uint16)
    voxels = stored.astype(np.float64) * 0.1 - 7.3
    dicom = load_volume(save_dicom(tmp_path / "pet", voxels, slope=0.1, intercept=-7.3))
    nifti = load_volume(save_nifti(tmp_path / "pet.nii", stored, slope=0.1, intercept=-7.3))
    assert nifti.voxels.dtype == np.float32
    np.testing.assert_allclose(nifti.voxels, voxels, rtol=1e-5, atol=1e-5)
    assert dicom.content_key == nifti.content_key


def test_key_tells_other_scans_apart():
    voxels = ct_voxels()
    base = Volume(voxels, AFFINE, "a").content_key
    changed = voxels.copy()
    changed[2, 3, 4] += 1
    moved = AFFINE.copy()
    moved[0, 3] += 1
    stretched = AFFINE @ np.diag([1.01, 1, 1, 1])
    others = [
        Volume(changed, AFFINE, "a"),
        Volume(voxels, moved, "a"),
        Volume(voxels, stretched, "a"),
        Volume(voxels.astype(np.float32), AFFINE, "a"),
        Volume(voxels.reshape(6, 5, 7), AFFINE, "a"),
    ]
    assert base not in {other.content_key for other in others}
    assert Volume(voxels, AFFINE, "b").content_key == base  # the key ignores the name


@settings(max_examples=40, deadline=None)
@given(
    axes=st.permutations([0, 1, 2]),
    signs=st.tuples(*[st.sampled_from([-1, 1])] * 3),
    tilt=st.floats(-0.3, 0.3),
    seed=st.integers(0, 1000),
)
def test_key_does_not_depend_on_storage_order(tmp_path_factory, axes, signs, tilt, seed):
    folder = tmp_path_factory.mktemp("order")
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]]
    affine, voxels = turn @ AFFINE, ct_voxels(seed=seed)
    orientation = np.array(list(zip(axes, signs, strict=True)))
    stored = np.ascontiguousarray(nib.orientations.apply_orientation(voxels, orientation))
    stored_affine = affine @ nib.orientations.inv_ornt_aff(orientation, voxels.shape)
    straight = load_volume(save_nifti(folder / "a.nii", voxels, affine))
    turned = load_volume(save_nifti(folder / "b.nii", stored, stored_affine))
    np.testing.assert_array_equal(turned.voxels, voxels)
    np.testing.assert_allclose(turned.affine, straight.affine, atol=1e-3)
    assert turned.content_key == straight.content_key


@pytest.mark.parametrize(
    ("axis", "marker", "row", "column"),
    [  # a marker at the patient's right (high x), front (high y), head (high z) end of one axis each
        (2, (4, 2, 3), None, "left"),
        (2, (2, 5, 3), "top", None),
        (1, (4, 2, 3), None, "left"),
        (1, (2, 2, 6), "top", None),
        (0, (2, 5, 3), None, "left"),
        (0, (2, 2, 6), "top", None),
    ],
)
def test_display_orientation(tmp_path, axis, marker, row, column):
    voxels = np.zeros(SHAPE, np.int16)
    voxels[marker] = 1000
    # Stored in LPI order: the display must not depend on it.
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt("LPI")
    )
    stored = nib.orientations.apply_orientation(voxels, turn)
    affine = AFFINE @ nib.orientations.inv_ornt_aff(turn, voxels.shape)
    volume = load_volume(save_nifti(tmp_path / "m.nii.gz", np.ascontiguousarray(stored), affine))
    plane = slice_2d(volume.voxels, axis, marker[axis])
    (found_row, found_column) = (int(i[0]) for i in np.nonzero(plane))
    assert row is None or found_row == 0
    assert column is None or found_column == 0
    rest = [n for i, n in enumerate(SHAPE) if i != axis]
    assert plane.shape == (rest[1], rest[0])
    image = DEFAULT_PREPROCESSING.slice_image(volume, axis, marker[axis], (500, 1000), 64)
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    weight = image[..., 0].astype(float)
    center = [float((weight.sum(axis=1 - a) * np.arange(64)).sum() / weight.sum()) for a in (0, 1)]
    assert row is None or center[0] < 16
    assert column is None or center[1] < 16


def test_slice_outside_is_refused():
    with pytest.raises(UserError, match="slice 7 along axis 2"):
        slice_2d(ct_voxels(), 2, 7)


def test_window():
    plane = np.array([[-500, -150, 50, 250, 900]])
    np.testing.assert_array_equal(window_to_uint8(plane, (50, 400)), [[0, 0, 127, 255, 255]])
    np.testing.assert_array_equal(window_to_uint8(plane, None, (-150, 250)), [[0, 0, 127, 255, 255]])
    assert window_to_uint8(np.ones((2, 2)), None, (1.0, 1.0)).tolist() == [
        [0, 0],
        [0, 0],
    ]  # constant: no division
    with pytest.raises(ValueError):
        window_to_uint8(plane, None)


def test_limits_ignore_a_few_extreme_voxels():
    voxels = np.zeros((20, 20, 20), np.int16)
    voxels[:10] = 100
    voxels[0, 0, 0] = 30000
    assert Volume(voxels, AFFINE, "a").limits == (0.0, 100.0)


@pytest.mark.parametrize("value", [0, 7])
def test_limits_of_nearly_constant_volumes(value):
    constant = np.full((20, 20, 20), value, np.int16)
    assert Volume(constant, AFFINE, "a").limits == (value, value)
    # Less than one voxel in 200 differs, as in a small organ on an empty background.
    sparse = constant.copy()
    sparse[:2, :2, :5] = 100 + np.arange(20).reshape(2, 2, 5)
    low, high = Volume(sparse, AFFINE, "a").limits
    assert low == value and 118 < high <= 119
    image = DEFAULT_PREPROCESSING.slice_image(Volume(sparse, AFFINE, "a"), 2, 0)
    assert len(np.unique(image)) == 5  # four shades on black, not a white spot
    # An invalid hot voxel changes nothing.
    valid = np.ones(constant.shape, bool)
    valid[3, 3, 3] = False
    hot = constant.copy()
    hot[3, 3, 3] = 30000
    assert Volume(hot, AFFINE, "a", valid=valid).limits == (value, value)
    valid[:] = False
    valid[3, 3, 3] = True
    assert Volume(hot, AFFINE, "a", valid=valid).limits == (30000, 30000)


def test_voxels_that_measure_nothing_are_black_in_any_window():
    voxels = ct_voxels()
    valid = np.ones(voxels.shape, bool)
    valid[0] = False
    volume = Volume(voxels, AFFINE, "a", valid=valid)
    for window in ((-5000.0, 100.0), None):
        image = DEFAULT_PREPROCESSING.slice_image(volume, 2, 3, window)
        assert (image[:, -1] == 0).all()  # the patient's left is on the right
        assert (image[:, :-1] > 0).any()


def test_non_finite_voxels(tmp_path):
    values = np.linspace(0.25, 9.25, int(np.prod(SHAPE))).reshape(SHAPE).astype(np.float32)
    values[0, 0, 0], values[1, 1, 1], values[2, 2, 2] = np.nan, np.inf, -np.inf
    volume = load_volume(save_nifti(tmp_path / "nan.nii.gz", values))
    finite = values[np.isfinite(values)]
    assert volume.voxels[0, 0, 0] == volume.voxels[2, 2, 2] == finite.min()
    assert volume.voxels[1, 1, 1] == finite.max()
    with pytest.raises(UserError, match=r"all\.nii"):
        load_volume(save_nifti(tmp_path / "all.nii", np.full(SHAPE, np.nan, np.float32)))


def test_limits_are_checked_before_decoding(tmp_path):
    path = save_nifti(tmp_path / "a.nii.gz", ct_voxels())
    with pytest.raises(UserError, match="210 voxels, more than the limit of 100"):
        load_volume(path, limits=Limits(voxels=100))
    with pytest.raises(UserError, match="bytes, more than the limit"):
        load_volume(path, limits=Limits(file_bytes=10))
    with pytest.raises(UserError, match="210 voxels"):
        load_volume(save_nrrd(tmp_path / "a.nrrd", ct_voxels()), limits=Limits(voxels=100))
    with pytest.raises(UserError, match="210 voxels"):
        load_volume(save_dicom(tmp_path / "series", ct_voxels()), limits=Limits(voxels=100))
    # A header that promises 10^12 voxels without data is rejected before anything is allocated.
    header = nib.Nifti1Header()
    header.set_data_shape((10_000, 10_000, 10_000))
    header.set_data_dtype(np.int16)
    header["sform_code"], header["vox_offset"] = 1, 352
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(4)))
    with pytest.raises(UserError, match=r"bomb\.nii\.gz: 1000000000000 voxels"):
        load_volume(tmp_path / "bomb.nii.gz")


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    makers = {"a.nii": save_nifti, "a.nii.gz": save_nifti, "a.nrrd": save_nrrd, "series": save_dicom}
    return [make(folder / name, ct_voxels()) for name, make in makers.items()]


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom.*")
@settings(max_examples=80, deadline=None)
@given(
    which=st.integers(0, 3),
    keep=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
)
def test_damaged_files_give_one_clear_error(tmp_path_factory, good_files, which, keep, changes):
    good = good_files[which]
    name = good.name
    path = tmp_path_factory.mktemp("damage") / name
    if good.is_dir():
        shutil.copytree(good, path)
        good, file = good / "000.dcm", path / "000.dcm"
    else:
        file = path
    raw = bytearray(good.read_bytes())
    for place, value in changes:
        raw[int(place * len(raw))] = value
    file.write_bytes(raw if changes else raw[: int(keep * len(raw))])
    try:
        volume = load_volume(path)
    except UserError as error:
        assert name in str(error) and "\n" not in str(error)
    else:  # the damage hit an unused field or a voxel
        assert np.isfinite(volume.voxels).all() and volume.voxels.ndim == 3


def test_what_is_no_volume_is_named(tmp_path):
    for name, data, words in (
        ("a.nii", b"hello" * 100, "text file"),
        ("b.nii.gz", b"", "empty file"),
        ("c.nrrd", b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG image"),
        ("d", b"PK\x03\x04" + bytes(50), "zip archive"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: {words}"):
            load_volume(tmp_path / name)
    with pytest.raises(UserError, match=r"missing\.nii: no such file"):
        load_volume(tmp_path / "missing.nii")


@pytest.mark.parametrize(
    "error",
    [
        IndexError("list index out of range"),
        RecursionError("too deep"),
        TypeError("two\nlines at 0x7f00aa11bb"),
    ],
)
def test_any_exception_of_a_parser_is_one_line(tmp_path, monkeypatch, error):
    path = save_nifti(tmp_path / "a.nii", ct_voxels())

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(nib.Nifti1Header, "may_contain_header", fails)
    with pytest.raises(UserError, match=r"a\.nii: damaged .*fetch or export it again$") as caught:
        load_volume(path)
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_label_map_must_lie_on_the_grid(tmp_path):
    scan = load_volume(save_nifti(tmp_path / "scan.nii", ct_voxels()))
    labels = np.random.default_rng(2).integers(0, 4, SHAPE)
    path = save_nrrd(tmp_path / "labels.nrrd", labels.astype(np.float32))  # float, other format, same place
    found = load_label_map(path, scan)
    np.testing.assert_array_equal(found, labels)
    assert found.dtype == np.uint8
    assert (
        load_label_map(save_nifti(tmp_path / "many.nii", labels.astype(np.int32) * 200), scan).dtype
        == np.uint16
    )
    moved = AFFINE.copy()
    moved[2, 3] += 2.5
    bad = {
        "away from scan.nii": save_nifti(tmp_path / "moved.nii", labels.astype(np.uint8), moved),
        "resample it": save_nifti(tmp_path / "small.nii", labels[:4].astype(np.uint8)),
        "whole numbers": save_nifti(tmp_path / "prob.nii", (labels / 3).astype(np.float32)),
    }
    for message, bad_path in bad.items():
        with pytest.raises(UserError, match=message):
            load_label_map(bad_path, scan)


def test_modules_need_no_jax():
    code = (
        "import sys, vilam3_jax.data.volumes, vilam3_jax.data.images, vilam3_jax.datasets.samples, "
        "vilam3_jax.datasets.phantoms; assert not {'jax', 'flax', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
