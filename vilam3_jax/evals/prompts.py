"""Prompts: how an item becomes a request to a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

from vilam3_jax.data.experts.store import Annotation
from vilam3_jax.evals.items import Item


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked, without image markers.

    Attributes:
      question: the last question.
      history: (question, answer) of earlier turns, which a protocol prescribes; the images belong to the
        first question.
    """

    question: str
    history: tuple[tuple[str, str], ...] = ()


class PromptContext(Protocol):
    """What prompts may read beside the item."""

    def annotation(self, item: Item, expert: str, args: str = "") -> Annotation:
        """The stored result of an expert on the images of an item; a failed one if there is none."""
        ...

    def neighbours(self, item: Item, count: int) -> Sequence[Item]:
        """The training items nearest to an item, nearest first."""
        ...


PromptRule = Callable[[Item, PromptContext], Request]


def single_turn(item: Item, context: PromptContext) -> Request:
    """The question alone, images before it."""
    return Request(item.question)


PROMPTS: dict[str, PromptRule] = {"single_turn": single_turn}
