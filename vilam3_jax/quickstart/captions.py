"""Short descriptions of one image from what is known of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from vilam3_jax.quickstart.questions import Facts

_MOST_STRUCTURES = 5

# No articles before a modality or a plane: "a CT", but "an MRI" and "an axial".
_OPENINGS = (
    "{plane} {modality} slice of the {region}",
    "{modality} of the {region}, {plane} plane",
    "{plane} slice through the {region}, {modality}",
    "{modality} scan of the {region} in the {plane} plane",
)
_FILM_OPENINGS = (
    "{modality} image of the {region}",
    "{modality} image",
    "one {modality} image, {region}",
)


def join_names(names: Sequence[str]) -> str:
    """`["a", "b", "c"]` as text.

    >>> join_names(["liver"]), join_names(["liver", "spleen", "aorta"])
    ('the liver', 'the liver, the spleen and the aorta')
    """
    named = [f"the {name}" for name in names]
    return named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]


def pair_caption(facts: Facts) -> str:
    """One line for contrastive training: plane and modality.

    Nothing of region, position, organs or findings: equal lines are one class to the loss, and where a class
    is a scan or two, what tells it apart does not carry over to the next patient: held-out loss rose while
    training loss fell.
    """
    plane = f"{facts.plane} " if facts.plane else ""
    return _capital(f"{plane}{facts.modality} image.")


def captions(facts: Facts, structures: Sequence[str], rng: random.Random, count: int) -> list[str]:
    """`count` different wordings of one description, a sentence or two each.

    Args:
      facts: what is known.
      structures: visible organs, largest first.
      rng: source of the wording.
      count: how many; fewer come back if there are not as many wordings.
    """
    openings = list(_OPENINGS if facts.plane else _FILM_OPENINGS)
    rng.shuffle(openings)
    out = []
    for opening in openings[:count]:
        text = _fill(opening, facts) + _content(facts, structures) + "."
        if facts.volumes_ml and structures:
            name = structures[0]
            text += f" The largest of them is the {name}." if len(structures) > 1 else ""
        out.append(_capital(text))
    return out


def _fill(opening: str, facts: Facts) -> str:
    return opening.format(plane=facts.plane, modality=facts.modality, region=facts.region)


def _content(facts: Facts, structures: Sequence[str]) -> str:
    words = [f", {facts.position}"] if facts.position else []
    if structures:
        words.append(" showing " + join_names(structures[:_MOST_STRUCTURES]))
    if facts.tumor_class is not None:
        kinds = {"no tumor": " without a tumor", "pituitary": " showing a pituitary tumor"}
        words.append(kinds.get(facts.tumor_class, f" showing a {facts.tumor_class}"))
    elif facts.tumor is not None:
        words.append(" with a tumor" if facts.tumor else " without a tumor")
    if facts.pneumonia is not None:
        words.append(" showing pneumonia" if facts.pneumonia else " without pneumonia")
    return ",".join(words)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
