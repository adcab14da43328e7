"""MetaImage: header, data files and damage; sound files as SimpleITK reads and writes them."""

from __future__ import annotations

import gzip
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax.data.limits import Limits
from vilam3_jax.data.volumes import load_volume
from vilam3_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::vilam3_jax.errors.InputWarning")

SHAPE = (4, 5, 6)
VOXELS = np.random.default_rng(0).integers(-1000, 1500, SHAPE).astype(np.int16)
RAW = VOXELS.tobytes(order="F")
FIELDS = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False",
    "TransformMatrix": "-1 0 0 0 -1 0 0 0 1",
    "Offset": "30.25 41.5 107",
    "CenterOfRotation": "0 0 0",
    "AnatomicalOrientation": "LPI",
    "ElementSpacing": "0.8 0.8 2.5",
    "DistanceUnits": "mm",
    "DimSize": "4 5 6",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}
AFFINE = np.array([[0.8, 0, 0, -30.25], [0, 0.8, 0, -41.5], [0, 0, 2.5, 107.0], [0, 0, 0, 1]])
NO_UNIT = "the file states no unit of length; millimetres are assumed"


def save(path, data=RAW, end="\n", **fields):
    """`fields` replace those of FIELDS; None omits one. `ElementDataFile` stays last."""
    merged = FIELDS | fields
    merged["ElementDataFile"] = merged.pop("ElementDataFile")
    lines = [f"{name} = {value}{end}" for name, value in merged.items() if value is not None]
    path.write_bytes("".join(lines).encode() + data)
    return path


def refused(path, match):
    with pytest.raises(UserError, match=rf"{path.name}: .*{match}") as caught:
        load_volume(path)
    assert "\n" not in str(caught.value)


def itk_image(path):
    return pytest.importorskip("SimpleITK").ReadImage(str(path))


def itk_voxels(path):
    return pytest.importorskip("SimpleITK").GetArrayFromImage(itk_image(path)).T


def test_a_sound_file_has_no_notes(tmp_path):
    path = save(tmp_path / "a.mha")
    volume = load_volume(path)
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.notes == () and volume.modality == "unknown"
    np.testing.assert_array_equal(itk_voxels(path), VOXELS)
    assert load_volume(save(tmp_path / "crlf.mha", end="\r\n")).content_key == volume.content_key


@pytest.mark.parametrize("suffix", ["mha", "mhd"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_what_simpleitk_writes(tmp_path, suffix, packed, dtype):
    sitk = pytest.importorskip("SimpleITK")
    values = np.random.default_rng(1).integers(0, 120, SHAPE).astype(dtype)
    image = sitk.GetImageFromArray(values.T)
    image.SetSpacing([0.8, 0.8, 2.5])
    image.SetOrigin([30.25, 41.5, 107])
    image.SetDirection([-1, 0, 0, 0, -1, 0, 0, 0, 1])
    sitk.WriteImage(image, str(tmp_path / f"a.{suffix}"), packed)
    volume = load_volume(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(volume.voxels, values)
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert volume.notes == (NO_UNIT,)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("MET_CHAR", "i1"),
        ("MET_UCHAR", "u1"),
        ("MET_USHORT", "u2"),
        ("MET_INT", "i4"),
        ("MET_UINT", "u4"),
        ("MET_LONG", "i4"),
        ("MET_ULONG", "u4"),
        ("MET_LONG_LONG", "i8"),
        ("MET_ULONG_LONG", "u8"),
        ("MET_FLOAT", "f4"),
        ("MET_DOUBLE", "f8"),
    ],
)
@pytest.mark.parametrize("order", ["ElementByteOrderMSB", "BinaryDataByteOrderMSB"])
def test_types_and_byte_orders(tmp_path, name, code, order):
    values = np.random.default_rng(2).integers(0, 120, SHAPE).astype(f">{code}")
    fields = {"BinaryDataByteOrderMSB": None, order: "True", "ElementType": name}
    path = save(tmp_path / "a.mha", values.tobytes(order="F"), **fields)
    np.testing.assert_array_equal(load_volume(path).voxels, values)
    np.testing.assert_array_equal(itk_voxels(path), values)


def test_directions_are_those_of_itk(tmp_path):
    """The matrix has one row per image axis and three possible names."""
    for matrix, origin in (
        ("TransformMatrix", "Offset"),
        ("Orientation", "Position"),
        ("Rotation", "Origin"),
    ):
        fields = {"TransformMatrix": None, "Offset": None, "AnatomicalOrientation": None}
        fields |= {matrix: "0 0 1 -1 0 0 0 -0.6 0.8", origin: "1 2 3"}
        path = save(tmp_path / "a.mha", **fields)
        volume = load_volume(path)
        image = itk_image(path)
        for index in ((0, 0, 0), (3, 1, 2)):
            world = np.diag([-1, -1, 1]) @ image.TransformIndexToPhysicalPoint(index)
            (found,) = np.argwhere(volume.voxels == VOXELS[index])
            np.testing.assert_allclose((volume.affine @ [*found, 1])[:3], world)
        assert any("degrees off right angles" in note for note in volume.notes)


@pytest.mark.parametrize("letters", ["RAI", "???", "LPI", "RAS", None])
def test_an_orientation_in_letters_alone_is_refused(tmp_path, letters):
    """By MetaIO the letters name where an axis runs to; ITK writes where it comes from."""
    path = save(tmp_path / "a.mha", TransformMatrix=None, AnatomicalOrientation=letters)
    refused(path, "MetaImage without TransformMatrix, so left and right would be a guess")


@pytest.mark.parametrize(
    ("letters", "sound"),
    [("LPI", True), ("RAS", True), ("???", True), ("", True), ("RAI", False), ("ARI", False), ("LPS", False)],
)
def test_letters_beside_a_matrix(tmp_path, letters, sound):
    path = save(tmp_path / "a.mha", AnatomicalOrientation=letters)
    if sound:  # valid in either meaning of the letters
        np.testing.assert_array_equal(load_volume(path).affine, AFFINE)
    else:
        refused(path, "AnatomicalOrientation .* contradicts TransformMatrix")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"ElementSpacing": None}, "MetaImage without ElementSpacing, so its size would be a guess"),
        ({"ElementSpacing": "0.8 0.8"}, "ElementSpacing"),
        ({"ElementSpacing": "0.8 0.8 0"}, "ElementSpacing"),
        ({"ElementSpacing": "0.8 0.8 -1"}, "ElementSpacing"),
        ({"ElementSpacing": "0.8 0.8 nan"}, "ElementSpacing"),
        ({"ElementSpacing": "a b c"}, "ElementSpacing"),
        ({"TransformMatrix": "1 0 0 0 1 0"}, "TransformMatrix"),
        ({"TransformMatrix": "0 0 0 0 0 0 0 0 0"}, "TransformMatrix"),
        ({"TransformMatrix": "1 0 0 1 0 0 0 0 1", "AnatomicalOrientation": None}, "singular"),
        ({"Offset": "1 2"}, "Offset"),
        ({"Orientation": "1 0 0 0 1 0 0 0 1"}, "two values of TransformMatrix or Rotation or Orientation"),
        ({"NDims": "4"}, "NDims or DimSize"),
        ({"DimSize": "4 5 -6"}, "3-D volume is needed"),
        ({"DimSize": "4 5 x"}, "DimSize is missing or invalid"),
        ({"ElementType": "MET_STRING"}, "ElementType"),
        ({"ElementType": None}, "ElementType"),
        ({"ElementNumberOfChannels": "3"}, "3 values per voxel"),
        ({"ElementNumberOfChannels": "x"}, "ElementNumberOfChannels"),
        ({"BinaryData": "False"}, "voxels as text"),
        ({"ObjectType": "Tube"}, "not an image"),
        ({"NDims": "2", "DimSize": "4 30"}, "2-D MetaImage"),
        ({"HeaderSize": "-2"}, "HeaderSize"),
        ({"HeaderSize": "-1", "CompressedData": "True"}, "HeaderSize"),
        ({"ElementToIntensityFunctionSlope": "0"}, "ElementToIntensityFunctionSlope"),
        ({"ElementToIntensityFunctionOffset": "inf"}, "ElementToIntensityFunctionSlope"),
        ({"DistanceUnits": "m"}, "probably in millimetres"),
        ({"ElementSpacing": "0.0008 0.0008 0.0025"}, "probably in metres"),
        ({"ElementDataFile": None}, "has no ElementDataFile"),
    ],
)
def test_headers_that_make_no_sense(tmp_path, fields, match):
    refused(save(tmp_path / "a.mha", b"" if "ElementDataFile" in fields else RAW, **fields), match)


def test_four_dimensions(tmp_path):
    fields = {
        "NDims": "4",
        "TransformMatrix": "-1 0 0 0 0 -1 0 0 0 0 1 0 0 0 0 1",
        "Offset": "30.25 41.5 107 0",
        "CenterOfRotation": "0 0 0 0",
        "ElementSpacing": "0.8 0.8 2.5 1",
    }
    volume = load_volume(save(tmp_path / "a.mha", DimSize="4 5 6 1", **fields))
    np.testing.assert_array_equal(volume.affine, AFFINE)
    refused(save(tmp_path / "b.mha", RAW * 2, DimSize="4 5 6 2", **fields), "4-D data with 2 volumes")


def test_what_is_assumed_is_said(tmp_path):
    volume = load_volume(save(tmp_path / "a.mha", ElementSpacing=None, ElementSize="0.8 0.8 2.5"))
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert "ElementSize is used" in volume.notes[0]
    volume = load_volume(save(tmp_path / "b.mha", Offset=None))
    assert volume.notes == ("states no Offset; 0, 0, 0 is assumed",)
    assert load_volume(save(tmp_path / "c.mha", DistanceUnits=None)).notes == (NO_UNIT,)
    tenth = {"ElementSpacing": "0.08 0.08 0.25", "Offset": "3.025 4.15 10.7"}
    volume = load_volume(save(tmp_path / "d.mha", DistanceUnits="cm", **tenth))
    np.testing.assert_allclose(volume.affine, AFFINE)
    assert volume.notes == ("its unit of length is the centimetre; converted to millimetres",)
    assert load_volume(save(tmp_path / "e.mha", DistanceUnits="?")).notes == (NO_UNIT,)
    refused(
        save(tmp_path / "f.mha", DistanceUnits="inch"),
        "unit of length in its field DistanceUnits is not known",
    )


def test_intensity_function(tmp_path):
    scale = {"ElementToIntensityFunctionSlope": "2", "ElementToIntensityFunctionOffset": "-1024"}
    volume = load_volume(save(tmp_path / "a.mha", **scale))
    np.testing.assert_array_equal(volume.voxels, VOXELS * 2 - 1024)
    assert volume.notes == ("scaled by its intensity function, 2 * x + -1024, which ITK ignores",)


@pytest.mark.parametrize(
    ("fields", "modality", "units"),
    [
        ({"Modality": "MET_MOD_CT"}, "CT", "HU"),
        ({"Modality": "MET_MOD_MR"}, "MR", "unknown"),
        ({"Modality": "MET_MOD_PET"}, "PT", "unknown"),
        ({"Modality": "MET_MOD_US"}, "US", "unknown"),
        ({"Modality": "MET_MOD_UNKNOWN"}, "unknown", "unknown"),
        ({"Modality": "MET_MOD_OTHER"}, "unknown", "unknown"),
        ({"0008|0060": "CT", "0010|0010": "Doe^Jane"}, "CT", "HU"),
    ],
)
def test_modality(tmp_path, fields, modality, units):
    volume = load_volume(save(tmp_path / "a.mha", **fields))
    assert (volume.modality, volume.units) == (modality, units) and "Doe" not in repr(volume)


def test_where_the_voxels_lie(tmp_path):
    for name, data, size in (("end", b"anything" + RAW, "-1"), ("sized", b"x" * 900 + RAW, "1000")):
        fields = {"HeaderSize": size, "Comment": ""}
        path = save(tmp_path / f"{name}.mha", data, **fields)
        if name == "sized":  # counts from the start of the file
            header = len(path.read_bytes()) - len(data)
            path = save(tmp_path / f"{name}.mha", b"x" * (1000 - header) + RAW, **fields)
        np.testing.assert_array_equal(load_volume(path).voxels, VOXELS)
        np.testing.assert_array_equal(itk_voxels(path), VOXELS)
    assert "7 bytes after" in load_volume(save(tmp_path / "tail.mha", RAW + bytes(7))).notes[0]


def test_data_files_are_found_by_listing_only(tmp_path):
    folder = tmp_path / "scan"
    folder.mkdir()
    (tmp_path / "secret.raw").write_bytes(RAW)
    (folder / "voxels.raw").write_bytes(RAW)
    path = save(folder / "a.mhd", b"", ElementDataFile="voxels.raw")
    np.testing.assert_array_equal(load_volume(path).voxels, VOXELS)
    (folder / "padded.raw").write_bytes(b"12345" + RAW)
    path = save(folder / "a.mhd", b"", ElementDataFile="padded.raw", HeaderSize="5")
    np.testing.assert_array_equal(load_volume(path).voxels, VOXELS)
    for name in ("../secret.raw", str(tmp_path / "secret.raw"), "..\\secret.raw", "gs://bucket/secret.raw"):
        refused(save(folder / "a.mhd", b"", ElementDataFile=name), "another folder")
    for name in ("LIST", "LIST 2D\nvoxels.raw", "voxels%03d.raw 1 2 1"):
        refused(save(folder / "a.mhd", b"", ElementDataFile=name), "split over several files")
    for name in ("Doe_Jane.raw", "a.mhd"):
        refused(save(folder / "a.mhd", b"", ElementDataFile=name), "named in its header is missing")
    with pytest.raises(UserError) as caught:
        load_volume(save(folder / "a.mhd", b"", ElementDataFile="Doe_Jane.raw"))
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize("pack", [zlib.compress, gzip.compress])
def test_damaged_compressed_data_is_noticed(tmp_path, pack):
    data = pack(RAW)
    path = save(tmp_path / "a.mha", data, CompressedData="True", CompressedDataSize=len(data))
    np.testing.assert_array_equal(load_volume(path).voxels, VOXELS)
    np.testing.assert_array_equal(itk_voxels(path), VOXELS)
    for cut in (1, len(data) // 2, len(data) - 1):
        refused(save(tmp_path / "cut.mha", data[:-cut], CompressedData="True"), "cut short")
    for place in (len(data) // 3, len(data) // 2, len(data) - 3):  # ITK returns wrong voxels without an error
        wrong = bytearray(data)
        wrong[place] ^= 0x55
        refused(save(tmp_path / "wrong.mha", bytes(wrong), CompressedData="True"), "damaged")
    refused(
        save(tmp_path / "short.mha", pack(RAW[:-2]), CompressedData="True"),
        "cut short after 238 of 240 data bytes",
    )
    long = save(tmp_path / "long.mha", pack(RAW + bytes(9)), CompressedData="True")
    assert "after the voxels are ignored" in load_volume(long).notes[0]


def test_limits_and_promises(tmp_path):
    refused(save(tmp_path / "a.mha", DimSize="400 500 600"), "cut short")
    refused(save(tmp_path / "b.mha", DimSize="4000 5000 6000"), "more than the limit")
    refused(
        save(tmp_path / "c.mha", zlib.compress(RAW), DimSize="400 500 600", CompressedData="True"),
        "cut short",
    )
    with pytest.raises(UserError, match="bytes of voxels, more than the limit"):
        load_volume(save(tmp_path / "d.mha"), limits=Limits(decoded_bytes=100))
    for name in FIELDS:
        for value in ("", None, "x" * 1000, "\x00", "1 1 1", "999999999999999999999"):
            path = save(tmp_path / "e.mha", **{name: value})
            try:
                load_volume(path)
            except UserError as error:
                assert "\n" not in str(error) and "xxx" not in str(error)


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 0.999), junk=st.binary(max_size=12), cut=st.integers(0, 12))
def test_damaged_headers_give_one_line(tmp_path_factory, place, junk, cut):
    folder = tmp_path_factory.mktemp("bad")
    data = zlib.compress(RAW)
    raw = save(folder / "a.mha", data, CompressedData="True").read_bytes()
    at = int(place * len(raw))
    (folder / "a.mha").write_bytes(raw[:at] + junk + raw[at + cut :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            volume = load_volume(folder / "a.mha")
        except UserError as error:
            assert "a.mha" in str(error) and "\n" not in str(error)
        else:
            assert volume.voxels.ndim == 3
