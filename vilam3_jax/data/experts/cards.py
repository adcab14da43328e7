"""Expert cards: how a model learns which experts there are, and how it asks for one.

Cards are data (`tables/*.json`, `tables/*.txt`), rendered in one fixed text. The text that the released
VILA-M3 checkpoints were trained on is kept byte for byte as `vila_m3`. What a card states beyond its text
(roles, modalities, regions, checks) comes from `tables/facts.json` unless the card list states it itself.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vilam3_jax.data.experts.grammar import NAME
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

HEADER = "Here is a list of available expert models:\n"
FOOTER = "Give the model <NAME(args)> when selecting a suitable expert model.\n"
STAND_IN = "stand-in"
DEFAULT_LIST = "experts"  # of models whose config names none

_SEPARATORS = ("\n", ", Task: ", ", Overview: ", ", Accuracy: ", ", Valid args are: ")
_LINE = re.compile(
    rf"<({NAME})\(args\)> Modality: (.*?), Task: (.*?), Overview: (.*?), "
    r"Accuracy: (.*?), Valid args are: (.*)"
)
_MAX_CARDS_BYTES = 1 << 20
_FACTS = ("roles", "modalities", "regions", "checks")


@dataclasses.dataclass(frozen=True)
class Check:
    """A check of an expert's result, see `verify`.

    Attributes:
      kind: which check, such as `volume_ml`.
      subject: the label or class it is about; '' for all.
      low, high: what is plausible, in the unit of the check; None for no bound.
    """

    kind: str
    subject: str = ""
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Card:
    """The description of an expert that a model sees, and the requirements on its input and its result.

    Attributes:
      name: upper case, as in the call `<NAME(args)>`.
      args: the arguments it takes; empty for none.
      modality, task, overview, accuracy: free text on one line.
      stand_in: a public-package substitute, not the expert it is named after; the overview must say so.
      roles: of its inputs, in order, such as ("t1c", "t1", "t2", "flair"); ("",) for a single input.
      modalities: DICOM's codes of what it reads; empty for any.
      regions: body regions it reads; empty for any.
      checks: of its results.
    """

    name: str
    args: tuple[str, ...]
    modality: str
    task: str
    overview: str
    accuracy: str
    stand_in: bool = False
    roles: tuple[str, ...] = ("",)
    modalities: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name):
            raise ValueError(f"card name {self.name!r} must be upper case letters, digits and '_'")
        for text in (self.modality, self.task, self.overview, self.accuracy):
            if any(s in text for s in _SEPARATORS):
                raise ValueError(f"card {self.name}: {text!r} holds a line break or a field name")
        if any(not re.fullmatch(r"[^()<>'\n]{1,200}", a) or a == "None" for a in self.args):
            raise ValueError(f"card {self.name}: arguments {self.args} cannot be written in a call")
        if self.stand_in != (STAND_IN in self.overview):
            raise ValueError(f"card {self.name}: the overview of a stand-in must hold {STAND_IN!r}")

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Card:
        """Reads what `to_dict` wrote; facts that are missing come from `tables/facts.json`.

        Raises:
          TypeError, KeyError, ValueError: not a card.
        """
        fields = {**facts(row["name"]), **row}
        for name in ("args", "roles", "modalities", "regions"):
            if name in fields:
                fields[name] = tuple(map(str, fields[name]))
        fields["checks"] = tuple(Check(**check) for check in fields.get("checks", ()))
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def render(self) -> str:
        """The card's line, without line end."""
        quoted = [f"'{a}'" for a in self.args]
        if len(quoted) > 2:
            args = ", ".join(quoted[:-1]) + ", or " + quoted[-1]
        else:
            args = " or ".join(quoted) or "None"
        return (
            f"<{self.name}(args)> Modality: {self.modality}, Task: {self.task}, "
            f"Overview: {self.overview}, Accuracy: {self.accuracy}, Valid args are: {args}"
        )


@functools.cache
def _all_facts() -> dict[str, dict[str, Any]]:
    data = importlib.resources.files("vilam3_jax.data.experts") / "tables" / "facts.json"
    return json.loads(data.read_text(encoding="utf-8"))


def facts(name: str) -> dict[str, Any]:
    """What `tables/facts.json` adds to an expert's card; empty for an unknown expert.

    Checks are named sets there, as several experts share them; their sources are for readers of the file.
    """
    stated = {key: value for key, value in _all_facts().get(name, {}).items() if key in _FACTS}
    if "checks" in stated:
        rows = _all_facts()["check_sets"][stated["checks"]]
        stated["checks"] = [{key: value for key, value in row.items() if key != "source"} for row in rows]
    return stated


def card_list(model: Mapping[str, Any]) -> list[Card]:
    """The cards of a model: those inside an export (`card_list`), otherwise the list that `cards` names.

    Args:
      model: the `model` section of a config.

    Raises:
      UserError: no such list, or it is malformed.
    """
    rows = model.get("card_list")
    if rows is None:
        return load_cards(str(model.get("cards", DEFAULT_LIST)))
    try:
        return [Card.from_dict(dict(row)) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"card_list of the model: {error}; export it again") from error


def with_card_list(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config with its cards inside, for an export that needs no card file.

    Raises:
      UserError: as `card_list`.
    """
    return {**model, "card_list": [card.to_dict() for card in card_list(model)]}


def render_cards(cards: Sequence[Card]) -> str:
    """The block before a user turn: header, one line a card, footer, each ended by a line break."""
    return HEADER + "".join(card.render() + "\n" for card in cards) + FOOTER


def parse_cards(text: str) -> list[Card]:
    """The inverse of `render_cards`.

    Raises:
      ValueError: `text` is not in the grammar.
    """
    if not (text.startswith(HEADER) and text.endswith(FOOTER)):
        raise ValueError("card list without its first or last line")
    cards = []
    for line in text[len(HEADER) : len(text) - len(FOOTER)].splitlines():
        match = _LINE.fullmatch(line)
        if not match:
            raise ValueError(f"not a card: {line[:80]!r}")
        name, modality, task, overview, accuracy, args = match.groups()
        cards.append(
            Card.from_dict(
                {
                    "name": name,
                    "args": re.findall(r"'([^']*)'", args),
                    "modality": modality,
                    "task": task,
                    "overview": overview,
                    "accuracy": accuracy,
                    "stand_in": STAND_IN in overview,
                }
            )
        )
    if render_cards(cards) != text:
        raise ValueError("card list does not survive parsing; check how its arguments are listed")
    return cards


def load_cards(name: str) -> list[Card]:
    """Reads a card list.

    Args:
      name: `experts`, `vila_m3`, `quickstart`, or the path of a `.json` (list of objects with the fields of
        `Card`) or `.txt` (rendered text) file.

    Raises:
      UserError: no such list, or it is malformed.
    """
    if re.fullmatch(r"[a-z0-9_]+", name):
        folder = importlib.resources.files("vilam3_jax.data.experts") / "tables"
        found = [f for f in (folder / f"{name}.json", folder / f"{name}.txt") if f.is_file()]
        if not found:
            raise UserError(
                f"no card list {name!r}; use 'experts', 'vila_m3', 'quickstart' or a path to a file"
            )
        is_json, data = found[0].name.endswith(".json"), found[0].read_bytes()
    else:
        is_json, data = name.endswith(".json"), paths.read_bytes(name, _MAX_CARDS_BYTES)
    try:
        if not is_json:
            return parse_cards(data.decode())
        return [Card.from_dict(row) for row in json.loads(data)]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"card list {name}: {error}; correct the file") from error
