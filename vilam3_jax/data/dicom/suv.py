"""Standardized uptake values (SUV) of PET series, following QIBA's vendor-neutral pseudo-code.

Source: QIBA FDG-PET/CT Profile 1.13 (2016), appendix G ("happy path only" and the variant for series with
altered date and time). Never put weights and times in a message.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Sequence
from typing import Any

import pydicom
from pydicom.valuerep import DA, DT, TM

from vilam3_jax.data.dicom.frames import finite_numbers
from vilam3_jax.data.dicom.headers import as_list

_GE_SCAN_TIME = (0x0009, 0x0D, "GEMS_PETD_01")
_PHILIPS_SUV_FACTOR = (0x7053, 0x00, "Philips PET Private Group")
_PHILIPS_ACTIVITY_FACTOR = (0x7053, 0x09, "Philips PET Private Group")

_SUV_TYPES = {"": "SUVbw", "BW": "SUVbw", "LBM": "SUVlbm", "BSA": "SUVbsa"}
_PLAUSIBLE_BQ = (1e5, 1e12)  # smaller values are doses in MBq, the unit of nuclear medicine
_PLAUSIBLE_KG = (0.005, 500.0)
_MAX_HALF_LIVES = 10  # between injection and scan


@dataclasses.dataclass(frozen=True)
class PetFacts:
    """SUV inputs of one PET slice; None for values that the header does not state. Times are naive."""

    units: str  # BQML, CNTS, GML, ..., or ""
    suv_type: str  # BW, LBM, BSA, or ""
    decay_correction: str  # START, ADMIN, NONE, or ""
    corrected: tuple[str, ...]  # values of CorrectedImage
    weight: float | None  # kg
    dose: float | None  # Bq
    half_life: float | None  # seconds
    injected: datetime.datetime | None  # injection of the tracer; a time alone is on the date of the series
    series: datetime.datetime | None  # SeriesDate and SeriesTime
    acquired: datetime.datetime | None  # AcquisitionDate and AcquisitionTime
    ge_scan: datetime.datetime | None  # private scan time (GE)
    reference_ms: float | None  # FrameReferenceTime, milliseconds
    duration_ms: float | None  # ActualFrameDuration, milliseconds
    suv_factor: float | None  # private factor from values to SUVbw (Philips)
    activity_factor: float | None  # private factor from values to Bq/ml (Philips)
    tracers: int  # items of RadiopharmaceuticalInformationSequence


# Fields that may differ between the slices of a series.
_PER_SLICE: dict[str, Any] = dict.fromkeys(
    ("acquired", "ge_scan", "reference_ms", "duration_ms", "activity_factor", "suv_factor")
)


@dataclasses.dataclass(frozen=True)
class Uptake:
    """Conversion of rescaled values to uptake values."""

    factor: float
    units: str  # after multiplication
    note: str | None = None  # why the product is not an SUV, or an assumption


def facts_of(dataset: pydicom.Dataset) -> PetFacts:
    """Extracts the inputs of `uptake` from the header of one slice."""
    tracers = list(dataset.get("RadiopharmaceuticalInformationSequence") or [])
    tracer = tracers[0] if tracers else pydicom.Dataset()
    series = _combined(dataset.get("SeriesDate"), dataset.get("SeriesTime"))
    injected = _datetime(tracer.get("RadiopharmaceuticalStartDateTime"))
    if injected is None and series is not None:
        injected = _combined(dataset.get("SeriesDate"), tracer.get("RadiopharmaceuticalStartTime"))
    return PetFacts(
        units=str(dataset.get("Units") or "").strip().upper(),
        suv_type=str(dataset.get("SUVType") or "").strip().upper(),
        decay_correction=str(dataset.get("DecayCorrection") or "").strip().upper(),
        corrected=tuple(str(text).strip().upper() for text in as_list(dataset.get("CorrectedImage"))),
        weight=_positive(dataset.get("PatientWeight")),
        dose=_positive(tracer.get("RadionuclideTotalDose")),
        half_life=_positive(tracer.get("RadionuclideHalfLife")),
        injected=injected,
        series=series,
        acquired=_combined(dataset.get("AcquisitionDate"), dataset.get("AcquisitionTime"))
        or _datetime(dataset.get("AcquisitionDateTime")),
        ge_scan=_datetime(_private(dataset, *_GE_SCAN_TIME)),
        reference_ms=_number(dataset.get("FrameReferenceTime")),
        duration_ms=_positive(dataset.get("ActualFrameDuration")),
        suv_factor=_positive(_private(dataset, *_PHILIPS_SUV_FACTOR)),
        activity_factor=_positive(_private(dataset, *_PHILIPS_ACTIVITY_FACTOR)),
        tracers=len(tracers),
    )


def uptake(slices: Sequence[PetFacts]) -> Uptake:
    """The conversion factor of a series, from the inputs of each slice, at least one.

    If a value is missing or contradictory, the factor to Bq/ml (or to the stated units), and a note that
    names the attribute.
    """
    first = slices[0]
    if any(dataclasses.replace(f, **_PER_SLICE) != dataclasses.replace(first, **_PER_SLICE) for f in slices):
        return Uptake(1.0, "unknown", "no SUV: units, weight or dose differ between slices")
    if first.units == "GML":
        return Uptake(1.0, _SUV_TYPES.get(first.suv_type, "unknown"))
    if first.units == "CNTS" and first.suv_factor:
        return Uptake(first.suv_factor, "SUVbw")
    if first.units == "CNTS" and first.activity_factor:
        activity = first.activity_factor
    elif first.units == "BQML":
        activity = 1.0
    else:
        units = "counts" if first.units == "CNTS" else "unknown"
        return Uptake(1.0, units, f"no SUV: units are {_shown(first.units)}")
    decay = _obstacle(first) or _decay_seconds(slices)
    if isinstance(decay, str):
        return Uptake(activity, "Bq/ml", f"no SUV: {decay}")
    assert first.weight is not None and first.dose is not None and first.half_life is not None
    remaining = first.dose * 2 ** (-decay / first.half_life)
    note = None if first.corrected else "CorrectedImage is missing; attenuation correction is assumed"
    return Uptake(activity * first.weight * 1000 / remaining, "SUVbw", note)


def _obstacle(facts: PetFacts) -> str | None:
    """Why SUV cannot be computed, apart from the scan time."""
    if facts.tracers > 1:
        return "several radiopharmaceuticals are stated"
    needed = {
        "PatientWeight": facts.weight,
        "RadionuclideTotalDose": facts.dose,
        "RadionuclideHalfLife": facts.half_life,
        "DecayCorrection": facts.decay_correction,
    }
    if facts.decay_correction != "ADMIN":
        needed["RadiopharmaceuticalStartDateTime and RadiopharmaceuticalStartTime"] = facts.injected
    missing = [keyword for keyword, value in needed.items() if not value]
    if missing:
        return f"{', '.join(missing)} missing, empty or zero"
    assert facts.dose is not None and facts.weight is not None
    if not _PLAUSIBLE_BQ[0] <= facts.dose <= _PLAUSIBLE_BQ[1]:
        return "RadionuclideTotalDose is not a plausible dose in Bq"
    if not _PLAUSIBLE_KG[0] <= facts.weight <= _PLAUSIBLE_KG[1]:
        return "PatientWeight is not a plausible weight in kg"
    if facts.decay_correction not in ("START", "ADMIN"):
        return f"DecayCorrection is {_shown(facts.decay_correction)}"
    lacking = [name for name in ("ATTN", "DECY") if facts.corrected and name not in facts.corrected]
    return f"CorrectedImage does not contain {' and '.join(lacking)}" if lacking else None


def _decay_seconds(slices: Sequence[PetFacts]) -> float | str:
    """Seconds from injection to the reference time of decay correction, or why they are unknown."""
    first = slices[0]
    if first.decay_correction == "ADMIN":
        return 0.0
    assert first.injected is not None and first.half_life is not None
    scan = _scan_time(slices)
    if scan is None:
        return "no scan time (SeriesTime, AcquisitionTime, FrameReferenceTime)"
    decay = (scan - first.injected).total_seconds()
    if decay < 0:
        return "the stated injection is after the scan"
    if decay > _MAX_HALF_LIVES * first.half_life:
        return f"the stated injection is more than {_MAX_HALF_LIVES} half-lives before the scan"
    return decay


def _scan_time(slices: Sequence[PetFacts]) -> datetime.datetime | None:
    first = slices[0]
    acquired = [(facts.acquired, facts) for facts in slices if facts.acquired is not None]
    start, earliest = min(acquired, key=lambda pair: pair[0], default=(None, first))
    if first.series is not None and start is not None and first.series <= start:
        return first.series
    # A later series time belongs to a reconstruction or an export.
    if first.ge_scan is not None:
        return first.ge_scan
    if start is None or not earliest.duration_ms or earliest.reference_ms is None:
        return None
    assert first.half_life is not None
    rate = math.log(2) / first.half_life
    decay = rate * earliest.duration_ms / 1000
    average = math.log(decay / -math.expm1(-decay)) / rate  # time of the mean count rate within the frame
    return start + datetime.timedelta(seconds=average - earliest.reference_ms / 1000)


def _combined(date: Any, time: Any) -> datetime.datetime | None:
    day, clock = _parsed(DA, date), _parsed(TM, time)
    return None if day is None or clock is None else datetime.datetime.combine(day, clock)


def _datetime(value: Any) -> datetime.datetime | None:
    moment = _parsed(DT, value)
    return None if moment is None else moment.replace(tzinfo=None)


def _parsed(kind: Any, value: Any) -> Any:
    text = _text(value)
    try:
        return kind(text) if text else None
    except ValueError:
        return None


def _text(value: Any) -> str:
    text = value.decode("ascii", "ignore") if isinstance(value, bytes) else str(value or "")
    return text.strip().strip("\0")


def _private(dataset: pydicom.Dataset, group: int, element: int, creator: str) -> Any:
    try:
        return dataset.private_block(group, creator)[element].value
    except KeyError:
        return None


def _number(value: Any) -> float | None:
    numbers = finite_numbers(_text(value) if isinstance(value, (bytes, str)) else value)
    return numbers[0] if len(numbers) == 1 else None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number and number > 0 else None


def _shown(code: str) -> str:
    if not code:
        return "missing"
    return code if code.isalnum() and len(code) <= 16 else "unknown"
