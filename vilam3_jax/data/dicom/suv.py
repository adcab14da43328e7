"""Standardized uptake values (SUV) of PET series, after QIBA's vendor-neutral pseudo-code.

Source: QIBA FDG-PET/CT Profile 1.13 (2016), appendix G ("happy path only" and the variant for series whose
date and time were altered). Weight and times are used here and appear in no message.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Sequence
from typing import Any

import pydicom
from pydicom.valuerep import DA, DT, TM

_GE_SCAN_TIME = (0x0009, 0x0D, "GEMS_PETD_01")
_PHILIPS_SUV_FACTOR = (0x7053, 0x00, "Philips PET Private Group")
_PHILIPS_ACTIVITY_FACTOR = (0x7053, 0x09, "Philips PET Private Group")

_SUV_TYPES = {"": "SUVbw", "BW": "SUVbw", "LBM": "SUVlbm", "BSA": "SUVbsa"}
_PLAUSIBLE_BQ = (1e5, 1e12)  # less is a dose in MBq, as nuclear medicine states it
_PLAUSIBLE_KG = (0.005, 500.0)
_LONGEST_DECAY = 10  # half-lives between injection and scan


@dataclasses.dataclass(frozen=True)
class PetFacts:
    """What one PET slice states. Times are naive; None where the header has none.

    Attributes:
      units: BQML, CNTS, GML, ..., or "".
      suv_type: BW, LBM, BSA, or "".
      decay_correction: START, ADMIN, NONE, or "".
      corrected: the corrections of CorrectedImage.
      weight: kg.
      dose: Bq.
      half_life: seconds.
      injected: when the tracer was injected; a time alone has the date of the series.
      series: SeriesDate and SeriesTime.
      acquired: AcquisitionDate and AcquisitionTime.
      ge_scan: GE's private time of the scan.
      reference_ms: FrameReferenceTime, milliseconds.
      duration_ms: ActualFrameDuration, milliseconds.
      suv_factor: Philips' private factor from values to SUVbw.
      activity_factor: Philips' private factor from values to Bq/ml.
      tracers: items of RadiopharmaceuticalInformationSequence.
    """

    units: str
    suv_type: str
    decay_correction: str
    corrected: tuple[str, ...]
    weight: float | None
    dose: float | None
    half_life: float | None
    injected: datetime.datetime | None
    series: datetime.datetime | None
    acquired: datetime.datetime | None
    ge_scan: datetime.datetime | None
    reference_ms: float | None
    duration_ms: float | None
    suv_factor: float | None
    activity_factor: float | None
    tracers: int


@dataclasses.dataclass(frozen=True)
class Uptake:
    """How rescaled values become uptake values.

    Attributes:
      factor: to multiply them with.
      units: of the product.
      note: why it is no SUV, or what was assumed; None if nothing is to be said.
    """

    factor: float
    units: str
    note: str | None = None


def facts_of(dataset: pydicom.Dataset) -> PetFacts:
    """Collects what `uptake` needs from the header of one slice."""
    tracers = list(dataset.get("RadiopharmaceuticalInformationSequence") or [])
    tracer = tracers[0] if tracers else pydicom.Dataset()
    series = _moment(dataset.get("SeriesDate"), dataset.get("SeriesTime"))
    injected = _whole(tracer.get("RadiopharmaceuticalStartDateTime"))
    if injected is None and series is not None:
        injected = _moment(dataset.get("SeriesDate"), tracer.get("RadiopharmaceuticalStartTime"))
    return PetFacts(
        units=str(dataset.get("Units") or "").strip().upper(),
        suv_type=str(dataset.get("SUVType") or "").strip().upper(),
        decay_correction=str(dataset.get("DecayCorrection") or "").strip().upper(),
        corrected=tuple(_texts(dataset.get("CorrectedImage"))),
        weight=_positive(dataset.get("PatientWeight")),
        dose=_positive(tracer.get("RadionuclideTotalDose")),
        half_life=_positive(tracer.get("RadionuclideHalfLife")),
        injected=injected,
        series=series,
        acquired=_moment(dataset.get("AcquisitionDate"), dataset.get("AcquisitionTime"))
        or _whole(dataset.get("AcquisitionDateTime")),
        ge_scan=_whole(_private(dataset, *_GE_SCAN_TIME)),
        reference_ms=_number(dataset.get("FrameReferenceTime")),
        duration_ms=_positive(dataset.get("ActualFrameDuration")),
        suv_factor=_positive(_private(dataset, *_PHILIPS_SUV_FACTOR)),
        activity_factor=_positive(_private(dataset, *_PHILIPS_ACTIVITY_FACTOR)),
        tracers=len(tracers),
    )


def uptake(slices: Sequence[PetFacts]) -> Uptake:
    """One factor for a whole series.

    Args:
      slices: the facts of each slice, at least one.

    Returns:
      The factor to SUV; where a needed value is missing or contradicts another, a factor that gives Bq/ml (or
      the stated units), and a note that names the attribute.
    """
    first = slices[0]
    if any(dataclasses.replace(f, **_PER_SLICE) != dataclasses.replace(first, **_PER_SLICE) for f in slices):
        return Uptake(1.0, "unknown", "no SUV: units, weight or dose differ between slices")
    if first.units == "GML":
        units = _SUV_TYPES.get(first.suv_type, "unknown")
        return Uptake(1.0, units)
    if first.units == "CNTS" and first.suv_factor:
        return Uptake(first.suv_factor, "SUVbw")
    if first.units == "CNTS" and first.activity_factor:
        activity = first.activity_factor
    elif first.units == "BQML":
        activity = 1.0
    else:
        known = {"CNTS": "counts"}.get(first.units, "unknown")
        return Uptake(1.0, known, f"no SUV: units are {_shown(first.units)}")
    reason, note = _obstacle(first), None
    if reason is None:
        assert first.weight is not None and first.dose is not None
        decay = _decay_seconds(slices)
        if isinstance(decay, str):
            reason = decay
        else:
            assert first.half_life is not None
            remaining = first.dose * 2 ** (-decay / first.half_life)
            if not first.corrected:
                note = "CorrectedImage is not stated; SUV assumes correction for attenuation"
            return Uptake(activity * first.weight * 1000 / remaining, "SUVbw", note)
    return Uptake(activity, "Bq/ml", f"no SUV: {reason}")


_PER_SLICE: dict[str, Any] = {
    "acquired": None,
    "ge_scan": None,
    "reference_ms": None,
    "duration_ms": None,
    "activity_factor": None,
    "suv_factor": None,
}


def _obstacle(facts: PetFacts) -> str | None:
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
        return "RadionuclideTotalDose is no plausible dose in Bq"
    if not _PLAUSIBLE_KG[0] <= facts.weight <= _PLAUSIBLE_KG[1]:
        return "PatientWeight is no plausible weight in kg"
    if facts.decay_correction not in ("START", "ADMIN"):
        return f"DecayCorrection is {_shown(facts.decay_correction)}"
    lacking = [name for name in ("ATTN", "DECY") if facts.corrected and name not in facts.corrected]
    return f"CorrectedImage does not contain {' and '.join(lacking)}" if lacking else None


def _decay_seconds(slices: Sequence[PetFacts]) -> float | str:
    """Seconds from injection to the time to which the series was decay-corrected, or why it is unknown."""
    first = slices[0]
    if first.decay_correction == "ADMIN":
        return 0.0
    assert first.injected is not None and first.half_life is not None
    scan = _scan_time(slices)
    if scan is None:
        return "no time of the scan (SeriesTime, AcquisitionTime, FrameReferenceTime)"
    decay = (scan - first.injected).total_seconds()
    if decay < 0:
        return "the injection is stated after the scan"
    if decay > _LONGEST_DECAY * first.half_life:
        return f"the injection is stated more than {_LONGEST_DECAY} half-lives before the scan"
    return decay


def _scan_time(slices: Sequence[PetFacts]) -> datetime.datetime | None:
    first = slices[0]
    acquired = [facts.acquired for facts in slices if facts.acquired is not None]
    if first.series is not None and acquired and first.series <= min(acquired):
        return first.series
    # A later series time is that of a reconstruction or an export.
    if first.ge_scan is not None:
        return first.ge_scan
    earliest = min((f for f in slices if f.acquired is not None), key=_acquired, default=None)
    if earliest is None or not earliest.duration_ms or earliest.reference_ms is None:
        return None
    assert earliest.acquired is not None and first.half_life is not None
    rate = math.log(2) / first.half_life
    during = rate * earliest.duration_ms / 1000
    average = math.log(during / -math.expm1(-during)) / rate  # when the mean count rate occurs in the frame
    return earliest.acquired + datetime.timedelta(seconds=average - earliest.reference_ms / 1000)


def _acquired(facts: PetFacts) -> datetime.datetime:
    assert facts.acquired is not None
    return facts.acquired


def _moment(date: Any, time: Any) -> datetime.datetime | None:
    day, clock = _parsed(DA, date), _parsed(TM, time)
    if day is None or clock is None:
        return None
    return datetime.datetime.combine(day, clock)


def _whole(value: Any) -> datetime.datetime | None:
    moment = _parsed(DT, value)
    return None if moment is None else moment.replace(tzinfo=None)


def _parsed(kind: Any, value: Any) -> Any:
    text = value.decode("ascii", "ignore") if isinstance(value, bytes) else str(value or "")
    try:
        return kind(text.strip().strip("\0")) if text.strip() else None
    except ValueError:
        return None


def _private(dataset: pydicom.Dataset, group: int, element: int, creator: str) -> Any:
    try:
        return dataset.private_block(group, creator)[element].value
    except KeyError:
        return None


def _number(value: Any) -> float | None:
    text = (
        value.decode("ascii", "ignore") if isinstance(value, bytes) else str("" if value is None else value)
    )
    try:
        number = float(text.strip().strip("\0"))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _positive(value: Any) -> float | None:
    number = _number(value)
    return number if number and number > 0 else None


def _texts(value: Any) -> list[str]:
    values = [] if value in (None, "") else [value] if isinstance(value, str) else list(value)
    return [str(text).strip().upper() for text in values]


def _shown(code: str) -> str:
    return code if code.isalnum() and len(code) <= 16 else "not stated" if not code else "unknown"
