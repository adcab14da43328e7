"""Questions about one image, generated from known labels, with balanced answers.

Each question names the source of its label and the expert that can answer it. `oracle` marks questions whose
label is the map that was imported as the expert's record. They measure whether a model uses its expert, not
whether the expert is right, so they are reported in a separate table.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from vilam3_jax.data.examples import IMAGE_MARKER, Turn
from vilam3_jax.datasets.conversations import YES_NO

MODALITIES = ("CT", "MRI", "X-ray")
PLANES = ("axial", "coronal", "sagittal")
REGIONS = ("abdomen", "chest", "head")
TUMOR_CLASSES = ("glioma", "meningioma", "pituitary", "no tumor")
NONE_VISIBLE = "none"
# Round volumes in ml that the ranges of a volume question may start or end at.
VOLUME_STEPS = (5, 10, 20, 50, 100, 200, 300, 500, 750, 1000, 1250, 1500, 2000, 2500, 3000, 4000)
# The same for a brain.
BRAIN_STEPS = (700, 800, 900, 1000, 1100, 1200, 1300, 1400, 1500, 1600, 1700, 1800, 1900)
# A brain has 900 to 1,600 ml. The volume of a mask that includes the fluid around it is not asked about.
BRAIN_ML = (900.0, 1600.0)
_VOLUME_MARGIN = 0.12  # no limit closer to the true volume: rounding would decide the answer
_SLACK = 2  # largest lead of one answer over the rarest other one of its kind
# Largest lead for one organ in training: 3, plus 15 % of the questions about it.
_ORGAN_SLACK, _ORGAN_SHARE = 3, 0.15
_TRAINING_RANGES = 0.25  # share of possible questions about the volume of a brain
_LEAST_ORGANS = 4  # one question of each type, of which a short dialogue has a few

# The first phrase of each type is canonical: held-out questions use no other.
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
    "tumor_kind": ("Is a {name} tumor visible in this image?", "Does this image show a {name} tumor?"),
    "pneumonia": (
        "Does this film show pneumonia?",
        "Is there pneumonia on this film?",
        "Are there signs of pneumonia?",
    ),
    "brain_visible": ("Is the brain visible in this image?", "Does this image show the brain?"),
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
      answer: one of `options`; for `which_organs` a comma-separated subset.
      type: a key of `PHRASES`.
      label_source: source of the answer.
      options: permitted answers.
      expert, args: name of an expert that can answer it, or None, and the arguments of its call.
      oracle: the label is the map that the expert's record holds.
    """

    question: str
    answer: str
    type: str
    label_source: str
    options: tuple[str, ...]
    expert: str | None = None
    args: str = ""
    oracle: bool = False


@dataclasses.dataclass(frozen=True)
class Facts:
    """Known facts about one image. None or a missing key means unknown, and unknown facts are never asked.

    Attributes:
      group: the split group; answers are balanced over the questions of a whole split.
      modality, region, plane: one of `MODALITIES`, `REGIONS`, `PLANES`; films have no plane.
      position: third of the scan that holds the slice, in words for captions.
      organs: name → visible in this slice, without the uncertain ones.
      volumes_ml: name → volume in the whole scan in ml, for organs visible in this slice.
      tumor, pneumonia, brain: whether it is visible; the brain only in volumes.
      tumor_class: one of `TUMOR_CLASSES`, for films of the head.
      brain_ml: volume of the brain in the whole scan, ml.
      organ_source, tumor_source, film_source, brain_source, brain_volume_source: label sources of the organs,
        the tumor, pneumonia, the brain and its volume.
      organ_oracle, brain_oracle, brain_volume_oracle: the label is the expert's own record.
      expert, expert_args: the expert suited to this image, or None, and the arguments of its call.
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
    """Counts the answers so far, per key, and limits the lead of any one of them.

    A key is whatever must not give the answer away: the question type, or the type and the organ.
    """

    def __init__(self, slack: int = _SLACK, share: float = 0.0):
        """Limits leads to `slack` plus `share` of all answers of the key."""
        self.slack, self.share = slack, share
        self.counts: collections.Counter[tuple[Hashable, str]] = collections.Counter()

    def lead(self, key: Hashable, answer: str) -> int:
        """Lead of `answer`, "yes" or "no", over the other one."""
        return self.counts[key, answer] - self.counts[key, _yes_no(answer == "no")]

    def allows(self, key: Hashable, answer: str) -> bool:
        """Whether one more `answer` keeps its lead within the limit."""
        total = sum(self.counts[key, option] for option in YES_NO)
        return self.lead(key, answer) < self.slack + self.share * total

    def add(self, key: Hashable, answer: str) -> None:
        self.counts[key, answer] += 1


def volume_range(
    ml: float, rng: random.Random, wanted: int, steps: Sequence[int] = VOLUME_STEPS
) -> tuple[tuple[str, ...], str] | None:
    """Draws two limits of `steps` with `ml` below (`wanted` 0), between (1) or above (2) them.

    The limits vary between questions, so neither the organ's name nor its usual size gives the answer away.

    Returns:
      (options, answer), or None when no pair of `steps` leaves enough margin.
    """
    above = [step for step in steps if step >= ml * (1 + _VOLUME_MARGIN)]
    below = [step for step in steps if step <= ml * (1 - _VOLUME_MARGIN)]
    pairs = (
        list(itertools.combinations(above, 2)),
        list(itertools.product(below, above)),
        list(itertools.combinations(below, 2)),
    )[wanted]
    # Near limits only: "under 1500 ml" is no information about a 5 ml gland.
    pairs = sorted(pairs, key=lambda p: max(abs(p[0] - ml), abs(p[1] - ml)))[:3]
    if not pairs:
        return None
    low, high = rng.choice(pairs)
    options = (f"under {low} ml", f"{low} to {high} ml", f"over {high} ml")
    return options, options[wanted]


class QuestionMaker:
    """Generates the dialogues of a split, image by image, with balanced answers."""

    def __init__(self, rng: random.Random, *, training: bool, limit: int = 12):
        """Starts without any answer counted.

        Args:
          rng: source of every choice.
          training: vary the phrases, and balance yes and no for each organ separately. Held-out questions are
            balanced per scan instead, so that no image is dropped because an organ is visible in all of them;
            what a name alone gives away shows in the blank-image arm.
          limit: most questions in one dialogue.
        """
        self.rng, self.training, self.limit = rng, training, limit
        self.balance = Balance()
        self.organ_balance = Balance(_ORGAN_SLACK, _ORGAN_SHARE)
        self.unasked: collections.Counter[str] = collections.Counter()

    def dialogue(self, facts: Facts) -> list[Question]:
        """Returns the questions about one image.

        Questions that an expert can answer are adjacent. The general ones precede or follow them at random,
        so that neither an answer nor a call can be predicted from earlier questions without the image. In
        training they mostly follow: what a first question needs is harder to learn than its answer.
        """
        answerable = [*self._film(facts), *self._brain(facts)]
        film = facts.plane is None
        # Not of MRI volumes: there is an expert for films, and a slice looks like one.
        if facts.tumor is not None and (film or facts.modality == "CT"):
            answerable += self._ask_balanced(
                facts, "tumor_present", facts.tumor, facts.tumor_source, expert=film
            )
        general = self._general(facts)
        answerable += self._organs(facts, max(_LEAST_ORGANS, self.limit - len(answerable) - len(general)))
        self.rng.shuffle(answerable)
        if answerable:
            general = general[: max(1, self.limit // 3)]
            answerable = answerable[: self.limit - len(general)]
        answerable.sort(key=lambda q: q.expert is None)
        general_first = self.rng.random() < (0.3 if self.training else 0.5)
        return general + answerable if general_first else answerable + general

    def _ask(
        self,
        facts: Facts,
        kind: str,
        answer: str,
        options: Sequence[str],
        source: str,
        *,
        expert: bool = True,
        oracle: bool = False,
        **words: str,
    ) -> Question:
        phrases = PHRASES[kind]
        phrase = self.rng.choice(phrases) if self.training else phrases[0]
        has_expert = expert and facts.expert is not None
        return Question(
            question=phrase.format(choices=", ".join(options), **words),
            answer=answer,
            type=kind,
            label_source=source,
            options=tuple(options),
            expert=facts.expert if has_expert else None,
            args=facts.expert_args if has_expert else "",
            oracle=oracle and has_expert,
        )

    def _ask_balanced(self, facts: Facts, kind: str, truth: bool, source: str, **kw: Any) -> list[Question]:
        answer = _yes_no(truth)
        # Films, CT and MRI volumes are told apart at a glance, so each is balanced separately.
        key = (kind, "film" if facts.plane is None else facts.modality)
        if not self.balance.allows(key, answer):
            self.unasked[f"{kind}: {answer} already in the majority"] += 1
            return []
        self.balance.add(key, answer)
        return [self._ask(facts, kind, answer, YES_NO, source, **kw)]

    def _general(self, facts: Facts) -> list[Question]:
        answers = [
            ("modality", facts.modality, MODALITIES, "image header"),
            ("plane", facts.plane, PLANES, "image header"),
            ("region", facts.region, REGIONS, "sample list"),
        ]
        asked = [self._ask(facts, *row, expert=False) for row in answers if row[1] is not None]
        self.rng.shuffle(asked)
        return asked

    def _film(self, facts: Facts) -> list[Question]:
        asked = []
        if facts.pneumonia is not None:
            asked.append(self._ask(facts, "pneumonia", _yes_no(facts.pneumonia), YES_NO, facts.film_source))
        if facts.tumor_class is not None:
            source, options = facts.tumor_source, list(TUMOR_CLASSES)
            if self.training:
                self.rng.shuffle(options)
            asked.append(self._ask(facts, "tumor_class", facts.tumor_class, options, source))
            kinds = [name for name in TUMOR_CLASSES if name != "no tumor"]
            wrong = [name for name in kinds if name != facts.tumor_class]
            # In training all of them: with one yes for every no, "a tumor" would be enough to read.
            names = wrong if self.training else [self.rng.choice(wrong)]
            names = [*names, facts.tumor_class] if facts.tumor_class in kinds else names[:1]
            for name in names:
                answer = _yes_no(name == facts.tumor_class)
                asked.append(self._ask(facts, "tumor_kind", answer, YES_NO, source, name=name))
        return asked

    def _brain(self, facts: Facts) -> list[Question]:
        if facts.brain is None:
            return []
        visible, source = "brain_visible", facts.brain_source
        expert = {"expert": facts.expert == "BRAINSEG", "oracle": facts.brain_oracle}
        asked = self._ask_balanced(facts, visible, facts.brain, source, **expert)
        # Few in training: ranges are hard to learn and would crowd out the other questions.
        wanted = not self.training or self.rng.random() < _TRAINING_RANGES
        low, high = BRAIN_ML
        if facts.brain_ml is not None and low <= facts.brain_ml <= high and facts.brain and wanted:
            source, oracle = facts.brain_volume_source, facts.brain_volume_oracle
            asked += self._volume(facts, "brain_volume_range", "brain", facts.brain_ml, source, oracle)
        return asked

    def _volume(
        self, facts: Facts, kind: str, name: str, ml: float, source: str, oracle: bool
    ) -> list[Question]:
        steps = BRAIN_STEPS if name == "brain" else VOLUME_STEPS
        order = sorted(range(3), key=lambda w: (self.balance.counts[kind, str(w)], self.rng.random()))
        for wanted in order:
            if (found := volume_range(ml, self.rng, wanted, steps)) is not None:
                options, answer = found
                self.balance.add(kind, str(wanted))
                return [self._ask(facts, kind, answer, options, source, oracle=oracle, name=name)]
        return []

    def _organs(self, facts: Facts, room: int) -> list[Question]:
        if not facts.organs or room <= 0:
            return []
        source, oracle = facts.organ_source, facts.organ_oracle
        asked: list[Question] = []
        if facts.volumes_ml and room >= 3:
            name = self.rng.choice(sorted(facts.volumes_ml))
            asked += self._volume(facts, "organ_volume_range", name, facts.volumes_ml[name], source, oracle)
        if len(facts.organs) >= 3 and room >= 3:
            asked.append(self._which_organs(facts))
        for name, visible in self._choose_organs(facts, room - len(asked)):
            answer = _yes_no(visible)
            asked.append(self._ask(facts, "organ_present", answer, YES_NO, source, oracle=oracle, name=name))
        return asked

    def _which_organs(self, facts: Facts) -> Question:
        """Asks which of three organs are visible; the number varies between none and all."""
        seen = sorted(name for name, visible in facts.organs.items() if visible)
        unseen = sorted(name for name, visible in facts.organs.items() if not visible)
        possible = [n for n in range(4) if n <= len(seen) and 3 - n <= len(unseen)]
        kind, oracle = "which_organs", facts.organ_oracle
        count = min(possible, key=lambda n: (self.balance.counts[kind, str(n)], self.rng.random()))
        self.balance.add(kind, str(count))
        names = self.rng.sample(seen, count) + self.rng.sample(unseen, 3 - count)
        self.rng.shuffle(names)
        answer = ", ".join(name for name in names if facts.organs[name]) or NONE_VISIBLE
        listed = f"{names[0]}, {names[1]} and {names[2]}"
        options = (*names, NONE_VISIBLE)
        return self._ask(facts, kind, answer, options, facts.organ_source, oracle=oracle, names=listed)

    def _choose_organs(self, facts: Facts, count: int) -> list[tuple[str, bool]]:
        """Chooses organs to ask about: about as many visible as not, the least balanced names first."""
        # In training, each name is also balanced over all scans of one modality.
        scope = facts.modality if self.training else facts.group
        key = ("organs", scope)
        chosen: list[tuple[str, bool]] = []
        left = dict(facts.organs)
        while left and len(chosen) < count:
            # A biased coin: exact halves would make the last answer predictable.
            lead = self.balance.lead(key, "yes")
            truth = self.rng.random() < (0.5 if lead == 0 else 0.25 if lead > 0 else 0.75)
            if not self.balance.allows(key, _yes_no(truth)):
                truth = not truth
            found = self._least_balanced(left, truth, scope)
            if found is None:
                truth = not truth
                allowed = self.balance.allows(key, _yes_no(truth))
                if not allowed or (found := self._least_balanced(left, truth, scope)) is None:
                    self.unasked["organ_present: would unbalance the answers"] += len(left)
                    break
            self.balance.add(key, _yes_no(truth))
            self.organ_balance.add((scope, found), _yes_no(truth))
            chosen.append((found, truth))
            del left[found]
        return chosen

    def _least_balanced(self, left: Mapping[str, bool], truth: bool, scope: str) -> str | None:
        answer = _yes_no(truth)
        names = sorted(name for name, visible in left.items() if visible == truth)
        if self.training:
            names = [n for n in names if self.organ_balance.allows((scope, n), answer)]
        leads = {n: (self.organ_balance.lead((scope, n), answer), self.rng.random()) for n in names}
        return min(leads, key=lambda n: leads[n], default=None)


def dialogue_turns(questions: Sequence[Question]) -> tuple[Turn, ...]:
    """Returns user and assistant turns; the image marker precedes the first question."""
    turns: list[Turn] = []
    for item in questions:
        head = "" if turns else f"{IMAGE_MARKER}\n"
        turns += [Turn("user", head + item.question), Turn("assistant", item.answer, True)]
    return tuple(turns)


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"
