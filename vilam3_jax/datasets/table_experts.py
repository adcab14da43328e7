"""The expert column of a table: which experts a row calls, and before which answer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.grammar import ARGS, NAME, Call
from vilam3_jax.data.experts.labels import canonical_args

_CALL = re.compile(rf"\s*<?({NAME})\(({ARGS})\)>?\s*(?:\bbefore\s+([^;]+?)\s*)?(?:;|$)")


@dataclasses.dataclass(frozen=True)
class TableCall:
    """A call of an expert; `label` is the header of the answer that it precedes, '' for the first answer."""

    call: Call
    label: str = ""


def parse_calls(cell: str, cards: Mapping[str, Card], labels: Sequence[str]) -> tuple[TableCall, ...]:
    """Reads a cell: `NAME(arguments)` or `NAME(arguments) before LABEL`; several are separated by ';'.

    Args:
      cell: text of the cell; empty for no call.
      cards: name → card of the experts that may be called.
      labels: headers of the label columns, without repetitions but for case.

    Raises:
      ValueError: the cell has another form, or names an unknown expert, argument or label. The message quotes
        only what has the form of a call, because a wrong column may hold data of patients.
    """
    found, position = [], 0
    headers = {label.strip().casefold(): label for label in labels}
    while cell[position:].strip():
        match = _CALL.match(cell, position)
        if match is None:
            raise ValueError("is not NAME(arguments), or NAME(arguments) before LABEL")
        position = match.end()
        name, args, label = match[1], match[2].strip(), (match[3] or "").strip()
        if name not in cards:
            raise ValueError(f"expert {name} has no card; the list has {', '.join(sorted(cards))}")
        card, args = cards[name], canonical_args(name, args)
        if args not in (card.args or ("",)):
            valid = " or ".join(f"{name}({one})" for one in card.args or ("",))
            raise ValueError(f"{name} has no argument {args!r}; write {valid}")
        if problem := _unusable(card):
            raise ValueError(problem)
        if label and label.casefold() not in headers:
            raise ValueError(f"{name} is called before {label!r}, which is not one of the label columns")
        found.append(TableCall(Call(name, args), headers.get(label.casefold(), "")))
    return tuple(dict.fromkeys(found))


def _unusable(card: Card) -> str | None:
    """The reason why an expert cannot be called on the single images of a table, or None."""
    if card.task != "classification" or card.roles != ("",):
        return f"{card.name} reads scans, not single images; use `vilam3 prepare expert_slices`"
    return None
