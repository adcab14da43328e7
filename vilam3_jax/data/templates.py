"""Chat templates: the conversion of turns to tokens, targets and image positions.

A template is data. Its control tokens are inserted as ids and all other text is encoded as plain text, so no
text can open or close a turn. Text between control tokens and images is encoded in one piece, except that an
assistant's text is encoded separately. A prompt for generation is therefore an exact prefix of the training
sequence, and targets need no search. The template's `rules` determine the treatment of text around images.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vilam3_jax.data.examples import IMAGE_MARKER, Turn
from vilam3_jax.data.text_rules import ALL_CLEAN, AS_TRAINED, TextRules, normalise_markers
from vilam3_jax.errors import UserError


class TokenizerLike(Protocol):
    """The interface of `data.tokenizer.Tokenizer` that templates and loaders need."""

    bos_id: int | None
    eos_id: int
    pad_id: int
    vocab_size: int
    adds_bos: bool

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_opening(self, text: str) -> list[int]: ...

    def encode_continued(self, text: str) -> list[int]: ...

    def token_id(self, token: str) -> int: ...

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str: ...


@dataclasses.dataclass(frozen=True)
class Special:
    """A control token, inserted by id."""

    token: str


@dataclasses.dataclass(frozen=True)
class Bos:
    """The tokenizer's beginning-of-sequence token, if any."""


@dataclasses.dataclass(frozen=True)
class Eos:
    """The tokenizer's end-of-sequence token."""


Part = str | Special | Bos | Eos


_FULL_WIDTH = 0xFEE0  # from an ASCII character to its full-width form


def _stripped(text: str) -> str:
    """NVILA's normalization: VILA's, then stripped."""
    return normalise_markers(text).strip()


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat format."""

    name: str  # as in `config.model.template`
    headers: Mapping[str, tuple[Part, ...]]  # role -> parts before its text
    ends: Mapping[str, tuple[Part, ...]]  # role -> parts after its text (except the assistant's)
    stop: tuple[Part, ...]  # parts after an assistant's text; supervised like the text
    after_stop: tuple[Part, ...] = ()  # parts after `stop`; not supervised
    start: tuple[Part, ...] = ()  # parts at the start of a sequence
    system: str | None = None  # text of the system turn of dialogues without one; None: no such turn
    # Text between an assistant's header and its text; encoded and supervised with the text.
    gap: str = ""
    # Parts at the end of a dialogue's last turn, if these differ from other turns.
    last_stop: tuple[Part, ...] | None = None
    # Normalization of a turn's text in VILA's training, see `TextRules.spaces`; `str`: none.
    trained_spaces: Callable[[str], str] = normalise_markers
    rules: TextRules = ALL_CLEAN  # treatment of text around images

    def stop_ids(self, tokenizer: TokenizerLike) -> tuple[int, ...]:
        """Returns the ids that end an answer."""
        parts = (*self.stop, *(self.last_stop or ()))
        control = (tokenizer.token_id(part.token) for part in parts if isinstance(part, Special))
        return tuple(dict.fromkeys((*control, tokenizer.eos_id)))

    @property
    def control_tokens(self) -> frozenset[str]:
        """The control tokens of this format."""
        parts = (*self.start, *self.stop, *self.after_stop, *(self.last_stop or ()))
        turns = (part for parts in (*self.headers.values(), *self.ends.values()) for part in parts)
        return frozenset(part.token for part in (*parts, *turns) if isinstance(part, Special))

    def without_headers(self, text: str) -> str:
        """`text` in which no header is written out, for text that must not open a turn.

        Some formats open turns with plain text, such as `ASSISTANT:`, which any text could contain. It
        becomes `ASSISTANT :`. Headers with control tokens need no such care.
        """
        pattern = self._written_headers
        return pattern.sub(lambda found: f"{found[0][:-1]} {found[0][-1]}", text) if pattern else text

    @functools.cached_property
    def _written_headers(self) -> re.Pattern[str] | None:
        """Matches the headers without control tokens, in full-width letters, too; None if there are none."""
        plain = {
            "".join(map(str, parts)).strip()
            for parts in self.headers.values()
            if parts and all(isinstance(part, str) for part in parts)
        }
        # Some tokenizers fold full-width letters to ASCII.
        options = ("".join(f"[{c}{chr(ord(c) + _FULL_WIDTH)}]" for c in text) for text in sorted(plain))
        return re.compile("|".join(options)) if plain else None


# Expert turns have the user's header, as in VILA-M3.
_WRITTEN = {"system": "system", "user": "user", "assistant": "assistant", "expert": "user"}
_SILENT: Mapping[str, tuple[Part, ...]] = dict.fromkeys(_WRITTEN, ())
_CURIOUS = (
    "A chat between a curious {person} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
)


def _chatml(name: str, system: str | None = None, after: tuple[Part, ...] = ("\n",)) -> Template:
    """`<|im_start|>role`, a line end, the text, `<|im_end|>`, and `after` between turns."""
    start, end = Special("<|im_start|>"), Special("<|im_end|>")
    return Template(
        name=name,
        headers={role: (start, f"{written}\n") for role, written in _WRITTEN.items()},
        ends={role: (end, *after) for role in ("system", "user", "expert")},
        stop=(end,),
        after_stop=after,
        system=system,
    )


def _llama_3() -> Template:
    """Llama 3's headers with VILA's system text; a training dialogue ends with end-of-text."""
    open_, close = Special("<|start_header_id|>"), Special("<|end_header_id|>")
    end = (Special("<|eot_id|>"),)
    return Template(
        name="llama_3",
        headers={role: (open_, written, close, "\n\n") for role, written in _WRITTEN.items()},
        ends=dict.fromkeys(("system", "user", "expert"), end),
        stop=end,
        start=(Special("<|begin_of_text|>"),),
        system="You are a helpful language and vision assistant. You are able to understand the visual "
        "content that the user provides, and assist the user with a variety of tasks using natural language.",
        last_stop=(Special("<|end_of_text|>"),),
    )


def _without_system(template: Template) -> Template:
    """VILA's template for its vflan data: only the end of the system turn remains, spaces are preserved."""
    return dataclasses.replace(
        template,
        name=f"{template.name}_nosys",
        start=template.ends["system"],
        system=None,
        trained_spaces=str,
    )


def _vicuna(name: str, system: str, trained_spaces: Callable[[str], str] = normalise_markers) -> Template:
    """`USER: ... ASSISTANT: ...</s>`: plain text instead of control tokens opens the turns."""
    user = ("USER: ",)
    return Template(
        name=name,
        headers={"system": (), "user": user, "expert": user, "assistant": ("ASSISTANT:",)},
        ends=dict.fromkeys(("system", "user", "expert"), (" ",)),
        stop=(Eos(),),
        start=(Bos(),),
        system=system,
        gap=" ",
        trained_spaces=trained_spaces,
    )


CHATML = _chatml("chatml")
# LLMs use the first token as an attention sink, so it must not be an image from an untrained projector
# (docs/training_data.md, "The first token").
PLAIN = Template(
    name="plain", headers=_SILENT, ends=_SILENT, start=(Bos(),), stop=("\n",), trained_spaces=str
)
_LLAMA_3 = _llama_3()
_HERMES_2 = _chatml("hermes-2", "Answer the questions.", after=())
# VILA's conversation modes, by VILA's names; `v1` is an alias of vicuna_v1.
TEMPLATES = {
    template.name: template
    for template in (
        CHATML,
        PLAIN,
        _LLAMA_3,
        _without_system(_LLAMA_3),
        _vicuna("v1", _CURIOUS.format(person="user")),
        _vicuna("vicuna_v1", _CURIOUS.format(person="user")),
        _vicuna("vicuna_v1_nosys", "", str),
        _vicuna("llava_v1", _CURIOUS.format(person="human")),
        _HERMES_2,
        _without_system(_HERMES_2),
        _chatml(
            "mpt",
            "A conversation between a user and an LLM-based AI assistant. "
            "The assistant gives helpful and honest answers.",
            after=(),
        ),
        dataclasses.replace(_chatml("qwen2", "You are a helpful assistant"), trained_spaces=_stripped),
    )
}

CONTROL_TOKENS = frozenset[str]().union(*(template.control_tokens for template in TEMPLATES.values()))


def get_template(name: str) -> Template:
    """Returns a template by name; raises `UserError` with the known names if there is none."""
    if name not in TEMPLATES:
        raise UserError(f"template {name!r}: unknown; known are {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def model_template(model: Any, changes: str = "") -> Template:
    """The template of a `config.model`, with text rules changed by `TextRules.changed`.

    Raises `UserError` for an unknown template, rule or value.
    """
    rules = TextRules.of(model.get("text")).changed(changes)
    return dataclasses.replace(get_template(model.template), rules=rules)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One tokenized sample of n tokens.

    Attributes:
      tokens: int32 [n]; the pad id at image tokens.
      loss_mask: float32 [n], 1 for targets.
      image_of_token: int32 [n], index of the sample's image, -1 for text.
      visual_offset: int32 [n], index among that image's tokens, 0 for text.
      num_images: number of images.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    image_of_token: np.ndarray
    visual_offset: np.ndarray
    num_images: int

    def __len__(self) -> int:
        return len(self.tokens)


class _Builder:
    """Appends parts and texts according to the text rules of a template."""

    def __init__(
        self, tokenizer: TokenizerLike, template: Template, tokens_per_image: int, *, at_start: bool = True
    ) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._tokens_per_image = tokens_per_image
        self._split = template.rules.split == AS_TRAINED
        self._loses_first = template.rules.bos == AS_TRAINED and _loses_first(tokenizer, template)
        end = template.rules.image_end
        self._image_end = tokenizer.encode_continued(end) if end else []
        self._tokens: list[int] = []
        self._mask: list[float] = []
        self._image_starts: list[int] = []
        self._text = ""
        self._text_supervised = False
        self._at_start = at_start
        self._after_image = False

    def start(self) -> None:
        if self._template.rules.bos != AS_TRAINED:
            self.parts(self._template.start, False)
            return
        if self._tokenizer.adds_bos:
            self.parts((Bos(),), False)
        self.parts([part for part in self._template.start if not isinstance(part, Bos)], False)

    def turns(self, turns: Sequence[Turn], *, whole: bool = False) -> None:
        """Appends turns; the last turn of a `whole` dialogue ends with `Template.last_stop`."""
        template = self._template
        for number, turn in enumerate(turns, start=1):
            text = template.trained_spaces(turn.text) if template.rules.spaces == AS_TRAINED else turn.text
            last_stop = template.last_stop if whole and number == len(turns) else None
            self.parts(template.headers[turn.role], False)
            if turn.role != "assistant":
                self.text(text, turn.supervised)
                self.parts(last_stop or template.ends[turn.role], False)
                continue
            self.flush()
            self.text(template.gap + text if text else "", turn.supervised)
            self.parts(last_stop or template.stop, turn.supervised)
            self.parts(template.after_stop, False)

    def parts(self, parts: Sequence[Part], supervised: bool) -> None:
        for part in parts:
            if isinstance(part, str):
                self._add(part, supervised)
            elif isinstance(part, Special):
                self.token(self._tokenizer.token_id(part.token), supervised)
            elif isinstance(part, Eos):
                self.token(self._tokenizer.eos_id, supervised)
            elif self._tokenizer.bos_id is not None:
                # Tokenizers prepend their space after BOS, too, so the next text still opens the sequence.
                self._append([self._tokenizer.bos_id], supervised)

    def token(self, token: int, supervised: bool) -> None:
        self.flush()
        self._append([token], supervised)
        self._at_start = False

    def text(self, text: str, supervised: bool) -> None:
        for index, chunk in enumerate(text.split(IMAGE_MARKER)):
            if index:
                self._place_image()
            self._add(chunk, supervised)

    def flush(self) -> None:
        """Encodes the pending text, separately from the text after it."""
        if self._text:
            encode = self._tokenizer.encode_opening if self._at_start else self._tokenizer.encode_continued
            self._append(encode(self._text), self._text_supervised)
            self._text, self._at_start = "", False

    def _add(self, text: str, supervised: bool) -> None:
        if supervised != self._text_supervised:
            self.flush()
            self._text_supervised = supervised
        self._text += text

    def _append(self, ids: Sequence[int], supervised: bool) -> None:
        if self._after_image and ids:
            ids = ids[1:] if self._loses_first else ids
            self._after_image = False
        self._tokens += ids
        self._mask += [float(supervised)] * len(ids)

    def _place_image(self) -> None:
        self.flush()
        self._image_starts.append(len(self._tokens))
        self._after_image = False
        self._append([self._tokenizer.pad_id] * self._tokens_per_image, False)
        self._append(self._image_end, False)
        self._at_start, self._after_image = self._split, True

    def done(self) -> Encoded:
        self.flush()
        return _encoded(self._tokens, self._mask, self._image_starts, self._tokens_per_image)


def _encoded(
    tokens: Sequence[int], mask: Sequence[float], image_starts: Sequence[int] = (), tokens_per_image: int = 0
) -> Encoded:
    image_of_token, visual_offset = np.full(len(tokens), -1, np.int32), np.zeros(len(tokens), np.int32)
    for image, start in enumerate(image_starts):
        image_of_token[start : start + tokens_per_image] = image
        visual_offset[start : start + tokens_per_image] = np.arange(tokens_per_image)
    loss_mask = np.asarray(mask, np.float32)
    return Encoded(np.asarray(tokens, np.int32), loss_mask, image_of_token, visual_offset, len(image_starts))


def _loses_first(tokenizer: TokenizerLike, template: Template) -> bool:
    """Whether VILA's rule drops a text token after every image.

    If the first piece begins with BOS, the rule drops the first id of every later piece. That id is BOS if
    the tokenizer prepends BOS to every piece, but a text token if the template contains BOS.
    """
    opening = [part for part in (*template.start, *template.headers["user"]) if not isinstance(part, Bos)][:1]
    written = [tokenizer.token_id(part.token) for part in opening if isinstance(part, Special)]
    return not tokenizer.adds_bos and written == [tokenizer.bos_id]


def _started(build: _Builder, template: Template, turns: Sequence[Turn]) -> _Builder:
    build.start()
    if template.system is not None and (not turns or turns[0].role != "system"):
        build.turns([Turn("system", template.system)])
    return build


def encode_conversation(
    tokenizer: TokenizerLike, template: Template, turns: Sequence[Turn], tokens_per_image: int
) -> Encoded:
    """Encodes turns for training; every `<image>` becomes `tokens_per_image` positions.

    The text and the stop of supervised assistant turns are targets; headers and `after_stop` are not.
    `tokenizer.encode` must encode control tokens in a text as plain characters.
    """
    build = _started(_Builder(tokenizer, template, tokens_per_image), template, turns)
    build.turns(turns, whole=True)
    return build.done()


def encode_document(
    tokenizer: TokenizerLike, turns: Sequence[Turn], tokens_per_image: int, rules: TextRules = ALL_CLEAN
) -> Encoded:
    """Encodes interleaved text and images without roles; all text and the final eos are targets."""
    build = _Builder(tokenizer, dataclasses.replace(PLAIN, rules=rules), tokens_per_image)
    build.start()
    for turn in turns:
        build.text(turn.text, True)
    build.token(tokenizer.eos_id, True)
    return build.done()


def encode_beginning(
    tokenizer: TokenizerLike, turns: Sequence[Turn], tokens_per_image: int, rules: TextRules = ALL_CLEAN
) -> Encoded:
    """Encodes the beginning of a document (see `encode_document`) for generation; nothing is a target."""
    build = _Builder(tokenizer, dataclasses.replace(PLAIN, rules=rules), tokens_per_image)
    build.start()
    for turn in turns:
        build.text(turn.text, False)
    return build.done()


def encode_prompt(
    tokenizer: TokenizerLike,
    template: Template,
    turns: Sequence[Turn],
    tokens_per_image: int,
    *,
    after_answer: bool = False,
) -> Encoded:
    """Encodes turns for generation, up to the assistant's header; nothing is a target.

    With `after_answer`, the turns follow a generated answer without its stop, which is prepended.
    """
    build = _Builder(tokenizer, template, tokens_per_image, at_start=not after_answer)
    turns = [dataclasses.replace(turn, supervised=False) for turn in turns]
    if after_answer:
        build.parts((*template.stop, *template.after_stop), False)
    else:
        _started(build, template, turns)
    build.turns(turns)
    build.parts(template.headers["assistant"], False)
    return build.done()


def encode_caption(tokenizer: TokenizerLike, caption: str, length: int) -> Encoded:
    """Encodes a caption for the text tower, truncated to `length` tokens including the final eos."""
    ids = [*tokenizer.encode(caption)[: length - 1], tokenizer.eos_id]
    return dataclasses.replace(_encoded(ids, [1.0] * len(ids)), num_images=1)
