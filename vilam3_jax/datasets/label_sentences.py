"""Sentences generated from labels for contrastive training, using descriptions of appearance.

The idea is from FLAIR (Silva-Rodríguez et al., Medical Image Analysis 2025). The definitions in
`definitions.json` are original text; each cites a work to check it against.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

NORMAL = "no_finding"
_MAX_NAMED = 5  # findings per sentence: text towers read 64 tokens
_MAX_DENIED = 2
_IMAGES = {
    "CXR": ("Chest X-ray", "Chest radiograph", "Chest film"),
    "CT": ("Chest CT", "CT of the chest", "CT image of the chest"),
}
_NAMED = ("{image} with {terms}.", "{image} showing {terms}.", "{image}: {terms}.")
_DEFINED = (
    "{image} showing {term}: {description}.",
    "{image} with {description}, in keeping with {term}.",
    "{image} with {term}, seen as {description}.",
)
_DENIED = ("{image} without {terms}.", "{image} that does not show {terms}.")
_ADDED_DENIAL = (" There is no sign of {terms}.", " It does not show {terms}.")


class Definition(NamedTuple):
    """Definition of a label.

    Attributes:
      terms: noun phrases that name it; the first is canonical.
      descriptions: noun phrases of its appearance.
    """

    terms: tuple[str, ...]
    descriptions: tuple[str, ...]


@functools.cache
def _definitions() -> Mapping[str, Definition]:
    """Returns all definitions by name and alias, see `_key`."""
    text = importlib.resources.files("vilam3_jax.datasets").joinpath("definitions.json").read_text("utf-8")
    return {
        _key(name): Definition(tuple(row["terms"]), tuple(row["descriptions"]))
        for row in json.loads(text)["findings"]
        for name in (row["name"], *row["aliases"])
    }


def find(label: str) -> Definition | None:
    """Returns the definition of a label or a synonym, in any spelling, or None.

    >>> find("Pleural_Thickening") is find("pleural thickening"), find("Lung nodule") == find("nodule")
    (True, True)
    """
    return _definitions().get(_key(label))


def describe(
    states: Mapping[str, bool | None], rng: random.Random | None = None, *, modality: str = "CXR"
) -> str:
    """Describes an image by its labels, in one or two sentences of at most about 50 words.

    Args:
      states: label → present, absent or unknown (None). A label without a definition is used as it is.
        `NORMAL` means a normal image, whatever is absent.
      rng: draws wording, omitted findings and whether to mention absent ones; None for canonical sentences.
      modality: "CXR" or "CT"; determines the name of the image.

    Raises:
      ValueError: no label is present or absent.
    """
    named = _choice(_IMAGES.get(modality, (f"{modality} image" if modality else "Image",)), rng)
    present = [label for label, state in states.items() if state and label != NORMAL]
    absent = [label for label, state in states.items() if state is False and label != NORMAL]
    if present:
        return _of_present(named, present, rng) + _denial(absent, rng)
    if states.get(NORMAL):
        return _of_normal(named, rng)
    if not absent:
        raise ValueError("no label is present or absent")
    terms = _listed([_terms(label)[0] for label in _some(absent, _MAX_DENIED, rng)], "or")
    return _choice(_DENIED, rng).format(image=named, terms=terms)


def _of_present(image: str, labels: Sequence[str], rng: random.Random | None) -> str:
    if len(labels) == 1 and (definition := find(labels[0])) is not None:
        return _choice(_DEFINED, rng).format(
            image=image,
            term=_choice(definition.terms, rng),
            description=_choice(definition.descriptions, rng),
        )
    terms = [_choice(_terms(label), rng) for label in _some(labels, _MAX_NAMED, rng)]
    return _choice(_NAMED, rng).format(image=image, terms=_listed(terms, "and"))


def _of_normal(image: str, rng: random.Random | None) -> str:
    normal = _definitions()[_key(NORMAL)]
    inner = image if image[:2].isupper() else image[0].lower() + image[1:]
    words = _choice((*normal.terms, *normal.descriptions), rng)
    return _choice((f"Normal {inner}.", f"{image} with {words}."), rng)


def _denial(absent: Sequence[str], rng: random.Random | None) -> str:
    if rng is None or not absent or rng.random() < 0.5:
        return ""
    terms = _listed([_terms(label)[0] for label in _some(absent, 1, rng)], "or")
    return rng.choice(_ADDED_DENIAL).format(terms=terms)


def _terms(label: str) -> tuple[str, ...]:
    definition = find(label)
    return definition.terms if definition else (label.replace("_", " ").strip().lower(),)


def _some(labels: Sequence[str], most: int, rng: random.Random | None) -> list[str]:
    return list(labels[:most]) if rng is None else rng.sample(list(labels), min(most, len(labels)))


def _choice(options: Sequence[str], rng: random.Random | None) -> str:
    return options[0] if rng is None else rng.choice(options)


def _listed(terms: Sequence[str], last: str) -> str:
    return terms[0] if len(terms) == 1 else f"{', '.join(terms[:-1])} {last} {terms[-1]}"


def _key(label: str) -> str:
    return re.sub(r"[\s_-]+", " ", label).strip().lower()
