"""NIfTI: scaling, types, pairs, sidecars and damage, against nibabel wherever it agrees."""

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
from nifti_files import AFFINE, NO_UNIT, SHAPE, VOXELS, header_of, notes, save

from vilam3_jax.data.limits import Limits
from vilam3_jax.data.volumes import load_label_map, load_volume, read_volume
from vilam3_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::vilam3_jax.errors.InputWarning")


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
    # VOXELS are stored first axis fastest; the first axis of the file is half as long.
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
    # A missing thickness is assumed and noted.
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
    save(tmp_path / "a.hdr")  # a single-file header
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


# Sidecars


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
    # Voxels without a value become background, not the only label.
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
