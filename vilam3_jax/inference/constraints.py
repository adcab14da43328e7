"""Answers of a given form: one of a few choices, a regular expression, or JSON of a schema.

llguidance computes which tokens may follow; the decoding program takes them as a mask.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

from vilam3_jax.data.tokenizer import Tokenizer
from vilam3_jax.errors import UserError

_MAX_GRAMMAR = 100_000  # characters


@dataclasses.dataclass(frozen=True)
class AnswerForm:
    """The form that an answer must have; made by `one_of`, `matching` or `json_of`.

    Attributes:
      grammar: llguidance's form of it.
    """

    grammar: str

    @classmethod
    def one_of(cls, choices: Sequence[str]) -> AnswerForm:
        """One of a few texts, such as "yes" and "no".

        Raises `UserError` without choices, or with an empty one.
        """
        if not choices or not all(choices):
            raise UserError(f"choices {list(choices)}: give one or more texts that are not empty")
        alternatives = " | ".join(json.dumps(choice) for choice in dict.fromkeys(choices))
        return cls(llguidance.LLMatcher.grammar_from_lark(f"start: {alternatives}"))._checked("choices")

    @classmethod
    def matching(cls, regex: str) -> AnswerForm:
        """A regular expression (Rust's syntax) that the whole answer matches; raises `UserError`."""
        return cls(llguidance.LLMatcher.grammar_from_regex(regex))._checked("regular expression")

    @classmethod
    def json_of(cls, schema: Mapping[str, Any]) -> AnswerForm:
        """JSON that a JSON schema allows; raises `UserError` for a schema that is invalid or unsupported."""
        try:
            text = json.dumps(schema)
        except (TypeError, ValueError) as error:
            raise UserError(f"JSON schema: is no JSON ({error})") from error
        return cls(llguidance.LLMatcher.grammar_from_json_schema(text))._checked("JSON schema")

    def _checked(self, what: str) -> AnswerForm:
        if len(self.grammar) > _MAX_GRAMMAR:
            raise UserError(f"{what}: longer than {_MAX_GRAMMAR} characters; make it shorter")
        if problem := llguidance.LLMatcher.validate_grammar(self.grammar):
            raise UserError(f"{what}: {problem.strip().splitlines()[0]}")
        return self


class Constraint:
    """What may follow in one answer; a `batching.Constraint`."""

    def __init__(self, form: AnswerForm, tokenizer: Tokenizer, stop_ids: Sequence[int]):
        """Starts before the first token. Raises `UserError` if the grammar is too complex."""
        self._size = tokenizer.vocab_size
        self._matcher = llguidance.LLMatcher(_tokenizer_of(tokenizer, tuple(stop_ids)), form.grammar)
        self._check()

    def allowed(self) -> np.ndarray:
        """Bool [V], tokens that may follow; the stop tokens if the answer may end here."""
        mask = llguidance.numpy.allocate_token_bitmask(1, self._size)
        llguidance.numpy.fill_next_token_bitmask(self._matcher, mask)
        self._check()
        return np.unpackbits(mask.view(np.uint8), bitorder="little")[: self._size].astype(bool)

    def advance(self, token: int) -> None:
        """Takes the next token."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"the form of the answer: {self._matcher.get_error().splitlines()[0]}")


@functools.lru_cache(maxsize=4)
def _tokenizer_of(tokenizer: Tokenizer, stop_ids: tuple[int, ...]) -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.vocab_size, eos_token=list(stop_ids))
