"""Sets of labels, and one choice of several."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from vilam3_jax.evals.parsers import anchored
from vilam3_jax.evals.parsers.anchored import normalise

_MAX_TEXT = 10_000
_MAX_LABELS = 200
_NOTHING = frozenset(("none", "no finding", "no findings", "n/a", "na", "null", "none of the above"))


def parse_labels(text: str, options: Sequence[str] = (), **spec: Any) -> list[str] | None:
    """A set of labels, sorted; [] for 'none', 'no findings' and the like.

    Parts are separated by ';', line breaks or '|', or else by ','; a JSON list of texts is read too. With
    options, every label must be one of them, spelt as there; else labels are normalised.

    None for: an empty answer; a word for nothing beside labels; a label that is no option.
    """
    if len(text) > _MAX_TEXT:
        return None
    named = {normalise(option): option for option in options}
    parts = {normalise(part) for part in _parts(text)} - {""}
    nothing = {part for part in parts if part in _NOTHING and part not in named}
    if not parts or (nothing and len(nothing) < len(parts)) or len(parts) > _MAX_LABELS:
        return [] if text.strip() == "[]" else None
    if nothing:
        return []
    if not named:
        return sorted(parts)
    return sorted(named[part] for part in parts) if parts <= named.keys() else None


def _parts(text: str) -> list[str]:
    stripped = text.strip()
    if stripped.startswith("["):
        try:
            listed = json.loads(stripped)
        except (ValueError, RecursionError):
            return []
        return listed if all(isinstance(one, str) for one in listed) else []
    parts = re.split(r"[;\n|]", text)
    return parts if len(parts) > 1 else text.split(",")


def render_labels(labels: Sequence[str]) -> str:
    """The text of a set of labels, which `parse_labels` reads."""
    return "; ".join(labels) if labels else "none"


def parse_choice(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """One option, by its text or by its letter (A for the first); returned as in `options`.

    'B', '(B)', 'B. liver' and 'the answer is B' are letters; if the text of another option follows the
    letter, the answer contradicts itself and is not read. An option that is itself a letter stands for
    itself.
    """
    letters = dict(zip("abcdefghijklmnopqrstuvwxyz", options, strict=False))
    if any(normalise(option) in letters for option in options):
        return anchored.parse_option(text, options)
    if found := anchored.parse_option(text, options):
        return found
    if (lettered := anchored.read_letter(normalise(text), letters)) is None:
        return None
    named, rest = lettered
    if normalise(rest) in _NOTHING and normalise(named) not in _NOTHING:
        return None
    return named if anchored.parse_option(rest, options) in (None, named) else None


def parse_choices(text: str, options: Sequence[str] = (), **spec: Any) -> list[str] | None:
    """Several options, by letters or texts, in the order of `options`: '(A),(C)' or 'B; D. edema'.

    Parts are separated as in `parse_labels`, or by 'and'. None for: a part that is no option; an option for
    nothing, such as 'none of the above', beside others.
    """
    parts = [part for part in re.split(r"[;\n|,]|\band\b", text[:_MAX_TEXT]) if normalise(part)]
    chosen = {parse_choice(part, options) for part in parts}
    if (
        not chosen
        or None in chosen
        or (len(chosen) > 1 and any(normalise(one or "") in _NOTHING for one in chosen))
    ):
        return None
    return [option for option in options if option in chosen]
