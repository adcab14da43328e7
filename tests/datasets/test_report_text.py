"""Cleaning of reports: golden texts, and properties of any text."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax.datasets.report_text import clean, meaning, reworded, sentence_pool


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (" The lungs\n are  clear.\n\n no effusion", "The lungs are clear. No effusion."),
        ("1. Mild edema.\n2. 5.5 cm mass.\n", "Mild edema. 5.5 cm mass."),
        ("Compared to ___, worse. Dr. ___ was told. Clear.", "Clear."),
        ("Clear. clear.\n Clear.", "Clear."),
        (f"Clear.\n {'_' * 30}\n =====\n Normal.", "Clear. Normal."),
        ("the lungs are clear . there is no edema .", "The lungs are clear. There is no edema."),
        ("Signed by Dr. Smith at 5 p.m. today. - 3 - .", "Signed by Dr. Smith at 5 p.m. today."),
        ("Is it edema? No! Tube, tip in SVC,", "Is it edema? No! Tube, tip in SVC."),
        ("\0 \x07\n", ""),
        ("", ""),
        ("___", ""),
        ("ß is odd. ﬁne.", "ß is odd. ﬁne."),  # no capital of one character
    ],
)
def test_texts(text, cleaned):
    assert clean(text) == cleaned


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
def test_cleaning_is_stable_and_adds_nothing(text):
    found = clean(text)
    assert clean(found) == found == clean(text)
    assert "___" not in found and "\n" not in found
    # No letter is added or moved.
    letters = iter(_words(text).casefold())
    assert all(letter in letters for letter in _words(found).casefold())


@given(st.lists(st.sampled_from(["lungs clear", "no edema", "Dr. X", "5.5 cm é", "tip in SVC"]), unique=True))
def test_cleaning_drops_no_word_without_a_rule(sentences):
    text = "\n".join(f" {sentence} ." for sentence in sentences)
    assert _words(clean(text)).casefold() == _words(text).casefold()


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
