"""`vilam3_jax.load(path)`: an export as a Python object that answers questions about images."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack, cast

import jax
import numpy as np
from jax.sharding import Mesh

from vilam3_jax.data.experts.cards import Card, card_list
from vilam3_jax.data.experts.exchange import Style
from vilam3_jax.data.experts.grammar import Call
from vilam3_jax.data.experts.host_client import ExpertHost
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.isolation import DecoderProcess
from vilam3_jax.errors import UserError
from vilam3_jax.inference import batching, continuations, rendering
from vilam3_jax.inference.agent import (
    DEFAULT_MAX_NEW_TOKENS,
    Agent,
    AnnotationProvider,
    Event,
    HostProvider,
    PrimaryProvider,
    Provider,
    Providers,
    Query,
    Transcript,
)
from vilam3_jax.inference.constraints import AnswerForm
from vilam3_jax.inference.continuations import Continuation
from vilam3_jax.inference.generate import Generator
from vilam3_jax.inference.images import ImageLike, Scan, open_image
from vilam3_jax.inference.loading import load_generator
from vilam3_jax.inference.sampling import GREEDY, Sampling
from vilam3_jax.runtime import paths, processes

NOT_CLINICAL = "Not for clinical use: a research model; its answers and its experts' results may be wrong."
HOST_PROGRAM = "vilam3-experts"


@dataclasses.dataclass(frozen=True, repr=False)
class Reply:
    """The answer to a question; notebooks show it with its images.

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

    def __repr__(self) -> str:
        calls = [str(Call(one.expert, one.args)) for one in self.transcript.annotations]
        shown = {"image": self.description or None, "experts": calls or None}
        extra = "".join(f", {name}={value!r}" for name, value in shown.items() if value)
        return f"Reply({self.answer!r}{extra}, {len(self.notes)} notes)"

    def _repr_html_(self) -> str:
        return rendering.reply_html(self)


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


class ContinueOptions(ViewOptions, total=False):
    """Options of `Assistant.generate`: those of `open_image`, of `continuations.Ending` and of `Sampling`."""

    max_new_tokens: int
    stop: Sequence[str]
    stop_ids: Sequence[int] | None
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    seed: int


Images = ImageLike | Mapping[str, ImageLike] | None


class Assistant:
    """A model that answers questions about images; close it, or use it in a `with` statement."""

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
        mesh: Mesh | str | int | None = None,
        dtype: str | None = None,
        cache_dtype: str | None = None,
    ):
        """Loads a model. With several processes, all make the same calls with the same arguments.

        Args:
          path: an export (what `vilam3 convert import` and `vilam3 export` write); a training run, whose
            export is loaded, or its newest checkpoint while there is none; one of its checkpoints,
            `RUN/checkpoints/STEP`; or a Hugging Face folder of VILA, VILA-M3 or NVILA, which is read onto the
            devices as it is.
          annotations: annotation store, which is preferred to the expert host.
          expert_host: 'auto' (the installed `vilam3-experts`, started when first needed), 'off', or the
            command that starts one, for example in another virtual environment.
          expert_weights: folder of the experts' weights, for the host.
          max_length: maximum positions (text and image tokens) of a dialogue.
          batch_size: dialogues of `ask_batch` that are decoded together. An answer has the same bits whatever
            shares its batch, but may have others with another batch size.
          text: changes of the export's text rules: `as_trained`, `clean`, or for example `spaces=clean`.
          isolate: decode images in a separate process, with limits on time and memory.
          mesh: devices that share the model: their number, or the same as "tensor=4"; -1 for all. Or a `Mesh`
            with the axis `tensor`. By default one device, or all devices of several processes.
          dtype, cache_dtype: type of the model and that of its cache, see `load_generator`.

        Raises:
          UserError: no generative model, an unknown text rule or type, or a mesh that does not fit the model.
        """
        self._generator, self._template = load_generator(
            path,
            max_length=max_length,
            batch_size=batch_size,
            text=text,
            mesh=mesh,
            dtype=dtype,
            cache_dtype=cache_dtype,
        )
        model = self._generator.model.to_dict()
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

    def generate(
        self, prompt: str | Sequence[int], image: Images = None, **options: Unpack[ContinueOptions]
    ) -> Continuation:
        """Continues a text, without chat template and experts.

        Args:
          prompt: text, in which `<image>` marks the places of images; without markers, they come first. Or
            token ids, which may be control tokens.
          image: see `ask`.
          **options: see `ContinueOptions`; greedy by default. `stop` are texts that end the continuation,
            `stop_ids` tokens, by default those of the tokenizer.

        Raises `UserError` for an unusable image, an empty prompt, or options out of their range.
        """
        (only,) = self.samples(prompt, 1, image, **options)
        return only

    def samples(
        self,
        prompt: str | Sequence[int],
        count: int,
        image: Images = None,
        **options: Unpack[ContinueOptions],
    ) -> list[Continuation]:
        """Several continuations of one text, with seeds that count up from `seed`; see `generate`."""
        make = self._continuing(prompt, image, options)
        if count > 1 and not options.get("temperature"):
            raise UserError(f"{count} samples at temperature 0 would be equal; set a temperature above 0")
        return list(self._batcher.run(make(offset) for offset in range(count)))

    def stream(
        self, prompt: str | Sequence[int], image: Images = None, **options: Unpack[ContinueOptions]
    ) -> Iterator[str]:
        """The text of `generate` in pieces, as they are generated; closing the iterator stops it."""
        make = self._continuing(prompt, image, options)
        return continuations.stream(self._batcher, lambda tell: make(on_text=tell))

    def _continuing(
        self, prompt: str | Sequence[int], image: Images, options: ContinueOptions
    ) -> Callable[..., batching.Script[Continuation]]:
        """(offset of the seed, callback for text) ↦ script."""
        asked = _split(options)
        sampling: Sampling = asked.of_script.pop("sampling")
        stop, stop_ids = asked.of_script.pop("stop", ()), asked.of_script.pop("stop_ids", None)
        ending = continuations.Ending(
            asked.of_script.pop("max_new_tokens", DEFAULT_MAX_NEW_TOKENS),
            (stop,) if isinstance(stop, str) else tuple(stop),
            None if stop_ids is None else tuple(stop_ids),
        )
        if asked.of_script:
            raise UserError(f"generate takes no option {', '.join(asked.of_script)}")
        scans = self._scans(image, "", asked.view, question=False)
        chunk = continuations.beginning(self._generator, prompt, scans, self._template.rules)

        def make(
            offset: int = 0, on_text: Callable[[str], None] | None = None
        ) -> batching.Script[Continuation]:
            seeded = dataclasses.replace(sampling, seed=sampling.seed + offset)
            return continuations.script(self._generator, chunk, ending, seeded, on_text)

        return make

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

    def refusal(self, call: Call) -> str | None:
        """Why a call is refused, because no card lists its expert or argument, or None."""
        return self._agent(True).refusal(call)

    def annotate(self, query: Query, call: Call) -> Annotation:
        """The result of an expert on the scans of a query, without the model; failed ones included."""
        return self._agent(True).annotate(query, call)

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
        totals = self._agent(False).option_scores(Query(prompt.strip(), tuple(scans)), answers)
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
        options = {"preprocessing": preprocessing, "decoder": self._decoder, **view}

        def read() -> list[Scan]:
            named = image if isinstance(image, Mapping) else {"": image}
            scans = [dataclasses.replace(open_image(i, size, **options), role=r) for r, i in named.items()]
            check_grid(scans)
            return scans

        return _read_alike(read)

    def _reply(self, transcript: Transcript, new_scans: Sequence[Scan]) -> Reply:
        scans = transcript.scans
        return Reply(
            answer=transcript.answer,
            transcript=transcript,
            image=scans[0].image if scans else None,
            overlay=transcript.overlay,
            description=described(scans),
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
        provider = found[0] if len(found) == 1 else Providers(found)
        return provider if jax.process_count() == 1 else PrimaryProvider(provider)


load = Assistant


class Chat:
    """A conversation: every question knows the images, the answers and the experts' results before it.

    Notebooks show it with its images.

    Attributes:
      replies: one for each question so far.
      image: the image that was shown last, or None.
    """

    def __init__(self, assistant: Assistant, image: Images, options: AskOptions):
        """Called by `Assistant.chat`."""
        self.replies: list[Reply] = []
        self._assistant, self._options = assistant, options
        self.image: Images = None
        self._scans: list[Scan] | None = None  # of an image that no question was asked about yet
        self.show(image)

    def __repr__(self) -> str:
        last = f", the last {self.replies[-1]!r}" if self.replies else ""
        return f"Chat({len(self.replies)} replies{last})"

    def _repr_html_(self) -> str:
        return rendering.chat_html(self.replies)

    @property
    def description(self) -> str:
        """What the next question is about; "" without image."""
        if self._scans is None:
            return self.replies[-1].description
        return described(self._scans)

    def show(self, image: Images, **options: Unpack[ViewOptions]) -> None:
        """Shows an image with the next question, which is then about it alone.

        Raises `UserError` for an unusable image, and changes nothing.
        """
        changed = cast(AskOptions, {**self._options, **options})
        self._scans = self._assistant._scans(image, "", _split(changed).view, question=False)
        self.image, self._options = image, changed

    def set(self, **options: Unpack[AskOptions]) -> None:
        """Changes options of the questions that follow; those of `open_image` take effect with `show`."""
        self._options = {**self._options, **options}

    def ask(self, prompt: str, **options: Unpack[AskOptions]) -> Reply:
        """Asks the next question; `options` are for this question alone. Raises as `Assistant.ask`."""
        asked = _split({**self._options, **options})
        scans = self._scans or []
        if self._scans is not None and _split(options).view:
            scans = self._assistant._scans(self.image, "", asked.view, question=False)
        earlier = self.replies[-1].transcript if self.replies else None
        script = self._assistant.script(prompt, scans=scans, earlier=earlier, **asked.of_script)
        (reply,) = self._assistant._batcher.run([script])
        self._scans = None
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


def _read_alike(read: Callable[[], list[Scan]]) -> list[Scan]:
    """Scans that all processes read; raises `UserError` in all of them if one cannot, or reads others."""
    if jax.process_count() == 1:
        return read()
    try:
        scans, problem = read(), ""
    except UserError as error:
        scans, problem = [], str(error)
    found = processes.gather([problem, [scan.input_key for scan in scans]])
    for number, (message, _) in enumerate(found):
        if message:
            raise UserError(f"process {number}: {message}")
    if any(keys != found[0][1] for _, keys in found):
        raise UserError("the processes read different images; check that all hosts see the same files")
    return scans


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


def described(scans: Sequence[Scan]) -> str:
    """The descriptions of scans, with their roles."""
    return "; ".join(_with_role(scan.role, scan.description) for scan in scans)


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
