"""`vilam3_jax.load(path)`: an export as a Python object that answers questions about images."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np

from vilam3_jax.checkpoints import exports
from vilam3_jax.data.experts.cards import Card, card_list
from vilam3_jax.data.experts.exchange import Style
from vilam3_jax.data.experts.grammar import Call
from vilam3_jax.data.experts.host_client import ExpertHost
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.isolation import DecoderProcess
from vilam3_jax.errors import UserError
from vilam3_jax.inference import batching
from vilam3_jax.inference.agent import (
    DEFAULT_MAX_NEW_TOKENS,
    Agent,
    AnnotationProvider,
    Event,
    HostProvider,
    Provider,
    Providers,
    Query,
    Transcript,
    load_generator,
)
from vilam3_jax.inference.constraints import AnswerForm
from vilam3_jax.inference.generate import Generator
from vilam3_jax.inference.images import ImageLike, Scan, open_image
from vilam3_jax.inference.sampling import GREEDY, Sampling
from vilam3_jax.runtime import paths

NOT_CLINICAL = "Not for clinical use: a research model; its answers and its experts' results may be wrong."
HOST_PROGRAM = "vilam3-experts"


@dataclasses.dataclass(frozen=True)
class Reply:
    """The answer to a question.

    Attributes:
      answer: the last turn of the model.
      transcript: the whole dialogue, with expert turns.
      image: uint8 [H, W, 3], the image that the model was shown, before padding, or None.
      overlay: uint8 [H, W, 3], the overlay of the expert, or None.
      description: of `image`.
      notes: for the reader: assumptions about the image, stand-ins, failures, truncated answers, and that it
        is not for clinical use.
    """

    answer: str
    transcript: Transcript
    image: np.ndarray | None
    overlay: np.ndarray | None
    description: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return self.answer


class ViewOptions(TypedDict, total=False):
    """Options of `open_image` that choose what is shown of an image."""

    axis: str | None
    index: int | None
    slices: int
    window: tuple[float, float] | None
    modality: str | None
    series: str | None
    frame: int | None


class AskOptions(ViewOptions, total=False):
    """Options of a question: those of `open_image`, of `Assistant.script` and of `Sampling`."""

    experts: bool
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int
    form: AnswerForm | None
    on_event: Callable[[Event], None] | None


Images = ImageLike | Mapping[str, ImageLike] | None


class Assistant:
    """An export that answers questions about images; close it, or use it in a `with` statement."""

    def __init__(
        self,
        path: paths.PathLike,
        *,
        annotations: paths.PathLike | None = None,
        expert_host: str = "auto",
        expert_weights: paths.PathLike | None = None,
        max_length: int = 2048,
        batch_size: int = 1,
        text: str = "",
        isolate: bool = False,
        tensor: int = 1,
        dtype: str | None = None,
        cache_dtype: str | None = None,
    ):
        """Opens an export.

        Args:
          path: a training run, its `export` folder, or what `vilam3 convert import` or `vilam3 export` wrote.
          annotations: annotation store, which is preferred to the expert host.
          expert_host: 'auto' (the installed `vilam3-experts`, started when first needed), 'off', or the
            command that starts one, for example in another virtual environment.
          expert_weights: folder of the experts' weights, for the host.
          max_length: maximum positions (text and image tokens) of a dialogue.
          batch_size: dialogues of `ask_batch` that are decoded together. An answer has the same bits whatever
            shares its batch, but may have others with another batch size.
          text: changes of the export's text rules: `as_trained`, `clean`, or for example `spaces=clean`.
          isolate: decode images in a separate process, with limits on time and memory.
          tensor, dtype, cache_dtype: devices that share the model, its type and that of its cache; see
            `load_generator`.

        Raises:
          UserError: no export of a generative model, or an unknown text rule.
        """
        path = exports.locate(path)
        self._generator, self._template = load_generator(
            path,
            max_length=max_length,
            batch_size=batch_size,
            text=text,
            tensor=tensor,
            dtype=dtype,
            cache_dtype=cache_dtype,
        )
        model = exports.load_model_config(path).to_dict()
        self._cards, self._style = card_list(model), Style.of(model)
        self._annotations, self._expert_host, self._weights = annotations, expert_host, expert_weights
        self._host: ExpertHost | None = None
        self._decoder = DecoderProcess() if isolate else None
        self._agents: dict[bool, Agent] = {}
        self._batcher = batching.Batcher(self._generator)

    def ask(self, image: Images, prompt: str, **options: Unpack[AskOptions]) -> Reply:
        """Asks a question about an image.

        Args:
          image: path of a 2-D image or a volume, its bytes, a PIL image, a uint8 [H, W, 3] array, or a
            `Volume`; see `open_image`. Several sequences of one head: a dict by role, such as {"t1c": …,
            "t1": …, "t2": …, "flair": …}, in the order in which they are shown. None for a question without
            image.
          prompt: the question.
          **options: see `AskOptions`; by default with experts, and greedy.

        Raises `UserError` for an unusable image, an empty prompt, or no source of expert results.
        """
        return self.ask_batch([(image, prompt)], **options)[0]

    def ask_batch(
        self, questions: Sequence[tuple[Images, str]], **options: Unpack[AskOptions]
    ) -> list[Reply]:
        """Asks several questions, (image, prompt) each, which are decoded together; see `ask`."""
        asked = _split(options)
        scans = [self._scans(image, prompt, asked.view) for image, prompt in questions]
        scripts = (
            self.script(prompt, scans=shown, **asked.of_script)
            for (_, prompt), shown in zip(questions, scans, strict=True)
        )
        return list(self._batcher.run(scripts))

    def chat(self, image: Images = None, **options: Unpack[AskOptions]) -> Chat:
        """Starts a conversation, in which every question knows those before it."""
        return Chat(self, image, options)

    def script(
        self,
        prompt: str,
        *,
        scans: Sequence[Scan] = (),
        earlier: Transcript | None = None,
        experts: bool = True,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        form: AnswerForm | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> batching.Script[Reply]:
        """One question for a `Batcher`; see `Agent.script`."""
        if not prompt.strip():
            raise UserError("the prompt is empty; ask something")
        transcript = yield from self._agent(experts).script(
            Query(prompt.strip(), tuple(scans)),
            earlier=earlier,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            form=form,
            on_event=on_event,
        )
        return self._reply(transcript, new_scans=scans)

    def replay(
        self, exchanges: Sequence[tuple[Query, str]], *, system: str = "", experts: bool = True
    ) -> Transcript | None:
        """The `earlier` of `script` from a dialogue that somebody else kept; see `Agent.replay`."""
        return self._agent(experts).replay(exchanges, system=system)

    @property
    def generator(self) -> Generator:
        """The model."""
        return self._generator

    @property
    def cards(self) -> tuple[Card, ...]:
        """Cards of the experts that the model knows."""
        return tuple(self._cards)

    def start_experts(self) -> None:
        """Opens the sources of expert results, as the first question does. Raises `UserError` without one."""
        self._agent(True)

    def probabilities(
        self, image: Images, prompt: str, choices: Sequence[str], **options: Unpack[ViewOptions]
    ) -> dict[str, float]:
        """Probability of each of the choices as the whole answer, relative to the others; sums to 1.

        All choices are read in one pass. Experts are not asked.
        """
        scores = np.asarray(list(self.score(image, prompt, choices, **options).values()))
        weights = np.exp(scores - scores.max())
        return dict(zip(choices, (weights / weights.sum()).tolist(), strict=True))

    def score(
        self, image: Images, prompt: str, answers: Sequence[str], **options: Unpack[ViewOptions]
    ) -> dict[str, float]:
        """Log-probability of each text as the whole answer to a question, stop token included.

        Raises `UserError` for an unusable image, an empty prompt, or answers that are empty or equal.
        """
        if not answers or len(set(answers)) != len(answers) or not all(one.strip() for one in answers):
            raise UserError(f"answers {list(answers)}: give one or more different texts")
        scans = self._scans(image, prompt, options)
        chunk = self._agent(False).question(Query(prompt.strip(), tuple(scans)))
        stop = self._template.stop_ids(self._generator.tokenizer)[0]
        encode = self._generator.tokenizer.encode
        texts = [[*encode(one.strip()), stop] for one in answers]
        totals: list[float] = []
        for first in range(0, len(texts), self._generator.batch_size):
            part = texts[first : first + self._generator.batch_size]
            session = self._generator.start(len(part), chunk)
            totals += [float(scores.sum(dtype=np.float64)) for scores in session.score(part)]
        return dict(zip(answers, totals, strict=True))

    def embed(self, image: ImageLike, **options: Unpack[ViewOptions]) -> np.ndarray:
        """Mean of the image's tokens as the LLM reads them, float32 [D]."""
        (scan,) = self._scans(image, "", options, question=False)
        return self._generator.embed_image(scan.image)

    def _scans(
        self, image: Images, prompt: str, view: Mapping[str, Any], *, question: bool = True
    ) -> list[Scan]:
        if question and not prompt.strip():
            raise UserError("the prompt is empty; ask something")
        if image is None:
            return []
        processor = self._generator.processor
        size, preprocessing = processor.kept_size, processor.preprocessing
        scans = [
            dataclasses.replace(
                open_image(one, size, preprocessing=preprocessing, decoder=self._decoder, **view), role=role
            )
            for role, one in (image if isinstance(image, Mapping) else {"": image}).items()
        ]
        check_grid(scans)
        return scans

    def _reply(self, transcript: Transcript, new_scans: Sequence[Scan]) -> Reply:
        scans = transcript.scans
        return Reply(
            answer=transcript.answer,
            transcript=transcript,
            image=scans[0].image if scans else None,
            overlay=transcript.overlay,
            description="; ".join(_with_role(scan.role, scan.description) for scan in scans),
            notes=(
                *(_with_role(scan.role, note) for scan in new_scans for note in scan.notes),
                *_notes(transcript, self._cards),
            ),
        )

    def close(self) -> None:
        """Stops the expert host and the decoder process."""
        if self._decoder is not None:
            self._decoder.close()
        if self._host is not None:
            self._host.close()
            self._host = None
        self._agents.pop(True, None)

    def __enter__(self) -> Assistant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _agent(self, experts: bool) -> Agent:
        if experts not in self._agents:
            provider = self._provider() if experts else None
            self._agents[experts] = Agent(
                self._generator, self._template, cards=self._cards, provider=provider, style=self._style
            )
        return self._agents[experts]

    def _provider(self) -> Provider:
        found: list[Provider] = []
        if self._annotations is not None:
            found.append(AnnotationProvider(AnnotationStore(self._annotations)))
        command = host_command(self._expert_host, required=not found)
        if command:
            self._host = ExpertHost(command, weights=self._weights)
            found.append(HostProvider(self._host))
        if not found:
            raise UserError("experts are on, but there are none: give annotations or an expert host")
        return found[0] if len(found) == 1 else Providers(found)


load = Assistant


class Chat:
    """A conversation: every question knows the images, the answers and the experts' results before it.

    Attributes:
      replies: one for each question so far.
    """

    def __init__(self, assistant: Assistant, image: Images, options: AskOptions):
        """Called by `Assistant.chat`."""
        self.replies: list[Reply] = []
        self._assistant, self._options = assistant, options
        self._image: Images = image

    def show(self, image: Images, **options: Unpack[ViewOptions]) -> None:
        """Shows an image with the next question, which is then about it alone."""
        self._image = image
        self.set(**options)

    def set(self, **options: Unpack[AskOptions]) -> None:
        """Changes options of the questions that follow."""
        self._options = {**self._options, **options}

    def ask(self, prompt: str, **options: Unpack[AskOptions]) -> Reply:
        """Asks the next question; `options` are for this question alone. Raises as `Assistant.ask`."""
        asked = _split({**self._options, **options})
        scans = self._assistant._scans(self._image, prompt, asked.view)
        earlier = self.replies[-1].transcript if self.replies else None
        script = self._assistant.script(prompt, scans=scans, earlier=earlier, **asked.of_script)
        (reply,) = self._assistant._batcher.run([script])
        self._image = None
        self.replies.append(reply)
        return reply


class _Asked(NamedTuple):
    """Options of a question by where they go."""

    view: dict[str, Any]
    of_script: dict[str, Any]


def _split(options: Mapping[str, Any]) -> _Asked:
    sampling = {f.name: options[f.name] for f in dataclasses.fields(Sampling) if f.name in options}
    view = {name: options[name] for name in ViewOptions.__annotations__ if name in options}
    rest = {name: value for name, value in options.items() if name not in sampling | view}
    return _Asked(view, {**rest, "sampling": Sampling(**sampling)})


def host_command(setting: str, *, required: bool) -> list[str]:
    """The command that starts the expert host, as a list of arguments; empty for none.

    Args:
      setting: 'auto' (the `vilam3-experts` beside this Python or on the path), 'off', or a command line.
      required: with 'auto', whether a missing program is an error.

    Raises `UserError` if 'auto' found nothing, but it is required.
    """
    if setting == "off":
        return []
    if setting != "auto":
        return shlex.split(setting)
    beside = Path(sys.executable).parent / HOST_PROGRAM
    program = os.fspath(beside) if beside.exists() else shutil.which(HOST_PROGRAM)
    if program:
        return [program, "host"]
    if required:
        raise UserError(
            f"experts are on, but {HOST_PROGRAM} is not installed; install it (pip install -e ./experts), "
            "give annotations, or turn experts off"
        )
    return []


def check_grid(scans: Sequence[Scan]) -> None:
    """Raises UserError if there are no scans, or if the scans show different slices."""
    if not scans:
        raise UserError("no image was given; pass an image, or a dict from role to image")
    first = scans[0]
    for scan in scans:
        shown = (scan.axis, scan.index, [index for index, _ in scan.slices])
        if shown != (first.axis, first.index, [index for index, _ in first.slices]):
            raise UserError(
                f"image {scan.role}: {scan.description}, the first one is {first.description}; give scans of "
                "one grid, or the plane and the slice"
            )


def _with_role(role: str, text: str) -> str:
    return f"{role}: {text}" if role else text


def _notes(transcript: Transcript, cards: Sequence[Card]) -> tuple[str, ...]:
    notes = []
    stand_ins = {card.name for card in cards if card.stand_in}
    for annotation in transcript.annotations:
        if annotation.expert in stand_ins:
            stand_ins.remove(annotation.expert)
            notes.append(
                f"{annotation.expert} is a stand-in of public-package quality, "
                "not an expert that VILA-M3 was trained with."
            )
        if annotation.status == "failed":
            notes.append(f"The expert {annotation.expert} failed: {annotation.reason}.")
        notes += [
            f"A check of {annotation.expert} reports: {verdict.message}"
            for verdict in annotation.verdicts
            if verdict.status in ("warn", "fail") and verdict.message != annotation.reason
        ]
    if len(transcript.annotations) > 1:
        asked = ", ".join(str(Call(a.expert, a.args)) for a in transcript.annotations)
        notes.append(f"Experts were called in this order: {asked}.")
    if transcript.cut:
        count = sum(map(len, transcript.cut))
        notes.append(f"{count} characters that the model wrote after an expert call were removed.")
    if transcript.unexecuted_calls:
        calls = ", ".join(dict.fromkeys(map(str, transcript.unexecuted_calls)))
        notes.append(f"Expert calls that were not executed: {calls}.")
    if transcript.truncated:
        notes.append("The answer was cut off at the limit on new tokens.")
    return (*notes, NOT_CLINICAL)
