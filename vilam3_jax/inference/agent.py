"""The agent loop: question, expert call of the model, expert result, answer.

Dialogues are batched (`batching`), and each keeps its cache over the expert's turn. Turns are written by the
same functions as in training (`data/experts/exchange.py`).
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, Protocol

import numpy as np

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
from vilam3_jax.data.experts.wording import Plane, one_line
from vilam3_jax.data.image_processor import ImageProcessor
from vilam3_jax.data.templates import Encoded, Template, encode_prompt
from vilam3_jax.data.tokenizer import Tokenizer
from vilam3_jax.data.volume_slices import with_markers
from vilam3_jax.errors import UserError
from vilam3_jax.inference import batching
from vilam3_jax.inference.constraints import AnswerForm, Constraint
from vilam3_jax.inference.generate import MIN_PREFIX, Chunk, Decoded, Generator, encoded_chunk
from vilam3_jax.inference.images import Scan
from vilam3_jax.inference.sampling import GREEDY, Sampling
from vilam3_jax.inference.transcript import ExpertCall, Generated, Message, Transcript
from vilam3_jax.runtime import processes

DEFAULT_MAX_NEW_TOKENS = 128
MAX_CALLS = 8  # of one turn; what the model writes after them is cut
_MAX_REASON = 500  # characters of a failure's reason and of a check's message, for people


@dataclasses.dataclass(frozen=True)
class Query:
    """A question about one image, about several images of one patient, or without image.

    Attributes:
      question: without image markers.
      scans: in the order in which they are shown.
    """

    question: str
    scans: tuple[Scan, ...] = ()

    def __post_init__(self) -> None:
        try:
            self.question.encode()
        except UnicodeEncodeError:
            raise UserError("the question holds bytes that are no UTF-8; write it as plain text") from None

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


class PrimaryProvider:
    """Results that the primary process obtains for all processes."""

    def __init__(self, provider: Provider):
        self._provider = provider

    def annotate(self, query: Query, expert: str, args: str) -> Annotation:
        def make() -> str:
            return base64.b64encode(self._provider.annotate(query, expert, args).to_bytes()).decode()

        return Annotation.from_bytes(base64.b64decode(processes.made_by_primary_process(make)))


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
        return self.run_scripts(scripts)

    def run_scripts(self, scripts: Iterable[batching.Script[Transcript]]) -> Iterator[Transcript]:
        """Runs dialogues of `script`, batched, and yields their transcripts in order; see `run`."""
        return self._batcher.run(scripts)

    def option_scores(self, query: Query, options: Sequence[str]) -> list[float]:
        """Log-probability of each text as the whole answer to a question, stop token included.

        All are read in one pass after the question, whose images share their cached prefix with other
        questions about them. Experts are not asked.
        """
        chunk = self.question(query)
        encode = self._generator.tokenizer.encode
        texts = [[*encode(option.strip()), self._stops[0]] for option in options]
        totals: list[float] = []
        for first in range(0, len(texts), self._generator.batch_size):
            part = texts[first : first + self._generator.batch_size]
            session = self._generator.start(len(part), chunk)
            totals += [float(scores.sum(dtype=np.float64)) for scores in session.score(part)]
        return totals

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
            chunk, max_new_tokens, tuple(self._stops), sampling=sampling, prefix=prefix_length(chunk)
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
            for call in dict.fromkeys(map(self._canonical, calls.calls)):
                tell(Event("call", str(call)))
                began, result = time.monotonic(), row.known(call)
                known = result is not None
                if result is None:
                    result = yield batching.Wait(functools.partial(self._result, row.query, call))
                accepted = self._refusal(call) is None
                row.add_call(call, result.annotation, accepted=accepted, known=known, began=began)
                tell(Event("result", str(call), result.annotation))
                results.append((call, result))
            # The model must not read what it wrote after its calls.
            reread = self._plain(Turn("assistant", calls.kept)) if calls.cut else ""
            kept = Chunk.text(tokenizer.encode(reread))
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
        began = time.monotonic()
        decoded = yield turn
        if text is not None:
            text.close()
        if decoded.error:
            raise ModelError(decoded.error)
        row.add_answer(tokenizer, decoded)
        row.describe_answer(decoded, time.monotonic() - began)
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

    def refusal(self, call: Call) -> str | None:
        """Why a call is refused, because no card lists its expert or argument, or None."""
        return self._refusal(self._canonical(call))

    def annotate(self, query: Query, call: Call) -> Annotation:
        """The result of a call by a person or a program, as the model would get it; failed ones included."""
        return self._result(query, self._canonical(call)).annotation

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
        shown_images = tuple(image for scan in scans for image in scan.images)
        row.turns.append(Message("user", turn.text, shown_images, time.time()))
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
        row.turns.append(Message("expert", text, images, time.time()))
        # The model's turn is cached without its end, so the chunk starts with that.
        return self._chunk([Turn("expert", text)], images, after_answer=True)

    def _canonical(self, call: Call) -> Call:
        """A call in the wording under which results are stored."""
        card = self._cards.get(call.expert)
        if card is not None and not card.args:
            return Call(call.expert)  # the expert takes no arguments
        return Call(call.expert, canonical_args(call.expert, call.args))

    def _refusal(self, call: Call) -> str | None:
        """Why a call is not passed on to the source of results, or None."""
        card = self._cards.get(call.expert)
        if card is None:
            return f"there is no expert {call.expert}"
        if call.args not in (card.args or ("",)):
            return f"{call.expert} does not take the argument {call.args!r}"
        return None

    def _result(self, query: Query, call: Call) -> Result:
        """The result of a call; one that cannot be shown on this image counts as failed."""
        card, why = self._cards.get(call.expert), self._refusal(call)
        key = query.input_key
        if card is not None and why is None:
            try:
                query = query.for_expert(card)
            except ValueError as error:
                why = str(error)
        if card is None or why is not None or self._provider is None:
            return Result(failed(key, call.expert, call.args, why or ""), "classification")
        annotation = _for_people(self._provider.annotate(query, call.expert, call.args))
        try:
            shown = query.scans[0].shown_with(annotation)
            result = Result(annotation, card.task, Plane(shown.axis, shown.index))
            problem = result.problem()
            if problem is None and result.shows_overlay:
                assert shown.axis is not None and shown.index is not None  # see Result.problem
                annotation.label_slice(shown.axis, shown.index)
        except ValueError as error:
            return Result(failed(*annotation.key, f"its result cannot be shown: {error}"), card.task)
        if problem:
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
        # No text may open a turn, and nothing that a model wrote is an image.
        turns = [dataclasses.replace(turn, text=self._plain(turn)) for turn in turns]
        if sum(turn.text.count(IMAGE_MARKER) for turn in turns) != len(images):
            raise UserError(f"the question holds {IMAGE_MARKER}; leave it out, it is inserted automatically")
        tokenizer, size = self._generator.tokenizer, self._generator.tokens_per_image

        def encode(turns: Sequence[Turn]) -> Encoded:
            return encode_prompt(tokenizer, self._template, turns, size, after_answer=after_answer)

        return encoded_chunk(turns, images, self.processor, size, encode)

    def _plain(self, turn: Turn) -> str:
        text = self._template.without_headers(turn.text)
        return text.replace(IMAGE_MARKER, f"< {IMAGE_MARKER[1:]}") if turn.role == "assistant" else text


def _for_people(annotation: Annotation) -> Annotation:
    """A result whose reason and messages are single short lines, which a terminal can show."""
    verdicts = tuple(
        dataclasses.replace(one, message=one_line(one.message, _MAX_REASON)) for one in annotation.verdicts
    )
    reason = annotation.reason and (one_line(annotation.reason, _MAX_REASON) or "no reason given")
    if reason == annotation.reason and verdicts == annotation.verdicts:
        return annotation
    return dataclasses.replace(annotation, reason=reason, verdicts=verdicts)


def prefix_length(chunk: Chunk) -> int:
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
        self.calls: list[ExpertCall] = []
        self.asked_at, self.began = time.time(), time.monotonic()

    def known(self, call: Call) -> Result | None:
        """The result of the same call earlier in the dialogue, about the same scans."""
        return next((result for made, result in (*self.earlier, *self.results) if made == call), None)

    def add_answer(self, tokenizer: Tokenizer, decoded: Decoded) -> None:
        self.turns.append(Message("assistant", tokenizer.decode(decoded.ids).strip()))
        self.truncated = not decoded.stopped

    def describe_answer(self, decoded: Decoded, seconds: float) -> None:
        """Adds to the last turn how it was generated."""
        known = len(decoded.log_probs) == len(decoded.ids)
        made = Generated(len(decoded.ids), sum(decoded.log_probs) if known else None, seconds)
        self.turns[-1] = dataclasses.replace(self.turns[-1], time=time.time(), generated=made)

    def add_call(
        self, call: Call, annotation: Annotation, *, accepted: bool, known: bool, began: float
    ) -> None:
        """Records a call whose result will be in the next turn; `began` is of `time.monotonic`."""
        seconds = time.monotonic() - began
        self.calls.append(
            ExpertCall(call, annotation, accepted, known, len(self.turns), time.time(), seconds)
        )

    def read_calls(self) -> CallingTurn | None:
        """The last turn if it calls experts; removes the text after the calls."""
        turn = parse_turn(self.turns[-1].text, MAX_CALLS)
        if not turn.calls:
            return None
        if turn.cut:
            self.turns[-1] = dataclasses.replace(self.turns[-1], text=turn.kept)
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
            calls=tuple(self.calls),
            asked_at=self.asked_at,
            seconds=time.monotonic() - self.began,
        )
