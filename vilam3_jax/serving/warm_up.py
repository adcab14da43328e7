"""Compiles the programs of typical questions before clients ask the first one.

A program belongs to a size of the cache and a length of what is read, both rounded up to a few sizes (see
`inference.generate`). Questions are asked with a blank image and without, with experts and without, as a
first question and as a follow-up, with the server's limit of new tokens and with a short one. Each answer
ends at its first token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from vilam3_jax.inference import batching
from vilam3_jax.inference.agent import Query
from vilam3_jax.inference.assistant import Assistant, Reply
from vilam3_jax.inference.constraints import AnswerForm
from vilam3_jax.inference.images import Scan, open_image
from vilam3_jax.serving.engine import Engine

_SHORT = 64  # new tokens of a request that states a limit
_QUESTION = "Is there anything abnormal in this image?"
_ANSWER = "There is a small round opacity in the upper part of this image, and nothing else that is abnormal."


def run(
    assistant: Assistant,
    engine: Engine,
    *,
    experts: bool,
    max_new_tokens: int,
    tell: Callable[[str], None],
) -> None:
    """Asks the questions of the module; `tell` receives a line before each kind.

    Args:
      assistant: the model.
      engine: its engine.
      experts: whether the model may call experts.
      max_new_tokens: the server's limit.
      tell: see above.

    Raises what the engine raises: a model that cannot answer these cannot serve.
    """
    processor = assistant.generator.processor
    blank = np.zeros((processor.size, processor.size, 3), np.uint8)
    scan = open_image(blank, processor.kept_size, preprocessing=processor.preprocessing)
    kinds = [(asks, scans) for asks in ((True, False) if experts else (False,)) for scans in ((scan,), ())]
    for place, (asks, scans) in enumerate(kinds, start=1):
        about = f"{'an image' if scans else 'no image'}, {'with' if asks else 'without'} experts"
        tell(f"questions about {about} ({place} of {len(kinds)})")
        for limit in sorted({min(_SHORT, max_new_tokens), max_new_tokens}):
            for script in _questions(assistant, scans, asks, limit):
                engine.submit(script).result()


def _questions(
    assistant: Assistant, scans: Sequence[Scan], experts: bool, limit: int
) -> Iterator[batching.Script[None]]:
    """The dialogues of one kind."""
    options: dict[str, Any] = {"experts": experts, "max_new_tokens": limit}
    reply = None
    if experts and scans:
        # The turn of an expert is about as long as a question with its overlay.
        reply = _first_turn(assistant.script(_ANSWER, scans=scans, experts=False))
    yield _first_tokens(assistant.script(_QUESTION, scans=scans, **options), reply)
    earlier = assistant.replay([(Query(_QUESTION, tuple(scans)), _ANSWER)], experts=experts)
    yield _first_tokens(assistant.script(_QUESTION, earlier=earlier, **options))
    if not experts and not scans:
        form = AnswerForm.one_of(["yes", "no"])
        yield _first_tokens(assistant.script(_QUESTION, form=form, **options))


def _first_tokens(
    question: batching.Script[Reply], reply: batching.Turn | None = None
) -> batching.Script[None]:
    """The first token of the answer to a question, and of another one after the chunk of `reply`."""
    # Every text holds the empty one, so the first token ends the answer.
    turn = dataclasses.replace(_first_turn(question), stop_texts=("",))
    yield turn
    if reply is not None:
        yield dataclasses.replace(turn, chunk=reply.chunk, prefix=0)


def _first_turn(script: batching.Script[Reply]) -> batching.Turn:
    turn = next(script)
    script.close()
    assert isinstance(turn, batching.Turn)
    return turn
