"""Sources of answers: a model with its experts, a predictions file, or an OpenAI-compatible server."""

from __future__ import annotations

import base64
import csv
import io
import ipaddress
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vilam3_jax.data.experts.record import failed
from vilam3_jax.data.experts.store import Annotation, AnnotationStore
from vilam3_jax.data.images import encode_png
from vilam3_jax.errors import UserError
from vilam3_jax.evals import changes
from vilam3_jax.evals.conditions import Answer, Arm
from vilam3_jax.evals.items import Item
from vilam3_jax.evals.prompts import PROMPTS, Request
from vilam3_jax.evals.protocol import Protocol
from vilam3_jax.inference.agent import Agent, Query
from vilam3_jax.inference.images import Scan
from vilam3_jax.inference.sampling import GREEDY, Sampling
from vilam3_jax.inference.transcript import Transcript
from vilam3_jax.runtime import paths

LoadImages = Callable[[Item], list[np.ndarray]]  # uint8 [H, W, 3] each

_MAX_FILE = 1 << 30
_MAX_REPLY = 1 << 22
_ID_KEYS = ("item", "question_id", "uid", "id")
_TEXT_KEYS = ("output", "text", "prediction", "answer")


class StoredContext:
    """What prompts read beside the item: an annotation store, and training items."""

    def __init__(self, store: AnnotationStore | None, training: Sequence[Item] = ()):
        self._store, self._training = store, training

    def annotation(self, item: Item, expert: str, args: str = "") -> Annotation:
        """See `PromptContext`."""
        key = item.input_keys[0] if item.input_keys else "unknown"
        found = self._store.get(key, expert, args) if self._store else None
        return found or failed(key, expert, args, "no stored result on this input")

    def neighbours(self, item: Item, count: int) -> Sequence[Item]:
        """See `PromptContext`: by shared words of questions of the same type; ties by id."""
        words = set(item.question.lower().split())

        def distance(other: Item) -> tuple[float, str]:
            own = set(other.question.lower().split())
            return -len(words & own) / max(1, len(words | own)), other.id

        alike = [one for one in self._training if one.question_type == item.question_type]
        return sorted(alike, key=distance)[:count]


def _request(protocol: Protocol, item: Item, context: StoredContext) -> Request:
    if protocol.prompt not in PROMPTS:
        raise UserError(f"protocol {protocol.name}: prompt {protocol.prompt!r} unknown")
    return PROMPTS[protocol.prompt](item, context)


def _images(arm: Arm, item: Item, shown: Item | None, load: LoadImages) -> list[np.ndarray]:
    change = changes.IMAGE_CHANGES[arm.images].pixels
    loaded = load(shown) if shown is not None else []
    return [change(image, item) for image in loaded] if change else loaded


class ModelAnswerer:
    """A model, asked in continuous batches."""

    def __init__(
        self,
        agent: Callable[[Arm], Agent],
        load: LoadImages,
        *,
        context: StoredContext,
        seed: int,
    ):
        """Stores the arguments.

        Args:
          agent: makes the agent of an arm, all of one generator.
          load: reads the images of an item.
          context: for prompts.
          seed: of sampling, and of falsification: it is written on the rows, so that a report can reproduce
            what the model was shown.
        """
        self._agent, self._load, self._context, self._seed = agent, load, context, seed

    def answers(self, protocol: Protocol, arm: Arm, items: Sequence[Item], done: int) -> Iterator[Answer]:
        """See `Answerer`; details: those of `transcript_details`, or `probabilities`."""
        agent = self._agent(arm)
        asked = changes.asked_items(items, arm.images, arm.question)[done:]
        if protocol.answers == "probabilities":
            return self._probabilities(agent, protocol, arm, asked)
        return self._texts(agent, protocol, arm, asked, done)

    def _texts(
        self,
        agent: Agent,
        protocol: Protocol,
        arm: Arm,
        asked: Sequence[tuple[Item, Item | None]],
        done: int,
    ) -> Iterator[Answer]:
        def scripts() -> Iterator[Any]:
            for position, (item, shown) in enumerate(asked, done):
                query, history = self._query(protocol, arm, item, shown)
                sampling = GREEDY
                if protocol.temperature:
                    sampling = Sampling(temperature=protocol.temperature, seed=self._seed + position)
                yield agent.script(
                    query,
                    earlier=agent.replay(history) if history else None,
                    max_new_tokens=protocol.max_new_tokens,
                    sampling=sampling,
                )

        seed = self._seed if arm.experts == "falsified" else None
        for (item, _), transcript in zip(asked, agent.run_scripts(scripts()), strict=True):
            yield Answer(item, transcript.answer, transcript_details(item, transcript, falsify_seed=seed))

    def _query(
        self, protocol: Protocol, arm: Arm, item: Item, shown: Item | None
    ) -> tuple[Query, list[tuple[Query, str]]]:
        """The last question, and the earlier exchanges; the images belong to the first question."""
        request = _request(protocol, item, self._context)
        scans: tuple[Scan, ...] = ()
        if shown is not None:
            keys = [*shown.input_keys, *[""] * len(shown.images)]
            images = _images(arm, item, shown, self._load)
            scans = tuple(
                Scan(image, key, ref.axis, ref.index, modality=ref.modality or "")
                for image, key, ref in zip(images, keys, shown.images, strict=False)
            )
        history = [
            (Query(question, scans if i == 0 else ()), answer)
            for i, (question, answer) in enumerate(request.history)
        ]
        return Query(request.question, () if history else scans), history

    def _probabilities(
        self, agent: Agent, protocol: Protocol, arm: Arm, asked: Sequence[tuple[Item, Item | None]]
    ) -> Iterator[Answer]:
        for item, shown in asked:
            if not item.options:
                raise UserError(f"item {item.id!r}: has no options; protocol {protocol.name} needs them")
            query, history = self._query(protocol, arm, item, shown)
            if history:
                raise UserError(
                    f"protocol {protocol.name}: probabilities are of one turn; choose another prompt"
                )
            scores = np.asarray(agent.option_scores(query, item.options))
            weights = np.exp(scores - scores.max())
            found = dict(zip(item.options, (weights / weights.sum()).tolist(), strict=True))
            yield Answer(item, max(found, key=lambda option: found[option]), {"probabilities": found})


def transcript_details(item: Item, transcript: Transcript, *, falsify_seed: int | None) -> dict[str, Any]:
    """What a row says of a dialogue.

    Keys: `prompt` (the first turn, cards included), `trigger` (the turn with the expert call, or None),
    `expert_called`, `expert_right` (whether the call was the one that could answer; None if no expert could),
    `expert_status` ('ok', 'failed' or None), `expert_text` (the expert's turn), `expert_version`,
    `falsify_seed` (or None), `truncated`, `cut` (characters that were removed after calls) and `not_made`
    (calls that were not executed).
    """
    called = transcript.annotation
    return {
        "prompt": transcript.prompt,
        "trigger": transcript.trigger_text,
        "expert_called": called and called.expert,
        "expert_right": None if item.expert is None else transcript.trigger == (item.expert, item.args),
        "expert_status": called and called.status,
        "expert_text": transcript.expert_text,
        "expert_version": called and called.version,
        "falsify_seed": falsify_seed,
        "truncated": transcript.truncated,
        "cut": sum(map(len, transcript.cut)),
        "not_made": [str(call) for call in transcript.unexecuted_calls],
    }


class FailingProvider:
    """An expert that always fails, as one does that is out of memory."""

    def annotate(self, query: Query, expert: str, args: str) -> Annotation:
        """See `Provider`."""
        return failed(query.input_key, expert, args, "the expert ran out of memory")


class PredictionsAnswerer:
    """Answers of somebody else's model, read from a file; a missing answer is empty and counted."""

    def __init__(self, path: paths.PathLike):
        """Reads the file.

        Raises:
          UserError: see `read_predictions`.
        """
        self._path, self._texts = path, read_predictions(path)

    def answers(self, protocol: Protocol, arm: Arm, items: Sequence[Item], done: int) -> Iterator[Answer]:
        """See `Answerer`; details: `missing` of an item that the file does not answer."""
        if all(self._find(item) is None for item in items):
            raise UserError(
                f"{self._path}: answers none of the {len(items)} questions; its ids must be those of items, "
                f"such as {items[0].id!r}"
            )
        return map(self._answer, items[done:])

    def _answer(self, item: Item) -> Answer:
        text = self._find(item)
        return Answer(item, text or "", {"missing": True} if text is None else {})

    def _find(self, item: Item) -> str | None:
        names = (item.id, item.reference_id, item.id.removesuffix("/q0"))
        return next((self._texts[name] for name in names if name and name in self._texts), None)


def read_predictions(path: paths.PathLike) -> dict[str, str]:
    """Reads answers by item id.

    Formats: JSON lines or a JSON list of objects; one JSON object id ↦ answer; CSV with a header. Ids are
    under `item`, `question_id`, `uid` or `id`, answers under `output`, `text`, `prediction` or `answer`.

    Raises:
      UserError: unreadable, a line without id or answer, or two answers to one item.
    """
    name = str(path)
    try:
        text = paths.read_bytes(path, _MAX_FILE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from error
    try:
        if name.endswith(".csv"):
            records: list[Any] = list(csv.DictReader(io.StringIO(text)))
        elif name.endswith(".jsonl"):
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            value = json.loads(text)
            if isinstance(value, dict):
                value = [{"item": key, "output": answer} for key, answer in value.items()]
            records = value if isinstance(value, list) else [value]
    except (ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: {error}; give JSON lines, a JSON list or object, or CSV with a header"
        ) from error
    found: dict[str, str] = {}
    for number, record in enumerate(records, 1):
        if not isinstance(record, Mapping):
            raise UserError(f"{path}, record {number}: is a {type(record).__name__}, not an object")
        item = next((record[key] for key in _ID_KEYS if record.get(key) is not None), None)
        answer = next((record[key] for key in _TEXT_KEYS if record.get(key) is not None), None)
        if item is None or answer is None:
            raise UserError(
                f"{path}, record {number}: needs an id ({', '.join(_ID_KEYS)}) "
                f"and an answer ({', '.join(_TEXT_KEYS)})"
            )
        words = answer if isinstance(answer, str) else json.dumps(answer)
        if found.setdefault(str(item), words) != words:
            raise UserError(f"{path}, record {number}: item {str(item)!r} has two answers; keep one")
    return found


class EndpointAnswerer:
    """An OpenAI-compatible server on this machine; images are sent as PNG data URLs."""

    def __init__(
        self, url: str, model: str, load: LoadImages, *, context: StoredContext, timeout: float = 600
    ):
        """Checks the address.

        Args:
          url: such as `http://127.0.0.1:8000/v1`; a loopback address, so that no data leaves the machine.
          model: name of the model on the server.
          load: reads the images of an item.
          context: for prompts.
          timeout: seconds for one answer.

        Raises:
          UserError: not a loopback address.
        """
        parts = urllib.parse.urlsplit(url)
        try:
            local = parts.hostname == "localhost" or ipaddress.ip_address(parts.hostname or "").is_loopback
        except ValueError:
            local = False
        if parts.scheme != "http" or not local:
            raise UserError(
                f"--endpoint={url}: must be http:// on this machine, such as http://127.0.0.1:8000/v1"
            )
        self._url, self._model, self._load = url.rstrip("/"), model, load
        self._context, self._timeout = context, timeout

    def answers(self, protocol: Protocol, arm: Arm, items: Sequence[Item], done: int) -> Iterator[Answer]:
        """See `Answerer`.

        Raises:
          UserError: the server cannot be reached or refuses a request.
        """
        if protocol.answers != "text":
            raise UserError(f"protocol {protocol.name}: needs probabilities, which a server does not give")
        for item, shown in changes.asked_items(items, arm.images, arm.question)[done:]:
            images = _images(arm, item, shown, self._load)
            yield Answer(item, self._ask(protocol, _request(protocol, item, self._context), images))

    def _ask(self, protocol: Protocol, request: Request, images: Sequence[np.ndarray]) -> str:
        turns = [*request.history, (request.question, None)]
        messages: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(turns):
            pictures = images if number == 0 else ()
            content: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_base64(image)}"}}
                for image in pictures
            ]
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        body = {
            "model": self._model,
            "messages": messages,
            "max_tokens": protocol.max_new_tokens,
            "temperature": protocol.temperature,
        }
        sent = urllib.request.Request(
            f"{self._url}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        # No proxy: the address is local.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(sent, timeout=self._timeout) as reply:
                found = json.loads(reply.read(_MAX_REPLY))
            return str(found["choices"][0]["message"]["content"] or "")
        except urllib.error.HTTPError as error:
            raise UserError(
                f"{self._url}: answered {error.code}: {error.read(300).decode(errors='replace')}"
            ) from error
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self._url}: no usable answer ({error!r}); check that the server runs"
            ) from error


def _base64(image: np.ndarray) -> str:
    return base64.b64encode(encode_png(image)).decode()
