"""Expert cards: how a model learns which experts there are, and how it asks for one.

Cards are data (`cards/*.json`, `cards/*.txt`), rendered in one fixed grammar. The text that the released
VILA-M3 checkpoints were trained on is kept byte for byte as `vila_m3`.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import re
from collections.abc import Sequence

from vilam3_jax import paths
from vilam3_jax.errors import UserError

HEADER = "Here is a list of available expert models:\n"
FOOTER = "Give the model <NAME(args)> when selecting a suitable expert model.\n"
STAND_IN = "stand-in"

_NAME = "[A-Z][A-Z0-9_]{0,31}"
_SEPARATORS = ("\n", ", Task: ", ", Overview: ", ", Accuracy: ", ", Valid args are: ")
_LINE = re.compile(
    rf"<({_NAME})\(args\)> Modality: (.*?), Task: (.*?), Overview: (.*?), "
    r"Accuracy: (.*?), Valid args are: (.*)"
)
# The bound on the arguments keeps a stray '<A(' from scanning a long text again and again.
_TRIGGER = re.compile(rf"<({_NAME})\(([^()<>\n]{{0,200}})\)>")
_MAX_CARDS_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model is told of one expert.

    Attributes:
      name: upper case, as in the trigger `<NAME(args)>`.
      args: the arguments it takes; empty for none.
      modality, task, overview, accuracy: free text on one line.
      stand_in: a public-package substitute, not the expert it is named after; the overview must say so.
    """

    name: str
    args: tuple[str, ...]
    modality: str
    task: str
    overview: str
    accuracy: str
    stand_in: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(_NAME, self.name):
            raise ValueError(f"card name {self.name!r} must be upper case letters, digits and '_'")
        for text in (self.modality, self.task, self.overview, self.accuracy):
            if any(s in text for s in _SEPARATORS):
                raise ValueError(f"card {self.name}: {text!r} holds a line break or a field name")
        if any(not re.fullmatch(r"[^()<>'\n]{1,200}", a) or a == "None" for a in self.args):
            raise ValueError(f"card {self.name}: arguments {self.args} cannot be written in a trigger")
        if self.stand_in != (STAND_IN in self.overview):
            raise ValueError(f"card {self.name}: the overview of a stand-in must hold {STAND_IN!r}")

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
            Card(
                name,
                tuple(re.findall(r"'([^']*)'", args)),
                modality,
                task,
                overview,
                accuracy,
                STAND_IN in overview,
            )
        )
    if render_cards(cards) != text:
        raise ValueError("card list does not survive parsing; check how its arguments are listed")
    return cards


def load_cards(name: str) -> list[Card]:
    """Reads a card list.

    Args:
      name: `quickstart`, `vila_m3`, or the path of a `.json` (list of objects with the fields of `Card`) or
        `.txt` (rendered text) file.

    Raises:
      UserError: no such list, or it is malformed.
    """
    if re.fullmatch(r"[a-z0-9_]+", name):
        folder = importlib.resources.files("vilam3_jax.data.experts") / "tables"
        found = [f for f in (folder / f"{name}.json", folder / f"{name}.txt") if f.is_file()]
        if not found:
            raise UserError(f"no card list {name!r}; use 'quickstart', 'vila_m3' or a path to a file")
        is_json, data = found[0].name.endswith(".json"), found[0].read_bytes()
    else:
        is_json, data = name.endswith(".json"), paths.read_bytes(name, _MAX_CARDS_BYTES)
    try:
        if not is_json:
            return parse_cards(data.decode())
        return [Card(**{**row, "args": tuple(row["args"])}) for row in json.loads(data)]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"card list {name}: {error}; correct the file") from error


def parse_trigger(text: str, cards: Sequence[Card] | None = None) -> tuple[str, str] | None:
    """Finds the first `<NAME(args)>` in a model's answer.

    Args:
      text: what the model wrote; anything at all.
      cards: if given, an expert or an argument that no card names counts as no trigger. Whatever stands
        between the brackets of an expert without arguments is dropped.

    Returns:
      (name, args), args without outer blanks and quotes; or None.
    """
    match = _TRIGGER.search(text)
    if match is None:
        return None
    name, args = match[1], match[2].strip().strip("'\"").strip()
    if cards is None:
        return name, args
    card = next((c for c in cards if c.name == name), None)
    if card is None:
        return None
    if not card.args:
        return name, ""
    return (name, args) if args in card.args else None
