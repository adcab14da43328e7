"""Generated answers to held-out examples during training.

An example is read as in training. Everything before one of its supervised turns is the prompt, with the same
tokens as in training; the greedy answer is compared with the text of the turn.
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
from vilam3_jax.data.packing import Sample
from vilam3_jax.data.sample_reader import Unreadable
from vilam3_jax.data.templates import model_template
from vilam3_jax.data.tokenizer import Tokenizer, load_tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.inference.generate import Chunk, Generator, row_parts
from vilam3_jax.models import build, param_paths
from vilam3_jax.models.model_config import ModelConfig
from vilam3_jax.runtime import processes

_ROWS = 16  # of a batch; at least one per part of the mesh
_MIN_PROMPT = 2  # tokens; before the text of a document there is only <bos>


@dataclasses.dataclass(frozen=True, eq=False)
class Question:
    """A turn to generate.

    Attributes:
      id: id of the example.
      turn: index among the supervised turns of the example.
      prompt: everything before the turn.
      answer: text of the turn.
      stops: tokens that end the turn.
      budget: number of its tokens, stop token included.
    """

    id: str
    turn: int
    prompt: Chunk
    answer: str
    stops: tuple[int, ...]
    budget: int


class HeldoutAnswers:
    """Answers the first held-out examples, the same ones at every call.

    Collective: all processes construct and call it together. All read the questions, each device receives
    those of its rows, and every process receives all answers.
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
          seed: seed of the run.
          count: number of examples, `config.eval_generate`.
          rows: sharding of batch rows over the mesh of the parameters.
          context: context in which programs are traced, see `Program.context`.
          annotate: see `Program.annotate`.

        Raises:
          UserError: no held-out example can be asked, or processes read different ones.
        """
        self._tokenizer = load_tokenizer(model.tokenizer)
        self.questions = read_questions(data, model, seed, count, self._tokenizer)
        _check_equal(self.questions)
        self._context, self._annotate = context, annotate
        parts = row_parts(rows)
        self._rows = parts * -(-min(len(self.questions), _ROWS) // parts)
        # Questions go to the parts round-robin, which balances the images of a partial batch.
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
          A record per question with `id`, `turn`, `reference`, `answer`, `exact_match` and `token_f1`; and
          the means `generate_exact_match` and `generate_token_f1`.
        """
        self._generator.set_params(param_paths.unflatten(self._annotate(params)))
        answers: dict[Question, str] = {}
        by_stops: dict[tuple[int, ...], list[Question]] = collections.defaultdict(list)
        for question in self.questions:
            by_stops[question.stops].append(question)
        with self._context():
            for stops, questions in by_stops.items():
                for first in range(0, len(questions), self._rows):
                    batch = questions[first : first + self._rows]
                    answers |= zip(batch, self._ask(batch, stops), strict=True)
        self._generator.set_params({})  # the next step donates them
        records = [_record(question, answers[question]) for question in self.questions]
        means = {key: sum(row[key] for row in records) / len(records) for key in ("exact_match", "token_f1")}
        return records, {f"generate_{key}": value for key, value in means.items()}

    def _ask(self, batch: Sequence[Question], stops: tuple[int, ...]) -> list[str]:
        """Answers to a batch; rows without a question stay empty."""
        prompts: list[Chunk | None] = [None] * self._rows
        for row, question in zip(self._order, batch, strict=False):
            prompts[row] = question.prompt
        session = self._generator.start(self._rows)
        session.append(prompts)
        budget = max(question.budget for question in batch)
        decoded = session.decode(budget, stops, active=[prompt is not None for prompt in prompts])
        return [
            self._tokenizer.decode(decoded[row].ids[: question.budget]).strip()
            for row, question in zip(self._order, batch, strict=False)
        ]


def _check_equal(questions: Sequence[Question]) -> None:
    """Raises UserError if processes have different questions, as all must run the same programs."""
    gathered = processes.gather([[question.id, question.turn] for question in questions])
    for number, others in enumerate(gathered):
        if others != gathered[0]:
            differing = next(pair for pair in zip_longest(gathered[0], others) if pair[0] != pair[1])
            shown = " and ".join("none" if one is None else repr(one[0]) for one in differing)
            raise UserError(
                f"config eval_generate: processes 0 and {number} do not read the same held-out examples "
                f"({shown} at the same position); check that all hosts see the same data"
            )


def read_questions(
    data: DataConfig, model: ModelConfig, seed: int, count: int, tokenizer: Tokenizer
) -> list[Question]:
    """Up to `count` questions from the first held-out examples.

    Of dialogues with several answers, consecutive examples use consecutive turns, so that expert calls, first
    and later answers are all covered.

    Raises `UserError`, with the reasons, if no example can be asked.
    """
    template_stops = model_template(model).stop_ids(tokenizer)
    loader = build_loader(data, model, PackedRows, "heldout", seed=seed, tokenizer=tokenizer)
    questions: list[Question] = []
    reasons = []
    try:
        for position in range(loader.length or 0):
            if len(questions) == count:
                break
            sample = loader.records.load(position, position)
            if not isinstance(sample, Sample):
                reasons.append(f"{sample.name}: {sample.reason}")
                continue
            try:
                images = tuple(sample.read_images())
            except Unreadable as error:
                reasons.append(str(error))
                continue
            spans = [span for span in supervised_spans(sample.encoded.loss_mask) if span[0] >= _MIN_PROMPT]
            if spans:
                turn = len(questions) % len(spans)
                start, end = spans[turn]
                prompt = _prompt(sample, images, start, model.tokens_per_image)
                ids = [int(token) for token in sample.encoded.tokens[start:end]]
                # Captions end with a newline, turns of a dialogue with a stop token of the template.
                stops = template_stops if ids[-1] in template_stops else (ids[-1], tokenizer.eos_id)
                answer = tokenizer.decode(ids[:-1] if ids[-1] in stops else ids).strip()
                questions.append(Question(sample.id, turn, prompt, answer, stops, len(ids)))
    finally:
        loader.close()
    if not questions:
        why = "; ".join(reasons[:3]) or "they are documents or empty"
        raise UserError(f"config eval_generate: no held-out example can be asked ({why}); set it to 0")
    return questions


def supervised_spans(loss_mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of each run of targets in a loss mask [n]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss_mask > 0, [0]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _prompt(sample: Sample, images: tuple[np.ndarray, ...], end: int, tokens_per_image: int) -> Chunk:
    """The first `end` tokens of a sample."""
    encoded = sample.encoded
    visual = encoded.image_of_token * tokens_per_image + encoded.visual_offset
    visual = np.where(encoded.image_of_token >= 0, visual, -1)[:end]
    return Chunk(encoded.tokens[:end], visual, images, sample.tile_map)


def _record(question: Question, answer: str) -> dict[str, Any]:
    return {
        "id": question.id,
        "turn": question.turn,
        "reference": question.answer,
        "answer": answer,
        "exact_match": float(_normalised_words(answer) == _normalised_words(question.answer)),
        "token_f1": token_f1(answer, question.answer),
    }


def token_f1(answer: str, reference: str) -> float:
    """F1 score of the words of two texts, as for SQuAD (arXiv:1606.05250, section 6.1)."""
    predicted, expected = _normalised_words(answer), _normalised_words(reference)
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected))


def _normalised_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()
