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


def called(example):
    """The turn with the call, or None."""
    return example.turns[1].text if any(turn.role == "expert" for turn in example.turns) else None


def pairs(example):
    """(question, answer), without the call and the result that precede the first answer."""
    turns = example.turns[2:] if called(example) else example.turns
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
    if listed := re.search(r"of ([a-z ]+), ([a-z ]+) and ([a-z ]+?) (?:are|that)", question):
        return ", ".join(name for name in listed.groups() if name in volumes) or "none"
    name = re.search(r"(?:Is|show|see) the ([a-z ]+?)(?: visible| here|\?)", question)
    return "yes" if name[1] in volumes else "no"


def test_every_answer_follows_from_the_result(made):
    for example in made:
        result = example.turns[2 if called(example) else 0].text
        for question, given in pairs(example):
            assert given == answer(result, question), (result, question)


def test_half_of_them_call_the_expert_of_the_question_whose_card_is_shown(made):
    wanted = {
        "tumor": "BRAINTUMOR",
        "brain image": "BRAINTUMOR",
        "pneumonia": "PNEUMONIA",
        "the brain": "BRAINSEG",
    }
    with_call = [example for example in made if called(example)]
    assert 0.4 < len(with_call) / len(made) < 0.6
    experts = collections.Counter()
    for example in with_call:
        *cards, question = example.turns[0].text.splitlines()
        name = re.search(r"<([A-Z]+)\(", called(example))[1]
        shown = [re.match(r"<([A-Z]+)\(args\)>", line)[1] for line in cards if line.startswith("<")]
        assert name in shown and len(shown) == 2
        assert name == next((expert for word, expert in wanted.items() if word in question), "ORGANS")
        assert example.turns[1].supervised and question in example.turns[2].text
        experts[name] += 1
    assert len(experts) == 4


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
