"""Parsers of published evaluators, with their defects.

Each restates what a released script does, from reading it; `docs/evaluation_protocols.md` lists the defects.
Where a script stops with an error, the parser returns None: the answer is counted as unparsed and wrong.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

# Numbers of VILA-M3's scripts. "a" and "no" are one number, as are "b" and "yes".
_CODES = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5, "no": 0, "yes": 1}
_CXR14_CODES = frozenset(("a", "b", "c", "d", "no", "yes"))


def vila_m3_strip_lower(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """The text without outer whitespace, in lower case (`metric_radvqa.py`, `metric_slakevqa.py`).

    A full stop at the end stays, and makes an answer wrong.
    """
    return text.strip().lower() or None


def vila_m3_lower(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """The text in lower case (`metric_pathvqa.py`). Outer whitespace stays, and makes an answer wrong."""
    return text.lower() or None


def vila_m3_yes_no_cxr14(text: str, options: Sequence[str] = (), **spec: Any) -> str | int:
    """Reads an answer as `metric_chestxray14.py` does: 'yes', 'no', or the number of another letter.

    The first 'yes' or 'no' counts, as a part of any word: 'A lung nodule is present', 'abnormal' and 'none'
    are 'no'. Without one, the first of the letters a to d in the parentheses or else in the text counts; 'a'
    is 'no', 'b' is 'yes', 'c' and 'd' are the numbers 2 and 3. Anything else is 'no'.
    """
    text = _cell(text)
    if found := re.search("yes|no", text):
        return found[0]
    # A text without a closing parenthesis would take quadratic time.
    if ")" in text and (found := re.search(r"\(.[\S ]*\)", text)):
        text = found[0][1:-1].strip()
    if found := re.search("[abcd]", text):
        text = found[0]
    return _answer(_CODES[text]) if text in _CXR14_CODES else "no"


def vila_m3_yes_no_chexpert(text: str, options: Sequence[str] = (), **spec: Any) -> str | int | None:
    """Reads an answer as `metric_chexpert.py` does: 'yes', 'no', the number of another letter, or None.

    What stands in the outermost parentheses counts, or else the text. In it, the first 'yes', 'no' or letter
    from a to d counts, as a part of any word: 'There is a fracture' is 'no' (a), 'Big heart' is 'yes' (b),
    'Consolidation' is 2 (c). The test of the fall-back is inverted, so the script stops with an error where
    it finds none of them, as in the empty answer: None.
    """
    text = _cell(text)
    start, end = text.find("("), text.rfind(")")  # `\(.*\)`, in linear time
    if 0 <= start < end:
        text = text[start + 1 : end]
    if found := re.search("yes|no|[abcd]", text):
        text = found[0]
    return _answer(_CODES[text]) if text in _CODES else None


def _cell(text: str) -> str:
    """What the metric scripts find in the column of answers, without 'answer:' and 'a: '."""
    text = text.replace("\n", ". ").replace(",", ".").strip().lower()
    if "answer: " in text:
        text = text.replace("answer:", "").strip()
    if "a: " in text:
        text = text.replace("a: ", "").strip()
    return text


def _answer(code: int) -> str | int:
    return {0: "no", 1: "yes"}.get(code, code)


# --- normalisation of the VQA challenge

# A contraction is also spelt without one of its apostrophes.
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've "
    "might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've "
    "shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll "
    "someone's something'd something'd've something'll that's there'd there'd've there're there's "
    "they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's "
    "won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've "
)
_SPELLINGS = {
    full[:place] + full[place + 1 :]: full
    for full in _CONTRACTIONS.split()
    for place, letter in enumerate(full)
    if letter == "'"
} | {"somebody'd": "somebodyd"}
_DIGITS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_MAX_STOPS = 32  # the reference passes re.UNICODE, which is 32, as the number of replacements


def normalise_word(text: str) -> str:
    """Normalisation of the VQA challenge, as LLaVA-Med and VILA-M3 use it (`glossary.py`).

    Punctuation becomes a space; it is deleted if it stands beside a space anywhere in the text, or if the
    text has a comma between digits. Full stops before anything but a digit are deleted, the first 32 of them.
    Number words up to ten become digits ('none' is 0), articles are left out, contractions get their
    apostrophes.
    """
    grouped = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if beside_space or grouped else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned, count=_MAX_STOPS)
    words = (_DIGITS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in _ARTICLES)


def vila_m3_mimic(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """`normalise_word` of what follows the last 'Assistant: ' (`metric_mimicvqa.py`)."""
    return normalise_word(text.rpartition("Assistant: ")[2].lower().strip()) or None


def llava_med(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """`normalise_word` of the answer in lower case (LLaVA-Med, `run_eval.py`)."""
    return normalise_word(text.lower()) or None


# --- MedGemma

_PUNCTUATION_MARKS = str.maketrans("", "", string.punctuation)


def medgemma_tokens(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """Lower case, without punctuation and articles, single spaces.

    The normalisation of SQuAD (Rajpurkar et al., 2016), which the model card's 'tokenized F1' suggests; the
    evaluator itself is not published.
    """
    words = text.lower().translate(_PUNCTUATION_MARKS).split()
    return " ".join(word for word in words if word not in _ARTICLES) or None


# --- MedEvalKit

_ANSWER_MARKS = (
    "**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:", "答案:", "final answer",
    "final answer is",
)  # fmt: skip
_BOX = "\\boxed{"


def medevalkit(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """Reads an answer as MedEvalKit does without a judge (`utils/utils.py`).

    What counts is the content of the last `\\boxed{}`, or else of <answer> tags; then what follows the last
    'answer is' or another such mark. With the options yes and no: the one of 'yes' and 'no' that the text
    contains, as a part of any word; None if it contains both or none. Otherwise the text in lower case,
    without outer whitespace; without full stops and line breaks too if `answer_type` is 'closed'.
    """
    answer = _boxed(text)
    # The script looks for a box and for tags twice; a second box that cannot be read leaves no answer.
    answer = (_tagged(text) if answer is None else answer).lower().strip()
    if "boxed" in answer:
        answer = _boxed(answer)
        if answer is None:
            return None
    else:
        answer = _tagged(answer)
    for mark in _ANSWER_MARKS:
        answer = answer.rpartition(mark)[2]
    if {option.lower() for option in options} == {"yes", "no"}:
        answer = answer.replace("\n", "").replace(".", "")
        found = [word for word in ("yes", "no") if word in answer]
        return found[0] if len(found) == 1 else None
    if spec.get("answer_type") == "closed":
        answer = answer.replace("\n", "").replace(".", "")
    return answer.strip() or None


def _boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}`; None without one, and for one that is not closed."""
    start = text.rfind(_BOX)
    depth = 1
    for end in range(start + len(_BOX), len(text) if start >= 0 else 0):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len(_BOX) : end].strip()
    return None


def _tagged(text: str) -> str:
    """The contents of the answer tags, or else the text."""
    if "</answer>" not in text:
        return text
    return " ".join(re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)).strip() or text


# --- FLARE

_FLARE_EMPTY = frozenset(("", "none", "no finding", "no findings", "n/a", "na", "null", "[]"))


def flare_class(text: str, options: Sequence[str] = (), **spec: Any) -> str | None:
    """Lower case, single spaces."""
    return " ".join(text.lower().split()) or None


def flare_labels(text: str, options: Sequence[str] = (), **spec: Any) -> list[str]:
    """The set of labels, sorted: parts at ';', line breaks or '|', or else at ','; no words for nothing."""
    parts = re.split(r"[;\n|]", text)
    parts = parts if len(parts) > 1 else text.split(",")
    return sorted({" ".join(part.lower().split()) for part in parts} - _FLARE_EMPTY)


def flare_number(text: str, options: Sequence[str] = (), **spec: Any) -> float:
    """The first number of the text, without commas; 0 if there is none. Units are ignored."""
    found = re.search(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)", text.replace(",", "")[:1_000_000])
    value = float(found[0]) if found else 0.0
    return value if abs(value) < float("inf") else 0.0
