"""Look-ups: what they ask follows from the result they show, in the wording of real expert turns."""

from __future__ import annotations

import collections
import random
import re

import pytest

from vilam3_jax.data.examples import IMAGE_MARKER
from vilam3_jax.quickstart.lookups import lookups
from vilam3_jax.quickstart.questions import TUMOR_CLASSES


@pytest.fixture(scope="module")
def made():
    return list(lookups(400, random.Random(3)))


def pairs(example):
    """(question, answer), without the result that precedes the first question."""
    turns = example.turns
    for user, assistant in zip(turns[::2], turns[1::2], strict=True):
        yield user.text.splitlines()[-1], assistant.text


def answer(result, question):
    """The answer, read from the text of the result by other means than those of the look-ups."""
    shown = dict(re.findall(r"^([a-z ]+): (?:yes|no) \(([\d.]+)\)$", result, re.M))
    volumes = dict(re.findall(r"([a-z ]+) ([\d.]+)(?:,|\.)", result.partition("Volumes in ml:")[2]))
    volumes = {name.strip(): float(ml) for name, ml in volumes.items()}
    if shown:
        top = max(shown, key=lambda name: float(shown[name]))
        if "pneumonia" in shown:
            return "yes" if top == "pneumonia" else "no"
        if "brain image" in question:
            return top
        if " a tumor" in question:
            return "no" if top == "no tumor" else "yes"
        return "yes" if f"{top} tumor" in question else "no"
    if limits := re.search(r"under (\d+) ml, (\d+) to (\d+) ml, over (\d+) ml", question):
        low, _, _, high = map(int, limits.groups())
        name = re.search(r"(?:volume of|large is) the ([a-z ]+?) in this scan", question)[1]
        return (
            f"under {low} ml" if volumes[name] < low
            else f"over {high} ml" if volumes[name] > high
            else f"{low} to {high} ml"
        )  # fmt: skip
    if listed := re.search(r"of ([a-z ]+), ([a-z ]+) and ([a-z ]+?) (?:are|that)", question):
        return ", ".join(name for name in listed.groups() if name in volumes) or "none"
    name = re.search(r"(?:Is|show|see) the ([a-z ]+?)(?: visible| here|\?)", question)
    return "yes" if name[1] in volumes else "no"


def test_every_answer_follows_from_the_result(made):
    for example in made:
        result = example.turns[0].text
        for question, given in pairs(example):
            assert given == answer(result, question), (result, question)


def test_they_are_text_and_the_same_for_a_seed(made):
    assert made == list(lookups(400, random.Random(3)))
    assert not any(IMAGE_MARKER in turn.text for example in made for turn in example.turns)
    for example in made:
        example.validate()
        assert not example.images and "qa" not in example.meta  # no protocol asks them


def test_answers_are_balanced(made):
    answers = collections.Counter(given for example in made for _, given in pairs(example))
    assert 0.4 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.6
    assert len({answers[name] > 10 for name in TUMOR_CLASSES}) == 1
