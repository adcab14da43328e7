"""Continuations of raw text: no chat template, no experts."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from vilam3_jax.data.examples import IMAGE_MARKER, Turn
from vilam3_jax.data.templates import Encoded, encode_beginning
from vilam3_jax.data.text_rules import TextRules
from vilam3_jax.errors import UserError
from vilam3_jax.inference import batching
from vilam3_jax.inference.agent import ModelError, StreamedText, prefix_length
from vilam3_jax.inference.generate import MAX_STOP_IDS, Chunk, Decoded, Generator, encoded_chunk
from vilam3_jax.inference.images import Scan
from vilam3_jax.inference.sampling import GREEDY, Sampling
from vilam3_jax.inference.stop_texts import certain, until_stop


@dataclasses.dataclass(frozen=True)
class Continuation:
    """What a model wrote after a text.

    Attributes:
      text: the new text, without the stop text that ended it.
      ids: its tokens; those of a stop text are included, a stop token is not.
      log_probs: of `ids`, under the model's own distribution, whatever the sampling.
      stopped: whether a stop token or text ended it, rather than a limit.
    """

    text: str
    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    stopped: bool

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Ending:
    """What ends a continuation.

    Attributes:
      max_new_tokens: limit.
      stop: texts.
      stop_ids: tokens, at most `MAX_STOP_IDS`; None for those of the tokenizer.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens}: must be at least 1")
        if not all(self.stop):
            raise UserError("stop: an empty text would end every continuation; leave it out")
        if self.stop_ids is not None and len(self.stop_ids) > MAX_STOP_IDS:
            raise UserError(f"stop_ids: {len(self.stop_ids)} tokens; give at most {MAX_STOP_IDS}")


def beginning(
    generator: Generator, prompt: str | Sequence[int], scans: Sequence[Scan], rules: TextRules
) -> Chunk:
    """The text to continue, encoded as the beginning of a document in training.

    Args:
      generator: the model.
      prompt: text, in which `<image>` marks the places of the images; without markers, they come first. Or
        token ids, which are used unchanged.
      scans: the images.
      rules: for text around images.

    Raises:
      UserError: another number of markers than images, an id that the model does not have, or nothing at all.
    """
    if not isinstance(prompt, str):
        if scans:
            raise UserError("the prompt is token ids, which cannot hold an image; give text")
        if wrong := [one for one in prompt if not 0 <= one < generator.vocab_size]:
            raise UserError(f"token {wrong[0]}: the model has ids 0 to {generator.vocab_size - 1}")
        return _not_empty(Chunk.text(prompt))
    images = [image for scan in scans for image in scan.images]
    markers = prompt.count(IMAGE_MARKER)
    if not markers:
        prompt = "".join(scan.marker for scan in scans) + prompt
    elif markers != len(images):
        raise UserError(f"the prompt has {markers} {IMAGE_MARKER}, but there are {len(images)} images")
    tokenizer, size = generator.tokenizer, generator.tokens_per_image

    def encode(turns: Sequence[Turn]) -> Encoded:
        return encode_beginning(tokenizer, turns, size, rules)

    return _not_empty(encoded_chunk([Turn("user", prompt)], images, generator.processor, size, encode))


def _not_empty(chunk: Chunk) -> Chunk:
    if not len(chunk.tokens):
        raise UserError("the prompt is empty; give text to continue")
    return chunk


def script(
    generator: Generator,
    chunk: Chunk,
    ending: Ending,
    sampling: Sampling = GREEDY,
    on_text: Callable[[str], None] | None = None,
) -> batching.Script[Continuation]:
    """Continues a text; for a `Batcher`.

    Args:
      generator: the model.
      chunk: the text.
      ending: what ends the continuation.
      sampling: greedy by default.
      on_text: called with pieces of the text as they are certain, which join to the text.

    Raises:
      UserError: the text is longer than the model's cache.
      ModelError: the logits are not finite.
    """
    tokenizer = generator.tokenizer
    told = _Told(ending.stop, on_text) if on_text is not None else None
    streamed = None if told is None else StreamedText(tokenizer, told.add)
    stops = tokenizer.stop_ids if ending.stop_ids is None else ending.stop_ids
    decoded: Decoded = yield batching.Turn(
        chunk,
        ending.max_new_tokens,
        tuple(stops),
        stop_texts=ending.stop,
        sampling=sampling,
        prefix=prefix_length(chunk),
        on_tokens=None if streamed is None else streamed.add,
    )
    if decoded.error:
        raise ModelError(decoded.error)
    text = until_stop(tokenizer.decode(decoded.ids), ending.stop)
    if told is not None:
        told.rest(text)
    return Continuation(text, tuple(decoded.ids), tuple(decoded.log_probs), decoded.stopped)


class _Told:
    """Holds back what may be the start of a stop text."""

    def __init__(self, stops: Sequence[str], tell: Callable[[str], None]):
        self._stops, self._tell = stops, tell
        self._text, self._told = "", 0

    def add(self, piece: str) -> None:
        self._text += piece
        self.rest(certain(self._text, self._stops))

    def rest(self, text: str) -> None:
        """Tells what `text` has beyond what was told."""
        if new := text[self._told :]:
            self._told = len(text)
            self._tell(new)


def stream(
    batcher: batching.Batcher, make: Callable[[Callable[[str], None]], batching.Script[Continuation]]
) -> Iterator[str]:
    """Pieces of the text as they are generated; closing the iterator ends the dialogue.

    Args:
      batcher: runs the dialogue, and others that it holds.
      make: (callback for pieces) ↦ script.
    """
    pieces: collections.deque[str] = collections.deque()
    future = batcher.add(make(pieces.append))
    try:
        while pieces or not future.done():
            if not pieces:
                batcher.step()
            while pieces:
                yield pieces.popleft()
        future.result()
    finally:
        batcher.cancel(future)
