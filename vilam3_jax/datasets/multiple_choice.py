"""Questions with lettered options: how they are read, asked and answered."""

from __future__ import annotations

import dataclasses
import random
import re
import string
from collections.abc import Mapping, Sequence

from vilam3_jax.datasets.conversations import text_of
from vilam3_jax.datasets.dataset import SkipItem

# Options that speak of others, or of the whole list, keep their place.
_REFERS = re.compile(
    r"\b(?:all|none|both|any|each|either|neither) of (?:the|these|those|them)\b"
    r"|\b(?:above|below|aforementioned)\b"
    r"|(?-i:^\W*(?:[Bb]oth )?\(?[A-J]\)?(?:, \(?[A-J]\)?)*,? (?:and|or|&) \(?[A-J]\b)",
    re.IGNORECASE,
)
# A letter before a text, as in "B. liver" or "(B) liver".
_LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s*(?=\S)")
_NAMES_AN_OPTION = re.compile(r"\b(?i:options?|choices?|answers?) \(?[A-J]\b")
_ENDS = " .,;:!?\"'`"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A question, its options in the order in which they are shown, and which of them is right.

    Attributes:
      question: without its options.
      options: texts without letters; at least two.
      right: index of the answer.
    """

    question: str
    options: tuple[str, ...]
    right: int

    @property
    def answer(self) -> str:
        """The right option's text."""
        return self.options[self.right]

    @property
    def prompt(self) -> str:
        """The question with one lettered option per line."""
        listed = (
            f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, self.options, strict=False)
        )
        return "\n".join([self.question, *listed, "Answer with the letter and the text of the right option."])

    @property
    def reply(self) -> str:
        """The letter and the text of the right option."""
        return f"{string.ascii_uppercase[self.right]}. {self.answer}"

    def shuffled(self, rng: random.Random) -> Choice:
        """The same with the options in another order.

        Options that refer to others, such as "none of the above" or "both A and B", keep the whole list as
        it is.
        """
        texts = (self.question, *self.options)
        if any(map(_REFERS.search, self.options)) or any(map(_NAMES_AN_OPTION.search, texts)):
            return self
        order = list(range(len(self.options)))
        rng.shuffle(order)
        return Choice(self.question, tuple(self.options[at] for at in order), order.index(self.right))


def lettered_options(options: Mapping[str, object], optional: str = "") -> dict[str, str]:
    """Texts of options by their letter, in the order of the letters.

    A letter before the text, as in "A: liver", is taken away when it is the option's own, and so are letters
    as in "A. liver" or "(A) liver" when all options have theirs.

    Args:
      options: letter → text of the source, in any order.
      optional: letters whose option may be missing; it is then left out.

    Raises:
      SkipItem: an option is empty or no text, a key is no letter, or there are fewer than two.
    """
    found = {}
    for letter, value in sorted(options.items()):
        if len(letter) != 1 or letter not in string.ascii_uppercase:
            raise SkipItem("the options are not named by letters")
        if letter in optional and (value is None or (isinstance(value, str) and not value.strip())):
            continue
        text = re.sub(rf"^\s*{letter}\s*:", "", text_of(value, f"option {letter}")).strip()
        found[letter] = text_of(text, f"option {letter}")
    if len(found) < 2:
        raise SkipItem("has fewer than two options")
    stated = {letter: _LETTERED.match(text) for letter, text in found.items()}
    if all(match and match[1] == letter for letter, match in stated.items()):
        return {letter: _LETTERED.sub("", text, count=1) for letter, text in found.items()}
    return found


def right_letter(options: Mapping[str, str], *, letter: str = "", text: str = "") -> str:
    """The letter of the answer, from its letter, its text, or both.

    Texts are compared as they are, then without case, punctuation at the ends and doubled spaces; a text may
    have its option's letter before it.

    Args:
      options: of `lettered_options`.
      letter: as stated by the source, or "".
      text: as stated by the source, or "".

    Raises:
      SkipItem: no option or several are the answer, or letter and text name different ones.
    """
    letter = letter.strip(" .:()").upper()
    if letter and letter not in options:
        raise SkipItem("the answer's letter is none of the options'")
    same = _same_text(options, text) if text else []
    if letter:
        if same and letter not in same:
            raise SkipItem("the answer's letter and text name different options")
        return letter
    if len(same) != 1:
        raise SkipItem(f"the answer equals {'several' if same else 'none'} of the options")
    return same[0]


def choice(question: str, options: Mapping[str, str], letter: str) -> Choice:
    """The question with options in the order of their letters, of which `letter` is right."""
    return Choice(question.strip(), tuple(options.values()), list(options).index(letter))


def listed_choice(question: str, options: Sequence[object] | Mapping[str, object], answer: str) -> Choice:
    """A question whose answer is the text of one of its options, or else its letter.

    Args:
      question: without its options.
      options: in the order of their letters, or by letter.
      answer: as the source has it.

    Raises:
      SkipItem: an option is no text, there are fewer than two or more than letters, or none is the answer.
    """
    if len(options) > len(string.ascii_uppercase):
        raise SkipItem("has more options than letters")
    if not isinstance(options, Mapping):
        options = dict(zip(string.ascii_uppercase, options, strict=False))
    texts = lettered_options(options)
    letter = "" if answer in texts.values() else single_letter(answer, list(texts))
    return choice(question, texts, letter or right_letter(texts, text=answer))


def _same_text(options: Mapping[str, str], text: str) -> list[str]:
    exact = [letter for letter, option in options.items() if option == text.strip()]
    if found := exact or [letter for letter, option in options.items() if _plain(option) == _plain(text)]:
        return found
    stated = _LETTERED.match(text)
    letter, rest = (stated[1], text[stated.end() :]) if stated else ("", "")
    return [letter] if letter in options and _plain(options[letter]) == _plain(rest) else []


def _plain(text: str) -> str:
    plain = " ".join(text.casefold().split())
    return plain.strip(_ENDS) or plain


def single_letter(value: object, letters: Sequence[str]) -> str:
    """`value` where it is just one of `letters`, also as "b" or "(B)"; otherwise ""."""
    text = value.strip(" .:()").upper() if isinstance(value, str) else ""
    return text if text in letters and text else ""
