"""Captions for one image, built from known facts."""

from __future__ import annotations

import random
from collections.abc import Sequence

from vilam3_jax.quickstart.questions import Facts

_MAX_STRUCTURES = 2

# No article before a modality or a plane: it would be "a CT", but "an MRI" and "an axial".
_OPENINGS = (
    "{plane} {modality} slice of the {region}",
    "{modality} of the {region}, {plane} plane",
    "{plane} slice through the {region}, {modality}",
    "{modality} scan of the {region} in the {plane} plane",
)
_FILM_OPENINGS = ("{modality} image of the {region}", "{modality} image", "one {modality} image, {region}")


def pair_caption(facts: Facts) -> str:
    """One line for contrastive training: plane and modality.

    Region, position, organs and findings are omitted. Equal lines are one class to the loss, and a class with
    only a scan or two does not generalise to the next patient: held-out loss rose while training loss fell.
    """
    plane = f"{facts.plane} " if facts.plane else ""
    return _capitalized(f"{plane}{facts.modality} image.")


def captions(facts: Facts, structures: Sequence[str], rng: random.Random, count: int) -> list[str]:
    """At most `count` differently worded captions; `structures` are the visible organs, largest first."""
    openings = list(_OPENINGS if facts.plane else _FILM_OPENINGS)
    rng.shuffle(openings)
    texts = []
    for opening in openings[:count]:
        text = opening.format(plane=facts.plane, modality=facts.modality, region=facts.region)
        text += _content(facts, structures) + "."
        texts.append(_capitalized(text))
    return texts


def _content(facts: Facts, structures: Sequence[str]) -> str:
    parts = [f", {facts.position}"] if facts.position else []
    if structures:
        *first, last = [f"the {name}" for name in structures[:_MAX_STRUCTURES]]
        parts.append(" showing " + (f"{', '.join(first)} and {last}" if first else last))
    if facts.tumor_class is not None:
        kinds = {"no tumor": " without a tumor", "pituitary": " showing a pituitary tumor"}
        parts.append(kinds.get(facts.tumor_class, f" showing a {facts.tumor_class}"))
    elif facts.tumor is not None:
        parts.append(" with a tumor" if facts.tumor else " without a tumor")
    if facts.pneumonia is not None:
        parts.append(" showing pneumonia" if facts.pneumonia else " without pneumonia")
    return ",".join(parts)


def _capitalized(text: str) -> str:
    return text[0].upper() + text[1:]
