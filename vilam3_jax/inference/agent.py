"""The agent loop: question, expert call of the model, expert result, answer.

Dialogues are batched (`batching`), and each keeps its cache over the expert's turn. Turns are written by the
same functions as in training (`data/experts/exchange.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, Protocol

import jax
import numpy as np

from vilam3_jax.checkpoints import exports
from vilam3_jax.data.content_keys import inputs_key
from vilam3_jax.data.examples import IMAGE_MARKER, Turn
from vilam3_jax.data.experts.cards import Card, render_cards
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
from vilam3_jax.inference import batching
from vilam3_jax.inference.constraints import AnswerForm, Constraint
from vilam3_jax.inference.generate import MIN_PREFIX, Chunk, Decoded, Generator
from vilam3_jax.inference.images import Scan
from vilam3_jax.inference.sampling import GREEDY, Sampling
from vilam3_jax.runtime import paths
from vilam3_jax.sharding import mesh as mesh_lib
from vilam3_jax.sharding.mesh import MeshConfig

DEFAULT_MAX_NEW_TOKENS = 128


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
      first_turn: index of the user's last question; the turns before it are those of an earlier transcript.
      scans: what the questions are about.
      results: calls and results of the whole dialogue, which a follow-up question knows.
      cards: text of the experts' cards, with which the first turn begins; "" without experts.
    """

    turns: tuple[Message, ...]
    answer: str
    annotations: tuple[Annotation, ...] = ()
    trigger_text: str | None = None
    truncated: bool = False
    cut: tuple[str, ...] = ()
    unexecuted_calls: tuple[Call, ...] = ()
    first_turn: int = 0
    scans: tuple[Scan, ...] = ()
    results: tuple[tuple[Call, Result], ...] = ()
    cards: str = ""

    @property
    def asked(self) -> str:
        """The user's last turn, without cards."""
        return self.turns[self.first_turn].text.removeprefix(self.cards)

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
        self._batcher = batching.Batcher(generator)

    @property
    def processor(self) -> ImageProcessor:
        """Turns images of queries into inputs of the model."""
        return self._generator.processor

    def run(
        self,
        queries: Iterable[Query],
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> Iterator[Transcript]:
        """Runs one dialogue per query, batched, and yields their transcripts in order.

        Args:
          queries: any number; each is read when a row of the batch is free.
          max_new_tokens: limit of each turn of the model.
          sampling: greedy by default.

        Raises:
          UserError: a dialogue longer than the model's cache.
          ModelError: a model whose logits are not finite.
        """
        scripts = (self.script(query, max_new_tokens=max_new_tokens, sampling=sampling) for query in queries)
        return self._batcher.run(scripts)

    def script(
        self,
        query: Query,
        *,
        earlier: Transcript | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        form: AnswerForm | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> batching.Script[Transcript]:
        """One dialogue for a `Batcher`; see `run`.

        Args:
          query: the question; without scans if it is about those of `earlier`.
          earlier: the dialogue that it continues, or None.
          max_new_tokens: limit of each turn of the model.
          sampling: of every turn.
          form: of the answer, or None for any. The model may call experts before; if it answers without a
            call, that answer is dropped and generated again in the form.
          on_event: called with every piece of text as it is generated, and before and after an expert runs.
        """
        row = _Dialogue(query, earlier)
        tell = on_event or (lambda event: None)
        tokenizer = self._generator.tokenizer
        chunk = self._question_chunk(row)
        turn = batching.Turn(
            chunk, max_new_tokens, tuple(self._stops), sampling=sampling, prefix=_prefix_length(chunk)
        )
        for round_number in range(self._max_rounds + 1):
            last = round_number == self._max_rounds
            # An answer that may be replaced is not told.
            decoded = yield from self._answer(
                row, turn, form if last else None, on_event if form is None or last else None
            )
            calls = None if last else row.read_calls()
            if calls is None:
                break
            results: list[tuple[Call, Result]] = []
            for call in map(self._canonical, calls.calls):
                tell(Event("call", str(call)))
                result = row.known(call)
                if result is None:
                    result = yield batching.Wait(functools.partial(self._result, row.query, call))
                tell(Event("result", str(call), result.annotation))
                results.append((call, result))
            # The model must not read what it wrote after its calls.
            kept = Chunk.text(tokenizer.encode(calls.kept) if calls.cut else [])
            forget = len(decoded.ids) if calls.cut else 0
            chunk = kept.join(self._expert_chunk(row, calls.kept, results))
            turn = dataclasses.replace(turn, chunk=chunk, prefix=0, forget=forget)
        if form is not None and not last:
            # An answer without a call: the same again, in the form.
            row.turns.pop()
            again = Chunk.text(turn.chunk.tokens[-1:])
            turn = dataclasses.replace(turn, chunk=again, prefix=0, forget=len(decoded.ids) + 1)
            yield from self._answer(row, turn, form, on_event)
        return row.transcript()

    def _answer(
        self,
        row: _Dialogue,
        turn: batching.Turn,
        form: AnswerForm | None,
        on_event: Callable[[Event], None] | None,
    ) -> batching.Script[Decoded]:
        """Generates a turn of the model and adds it to the dialogue."""
        tokenizer = self._generator.tokenizer
        if form is not None:
            turn = dataclasses.replace(turn, constraint=Constraint(form, tokenizer, turn.stop_ids))
        text = None
        if on_event is not None:
            text = StreamedText(tokenizer, lambda new: on_event(Event("text", new)))
            turn = dataclasses.replace(turn, on_tokens=text.add)
        decoded = yield turn
        if text is not None:
            text.close()
        if decoded.error:
            raise ModelError(decoded.error)
        row.add_answer(tokenizer, decoded)
        return decoded

    def replay(self, exchanges: Sequence[tuple[Query, str]], *, system: str = "") -> Transcript | None:
        """The transcript of a dialogue that somebody else kept: (question, answer) each.

        `system` replaces the system text of the template. None without exchanges and system text.
        """
        earlier = Transcript((Message("system", system),), "") if system else None
        for query, answer in exchanges:
            row = _Dialogue(query, earlier)
            self._question_chunk(row)
            row.turns.append(Message("assistant", answer))
            earlier = row.transcript()
        return earlier

    def question(self, query: Query) -> Chunk:
        """What the model reads before its first answer to a question."""
        return self._question_chunk(_Dialogue(query, None))

    def _question_chunk(self, row: _Dialogue) -> Chunk:
        """Adds the user's turn; the chunk has the earlier turns, too."""
        scans = row.new_scans
        shown = self._style.wording.inputs([scan.role for scan in scans], scans[0].modality) if scans else ""
        shown = with_markers(shown, [scan.marker for scan in scans])
        turn = Turn("user", shown + row.query.question)
        if self._cards and not row.cards:
            cards = list(self._cards.values())
            (turn,), row.cards = with_cards([turn], cards), render_cards(cards)
        row.turns.append(Message("user", turn.text, tuple(image for scan in scans for image in scan.images)))
        turns = [Turn(message.role, message.text) for message in row.turns]
        return self._chunk(turns, tuple(image for message in row.turns for image in message.images))

    def _expert_chunk(self, row: _Dialogue, kept: str, results: Sequence[tuple[Call, Result]]) -> Chunk:
        """Adds the expert's turn after the calls of `kept`."""
        reply = exchange([result for _, result in results], row.query.question, self._style)
        bases = [self._base(row.query, result) for _, result in results if result.shows_overlay]
        images = tuple(overlay(base.image) for overlay, base in zip(reply.overlays, bases, strict=True))
        # The question at the end has no marker; `_chunk` checks the count.
        text = with_markers(reply.text, [base.marker for base in bases])
        row.results += results
        row.trigger_text = kept
        row.turns.append(Message("expert", text, images))
        # The model's turn is cached without its end, so the chunk starts with that.
        return self._chunk([Turn("expert", text)], images, after_answer=True)

    def _canonical(self, call: Call) -> Call:
        """A call in the wording under which results are stored."""
        card = self._cards.get(call.expert)
        if card is not None and not card.args:
            return Call(call.expert)  # the expert takes no arguments
        return Call(call.expert, canonical_args(call.expert, call.args))

    def _result(self, query: Query, call: Call) -> Result:
        """The result of a call; one that cannot be shown on this image counts as failed."""
        card = self._cards.get(call.expert)
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

    def _chunk(
        self, turns: Sequence[Turn], images: tuple[np.ndarray, ...], *, after_answer: bool = False
    ) -> Chunk:
        if sum(turn.text.count(IMAGE_MARKER) for turn in turns) != len(images):
            raise UserError(f"the question holds {IMAGE_MARKER}; leave it out, it is inserted automatically")
        generator, processor = self._generator, self.processor
        count = generator.tokens_per_image
        grids = [processor.grid(image) for image in images]
        turns = processor.expand(turns, grids)
        encoded = encode_prompt(generator.tokenizer, self._template, turns, count, after_answer=after_answer)
        encoded = processor.merge(encoded, grids, count)
        index = encoded.image_of_token * count + encoded.visual_offset
        inputs = tuple(tile for image in images for tile in processor.inputs(image))
        visual = np.where(encoded.image_of_token >= 0, index, -1)
        return Chunk(encoded.tokens, visual, inputs, processor.tile_map(grids))


def _prefix_length(chunk: Chunk) -> int:
    """Tokens up to the last image, which other questions about the same images begin with, too."""
    images = np.flatnonzero(chunk.visual_index >= 0)
    length = int(images[-1]) + 1 if len(images) else 0
    return length if MIN_PREFIX <= length < len(chunk.tokens) else 0


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happens while a question is answered.

    Attributes:
      kind: 'text' (the model wrote), 'call' (an expert starts) or 'result' (it is done).
      text: the new text, or the call.
      annotation: the result.
    """

    kind: Literal["text", "call", "result"]
    text: str
    annotation: Annotation | None = None


class StreamedText:
    """Turns tokens into pieces of text that never end within a character."""

    def __init__(self, tokenizer: Tokenizer, tell: Callable[[str], None]):
        self._tokenizer, self._tell = tokenizer, tell
        self._ids: list[int] = []
        self._told = ""

    def add(self, ids: Sequence[int]) -> None:
        """Tells what the new tokens add."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._flush(text)

    def close(self) -> None:
        """Tells the rest."""
        self._flush(self._tokenizer.decode(self._ids))

    def _flush(self, text: str) -> None:
        if len(text) > len(self._told):
            new, self._told = text[len(self._told) :], text
            self._tell(new)


class ModelError(UserError):
    """The model produced numbers that are not finite."""

    exit_code = 1


class _Dialogue:
    """A dialogue in progress."""

    def __init__(self, query: Query, earlier: Transcript | None):
        self.new_scans = query.scans
        if not query.scans and earlier is not None:
            query = dataclasses.replace(query, scans=earlier.scans)
        self.query = query
        self.turns = list(earlier.turns) if earlier is not None else []
        self.first_turn = len(self.turns)
        self.cards = earlier.cards if earlier is not None else ""
        self.earlier = earlier.results if earlier is not None and not self.new_scans else ()
        self.results: list[tuple[Call, Result]] = []
        self.trigger_text: str | None = None
        self.truncated = False
        self.cut: list[str] = []
        self.unexecuted_calls: list[Call] = []

    def known(self, call: Call) -> Result | None:
        """The result of the same call earlier in the dialogue, about the same scans."""
        return next((result for made, result in (*self.earlier, *self.results) if made == call), None)

    def add_answer(self, tokenizer: Tokenizer, decoded: Decoded) -> None:
        self.turns.append(Message("assistant", tokenizer.decode(decoded.ids).strip()))
        self.truncated = not decoded.stopped

    def read_calls(self) -> CallingTurn | None:
        """The last turn if it calls experts; removes the text after the calls."""
        turn = parse_turn(self.turns[-1].text)
        if not turn.calls:
            return None
        if turn.cut:
            self.turns[-1] = Message("assistant", turn.kept)
            self.cut.append(turn.cut)
            self.unexecuted_calls += turn.dropped
        return turn

    def transcript(self) -> Transcript:
        return Transcript(
            tuple(self.turns),
            self.turns[-1].text,
            tuple(result.annotation for _, result in self.results),
            self.trigger_text,
            self.truncated,
            tuple(self.cut),
            (*self.unexecuted_calls, *parse_turn(self.turns[-1].text).calls),
            first_turn=self.first_turn,
            scans=self.query.scans,
            results=(*self.earlier, *self.results),
            cards=self.cards,
        )


def load_generator(
    checkpoint: paths.PathLike,
    *,
    max_length: int = 2048,
    batch_size: int = 16,
    text: str = "",
    tensor: int = 1,
    dtype: str | None = None,
    cache_dtype: str | None = None,
) -> tuple[Generator, Template]:
    """Opens an export of a generative model.

    Args:
      checkpoint: export folder, or a run with one.
      max_length: maximum positions of a dialogue.
      batch_size: maximum dialogues of a batch.
      text: changes of the export's text rules, see `TextRules.changed`.
      tensor: devices that share the heads and hidden units; -1 is all. With several processes, all call this.
      dtype: "float32" or "bfloat16": type of weights and activations; "int8": matrices of the LLM in int8,
        the rest in the type of the export's activations. By default that of the export.
      cache_dtype: type of cached keys and values: "float32", "bfloat16" or "int8"; by default that of
        activations.

    Raises:
      UserError: no export of a generative model with a tokenizer, an unknown text rule or type, or a model
        that cannot be split over so many devices.
    """
    folder = exports.locate(checkpoint)
    config = exports.load_model_config(folder)
    if config.get("kind") != "generative":
        raise UserError(
            f"{folder}: holds a {config.get('kind')} model, which generates no text; "
            "give the export of a later stage"
        )
    template = model_template(config, text)
    tokenizer = load_tokenizer(folder / "tokenizer")
    mesh = None
    if tensor != 1:
        count = len(jax.devices()) if tensor == -1 else tensor
        axes = MeshConfig(data=1, fsdp=1, tensor=count)
        mesh = mesh_lib.build_mesh(axes, jax.devices()[:count])
    params, config, _ = exports.load_export(folder, mesh=mesh, dtype=dtype)
    generator = Generator(
        config,
        params,
        tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        mesh=mesh,
        cache_dtype=cache_dtype,
    )
    return generator, template
