"""Voxel values of DICOM series: rescaling, units, display windows, padding, size limits and SUV."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dicom_slices import COLUMNS, ROWS, item, plain_slice, save, save_stack
from pydicom.uid import PositronEmissionTomographyImageStorage

from vilam3_jax.data.dicom import suv
from vilam3_jax.data.dicom.series import read_series
from vilam3_jax.data.limits import Limits
from vilam3_jax.errors import UserError

# Values and units


def test_each_slice_has_its_own_scale_sign_and_bits(tmp_path):
    save(plain_slice(0, RescaleSlope=2, RescaleIntercept=-7), tmp_path / "0")
    unsigned = np.full(ROWS * COLUMNS, 40_000, "<u2").tobytes()
    save(plain_slice(1, PixelRepresentation=0, PixelData=unsigned), tmp_path / "1")
    twelve = np.full(ROWS * COLUMNS, 0x0FFF, "<u2").tobytes()  # -1 in 12 bits
    save(plain_slice(2, BitsStored=12, HighBit=11, PixelData=twelve), tmp_path / "2")
    np.testing.assert_array_equal(read_series(tmp_path).values[1, 0], [-5, 40_000, -1])


@pytest.mark.parametrize(
    ("changes", "units", "note"),
    [
        ({}, "HU", None),
        ({"RescaleType": None}, "HU", None),
        ({"RescaleType": "US"}, "unknown", None),
        ({"RescaleType": "MGML"}, "MGML", None),
        ({"Modality": "MR", "RescaleType": None}, "unknown", None),
        ({"RescaleSlope": None, "RescaleIntercept": None}, "HU", "no rescale slope and intercept"),
        ({"RescaleType": lambda k: ["HU", "US"][k % 2]}, "unknown", "different rescale types"),
    ],
)
def test_units(tmp_path, changes, units, note):
    save_stack(tmp_path, **changes)
    volume = read_series(tmp_path)
    assert volume.units == units
    assert (note is None and volume.notes == ()) or note in volume.notes[0]


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"WindowCenter": [40, -600], "WindowWidth": [400, 1500]}, (40, 400)),
        ({"WindowCenter": lambda k: 10 * k, "WindowWidth": 100}, (30, 100)),
        ({"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"}, None),
        ({"WindowCenter": 40, "WindowWidth": 0}, None),
        (
            {"WindowCenter": b"40 HU\\-600", "WindowWidth": b"400\\1500"},
            (-600, 1500),
        ),  # not 400 at -600
        ({}, None),
    ],
)
def test_window_of_the_series(tmp_path, changes, window):
    assert read_series(save_stack(tmp_path, **changes)).window == window


def test_what_the_files_state_is_carried(tmp_path):
    save_stack(tmp_path, Modality="mr", BodyPartExamined="Abdomen")
    volume = read_series(tmp_path)
    assert (volume.modality, volume.body_part) == ("MR", "ABDOMEN")
    save_stack(tmp_path, Modality="", BodyPartExamined="see Dr. O'Neill, room 4")
    assert (read_series(tmp_path).modality, read_series(tmp_path).body_part) == ("unknown", "unknown")


def test_padding_is_marked_for_each_file(tmp_path):
    save_stack(tmp_path, PixelPaddingValue=lambda k: 100 * k if k else None)
    valid = read_series(tmp_path).valid
    assert valid[:, :, 0].all() and not valid[0, 0, 1:].any() and valid[1:, :, 1:].all()


def test_limits_are_checked_before_pixels(tmp_path, monkeypatch):
    save_stack(tmp_path)
    monkeypatch.setattr("vilam3_jax.data.dicom.series.read_dataset", None)
    for limits, message in [
        (Limits(voxels=100), "120 voxels, more than the limit of 100"),
        (Limits(file_bytes=2000), "bytes in one series, more than the limit of 2000"),
        (Limits(files=5), "more than 5 files"),
    ]:
        with pytest.raises(UserError, match=message):
            read_series(tmp_path, limits=limits)


# PET


def pet_slice(k=0, tracer=None, **changes):
    start = {
        "RadionuclideTotalDose": 370e6,
        "RadionuclideHalfLife": 6586.2,
        "RadiopharmaceuticalStartTime": "100000",
        **(tracer or {}),
    }
    own = {
        "SOPClassUID": PositronEmissionTomographyImageStorage,
        "Modality": "PT",
        "Units": "BQML",
        "DecayCorrection": "START",
        "CorrectedImage": ["NORM", "DTIM", "ATTN", "SCAT", "DECY"],
        "PatientWeight": 74,
        "SeriesDate": "20200102",
        "SeriesTime": "110000",
        "AcquisitionDate": "20200102",
        "AcquisitionTime": "110000" if k < 2 else "110500",
        "RescaleType": None,
        "RadiopharmaceuticalInformationSequence": [
            item(**{key: value for key, value in start.items() if value is not None})
        ],
        **changes,
    }
    return plain_slice(k, **own)


# 370 MBq an hour before the scan are 370e6 * 2^(-3600 / 6586.2) = 253.30e6 Bq; 74 kg: 74000 / 253.30e6.
AFTER_AN_HOUR = 2.9213e-4
AT_INJECTION = 2.0e-4


@pytest.mark.parametrize(
    ("changes", "tracer", "factor", "units", "note"),
    [
        ({}, {}, AFTER_AN_HOUR, "SUVbw", None),
        ({"DecayCorrection": "ADMIN"}, {}, AT_INJECTION, "SUVbw", None),
        (
            {},
            {"RadiopharmaceuticalStartTime": None, "RadiopharmaceuticalStartDateTime": "20200102100000"},
            AFTER_AN_HOUR,
            "SUVbw",
            None,
        ),
        ({"CorrectedImage": None}, {}, AFTER_AN_HOUR, "SUVbw", "CorrectedImage is missing"),
        ({"Units": "GML"}, {}, 1, "SUVbw", None),
        ({"Units": "GML", "SUVType": "LBM"}, {}, 1, "SUVlbm", None),
        ({"PatientWeight": None}, {}, 1, "Bq/ml", "PatientWeight missing"),
        ({"PatientWeight": 0}, {}, 1, "Bq/ml", "PatientWeight missing"),
        ({"PatientWeight": 74000}, {}, 1, "Bq/ml", "PatientWeight is not a plausible weight in kg"),
        ({}, {"RadionuclideTotalDose": None}, 1, "Bq/ml", "RadionuclideTotalDose missing"),
        ({}, {"RadionuclideTotalDose": 370}, 1, "Bq/ml", "RadionuclideTotalDose is not a plausible dose"),
        ({}, {"RadionuclideHalfLife": None}, 1, "Bq/ml", "RadionuclideHalfLife missing"),
        ({}, {"RadiopharmaceuticalStartTime": None}, 1, "Bq/ml", "RadiopharmaceuticalStartTime missing"),
        (
            {},
            {"RadiopharmaceuticalStartTime": "113000"},
            1,
            "Bq/ml",
            "stated injection is after the scan",
        ),
        ({"DecayCorrection": "NONE"}, {}, 1, "Bq/ml", "DecayCorrection is NONE"),
        ({"CorrectedImage": ["NORM", "DECY"]}, {}, 1, "Bq/ml", "does not contain ATTN"),
        ({"Units": "CNTS"}, {}, 1, "counts", "units are CNTS"),
        ({"Units": None}, {}, 1, "unknown", "units are missing"),
        ({"SeriesTime": "150000"}, {}, 1, "Bq/ml", "no scan time"),
        ({"RadiopharmaceuticalInformationSequence": None}, {}, 1, "Bq/ml", "RadionuclideTotalDose"),
    ],
)
def test_suv(tmp_path, changes, tracer, factor, units, note):
    for k in range(3):
        save(
            pet_slice(k, tracer, RescaleSlope=1 + k, WindowCenter=100, WindowWidth=200, **changes),
            tmp_path / f"{k}",
        )
    volume = read_series(tmp_path)
    stored = np.array([100 * k * (1 + k) for k in range(3)])  # slopes differ from slice to slice
    np.testing.assert_allclose(volume.values[0, 0], stored * factor, rtol=1e-4)
    np.testing.assert_allclose(volume.window, [100 * factor, 200 * factor], rtol=1e-4)
    assert volume.units == units
    assert (note is None and volume.notes == ()) or note in volume.notes[0]
    assert not any(secret in " ".join(volume.notes) for secret in ("2020", "1000", "74", "4711"))


def test_suv_of_series_whose_time_was_altered():
    """QIBA's variant: the scan start is the acquisition time minus the frame reference time."""
    half_life, duration = 6586.2, 180.0
    rate = math.log(2) / half_life
    average = math.log(rate * duration / (1 - math.exp(-rate * duration))) / rate
    assert average == pytest.approx(duration / 2, rel=0.01)  # short frame: close to its middle
    slices = [
        pet_slice(
            k,
            SeriesTime="150000",
            AcquisitionTime=f"11{3 * k:02d}00",
            ActualFrameDuration=int(duration * 1000),
            FrameReferenceTime=(180.0 * k + average) * 1000,
        )
        for k in range(3)
    ]
    found = suv.uptake([suv.facts_of(dataset) for dataset in slices])
    assert found.units == "SUVbw" and found.factor == pytest.approx(AFTER_AN_HOUR, rel=1e-4)


def test_suv_of_private_elements(tmp_path):
    philips = pet_slice(Units="CNTS")
    block = philips.private_block(0x7053, "Philips PET Private Group", create=True)
    block.add_new(0x00, "DS", "0.000587")
    volume = read_series(save(philips, tmp_path / "p.dcm"))
    assert volume.units == "SUVbw"
    np.testing.assert_allclose(volume.values[1, 0, 0], 0.000587)

    activity = pet_slice(Units="CNTS")
    block = activity.private_block(0x7053, "Philips PET Private Group", create=True)
    block.add_new(0x09, "DS", "3.5")
    volume = read_series(save(activity, tmp_path / "a.dcm"))
    np.testing.assert_allclose(volume.values[1, 0, 0], 3.5 * AFTER_AN_HOUR, rtol=1e-4)

    ge = pet_slice(SeriesTime="150000")
    block = ge.private_block(0x0009, "GEMS_PETD_01", create=True)
    block.add_new(0x0D, "DT", "20200102110000.00")
    volume = read_series(save(ge, tmp_path / "g.dcm"))
    assert volume.units == "SUVbw"
    np.testing.assert_allclose(volume.values[1, 0, 0], AFTER_AN_HOUR, rtol=1e-4)
