"""The agent loop: question, the model's call for an expert, the expert's words, the answer.

Many dialogues run side by side in one `Session`; after the expert's turn the model goes on from its cache.
Turns are written by the same functions as in training (`data/render.py`, `data/expert_turns.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vilam3_jax import exports, paths
from vilam3_jax.data.examples import IMAGE_MARKER, Turn
from vilam3_jax.data.experts import store as annotation_lib
from vilam3_jax.data.experts import turns as expert_turns
from vilam3_jax.data.experts.cards import Card, parse_trigger
from vilam3_jax.data.experts.host_client import ExpertHost
from vilam3_jax.data.experts.store import Annotation, AnnotationStore
from vilam3_jax.data.image_processor import ImageProcessor
from vilam3_jax.data.render import with_cards
from vilam3_jax.data.templates import Template, encode_prompt, model_template
from vilam3_jax.data.tokenizer import load_tokenizer
from vilam3_jax.data.volumes import VolumeSource
from vilam3_jax.errors import UserError
from vilam3_jax.inference.generate import GREEDY, Chunk, Generator, Sampling

DEFAULT_MAX_NEW_TOKENS = 128
_MIN_SHARED = 16


@dataclasses.dataclass(frozen=True)
class Query:
    """One question about one image.

    Attributes:
      question: without image markers.
      image: uint8 [H, W, 3], read at `Agent.processor.kept_size`, or None for a question about no image.
      input_key: content key of the decoded image or volume, under which annotations are found.
      axis: which axis of the volume the image cuts; None for a 2-D image.
      index: which plane along it.
      volume: where a live expert finds the scan; None without one.
      png: the 2-D image in its own size, for a live expert; b'' without one.
    """

    question: str
    image: np.ndarray | None = None
    input_key: str = ""
    axis: int | None = None
    index: int | None = None
    volume: VolumeSource | None = None
    png: bytes = b""


@dataclasses.dataclass(frozen=True)
class Spoken:
    """One turn of a dialogue that took place; `images` are those its markers stand for."""

    role: str
    text: str
    images: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class Transcript:
    """A dialogue that took place.

    Attributes:
      turns: all of it, in order.
      answer: the last words of the model.
      trigger: (expert, arguments) of the last call that was answered, or None.
      trigger_text: the turn in which the model called, or None.
      annotation: what the expert said, a failed one included, or None.
      truncated: the model was cut off rather than stopping by itself.
    """

    turns: tuple[Spoken, ...]
    answer: str
    trigger: tuple[str, str] | None
    trigger_text: str | None
    annotation: Annotation | None
    truncated: bool

    @property
    def prompt(self) -> str:
        """Text of the first turn, cards included."""
        return self.turns[0].text

    @property
    def expert_text(self) -> str | None:
        """What the model was shown of the expert's result, without the question that ends the turn."""
        spoken = [turn.text for turn in self.turns if turn.role == "expert"]
        return spoken[-1] if spoken else None

    @property
    def overlay(self) -> np.ndarray | None:
        """The expert's picture, uint8 [H, W, 3], or None."""
        pictures = [image for turn in self.turns if turn.role == "expert" for image in turn.images]
        return pictures[-1] if pictures else None


class Provider(Protocol):
    """Where experts' results come from."""

    def annotate(self, query: Query, expert: str, args: str) -> Annotation:
        """The result of one expert on one query; if there is none, a failed annotation, never an error."""
        ...


class AnnotationProvider:
    """Answers from stored annotations, if wished with falsified ones."""

    def __init__(self, store: AnnotationStore, *, falsify_seed: int | None = None):
        """Wraps a store.

        Args:
          store: of true annotations.
          falsify_seed: None to tell the truth; a seed to falsify every record before it is told.
        """
        self._store = store
        self._falsify_seed = falsify_seed

    def annotate(self, query: Query, expert: str, args: str) -> Annotation:
        """See `Provider`."""
        found = self._store.get(query.input_key, expert, args)
        if found is None:
            reason = f"no stored result of {expert}({args}) on this input"
            return annotation_lib.failed(query.input_key or "unknown", expert, args, reason)
        if self._falsify_seed is None or found.status == "failed":
            return found
        universe = expert_turns.label_universe(expert, args) or None
        return annotation_lib.falsify(expert_turns.restrict_to_group(found), self._falsify_seed, universe)


class HostProvider:
    """Answers from a live expert host."""

    def __init__(self, host: ExpertHost):
        """Wraps a host, which stays the caller's to close."""
        self._host = host

    def annotate(self, query: Query, expert: str, args: str) -> Annotation:
        """See `Provider`."""
        if query.volume is not None:
            return self._host.ask(expert, args, input_key=query.input_key, volume=query.volume)
        if query.png:
            return self._host.ask(expert, args, input_key=query.input_key, image_bytes=query.png)
        reason = "the expert host needs the scan's file or the picture"
        return annotation_lib.failed(query.input_key or "unknown", expert, args, reason)


class Providers:
    """Asks several providers in turn, until one succeeds."""

    def __init__(self, providers: Sequence[Provider]):
        """Takes at least one provider, the preferred one first."""
        self._providers = list(providers)

    def annotate(self, query: Query, expert: str, args: str) -> Annotation:
        """See `Provider`; if all fail, what the last one said."""
        for provider in self._providers:
            annotation = provider.annotate(query, expert, args)
            if annotation.status == "ok":
                break
        return annotation


class Agent:
    """A model, its template, the cards it is shown, and where experts' results come from."""

    def __init__(
        self,
        generator: Generator,
        template: Template,
        *,
        cards: Sequence[Card] = (),
        provider: Provider | None = None,
        max_rounds: int = 1,
    ):
        """Puts the parts together.

        Args:
          generator: the model.
          template: the wire format it was trained with.
          cards: experts it is told of; ignored without a provider.
          provider: None asks the model alone: no cards, and what looks like a call is just an answer.
          max_rounds: how many expert calls one question may make.

        Raises:
          UserError: a provider without cards, or a negative `max_rounds`.
        """
        if provider is not None and not cards:
            raise UserError("experts are on but there are no cards; choose a card list")
        if max_rounds < 0:
            raise UserError(f"max_rounds {max_rounds}: must be 0 or more")
        self._generator, self._template, self._provider = generator, template, provider
        self._cards = {card.name: card for card in cards} if provider is not None else {}
        self._max_rounds = max_rounds if provider is not None else 0
        self._stops = template.stop_ids(generator.tokenizer)

    @property
    def batch_size(self) -> int:
        """Most queries of one `run`."""
        return self._generator.batch_size

    @property
    def processor(self) -> ImageProcessor:
        """Makes the model's inputs of the pictures in queries."""
        return self._generator.processor

    def run(
        self,
        queries: Sequence[Query],
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> list[Transcript]:
        """Holds one dialogue for each query, all at once.

        Args:
          queries: 1 to `batch_size`.
          max_new_tokens: bound on each turn of the model.
          sampling: greedy by default.

        Returns:
          One transcript a query, in order.

        Raises:
          UserError: too many queries, or a dialogue longer than the model's cache.
        """
        rows = [_Row(query) for query in queries]
        chunks = []
        for row in rows:
            turn = Turn(
                "user", (f"{IMAGE_MARKER}\n" if row.query.image is not None else "") + row.query.question
            )
            (turn,) = with_cards([turn], list(self._cards.values())) if self._cards else [turn]
            pictures = () if row.query.image is None else (row.query.image,)
            row.turns.append(Spoken("user", turn.text, pictures))
            chunks.append(self._chunk(turn, pictures))
        shared = _shared_prefix(chunks)
        session = self._generator.start(len(rows), chunks[0].tokens[:shared])
        session.append([_without(chunk, shared) for chunk in chunks])
        active = [True] * len(rows)
        for round_number in range(self._max_rounds + 1):
            decoded = session.decode(max_new_tokens, self._stops, active=active, sampling=sampling)
            for row, said, speaks in zip(rows, decoded, active, strict=True):
                if speaks:
                    text = self._generator.tokenizer.decode(said.ids).strip()
                    row.turns.append(Spoken("assistant", text))
                    row.truncated = not said.stopped
            if round_number == self._max_rounds:
                break
            calls = [self._call(row) if speaks else None for row, speaks in zip(rows, active, strict=True)]
            active = [call is not None for call in calls]
            if not any(active):
                break
            session.append(calls)
        return [row.transcript() for row in rows]

    def _call(self, row: _Row) -> Chunk | None:
        """The expert's turn after the model's last words, or None if they call nobody."""
        text = row.turns[-1].text
        called = parse_trigger(text)
        if called is None or self._provider is None:
            return None
        card = self._cards.get(called[0])
        if card is not None and not card.args:
            called = (
                called[0],
                "",
            )  # whatever stands in the brackets of an expert without arguments is dropped
        annotation = self._ask(self._provider, row.query, *called)
        spoken, annotation = self._speak(row.query, annotation)
        row.trigger, row.trigger_text, row.annotation = called, text, annotation
        row.turns.append(spoken)
        # The model's own words are cached without their ending: close its turn, then the expert speaks.
        return self._chunk(Turn("expert", spoken.text), spoken.images, after_answer=True)

    def _ask(self, provider: Provider, query: Query, expert: str, args: str) -> Annotation:
        key = query.input_key or "unknown"
        card = self._cards.get(expert)
        if card is None:
            return annotation_lib.failed(key, expert, args, f"there is no expert {expert}")
        if args not in (card.args or ("",)):
            return annotation_lib.failed(key, expert, args, f"{expert} does not take the argument {args!r}")
        if query.image is None:
            return annotation_lib.failed(key, expert, args, "the question is about no image")
        return provider.annotate(query, expert, args)

    def _speak(self, query: Query, annotation: Annotation) -> tuple[Spoken, Annotation]:
        """The expert's turn; a result that cannot be shown on this image counts as failed."""
        card = self._cards.get(annotation.expert)
        kind: expert_turns.Kind = "classification"
        if card is not None and card.task == "segmentation":
            kind = "segmentation"
        pictures: tuple[np.ndarray, ...] = ()

        def render() -> str:
            return expert_turns.render_expert_turn(
                annotation, query.question, axis=query.axis, index=query.index, kind=kind
            )

        try:
            text = render()
            if expert_turns.shows_image(annotation, kind):
                assert query.image is not None and query.axis is not None and query.index is not None
                pictures = (
                    expert_turns.expert_overlay(annotation, query.image, axis=query.axis, index=query.index),
                )
        except (ValueError, IndexError) as error:
            annotation = annotation_lib.failed(
                *annotation.key, f"its result does not fit this image: {error}"
            )
            text = render()
        return Spoken("expert", text, pictures), annotation

    def _chunk(self, turn: Turn, pictures: tuple[np.ndarray, ...], *, after_answer: bool = False) -> Chunk:
        if turn.text.count(IMAGE_MARKER) != len(pictures):
            raise UserError(f"the question holds {IMAGE_MARKER}; leave it out, the image is put in by itself")
        generator, processor = self._generator, self.processor
        count = generator.tokens_per_image
        grids = [processor.grid(picture) for picture in pictures]
        turns = processor.expand([turn], grids)
        encoded = encode_prompt(generator.tokenizer, self._template, turns, count, after_answer=after_answer)
        encoded = processor.merge(encoded, grids, count)
        index = encoded.image_of_token * count + encoded.visual_offset
        inputs = tuple(tile for picture in pictures for tile in processor.inputs(picture))
        visual = np.where(encoded.image_of_token >= 0, index, -1)
        return Chunk(encoded.tokens, visual, inputs, processor.tile_map(grids))


def _shared_prefix(chunks: Sequence[Chunk]) -> int:
    """How many text tokens all chunks begin with, leaving one to each; 0 if too few to be worth it."""
    length = min(len(chunk.tokens) for chunk in chunks) - 1
    alike = np.stack([chunk.tokens[:length] for chunk in chunks]) == chunks[0].tokens[:length]
    text = np.stack([chunk.visual_index[:length] for chunk in chunks]) < 0
    length = int(np.append(np.all(alike & text, axis=0), False).argmin())
    return length if length >= _MIN_SHARED else 0


def _without(chunk: Chunk, count: int) -> Chunk:
    return dataclasses.replace(chunk, tokens=chunk.tokens[count:], visual_index=chunk.visual_index[count:])


class _Row:
    """One dialogue while it takes place."""

    def __init__(self, query: Query):
        self.query = query
        self.turns: list[Spoken] = []
        self.trigger: tuple[str, str] | None = None
        self.trigger_text: str | None = None
        self.annotation: Annotation | None = None
        self.truncated = False

    def transcript(self) -> Transcript:
        return Transcript(
            tuple(self.turns),
            self.turns[-1].text,
            self.trigger,
            self.trigger_text,
            self.annotation,
            self.truncated,
        )


def load_generator(
    checkpoint: paths.PathLike, *, max_length: int = 2048, batch_size: int = 16, text: str = ""
) -> tuple[Generator, Template]:
    """Opens an export of a generative model.

    Args:
      checkpoint: export folder.
      max_length: most positions of one dialogue.
      batch_size: most dialogues at once.
      text: changes of the export's text rules, see `TextRules.changed`.

    Raises:
      UserError: no export, of a contrastive model, or without a tokenizer; an unknown text rule.
    """
    config = exports.load_model_config(checkpoint)
    if config.get("kind") != "generative":
        raise UserError(
            f"{checkpoint}: holds a {config.get('kind')} model, which cannot speak; "
            "give the export of a later stage"
        )
    template = model_template(config, text)
    tokenizer = load_tokenizer(paths.as_path(checkpoint) / "tokenizer")
    params, config, _ = exports.load_export(checkpoint)
    generator = Generator(config, params, tokenizer, max_length=max_length, batch_size=batch_size)
    return generator, template
