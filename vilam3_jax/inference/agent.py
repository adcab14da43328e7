"""The agent loop: question, the model's call for an expert, the expert's words, the answer.

Many dialogues run side by side in one `Session`; after the expert's turn the model goes on from its cache.
Turns are written by the same functions as in training (`data/experts/exchange.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vilam3_jax.checkpoints import exports
from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.examples import IMAGE_MARKER, Turn
from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.exchange import DEFAULT_STYLE, Result, Style, exchange, with_cards
from vilam3_jax.data.experts.falsify import falsified
from vilam3_jax.data.experts.grammar import Call, CallingTurn, parse_turn
from vilam3_jax.data.experts.host_client import ExpertHost
from vilam3_jax.data.experts.labels import canonical_args
from vilam3_jax.data.experts.record import failed
from vilam3_jax.data.experts.store import Annotation, AnnotationStore
from vilam3_jax.data.experts.wording import Plane
from vilam3_jax.data.image_processor import ImageProcessor
from vilam3_jax.data.templates import Template, encode_prompt, model_template
from vilam3_jax.data.tokenizer import Tokenizer, load_tokenizer
from vilam3_jax.data.volume_slices import labelled_voxels, most_labelled, numbered, with_markers
from vilam3_jax.data.volumes import VolumeSource
from vilam3_jax.errors import UserError
from vilam3_jax.inference.generate import GREEDY, Chunk, Decoded, Generator, Sampling, Session
from vilam3_jax.runtime import paths

DEFAULT_MAX_NEW_TOKENS = 128
_MIN_SHARED = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """An image that a question is about.

    Attributes:
      image: uint8 [H, W, 3], read at `Agent.processor.kept_size`.
      input_key: content key of the decoded image or volume, under which annotations are found.
      axis: which axis of the volume the image cuts; None for a 2-D image.
      index: which plane along it.
      volume: where a live expert finds the scan; None without one.
      png: the 2-D image in its own size, for a live expert; b'' without one.
      role: what it is among several, such as "t1c"; "" otherwise.
      modality: DICOM's code, "" if unknown.
      slices: (index, picture) of each slice shown of the volume; empty: `image` alone is shown.
      planes: of the volume along `axis`, where there are `slices`.
    """

    image: np.ndarray
    input_key: str = ""
    axis: int | None = None
    index: int | None = None
    volume: VolumeSource | None = None
    png: bytes = b""
    role: str = ""
    modality: str = ""
    slices: tuple[tuple[int, np.ndarray], ...] = ()
    planes: int = 0

    @property
    def pictures(self) -> tuple[np.ndarray, ...]:
        """All pictures that are shown, in order."""
        return tuple(picture for _, picture in self.slices) or (self.image,)

    @property
    def marker(self) -> str:
        """What stands for it in a question."""
        return numbered([index for index, _ in self.slices], self.planes) if self.slices else IMAGE_MARKER

    def shown_with(self, annotation: Annotation) -> Scan:
        """The slice that an expert's result is shown on, the one that it marks most of.

        Raises:
          ValueError: the label map is damaged.
        """
        axis, shape = self.axis, annotation.label_shape
        if not self.slices or axis is None or shape is None or shape[axis] != self.planes:
            return dataclasses.replace(self, slices=self.slices[:1])._alone()
        place = most_labelled(labelled_voxels(annotation, axis), [index for index, _ in self.slices])
        return dataclasses.replace(self, slices=(self.slices[place],))._alone()

    def _alone(self) -> Scan:
        if not self.slices:
            return self
        index, picture = self.slices[0]
        return dataclasses.replace(self, index=index, image=picture)


@dataclasses.dataclass(frozen=True)
class Query:
    """One question about an image, about several that belong together, or about none.

    Attributes:
      question: without image markers.
      scans: in the order in which they are shown.
    """

    question: str
    scans: tuple[Scan, ...] = ()

    @property
    def input_key(self) -> str:
        """Key of all scans together; `unknown` if one of them has none."""
        if not self.scans or not all(scan.input_key for scan in self.scans):
            return "unknown"
        return inputs_key([(scan.role, scan.input_key) for scan in self.scans])

    def for_expert(self, card: Card) -> Query:
        """The question with the scans that an expert looks at, under its roles.

        Raises:
          ValueError: there is no image, or one of the expert's roles is missing.
        """
        if not self.scans:
            raise ValueError("the question is about no image")
        if card.roles == ("",):
            return dataclasses.replace(self, scans=(dataclasses.replace(self.scans[0], role=""),))
        shown = {scan.role: scan for scan in self.scans}
        missing = [role for role in card.roles if role not in shown]
        if missing:
            raise ValueError(f"it needs {', '.join(card.roles)}, and {', '.join(missing)} is missing")
        return dataclasses.replace(self, scans=tuple(shown[role] for role in card.roles))


@dataclasses.dataclass(frozen=True)
class Message:
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
      annotations: what the experts said, in the order of the calls, failed ones included.
      trigger_text: the last turn in which the model called and was answered, or None.
      truncated: the model was stopped rather than stopping by itself.
      cut: what the model wrote after its calls, before the experts had spoken; taken out of the dialogue.
      not_made: calls that nobody answered: behind what was cut, in the answer, or without experts.
    """

    turns: tuple[Message, ...]
    answer: str
    annotations: tuple[Annotation, ...] = ()
    trigger_text: str | None = None
    truncated: bool = False
    cut: tuple[str, ...] = ()
    not_made: tuple[Call, ...] = ()

    @property
    def annotation(self) -> Annotation | None:
        """What the last expert said, a failure included, or None."""
        return self.annotations[-1] if self.annotations else None

    @property
    def trigger(self) -> tuple[str, str] | None:
        """(expert, arguments) of the last call that was answered, or None."""
        last = self.annotation
        return None if last is None else (last.expert, last.args)

    @property
    def prompt(self) -> str:
        """Text of the first turn, cards included."""
        return self.turns[0].text

    @property
    def expert_text(self) -> str | None:
        """The last expert's turn, with the question that ends it; None without one."""
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
        """The result of one expert on a query that holds the expert's scans.

        If there is none, a failed annotation, never an error.
        """
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
            return failed(query.input_key, expert, args, reason)
        if self._falsify_seed is None or found.status == "failed":
            return found
        try:
            return falsified(found, self._falsify_seed)
        except ValueError as error:
            return failed(query.input_key, expert, args, str(error))


class HostProvider:
    """Answers from a live expert host."""

    def __init__(self, host: ExpertHost):
        """Wraps a host, which stays the caller's to close."""
        self._host = host

    def annotate(self, query: Query, expert: str, args: str) -> Annotation:
        """See `Provider`."""
        sources = [(scan.role, scan.volume or scan.png) for scan in query.scans]
        if not all(source for _, source in sources):
            reason = "the expert host needs the scan's file or the picture"
            return failed(query.input_key, expert, args, reason)
        return self._host.ask(expert, args, input_key=query.input_key, inputs=sources)


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
        style: Style = DEFAULT_STYLE,
        max_rounds: int = 1,
    ):
        """Puts the parts together.

        Args:
          generator: the model.
          template: the wire format it was trained with.
          cards: experts it is told of; ignored without a provider.
          provider: None asks the model alone: no cards, and what looks like a call is just an answer.
          style: how experts' results are told; as in training.
          max_rounds: how many turns with expert calls one question may have.

        Raises:
          UserError: a provider without cards, or a negative `max_rounds`.
        """
        if provider is not None and not cards:
            raise UserError("experts are on but there are no cards; choose a card list")
        if max_rounds < 0:
            raise UserError(f"max_rounds {max_rounds}: must be 0 or more")
        self._generator, self._template, self._provider = generator, template, provider
        self._cards = {card.name: card for card in cards} if provider is not None else {}
        self._style = style
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
            scans = row.query.scans
            roles = [scan.role for scan in scans]
            shown = self._style.wording.inputs(roles, scans[0].modality) if scans else ""
            shown = with_markers(shown, [scan.marker for scan in scans])
            turn = Turn("user", shown + row.query.question)
            (turn,) = with_cards([turn], list(self._cards.values())) if self._cards else [turn]
            pictures = tuple(picture for scan in scans for picture in scan.pictures)
            row.turns.append(Message("user", turn.text, pictures))
            chunks.append(self._chunk(turn, pictures))
        shared = _shared_prefix(chunks)
        prefix = chunks[0].tokens[:shared].tolist()
        session = self._generator.start(len(rows), prefix)
        for row, chunk in zip(rows, chunks, strict=True):
            row.cached.append(_without(chunk, shared))
        session.append([row.cached[0] for row in rows])
        active = [True] * len(rows)
        for round_number in range(self._max_rounds + 1):
            decoded = session.decode(max_new_tokens, self._stops, active=active, sampling=sampling)
            for row, said, speaks in zip(rows, decoded, active, strict=True):
                if speaks:
                    row.hear(self._generator.tokenizer, said)
            if round_number == self._max_rounds:
                break
            turns = [
                row.read_calls(self._generator.tokenizer) if speaks else None
                for row, speaks in zip(rows, active, strict=True)
            ]
            active = [turn is not None for turn in turns]
            if not any(active):
                break
            if any(turn.cut for turn in turns if turn is not None):
                # The cache holds what was cut: begin again with the words that stay.
                session = self._restart(prefix, rows)
            session.append(
                [
                    None if turn is None else self._answer(row, turn)
                    for row, turn in zip(rows, turns, strict=True)
                ]
            )
        return [row.transcript() for row in rows]

    def _restart(self, prefix: Sequence[int], rows: Sequence[_Row]) -> Session:
        session = self._generator.start(len(rows), prefix)
        for number in range(max(len(row.cached) for row in rows)):
            session.append([row.cached[number] if number < len(row.cached) else None for row in rows])
        return session

    def _answer(self, row: _Row, turn: CallingTurn) -> Chunk:
        """The experts' turn after the model's calls."""
        results = [self._result(row.query, call) for call in turn.calls]
        said = exchange(results, row.query.question, self._style)
        bases = [self._base(row.query, result) for result in results if result.shows_overlay]
        pictures = tuple(overlay(base.image) for overlay, base in zip(said.overlays, bases, strict=True))
        # The question at the end holds no marker; `_chunk` checks the count.
        text = with_markers(said.text, [base.marker for base in bases])
        row.annotations += [result.annotation for result in results]
        row.trigger_text = turn.kept
        row.turns.append(Message("expert", text, pictures))
        # The model's own words are cached without their ending: close its turn, then the expert speaks.
        chunk = self._chunk(Turn("expert", text), pictures, after_answer=True)
        row.cached.append(chunk)
        return chunk

    def _result(self, query: Query, call: Call) -> Result:
        """What an expert says; a result that cannot be shown on this image counts as failed."""
        card = self._cards.get(call.expert)
        if card is not None and not card.args:
            call = Call(call.expert)  # its brackets mean nothing
        call = Call(call.expert, canonical_args(call.expert, call.args))
        key, why = query.input_key, ""
        if card is None:
            why = f"there is no expert {call.expert}"
        elif call.args not in (card.args or ("",)):
            why = f"{call.expert} does not take the argument {call.args!r}"
        else:
            try:
                query = query.for_expert(card)
            except ValueError as error:
                why = str(error)
        if card is None or why or self._provider is None:
            return Result(failed(key, call.expert, call.args, why), "classification")
        annotation = self._provider.annotate(query, call.expert, call.args)
        try:
            shown = query.scans[0].shown_with(annotation)
        except ValueError as error:
            return Result(failed(*annotation.key, f"its result cannot be shown: {error}"), card.task)
        result = Result(annotation, card.task, Plane(shown.axis, shown.index))
        if problem := result.problem():
            reason = f"its result does not fit this image: {problem}"
            return dataclasses.replace(result, annotation=failed(*annotation.key, reason))
        return result

    def _base(self, query: Query, result: Result) -> Scan:
        """What is under an overlay: the expert's first scan, or the slice of it that is shown."""
        scan = query.for_expert(self._cards[result.annotation.expert]).scans[0]
        return scan.shown_with(result.annotation)

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
    """One dialogue while it takes place; `cached` is what the model has read and said, behind the prefix."""

    def __init__(self, query: Query):
        self.query = query
        self.turns: list[Message] = []
        self.cached: list[Chunk] = []
        self.annotations: list[Annotation] = []
        self.trigger_text: str | None = None
        self.truncated = False
        self.cut: list[str] = []
        self.not_made: list[Call] = []

    def hear(self, tokenizer: Tokenizer, said: Decoded) -> None:
        """Takes down a turn of the model."""
        self.turns.append(Message("assistant", tokenizer.decode(said.ids).strip()))
        self.cached.append(Chunk.text(said.ids))
        self.truncated = not said.stopped

    def read_calls(self, tokenizer: Tokenizer) -> CallingTurn | None:
        """The last turn if it calls experts; takes what follows the calls out of the dialogue."""
        turn = parse_turn(self.turns[-1].text)
        if not turn.calls:
            return None
        if turn.cut:
            self.turns[-1] = Message("assistant", turn.kept)
            self.cached[-1] = Chunk.text(tokenizer.encode(turn.kept))
            self.cut.append(turn.cut)
            self.not_made += turn.dropped
        return turn

    def transcript(self) -> Transcript:
        return Transcript(
            tuple(self.turns),
            self.turns[-1].text,
            tuple(self.annotations),
            self.trigger_text,
            self.truncated,
            tuple(self.cut),
            (*self.not_made, *parse_turn(self.turns[-1].text).calls),
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
