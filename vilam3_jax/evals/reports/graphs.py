"""RadGraph F1 over given annotations: `simple`, `partial` and `complete`.

An annotation is RadGraph's JSON of one report: `entities`, id → `tokens`, `label`, `relations` (pairs of a
relation and the id of an entity). No model runs here. The three levels compare sets (Delbrouck et al., 2022):
`simple`, (tokens, label); `partial`, also whether the entity has any relation; `complete`, each relation with
the tokens of the entity that it points to, and entities without any. Letters are compared in lower case.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from vilam3_jax.errors import UserError

LEVELS = ("simple", "partial", "complete")


def radgraph_f1(
    references: Sequence[Mapping[str, Any]], hypotheses: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """Float64 [n, 3], one column per level; the corpus score is the mean.

    An empty annotation on either side scores 0.

    Raises:
      UserError: an annotation lacks a key, or a relation points to no entity.
      ValueError: different numbers of annotations.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references for {len(hypotheses)} hypotheses")
    scores = np.zeros((len(references), len(LEVELS)))
    for row, pair in enumerate(zip(references, hypotheses, strict=True)):
        wanted, given = (levels(one, f"annotation {row}") for one in pair)
        for column, level in enumerate(LEVELS):
            both = len(wanted[level] & given[level])
            total = len(wanted[level]) + len(given[level])
            scores[row, column] = 2 * both / total if both else 0.0
    return scores


def levels(annotation: Mapping[str, Any], name: str = "annotation") -> dict[str, set[Hashable]]:
    """Level → what is compared at this level.

    Raises:
      UserError: the annotation lacks a key, or a relation points to no entity; it is called `name`.
    """
    try:
        entities = annotation["entities"]
        heads = {key: (str(one["tokens"]).lower(), str(one["label"])) for key, one in entities.items()}
        links = {
            key: [(kind, heads[str(other)][0]) for kind, other in one["relations"]]
            for key, one in entities.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{name}: {error!r}; RadGraph's 'entities' with tokens, label and relations are needed"
        ) from error
    return {
        "simple": set(heads.values()),
        "partial": {(*heads[key], bool(own)) for key, own in links.items()},
        "complete": {(*heads[key], *one) for key, own in links.items() for one in own or [()]},
    }
