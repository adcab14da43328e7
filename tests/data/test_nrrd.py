"""NRRD: spaces, axes, encodings, detached data and damage, against pynrrd and SimpleITK."""

from __future__ import annotations

import bz2
import gzip
import warnings

import nrrd
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
    "type": "short",
    "dimension": "3",
    "space": "right-anterior-superior",
    "sizes": "4 5 6",
    "space directions": "(0.8,0,0) (0,0.8,0) (0,0,2.5)",
    "space units": '"mm" "mm" "mm"',
    "endian": "little",
    "encoding": "raw",
    "space origin": "(-30.25,-41.5,107)",
}
AFFINE = np.array([[0.8, 0, 0, -30.25], [0, 0.8, 0, -41.5], [0, 0, 2.5, 107.0], [0, 0, 0, 1]])
NO_UNIT = "the file states no unit of length; millimetres are assumed"


def save(path, data=RAW, extra=(), end="\n", **fields):
    """`fields` replace those of FIELDS (`space_units` for "space units"); None omits one."""
    merged = FIELDS | {name.replace("_", " "): value for name, value in fields.items()}
    lines = ["NRRD0004", "# a comment", *(f"{k}: {v}" for k, v in merged.items() if v is not None), *extra]
    path.write_bytes((end.join(lines) + 2 * end).encode() + data)
    return path


def refused(path, match):
    with pytest.raises(UserError, match=rf"{path.name}: .*{match}") as caught:
        load_volume(path)
    assert "\n" not in str(caught.value)


def itk_voxels(path):
    sitk = pytest.importorskip("SimpleITK")
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).T


def test_a_sound_file_has_no_notes(tmp_path):
    path = save(tmp_path / "a.nrrd")
    volume = load_volume(path)
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    np.testing.assert_array_equal(volume.voxels, nrrd.read(str(path))[0])
    np.testing.assert_array_equal(volume.affine, AFFINE)
    assert volume.notes == ()
    assert load_volume(save(tmp_path / "crlf.nrrd", end="\r\n")).content_key == volume.content_key


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("LPS", (-1, -1, 1)),
        ("left-posterior-superior", (-1, -1, 1)),
        ("Left-Posterior-Superior", (-1, -1, 1)),
        ("RAS", (1, 1, 1)),
        ("LAS", (-1, 1, 1)),
        ("left-anterior-superior", (-1, 1, 1)),
    ],
)
def test_spaces(tmp_path, space, signs):
    own = np.diag([*signs, 1]) @ AFFINE
    directions = " ".join("({:g},{:g},{:g})".format(*own[:3, i]) for i in range(3))
    origin = "({:g},{:g},{:g})".format(*own[:3, 3])
    path = save(tmp_path / "a.nrrd", space=space, space_directions=directions, space_origin=origin)
    volume = load_volume(path)
    np.testing.assert_array_equal(volume.affine, AFFINE)
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.ReadImage(str(path))
    world = image.TransformIndexToPhysicalPoint((3, 1, 2))
    np.testing.assert_allclose(np.diag([-1, -1, 1]) @ world, (AFFINE @ [3, 1, 2, 1])[:3])


@pytest.mark.parametrize(
    "fields",
    [
        {"space": None},
        {"space": ""},
        {"space": None, "space_dimension": "3"},
        {"space": "scanner-xyz"},
        {"space": "3D-right-handed"},
        {"space": "right-up"},
        {"space_directions": None},
        {"space_directions": ""},
        {"space_directions": None, "spacings": "0.8 0.8 2.5"},
    ],
)
def test_no_patient_space_is_refused(tmp_path, fields):
    refused(save(tmp_path / "a.nrrd", **fields), "left and right would be a guess")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"space_directions": "(0.8,0,0) (0,0.8,0) (0,0,0)"}, "zero vectors"),
        ({"space_directions": "(0.8,0,0) (0,nan,0) (0,0,1)"}, "not finite"),
        ({"space_origin": "(1,2,inf)"}, "not finite"),
        ({"space_directions": "(1,0,0) (0,1,0) (1,1,0)"}, "singular"),
        ({"space_directions": "(0.8,0,0) (0,0.8,0)"}, "disagree"),
        ({"space_directions": "(0.8,0) (0,0.8) (1,1)"}, "disagree"),
        ({"space_directions": "0.8 0 0 0 0.8 0 0 0 1"}, "not a list of vectors"),
        ({"space_directions": "(x,0,0) (0,0.8,0) (0,0,1)"}, "not a list of numbers"),
        ({"space_origin": "(1,2)"}, "disagree"),
        ({"spacings": "0.8 0.8 5"}, "spacings and space directions contradict"),
        ({"dimension": "4"}, "dimension and sizes disagree"),
        ({"sizes": "4 5"}, "disagree"),
        ({"sizes": "4 5 6.7"}, "sizes is missing or not a list of whole numbers"),
        ({"sizes": ""}, "sizes is missing"),
        ({"sizes": "4 5 -6"}, "3-D volume is needed"),
        ({"endian": None}, "byte order"),
        ({"endian": ""}, "byte order"),
        ({"endian": "middle"}, "byte order"),
        ({"type": "block"}, "type is not supported"),
        ({"type": None}, "type is not supported"),
        ({"encoding": "zip"}, "encoding is not supported"),
        ({"space_units": '"mm" "mm" "cm"'}, "units differ"),
        ({"space_units": '"m" "m" "m"'}, "probably in millimetres"),
        ({"byte_skip": "-2"}, "byte skip is invalid"),
        ({"line_skip": "-1"}, "line skip"),
        ({"line_skip": "99999999999"}, "line skip"),
        ({"data_file": "a.nrrd"}, "named in its header is missing"),
    ],
)
def test_headers_that_make_no_sense(tmp_path, fields, match):
    refused(save(tmp_path / "a.nrrd", **fields), match)


def test_every_field_may_be_empty_or_missing(tmp_path):
    for name in FIELDS:
        for value in ("", None, "(", '"', "none", "x" * 1000, "\x00", "1 1 1"):
            path = save(tmp_path / "a.nrrd", **{name.replace(" ", "_"): value})
            try:
                load_volume(path)
            except UserError as error:
                assert "\n" not in str(error) and "xxx" not in str(error)


def test_units_and_origin_that_are_not_stated(tmp_path):
    assert load_volume(save(tmp_path / "a.nrrd", space_units=None)).notes == (NO_UNIT,)
    assert load_volume(save(tmp_path / "b.nrrd", space_units='"" "" ""')).notes == (NO_UNIT,)
    assert load_volume(save(tmp_path / "c.nrrd", space_origin=None)).notes == (
        "states no origin; 0, 0, 0 is assumed",
    )
    tiny = "(0.0008,0,0) (0,0.0008,0) (0,0,0.0025)"
    metres = save(
        tmp_path / "m.nrrd", space_units='"m" "m" "m"', space_directions=tiny, space_origin="(0,0,0)"
    )
    volume = load_volume(metres)
    np.testing.assert_allclose(volume.spacing, [0.8, 0.8, 2.5])
    assert volume.notes == ("its unit of length is the metre; converted to millimetres",)
    refused(save(tmp_path / "n.nrrd", space_directions=tiny), "probably in metres")


@pytest.mark.parametrize(
    ("unit", "factor", "name"),
    [
        ("MM", 1.0, None),
        ("millimeters", 1.0, None),
        ("um", 1e3, "micrometre"),
        ("microns", 1e3, "micrometre"),
        ("\u00b5m", 1e3, "micrometre"),  # MICRO SIGN
        ("\u03bcm", 1e3, "micrometre"),  # GREEK SMALL LETTER MU
        ("nm", 1e6, "nanometre"),
        ("cm", 0.1, "centimetre"),
    ],
)
def test_units_of_length(tmp_path, unit, factor, name):
    directions = f"({0.8 * factor},0,0) (0,{0.8 * factor},0) (0,0,{2.5 * factor})"
    path = save(
        tmp_path / "a.nrrd",
        space_units=" ".join([f'"{unit}"'] * 3),
        space_directions=directions,
        space_origin=None,
    )
    volume = load_volume(path)
    np.testing.assert_allclose(volume.spacing, [0.8, 0.8, 2.5])
    converted = () if name is None else (f"its unit of length is the {name}; converted to millimetres",)
    assert volume.notes == (*converted, "states no origin; 0, 0, 0 is assumed")
    path.write_bytes(path.read_bytes().replace(unit.encode(), b"furlongs"))
    refused(path, "unit of length in its field space units is not known; state mm")


def test_nan_stands_for_what_is_not_known(tmp_path):
    volume = load_volume(save(tmp_path / "a.nrrd", space_origin="(nan,NaN,nan)"))
    assert volume.notes == ("states no origin; 0, 0, 0 is assumed",)
    path = save(
        tmp_path / "b.nrrd",
        dimension="4",
        sizes="1 4 5 6",
        space_directions="(nan,nan,nan) (0.8,0,0) (0,0.8,0) (0,0,2.5)",
    )
    np.testing.assert_array_equal(load_volume(path).affine, AFFINE)
    refused(save(tmp_path / "c.nrrd", space_origin="(nan,0,0)"), "not finite")


@pytest.mark.parametrize(
    ("sizes", "directions", "kinds"),
    [
        ("1 4 5 6", "none (0.8,0,0) (0,0.8,0) (0,0,2.5)", "vector domain domain domain"),
        ("4 5 6 1", "(0.8,0,0) (0,0.8,0) (0,0,2.5) none", "domain domain domain list"),
        ("4 1 5 6", "( 0.8, 0, 0 ) none (0,0.8,0)  (0,0,2.5)", "domain list domain domain"),
    ],
)
def test_an_axis_outside_space_may_have_one_entry(tmp_path, sizes, directions, kinds):
    more = {"dimension": "4", "space_directions": directions, "kinds": kinds}
    volume = load_volume(save(tmp_path / "a.nrrd", sizes=sizes, **more))
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    np.testing.assert_array_equal(volume.affine, AFFINE)
    several = save(tmp_path / "b.nrrd", RAW * 3, sizes=sizes.replace("1", "3"), **more)
    refused(several, "4-D data with 3 " + ("values per voxel" if "vector" in kinds else "volumes"))


def test_time_axis(tmp_path):
    fields = {
        "space": "right-anterior-superior-time",
        "dimension": "4",
        "space_directions": "(0.8,0,0,0) (0,0.8,0,0) (0,0,2.5,0) (0,0,0,1)",
        "space_origin": "(-30.25,-41.5,107,0)",
    }
    volume = load_volume(save(tmp_path / "a.nrrd", sizes="4 5 6 1", **fields))
    np.testing.assert_array_equal(volume.affine, AFFINE)
    refused(save(tmp_path / "b.nrrd", RAW * 2, sizes="4 5 6 2", **fields), "2 volumes")


def test_one_slice(tmp_path):
    flat = VOXELS[:, :, 0]
    path = save(
        tmp_path / "a.nrrd",
        flat.tobytes(order="F"),
        dimension="2",
        sizes="4 5",
        space_directions="(0.8,0,0) (0,0.8,0)",
    )
    volume = load_volume(path)
    np.testing.assert_array_equal(volume.voxels[..., 0], flat)
    np.testing.assert_allclose(volume.affine, AFFINE @ np.diag([1, 1, 0.4, 1]))
    assert "a thickness of 1 mm is assumed" in volume.notes[0]


@pytest.mark.parametrize("name", sorted(nrrd.reader._TYPEMAP_NRRD2NUMPY.keys() - {"block"}))
@pytest.mark.parametrize("endian", ["little", "big"])
def test_types_and_byte_orders(tmp_path, name, endian):
    code = nrrd.reader._TYPEMAP_NRRD2NUMPY[name]
    values = np.random.default_rng(1).integers(0, 120, SHAPE).astype(code)
    ordered = values.astype(values.dtype.newbyteorder("<" if endian == "little" else ">"))
    path = save(tmp_path / "a.nrrd", ordered.tobytes(order="F"), type=name, endian=endian)
    np.testing.assert_array_equal(load_volume(path).voxels, values)


def _text(values):
    return "\n".join(str(value) for value in values.ravel(order="F")).encode()


ENCODED = {
    "raw": RAW,
    "gzip": gzip.compress(RAW, mtime=0),
    "gz": gzip.compress(RAW[:100], mtime=0) + gzip.compress(RAW[100:], mtime=0),
    "bzip2": bz2.compress(RAW),
    "bz2": bz2.compress(RAW),
    "text": _text(VOXELS),
    "ASCII": _text(VOXELS),
    "hex": RAW.hex().encode(),
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_encodings(tmp_path, encoding):
    data = ENCODED[encoding]
    path = save(tmp_path / "a.nrrd", data, encoding=encoding)
    np.testing.assert_array_equal(load_volume(path).voxels, VOXELS)
    if encoding not in ("hex", "gz"):  # pynrrd reads neither hex nor several gzip members
        np.testing.assert_array_equal(nrrd.read(str(path))[0], VOXELS)
    if encoding not in ("bzip2", "bz2"):  # for which ITK is not built
        np.testing.assert_array_equal(itk_voxels(path), VOXELS)
    for cut in (8, len(data) // 2, len(data)):
        refused(save(tmp_path / "cut.nrrd", data[: len(data) - cut], encoding=encoding), "")


def test_encoded_data_with_other_text_or_checksum(tmp_path):
    refused(save(tmp_path / "a.nrrd", _text(VOXELS) + b" 70000", encoding="text"), "numbers")
    refused(save(tmp_path / "a.nrrd", _text(VOXELS + 0.5), encoding="text"), "cannot represent all numbers")
    refused(save(tmp_path / "b.nrrd", _text(VOXELS)[:-4] + b"word", encoding="text"), "not a list of numbers")
    path = save(tmp_path / "e.nrrd", _text(VOXELS).replace(b" ", b", "), encoding="text")
    np.testing.assert_array_equal(load_volume(path).voxels, VOXELS)  # as teem reads it
    wrong = bytearray(gzip.compress(RAW))
    wrong[-6] ^= 1
    refused(save(tmp_path / "c.nrrd", bytes(wrong), encoding="gzip"), "CRC check failed")
    refused(save(tmp_path / "d.nrrd", b"zz" + RAW.hex().encode()[2:], encoding="hex"), "damaged")


def test_skipped_lines_and_bytes(tmp_path):
    for name, data, fields in (
        ("lines", b"one\ntwo\n" + RAW, {"line_skip": "2"}),
        ("old_name", b"one\n" + RAW, {"lineskip": "1"}),
        ("bytes", b"12345" + RAW, {"byte_skip": "5"}),
        ("both", b"one\n12345" + RAW, {"line_skip": "1", "byte_skip": "5"}),
        ("end", b"anything" + RAW, {"byte_skip": "-1"}),
        ("inside", gzip.compress(b"12345" + RAW, mtime=0), {"byte_skip": "5", "encoding": "gzip"}),
    ):
        path = save(tmp_path / f"{name}.nrrd", data, **fields)
        volume = load_volume(path)
        np.testing.assert_array_equal(volume.voxels, VOXELS)
        assert volume.notes == ()
        # pynrrd skips bytes before decompression; teem, the reference used by ITK, after it.
        np.testing.assert_array_equal(itk_voxels(path), VOXELS)
    assert "7 bytes after the voxels" in load_volume(save(tmp_path / "tail.nrrd", RAW + bytes(7))).notes[0]


def test_detached_data_is_found_by_listing_only(tmp_path):
    folder = tmp_path / "scan"
    folder.mkdir()
    (tmp_path / "secret.raw").write_bytes(RAW)
    (folder / "voxels.raw").write_bytes(RAW)
    (folder / "voxels.raw.gz").write_bytes(gzip.compress(RAW))
    for name, encoding in (("voxels.raw", "raw"), ("./voxels.raw", "raw"), ("voxels.raw.gz", "gzip")):
        path = save(folder / "a.nhdr", b"", data_file=name, encoding=encoding)
        np.testing.assert_array_equal(load_volume(path).voxels, VOXELS)
    path.write_bytes(path.read_bytes().rstrip())  # no empty line at the end
    np.testing.assert_array_equal(load_volume(path).voxels, VOXELS)
    for name in ("../secret.raw", str(tmp_path / "secret.raw"), "..\\secret.raw", "scan/../../secret.raw"):
        refused(save(folder / "a.nhdr", b"", data_file=name), "another folder")
    refused(save(folder / "a.nhdr", b"", data_file="Doe_Jane.raw"), "named in its header is missing")
    with pytest.raises(UserError) as caught:
        load_volume(folder / "a.nhdr")
    assert "Doe" not in str(caught.value)
    for name in ("LIST\nvoxels.raw\nvoxels.raw", "LIST 2", "voxels%03d.raw 1 2 1"):
        refused(save(folder / "a.nhdr", b"", data_file=name), "split over several files")
    (folder / "voxels.raw").write_bytes(RAW[:-2])
    refused(save(folder / "a.nhdr", b"", datafile="voxels.raw"), "cut short")


def test_what_key_value_pairs_state(tmp_path):
    path = save(tmp_path / "a.nrrd", extra=["DICOM_0008_0060_Modality:=CT", "PatientName:=Doe^Jane"])
    volume = load_volume(path)
    assert (volume.modality, volume.units) == ("CT", "HU") and "Doe" not in repr(volume)
    volume = load_volume(save(tmp_path / "b.nrrd", extra=["modality:=MRI", "0018|0015:=HEAD"]))
    assert (volume.modality, volume.units, volume.body_part) == ("MR", "unknown", "HEAD")
    volume = load_volume(save(tmp_path / "c.nrrd", extra=["modality:=weather"], sample_units='"SUVbw"'))
    assert (volume.modality, volume.units) == ("unknown", "SUVbw")
    # A key/value pair named like a field is not a field.
    volume = load_volume(save(tmp_path / "d.nrrd", extra=["space:=left-posterior-superior", "sizes:=1 2 3"]))
    np.testing.assert_array_equal(volume.affine, AFFINE)
    # Keys may contain colons; those of DICOM elements share a prefix.
    keys = ["DICOM:0010,0010:=Doe^Jane", "DICOM:0008,0060:=CT", "url: http://a:=b", "http://a:=b"]
    assert load_volume(save(tmp_path / "k.nrrd", extra=keys)).modality == "unknown"
    doubled = load_volume(save(tmp_path / "e.nrrd", extra=["modality:=CT", "modality:=MR"]))
    assert doubled.modality == "unknown"
    refused(save(tmp_path / "f.nrrd", extra=["type: int"]), "NRRD field type is stated twice")
    refused(save(tmp_path / "g.nrrd", extra=["Doe Jane"]), "NRRD header has no field in line 12")


def test_limits_and_promises(tmp_path):
    refused(save(tmp_path / "a.nrrd", sizes="400 500 600"), "cut short")
    refused(save(tmp_path / "b.nrrd", sizes="4000 5000 6000"), "more than the limit")
    refused(save(tmp_path / "c.nrrd", gzip.compress(RAW), sizes="400 500 600", encoding="gzip"), "cut short")
    with pytest.raises(UserError, match="bytes of voxels, more than the limit"):
        load_volume(save(tmp_path / "d.nrrd"), limits=Limits(decoded_bytes=100))
    (tmp_path / "e.nrrd").write_bytes(b"NRRD0004\n" + b"#" * (2 << 20))
    refused(tmp_path / "e.nrrd", "no final empty line")
    (tmp_path / "f.nrrd").write_bytes(b"NRRD0009\n" + save(tmp_path / "a.nrrd").read_bytes()[9:])
    refused(tmp_path / "f.nrrd", "not a known version")


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 0.999), junk=st.binary(max_size=12), cut=st.integers(0, 12))
def test_damaged_headers_give_one_line(tmp_path_factory, place, junk, cut):
    folder = tmp_path_factory.mktemp("bad")
    raw = save(folder / "a.nrrd", extra=["modality:=CT"]).read_bytes()
    at = int(place * (len(raw) - len(RAW)))
    (folder / "a.nrrd").write_bytes(raw[:at] + junk + raw[at + cut :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            volume = load_volume(folder / "a.nrrd")
        except UserError as error:
            assert "a.nrrd" in str(error) and "\n" not in str(error)
        else:
            assert volume.voxels.ndim == 3
