"""Expert cards: the descriptions of experts in a model's prompt.

Cards are data (`tables/*.json`, `tables/*.txt`), rendered into a fixed text. The text that the released
VILA-M3 checkpoints were trained on is kept byte for byte as `vila_m3`. Fields that are not part of the text
(roles, modalities, regions, checks) come from `tables/facts.json` unless the card list states them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from vilam3_jax.data.examples import IMAGE_MARKER
from vilam3_jax.data.experts.grammar import NAME, parse_turn
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

HEADER = "Here is a list of available expert models:\n"
FOOTER = "Give the model <NAME(args)> when selecting a suitable expert model.\n"
STAND_IN = "stand-in"
DEFAULT_LIST = "experts"  # for models whose config names none

_SEPARATORS = ("\n", ", Task: ", ", Overview: ", ", Accuracy: ", ", Valid args are: ")
_LINE = re.compile(
    rf"<(?P<name>{NAME})\(args\)> Modality: (?P<modality>.*?), Task: (?P<task>.*?), "
    r"Overview: (?P<overview>.*?), Accuracy: (?P<accuracy>.*?), Valid args are: (?P<args>.*)"
)
_MAX_CARDS_BYTES = 1 << 20
_FACTS = ("roles", "modalities", "regions", "checks")


@dataclasses.dataclass(frozen=True)
class Check:
    """A check of an expert's result, see `verify`."""

    kind: str  # kind of check, such as `volume_ml`
    subject: str = ""  # label or class to check; '' for all
    low: float | None = None  # plausible range, with high, in the unit of the check; None for no bound
    high: float | None = None


@dataclasses.dataclass(frozen=True)
class Card:
    """The description of an expert that a model sees, and the requirements on its inputs and results."""

    name: str  # upper case, as in the call `<NAME(args)>`
    args: tuple[str, ...]  # valid arguments; empty for none
    modality: str  # free text on one line, like the next three
    task: str
    overview: str
    accuracy: str
    stand_in: bool = False  # replaced by a simpler public model, as the overview must say
    # Roles of the inputs, in order, such as ("t1c", "t1", "t2", "flair"); ("",) for a single input.
    roles: tuple[str, ...] = ("",)
    modalities: tuple[str, ...] = ()  # DICOM codes of the supported modalities; empty for any
    regions: tuple[str, ...] = ()  # supported body regions; empty for any
    checks: tuple[Check, ...] = ()  # checks of the results

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name):
            raise ValueError(f"card name {self.name!r} must be upper case letters, digits and '_'")
        for text in (self.modality, self.task, self.overview, self.accuracy):
            if any(s in text for s in _SEPARATORS):
                raise ValueError(f"card {self.name}: {text!r} contains a line break or a field name")
            if not text.isprintable() or IMAGE_MARKER in text or parse_turn(text).calls:
                raise ValueError(
                    f"card {self.name}: {text!r} contains a call, a marker or a control character"
                )
        if any(not re.fullmatch(r"[^()<>'\n]{1,200}", a) or a == "None" for a in self.args):
            raise ValueError(f"card {self.name}: arguments {self.args} cannot be written in a call")
        if self.stand_in != (STAND_IN in self.overview):
            raise ValueError(
                f"card {self.name}: the overview of a stand-in (and no other) must contain {STAND_IN!r}"
            )

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Card:
        """Reads the output of `to_dict`; missing facts come from `tables/facts.json`.

        Raises `TypeError`, `KeyError` or `ValueError` if `row` is not a card.
        """
        fields = {**facts(row["name"]), **row}
        for name in ("args", "roles", "modalities", "regions"):
            if name in fields:
                fields[name] = tuple(map(str, fields[name]))
        fields["checks"] = tuple(Check(**check) for check in fields.get("checks", ()))
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return dataclasses.asdict(self)

    def render(self) -> str:
        """The line of the card, without a line break."""
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
def all_facts() -> dict[str, dict[str, Any]]:
    """The content of `tables/facts.json`."""
    data = importlib.resources.files("vilam3_jax.data.experts") / "tables" / "facts.json"
    return json.loads(data.read_text(encoding="utf-8"))


def facts(name: str) -> dict[str, Any]:
    """The fields that `tables/facts.json` adds to an expert's card; empty for an unknown expert.

    Experts share named sets of checks. The source of each check is documentation and is dropped.
    """
    found = {key: value for key, value in all_facts().get(name, {}).items() if key in _FACTS}
    if "checks" in found:
        rows = all_facts()["check_sets"][found["checks"]]
        found["checks"] = [{key: value for key, value in row.items() if key != "source"} for row in rows]
    return found


def card_list(model: Mapping[str, Any]) -> list[Card]:
    """The cards of a config's `model` section: those of an export, else the list that `cards` names.

    Raises `UserError` if the list does not exist or is malformed.
    """
    rows = model.get("card_list")
    if rows is None:
        return load_cards(str(model.get("cards", DEFAULT_LIST)))
    try:
        return [Card.from_dict(dict(row)) for row in rows]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"card_list of the model: {error}; export it again") from error


def with_card_list(model: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section with its cards embedded, for a self-contained export; raises as `card_list`."""
    return {**model, "card_list": [card.to_dict() for card in card_list(model)]}


def render_cards(cards: Sequence[Card]) -> str:
    """The block before a user turn: header, one line per card, footer, each with a line break."""
    return HEADER + "".join(card.render() + "\n" for card in cards) + FOOTER


def parse_cards(text: str) -> list[Card]:
    """The inverse of `render_cards`; raises `ValueError` for any other text."""
    if not (text.startswith(HEADER) and text.endswith(FOOTER)):
        raise ValueError("card list lacks its first or last line")
    cards = []
    for line in text[len(HEADER) : len(text) - len(FOOTER)].splitlines():
        match = _LINE.fullmatch(line)
        if not match:
            raise ValueError(f"not a card: {line[:80]!r}")
        args, stand_in = re.findall(r"'([^']*)'", match["args"]), STAND_IN in match["overview"]
        cards.append(Card.from_dict({**match.groupdict(), "args": args, "stand_in": stand_in}))
    if render_cards(cards) != text:
        raise ValueError("card list renders differently after parsing; check how its arguments are listed")
    return cards


def load_cards(name: str) -> list[Card]:
    """Reads the list `experts`, `vila_m3` or `quickstart`, or a file.

    A `.json` file is a list of objects with the fields of `Card`; a `.txt` file holds the rendered text.
    Raises `UserError` if the list does not exist or is malformed.
    """
    if re.fullmatch(r"[a-z0-9_]+", name):
        folder = importlib.resources.files("vilam3_jax.data.experts") / "tables"
        found = [f for f in (folder / f"{name}.json", folder / f"{name}.txt") if f.is_file()]
        if not found:
            raise UserError(f"no card list {name!r}; use 'experts', 'vila_m3', 'quickstart' or a file path")
        is_json, data = found[0].name.endswith(".json"), found[0].read_bytes()
    else:
        is_json, data = name.endswith(".json"), paths.read_bytes(name, _MAX_CARDS_BYTES)
    try:
        if not is_json:
            return parse_cards(data.decode())
        return [Card.from_dict(row) for row in json.loads(data)]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"card list {name}: {error}; correct the file") from error
