"""Parsers of answers, by name.

The meaning of a named parser never changes, except to correct a wrong reading: protocols, and so results,
name their parsers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vilam3_jax.evals.parsers import anchored, boxes, labels, numbers, published

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
    "number": numbers.parse_number,
    "labels": labels.parse_labels,
    "choice": labels.parse_choice,
    "choices": labels.parse_choices,
    "boxes": boxes.parse_boxes,
    "vila_m3_strip_lower": published.vila_m3_strip_lower,
    "vila_m3_lower": published.vila_m3_lower,
    "vila_m3_yes_no_cxr14": published.vila_m3_yes_no_cxr14,
    "vila_m3_yes_no_chexpert": published.vila_m3_yes_no_chexpert,
    "vila_m3_mimic": published.vila_m3_mimic,
    "llava_med": published.llava_med,
    "medgemma_tokens": published.medgemma_tokens,
    "medevalkit": published.medevalkit,
    "flare_class": published.flare_class,
    "flare_labels": published.flare_labels,
    "flare_number": published.flare_number,
}
