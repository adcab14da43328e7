"""Multiple-choice questions with lettered options: parsing, prompts and answers."""

from __future__ import annotations

import dataclasses
import random
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets.conversations import conversation, question_meta, text_of
from vilam3_jax.datasets.dataset import SkipItem

# Options that refer to other options or to the whole list must not move.
_REFERS = re.compile(
    r"\b(?:all|none|both|any|each|either|neither) of (?:the|these|those|them)\b"
    r"|\b(?:above|below|aforementioned)\b"
    r"|(?-i:^\W*(?:[Bb]oth )?\(?[A-J]\)?(?:, \(?[A-J]\)?)*,? (?:and|or|&) \(?[A-J]\b)",
    re.IGNORECASE,
)
# A leading letter, as in "B. liver" or "(B) liver".
_LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s*(?=\S)")
_NAMES_AN_OPTION = re.compile(r"\b(?i:options?|choices?|answers?) \(?[A-J]\b")
_ENDS = " .,;:!?\"'`"
_LETTERS = string.ascii_uppercase


@dataclasses.dataclass(frozen=True)
class Choice:
    """A question with its options in display order.

    Attributes:
      question: without the options.
      options: texts without letters; at least two.
      right: index of the answer.
    """

    question: str
    options: tuple[str, ...]
    right: int

    @property
    def answer(self) -> str:
        """Text of the right option."""
        return self.options[self.right]

    def example(
        self,
        name: str,
        images: Sequence[ImageRef],
        meta: Mapping[str, Any],
        kind: str = "multiple_choice",
        **known: Any,
    ) -> Example:
        """Returns a conversation: one lettered option per line, answered by letter and text.

        Args:
          name, images, meta: see `conversation`.
          kind, known: see `question_meta`.
        """
        lines = (f"{letter}. {text}" for letter, text in zip(_LETTERS, self.options, strict=False))
        prompt = "\n".join(
            [self.question, *lines, "Answer with the letter and the text of the right option."]
        )
        reply = f"{_LETTERS[self.right]}. {self.answer}"
        qa = question_meta(self.question, self.answer, kind, options=self.options, **known)
        return conversation(name, images, [(prompt, reply)], meta, questions=[qa])

    def shuffled(self, rng: random.Random) -> Choice:
        """Shuffles the options, unless one refers to others ("none of the above", "both A and B")."""
        texts = (self.question, *self.options)
        if any(map(_REFERS.search, self.options)) or any(map(_NAMES_AN_OPTION.search, texts)):
            return self
        order = list(range(len(self.options)))
        rng.shuffle(order)
        return Choice(self.question, tuple(self.options[i] for i in order), order.index(self.right))


def lettered_options(options: object, optional: str = "") -> dict[str, str]:
    """Returns option texts by letter, in the order of the letters.

    An option's own letter before its text is removed: always in "A: liver", and in "A. liver" or "(A) liver"
    if all options have it.

    Args:
      options: letter → text of the source, in any order.
      optional: letters whose option may be missing.

    Raises:
      SkipItem: not an object, an option is not text or empty, a key is not a letter, or there are fewer than
        two options.
    """
    if not isinstance(options, Mapping):
        raise SkipItem("the options are not an object of letter and text")
    found = {}
    for letter, value in sorted(options.items()):
        if len(letter) != 1 or letter not in _LETTERS:
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
    """Returns the letter of the answer, given its letter, its text, or both.

    Texts are compared exactly, then ignoring case, surrounding punctuation and repeated spaces. The text may
    start with the letter of its option.

    Args:
      options: of `lettered_options`.
      letter, text: from the source; "" if unknown.

    Raises:
      SkipItem: no option matches, several do, or letter and text contradict each other.
    """
    letter = letter.strip(" .:()").upper()
    if letter and letter not in options:
        raise SkipItem("the answer's letter is not an option")
    same = _same_text(options, text) if text else []
    if letter:
        if same and letter not in same:
            raise SkipItem("the answer's letter and text name different options")
        return letter
    if len(same) != 1:
        raise SkipItem(f"the answer equals {'several' if same else 'none'} of the options")
    return same[0]


def choice(question: str, options: Mapping[str, str], letter: str) -> Choice:
    """Returns the question with options in the order of their letters; `letter` is right."""
    return Choice(question.strip(), tuple(options.values()), list(options).index(letter))


def listed_choice(question: str, options: Sequence[object] | Mapping[str, object], answer: str) -> Choice:
    """Returns a question answered by the text of an option, or else by its letter.

    Args:
      question: without its options.
      options: in order, or by letter.
      answer: answer in the source.

    Raises:
      SkipItem: an option is not text, there are fewer than 2 or more than 26, or none matches the answer.
    """
    if len(options) > len(_LETTERS):
        raise SkipItem("has more options than letters")
    if not isinstance(options, Mapping):
        options = dict(zip(_LETTERS, options, strict=False))
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
    """Returns `value` if it is one of `letters`, also written "b" or "(B)"; otherwise ""."""
    text = value.strip(" .:()").upper() if isinstance(value, str) else ""
    return text if text in letters and text else ""
