"""What a rule sees of one record: its images, their annotations, and a random generator.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

from vilam3_jax.data.caches import ByteLRU
from vilam3_jax.data.examples import Example, RequestImage
from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.dialogues.phrases import modality_of, said
from vilam3_jax.data.experts.dialogues.pools import pool
from vilam3_jax.data.experts.exchange import DEFAULT_STYLE, Result, Style
from vilam3_jax.data.experts.labels import component_counts, is_lesion, label_universe
from vilam3_jax.data.experts.overlays import palette_of
from vilam3_jax.data.experts.record import Annotation, memory_bytes
from vilam3_jax.data.experts.wording import Plane, told_class, told_doubts, told_labels, told_words

MIN_PIXELS = 20
_REFERENCE = ("VISTA3D", "BRATS", "CXR")  # the experts that the reference has dialogues with
DICOM_CODES = {"MRI": "MR", "CXR": "DX"}
_CACHE_BYTES = 256 << 20


class Unfit(Exception):
    """A rule makes no dialogue of a record; the message says why."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What dialogues are made with.

    Attributes:
      cards: of the experts that the model is told of.
      find: (input key, expert, arguments) to the annotation, or None.
      style: how results are told.
      parity: the reference's own sentences, for the experts that it has.
      min_lesion_ml: mean volume of the parts of a lesion from which on they are counted: specks make a count
        doubtful.
      min_pixels: pixels of a lesion on a slice from which on it is visible; with fewer, nobody asks.
    """

    cards: tuple[Card, ...]
    find: Callable[[str, str, str], Annotation | None]
    style: Style = DEFAULT_STYLE
    parity: bool = False
    min_lesion_ml: float = 0.1
    min_pixels: int = MIN_PIXELS

    @classmethod
    def of(cls, cards: Sequence[Card], store: Any, **fields: Any) -> Setting:
        """A setting that keeps the annotations used last.

        Args:
          cards: of the experts.
          store: with `get` of an `AnnotationStore`.
          fields: of the setting.
        """
        cache: ByteLRU[Annotation | None] = ByteLRU(_CACHE_BYTES, memory_bytes)
        return cls(tuple(cards), lambda *key: cache.get(key, lambda: store.get(*key)), **fields)


@dataclasses.dataclass(frozen=True)
class Label:
    """A label that an expert shows on a slice.

    Attributes:
      label_id: after merging.
      name: as it is told.
      pixels: on the slice.
      ml: in the whole scan.
      colour: of the overlay.
    """

    label_id: int
    name: str
    pixels: int
    ml: float
    colour: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one expert said of a record, and the card it goes by.

    Attributes:
      card: of the expert.
      args: of the call.
      images: what the expert sees.
      annotation: what it said, failed ones too.
      plane: the slice that the model sees.
    """

    card: Card
    args: str
    images: tuple[RequestImage, ...]
    annotation: Annotation
    plane: Plane

    @property
    def ok(self) -> bool:
        """Whether there is a result that can be shown."""
        return self.annotation.status == "ok" and self.problem is None

    @property
    def problem(self) -> str | None:
        """Why the result cannot be shown, or None."""
        return Result(self.annotation, self.card.task, self.plane).problem()

    @property
    def segments(self) -> bool:
        """Whether the expert marks structures, not classes."""
        return self.card.task == "segmentation"

    @functools.cached_property
    def labels(self) -> tuple[Label, ...]:
        """What is marked on the slice, by label id."""
        told = told_labels(self.annotation, self.plane)
        colours = palette_of([i for i, *_ in told])
        return tuple(Label(i, name, n, ml, colours[i]) for i, name, n, ml in told)

    @functools.cached_property
    def universe(self) -> dict[int, str]:
        """Label id to name of all that the expert could have marked."""
        known = label_universe(self.annotation.expert, self.args) or self.annotation.label_names
        return {i: told_words(name) for i, name in known.items()}

    @property
    def doubts(self) -> list[str]:
        """What the checks doubt."""
        return told_doubts(self.annotation.verdicts)

    @property
    def implausible(self) -> bool:
        """Whether a check failed: the result must not serve as ground truth."""
        return any(verdict.status == "fail" for verdict in self.annotation.verdicts)

    def lesions(self) -> dict[int, str]:
        """Label id to name of the lesions that the expert could have marked."""
        return {i: name for i, name in self.universe.items() if is_lesion(name)}

    def parts(self, label: Label) -> int:
        """How many separate parts a label has in the scan."""
        return component_counts(self.annotation)[label.label_id]


class Scene:
    """One record, met at one place of the stream.

    Attributes:
      record: as it is stored.
      setting: what the dialogue is made with.
      spoken: whether experts are on; otherwise only questions that the images answer.
      rng: makes every random choice of the dialogue.
      modality: `CT`, `MRI` or `CXR`, or what the record states.
    """

    def __init__(self, record: Example, setting: Setting, rng: random.Random, spoken: bool = True) -> None:
        self.record, self.setting, self.rng, self.spoken = record, setting, rng, spoken
        self.modality = modality_of(str(record.meta.get("modality", "")))

    @property
    def plane(self) -> Plane:
        """The slice that the model sees, of the first image."""
        image = self.record.images[0]
        return Plane(image.axis, image.index)

    @property
    def roles(self) -> list[str]:
        """Of the images, in their order; '' for a single one."""
        roles = self.record.meta.get("roles")
        return [str(role) for role in roles] if roles else [""] * len(self.record.images)

    @property
    def shown(self) -> str:
        """What stands before the first question: the image markers."""
        code = DICOM_CODES.get(self.modality, self.modality)
        return self.setting.style.wording.inputs(self.roles, code)

    def pick(self, file: str, /, *path: str, **words: str) -> str:
        """One text of a pool, with its placeholders filled."""
        if "name" in words:
            words["name"] = said(words["name"])
        texts: Any = pool(file)
        for step in path:
            texts = texts[step]
        return self.rng.choice(texts).format(**words)

    @functools.cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What experts of this modality said of this record, in the order of cards and arguments."""
        found = []
        for card in self.setting.cards:
            if self.setting.parity and card.name not in _REFERENCE:
                continue
            images = self._images_for(card) if modality_of(card.modality) == self.modality else None
            if images is None:
                continue
            try:
                key = self.record.input_key(images)
            except ValueError as error:
                raise Unfit(f"{error}, so no annotation can be looked up") from None
            for args in card.args or ("",):
                annotation = self.setting.find(key, card.name, args)
                if annotation is not None:
                    image = self.record.images[images[0].image]
                    plane = Plane(image.axis, image.index)
                    found.append(Finding(card, args, images, annotation, plane))
        return tuple(found)

    def classes_of(self, finding: Finding) -> dict[str, float]:
        """Class as it is told, to the probability that it is told by."""
        told = self.setting.style.wording.told_probabilities(finding.annotation)
        return {told_class(name): p for name, p in told.items()}

    def positives(self, finding: Finding) -> list[str]:
        """Classes that are told as `yes`."""
        return [name for name, p in self.classes_of(finding).items() if p > self.setting.style.threshold]

    def usable(self, what: str, fits: Callable[[Finding], bool]) -> list[Finding]:
        """The results that may serve as ground truth.

        Args:
          what: what is looked for, for the message.
          fits: which results qualify.

        Raises:
          Unfit: none does.
        """
        found = [f for f in self.findings if f.ok and fits(f) and not f.implausible and not self.doubted(f)]
        if not found:
            failures = sum(f.annotation.status == "failed" for f in self.findings if fits(f))
            raise Unfit(f"no usable annotation of {what}" + (f" ({failures} failed)" if failures else ""))
        return found

    def doubted(self, finding: Finding) -> bool:
        """Whether the model is told of doubts; that is for the rule `expert_doubted`."""
        return self.setting.style.verdicts and bool(finding.doubts)

    def _images_for(self, card: Card) -> tuple[RequestImage, ...] | None:
        if card.roles == ("",):
            return (RequestImage(),) if len(self.record.images) == 1 else None
        roles = self.roles
        if not set(card.roles) <= set(roles):
            return None
        return tuple(RequestImage(roles.index(role), role) for role in card.roles)
