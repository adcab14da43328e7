"""The input of a rule: the images of one record, their annotations, and a random generator."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

from vilam3_jax.data.caches import ByteLRU
from vilam3_jax.data.examples import Example, RequestImage
from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.dialogues.phrases import modality_of, pool, said
from vilam3_jax.data.experts.exchange import DEFAULT_STYLE, Result, Style
from vilam3_jax.data.experts.labels import component_counts, is_lesion, label_universe
from vilam3_jax.data.experts.overlays import palette_of
from vilam3_jax.data.experts.record import Annotation, memory_bytes
from vilam3_jax.data.experts.wording import Plane, class_name, doubt_messages, sanitized, visible_labels

_REFERENCE = ("VISTA3D", "BRATS", "CXR")  # experts with dialogues in the reference
_DICOM_CODES = {"MRI": "MR", "CXR": "DX"}
_CACHE_BYTES = 256 << 20


class Unfit(Exception):
    """A rule does not fit a record; the message states the reason."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """The options of dialogues."""

    cards: tuple[Card, ...]  # cards of the experts in the prompt
    # Maps (input key, expert, arguments) to the annotation, or None.
    find: Callable[[str, str, str], Annotation | None]
    style: Style = DEFAULT_STYLE  # how results are presented
    parity: bool = False  # use the reference's sentences and only its experts
    # Smallest mean volume of a lesion's components that are counted: specks make a count unreliable.
    min_lesion_ml: float = 0.1
    # Smallest area of a lesion on a slice, in pixels, that a question may ask about.
    min_pixels: int = 20

    @classmethod
    def of(cls, cards: Sequence[Card], store: Any, **fields: Any) -> Setting:
        """A setting with a cache in front of `store`, which has the `get` of an `AnnotationStore`."""
        cache: ByteLRU[Annotation | None] = ByteLRU(_CACHE_BYTES, memory_bytes)
        return cls(tuple(cards), lambda *key: cache.get(key, lambda: store.get(*key)), **fields)


@dataclasses.dataclass(frozen=True)
class Label:
    """A label that an expert shows on a slice."""

    label_id: int  # after merging
    name: str  # sanitized
    pixels: int  # on the slice
    ml: float  # in the whole scan
    colour: str  # in the overlay


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredResult(Result):
    """An expert's annotation of a record, possibly a failed one, and the call that returns it."""

    card: Card
    args: str
    images: tuple[RequestImage, ...]

    @property
    def ok(self) -> bool:
        """Whether the result can be shown."""
        return self.annotation.status == "ok" and self.problem() is None

    @property
    def is_segmentation(self) -> bool:
        """Whether the expert marks structures instead of classifying."""
        return self.task == "segmentation"

    @functools.cached_property
    def labels(self) -> tuple[Label, ...]:
        """The labels on the slice, by label id."""
        visible = visible_labels(self.annotation, self.plane)
        colours = palette_of([i for i, *_ in visible])
        return tuple(Label(i, name, n, ml, colours[i]) for i, name, n, ml in visible)

    @functools.cached_property
    def universe(self) -> dict[int, str]:
        """Label id to name of all labels that the expert could have marked."""
        known = label_universe(self.annotation.expert, self.args) or self.annotation.label_names
        return {i: sanitized(name) for i, name in known.items()}

    @property
    def doubts(self) -> list[str]:
        """The doubts that checks raised, see `wording.doubt_messages`."""
        return doubt_messages(self.annotation.verdicts)

    @property
    def implausible(self) -> bool:
        """Whether a check failed, so that the result must not serve as ground truth."""
        return any(verdict.status == "fail" for verdict in self.annotation.verdicts)

    def lesions(self) -> dict[int, str]:
        """Label id to name of the lesions that the expert could have marked."""
        return {i: name for i, name in self.universe.items() if is_lesion(name)}

    def components(self, label: Label) -> int:
        """The number of components of a label in the scan."""
        return component_counts(self.annotation)[label.label_id]


@dataclasses.dataclass(eq=False)
class Scene:
    """A record at one position of the stream."""

    record: Example  # the stored record
    setting: Setting  # options of the dialogue
    rng: random.Random  # makes every random choice of the dialogue
    experts_on: bool = True  # False restricts the dialogue to questions that the images alone can answer

    @functools.cached_property
    def modality(self) -> str:
        """`CT`, `MRI` or `CXR`, or the record's own term."""
        return modality_of(str(self.record.meta.get("modality", "")))

    @property
    def roles(self) -> list[str]:
        """Roles of the images in order; '' for a single one."""
        roles = self.record.meta.get("roles")
        return [str(role) for role in roles] if roles else [""] * len(self.record.images)

    @property
    def markers(self) -> str:
        """The image markers in front of the first question."""
        code = _DICOM_CODES.get(self.modality, self.modality)
        return self.setting.style.wording.inputs(self.roles, code)

    def pick(self, file: str, /, *path: str, **words: str) -> str:
        """Picks a text of a pool and fills its placeholders."""
        if "name" in words:
            words["name"] = said(words["name"])
        texts: Any = pool(file)
        for step in path:
            texts = texts[step]
        return self.rng.choice(texts).format(**words)

    @functools.cached_property
    def results(self) -> tuple[StoredResult, ...]:
        """The results of this modality's experts on the record, in the order of cards and arguments."""
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
            image = self.record.images[images[0].image]
            plane = Plane(image.axis, image.index)
            for args in card.args or ("",):
                annotation = self.setting.find(key, card.name, args)
                if annotation is not None:
                    result = StoredResult(annotation, card.task, plane, card=card, args=args, images=images)
                    found.append(result)
        return tuple(found)

    def classes_of(self, result: StoredResult) -> dict[str, float]:
        """Class name to probability, as the model sees them."""
        probabilities = self.setting.style.wording.probabilities(result.annotation)
        return {class_name(name): p for name, p in probabilities.items()}

    def is_positive(self, probability: float) -> bool:
        """Whether a class counts as present."""
        return probability > self.setting.style.threshold

    def positives(self, result: StoredResult) -> list[str]:
        """Names of the classes that count as present."""
        return [name for name, p in self.classes_of(result).items() if self.is_positive(p)]

    def usable(self, what: str, fits: Callable[[StoredResult], bool]) -> list[StoredResult]:
        """The results that fit and may serve as ground truth; raises `Unfit`, naming `what`, for none."""
        found = [r for r in self.results if r.ok and fits(r) and not r.implausible and not self.is_doubted(r)]
        if not found:
            failures = sum(r.annotation.status == "failed" for r in self.results if fits(r))
            raise Unfit(f"no usable annotation of {what}" + (f" ({failures} failed)" if failures else ""))
        return found

    def is_doubted(self, result: StoredResult) -> bool:
        """Whether the model sees doubts about a result; only `expert_doubted` uses such results."""
        return self.setting.style.verdicts and bool(result.doubts)

    def _images_for(self, card: Card) -> tuple[RequestImage, ...] | None:
        if card.roles == ("",):
            return (RequestImage(),) if len(self.record.images) == 1 else None
        roles = self.roles
        if not set(card.roles) <= set(roles):
            return None
        return tuple(RequestImage(roles.index(role), role) for role in card.roles)
