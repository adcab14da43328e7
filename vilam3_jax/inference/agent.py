"""The agent loop: question, expert call of the model, expert result, answer.

Dialogues are batched in one `Session`, which keeps the cache over the expert's turn. Turns are written by the
same functions as in training (`data/experts/exchange.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
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
from vilam3_jax.data.volume_slices import with_markers
from vilam3_jax.errors import UserError
from vilam3_jax.inference.generate import GREEDY, Chunk, Decoded, Generator, Sampling, Session
from vilam3_jax.inference.images import Scan
from vilam3_jax.runtime import paths

DEFAULT_MAX_NEW_TOKENS = 128
_MIN_SHARED = 16  # tokens of a prefix worth computing once for all rows


@dataclasses.dataclass(frozen=True)
class Query:
    """A question about one image, about several images of one patient, or without image.

    Attributes:
      question: without image markers.
      scans: in the order in which they are shown.
    """

    question: str
    scans: tuple[Scan, ...] = ()

    @property
    def input_key(self) -> str:
        """Content key of all scans; `unknown` if one of them has none."""
        if not self.scans or not all(scan.input_key for scan in self.scans):
            return "unknown"
        return inputs_key([(scan.role, scan.input_key) for scan in self.scans])

    def for_expert(self, card: Card) -> Query:
        """The question with the scans that an expert reads, in the order of its roles.

        Raises:
          ValueError: there is no image, or a role is missing.
        """
        if not self.scans:
            raise ValueError("the question is about no image")
        if card.roles == ("",):
            return dataclasses.replace(self, scans=(dataclasses.replace(self.scans[0], role=""),))
        shown = {scan.role: scan for scan in self.scans}
        if missing := [role for role in card.roles if role not in shown]:
            raise ValueError(f"it needs {', '.join(card.roles)}, and {', '.join(missing)} is missing")
        return dataclasses.replace(self, scans=tuple(shown[role] for role in card.roles))


@dataclasses.dataclass(frozen=True)
class Message:
    """A turn of a finished dialogue, with the images of its markers."""

    role: str
    text: str
    images: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class Transcript:
    """A finished dialogue.

    Attributes:
      turns: in order.
      answer: the last turn of the model.
      annotations: the expert results in the order of the calls, failed ones included.
      trigger_text: the last turn of the model whose calls were executed, or None.
      truncated: whether the answer ended at the token limit.
      cut: text after expert calls, which was removed from the dialogue.
      unexecuted_calls: calls in removed text, in the answer, or without experts.
    """

    turns: tuple[Message, ...]
    answer: str
    annotations: tuple[Annotation, ...] = ()
    trigger_text: str | None = None
    truncated: bool = False
    cut: tuple[str, ...] = ()
    unexecuted_calls: tuple[Call, ...] = ()

    @property
    def annotation(self) -> Annotation | None:
        """The last expert result, a failure included, or None."""
        return self.annotations[-1] if self.annotations else None

    @property
    def trigger(self) -> tuple[str, str] | None:
        """(expert, arguments) of the last executed call, or None."""
        last = self.annotation
        return None if last is None else (last.expert, last.args)

    @property
    def prompt(self) -> str:
        """Text of the first turn, cards included."""
        return self.turns[0].text

    @property
    def expert_text(self) -> str | None:
        """The last expert turn, which ends with the question, or None."""
        return next((turn.text for turn in reversed(self.turns) if turn.role == "expert"), None)

    @property
    def overlay(self) -> np.ndarray | None:
        """The last overlay of an expert, uint8 [H, W, 3], or None."""
        overlays = [image for turn in self.turns if turn.role == "expert" for image in turn.images]
        return overlays[-1] if overlays else None


class Provider(Protocol):
    """A source of expert results."""

    def annotate(self, query: Query, expert: str, args: str) -> Annotation:
        """The result of an expert on `Query.for_expert`; without one a failed annotation, never an error."""
        ...


class AnnotationProvider:
    """Stored annotations, falsified if a seed is given."""

    def __init__(self, store: AnnotationStore, *, falsify_seed: int | None = None):
        self._store, self._falsify_seed = store, falsify_seed

    def annotate(self, query: Query, expert: str, args: str) -> Annotation:
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
    """Results of a live expert host, which the caller closes."""

    def __init__(self, host: ExpertHost):
        self._host = host

    def annotate(self, query: Query, expert: str, args: str) -> Annotation:
        sources = [(scan.role, scan.volume or scan.png) for scan in query.scans]
        if not all(source for _, source in sources):
            return failed(query.input_key, expert, args, "the expert host needs the scan's file or the image")
        return self._host.ask(expert, args, input_key=query.input_key, inputs=sources)


class Providers:
    """Tries one or more providers in order until one succeeds; else the result is that of the last."""

    def __init__(self, providers: Sequence[Provider]):
        self._providers = list(providers)

    def annotate(self, query: Query, expert: str, args: str) -> Annotation:
        for provider in self._providers:
            annotation = provider.annotate(query, expert, args)
            if annotation.status == "ok":
                break
        return annotation


class Agent:
    """A model with its template, expert cards, and a source of expert results."""

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
        """Checks the arguments.

        Args:
          generator: the model.
          template: chat template of its training.
          cards: cards of the experts shown to the model; unused without a provider.
          provider: provider of expert results; None shows no cards and executes no calls.
          style: wording of expert results, as in training.
          max_rounds: maximum turns with expert calls per question.

        Raises:
          UserError: a provider without cards, or a negative `max_rounds`.
        """
        if provider is not None and not cards:
            raise UserError("experts are on but there are no cards; choose a card list")
        if max_rounds < 0:
            raise UserError(f"max_rounds {max_rounds}: must be 0 or more")
        self._generator, self._template, self._provider = generator, template, provider
        self._style = style
        self._cards = {card.name: card for card in cards} if provider is not None else {}
        self._max_rounds = max_rounds if provider is not None else 0
        self._stops = template.stop_ids(generator.tokenizer)

    @property
    def batch_size(self) -> int:
        """Maximum number of queries of one `run`."""
        return self._generator.batch_size

    @property
    def processor(self) -> ImageProcessor:
        """Turns images of queries into inputs of the model."""
        return self._generator.processor

    def run(
        self,
        queries: Sequence[Query],
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> list[Transcript]:
        """Runs one dialogue per query, batched, and returns their transcripts.

        Args:
          queries: 1 to `batch_size`.
          max_new_tokens: limit of each turn of the model.
          sampling: greedy by default.

        Raises:
          UserError: too many queries, or a dialogue longer than the model's cache.
        """
        rows = [_Dialogue(query) for query in queries]
        chunks = [self._question_chunk(row) for row in rows]
        shared = _shared_prefix(chunks)
        prefix = chunks[0].tokens[:shared].tolist()
        for row, chunk in zip(rows, chunks, strict=True):
            rest = dict(tokens=chunk.tokens[shared:], visual_index=chunk.visual_index[shared:])
            row.cached.append(dataclasses.replace(chunk, **rest))
        session = self._start(prefix, rows)
        active, tokenizer = [True] * len(rows), self._generator.tokenizer
        for round_number in range(self._max_rounds + 1):
            decoded = session.decode(max_new_tokens, self._stops, active=active, sampling=sampling)
            for row, answer, is_active in zip(rows, decoded, active, strict=True):
                if is_active:
                    row.add_answer(tokenizer, answer)
            if round_number == self._max_rounds:
                break
            turns = [
                row.read_calls(tokenizer) if is_active else None
                for row, is_active in zip(rows, active, strict=True)
            ]
            active = [turn is not None for turn in turns]
            if not any(active):
                break
            if any(turn.cut for turn in turns if turn is not None):
                session = self._start(prefix, rows)  # without the removed text
            pairs = zip(rows, turns, strict=True)
            session.append([None if turn is None else self._expert_chunk(row, turn) for row, turn in pairs])
        return [row.transcript() for row in rows]

    def _start(self, prefix: Sequence[int], rows: Sequence[_Dialogue]) -> Session:
        session = self._generator.start(len(rows), prefix)
        for chunks in itertools.zip_longest(*(row.cached for row in rows)):
            session.append(chunks)
        return session

    def _question_chunk(self, row: _Dialogue) -> Chunk:
        """Adds the user's turn."""
        scans = row.query.scans
        shown = self._style.wording.inputs([scan.role for scan in scans], scans[0].modality) if scans else ""
        shown = with_markers(shown, [scan.marker for scan in scans])
        turn = Turn("user", shown + row.query.question)
        (turn,) = with_cards([turn], list(self._cards.values())) if self._cards else [turn]
        images = tuple(image for scan in scans for image in scan.images)
        row.turns.append(Message("user", turn.text, images))
        return self._chunk(turn, images)

    def _expert_chunk(self, row: _Dialogue, turn: CallingTurn) -> Chunk:
        """Executes the calls of a turn and adds the expert's turn."""
        results = [self._result(row.query, call) for call in turn.calls]
        reply = exchange(results, row.query.question, self._style)
        bases = [self._base(row.query, result) for result in results if result.shows_overlay]
        images = tuple(overlay(base.image) for overlay, base in zip(reply.overlays, bases, strict=True))
        # The question at the end has no marker; `_chunk` checks the count.
        text = with_markers(reply.text, [base.marker for base in bases])
        row.annotations += [result.annotation for result in results]
        row.trigger_text = turn.kept
        row.turns.append(Message("expert", text, images))
        # The model's turn is cached without its end, so the chunk starts with that.
        chunk = self._chunk(Turn("expert", text), images, after_answer=True)
        row.cached.append(chunk)
        return chunk

    def _result(self, query: Query, call: Call) -> Result:
        """The result of a call; one that cannot be shown on this image counts as failed."""
        card = self._cards.get(call.expert)
        if card is not None and not card.args:
            call = Call(call.expert)  # the expert takes no arguments
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
        """The scan or slice below an overlay, of the first role of the expert."""
        scan = query.for_expert(self._cards[result.annotation.expert]).scans[0]
        return scan.shown_with(result.annotation)

    def _chunk(self, turn: Turn, images: tuple[np.ndarray, ...], *, after_answer: bool = False) -> Chunk:
        if turn.text.count(IMAGE_MARKER) != len(images):
            raise UserError(f"the question holds {IMAGE_MARKER}; leave it out, it is inserted automatically")
        generator, processor = self._generator, self.processor
        count = generator.tokens_per_image
        grids = [processor.grid(image) for image in images]
        turns = processor.expand([turn], grids)
        encoded = encode_prompt(generator.tokenizer, self._template, turns, count, after_answer=after_answer)
        encoded = processor.merge(encoded, grids, count)
        index = encoded.image_of_token * count + encoded.visual_offset
        inputs = tuple(tile for image in images for tile in processor.inputs(image))
        visual = np.where(encoded.image_of_token >= 0, index, -1)
        return Chunk(encoded.tokens, visual, inputs, processor.tile_map(grids))


def _shared_prefix(chunks: Sequence[Chunk]) -> int:
    """Length of the text that all chunks start with; leaves a token to each, and is 0 if it is short."""
    length = min(len(chunk.tokens) for chunk in chunks) - 1
    alike = np.stack([chunk.tokens[:length] for chunk in chunks]) == chunks[0].tokens[:length]
    text = np.stack([chunk.visual_index[:length] for chunk in chunks]) < 0
    length = int(np.append(np.all(alike & text, axis=0), False).argmin())
    return length if length >= _MIN_SHARED else 0


class _Dialogue:
    """A dialogue in progress; `cached` has the chunks after the prefix, those of the model included."""

    def __init__(self, query: Query):
        self.query = query
        self.turns: list[Message] = []
        self.cached: list[Chunk] = []
        self.annotations: list[Annotation] = []
        self.trigger_text: str | None = None
        self.truncated = False
        self.cut: list[str] = []
        self.unexecuted_calls: list[Call] = []

    def add_answer(self, tokenizer: Tokenizer, decoded: Decoded) -> None:
        self.turns.append(Message("assistant", tokenizer.decode(decoded.ids).strip()))
        self.cached.append(Chunk.text(decoded.ids))
        self.truncated = not decoded.stopped

    def read_calls(self, tokenizer: Tokenizer) -> CallingTurn | None:
        """The last turn if it calls experts; removes the text after the calls."""
        turn = parse_turn(self.turns[-1].text)
        if not turn.calls:
            return None
        if turn.cut:
            self.turns[-1] = Message("assistant", turn.kept)
            self.cached[-1] = Chunk.text(tokenizer.encode(turn.kept))
            self.cut.append(turn.cut)
            self.unexecuted_calls += turn.dropped
        return turn

    def transcript(self) -> Transcript:
        return Transcript(
            tuple(self.turns),
            self.turns[-1].text,
            tuple(self.annotations),
            self.trigger_text,
            self.truncated,
            tuple(self.cut),
            (*self.unexecuted_calls, *parse_turn(self.turns[-1].text).calls),
        )


def load_generator(
    checkpoint: paths.PathLike, *, max_length: int = 2048, batch_size: int = 16, text: str = ""
) -> tuple[Generator, Template]:
    """Opens an export of a generative model.

    Args:
      checkpoint: export folder, or a run with one.
      max_length: maximum positions of a dialogue.
      batch_size: maximum dialogues of a batch.
      text: changes of the export's text rules, see `TextRules.changed`.

    Raises:
      UserError: no export of a generative model with a tokenizer, or an unknown text rule.
    """
    checkpoint = exports.locate(checkpoint)
    config = exports.load_model_config(checkpoint)
    if config.get("kind") != "generative":
        raise UserError(
            f"{checkpoint}: holds a {config.get('kind')} model, which generates no text; "
            "give the export of a later stage"
        )
    template = model_template(config, text)
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    params, config, _ = exports.load_export(checkpoint)
    generator = Generator(config, params, tokenizer, max_length=max_length, batch_size=batch_size)
    return generator, template
