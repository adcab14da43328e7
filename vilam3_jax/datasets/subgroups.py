"""Patient attributes for subgroup analysis, normalized from the spellings of sources."""

from __future__ import annotations

_SEXES = {"f": "F", "female": "F", "m": "M", "male": "M"}
_BANDS = ((18, "0-17"), (40, "18-39"), (60, "40-59"), (80, "60-79"))
_MAX_AGE = 120  # years; larger values are errors


def sex_of(value: object) -> str | None:
    """Returns "F" or "M"; None if unknown.

    >>> sex_of("Female"), sex_of("m"), sex_of("Unknown")
    ('F', 'M', None)
    """
    return _SEXES.get(value.strip().lower()) if isinstance(value, str) else None


def age_band(value: object) -> str | None:
    """Returns an age band: "0-17", "18-39", "40-59", "60-79" or "80+"; None if unknown or impossible.

    Args:
      value: years as number or text, or in DICOM's format ("058Y", "011M"). 0 means unknown, as in CheXpert.

    >>> age_band("68"), age_band("058Y"), age_band("011M"), age_band("414"), age_band("")
    ('60-79', '40-59', '0-17', None, None)
    """
    text = str(value).strip().upper()
    if text[-1:] in ("M", "W", "D") and text[:-1].isdecimal():
        return _BANDS[0][1]
    try:
        years = float(text.removesuffix("Y"))
    except ValueError:
        return None
    if not 0 < years <= _MAX_AGE:
        return None
    return next((name for limit, name in _BANDS if years < limit), "80+")
