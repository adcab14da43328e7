"""Cleaning of reports: golden texts, and properties of any text."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax.datasets.report_text import clean, meaning, reworded, sentence_pool


@pytest.mark.parametrize(
    ("text", "cleaned", "dropped"),
    [
        (" The lungs\n are  clear.\n\n no effusion", "The lungs are clear. No effusion.", {}),
        ("1. Mild edema.\n2. 5.5 cm mass.\n", "Mild edema. 5.5 cm mass.", {"list number": 2}),
        ("Compared to ___, worse. Dr. ___ was told. Clear.", "Clear.", {"mask": 8}),
        ("Clear. clear.\n Clear.", "Clear.", {"repeated sentence": 2}),
        (f"Clear.\n {'_' * 30}\n =====\n Normal.", "Clear. Normal.", {"separator": 2}),
        ("the lungs are clear . there is no edema .", "The lungs are clear. There is no edema.", {}),
        ("Signed by Dr. Smith at 5 p.m. today. - 3 - .", "Signed by Dr. Smith at 5 p.m. today.", None),
        ("Is it edema? No! Tube, tip in SVC,", "Is it edema? No! Tube, tip in SVC.", {}),
        ("\0 \x07\n", "", {}),
        ("", "", {}),
        ("___", "", {"mask": 1}),
        ("ß is odd. ﬁne.", "ß is odd. ﬁne.", {}),  # no capital of one character
    ],
)
def test_texts(text, cleaned, dropped):
    found = clean(text)
    assert found.text == cleaned
    assert dropped is None or found.dropped == dropped


_PIECES = st.sampled_from(
    [
        *("clear", "Lungs", "no", "5.5", "Dr.", " p.m. ", "a.", "é", "ﬁ", "___", "____\n", "===\n", "\0"),
        *(".", ". ", "?", " ", "\n", "\u2028", "1. ", "(2) ", "12)", "- ", "• ", ":", ",", ";"),
    ]
)
_TEXTS = st.lists(_PIECES, max_size=25).map("".join) | st.text(max_size=60)


def _words(text):
    return "".join(c for c in text if c.isalnum())


@given(_TEXTS)
@settings(max_examples=400, deadline=None)
def test_cleaning_is_stable_and_accounts_for_every_word(text):
    found = clean(text)
    again = clean(found.text)
    assert again.text == found.text and not again.dropped
    assert clean(text) == found
    assert "___" not in found.text and "\n" not in found.text
    if not found.dropped:
        assert _words(found.text).casefold() == _words(text).casefold()
    # No letter is added or moved, and no more words are dropped than are counted.
    letters = iter(_words(text).casefold())
    assert all(letter in letters for letter in _words(found.text).casefold())
    assert _count(found.text) >= _count(text) - sum(found.dropped.values())


def _count(text):
    return sum(any(c.isalnum() for c in word) for word in text.split())


def test_the_pool_has_the_usual_wording_whatever_the_order():
    texts = ["There is no pleural effusion."] * 3 + ["No pleural effusions are seen."] * 2
    texts += ["No pneumothorax."] * 9 + ["The heart is large. Heart is large."]
    pool = sentence_pool(texts, least=5)
    assert pool == {meaning("no pleural effusion"): "There is no pleural effusion."}
    random.Random(1).shuffle(texts)
    assert sentence_pool(texts, least=5) == pool
    assert sentence_pool(texts, least=2, most=1) == pool
    text = "No pleural effusions are seen. Small nodule."
    assert reworded(text, pool) == "There is no pleural effusion. Small nodule."
    assert reworded(reworded(text, pool), pool) == reworded(text, pool)
    assert reworded("There is no pleural effusion. No pleural effusion is seen.", pool) == (
        "There is no pleural effusion."
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("There is a small effusion.", "There are small effusions."),  # how many
        ("No edema.", "Edema."),
        ("No edema or effusion.", "Effusion or no edema."),
        ("Left lung is clear.", "Right lung is clear."),
        ("Mild edema is seen.", "Mild edema is again seen."),
        ("The tip is 5.5 cm above.", "The tip is 55 cm above."),
        ("Possible edema.", "Edema is present."),
        ("There was an effusion.", "There is an effusion."),
        ("Bases are clear.", "Basis is clear."),
    ],
)
def test_other_meanings_keep_their_own_wording(one, other):
    assert meaning(one) != meaning(other)
