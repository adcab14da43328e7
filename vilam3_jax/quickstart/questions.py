"""Questions about one image, made from labels that are known, with balanced answers.

A question says where its label comes from and whether an expert could answer it. `oracle` marks
those whose label is the very map that was imported for the expert: they show that a model reads its
expert, not that the expert is right, and are reported in a table of their own.
"""

from __future__ import annotations

import collections
import dataclasses
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from vilam3_jax.data.examples import IMAGE_MARKER, Turn

YES_NO = ("yes", "no")
MODALITIES = ("CT", "MRI", "X-ray")
PLANES = ("axial", "coronal", "sagittal")
REGIONS = ("abdomen", "chest", "head")
TUMOR_CLASSES = ("glioma", "meningioma", "pituitary", "no tumor")
NONE_VISIBLE = "none"
# Round sizes in ml that a volume question may compare with.
VOLUME_STEPS = (5, 10, 20, 50, 100, 200, 300, 500, 750, 1000, 1250, 1500, 2000, 2500, 3000, 4000)
# A size this close to a limit is not asked about: rounding would decide the answer.
_VOLUME_MARGIN = 0.12
_SLACK = 2  # by how much one answer may lead the rarest other one of its kind,
_ORGAN_SLACK, _ORGAN_SHARE = (
    3,
    0.15,
)  # and for one organ while training: 3 and 15 % of the times it was asked for

# The first wording of each type is the canonical one: held-out questions use no other.
PHRASES: dict[str, tuple[str, ...]] = {
    "modality": (
        "What imaging modality is this?",
        "Which imaging modality was used?",
        "What kind of scan is this?",
    ),
    "plane": (
        "In which plane is this slice?",
        "Is this slice axial, coronal or sagittal?",
        "What is the plane of this slice?",
    ),
    "region": (
        "Which body region is shown?",
        "What part of the body is this?",
        "Is this the abdomen, the chest or the head?",
    ),
    "organ_present": (
        "Is the {name} visible in this slice?",
        "Does this slice show the {name}?",
        "Can you see the {name} here?",
    ),
    "which_organs": (
        "Which of {names} are visible in this slice?",
        "Name those of {names} that are visible here.",
    ),
    "organ_volume_range": (
        "What is the volume of the {name} in this scan? Options: {choices}.",
        "How large is the {name} in this scan? Options: {choices}.",
    ),
    "tumor_present": (
        "Is a tumor visible in this image?",
        "Does this image show a tumor?",
        "Can you see a tumor?",
    ),
    "tumor_class": (
        "What does this brain image show? Options: {choices}.",
        "Which of these fits the brain image: {choices}?",
    ),
    "tumor_kind": (
        "Is a {name} tumor visible in this image?",
        "Does this image show a {name} tumor?",
    ),
    "pneumonia": (
        "Does this film show pneumonia?",
        "Is there pneumonia on this film?",
        "Are there signs of pneumonia?",
    ),
    "brain_visible": (
        "Is the brain visible in this image?",
        "Does this image show the brain?",
    ),
    "brain_volume_range": (
        "What is the volume of the brain in this scan? Options: {choices}.",
        "How large is the brain in this scan? Options: {choices}.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question with its true answer.

    Attributes:
      question: as put to the model.
      answer: one of `options`, or for `which_organs` a comma-separated part of them.
      type: a key of `PHRASES`.
      label_source: whose word the answer is.
      options: the answers that may be given.
      expert: name of an expert that can answer it, or None.
      args: the arguments that expert is called with.
      oracle: the label is the very map that the expert's record holds.
    """

    question: str
    answer: str
    type: str
    label_source: str
    options: tuple[str, ...]
    expert: str | None = None
    args: str = ""
    oracle: bool = False

    def to_meta(self) -> dict[str, Any]:
        """Returns the plain form kept in `Example.meta["qa"]`."""
        return dataclasses.asdict(self) | {"options": list(self.options)}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of one image; what is None or missing is unknown and never asked.

    Attributes:
      group: the split group; answers are balanced within the questions of a whole split.
      modality: one of `MODALITIES`.
      region: one of `REGIONS`.
      plane: one of `PLANES`; None for films.
      position: which third of the scan a slice is in, in words for captions.
      organs: name -> visible in this slice. Names that are doubtful here are missing.
      volumes_ml: name -> volume in the whole scan, in ml, for organs visible here.
      organ_source: whose word `organs` and `volumes_ml` are.
      organ_oracle: the expert's record is exactly that source.
      tumor: a tumour is in this image.
      tumor_source: whose word `tumor`, `tumor_class` are.
      tumor_class: one of `TUMOR_CLASSES`, for films of the head.
      pneumonia: for chest films.
      film_source: whose word `pneumonia` is.
      brain: the brain is in this image.
      brain_source: whose word `brain` is.
      brain_oracle: `brain` is the expert's own record.
      brain_ml: volume of the brain in the whole scan, ml.
      brain_volume_source: whose word `brain_ml` is.
      brain_volume_oracle: `brain_ml` is the expert's own record.
      expert: the expert that fits this image, or None.
      expert_args: what it is called with.
    """

    group: str
    modality: str
    region: str
    plane: str | None = None
    position: str = ""
    organs: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    volumes_ml: Mapping[str, float] = dataclasses.field(default_factory=dict)
    organ_source: str = ""
    organ_oracle: bool = False
    tumor: bool | None = None
    tumor_source: str = ""
    tumor_class: str | None = None
    pneumonia: bool | None = None
    film_source: str = ""
    brain: bool | None = None
    brain_source: str = ""
    brain_oracle: bool = False
    brain_ml: float | None = None
    brain_volume_source: str = ""
    brain_volume_oracle: bool = False
    expert: str | None = None
    expert_args: str = ""


class Balance:
    """Counts answers given so far and says which one a question of the same kind should have next.

    A key is whatever must not be guessable from the question alone: the type, or type and organ.
    """

    def __init__(self, slack: int = _SLACK, share: float = 0.0):
        """Starts at nothing; a lead may reach `slack` plus `share` of all answers of the key."""
        self.slack, self.share = slack, share
        self.counts: collections.Counter[tuple[Hashable, str]] = collections.Counter()

    def surplus(self, key: Hashable, answer: str, options: Sequence[str] = YES_NO) -> int:
        """By how many `answer` leads the rarest of the other `options`."""
        others = min(self.counts[key, option] for option in options if option != answer)
        return self.counts[key, answer] - others

    def allows(self, key: Hashable, answer: str, options: Sequence[str] = YES_NO) -> bool:
        """Whether one more `answer` keeps its lead within the slack."""
        total = sum(self.counts[key, option] for option in options)
        return self.surplus(key, answer, options) < self.slack + self.share * total

    def add(self, key: Hashable, answer: str) -> None:
        """Counts a question that was asked."""
        self.counts[key, answer] += 1


def volume_options(low: int, high: int) -> tuple[str, str, str]:
    """The three ranges that two limits in ml make, in the words used everywhere."""
    return (f"under {low} ml", f"{low} to {high} ml", f"over {high} ml")


def volume_range(ml: float, rng: random.Random, wanted: int) -> tuple[tuple[str, ...], str] | None:
    """Picks two limits so that `ml` falls into the range `wanted`.

    The limits vary from question to question, so neither the organ's name nor its usual size
    gives the answer away.

    Args:
      ml: true volume.
      rng: source of the choice.
      wanted: 0 under the lower limit, 1 between, 2 over the higher.

    Returns:
      (options, answer), or None when no pair of `VOLUME_STEPS` leaves enough margin.
    """
    above = [step for step in VOLUME_STEPS if step >= ml * (1 + _VOLUME_MARGIN)]
    below = [step for step in VOLUME_STEPS if step <= ml * (1 - _VOLUME_MARGIN)]
    pairs = {
        0: [(a, b) for i, a in enumerate(above) for b in above[i + 1 :]],
        1: [(a, b) for a in below for b in above],
        2: [(a, b) for i, a in enumerate(below) for b in below[i + 1 :]],
    }[wanted]
    # Near limits only: "under 1500 ml" says nothing of a 5 ml gland.
    pairs = sorted(pairs, key=lambda p: max(abs(p[0] - ml), abs(p[1] - ml)))[:3]
    if not pairs:
        return None
    options = volume_options(*rng.choice(pairs))
    return options, options[wanted]


class QuestionMaker:
    """Makes the dialogue of one image after another, keeping the answers of a split balanced."""

    def __init__(self, rng: random.Random, *, training: bool, limit: int = 12):
        """Starts with nothing asked.

        Args:
          rng: source of every choice; equal seeds give equal questions.
          training: vary the wording and balance yes against no for every organ by itself.
            Held-out questions are balanced as a whole, so that no image is left out only because
            an organ is in all of them; what a name alone gives away shows in the blank-image arm.
          limit: most questions in one dialogue.
        """
        self.rng, self.training, self.limit = rng, training, limit
        self.balance = Balance()
        self.organ_balance = Balance(_ORGAN_SLACK, _ORGAN_SHARE)
        self.unasked: collections.Counter[str] = collections.Counter()

    def dialogue(self, facts: Facts) -> list[Question]:
        """Returns the questions of one image.

        Those that an expert can answer stand together. By a coin the others come before them, so that neither
        an answer nor a call can be told from the questions before it alone: the picture is needed.
        """
        first = [
            *self._film(facts),
            *self._brain(facts),
            *self._tumor(facts),
        ]
        general = self._general(facts)
        room = self.limit - len(first) - len(general)
        answerable = first + self._organs(facts, room)
        self.rng.shuffle(answerable)
        answerable.sort(key=lambda q: q.expert is None)
        return general + answerable if self.rng.random() < 0.5 else answerable + general

    def _ask(self, facts: Facts, kind: str, answer: str, options: Sequence[str], source: str,
             *, expert: bool = False, oracle: bool = False, **words: str) -> Question:  # fmt: skip
        phrases = PHRASES[kind]
        phrase = self.rng.choice(phrases) if self.training else phrases[0]
        known = expert and facts.expert is not None
        return Question(
            question=phrase.format(**words),
            answer=answer,
            type=kind,
            label_source=source,
            options=tuple(options),
            expert=facts.expert if known else None,
            args=facts.expert_args if known else "",
            oracle=oracle and known,
        )

    def _balanced(self, facts: Facts, kind: str, truth: bool, source: str, **kw: Any) -> list[Question]:
        answer = "yes" if truth else "no"
        # Films and volumes differ at a glance, and so do CT and MRI volumes: each has its own scale.
        key = (kind, "film" if facts.plane is None else facts.modality)
        if not self.balance.allows(key, answer):
            self.unasked[f"{kind}: {answer} already in the majority"] += 1
            return []
        self.balance.add(key, answer)
        return [self._ask(facts, kind, answer, YES_NO, source, **kw)]

    def _general(self, facts: Facts) -> list[Question]:
        geometry = "image header"
        out = [self._ask(facts, "modality", facts.modality, MODALITIES, geometry)]
        if facts.plane is not None:
            out.append(self._ask(facts, "plane", facts.plane, PLANES, geometry))
        out.append(self._ask(facts, "region", facts.region, REGIONS, "sample list"))
        self.rng.shuffle(out)
        return out

    def _film(self, facts: Facts) -> list[Question]:
        out = []
        if facts.pneumonia is not None:
            answer = "yes" if facts.pneumonia else "no"
            out.append(self._ask(facts, "pneumonia", answer, YES_NO, facts.film_source, expert=True))
        if facts.tumor_class is not None:
            options = list(TUMOR_CLASSES)
            if self.training:
                self.rng.shuffle(options)
            out.append(
                self._ask(
                    facts, "tumor_class", facts.tumor_class, options, facts.tumor_source,
                    expert=True, choices=", ".join(options),
                )
            )  # fmt: skip
            kinds = [c for c in TUMOR_CLASSES if c != "no tumor"]
            others = [c for c in kinds if c != facts.tumor_class]
            asked = [self.rng.choice(others)]
            if facts.tumor_class in kinds:
                asked.append(facts.tumor_class)
            for kind in asked:
                answer = "yes" if kind == facts.tumor_class else "no"
                out.append(
                    self._ask(
                        facts, "tumor_kind", answer, YES_NO, facts.tumor_source,
                        expert=True, name=kind,
                    )
                )  # fmt: skip
        return out

    def _brain(self, facts: Facts) -> list[Question]:
        out = []
        if facts.brain is not None:
            out += self._balanced(
                facts, "brain_visible", facts.brain, facts.brain_source,
                expert=facts.expert == "BRAINSEG", oracle=facts.brain_oracle,
            )  # fmt: skip
        if facts.brain_ml is not None and facts.brain:
            out += self._volume(
                facts, "brain_volume_range", "brain", facts.brain_ml, facts.brain_volume_source,
                facts.brain_volume_oracle,
            )  # fmt: skip
        return out

    def _tumor(self, facts: Facts) -> list[Question]:
        if facts.tumor is None:
            return []
        return self._balanced(
            facts, "tumor_present", facts.tumor, facts.tumor_source, expert=facts.plane is None
        )

    def _volume(self, facts: Facts, kind: str, name: str, ml: float, source: str,
                oracle: bool = False) -> list[Question]:  # fmt: skip
        order = sorted(range(3), key=lambda w: (self.balance.counts[kind, str(w)], self.rng.random()))
        for wanted in order:
            found = volume_range(ml, self.rng, wanted)
            if found is None:
                continue
            options, answer = found
            self.balance.add(kind, str(wanted))
            return [
                self._ask(
                    facts, kind, answer, options, source, expert=True, oracle=oracle,
                    name=name, choices=", ".join(options),
                )
            ]  # fmt: skip
        return []

    def _organs(self, facts: Facts, room: int) -> list[Question]:
        if not facts.organs or room <= 0:
            return []
        source, oracle = facts.organ_source, facts.organ_oracle
        out: list[Question] = []
        if facts.volumes_ml and room >= 3:
            name = self.rng.choice(sorted(facts.volumes_ml))
            out += self._volume(facts, "organ_volume_range", name, facts.volumes_ml[name], source, oracle)
        if len(facts.organs) >= 3 and room >= 3:
            out.append(self._which(facts))
        per_slice = room - len(out)
        for name, visible in self._choose(facts, per_slice):
            out.append(
                self._ask(
                    facts, "organ_present", "yes" if visible else "no", YES_NO, source,
                    expert=True, oracle=oracle, name=name,
                )
            )  # fmt: skip
        return out

    def _which(self, facts: Facts) -> Question:
        """Asks for a part of three names; how many are visible varies from none to all."""
        seen = sorted(name for name, visible in facts.organs.items() if visible)
        unseen = sorted(name for name, visible in facts.organs.items() if not visible)
        possible = [n for n in range(4) if n <= len(seen) and 3 - n <= len(unseen)]
        key = "which_organs"
        count = min(possible, key=lambda n: (self.balance.counts[key, str(n)], self.rng.random()))
        self.balance.add(key, str(count))
        names = self.rng.sample(seen, count) + self.rng.sample(unseen, 3 - count)
        self.rng.shuffle(names)
        answer = ", ".join(n for n in names if facts.organs[n]) or NONE_VISIBLE
        return self._ask(
            facts, "which_organs", answer, (*names, NONE_VISIBLE), facts.organ_source,
            expert=True, oracle=facts.organ_oracle, names=f"{names[0]}, {names[1]} and {names[2]}",
        )  # fmt: skip

    def _choose(self, facts: Facts, count: int) -> list[tuple[str, bool]]:
        """Picks organs to ask for: nearly as many visible as not, the least balanced names first."""
        # While training a name's own answers are balanced too, over all scans that one modality has.
        scope = facts.modality if self.training else facts.group
        chosen: list[tuple[str, bool]] = []
        left = dict(facts.organs)
        while left and len(chosen) < count:
            # A coin with a pull to the middle: exact halves would let the last answer be counted out.
            lead = self.balance.surplus(("organs", scope), "yes")
            truth = self.rng.random() < (0.5 if lead == 0 else 0.25 if lead > 0 else 0.75)
            if not self.balance.allows(("organs", scope), "yes" if truth else "no"):
                truth = not truth
            found = self._next(left, truth, scope)
            if found is None:
                truth = not truth
                allowed = self.balance.allows(("organs", scope), "yes" if truth else "no")
                if not allowed or (found := self._next(left, truth, scope)) is None:
                    self.unasked["organ_present: would unbalance the answers"] += len(left)
                    break
            answer = "yes" if truth else "no"
            self.balance.add(("organs", scope), answer)
            self.organ_balance.add((scope, found), answer)
            chosen.append((found, truth))
            del left[found]
        return chosen

    def _next(self, left: Mapping[str, bool], truth: bool, scope: str) -> str | None:
        answer = "yes" if truth else "no"
        names = sorted(name for name, visible in left.items() if visible == truth)
        if self.training:
            names = [n for n in names if self.organ_balance.allows((scope, n), answer)]
        if not names:
            return None
        return min(names, key=lambda n: (self.organ_balance.surplus((scope, n), answer), self.rng.random()))


def dialogue_turns(questions: Sequence[Question], opening: str = "") -> tuple[Turn, ...]:
    """Returns user and assistant turns; the image stands before the first question.

    Args:
      questions: at least one, in the order of the dialogue.
      opening: said between the image and the first question.
    """
    turns: list[Turn] = []
    for position, item in enumerate(questions):
        head = f"{IMAGE_MARKER}\n{opening}" if position == 0 else ""
        turns += [Turn("user", head + item.question), Turn("assistant", item.answer, True)]
    return tuple(turns)
