"""One number with its unit, read only if it is the only one and its unit can be converted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

_MAX_TEXT = 2_000  # characters; a longer answer is not one number

# Dimension → unit → factor to the first unit.
_UNITS: dict[str, dict[str, Fraction]] = {
    name: {
        spelling: Fraction(factor) for spellings, factor in units.items() for spelling in spellings.split("|")
    }
    for name, units in {
        "volume": {
            "ml|cc|cm3|cm^3|cm³|milliliter|millilitre|milliliters|millilitres": "1",
            "cubic centimeters|cubic centimetres": "1",
            "l|liter|litre|liters|litres": "1000",
            "dl|deciliter|decilitre|deciliters|decilitres": "100",
            "ul|µl|μl|microliter|microlitre|microliters|microlitres|mm3|mm^3|mm³": "1/1000",
        },
        "length": {
            "mm|millimeter|millimetre|millimeters|millimetres": "1",
            "cm|centimeter|centimetre|centimeters|centimetres": "10",
            "m|meter|metre|meters|metres": "1000",
            "um|µm|μm|micrometer|micrometre|micrometers|micrometres|micron|microns": "1/1000",
        },
        "area": {"mm2|mm^2|mm²": "1", "cm2|cm^2|cm²": "100"},
        "mass": {
            "mg|milligram|milligrams": "1",
            "g|gram|grams": "1000",
            "kg|kilogram|kilograms": "1000000",
            "ug|µg|μg|mcg|microgram|micrograms": "1/1000",
        },
        "mass concentration": {
            "mg/dl": "1",
            "g/dl": "1000",
            "g/l": "100",
            "mg/l": "1/10",
            "ug/ml|µg/ml|μg/ml": "1/10",
        },
        "amount concentration": {"umol/l|µmol/l|μmol/l": "1", "mmol/l": "1000"},
        "share": {"%|percent|per cent": "1"},
        "days": {"d|day|days": "1", "week|weeks|wk|wks": "7"},
        "years": {"year|years|yr|yrs|year old|years old": "1", "month|months": "1/12"},
        "seconds": {"s|sec|second|seconds": "1", "ms": "1/1000", "min|minute|minutes": "60"},
        "angle": {"°|deg|degree|degrees": "1"},
        "rate": {"bpm|beats per minute": "1"},
        "pressure": {"mmhg|mm hg": "1"},
        "attenuation": {"hu|hounsfield units": "1"},
        "pixels": {"px|pixel|pixels": "1"},
    }.items()
}
_FACTORS = {unit: (name, factor) for name, units in _UNITS.items() for unit, factor in units.items()}
UNITS = frozenset(_FACTORS)

_GROUPED = r"[1-9][0-9]{0,2}(?:,[0-9]{3}){1,4}(?:\.[0-9]{1,20})?"
_PLAIN = r"(?:[0-9]{1,20}(?:[.,][0-9]{1,20})?|\.[0-9]{1,20})(?:e[+-]?[0-9]{1,2})?"
_UNIT = "|".join(re.escape(unit) for unit in sorted(UNITS, key=len, reverse=True))
# A digit after a letter belongs to a word, as in "T2"; a sign counts only where no word or number ends.
_QUANTITY = re.compile(
    rf"(?<![\w.,])(?P<sign>(?<![\w)])[-+])?(?P<number>{_GROUPED}|{_PLAIN})(?![0-9]|[.,][0-9])"
    rf"(?:\s*-?\s*(?P<unit>{_UNIT})(?![\w^³²/]))?(?P<rest>\s*[^\W\d_]*)"
)
_BOUND = re.compile(
    r"\b(?:not|no|(?:less|more|greater|fewer) than|under|below|over|above|at (?:least|most)|up to)\s*$"
    r"|(?:[<>]=?|[≤≥±×*/^])\s*$"
)
_GOES_ON = re.compile(r"\s*(?:[/×*^±]|(?:-|to|or|and|x|by|of|out of)\s*[0-9])")
_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)


def parse_number(
    text: str,
    options: Sequence[str] = (),
    *,
    unit: str = "",
    minimum: float | None = None,
    maximum: float | None = None,
    integer: bool = False,
    **spec: Any,
) -> float | int | None:
    """The only number of an answer, in `unit`.

    A comma before groups of three digits separates thousands, another one is decimal. A number without unit
    has `unit`; one with another unit is converted. Read twice in two units, the values must agree. Numbers
    may have 20 digits on each side of the point, and a decimal exponent of two digits.

    None for: no number or several; a bound such as '< 5' or 'not 5'; a range; a unit of another dimension, or
    any unit of measurement if `unit` is ''; a word instead of `unit`; a value outside [minimum, maximum];
    a fraction if `integer`.

    Args:
      text: the answer.
      options: not used.
      unit: unit of the result, one of `UNITS`, or '' for a count or a ratio.
      minimum, maximum: bounds of what is possible, in `unit`; None for no bound.
      integer: whether to return an int; then a number word up to twelve may be the whole answer.
      spec: not used.

    Raises:
      ValueError: `unit` is unknown.
    """
    if unit and unit.lower() not in _FACTORS:
        raise ValueError(f"unit {unit!r} unknown")
    if len(text) > _MAX_TEXT:
        return None
    text = " ".join(text.lower().replace("−", "-").replace("–", "-").replace("—", "-").split())
    values = _word(text) if integer else set()
    for found in () if values else _QUANTITY.finditer(text):
        value = _value(found, text, unit.lower())
        if value is None:
            return None
        values.add(value)
    if len(values) != 1:
        return None
    value = values.pop()
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        return None
    if integer:
        return int(value) if value.denominator == 1 else None
    return float(value)


def _word(text: str) -> set[Fraction]:
    word = text.strip(" .!")
    return {Fraction(_WORDS.index(word))} if word in _WORDS else set()


def _value(found: re.Match[str], text: str, unit: str) -> Fraction | None:
    """The value of a quantity in `unit`; None if it is a bound, a part of a range, or in no such unit."""
    stated, word = found["unit"], found["rest"].strip()
    following = text[found.end("unit" if stated else "number") :]
    glued = not stated and following[:1].isalpha()
    if glued or _BOUND.search(text[: found.start()]) or _GOES_ON.match(following):
        return None
    number = found["number"]
    grouped = re.fullmatch(_GROUPED, number) is not None
    value = Fraction(number.replace(",", "" if grouped else "."))
    value = -value if found["sign"] == "-" else value
    if not stated:
        return value if not unit or not word else None
    if not unit:
        return None
    (dimension, factor), (wanted, divisor) = _FACTORS[stated], _FACTORS[unit]
    return value * factor / divisor if dimension == wanted else None
