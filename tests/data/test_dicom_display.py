"""Display of grey DICOM values: windows, lookup tables and polarity, checked against the standard."""

from __future__ import annotations

import numpy as np
import pytest
from pixel_files import RAMP, curve, dataset, lut, with_text
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from vilam3_jax.data.dicom.lookup_tables import read_table
from vilam3_jax.data.dicom.pixels import read_image
from vilam3_jax.errors import UserError

# ---- display settings


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
@pytest.mark.parametrize(
    ("centre", "width"), [(128, 256), (100, 50), (128, 1), (127.5, 2), (-40, 90), (200, 4000)]
)
def test_windows(shown, centre, width, function):
    tags = {} if function is None else {"VOILUTFunction": function}
    found = shown(RAMP, WindowCenter=centre, WindowWidth=width, **tags).pixels.ravel()
    expected = [curve(centre, width, function or "LINEAR", x) for x in range(256)]
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_identity_window_changes_nothing(shown):
    np.testing.assert_array_equal(shown(RAMP, WindowCenter=128, WindowWidth=256).pixels, RAMP)


def test_windows_apply_to_rescaled_values(shown):
    pixels = np.arange(4096, dtype=np.int16).reshape(64, 64)
    found = shown(pixels, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400).pixels
    expected = [curve(40, 400, "LINEAR", x - 1024) for x in range(4096)]
    np.testing.assert_allclose(found.ravel(), expected, atol=0.51)


def test_one_of_several_settings_is_chosen_by_its_index(shown):
    tags = {
        "VOILUTSequence": [lut([0] * 128 + [65535] * 128)],
        "WindowCenter": [40, 200],
        "WindowWidth": [80, 100],
    }
    first = shown(RAMP, **tags)
    np.testing.assert_array_equal(first.pixels.ravel(), [0] * 128 + [255] * 128)
    assert (
        "display setting 0 is shown; the file has 0: VOI LUT 0, 1: window 40/80, 2: window 200/100"
        in first.notes
    )
    for voi, (centre, width) in ((1, (40, 80)), (2, (200, 100))):
        expected = [curve(centre, width, "LINEAR", x) for x in range(256)]
        np.testing.assert_allclose(shown(RAMP, voi=voi, **tags).pixels.ravel(), expected, atol=0.51)
    for voi in (3, -1):
        with pytest.raises(
            UserError, match=r"no display setting -?\d; the file has 0: VOI LUT 0, 1: window 40/80"
        ):
            shown(RAMP, voi=voi, **tags)
    with pytest.raises(UserError, match="no display setting 1; the file has none"):
        shown(RAMP, voi=1)


@pytest.mark.parametrize(
    ("tags", "note"),
    [
        ({"WindowCenter": 40, "WindowWidth": 0}, "window 40/0 skipped: its width is not positive"),
        ({"WindowCenter": 40, "WindowWidth": -3}, "its width is not positive"),
        ({"WindowCenter": 40}, "1 window centres and 0 widths"),
        ({"VOILUTSequence": [lut([1, 2], bits=0)]}, "VOI LUT 0 skipped: LUTDescriptor states 0 bits"),
    ],
)
def test_settings_that_cannot_be_applied_are_left_out_and_said(shown, tags, note):
    image = shown(RAMP, **tags)
    np.testing.assert_array_equal(image.pixels, RAMP)
    assert any(note in one for one in image.notes), image.notes


@pytest.mark.parametrize("text", [b"N/A   ", b"40,123", b"nan   ", b"\\40   "])
def test_windows_without_numbers_are_left_out_and_said(tmp_path, text):
    d = dataset(RAMP, WindowCenter="40.123", WindowWidth="77")
    image = read_image(with_text(tmp_path / "w.dcm", d, b"40.123", text))
    np.testing.assert_array_equal(image.pixels, RAMP)
    assert any("its centre or width is not a number" in note for note in image.notes)


def test_a_usable_setting_behind_a_bad_one_is_taken(shown):
    image = shown(RAMP, WindowCenter=[40, 100], WindowWidth=[0, 50])
    np.testing.assert_allclose(
        image.pixels.ravel(), [curve(100, 50, "LINEAR", x) for x in range(256)], atol=0.51
    )
    with pytest.raises(UserError, match="cannot be applied"):
        shown(RAMP, WindowCenter=[100, 40], WindowWidth=[50, 0], voi=1)


def test_a_width_below_one_is_shown_exactly(shown):
    pixels = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    tags = {"PixelData": None, "Rows": 16, "Columns": 16, "SamplesPerPixel": 1, "BitsAllocated": 32}
    image = shown(b"", FloatPixelData=pixels.tobytes(), WindowCenter=0.5, WindowWidth=0.5, **tags)
    expected = np.clip((pixels - 0.5) / 0.5 + 0.5, 0, 1) * 255
    np.testing.assert_allclose(image.pixels, expected, atol=0.51)
    assert any("LINEAR_EXACT" in note for note in image.notes)


def test_an_unknown_function_is_refused_by_name(shown):
    with pytest.raises(UserError, match="VOI LUT Function CUBIC is not supported"):
        shown(RAMP, WindowCenter=1, WindowWidth=2, VOILUTFunction="CUBIC")


def test_without_a_setting_eight_bits_are_shown_as_they_are(shown):
    pixels = RAMP // 2 + 20
    np.testing.assert_array_equal(shown(pixels).pixels, pixels)
    np.testing.assert_array_equal(shown(pixels // 16, BitsStored=4, HighBit=3).pixels, pixels // 16 * 17)


def test_without_a_setting_deep_values_are_stretched_without_their_extremes(shown):
    pixels = np.random.default_rng(0).integers(1000, 3001, (64, 64)).astype(np.uint16)
    pixels[0, 0] = 65535
    grey = shown(pixels).pixels
    assert grey.max() == grey[0, 0] == 255 and grey.min() == 0
    np.testing.assert_allclose(
        grey.ravel()[1:], np.clip((pixels.ravel()[1:] - 1000) / 2000, 0, 1) * 255, atol=4
    )


def test_values_of_any_size_are_stretched(shown):
    tags = {"PixelData": None, "Rows": 16, "Columns": 16, "SamplesPerPixel": 1, "BitsAllocated": 32}
    pixels = RAMP.astype(np.float32)
    expected = shown(b"", FloatPixelData=pixels.tobytes(), **tags).pixels
    assert np.ptp(expected) == 255
    for factor in (1e-12, 1e12):
        scaled = (pixels * np.float32(factor)).tobytes()
        np.testing.assert_allclose(shown(b"", FloatPixelData=scaled, **tags).pixels, expected, atol=1)
    assert not shown(np.full((4, 4), 500, np.uint16)).pixels.any()


def test_a_nearly_empty_image_shows_what_differs(shown):
    pixels = np.zeros((64, 64), np.uint16)
    pixels[5, 5], pixels[6, 6] = 1000, 500
    grey = shown(pixels).pixels
    assert (grey[5, 5], grey[6, 6], grey[0, 0]) == (255, 128, 0)


# ---- lookup tables


def test_voi_lut_maps_from_its_first_value_and_holds_its_ends(shown):
    table = lut([0, 16384, 32768, 65535], first=100)
    found = shown(RAMP, VOILUTSequence=[table]).pixels.ravel()
    np.testing.assert_array_equal(found[[0, 99, 100, 101, 102, 103, 200]], [0, 0, 0, 64, 128, 255, 255])


def test_voi_lut_wins_over_a_window_and_follows_the_modality_lut(shown):
    inverted = lut(list(range(255, -1, -1)), bits=8)
    threshold = lut([0] * 200 + [255] * 56, bits=8)
    tags = {
        "ModalityLUTSequence": [inverted],
        "VOILUTSequence": [threshold],
        "WindowCenter": 1,
        "WindowWidth": 2,
    }
    np.testing.assert_array_equal(shown(RAMP, **tags).pixels, np.where(255 - RAMP >= 200, 255, 0))


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
@pytest.mark.parametrize(
    "table",
    [
        lut(list(range(0, 65536, 257)), bits=16),
        lut(list(range(0, 65536, 257)), bits=16, vr="OW"),
        lut([*list(range(0, 4096, 16))[:-1], 4095], bits=12),
        lut(list(range(256)), bits=8),
        lut(list(range(256)), bits=8, vr="OW"),
    ],
)
def test_luts_of_every_width_and_representation(shown, syntax, table):
    np.testing.assert_allclose(shown(RAMP, VOILUTSequence=[table], syntax=syntax).pixels, RAMP, atol=1)


def test_lut_of_eight_bit_entries_packed_in_pairs():
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [5, 0, 8])
    item.add_new("LUTData", "OW", bytes([1, 2, 3, 4, 5, 0]))
    np.testing.assert_array_equal(read_table(item, (0, 255), dataset(RAMP), []).entries, [1, 2, 3, 4, 5])


def test_lut_of_65536_entries_says_zero(shown):
    pixels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = shown(pixels, VOILUTSequence=[lut(list(range(65536)), vr="OW")]).pixels
    np.testing.assert_allclose(found, pixels / 257, atol=0.51)


@pytest.mark.parametrize(
    ("first", "descriptor_vr"), [(-1024, "SS"), (64512, "US")]
)  # the same number, as written by explicit VR writers that do or do not handle the sign
def test_negative_first_value_of_a_lut(shown, first, descriptor_vr):
    pixels = np.arange(256, dtype=np.int16).reshape(16, 16)
    table = lut([0] * 1124 + [255], first=first, bits=8, descriptor_vr=descriptor_vr)
    found = shown(pixels, RescaleIntercept=0, RescaleSlope=1, VOILUTSequence=[table]).pixels
    np.testing.assert_array_equal(found, np.where(pixels >= 100, 255, 0))


def test_large_first_value_read_as_signed():
    item = lut([7, 8], first=-5536, descriptor_vr="SS")  # 60000 in 16 bits
    assert read_table(item, (0, 65535), dataset(RAMP), []).first == 60000


def test_understated_bits_of_a_lut_are_corrected_and_said(shown):
    image = shown(RAMP, VOILUTSequence=[lut([16 * x for x in range(256)], bits=8)])
    np.testing.assert_allclose(image.pixels, RAMP, atol=1)
    assert "a lookup table states 8 bits but has 12-bit entries; 12 bits are used" in image.notes


def test_overstated_bits_of_a_voi_lut_are_corrected_and_said(shown):
    entries = (4 * np.arange(256)).tolist()  # 10 bits, stated as 16
    image = shown(RAMP, VOILUTSequence=[lut(entries, bits=16)])
    np.testing.assert_array_equal(image.pixels, np.rint(4 * RAMP.astype(float) / 1023 * 255))
    assert image.notes == ("a VOI LUT states 16 bits but has 10-bit entries; 10 bits are used",)
    dim = shown(RAMP, VOILUTSequence=[lut([40] * 256, bits=8)])
    assert (dim.pixels == 40).all() and not dim.notes


def test_a_short_modality_lut_is_refused(shown):
    table = lut([1, 2, 3])
    table.LUTDescriptor = [4, 0, 16]
    with pytest.raises(UserError, match="LUTData has 3 entries, its descriptor states 4"):
        shown(RAMP, ModalityLUTSequence=[table])


# ---- polarity


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted", "noted"),
    [
        ("MONOCHROME2", None, False, False),
        ("MONOCHROME2", "IDENTITY", False, False),
        ("MONOCHROME1", None, True, False),
        ("MONOCHROME1", "INVERSE", True, False),  # as in most DX
        ("MONOCHROME1", "IDENTITY", True, True),
        ("MONOCHROME2", "INVERSE", True, True),
    ],
)
def test_polarity(shown, photometric, shape, inverted, noted):
    tags = {"WindowCenter": 128, "WindowWidth": 256} | ({"PresentationLUTShape": shape} if shape else {})
    image = shown(RAMP, photometric, **tags)
    np.testing.assert_array_equal(image.pixels, 255 - RAMP if inverted else RAMP)
    assert bool(image.notes) == noted


def test_inversion_comes_after_the_voi_lut(shown):
    table = lut([0] * 200 + [65535] * 56)
    found = shown(RAMP, "MONOCHROME1", VOILUTSequence=[table]).pixels
    np.testing.assert_array_equal(found, np.where(RAMP >= 200, 0, 255))
