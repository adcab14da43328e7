"""Compiles the programs of typical questions before clients ask the first one.

A program belongs to a size of the cache and a length of what is read, both rounded up to a few sizes (see
`inference.generate`). In every size, questions are asked with a blank image and without, with experts and
without, as a first question, as a follow-up, and in a fixed form. Each answer ends at its first token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from vilam3_jax.inference import batching
from vilam3_jax.inference.agent import Query
from vilam3_jax.inference.assistant import Assistant, Reply
from vilam3_jax.inference.constraints import AnswerForm
from vilam3_jax.inference.generate import Chunk, cache_size
from vilam3_jax.inference.images import open_image
from vilam3_jax.serving.engine import Engine

_QUESTION = "Is there anything abnormal in this image?"
_ANSWER = "There is a small round opacity in the upper part of this image, and nothing else that is abnormal."


def run(assistant: Assistant, engine: Engine, *, experts: bool, tell: Callable[[str], None]) -> None:
    """Asks the questions of the module; `tell` receives a line before each size.

    Raises what the engine raises: a model that cannot answer these cannot serve.
    """
    longest = assistant.generator.max_length
    sizes = sorted({cache_size(length, longest) for length in range(1, longest + 1)})
    for place, size in enumerate(sizes, start=1):
        tell(f"compiling for dialogues of up to {min(size, longest)} positions ({place} of {len(sizes)})")
        for script in _scripts(assistant, min(size, longest), experts):
            engine.submit(script).result()


def _scripts(assistant: Assistant, size: int, experts: bool) -> Iterator[batching.Script[None]]:
    """The dialogues of one size of the cache."""
    processor = assistant.generator.processor
    blank = np.zeros((processor.size, processor.size, 3), np.uint8)
    scan = open_image(blank, processor.kept_size, preprocessing=processor.preprocessing)
    # The turn of an expert is about as long as a question with its overlay.
    overlay = _first_turn(assistant.script(_ANSWER, scans=(scan,), experts=False)).chunk
    for with_experts in (True, False) if experts else (False,):
        for scans in ((scan,), ()):
            reply = overlay if scans and with_experts else None
            asked = Query(_QUESTION, scans)
            earlier = assistant.replay([(asked, _ANSWER)], experts=with_experts)
            yield _dialogue(assistant.script(_QUESTION, scans=scans, experts=with_experts), size, reply)
            yield _dialogue(assistant.script(_QUESTION, earlier=earlier, experts=with_experts), size)
    form = AnswerForm.one_of(["yes", "no"])
    yield _dialogue(assistant.script(_QUESTION, experts=False, form=form), size)


def _first_turn(script: batching.Script[Reply]) -> batching.Turn:
    turn = next(script)
    script.close()
    assert isinstance(turn, batching.Turn)
    return turn


def _dialogue(
    question: batching.Script[Reply], size: int, reply: Chunk | None = None
) -> batching.Script[None]:
    """The first token of an answer, and of another one after `reply`, in a cache of `size` if they fit."""
    turn = _first_turn(question)
    room = size - len(turn.chunk.tokens)
    if room <= 0:
        return
    # Every text holds the empty one, so the first token ends the answer.
    yield dataclasses.replace(turn, max_new_tokens=room, stop_texts=("",))
    if reply is not None and (room := room - 1 - len(reply.tokens)) > 0:
        yield dataclasses.replace(turn, chunk=reply, prefix=0, max_new_tokens=room, stop_texts=("",))
