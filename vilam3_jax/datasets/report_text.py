"""Report text for training: cleaning by fixed rules, and one wording for sentences with the same meaning.

The reference rewrote its reports with a hosted language model. These rules run locally and are deterministic.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping

_MAX_PASSES = 8
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\u2028\u2029]")
_SEPARATOR = re.compile(r"^[ \t]*([_=*-])\1{3,}[ \t]*$", re.MULTILINE)
_MASK = re.compile(r"_{3,}")  # the publisher's replacement of a name, a date or a number
_LIST_NUMBER = re.compile(r"(?:^|(?<=[.?!:;] ))(?:\(?\d{1,2}[.)]|[*•-]) (?=\S)")
_SPACE_BEFORE = re.compile(r" +([.,;:?!])(?=\s|$)")
_SENTENCE_END = re.compile(r"(?<=[.?!]) (?=\S)")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:dr|drs|mr|mrs|ms|st|vs|no|approx|a\.m|p\.m|e\.g|i\.e|[a-z])\.$", re.IGNORECASE
)
_LONGEST_ABBREVIATION = 12  # with the preceding character

# Not "was": an earlier finding may be gone.
_FILLERS = {"a", "an", "the", "there", "of", "is", "are", "be", "evidence", "evident", "present", "visible"}
_FILLERS |= {"seen", "noted", "identified", "demonstrated", "visualized", "visualised"}
_TOKEN = re.compile(r"[a-z0-9]+(?:[./'-][a-z0-9]+)*|%")
_KEPT_PLURAL = ("ss", "us", "is")


def clean(text: str) -> str:
    """Cleans the text of a section; returns one line of sentences.

    Control characters become spaces, and white space is collapsed. Separator lines, sentences with a masked
    word (`___`), list numbers and bullets, sentences without a letter and repeated sentences are dropped.
    Sentences get a capital letter and a final punctuation mark. No other word is dropped, added or moved.
    Cleaning is idempotent.

    >>> clean("1. Mild edema .\\n2. Compared to ___, no change.")
    'Mild edema.'
    """
    text = _CONTROL.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = " ".join(_SEPARATOR.sub("", text).split())
    # To a fixed point: a bullet may hide another, and a sentence without letters the text after it.
    for _ in range(_MAX_PASSES):
        once = _pass(text)
        if once == text:
            break
        text = once
    return text


def sentences_of(text: str) -> list[str]:
    """Splits a text without line breaks; joining the sentences with spaces restores it.

    >>> sentences_of("Seen by Dr. X at 5.5 cm. No effusion.")
    ['Seen by Dr. X at 5.5 cm.', 'No effusion.']
    """
    sentences: list[str] = []
    for part in _SENTENCE_END.split(text):
        if sentences and _ABBREVIATION.search(sentences[-1][-_LONGEST_ABBREVIATION:]):
            sentences[-1] += " " + part
        else:
            sentences.append(part)
    return [sentence for sentence in sentences if sentence]


def meaning(sentence: str) -> str:
    """A key shared by sentences that differ only in filler words, capitals and punctuation.

    Word order matters. After "no", plural and singular are equal.

    >>> meaning("There is no pleural effusion.") == meaning("No pleural effusions are seen.")
    True
    """
    words = [word for word in _TOKEN.findall(sentence.lower()) if word not in _FILLERS]
    if words[:1] == ["no"]:
        words = [w[:-1] if len(w) > 4 and w[-1] == "s" and not w.endswith(_KEPT_PLURAL) else w for w in words]
    return " ".join(words)


def sentence_pool(texts: Iterable[str], *, least: int = 10, most: int = 5_000) -> dict[str, str]:
    """The most frequent wording of each frequent sentence.

    Args:
      texts: cleaned texts of the training split, in any order.
      least: minimum number of occurrences of a meaning.
      most: maximum number of meanings; the most frequent are kept.

    Returns:
      `meaning` → its most frequent wording, for meanings with several wordings.
    """
    wordings: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for text in texts:
        for sentence in sentences_of(text):
            if key := meaning(sentence):
                wordings[key][sentence] += 1
    frequent = [(sum(c.values()), key) for key, c in wordings.items() if len(c) > 1]
    frequent = sorted((-count, key) for count, key in frequent if count >= least)[:most]
    return {key: min(wordings[key], key=lambda s: (-wordings[key][s], len(s), s)) for _, key in frequent}


def reworded(text: str, pool: Mapping[str, str]) -> str:
    """Replaces the sentences of a cleaned text by the wordings of the pool."""
    if not pool:
        return text
    sentences = [pool.get(meaning(sentence), sentence) for sentence in sentences_of(text)]
    return " ".join(dict.fromkeys(sentences))


def _pass(text: str) -> str:
    text = _SPACE_BEFORE.sub(r"\1", _LIST_NUMBER.sub("", text))
    kept: dict[str, str] = {}
    for sentence in sentences_of(text):
        if not _MASK.search(sentence) and any(character.isalpha() for character in sentence):
            sentence = _finished(sentence)
            kept.setdefault(sentence.casefold(), sentence)
    return " ".join(kept.values())


def _finished(sentence: str) -> str:
    capital = sentence[0].upper()
    sentence = (capital if len(capital) == 1 else sentence[0]) + sentence[1:]
    return sentence if sentence.endswith((".", "?", "!")) else sentence.rstrip(",;:") + "."
