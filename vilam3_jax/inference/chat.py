"""`vilam3 chat` and `vilam3_jax.load(path)`: ask a trained model about an image, with experts."""

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
from typing import TypedDict, Unpack

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
    Transcript,
    load_generator,
)
from vilam3_jax.inference.generate import Sampling
from vilam3_jax.inference.images import ImageLike, Scan, open_image
from vilam3_jax.runtime import paths

NOT_CLINICAL = "Not for clinical use: a research model; its answers and its experts' results may be wrong."
_ROLE = re.compile(r"[a-z][a-z0-9]{0,15}=.")
HOST_PROGRAM = "vilam3-experts"
# Flags that are arguments of `load` and of `Assistant.ask`.
_LOAD_OPTIONS = ("annotations", "expert_host", "expert_weights", "text", "max_length", "isolate")
_ASK_OPTIONS = (
    "axis", "slices", "modality", "series", "frame", "max_new_tokens", "temperature", "top_p", "seed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reply:
    """The answer to a question.

    Attributes:
      answer: the last turn of the model.
      transcript: the whole dialogue, with expert turns.
      image: uint8 [H, W, 3], the image that the model was shown, before padding.
      overlay: uint8 [H, W, 3], the overlay of the expert, or None.
      description: of `image`.
      notes: for the reader: assumptions about the image, stand-ins, failures, truncated answers, and that it
        is not for clinical use.
    """

    answer: str
    transcript: Transcript
    image: np.ndarray
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
        text: str = "",
        isolate: bool = False,
    ):
        """Opens an export.

        Args:
          path: a training run, its `export` folder, or what `vilam3 convert import` or `vilam3 export` wrote.
          annotations: annotation store, which is preferred to the expert host.
          expert_host: 'auto' (the installed `vilam3-experts`, started when first needed), 'off', or the
            command that starts one, for example in another virtual environment.
          expert_weights: folder of the experts' weights, for the host.
          max_length: maximum positions (text and image tokens) of a dialogue.
          text: changes of the export's text rules: `as_trained`, `clean`, or for example `spaces=clean`.
          isolate: decode images in a separate process, with limits on time and memory.

        Raises:
          UserError: no export of a generative model, or an unknown text rule.
        """
        path = exports.locate(path)
        self._generator, self._template = load_generator(path, max_length=max_length, batch_size=1, text=text)
        model = exports.load_model_config(path).to_dict()
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
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        **view: Unpack[ViewOptions],
    ) -> Reply:
        """Asks a question about an image.

        Args:
          image: path of a 2-D image or a volume, a uint8 [H, W, 3] array, or a `Volume`; see `open_image`.
            Several sequences of one head: a dict by role, such as {"t1c": …, "t1": …, "t2": …, "flair": …},
            in the order in which they are shown.
          prompt: the question.
          experts: whether the model may call experts.
          max_new_tokens: limit of each turn of the model.
          temperature, top_p, seed: see `Sampling`; greedy by default.
          **view: axis, index, slices, window, modality, series and frame; see `open_image`.

        Raises `UserError` for an unusable image, an empty prompt, or no source of expert results.
        """
        if not prompt.strip():
            raise UserError("the prompt is empty; ask something")
        processor = self._generator.processor
        size, preprocessing = processor.kept_size, processor.preprocessing
        scans = [
            dataclasses.replace(
                open_image(one, size, preprocessing=preprocessing, decoder=self._decoder, **view), role=role
            )
            for role, one in (image if isinstance(image, Mapping) else {"": image}).items()
        ]
        _check_grid(scans)
        (transcript,) = self._agent(experts).run(
            [Query(prompt.strip(), tuple(scans))],
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p, seed),
        )
        return Reply(
            answer=transcript.answer,
            transcript=transcript,
            image=scans[0].image,
            overlay=transcript.overlay,
            description="; ".join(_with_role(scan.role, scan.description) for scan in scans),
            notes=(
                *(_with_role(scan.role, note) for scan in scans for note in scan.notes),
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


def _check_grid(scans: Sequence[Scan]) -> None:
    """Raises UserError if there is no scan, or if they show different slices."""
    if not scans:
        raise UserError("there is no image; give one, or a dict of roles")
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


def render_dialogue(reply: Reply) -> str:
    """The dialogue as text, followed by the notes."""
    experts = " and ".join(dict.fromkeys(a.expert for a in reply.transcript.annotations))
    names = {"user": "You", "assistant": "Model", "system": "System", "expert": f"Expert {experts}"}
    lines = [f"[image] {reply.description}"]
    lines += [f"{names[turn.role]}: {turn.text}" for turn in reply.transcript.turns]
    return "\n".join([*lines, "", *(f"Note: {note}" for note in reply.notes)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilam3 chat", description="Ask a trained model about an image. " + NOT_CLINICAL
    )
    parser.add_argument("--checkpoint", required=True, help="a training run or its export folder")
    parser.add_argument(
        "--image",
        required=True,
        action="append",
        help="image, or volume: NIfTI, NRRD, MetaImage, DICOM file or folder; ROLE=PATH for each of several "
        "sequences, such as t1c=… t1=… t2=… flair=…",
    )
    parser.add_argument("--prompt", required=True, help="the question")
    add = parser.add_argument
    add("--axis", choices=sorted(AXES), help="plane of a volume (default: the model's, usually axial)")
    add("--slice", type=int, help="slice of a volume (default: the middle one)")
    add("--slices", type=int, default=1, help="number of evenly spaced slices of a volume (default: 1)")
    add("--window", help="CENTRE,WIDTH of a volume (default: the model's for CT, otherwise percentiles)")
    add("--modality", help="DICOM code (CT, MR, ...) of an image whose file states none")
    add("--series", help="series of a DICOM folder, as `vilam3 data scan` lists it")
    add("--frame", type=int, help="frame of a cine (default: the middle one) or page")
    add("--isolate", action="store_true", help="decode the image in a process with time and memory limits")
    add("--experts", default="on", choices=("on", "off"), help="whether the model may call experts")
    add("--annotations", help="annotation store, which is preferred to the expert host")
    add("--expert_host", default="auto", help="auto (the installed vilam3-experts), off, or a command")
    add("--expert_weights", help="folder of the experts' weights, for the host")
    add("--text", default="", help=TEXT_HELP)
    add("--max_new_tokens", type=int, default=DEFAULT_MAX_NEW_TOKENS, help="limit of each turn")
    add("--max_length", type=int, default=2048, help="maximum positions of the dialogue, images included")
    add("--temperature", type=float, default=0.0, help="of sampling; 0 is greedy (default)")
    add("--top_p", type=float, default=1.0, help="sample from tokens of this total probability")
    add("--seed", type=int, default=0, help="of sampling")
    add("--save_images", help="folder for image.png and overlay.png, as shown to the model")
    return parser


def _images(given: Sequence[str]) -> str | dict[str, str]:
    """A single path, or role → path."""
    if len(given) == 1 and (not _ROLE.match(given[0]) or paths.exists(given[0])):
        return given[0]
    found: dict[str, str] = {}
    for text in given:
        role, _, path = text.partition("=")
        if not _ROLE.match(text) or role in found:
            raise UserError(f"--image={text}: each of several images needs its own role, as in t1c=PATH")
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
    for name in ("max_new_tokens", "max_length"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name}={getattr(options, name)}: must be at least 1")
    asked = {name: getattr(options, name) for name in _ASK_OPTIONS}
    asked |= {"experts": options.experts == "on", "index": options.slice, "window": _window(options.window)}
    with load(options.checkpoint, **{name: getattr(options, name) for name in _LOAD_OPTIONS}) as assistant:
        reply = assistant.ask(_images(options.image), options.prompt, **asked)
    print(render_dialogue(reply))
    if options.save_images:
        folder = paths.as_path(options.save_images)
        paths.write_bytes_atomic(folder / "image.png", encode_png(reply.image))
        if reply.overlay is not None:
            paths.write_bytes_atomic(folder / "overlay.png", encode_png(reply.overlay))
    return 0
