"""`vilam3 chat`: ask a trained model about an image, with experts."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

from vilam3_jax.data.images import encode_png
from vilam3_jax.data.text_rules import TEXT_HELP
from vilam3_jax.data.volumes import AXES
from vilam3_jax.errors import UserError
from vilam3_jax.inference.agent import DEFAULT_MAX_NEW_TOKENS, Event
from vilam3_jax.inference.assistant import NOT_CLINICAL, Assistant, Images, Reply, load
from vilam3_jax.inference.model_flags import CHECKPOINT_HELP, add_model_flags, model_options
from vilam3_jax.inference.rendering import reply_text
from vilam3_jax.runtime import paths, process_flags, processes

_ROLE = re.compile(r"[a-z][a-z0-9]{0,15}=.")
# Flags that are arguments of `load` and of `Assistant.ask`.
_LOAD_OPTIONS = ("annotations", "expert_host", "expert_weights", "text", "max_length", "isolate")
_ASK_OPTIONS = (
    "axis", "slices", "modality", "series", "frame", "max_new_tokens", "temperature", "top_p", "top_k",
    "repetition_penalty", "seed",
)  # fmt: skip


_HELP = """\
Ask a question, or type
  /image PATH      show another image; ROLE=PATH ROLE=PATH … for several sequences
  /slice NUMBER    show another slice of the volume
  /expert on|off   whether the model may call experts
  /save FOLDER     write the dialogue and the images of the last answer
  /help, /quit"""


class _Session:
    """An interactive session: every question knows those before it.

    With several processes, the primary one reads the lines and prints.
    """

    def __init__(self, assistant: Assistant, image: Images, options: dict[str, Any], verbose: bool):
        self._assistant, self._verbose = assistant, verbose
        self._chat = assistant.chat(image, **options)

    def run(self, read: Callable[[str], str]) -> None:
        """Answers lines of `read` until it raises EOFError, or /quit."""
        _say(f"{NOT_CLINICAL}\n{_HELP}")
        self._describe()
        while True:
            line = processes.made_by_primary_process(lambda: _line(read))
            if line is None or line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self._command(*line[1:].partition(" ")[::2])
                elif line:
                    self._ask(line)
            except UserError as error:
                _say(f"error: {error}")

    def _describe(self) -> None:
        if self._chat.description:
            _say(f"[image] {self._chat.description}")

    def _ask(self, question: str) -> None:
        wrote = False

        def tell(event: Event) -> None:
            nonlocal wrote
            if event.kind == "text":
                if not self._verbose:  # which shows the whole dialogue at the end
                    _say(event.text, end="", flush=True)
                    wrote = True
            elif event.kind == "call":
                _say(f"\n[{event.text} is running]" if wrote else f"[{event.text} is running]", flush=True)
                wrote = False
            elif event.annotation is not None and event.annotation.status != "ok":
                _say(f"[{event.text} failed: {event.annotation.reason}]", flush=True)

        reply = self._chat.ask(question, on_event=tell)
        if self._verbose:
            _say(reply_text(reply, cards=True))
            return
        _say()
        for note in reply.notes:
            if note != NOT_CLINICAL:
                _say(f"note: {note}")

    def _command(self, name: str, value: str) -> None:
        value = value.strip()
        if name == "image" and value:
            given = value.split() if "=" in value else [os.path.expanduser(value)]
            self._chat.show(_images(given), index=None)
            self._describe()
        elif name == "slice" and value.isdecimal():
            self._chat.show(self._chat.image, index=int(value))
            self._describe()
        elif name == "expert" and value in ("on", "off"):
            if value == "on":
                self._assistant.start_experts()
            self._chat.set(experts=value == "on")
        elif name == "save" and value:
            if not self._chat.replies:
                raise UserError("/save: nothing has been answered yet; ask a question first")
            folder = os.path.expanduser(value)
            save(self._chat.replies[-1], folder)
            _say(f"saved to {folder}")
        elif name == "help":
            _say(_HELP)
        else:
            raise UserError(f"/{name} {value}".rstrip() + ": not understood; /help lists the commands")


def _line(read: Callable[[str], str]) -> str | None:
    """The next line; None at the end of the input."""
    try:
        return read("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _say(*words: str, **options: Any) -> None:
    """Prints, in the primary process alone."""
    if processes.is_primary_process():
        print(*words, **options)


def save(reply: Reply, folder: paths.PathLike) -> None:
    """Writes transcript.txt, image.png and overlay.png, as far as the answer has them."""
    if not processes.is_primary_process():
        return
    out = paths.as_path(folder)
    turns = [f"{turn.role}: {turn.text}" for turn in reply.transcript.turns]
    paths.write_text_atomic(out / "transcript.txt", "\n".join([*turns, "", *reply.notes, ""]))
    for name, image in (("image", reply.image), ("overlay", reply.overlay)):
        if image is not None:
            paths.write_bytes_atomic(out / f"{name}.png", encode_png(image))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilam3 chat", description="Ask a trained model about an image. " + NOT_CLINICAL
    )
    parser.add_argument("--checkpoint", required=True, help=CHECKPOINT_HELP)
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        help="image, or volume: NIfTI, NRRD, MetaImage, DICOM file or folder; ROLE=PATH for each of several "
        "sequences, such as t1c=… t1=… t2=… flair=…; none: a question without image",
    )
    parser.add_argument("--prompt", help="the question; without it, an interactive session starts")
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
    add("--top_k", type=int, default=0, help="sample from this many tokens; 0 is all (default)")
    add("--repetition_penalty", type=float, default=1.0, help="against tokens of the dialogue so far")
    add("--seed", type=int, default=0, help="of sampling")
    add("--save_images", help="folder for the transcript, and for the images as shown to the model")
    add("--verbose", action="store_true", help="show the cards of the experts, too")
    add_model_flags(parser)
    return parser


def _images(given: Sequence[str]) -> str | dict[str, str] | None:
    """A single path, or role → path, or None."""
    if not given:
        return None
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
    with processes.group("vilam3 chat", **process_flags.argument_values(options)):
        _chat(options)
    return 0


def _chat(options: argparse.Namespace) -> None:
    asked = {name: getattr(options, name) for name in _ASK_OPTIONS}
    asked |= {"experts": options.experts == "on", "index": options.slice, "window": _window(options.window)}
    image = _images(options.image)
    of_load = {name: getattr(options, name) for name in _LOAD_OPTIONS} | model_options(options)
    with load(options.checkpoint, **of_load) as assistant:
        if options.prompt is None:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  edits and recalls the lines of `input`
            _Session(assistant, image, asked, options.verbose).run(input)
            return
        reply = assistant.ask(image, options.prompt, **asked)
    _say(reply_text(reply, cards=options.verbose))
    if options.save_images:
        save(reply, options.save_images)
