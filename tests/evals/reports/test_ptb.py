"""The tokenizer against Stanford's program, on real reports, random text and sentences of our own."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vilam3_jax.evals.reports import ptb

# Made-up sentences and the output of the Java program, so that the rules are tested without Java.
GOLDEN = {
    "No pleural effusion.": "no pleural effusion",
    "The heart isn't enlarged (1.5cm).": "the heart is n't enlarged -lrb- 1.5 cm -rrb-",
    "Lungs clear.No effusion": "lungs clear.no effusion",
    "Seen at 10:30am by Dr. Doe, i.e. p.m. today.": "seen at 10:30 am by dr. doe i.e. p.m. today",
    'The "mass" measures 2 1/2 x 3 cm; it\'s stable.': "the mass measures 2\xa01/2 x 3 cm it 's stable",
    "T12-L1: 5-mm nodule, 50% w/o change?": "t12-l1 5-mm nodule 50 % w/o change",
    "Cannot exclude edema -- compare no. 4.": "can not exclude edema compare no. 4",
    "S/P CABG. 1. Stable. 2., Mild.": "s/p cabg 1 stable 2. mild",
    "37.5°C, ≥ 5 µm… “clear”": "37.5 ° c ≥ 5 µm clear",
    "a. Right. c. This [note] {x} <br> &lt; 5": "a. right c this -lsb- note -rsb- -lcb- x -rcb- <br> < 5",
    "Patients' films; the 1990's x-ray": "patients films the 1990 's x-ray",
    "See http://example.org/a, or a@b.org.": "see http://example.org/a or a@b.org",
    "etc., vs. Mass. mass. Fig. 2 fig. two": "etc. vs. mass. mass fig. 2 fig two",
    "": "",
    " . , ": "",
}


@pytest.mark.parametrize("text,tokens", GOLDEN.items())
def test_golden_sentences(text, tokens):
    assert ptb.joined(text) == tokens


def test_golden_sentences_are_of_the_java_program(java_tokens):
    assert [tokens.strip() for tokens in java_tokens(GOLDEN)] == list(GOLDEN.values())


def test_all_reports_as_in_java(iu_sections, java_tokens):
    texts = [text for one in iu_sections for text in one.values() if text]
    assert len(texts) > 14_000
    differing = [
        text for text, tokens in zip(texts, java_tokens(texts), strict=True) if ptb.joined(text) != tokens
    ]
    assert not differing


def random_texts(count, words, seed):
    rng = random.Random(seed)
    marks = "abcdxyABNS0123459.,;:-/'()\"%&#*+<>=_ !?"
    symbols = "\u2019\u2018\u201c\u201d\u2013\u2014\u2026°±µײ½éï≤≥→\u00a0•α"

    def piece():
        kind = rng.random()
        if kind < 0.35:
            return rng.choice(words)
        if kind < 0.75:
            return "".join(rng.choice(marks) for _ in range(rng.randint(1, 6)))
        if kind < 0.9:
            return rng.choice(words).strip(".,") + rng.choice(marks) + rng.choice(words)
        return "".join(rng.choice(marks + symbols) for _ in range(rng.randint(1, 5)))

    return [" ".join(piece() for _ in range(3)).strip() for _ in range(count)]


def test_random_text_as_in_java(findings, java_tokens):
    words = sorted({word for text in findings[:500] for word in text.split()})
    texts = random_texts(20_000, words, seed=7)
    differing = [
        text
        for text, tokens in zip(texts, java_tokens(texts), strict=True)
        if ptb.joined(text) != tokens.strip()
    ]
    assert not differing


@given(st.text())
@example("\ud800")
@example("a\u2028b\x85c\r\nd")
@example("&apos;&nbsp;&#39;<a b='c'>")
def test_any_text_gives_lower_case_tokens_without_spaces(text):
    tokens = ptb.tokenize(text)
    assert not ptb.PUNCTUATION & set(tokens)
    for token in tokens:
        assert token and " " not in token and "\n" not in token
        assert token == token.lower()


@given(st.lists(st.sampled_from(["no", "effusion", "Heart", "isn't", "5", "(", ")", "a.m."]), min_size=1))
def test_words_apart_are_tokenized_apart(words):
    """A space separates tokens; none of these words is read differently in company."""
    assert ptb.tokenize(" ".join(words)) == [token for word in words for token in ptb.tokenize(word)]
