"""Renders a stored example as the model reads it: turns with or without experts, and decoded images.

Cards, calls, expert turns and overlays are added here, at load time; `data/experts/exchange.py` writes them,
as at inference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from vilam3_jax.data import decoded_images
from vilam3_jax.data.caches import ByteLRU
from vilam3_jax.data.data_config import EXPERT_MODES, MISSING_POLICIES
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
from vilam3_jax.data.images import decode_image, decode_scaled, image_shape, load_pixels, resize
from vilam3_jax.data.preprocessing import DEFAULT_PREPROCESSING, Preprocessing
from vilam3_jax.data.templates import (
    PLAIN,
    Encoded,
    Template,
    TokenizerLike,
    encode_conversation,
    encode_document,
)
from vilam3_jax.data.volume_slices import (
    SliceRule,
    even_slices,
    finding_slices,
    informative_slices,
    labelled_voxels,
    most_labelled,
    numbered,
    with_markers,
)
from vilam3_jax.data.volumes import Volume, read_volume
from vilam3_jax.errors import StoppingError, UserError, warn_of

IMAGE_CACHE_BYTES = 1 << 30
VOLUME_CACHE_BYTES = 1 << 30
_ANNOTATION_CACHE_BYTES = 256 << 20
_TEXT_CACHE_BYTES = 16 << 20
_SLICES_CACHE_BYTES = 16 << 20
_QUESTION = "\0"  # placeholder for the question in cached texts
_MAX_WARNINGS = 100  # different notes about volumes that one reader issues


class Annotations(Protocol):
    """The interface of `AnnotationStore` that rendering needs."""

    def get(self, input_key: str, expert: str, args: str = "") -> Annotation | None: ...


@dataclasses.dataclass(frozen=True)
class LazyImage:
    """A lazily decoded image."""

    read: Callable[[], np.ndarray]  # returns uint8 [H, W, 3]
    shape: Callable[[], tuple[int, int]]  # returns (H, W), without decoding if possible


@dataclasses.dataclass(frozen=True)
class Outline:
    """An example as the model reads it, with lazily decoded images."""

    turns: tuple[Turn, ...]  # with cards, triggers and expert turns if experts are on
    lazy_images: tuple[LazyImage, ...]  # images in the order of the markers
    experts: tuple[str, ...] = ()  # names of the experts whose results are shown
    missing: tuple[str, ...] = ()  # names of the experts without an annotation

    @functools.cached_property
    def images(self) -> tuple[np.ndarray, ...]:
        """Decoded images, uint8 [H, W, 3] each."""
        return tuple(image.read() for image in self.lazy_images)


@dataclasses.dataclass(frozen=True)
class _Shown:
    """One image of an example as shown: a single image, or slices of a whole volume."""

    refs: tuple[ImageRef, ...]  # references to the images shown
    lazy_images: tuple[LazyImage, ...]  # one per reference
    planes: int = 0  # number of slices of the whole volume along its axis; 0 for a single image
    text: str = IMAGE_MARKER  # replacement of the image's marker


class ImageReader:
    """Decodes and resizes the images of examples, with caches of bounded size."""

    def __init__(
        self,
        size: int | None,
        preprocessing: Preprocessing = DEFAULT_PREPROCESSING,
        *,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
    ) -> None:
        """Creates empty caches.

        Args:
          size: image side in pixels; None: the original size, see `ImageProcessor.kept_size`.
          preprocessing: rendering of scans and transparent images.
          image_cache_bytes: budget for resized uint8 images, which later epochs reuse.
        """
        self.size, self.preprocessing = size, preprocessing
        self.images: ByteLRU[np.ndarray] = ByteLRU(image_cache_bytes, lambda image: image.nbytes)
        self._warned: set[str] = set()
        self._volumes: ByteLRU[Volume] = ByteLRU(VOLUME_CACHE_BYTES, lambda volume: volume.voxels.nbytes)

    def read(self, image: ImageRef, data_root: Any) -> np.ndarray:
        """Returns the image, uint8 [S, S, 3] or [H, W, 3]. The array is shared and must not be modified.

        Raises `UserError` for a path outside `data_root` and a missing, damaged or wrong file.
        """
        if image.path is not None and (reason := path_problem(image.path)):
            raise UserError(f"image {reason}")
        if image.path is None:
            assert image.data is not None
            if decoded_images.is_decoded(image.data):  # as cheap as a cache lookup
                return self._decode(image, data_root)
            source = hashlib.sha256(image.data).hexdigest()
        else:
            source = (str(data_root), image.path)
        key = (source, image.axis, image.index, image.window, image.modality, self.size)
        return self.images.get(key, lambda: self._decode(image, data_root))

    def shape(self, image: ImageRef, data_root: Any) -> tuple[int, int]:
        """Returns (H, W) of the image that `read` returns, from the file header if possible."""
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
            if self.size is None and decoded_images.is_decoded(image.data):
                height, width = decoded_images.shape(image.data)
                raise UserError(
                    f"image stored as {height} x {width} pixels, but the model takes images in their "
                    "original shape; prepare the dataset again without --decode-images"
                )
            if self.size is None:
                return decode_image(image.data, alpha=alpha)
            return decode_scaled(image.data, self.size, alpha=alpha)
        path = data_root / image.path
        if image.axis is None:
            pixels = load_pixels(path, alpha=alpha)
            return pixels if self.size is None else resize(pixels, self.size)
        if image.index is None:
            raise UserError("image is a whole volume, of which no slice was chosen")
        volume = self.volume(image, data_root)
        return self.preprocessing.slice_image(volume, image.axis, image.index, image.window, self.size)

    def volume(self, image: ImageRef, data_root: Any) -> Volume:
        """Returns the volume that an image is, or is a slice of; cached. Raises `UserError` like `read`."""
        if image.path is None or (reason := path_problem(image.path)):
            raise UserError("image has no path" if image.path is None else f"image {reason}")
        path = data_root / image.path
        return self._volumes.get((str(path), image.modality), lambda: self._read_volume(path, image.modality))

    def _read_volume(self, path: epath.Path, modality: str | None) -> Volume:
        volume = read_volume(path, modality=modality)
        new = [note for note in volume.notes if note not in self._warned]  # a million files may share a note
        if new and len(self._warned) < _MAX_WARNINGS:
            self._warned.update(new)
            warn_of(tuple(f"{note}; further files are not named" for note in new), path)
        return volume


class Renderer:
    """Renders examples with one setting of the experts."""

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
        missing: str = "skip",
        slices: SliceRule | None = None,
    ) -> None:
        """Validates the setting.

        Args:
          image_reader: decodes images; may be shared.
          experts: 'on', 'off', 'falsified' (deliberately wrong results) or 'mixed' (on for some samples).
          expert_share: with 'mixed', the share of the samples with experts, 0 to 1.
          cards: the experts shown to the model.
          annotations: results of the experts; required unless experts are off.
          style: presentation of the results.
          seed: for 'mixed' and for the falsification.
          missing: handling of an example whose request with policy "always" has no annotation. 'skip': skip
            it; 'plain': render it without that expert; 'error': end the run.
          slices: selection of slices of whole volumes; None: four evenly spaced slices.

        Raises:
          UserError: an unknown mode or policy, a share outside 0 to 1, experts without annotations or cards,
            or slices around findings without annotations.
        """
        if experts not in EXPERT_MODES:
            raise UserError(f"experts={experts!r}: use one of {', '.join(EXPERT_MODES)}")
        if not 0 <= expert_share <= 1:
            raise UserError(f"expert_share={expert_share}: must be from 0 to 1")
        if experts != "off" and (annotations is None or not cards):
            raise UserError(f"experts={experts}: needs annotations and cards; set data.annotations")
        if missing not in MISSING_POLICIES:
            raise UserError(
                f"config data.missing_annotation={missing!r}: use one of {', '.join(MISSING_POLICIES)}"
            )
        self._missing, self._slices = missing, slices or SliceRule()
        if self._slices.choice == "finding" and annotations is None:
            raise UserError("config data.slice_choice='finding': needs annotations; set data.annotations")
        self._reader = image_reader
        self._experts, self._share = experts, expert_share
        self._cards = {card.name: card for card in cards}
        self._store, self._style = annotations, style
        self._seed = seed
        self._annotations: ByteLRU[Annotation | None] = ByteLRU(_ANNOTATION_CACHE_BYTES, memory_bytes)
        # Only texts: an overlay references its annotation, whose label map would escape the other budget.
        self._texts: ByteLRU[str] = ByteLRU(_TEXT_CACHE_BYTES, lambda text: len(text) + 256)
        self._marked_voxels: ByteLRU[np.ndarray] = ByteLRU(
            _SLICES_CACHE_BYTES, lambda voxels: voxels.nbytes + 256
        )
        self._chosen: ByteLRU[tuple[int, tuple[int, ...]]] = ByteLRU(
            _SLICES_CACHE_BYTES, lambda chosen: 8 * len(chosen[1]) + 256
        )

    def render(self, example: Example, data_root: Any, sample_index: int = 0) -> Outline:
        """Like `outline`, and decodes the images; raises `UserError` if that fails, too."""
        outline = self.outline(example, data_root, sample_index)
        _ = outline.images
        return outline

    def outline(self, example: Example, data_root: Any, sample_index: int = 0) -> Outline:
        """Renders a valid example without decoding images. Whole volumes are read to choose their slices.

        Args:
          example: its image paths are relative to `data_root`.
          data_root: folder of the dataset's files.
          sample_index: position of the sample in its stream. With 'mixed', it determines together with the
            seed whether experts are on, so an example is seen both ways over the epochs.

        Raises:
          UserError: a required result is missing, or a whole volume cannot be read.
          StoppingError: a required result is missing, with `missing='error'`.
        """
        if example.format == "study":
            raise UserError(
                "contains only images; name a rule in data.mixture or --dataset, such as NAME:ct_what"
            )
        shown = [self._show(example, number, data_root) for number in range(len(example.images))]
        turns, turn_images = _with_slices(example.turns, shown)
        all_images = tuple(image for images in turn_images for image in images)
        if not self.experts_on(sample_index):
            return Outline(tuple(turns), all_images)
        cards = list(self._cards.values())
        if not example.expert_requests:
            # The agent shows its cards with every question, most of which need no expert.
            shows_cards = example.format == "conversation" and example.meta.get("cards", True)
            return Outline(tuple(with_cards(turns, cards) if shows_cards else turns), all_images)
        found: dict[int, list[tuple[ExpertRequest, Annotation]]] = {}
        missing = []
        for request in example.expert_requests:
            if annotation := self._annotation(example, request):
                found.setdefault(request.before_turn, []).append((request, annotation))
            else:
                missing.append(request.expert)
        if not found:
            return Outline(tuple(turns), all_images, (), tuple(missing))
        rendered: list[Turn] = []
        rendered_images: list[LazyImage] = []
        for position, turn in enumerate(turns):
            if position in found:
                question = found[position][0][0].question or question_of(example.turns[position - 1].text)
                made, overlays = self._exchange(found[position], question, shown)
                rendered += made
                rendered_images += overlays
            rendered.append(turn)
            rendered_images += turn_images[position]
        names = tuple(request.expert for pairs in found.values() for request, _ in pairs)
        return Outline(tuple(with_cards(rendered, cards)), tuple(rendered_images), names, tuple(missing))

    def _show(self, example: Example, number: int, data_root: Any) -> _Shown:
        image = example.images[number]
        if image.axis is None or image.index is not None:
            return _Shown((image,), (self._lazy_image(image, data_root),))
        finding = self._finding(example, number) if self._slices.choice == "finding" else None
        key = (str(data_root), image.path, image.axis, image.window, image.modality, finding and finding.key)
        planes, indices = self._chosen.get(key, lambda: self._choose(image, data_root, finding))
        refs = tuple(dataclasses.replace(image, index=index) for index in indices)
        lazy_images = tuple(self._lazy_image(ref, data_root) for ref in refs)
        return _Shown(refs, lazy_images, planes, numbered(indices, planes))

    def _lazy_image(self, image: ImageRef, data_root: Any) -> LazyImage:
        return LazyImage(
            functools.partial(self._reader.read, image, data_root),
            functools.partial(self._reader.shape, image, data_root),
        )

    def _choose(
        self, image: ImageRef, data_root: Any, finding: Annotation | None
    ) -> tuple[int, tuple[int, ...]]:
        """Returns the number of slices of a whole volume, and the indices of those to show."""
        axis, rule = image.axis, self._slices
        assert axis is not None
        volume = self._reader.volume(image, data_root)
        planes = volume.voxels.shape[axis]
        chosen: tuple[int, ...] = ()
        if rule.choice == "informative":
            chosen = informative_slices(volume, axis, rule.count, self._reader.preprocessing, image.window)
        elif finding is not None:
            if finding.label_shape != volume.voxels.shape:
                raise UserError(f"annotation of {finding.expert} has another grid than its volume")
            with _unusable_result("used"):
                chosen = finding_slices(finding, axis, rule.count)
        return planes, chosen or even_slices(planes, rule.count)

    def _finding(self, example: Example, number: int) -> Annotation | None:
        """Returns the first unfalsified result with a label map among the requests for an image."""
        assert self._store is not None  # checked in __init__
        for request in example.expert_requests:
            if number in (image.image for image in request.images):
                annotation = self._store.get(self._key(example, request), request.expert, request.args)
                if annotation is not None and annotation.status == "ok" and annotation.labels is not None:
                    return annotation
        return None

    def experts_on(self, sample_index: int) -> bool:
        """Whether experts are on for a sample."""
        if self._experts != "mixed":
            return self._experts != "off"
        digest = hashlib.sha256(f"{self._seed}/{sample_index}".encode()).digest()
        return int.from_bytes(digest[:6], "big") < self._share * (1 << 48)

    def _annotation(self, example: Example, request: ExpertRequest) -> Annotation | None:
        if request.expert not in self._cards:
            raise UserError(f"expert {request.expert} has no card; choose a card list that includes it")
        key = self._key(example, request)
        annotation = self._annotations.get(
            (key, request.expert, request.args), lambda: self._look_up(key, request.expert, request.args)
        )
        if annotation is None and request.policy == "always" and self._missing != "plain":
            kind = StoppingError if self._missing == "error" else UserError
            name = f"{request.expert}({request.args})"
            raise kind(f"no annotation of {name} for input {key[:12]}; run `vilam3-experts annotate`")
        return annotation

    def _key(self, example: Example, request: ExpertRequest) -> str:
        try:
            return example.input_key(request.images)
        except ValueError as error:
            name = f"{request.expert}({request.args})"
            raise UserError(f"{error}, needed to look up {name}; prepare the dataset again") from None

    def _look_up(self, key: str, expert: str, args: str) -> Annotation | None:
        assert self._store is not None  # experts are on
        annotation = self._store.get(key, expert, args)
        if annotation is None or self._experts != "falsified":
            return annotation
        with _unusable_result("falsified"):
            return falsified(annotation, self._seed)

    def _exchange(
        self, made: Sequence[tuple[ExpertRequest, Annotation]], question: str, shown: Sequence[_Shown]
    ) -> tuple[list[Turn], list[LazyImage]]:
        """Returns the calling turn and the expert turn, and the images of the latter."""
        results, bases, markers = [], [], []
        for request, annotation in made:
            image = shown[request.images[0].image]
            place = self._most_marked(image, annotation)
            ref = image.refs[place]
            results.append(Result(annotation, self._cards[request.expert].task, Plane(ref.axis, ref.index)))
            if results[-1].shows_overlay:
                bases.append((ref, image.lazy_images[place]))
                markers.append(numbered([ref.index or 0], image.planes) if image.planes else IMAGE_MARKER)
        key = tuple((r.annotation.key, r.annotation.version, r.plane) for r in results)
        # One cached text serves all questions about a slice.
        with _unusable_result("shown"):
            text = self._texts.get(key, lambda: exchange(results, _QUESTION, self._style).text)
        called = call_turn(
            [self._cards[request.expert] for request, _ in made],
            [Call(request.expert, request.args) for request, _ in made],
            self._style,
        )
        if words := made[0][0].call:
            called = dataclasses.replace(called, text=words)
        lazy_images = [
            self._overlaid(overlay, image, ("overlay", n, key, ref.window))
            for n, (overlay, (ref, image)) in enumerate(zip(overlays_of(results), bases, strict=True))
        ]
        result = Turn("expert", with_markers(text, markers).replace(_QUESTION, question))
        return [called, result], lazy_images

    def _most_marked(self, image: _Shown, annotation: Annotation) -> int:
        """Returns which of the slices shown has the most voxels marked by an expert."""
        shape, axis = annotation.label_shape, image.refs[0].axis
        if len(image.refs) == 1 or shape is None or axis is None or shape[axis] != image.planes:
            return 0
        key = (annotation.key, annotation.version, axis)
        with _unusable_result("shown"):
            voxels = self._marked_voxels.get(key, lambda: labelled_voxels(annotation, axis))
        return most_labelled(voxels, [ref.index or 0 for ref in image.refs])

    def _overlaid(self, overlay: Overlay, base: LazyImage, key: tuple[Any, ...]) -> LazyImage:
        def read() -> np.ndarray:
            return self._reader.images.get((*key, self._reader.size), lambda: overlay(base.read()))

        return LazyImage(read, base.shape)


@contextlib.contextmanager
def _unusable_result(purpose: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(f"an expert's result cannot be {purpose}: {error}") from error


def _with_slices(
    turns: Sequence[Turn], shown: Sequence[_Shown]
) -> tuple[list[Turn], list[tuple[LazyImage, ...]]]:
    """Returns the turns with one marker per slice, and the images of each turn in marker order."""
    waiting = iter(shown)
    written, lazy_images = [], []
    for turn in turns:
        here = [next(waiting) for _ in range(turn.text.count(IMAGE_MARKER))]
        text = with_markers(turn.text, [image.text for image in here])
        written.append(turn if text == turn.text else dataclasses.replace(turn, text=text))
        lazy_images.append(tuple(lazy for image in here for lazy in image.lazy_images))
    return written, lazy_images


def encode_example(
    tokenizer: TokenizerLike, template: Template, form: str, turns: Sequence[Turn], tokens_per_image: int
) -> Encoded:
    """Encodes rendered turns according to the example's format.

    Pairs and captions use the plain template (image, caption, line end) instead of the model's chat template;
    documents have no roles. The text rules are always those of `template`.
    """
    if form == "document":
        return encode_document(tokenizer, turns, tokens_per_image, template.rules)
    if form in ("pair", "caption"):
        template = dataclasses.replace(PLAIN, rules=template.rules)
    return encode_conversation(tokenizer, template, turns, tokens_per_image)
