"""The answer to one question: its text as it is generated, tokens, experts' results and usage."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Literal, TypeVar

from vilam3_jax.data.experts.grammar import Call, parse_turn
from vilam3_jax.data.experts.record import Annotation, Key
from vilam3_jax.data.images import encode_png
from vilam3_jax.data.tokenizer import Tokenizer
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.inference import batching
from vilam3_jax.inference.agent import Event, Transcript
from vilam3_jax.inference.assistant import Assistant, Reply
from vilam3_jax.inference.generate import Decoded
from vilam3_jax.inference.stop_texts import certain, until_stop
from vilam3_jax.serving.engine import LATE, ClosedError, DeadlineError, Engine
from vilam3_jax.serving.inputs import Ask, Dialogue

_LOG = logging.getLogger(__name__)
_LOWEST = -9999.0  # log-probability of what is impossible; JSON has no infinity
_GRACE_SECONDS = 1.0  # after which the engine is not waited for

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens that were read (images and experts' turns included) and written."""

    prompt: int
    completion: int


@dataclasses.dataclass(frozen=True)
class Step:
    """Something that happens while an answer is made.

    Attributes:
      kind: 'text' (more of the answer), 'draft' (text that may become an expert call or the answer), 'call'
        (an expert starts) or 'result' (it is done).
      text: the new text.
      record: the call, see `call_record`.
    """

    kind: Literal["text", "draft", "call", "result"]
    text: str = ""
    record: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
      text: without the stop text that ended it.
      reply: with the whole dialogue.
      usage: of all turns.
      experts: the calls with their results, see `call_record`.
      notes: for the reader, see `Reply`.
      tokens: (text, log-probability) of the last turn of the model; None if they were not asked for.
      image, overlay: data URLs of the image as shown to the model and of an expert's overlay, if asked for.
      transcript: the turns since the question, cards included, if asked for.
      known: (expert, arguments) of the earlier calls whose results the model knows.
    """

    text: str
    reply: Reply
    usage: Usage
    experts: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    tokens: tuple[tuple[str, float], ...] | None = None
    image: str | None = None
    overlay: str | None = None
    transcript: tuple[dict[str, Any], ...] | None = None
    known: tuple[tuple[str, str], ...] = ()

    @property
    def complete(self) -> bool:
        """Whether it ended by itself, not at a limit."""
        return not self.reply.transcript.truncated

    @property
    def extra(self) -> dict[str, Any]:
        """What OpenAI's interface has no place for."""
        asked = {"image": self.image, "overlay": self.overlay, "transcript": self.transcript}
        return {
            "description": self.reply.description,
            "notes": list(self.notes),
            "known": [{"name": name, "args": args} for name, args in self.known],
            **{name: value for name, value in asked.items() if value is not None},
        }


class Observed:
    """Runs a script, adds stop texts to its turns, and counts their tokens."""

    def __init__(self, stops: Sequence[str] = ()):
        """`stops` end every turn of the model."""
        self._stops = tuple(stops)
        self.read, self.written = 0, 0
        self.last = Decoded([], False)

    def run(self, script: batching.Script[T]) -> batching.Script[T]:
        """The same script, observed."""
        try:
            wanted = next(script)
            while True:
                if isinstance(wanted, batching.Turn):
                    wanted = dataclasses.replace(wanted, stop_texts=wanted.stop_texts + self._stops)
                    self.read += len(wanted.chunk.tokens)
                else:
                    wanted = batching.Wait(functools.partial(_of_expert, wanted.call))
                try:
                    value = yield wanted
                except Exception as error:
                    wanted = script.throw(error)
                    continue
                if isinstance(wanted, batching.Turn):
                    self.last = value
                    self.written += len(value.ids)
                wanted = script.send(value)
        except StopIteration as end:
            return end.value
        finally:
            script.close()


def _of_expert(call: Callable[[], Any]) -> Any:
    """Calls an expert; what goes wrong there is not the client's fault, and names files of the server."""
    try:
        return call()
    except UserError as error:
        _LOG.error("the results of an expert cannot be read: %s", error)
        raise UnavailableError("the results of an expert cannot be read; tell who runs the server") from error


class AnswerText:
    """Text of an answer in pieces, without outer blanks and what follows a stop text."""

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = stops
        self._text, self._sent = "", 0

    def add(self, piece: str) -> str:
        """What can be sent after another piece: no blanks at the end, no possible start of a stop text."""
        self._text = (self._text + piece).lstrip()
        ready = certain(self._text, self._stops).rstrip()
        new = ready[self._sent :]
        self._sent = max(self._sent, len(ready))
        return new

    def rest(self, answer: str) -> str:
        """What remains to be sent of the whole answer."""
        return answer[self._sent :]


async def answer(
    ask: Ask,
    dialogue: Dialogue,
    kept: Transcript | None,
    assistant: Assistant,
    engine: Engine,
    *,
    seconds: float,
    stream: bool,
    clean: Callable[[str], str],
    keep: Callable[[Annotation], dict[str, Any] | None] | None = None,
) -> AsyncGenerator[Step | Answer, None]:
    """Yields what happens (only if `stream`), and at last the answer; closing it frees the row.

    `kept` is the dialogue that the question continues, if the server has it. `clean` removes paths from
    messages for the client. `keep` keeps the label map of a result, and returns what the client learns of it.
    Raises what `Engine.submit` and its future raise.
    """
    loop = asyncio.get_running_loop()
    happened: asyncio.Queue[Event | Future[Reply]] = asyncio.Queue()

    def tell(item: Event | Future[Reply]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(happened.put_nowait, item)

    experts = ask.options.experts
    earlier = kept or await asyncio.to_thread(
        assistant.replay, dialogue.exchanges, system=dialogue.system, experts=experts
    )
    observed, calls = Observed(ask.stops), _Calls(clean, keep)
    script = assistant.script(
        dialogue.question.question,
        scans=dialogue.question.scans,
        earlier=earlier,
        experts=experts,
        max_new_tokens=ask.max_new_tokens,
        sampling=ask.sampling,
        form=ask.form,
        on_event=tell if stream else None,
    )
    future = engine.submit(observed.run(script), seconds=seconds)
    future.add_done_callback(tell)
    until = loop.time() + seconds + _GRACE_SECONDS
    text, is_answer = AnswerText(ask.stops), not experts
    try:
        while isinstance(item := await _soon(happened, until), Event):
            if item.kind == "text":
                # Before an expert's result, the text may turn out to be a call.
                new = text.add(item.text) if is_answer else item.text
                if new:
                    yield Step("text" if is_answer else "draft", new)
            elif item.kind == "call":
                yield Step("call", record=calls.running(item.text))
            else:
                assert item.annotation is not None
                yield Step("result", record=await asyncio.to_thread(calls.done, item.annotation))
                is_answer = True
        try:
            reply = item.result()
        except CancelledError:
            raise ClosedError("the server stopped before the answer was complete; ask again") from None
    finally:
        future.cancel()
    written = until_stop(reply.answer, ask.stops).strip()
    if stream and (rest := text.rest(written)):
        yield Step("text", rest)
    images = ask.options.images
    records = await asyncio.to_thread(calls.again().all, reply.transcript.annotations)
    yield Answer(
        written,
        reply,
        Usage(observed.read, observed.written),
        experts=records,
        notes=tuple(map(clean, reply.notes)),
        tokens=_tokens(observed.last, assistant.generator.tokenizer) if ask.log_probs else None,
        image=await asyncio.to_thread(_png_url, reply.image) if images else None,
        overlay=await asyncio.to_thread(_png_url, reply.overlay) if images else None,
        transcript=_transcript(reply, clean) if ask.options.transcript else None,
        known=_known(reply.transcript),
    )


async def _soon(happened: asyncio.Queue[T], until: float) -> T:
    """The next item; raises `DeadlineError` if the engine itself is late, for example while it compiles."""
    left = until - asyncio.get_running_loop().time()
    try:
        return await asyncio.wait_for(happened.get(), max(left, 0.0))
    except TimeoutError:
        raise DeadlineError(LATE) from None


class _Calls:
    """Numbers the expert calls of an answer."""

    def __init__(
        self, clean: Callable[[str], str], keep: Callable[[Annotation], dict[str, Any] | None] | None = None
    ):
        self._clean, self._keep = clean, keep
        self._prefix, self._count = f"call_{secrets.token_hex(8)}", 0
        self._kept: dict[Key, dict[str, Any] | None] = {}

    def again(self) -> _Calls:
        """The same calls, counted from the first."""
        calls = copy.copy(self)
        calls._count = 0
        return calls

    @property
    def _id(self) -> str:
        return f"{self._prefix}_{self._count}"

    def running(self, call: str) -> dict[str, Any]:
        return call_record(parse_turn(call).calls[0], self._id, None, self._clean)

    def done(self, annotation: Annotation) -> dict[str, Any]:
        record = call_record(Call(annotation.expert, annotation.args), self._id, annotation, self._clean)
        self._count += 1
        if mask := self._mask(annotation):
            record["result"]["mask"] = mask
        return record

    def _mask(self, annotation: Annotation) -> dict[str, Any] | None:
        """What the client learns of the label map; kept once."""
        if self._keep is None or annotation.status != "ok":
            return None
        if annotation.key not in self._kept:
            try:
                self._kept[annotation.key] = self._keep(annotation)
            except ValueError as error:
                _LOG.error("the label map of an expert cannot be read: %s", error)
                self._kept[annotation.key] = None
        return self._kept[annotation.key]

    def all(self, annotations: Sequence[Annotation]) -> tuple[dict[str, Any], ...]:
        return tuple(map(self.done, annotations))


def _known(transcript: Transcript) -> tuple[tuple[str, str], ...]:
    """The calls before this question, each once."""
    earlier = len(transcript.results) - len(transcript.annotations)
    return tuple(dict.fromkeys((call.expert, call.args) for call, _ in transcript.results[:earlier]))


def _transcript(reply: Reply, clean: Callable[[str], str]) -> tuple[dict[str, Any], ...]:
    """The turns since the question as the model read and wrote them."""
    found = reply.transcript
    asked, *others = found.turns[found.first_turn :]
    turns = [(asked.role, found.asked), *((turn.role, turn.text) for turn in others)]
    if found.cards and asked.text.startswith(found.cards):
        turns.insert(0, ("cards", found.cards))
    return tuple({"role": role, "text": clean(text)} for role, text in turns)


def _tokens(decoded: Decoded, tokenizer: Tokenizer) -> tuple[tuple[str, float], ...]:
    pairs = zip(decoded.ids, decoded.log_probs, strict=True)
    return tuple((tokenizer.decode([token]), _finite(value, _LOWEST)) for token, value in pairs)


def _finite(value: float, otherwise: Any = None) -> Any:
    return value if math.isfinite(value) else otherwise


def call_record(
    call: Call, call_id: str, annotation: Annotation | None, clean: Callable[[str], str]
) -> dict[str, Any]:
    """An expert call in the form of OpenAI's tool calls, with its result; None: it is running."""
    record: dict[str, Any] = {
        "id": call_id,
        "type": "function",
        "function": {"name": call.expert, "arguments": json.dumps({"args": call.args})},
        "status": "running" if annotation is None else annotation.status,
    }
    if annotation is None:
        return record
    if annotation.status != "ok":
        return {**record, "reason": clean(annotation.reason)}
    result = {
        "version": annotation.version,
        "probabilities": {name: _finite(value) for name, value in (annotation.probabilities or {}).items()},
        "segments": [
            {"name": one.name, "volume_ml": _finite(one.volume_ml), "components": one.components}
            for one in annotation.segments
        ],
    }
    return {**record, "result": result}


def _png_url(image: Any) -> str | None:
    """A data URL of a uint8 [H, W, 3] image, or None."""
    return None if image is None else "data:image/png;base64," + base64.b64encode(encode_png(image)).decode()
