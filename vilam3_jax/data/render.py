"""From a stored example to what the model reads: turns with or without experts, and decoded images.

Cards, calls, expert turns and overlays come into being here, at load time; `data/experts/exchange.py` writes
them, as at inference.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from vilam3_jax.data.caches import ByteLRU
from vilam3_jax.data.examples import IMAGE_MARKER, Example, ExpertRequest, ImageRef, Turn, path_problem
from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.exchange import (
    DEFAULT_STYLE,
    Overlay,
    Result,
    Style,
    call_turn,
    exchange,
    overlays_of,
    with_cards,
)
from vilam3_jax.data.experts.falsify import falsified
from vilam3_jax.data.experts.grammar import Call
from vilam3_jax.data.experts.record import Annotation, memory_bytes
from vilam3_jax.data.experts.wording import Plane, question_of
from vilam3_jax.data.images import decode_image, decode_scaled, image_shape, load_film, resize
from vilam3_jax.data.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from vilam3_jax.data.templates import (
    PLAIN,
    Encoded,
    Template,
    TokenizerLike,
    encode_conversation,
    encode_document,
)
from vilam3_jax.data.volumes import Volume, read_volume
from vilam3_jax.errors import UserError, warn_of

EXPERT_MODES = ("on", "off", "falsified", "mixed")
IMAGE_CACHE_BYTES = 1 << 30
VOLUME_CACHE_BYTES = 1 << 30
_ANNOTATION_CACHE_BYTES = 256 << 20
_TEXT_CACHE_BYTES = 16 << 20
_QUESTION = "\0"  # stands for the question in what is cached; no text holds it
_MAX_NOTED = 100  # kinds of notes about volumes that one reader warns of


class Annotations(Protocol):
    """What rendering needs of an `AnnotationStore`."""

    def get(self, input_key: str, expert: str, args: str = "") -> Annotation | None: ...


@dataclasses.dataclass(frozen=True)
class Rendered:
    """An example as the model meets it.

    Attributes:
      turns: with cards, triggers and expert turns where experts are on.
      images: uint8 [H, W, 3] each, as the image reader gave them, in the order of the markers.
      experts: names of the experts that spoke.
    """

    turns: tuple[Turn, ...]
    images: tuple[np.ndarray, ...]
    experts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image that is read when it is needed.

    Attributes:
      read: gives uint8 [H, W, 3].
      shape: gives (H, W), where possible without decoding.
    """

    read: Callable[[], np.ndarray]
    shape: Callable[[], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Outline:
    """`Rendered` before its images are read; they come in the same order."""

    turns: tuple[Turn, ...]
    pictures: tuple[Picture, ...]
    experts: tuple[str, ...] = ()


class ImageReader:
    """Decodes and resizes the images of examples; keeps what was decoded, within byte budgets."""

    def __init__(
        self,
        size: int | None,
        preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
        *,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
        volume_cache_bytes: int = VOLUME_CACHE_BYTES,
    ) -> None:
        """Makes empty caches.

        Args:
          size: side of the images in pixels; None: as they are, see `ImageProcessor.kept_size`.
          preprocessing: how the model sees scans and transparent pictures.
          image_cache_bytes: for resized uint8 images, so that later epochs decode nothing.
          volume_cache_bytes: for whole volumes; the newest is kept even if larger.
        """
        self.size, self.preprocessing = size, preprocessing
        self.images: ByteLRU[np.ndarray] = ByteLRU(image_cache_bytes, lambda image: image.nbytes)
        self._noted: set[str] = set()
        self._volumes: ByteLRU[Volume] = ByteLRU(volume_cache_bytes, lambda volume: volume.voxels.nbytes)

    def read(self, image: ImageRef, data_root: Any) -> np.ndarray:
        """Returns the image, uint8 [S, S, 3] or [H, W, 3]; shared, so do not write into it.

        Args:
          image: bytes, or a path below `data_root`.
          data_root: folder of the dataset's files.

        Raises:
          UserError: the path leaves `data_root`, or the file is missing, damaged or no image.
        """
        if image.path is not None and (reason := path_problem(image.path)):
            raise UserError(f"image {reason}")
        if image.path is None:
            assert image.data is not None
            source = hashlib.sha256(image.data).hexdigest()
        else:
            source = (str(data_root), image.path)
        key = (source, image.axis, image.index, image.window, image.modality, self.size)
        return self.images.get(key, lambda: self._decode(image, data_root))

    def shape(self, image: ImageRef, data_root: Any) -> tuple[int, int]:
        """(H, W) of what `read` returns; from the header where a file has one that is enough."""
        if self.size is not None:
            return self.size, self.size
        if image.data is not None:
            return image_shape(image.data)
        height, width = self.read(image, data_root).shape[:2]
        return height, width

    def _decode(self, image: ImageRef, data_root: Any) -> np.ndarray:
        alpha = self.preprocessing.alpha
        if image.path is None:
            assert image.data is not None
            if self.size is None:
                return decode_image(image.data, alpha=alpha)
            return decode_scaled(image.data, self.size, alpha=alpha)
        path = data_root / image.path
        if image.axis is None:
            return self._scaled(load_film(path, alpha=alpha))
        assert image.index is not None  # as the axis is not
        volume = self._volumes.get(
            (str(path), image.modality), lambda: self._read_volume(path, image.modality)
        )
        return self.preprocessing.slice_picture(volume, image.axis, image.index, image.window, self.size)

    def _read_volume(self, path: epath.Path, modality: str | None) -> Volume:
        """Warns of each kind of note once: a data set may have it in a million files."""
        volume = read_volume(path, modality=modality)
        new = [note for note in volume.notes if note not in self._noted]
        if new and len(self._noted) < _MAX_NOTED:
            self._noted.update(new)
            warn_of(tuple(f"{note}; further files are not named" for note in new), path)
        return volume

    def _scaled(self, image: np.ndarray) -> np.ndarray:
        return image if self.size is None else resize(image, self.size)


class Renderer:
    """Renders examples under one setting of the experts."""

    def __init__(
        self,
        *,
        image_reader: ImageReader,
        experts: str = "off",
        expert_share: float = 0.75,
        cards: Sequence[Card] = (),
        annotations: Annotations | None = None,
        style: Style = DEFAULT_STYLE,
        seed: int = 0,
    ) -> None:
        """Checks the setting.

        Args:
          image_reader: decodes images; may be shared.
          experts: 'on', 'off', 'falsified' (records wrong on purpose) or 'mixed' (some samples on, some off).
          expert_share: with 'mixed', the share of the samples with experts, 0 to 1.
          cards: the experts that the model is told of.
          annotations: what the experts said; needed unless experts are off.
          style: how it is told.
          seed: of the coin of 'mixed' and of the falsification.

        Raises:
          UserError: unknown mode, a share outside 0 to 1, or experts without annotations or cards.
        """
        if experts not in EXPERT_MODES:
            raise UserError(f"experts={experts!r}: use one of {', '.join(EXPERT_MODES)}")
        if not 0 <= expert_share <= 1:
            raise UserError(f"expert_share={expert_share}: must be from 0 to 1")
        if experts != "off" and (annotations is None or not cards):
            raise UserError(f"experts={experts}: needs annotations and cards; set data.annotations")
        self._reader = image_reader
        self._experts, self._share = experts, expert_share
        self._cards = {card.name: card for card in cards}
        self._store, self._style = annotations, style
        self._seed = seed
        self._annotations: ByteLRU[Annotation | None] = ByteLRU(_ANNOTATION_CACHE_BYTES, memory_bytes)
        # Texts alone: an overlay holds its annotation, whose label map would outlive the other cache.
        self._texts: ByteLRU[str] = ByteLRU(_TEXT_CACHE_BYTES, lambda text: len(text) + 256)

    def render(self, example: Example, data_root: Any, coin: int = 0) -> Rendered:
        """Returns the turns and images of one example.

        Args:
          example: a valid example.
          data_root: folder its image paths are relative to.
          coin: with 'mixed', decides together with the seed: the sample's position in its stream, so that
            over the epochs an example is met both ways.

        Raises:
          UserError: an image cannot be read, or an expert's result that must be there is not.
        """
        outline = self.outline(example, data_root, coin)
        return Rendered(outline.turns, tuple(p.read() for p in outline.pictures), outline.experts)

    def outline(self, example: Example, data_root: Any, coin: int = 0) -> Outline:
        """`render` without reading an image.

        Raises:
          UserError: an expert's result that must be there is not. Images raise when they are read.
        """
        if example.format == "study":
            raise UserError("holds images only; name a rule in data.mixture, such as ('NAME:ct_what', 1.0)")
        images = [
            Picture(
                functools.partial(self._reader.read, image, data_root),
                functools.partial(self._reader.shape, image, data_root),
            )
            for image in example.images
        ]
        if not self.experts_on(coin):
            return Outline(example.turns, tuple(images))
        if not example.expert_requests:
            # The agent shows its cards with every question; that most of them need no expert is learned here.
            spoken = example.format == "conversation" and example.meta.get("cards", True)
            shown = with_cards(example.turns, list(self._cards.values())) if spoken else example.turns
            return Outline(tuple(shown), tuple(images))
        found: dict[int, list[tuple[ExpertRequest, Annotation]]] = {}
        for request in example.expert_requests:
            annotation = self._annotation(example, request)
            if annotation is not None:
                found.setdefault(request.before_turn, []).append((request, annotation))
        if not found:
            return Outline(example.turns, tuple(images))
        turns: list[Turn] = []
        pictures: list[Picture] = []
        waiting = list(images)
        for position, turn in enumerate(example.turns):
            if position in found:
                question = found[position][0][0].question or question_of(turns[-1].text)
                made, overlays = self._exchange(example, found[position], question, images)
                turns += made
                pictures += overlays
            turns.append(turn)
            for _ in range(turn.text.count(IMAGE_MARKER)):
                pictures.append(waiting.pop(0))
        names = tuple(request.expert for pairs in found.values() for request, _ in pairs)
        return Outline(tuple(with_cards(turns, list(self._cards.values()))), tuple(pictures), names)

    def experts_on(self, coin: int) -> bool:
        """Whether the sample at position `coin` has experts."""
        if self._experts != "mixed":
            return self._experts != "off"
        digest = hashlib.sha256(f"{self._seed}/{coin}".encode()).digest()
        return int.from_bytes(digest[:6], "big") < self._share * (1 << 48)

    def _annotation(self, example: Example, request: ExpertRequest) -> Annotation | None:
        name = f"{request.expert}({request.args})"
        if request.expert not in self._cards:
            raise UserError(f"expert {request.expert} has no card; choose a card list that names it")
        try:
            key = example.input_key(request.images)
        except ValueError as error:
            raise UserError(f"{error} to look up {name} with; prepare the dataset again") from None
        annotation = self._annotations.get(
            (key, request.expert, request.args), lambda: self._look_up(key, request.expert, request.args)
        )
        if annotation is None and request.policy == "always":
            raise UserError(f"no annotation of {name} for input {key[:12]}; run `vilam3-experts annotate`")
        return annotation

    def _look_up(self, key: str, expert: str, args: str) -> Annotation | None:
        assert self._store is not None  # experts are on
        annotation = self._store.get(key, expert, args)
        if annotation is None or self._experts != "falsified":
            return annotation
        try:
            return falsified(annotation, self._seed)
        except ValueError as error:
            raise UserError(f"an expert's result cannot be falsified: {error}") from error

    def _exchange(
        self,
        example: Example,
        made: Sequence[tuple[ExpertRequest, Annotation]],
        question: str,
        images: Sequence[Picture],
    ) -> tuple[list[Turn], list[Picture]]:
        """The turns of the call and of the experts, and the pictures of the latter."""
        results, bases = [], []
        for request, annotation in made:
            ref = example.images[request.images[0].image]
            plane = Plane(ref.axis, ref.index)
            results.append(Result(annotation, self._cards[request.expert].task, plane))
            if results[-1].shows_overlay:
                bases.append(request.images[0].image)
        key = tuple((r.annotation.key, r.annotation.version, r.plane) for r in results)
        # One text serves all questions about a slice: the question is put in afterwards.
        try:
            text = self._texts.get(key, lambda: exchange(results, _QUESTION, self._style).text)
        except ValueError as error:
            raise UserError(f"its expert's result cannot be shown: {error}") from error
        called = call_turn(
            [self._cards[request.expert] for request, _ in made],
            [Call(request.expert, request.args) for request, _ in made],
            self._style,
        )
        if words := made[0][0].call:
            called = dataclasses.replace(called, text=words)
        pictures = [
            self._coloured(overlay, images[base], ("overlay", n, key, example.images[base].window))
            for n, (overlay, base) in enumerate(zip(overlays_of(results), bases, strict=True))
        ]
        return [called, Turn("expert", text.replace(_QUESTION, question))], pictures

    def _coloured(self, overlay: Overlay, base: Picture, key: tuple[Any, ...]) -> Picture:
        def read() -> np.ndarray:
            return self._reader.images.get((*key, self._reader.size), lambda: overlay(base.read()))

        return Picture(read, base.shape)


def encode_example(
    tokenizer: TokenizerLike, template: Template, form: str, turns: Sequence[Turn], tokens_per_image: int
) -> Encoded:
    """Encodes rendered turns by the example's format.

    Pairs and captions have the plain form (image, caption, line end), whatever the model's chat template;
    documents have no roles. The rules for text around images are the template's in any case.
    """
    if form == "document":
        return encode_document(tokenizer, turns, tokens_per_image, template.rules)
    if form in ("pair", "caption"):
        template = dataclasses.replace(PLAIN, rules=template.rules)
    return encode_conversation(tokenizer, template, turns, tokens_per_image)
