"""Parsers of answers, by name.

The meaning of a named parser never changes, except to correct a wrong reading: protocols, and so results, name
their parsers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vilam3_jax.evals.parsers import anchored

# (text, options, **answer_spec) → JSON value, or None for what cannot be read.
Parser = Callable[..., Any]

PARSERS: dict[str, Parser] = {
    "by_options": anchored.parse_by_options,
    "yes_no": anchored.parse_yes_no,
    "option": anchored.parse_option,
    "number_range": anchored.parse_number_range,
    "subset": anchored.parse_subset,
    "list": anchored.parse_list,
    "exact": anchored.parse_exact,
}
