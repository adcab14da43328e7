"""Look-ups: what they ask follows from the result they show, in the wording of real expert turns."""

from __future__ import annotations

import collections
import random
import re

import pytest

from vilam3_jax.data.examples import IMAGE_MARKER
from vilam3_jax.data.experts.cards import load_cards, render_cards
from vilam3_jax.quickstart.lookups import lookups
from vilam3_jax.quickstart.questions import TUMOR_CLASSES

CARDS = render_cards(load_cards("quickstart"))


@pytest.fixture(scope="module")
def made():
    return list(lookups(400, random.Random(3)))


WANTED = {
    "tumor": "BRAINTUMOR",
    "brain image": "BRAINTUMOR",
    "pneumonia": "PNEUMONIA",
    "the brain": "BRAINSEG",
}


def called(example):
    """The turn with the call, or None."""
    return example.turns[1].text if any(turn.role == "expert" for turn in example.turns) else None


def expert_for(question):
    return next((expert for word, expert in WANTED.items() if word in question), "ORGANS")


def is_drill(example):
    return all("trigger" in turn.text for turn in example.turns[1::2])


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
    if "volume" in question or "How large" in question:
        limits = re.search(r"Options: under (\d+) ml, \1 to (\d+) ml, over \2 ml", question)
        low, high = map(int, limits.groups())
        (ml,) = [ml for name, ml in volumes.items() if f" the {name} in" in question]
        return f"under {low} ml" if ml < low else f"over {high} ml" if ml > high else f"{low} to {high} ml"
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
        if is_drill(example):
            continue
        result = example.turns[2 if called(example) else 0].text
        for question, given in pairs(example):
            assert given == answer(result, question), (result, question)


def test_a_quarter_call_and_a_quarter_are_drills(made):
    with_call = [example for example in made if called(example)]
    drills = [example for example in made if is_drill(example)]
    assert 0.2 < len(with_call) / len(made) < 0.3 and 0.2 < len(drills) / len(made) < 0.3
    experts = collections.Counter()
    for example in with_call + drills:
        *cards, first = example.turns[0].text.splitlines()
        assert [line for line in cards if line.startswith("<")] == CARDS.splitlines()[1:-1]
        asked = [first, *(turn.text for turn in example.turns[2::2])] if is_drill(example) else [first]
        for question, turn in zip(asked, example.turns[1::2], strict=False):
            name = re.search(r"<([A-Z]+)\(", turn.text)[1]
            assert name == expert_for(question) and turn.supervised
            experts[name] += 1
        assert is_drill(example) or first in example.turns[2].text
    assert len(experts) == 4 and min(experts.values()) > 0.1 * experts.total()


def test_they_are_text_and_the_same_for_a_seed(made):
    assert made == list(lookups(400, random.Random(3)))
    assert not any(IMAGE_MARKER in turn.text for example in made for turn in example.turns)
    for example in made:
        example.validate()
        assert not example.images and "qa" not in example.meta  # no protocol asks them


def test_no_answer_is_likely_without_the_result(made):
    answers = collections.defaultdict(collections.Counter)
    for example in made:
        for (_, given), kind in zip(pairs(example), example.meta["question_types"], strict=True):
            answers[kind][given] += not is_drill(example)
    for kind in ("organ_present", "tumor_present", "tumor_kind", "pneumonia", "brain_visible"):
        assert 0.25 < answers[kind]["yes"] / answers[kind].total() < 0.8, kind
    classes = answers["tumor_class"]
    assert max(classes[name] for name in TUMOR_CLASSES) < 0.4 * classes.total()
