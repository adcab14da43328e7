"""Questions are true, well-formed and balanced; checked against the facts."""

import collections
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax.quickstart.questions import (
    PHRASES,
    TUMOR_CLASSES,
    Balance,
    Facts,
    QuestionMaker,
    dialogue_turns,
    volume_range,
)

ORGANS = ("liver", "spleen", "left kidney", "right kidney", "aorta", "colon", "bladder", "heart", "lung")


def ct_facts(rng: random.Random, group: str = "g") -> Facts:
    # The liver is almost always visible, the heart never: a question must not give this away.
    chance = {"liver": 0.9, "heart": 0.0}
    organs = {n: rng.random() < chance.get(n, 0.5) for n in ORGANS if rng.random() < 0.9}
    return Facts(
        group=group,
        modality="CT",
        region="abdomen",
        plane=rng.choice(("axial", "coronal", "sagittal")),
        organs=organs,
        volumes_ml={n: rng.uniform(3, 2500) for n, visible in organs.items() if visible},
        organ_source="TotalSegmentator reference map",
        organ_oracle=True,
        expert="ORGANS",
        expert_args="organs",
    )


def in_range(ml: float, answer: str) -> bool:
    numbers = [float(n) for n in re.findall(r"\d+", answer)]
    if answer.startswith("under"):
        return ml < numbers[0]
    if answer.startswith("over"):
        return ml > numbers[0]
    return numbers[0] < ml < numbers[1]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), training=st.booleans(), limit=st.integers(3, 14))
def test_every_answer_is_true_and_one_of_the_options(seed, training, limit):
    rng = random.Random(seed)
    maker = QuestionMaker(rng, training=training, limit=limit)
    for _ in range(4):
        facts = ct_facts(rng)
        asked = maker.dialogue(facts)
        assert len(asked) <= limit
        general = [q for q in asked if q.type in ("modality", "plane", "region")]
        assert len({q.type for q in general}) == len(general) == min(3, limit // 3)
        for q in asked:
            if q.type == "organ_present":
                (name,) = [n for n in ORGANS if re.search(rf"the {n}\b", q.question)]
                assert facts.organs[name] == (q.answer == "yes")
            elif q.type == "which_organs":
                *names, none = q.options
                assert none == "none" and all(n in q.question for n in names)
                expected = ", ".join(n for n in names if facts.organs[n]) or "none"
                assert q.answer == expected
            elif q.type == "organ_volume_range":
                (name,) = [n for n in ORGANS if re.search(rf"\bthe {n} in this scan", q.question)]
                assert [in_range(facts.volumes_ml[name], o) for o in q.options].count(True) == 1
                assert in_range(facts.volumes_ml[name], q.answer)
                assert all(o in q.question for o in q.options)
            if q.type != "which_organs":
                assert q.answer in q.options
            expert = q.type.startswith(("organ", "which"))
            assert (q.expert == "ORGANS") == expert == q.oracle
        # Questions that an expert can answer are adjacent, before or after the general ones.
        helped = [i for i, q in enumerate(asked) if q.expert]
        assert helped == ([] if not helped else list(range(helped[0], helped[-1] + 1)))
        assert helped
        assert len({(q.type, q.question) for q in asked}) == len(asked)


@pytest.mark.parametrize(("training", "share"), [(True, 0.3), (False, 0.5)])
def test_general_questions_come_first_in_a_part_of_the_dialogues(training, share):
    rng = random.Random(5)
    maker = QuestionMaker(rng, training=training)
    dialogues = [maker.dialogue(ct_facts(rng)) for _ in range(200)]
    first = [asked[0].expert is None for asked in dialogues if any(q.expert for q in asked)]
    assert len(first) > 100 and share - 0.15 < sum(first) / len(first) < share + 0.15


def test_training_answers_are_balanced_for_every_organ():
    rng = random.Random(3)
    maker = QuestionMaker(rng, training=True, limit=14)
    counts = collections.Counter()
    for _ in range(200):
        for q in maker.dialogue(ct_facts(rng)):
            if q.type == "organ_present":
                (name,) = [n for n in ORGANS if re.search(rf"the {n}\b", q.question)]
                counts[name, q.answer] += 1
    for name in ORGANS:
        yes, no = counts[name, "yes"], counts[name, "no"]
        assert abs(yes - no) <= 4 + 0.15 * (yes + no), (name, yes, no)
    assert counts["liver", "yes"] > 10 and counts["heart", "no"] > 0
    yes = sum(n for (_, answer), n in counts.items() if answer == "yes")
    assert 0.45 < yes / sum(counts.values()) < 0.55 and sum(counts.values()) > 600


def test_heldout_wording_is_canonical_and_answers_are_balanced_per_scan():
    rng = random.Random(5)
    maker = QuestionMaker(rng, training=False, limit=14)
    answers = collections.Counter()
    for i in range(60):
        for q in maker.dialogue(ct_facts(rng, group=f"g{i % 2}")):
            pattern = re.escape(PHRASES[q.type][0]).replace(r"\{", "{").replace(r"\}", "}")
            assert re.fullmatch(re.sub(r"{\w+}", ".+", pattern), q.question)
            if q.type == "organ_present":
                answers[i % 2, q.answer] += 1
    for scan in (0, 1):
        assert abs(answers[scan, "yes"] - answers[scan, "no"]) <= 2


def test_volume_options_do_not_give_the_answer_away():
    rng = random.Random(0)
    maker = QuestionMaker(rng, training=True)
    places = collections.Counter()
    for _ in range(150):
        facts = Facts(
            group="g", modality="MRI", region="head", plane="axial", brain=True, brain_source="mask",
            brain_ml=1450.0, brain_volume_source="mask", expert="BRAINSEG",
        )  # fmt: skip
        for q in maker.dialogue(facts):
            if q.type == "brain_volume_range":
                places[q.options.index(q.answer)] += 1
                assert all(700 <= int(limit) <= 1900 for limit in re.findall(r"\d+", q.options[1]))
    assert len(places) == 3 and max(places.values()) - min(places.values()) <= 1


@pytest.mark.parametrize(("ml", "asked"), [(1450.0, True), (1904.0, False), (300.0, False)])
def test_the_volume_of_a_mask_that_is_no_brain_is_not_asked(ml, asked):
    facts = Facts(
        group="g", modality="MRI", region="head", plane="axial", brain=True, brain_source="mask",
        brain_ml=ml, brain_volume_source="mask", expert="BRAINSEG",
    )  # fmt: skip
    questions = QuestionMaker(random.Random(0), training=False).dialogue(facts)
    assert ("brain_volume_range" in {question.type for question in questions}) == asked


@given(ml=st.floats(0.5, 6000), wanted=st.integers(0, 2), seed=st.integers(0, 99))
def test_volume_range_keeps_its_distance(ml, wanted, seed):
    found = volume_range(ml, random.Random(seed), wanted)
    if found is not None:
        options, answer = found
        assert options.index(answer) == wanted and in_range(ml, answer)
        limits = [float(n) for n in re.findall(r"\d+", options[1])]
        assert all(abs(limit - ml) >= 0.1 * ml for limit in limits)


@pytest.mark.parametrize("kind", TUMOR_CLASSES)
def test_film_questions(kind):
    facts = Facts(
        group="p", modality="MRI", region="head", tumor_class=kind, tumor=kind != "no tumor",
        tumor_source="class name of the film", brain=True, brain_source="sample list", expert="BRAINTUMOR",
    )  # fmt: skip
    asked = QuestionMaker(random.Random(1), training=False).dialogue(facts)
    found = {q.type: q for q in asked}
    assert found["tumor_class"].answer == kind and found["tumor_class"].expert == "BRAINTUMOR"
    assert found["tumor_present"].answer == ("no" if kind == "no tumor" else "yes")
    assert "plane" not in found and not any(q.oracle for q in asked)
    for q in asked:
        if q.type == "tumor_kind":
            assert (q.answer == "yes") == (f" {kind} " in q.question)


def test_what_is_unknown_is_not_asked():
    asked = QuestionMaker(random.Random(0), training=True).dialogue(Facts("g", "CT", "chest", plane="axial"))
    assert {q.type for q in asked} == {"modality", "plane", "region"}


def test_one_sided_labels_are_not_asked_beyond_the_slack():
    maker = QuestionMaker(random.Random(0), training=True)
    facts = Facts("g", "CT", "chest", plane="axial", tumor=False, tumor_source="mask")
    asked = [q for _ in range(20) for q in maker.dialogue(facts) if q.type == "tumor_present"]
    assert len(asked) == 2
    assert sum(maker.unasked.values()) == 18


def test_balance_counts_against_the_rarest_option():
    balance = Balance(slack=1)
    assert balance.allows("k", "yes")
    balance.add("k", "yes")
    assert not balance.allows("k", "yes") and balance.allows("k", "no") and balance.allows("other", "yes")


def test_turns_alternate_with_one_image_first():
    asked = QuestionMaker(random.Random(0), training=True).dialogue(ct_facts(random.Random(1)))
    turns = dialogue_turns(asked)
    assert [t.role for t in turns] == ["user", "assistant"] * len(asked)
    assert turns[0].text.startswith("<image>\n") and sum(t.text.count("<image>") for t in turns) == 1
    assert [t.text for t in turns[1::2]] == [q.answer for q in asked]
    assert all(t.supervised == (t.role == "assistant") for t in turns)
