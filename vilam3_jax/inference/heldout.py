"""Answers to held-out examples during training.

An example is read as in training. One of its supervised turns is left out: everything before it is the
prompt, token for token as in training, and the greedy answer is compared with the turn's text.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import zip_longest
from typing import Any

import numpy as np
from jax.sharding import NamedSharding

from vilam3_jax.data.batch_formats import PackedRows
from vilam3_jax.data.data_config import DataConfig
from vilam3_jax.data.loader import build_loader
from vilam3_jax.data.loader_records import Unreadable
from vilam3_jax.data.packing import Sample
from vilam3_jax.data.templates import model_template
from vilam3_jax.data.tokenizer import Tokenizer, load_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.inference.generate import Chunk, Generator, row_parts
from vilam3_jax.models import build, param_paths
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.runtime import processes

_ROWS = 16  # of a batch, at least one for every part of the mesh
_LEAST_PROMPT = 2  # tokens; a document's first text follows nothing but its <bos>


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A turn to be generated.

    Attributes:
      id: the example's id.
      turn: which of the example's supervised turns, from 0.
      prompt: all that stands before it.
      answer: its text.
      stops: tokens that end it.
      budget: tokens that it has, its stop included.
    """

    id: str
    turn: int
    prompt: Chunk
    answer: str
    stops: tuple[int, ...]
    budget: int


class HeldoutAnswers:
    """Answers the first examples of the held-out data, the same ones at every call.

    Collective: every process makes and calls it alike. All read the questions, each device gets those of its
    rows, and all processes receive all answers.
    """

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        seed: int,
        count: int,
        rows: NamedSharding,
        context: Callable[[], AbstractContextManager[None]],
        annotate: Callable[[Mapping[str, Any]], dict[str, Any]],
    ) -> None:
        """Reads the examples.

        Args:
          data: section `data` of the config.
          model: section `model`.
          seed: of the run.
          count: number of examples, `config.eval_generate`.
          rows: sharding of the rows of a batch over the mesh of the parameters.
          context: makes the context in which programs are traced, see `Program.context`.
          annotate: see `Program.annotate`.

        Raises:
          UserError: no held-out example can be asked, or the processes do not read the same ones.
        """
        self._tokenizer = load_tokenizer(model.tokenizer)
        self.questions = read_questions(data, model, seed, count, self._tokenizer)
        _check_alike(self.questions)
        self._context, self._annotate = context, annotate
        parts = row_parts(rows)
        self._rows = parts * -(-min(len(self.questions), _ROWS) // parts)
        # Assign questions to shards round-robin to balance images in a partial batch.
        self._order = np.arange(self._rows).reshape(parts, -1).T.reshape(-1)
        _, shapes = build.abstract_model(model, "generative")
        self._generator = Generator(
            model,
            shapes,
            self._tokenizer,
            max_length=max(len(one.prompt.tokens) + one.budget for one in self.questions),
            batch_size=self._rows,
            rows=rows,
        )

    def __call__(self, params: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Answers all questions greedily.

        Args:
          params: path → array, from the train state.

        Returns:
          One record per question with `id`, `turn`, `reference`, `answer`, `exact_match` and `token_f1`; and
          the means, `generate_exact_match` and `generate_token_f1`.
        """
        self._generator.set_params(param_paths.unflatten(self._annotate(params)))
        answers: dict[Question, str] = {}
        alike: dict[tuple[int, ...], list[Question]] = collections.defaultdict(list)
        for question in self.questions:
            alike[question.stops].append(question)
        with self._context():
            for stops, questions in alike.items():
                for first in range(0, len(questions), self._rows):
                    batch = questions[first : first + self._rows]
                    answers |= zip(batch, self._ask(batch, stops), strict=True)
        self._generator.set_params({})  # the next step donates them
        rows = [_record(question, answers[question]) for question in self.questions]
        return rows, {
            f"generate_{name}": sum(row[name] for row in rows) / len(rows)
            for name in ("exact_match", "token_f1")
        }

    def _ask(self, batch: Sequence[Question], stops: tuple[int, ...]) -> list[str]:
        """Answers to a batch; rows without a question stay empty."""
        asked: list[Question | None] = [None] * self._rows
        for row, question in zip(self._order, batch, strict=False):
            asked[row] = question
        session = self._generator.start(self._rows)
        session.append([None if question is None else question.prompt for question in asked])
        said = session.decode(
            max(question.budget for question in batch),
            stops,
            active=[question is not None for question in asked],
        )
        return [
            self._tokenizer.decode(said[row].ids[: question.budget]).strip()
            for row, question in zip(self._order, batch, strict=False)
        ]


def _check_alike(questions: Sequence[Question]) -> None:
    """All processes must run the same programs with the same questions.

    Raises:
      UserError: they read different ones.
    """
    read = processes.gather([[question.id, question.turn] for question in questions])
    for number, others in enumerate(read):
        if others != read[0]:
            theirs = next(pair for pair in zip_longest(read[0], others) if pair[0] != pair[1])
            shown = " and ".join("none" if one is None else repr(one[0]) for one in theirs)
            raise UserError(
                f"config eval_generate: processes 0 and {number} do not read the same held-out examples "
                f"({shown} in the same place); check that all hosts see the same data"
            )


def read_questions(
    data: DataConfig, model: ModelConfig, seed: int, count: int, tokenizer: Tokenizer
) -> list[Question]:
    """The first `count` held-out examples that can be asked, or fewer.

    Of dialogues with several answers the first example leaves out the first, the second the second, and so
    on, so that expert calls, first and later answers are all covered.

    Raises:
      UserError: there is none; names the reasons.
    """
    tokens_per_image = model.tokens_per_image
    template_stops = model_template(model).stop_ids(tokenizer)
    loader = build_loader(data, model, PackedRows, "heldout", seed=seed, tokenizer=tokenizer)
    questions: list[Question] = []
    reasons = []
    try:
        for position in range(loader.length or 0):
            if len(questions) == count:
                break
            sample = loader.load(position, position)
            if not isinstance(sample, Sample):
                reasons.append(f"{sample.name}: {sample.reason}")
                continue
            try:
                images = tuple(sample.read_images())
            except Unreadable as error:
                reasons.append(str(error))
                continue
            spans = [span for span in supervised_spans(sample.encoded.loss_mask) if span[0] >= _LEAST_PROMPT]
            if spans:
                turn = len(questions) % len(spans)
                questions.append(
                    _question(sample, images, turn, spans[turn], tokens_per_image, template_stops, tokenizer)
                )
    finally:
        loader.close()
    if not questions:
        why = "; ".join(reasons[:3]) or "they are documents or empty"
        raise UserError(f"config eval_generate: no held-out example can be asked ({why}); set it to 0")
    return questions


def supervised_spans(loss_mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of the runs of targets in a loss mask [n]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss_mask > 0, [0]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _question(
    sample: Sample,
    images: tuple[np.ndarray, ...],
    turn: int,
    span: tuple[int, int],
    tokens_per_image: int,
    template_stops: tuple[int, ...],
    tokenizer: Tokenizer,
) -> Question:
    start, end = span
    encoded = sample.encoded
    visual = encoded.image_of_token * tokens_per_image + encoded.visual_offset
    visual = np.where(encoded.image_of_token >= 0, visual, -1)[:start]
    ids = [int(token) for token in encoded.tokens[start:end]]
    # Captions end with a newline, turns of a dialogue with the stop token of the template.
    stops = template_stops if ids[-1] in template_stops else (ids[-1], tokenizer.eos_id)
    answer = tokenizer.decode(ids[:-1] if ids[-1] in stops else ids).strip()
    prompt = Chunk(encoded.tokens[:start], visual, images, sample.tile_map)
    return Question(sample.id, turn, prompt, answer, stops, len(ids))


def _record(question: Question, answer: str) -> dict[str, Any]:
    return {
        "id": question.id,
        "turn": question.turn,
        "reference": question.answer,
        "answer": answer,
        "exact_match": float(_words(answer) == _words(question.answer)),
        "token_f1": token_f1(answer, question.answer),
    }


def token_f1(answer: str, reference: str) -> float:
    """Overlap of two texts' words, 0 to 1, as SQuAD scores answers (arXiv:1606.05250, section 6.1)."""
    said, wanted = _words(answer), _words(reference)
    if not said or not wanted:
        return float(said == wanted)
    shared = sum((collections.Counter(said) & collections.Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted))


def _words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
