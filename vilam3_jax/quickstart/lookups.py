"""Look-ups: text-only dialogues about made-up expert results, which teach an LLM to read a result.

A quarter of them begin one turn earlier, with cards and a question that is answered by a call. Another
quarter are drills: cards and several questions, each answered by the call that it needs. Results are random,
so no patient and no image is behind them. Wording and questions are those of real expert turns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import numpy as np

from vilam3_jax.data.examples import IMAGE_MARKER, Example, Turn
from vilam3_jax.data.experts.cards import Card, load_cards
from vilam3_jax.data.experts.exchange import Result, call_turn, exchange, with_cards
from vilam3_jax.data.experts.grammar import Call
from vilam3_jax.data.experts.labels import label_universe
from vilam3_jax.data.experts.record import Annotation, LabelMap, Segment
from vilam3_jax.data.experts.wording import Plane
from vilam3_jax.quickstart.questions import BRAIN_ML, TUMOR_CLASSES, Facts, Question, QuestionMaker
from vilam3_jax.quickstart.volumes import BRAIN_EXPERT

_QUESTIONS, _DRILLED = 4, 6  # most per look-up, and per drill
_BRAIN, _BRAIN_NAME = 1, "brain"  # label
# Without an image, nothing tells a CT of the brain from an MRI volume, which has another expert.
_ORGANS = sorted(
    ((label, name) for label, name in label_universe("ORGANS", "organs").items() if name != _BRAIN_NAME),
    key=lambda item: item[1],
)
_ORGAN_ML = (8.0, 2500.0)
_SOURCE = "random result"
_RANGES = ("brain_volume_range", "organ_volume_range")


def lookups(count: int, rng: random.Random, split: str = "train") -> Iterator[Example]:
    """Yields at most `count` text-only dialogues of a split, the experts in turn.

    Fewest are about films, which have one kind of question.
    """
    maker = QuestionMaker(rng, training=True)
    kinds: tuple[Callable[[random.Random], tuple[Facts, Annotation]], ...] = (
        _tumor,
        _organs,
        _brain,
        _film,
        _tumor,
        _organs,
        _brain,
    )
    cards = load_cards("quickstart")
    for number in range(count):
        meta = {
            "dataset": "quickstart/lookups",
            "split": split,
            "group": f"{split} lookup {number}",
            "cards": False,  # those that have cards bring their own
        }
        if number % 4 == 3:
            facts_of_all = [kind(rng)[0] for kind in rng.sample(kinds, len(kinds))]
            asked = [rng.choice(_asked(maker, facts) or [None]) for facts in facts_of_all]
            chosen = [question for question in asked if question is not None][:_DRILLED]
            turns = _drill(chosen, cards)
        else:
            facts, annotation = kinds[number // 2 % len(kinds)](rng)
            shown = cards if number % 2 else []
            asked = _asked(maker, facts)
            rng.shuffle(asked)
            # Comparing numbers takes more than reading, but the right expert can be called.
            asked = [q for place, q in enumerate(asked) if q.type not in _RANGES or (shown and place == 0)]
            chosen = asked[:_QUESTIONS]
            turns = _turns(chosen, annotation, shown) if chosen else ()
        if turns:
            meta["question_types"] = [question.type for question in chosen]
            yield Example(f"lookups/{split}/{number}", "conversation", (), turns, (), meta)


def _asked(maker: QuestionMaker, facts: Facts) -> list[Question]:
    """Questions about an image that its expert can answer."""
    return [question for question in maker.dialogue(facts) if question.expert is not None]


def _drill(asked: list[Question], cards: list[Card]) -> tuple[Turn, ...]:
    """Questions about different images, each answered by a call."""
    turns = []
    for question in asked:
        called = [card for card in cards if card.name == question.expert]
        turns += [
            Turn("user", question.question),
            call_turn(called, [Call(str(question.expert), question.args)]),
        ]
    return tuple(with_cards(turns, cards))


def _turns(asked: list[Question], annotation: Annotation, cards: list[Card]) -> tuple[Turn, ...]:
    """Questions about a result. With `cards`, a call answers the first one before the result is shown."""
    task = "classification" if annotation.probabilities else "segmentation"
    result = Result(annotation, task, Plane(2, 0) if task == "segmentation" else Plane())
    # Text only: the overlay that a real result shows is left out.
    first = exchange([result], asked[0].question).text.replace(IMAGE_MARKER, "shown")
    turns = [Turn("user", first), Turn("assistant", asked[0].answer, True)]
    if cards:
        called = [card for card in cards if card.name == annotation.expert]
        call = call_turn(called, [Call(annotation.expert, annotation.args)])
        opening = [Turn("user", asked[0].question), call, Turn("expert", first)]
        turns = [*with_cards(opening, cards), turns[1]]
    for question in asked[1:]:
        turns += [Turn("user", question.question), Turn("assistant", question.answer, True)]
    return tuple(turns)


def _tumor(rng: random.Random) -> tuple[Facts, Annotation]:
    found = rng.choice(TUMOR_CLASSES)
    top = rng.uniform(0.51, 1.0) if rng.random() < 0.5 else 1.0  # classifiers are often certain
    shares = [rng.random() for _ in TUMOR_CLASSES[1:]]
    rest = iter(share / sum(shares) * (1 - top) for share in shares)
    probabilities = {name: top if name == found else next(rest) for name in sorted(TUMOR_CLASSES)}
    facts = Facts(
        group="", modality="MRI", region="head", expert="BRAINTUMOR",
        tumor_class=found, tumor=found != "no tumor", tumor_source=_SOURCE,
    )  # fmt: skip
    return facts, Annotation("random", "BRAINTUMOR", probabilities=probabilities)


def _film(rng: random.Random) -> tuple[Facts, Annotation]:
    probability = rng.choice((rng.uniform(0.0, 0.49), rng.uniform(0.51, 1.0)))
    facts = Facts(
        group="", modality="X-ray", region="chest", expert="PNEUMONIA",
        pneumonia=probability > 0.5, film_source=_SOURCE,
    )  # fmt: skip
    return facts, Annotation(
        "random", "PNEUMONIA", probabilities={"normal": 1 - probability, "pneumonia": probability}
    )


def _brain(rng: random.Random) -> tuple[Facts, Annotation]:
    visible, ml = rng.random() < 0.6, rng.uniform(*BRAIN_ML)
    facts = Facts(
        group="", modality="MRI", region="head", plane="axial", expert=BRAIN_EXPERT,
        brain=visible, brain_source=_SOURCE, brain_ml=ml if visible else None, brain_volume_source=_SOURCE,
    )  # fmt: skip
    return facts, _segmented(BRAIN_EXPERT, "", {(_BRAIN, _BRAIN_NAME): ml} if visible else {})


def _organs(rng: random.Random) -> tuple[Facts, Annotation]:
    shown = dict.fromkeys(rng.sample(_ORGANS, rng.randint(1, 6)))
    low, high = np.log(_ORGAN_ML)
    volumes = {label: float(np.exp(rng.uniform(low, high))) for label in shown}
    names = {name: (label, name) in shown for label, name in _ORGANS}
    facts = Facts(
        group="", modality="CT", region="abdomen", plane="axial", expert="ORGANS", expert_args="organs",
        organs=names, organ_source=_SOURCE, volumes_ml={name: ml for (_, name), ml in volumes.items()},
    )  # fmt: skip
    return facts, _segmented("ORGANS", "organs", volumes)


def _segmented(expert: str, args: str, volumes: dict[tuple[int, str], float]) -> Annotation:
    """An annotation whose only slice shows one voxel of each label."""
    ids = [label for label, _ in volumes]
    labels = np.array([0, *ids], np.uint16)[:, None, None]
    segments = tuple(
        Segment(label, name, 1, ml, 1, (i + 1, 0, 0, i + 2, 1, 1))
        for i, ((label, name), ml) in enumerate(volumes.items())
    )
    return Annotation("random", expert, args, segments=segments, labels=LabelMap.encode(labels, np.eye(4)))
