"""Attributes of patients that results are broken down by, from the spellings that sources use."""

from __future__ import annotations

_SEXES = {"f": "F", "female": "F", "m": "M", "male": "M"}
_BANDS = ((18, "0-17"), (40, "18-39"), (60, "40-59"), (80, "60-79"))
_OLDEST = 120  # years; what exceeds it is a misprint


def sex_of(value: object) -> str | None:
    """ "F" or "M"; None if the source does not say.

    >>> sex_of("Female"), sex_of("m"), sex_of("Unknown")
    ('F', 'M', None)
    """
    return _SEXES.get(value.strip().lower()) if isinstance(value, str) else None


def age_band(value: object) -> str | None:
    """The band of an age: "0-17", "18-39", "40-59", "60-79" or "80+"; None if it is unknown or impossible.

    Args:
      value: years as a number or a text; DICOM's "058Y", "011M", "020D" and "003W" too. 0 stands for unknown,
        as in CheXpert.

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
    if not 0 < years <= _OLDEST:
        return None
    return next((name for limit, name in _BANDS if years < limit), "80+")
