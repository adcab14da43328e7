"""`vilam3 chat`, and `vilam3_jax.load(path)`: ask a trained export about an image, experts included."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vilam3_jax.checkpoints import exports
from vilam3_jax.data.experts.cards import Card, card_list
from vilam3_jax.data.experts.exchange import Style
from vilam3_jax.data.experts.grammar import Call
from vilam3_jax.data.experts.host_client import ExpertHost
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.images import encode_png
from vilam3_jax.data.isolation import DecoderProcess
from vilam3_jax.data.text_rules import TEXT_HELP
from vilam3_jax.data.volumes import AXES
from vilam3_jax.errors import UserError
from vilam3_jax.inference.agent import (
    DEFAULT_MAX_NEW_TOKENS,
    Agent,
    AnnotationProvider,
    HostProvider,
    Provider,
    Providers,
    Query,
    Scan,
    Transcript,
    load_generator,
)
from vilam3_jax.inference.generate import Sampling
from vilam3_jax.inference.images import ImageLike, Picture, open_picture
from vilam3_jax.runtime import paths

NOT_CLINICAL = "Not for clinical use: a research model; its answers and its experts' results may be wrong."
_ROLE = re.compile(r"[a-z][a-z0-9]{0,15}=.")
HOST_PROGRAM = "vilam3-experts"


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came of one question.

    Attributes:
      answer: the model's last words.
      transcript: the whole dialogue, expert included.
      image: uint8 [H, W, 3], what the model looked at, before it is padded.
      overlay: uint8 [H, W, 3], the expert's picture, or None.
      description: what `image` is.
      notes: sentences a reader must see: what was assumed about the image, stand-ins, failures, cut-off
        answers, no clinical use.
    """

    answer: str
    transcript: Transcript
    image: np.ndarray
    overlay: np.ndarray | None
    description: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return self.answer


class Assistant:
    """A loaded export that answers questions; made by `load`."""

    def __init__(
        self,
        checkpoint: paths.PathLike,
        *,
        annotations: paths.PathLike | None = None,
        expert_host: str = "auto",
        expert_weights: paths.PathLike | None = None,
        max_length: int = 2048,
        text: str = "",
        isolate: bool = False,
    ):
        """See `load`."""
        self._generator, self._template = load_generator(
            checkpoint, max_length=max_length, batch_size=1, text=text
        )
        model = exports.load_model_config(checkpoint).to_dict()
        self._cards, self._style = card_list(model), Style.of(model)
        self._annotations, self._expert_host, self._weights = annotations, expert_host, expert_weights
        self._host: ExpertHost | None = None
        self._decoder = DecoderProcess() if isolate else None
        self._agents: dict[bool, Agent] = {}

    def ask(
        self,
        image: ImageLike | Mapping[str, ImageLike],
        prompt: str,
        *,
        experts: bool = True,
        axis: str | None = None,
        index: int | None = None,
        slices: int = 1,
        window: tuple[float, float] | None = None,
        modality: str | None = None,
        series: str | None = None,
        frame: int | None = None,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Reply:
        """Asks one question about one image.

        Args:
          image: path of a picture or a scan, a uint8 [H, W, 3] array, or a `Volume`; see `open_picture`.
            Several sequences of one head: a dict of their roles, such as {"t1c": …, "t1": …, "t2": …,
            "flair": …}, in the order in which they are shown.
          prompt: the question.
          experts: whether the model may ask experts.
          axis: plane of a scan: 'axial', 'coronal' or 'sagittal'; by default the model's own.
          index: slice of a scan; the middle one by default.
          slices: how many evenly spaced slices of a scan are shown, instead of one.
          window: (centre, width) of a scan in its own units; by default as the model's preprocessing says.
          modality: DICOM's code of an image whose file states none, such as "CT".
          series: which series of a DICOM folder.
          frame: which frame of a cine or page of a TIFF.
          max_new_tokens: bound on each turn of the model.
          temperature: 0 for the likeliest words; above it words are drawn.
          top_p: draw among the likeliest words of this total probability.
          seed: of the draws.

        Raises:
          UserError: the image cannot be used, the prompt is empty, or experts are wanted and there are none.
        """
        if not prompt.strip():
            raise UserError("the prompt is empty; ask something")
        processor = self._generator.processor
        pictures = {
            role: open_picture(
                one,
                processor.kept_size,
                axis=axis,
                index=index,
                slices=slices,
                window=window,
                modality=modality,
                series=series,
                frame=frame,
                preprocessing=processor.preprocessing,
                decoder=self._decoder,
            )
            for role, one in (image if isinstance(image, Mapping) else {"": image}).items()
        }
        first = _first_of_one_grid(pictures)
        agent = self._agent(experts)
        query = Query(prompt.strip(), tuple(_scan(picture, role) for role, picture in pictures.items()))
        sampling = Sampling(temperature, top_p, seed)
        (transcript,) = agent.run([query], max_new_tokens=max_new_tokens, sampling=sampling)
        return Reply(
            answer=transcript.answer,
            transcript=transcript,
            image=first.pixels,
            overlay=transcript.overlay,
            description="; ".join(_of_role(role, p.description) for role, p in pictures.items()),
            notes=(
                *(_of_role(role, note) for role, p in pictures.items() for note in p.notes),
                *_notes(transcript, self._cards),
            ),
        )

    def close(self) -> None:
        """Ends the expert host and the decoder process, if they were started."""
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
                self._generator,
                self._template,
                cards=self._cards if experts else (),
                provider=provider,
                style=self._style,
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


def host_command(setting: str, *, required: bool) -> list[str]:
    """How the expert host is started.

    Args:
      setting: 'auto' (the `vilam3-experts` beside this Python or on the path), 'off', or a command line.
      required: with 'auto', whether a missing program is an error.

    Returns:
      Words of the command; empty for none.

    Raises:
      UserError: 'auto' found nothing and there is no other source of expert results.
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


def load(
    path: paths.PathLike,
    *,
    annotations: paths.PathLike | None = None,
    expert_host: str = "auto",
    expert_weights: paths.PathLike | None = None,
    max_length: int = 2048,
    text: str = "",
    isolate: bool = False,
) -> Assistant:
    """Opens an export.

    Args:
      path: the `export` folder of a training run, or what `vilam3 convert import` wrote.
      annotations: store of what experts said before; looked at first.
      expert_host: 'auto' (the installed `vilam3-experts`, started when first needed), 'off', or the command
        that starts one, for example of another virtual environment.
      expert_weights: folder of the experts' model files, for the host.
      max_length: most positions (text and image tokens) of one dialogue.
      text: changes of the export's text rules: `as_trained`, `clean`, or for example `spaces=clean`.
      isolate: decode images in a process of its own, with limits on time and memory.

    Raises:
      UserError: no export, or one of a model that cannot speak; an unknown text rule.
    """
    return Assistant(
        path,
        annotations=annotations,
        expert_host=expert_host,
        expert_weights=expert_weights,
        max_length=max_length,
        text=text,
        isolate=isolate,
    )


def _first_of_one_grid(pictures: Mapping[str, Picture]) -> Picture:
    """The first of several pictures, which must be the same slice of their scans.

    Raises:
      UserError: none, or different slices.
    """
    if not pictures:
        raise UserError("there is no image; give one, or a dict of roles")
    first = next(iter(pictures.values()))
    for role, picture in pictures.items():
        shown = (picture.axis, picture.index, [index for index, _ in picture.slices])
        if shown != (first.axis, first.index, [index for index, _ in first.slices]):
            raise UserError(
                f"image {role}: {picture.description}, the first one is {first.description}; give scans of "
                "one grid, or the plane and the slice"
            )
    return first


def _scan(picture: Picture, role: str) -> Scan:
    return Scan(
        image=picture.pixels,
        input_key=picture.input_key,
        axis=picture.axis,
        index=picture.index,
        volume=picture.volume,
        png=picture.png,
        role=role,
        modality=picture.modality,
        slices=picture.slices,
        planes=picture.planes,
    )


def _of_role(role: str, text: str) -> str:
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
            f"A check of {annotation.expert} says: {verdict.message}"
            for verdict in annotation.verdicts
            if verdict.status in ("warn", "fail") and verdict.message != annotation.reason
        ]
    if len(transcript.annotations) > 1:
        asked = ", ".join(str(Call(a.expert, a.args)) for a in transcript.annotations)
        notes.append(f"Experts were asked in this order: {asked}.")
    if transcript.cut:
        characters = sum(map(len, transcript.cut))
        notes.append(f"{characters} characters that the model wrote before the expert had spoken were cut.")
    if transcript.not_made:
        calls = ", ".join(dict.fromkeys(map(str, transcript.not_made)))
        notes.append(f"Calls that the model wrote but that were not made: {calls}.")
    if transcript.truncated:
        notes.append("The answer was cut off at the bound on new tokens.")
    return (*notes, NOT_CLINICAL)


def render_dialogue(reply: Reply) -> str:
    """The dialogue as text: who said what, then the notes."""
    names = {"user": "You", "assistant": "Model", "system": "System", "expert": "Expert"}
    lines = [f"[image] {reply.description}"]
    for turn in reply.transcript.turns:
        name = names[turn.role]
        if turn.role == "expert":
            name = "Expert " + " and ".join(dict.fromkeys(a.expert for a in reply.transcript.annotations))
        lines.append(f"{name}: {turn.text}")
    return "\n".join([*lines, "", *(f"Note: {note}" for note in reply.notes)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilam3 chat",
        description="Ask a trained model about an image. " + NOT_CLINICAL,
    )
    parser.add_argument("--checkpoint", required=True, help="export folder of a training run")
    parser.add_argument(
        "--image",
        required=True,
        action="append",
        help="picture, or scan: NIfTI, NRRD, MetaImage, DICOM file or folder; ROLE=PATH for each of several "
        "sequences, such as t1c=… t1=… t2=… flair=…",
    )
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument(
        "--axis", choices=sorted(AXES), help="plane of a scan (default: the model's own, usually axial)"
    )
    parser.add_argument("--slice", type=int, help="slice of a scan (default: the middle one)")
    parser.add_argument(
        "--slices", type=int, default=1, help="how many evenly spaced slices of a scan to show (default: 1)"
    )
    parser.add_argument("--window", help="CENTRE,WIDTH of a scan (default: the model's for CT, percentiles)")
    parser.add_argument("--modality", help="DICOM's code (CT, MR, ...) of an image whose file states none")
    parser.add_argument("--series", help="series of a DICOM folder, as `vilam3 data scan` lists it")
    parser.add_argument("--frame", type=int, help="frame of a cine (default: the middle one) or page")
    parser.add_argument(
        "--isolate", action="store_true", help="decode the image in a process with limits on time and memory"
    )
    parser.add_argument("--experts", default="on", choices=("on", "off"), help="may the model ask experts?")
    parser.add_argument("--annotations", help="store of what experts said before; looked at first")
    parser.add_argument(
        "--expert_host", default="auto", help="auto (the installed vilam3-experts), off, or a command"
    )
    parser.add_argument("--expert_weights", help="folder of the experts' model files, for the host")
    parser.add_argument("--text", default="", help=TEXT_HELP)
    parser.add_argument(
        "--max_new_tokens", type=int, default=DEFAULT_MAX_NEW_TOKENS, help="bound on each turn"
    )
    parser.add_argument(
        "--max_length", type=int, default=2048, help="most positions of the dialogue, images included"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest words (default)")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among words of this total probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--save_images", help="folder for image.png and overlay.png, as the model saw them")
    return parser


def _images(given: Sequence[str]) -> str | dict[str, str]:
    """One path, or role to path."""
    if len(given) == 1 and (not _ROLE.match(given[0]) or paths.exists(given[0])):
        return given[0]
    found: dict[str, str] = {}
    for text in given:
        role, _, path = text.partition("=")
        if not _ROLE.match(text) or role in found:
            raise UserError(f"--image={text}: of several images each needs a role of its own, as in t1c=PATH")
        found[role] = path
    return found


def _window(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    try:
        centre, width = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"--window={text}: must be CENTRE,WIDTH, for example 50,400") from error
    if not width > 0:
        raise UserError(f"--window={text}: the width must be above 0")
    return centre, width


def main(argv: Sequence[str]) -> int:
    """Entry of `vilam3 chat`."""
    options = _parser().parse_args(argv)
    if options.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens={options.max_new_tokens}: must be at least 1")
    if options.max_length < 1:
        raise UserError(f"--max_length={options.max_length}: must be at least 1")
    window = _window(options.window)
    assistant = load(
        options.checkpoint,
        annotations=options.annotations,
        expert_host=options.expert_host,
        expert_weights=options.expert_weights,
        text=options.text,
        max_length=options.max_length,
        isolate=options.isolate,
    )
    with assistant:
        reply = assistant.ask(
            _images(options.image),
            options.prompt,
            experts=options.experts == "on",
            axis=options.axis,
            index=options.slice,
            slices=options.slices,
            window=window,
            modality=options.modality,
            series=options.series,
            frame=options.frame,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
    print(render_dialogue(reply))
    if options.save_images:
        folder = paths.as_path(options.save_images)
        paths.write_bytes_atomic(folder / "image.png", encode_png(reply.image))
        if reply.overlay is not None:
            paths.write_bytes_atomic(folder / "overlay.png", encode_png(reply.overlay))
    return 0
