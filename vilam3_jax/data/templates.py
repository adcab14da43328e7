"""Wire formats: how turns become tokens, which of them are targets, and where images stand.

A template is data. Its control tokens are inserted as ids; what people wrote is encoded as plain text, so no
text can open or close a turn. Text between control tokens and images is encoded as one, but an assistant's
text always on its own: a prompt for generation is the exact prefix of the training sequence, and supervision
needs no search for borders. How text around images is treated is a matter of the template's `rules`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vilam3_jax.data.examples import IMAGE_MARKER, Turn
from vilam3_jax.data.text_rules import ALL_CLEAN, AS_TRAINED, TextRules, normalise_markers
from vilam3_jax.errors import UserError


class TokenizerLike(Protocol):
    """What templates and loaders need of `data.tokenizer.Tokenizer`."""

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


@dataclasses.dataclass(frozen=True)
class Special:
    """A control token of the vocabulary, inserted by id."""

    token: str


@dataclasses.dataclass(frozen=True)
class Bos:
    """The tokenizer's beginning of a sequence; nothing where it has none."""


@dataclasses.dataclass(frozen=True)
class Eos:
    """The tokenizer's end of a sequence."""


Part = str | Special | Bos | Eos


def _as_it_is(text: str) -> str:
    return text


def _stripped(text: str) -> str:
    """NVILA's spaces: VILA's, then none at the ends of any turn."""
    return normalise_markers(text).strip()


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat format.

    Attributes:
      name: as in `config.model.template`.
      headers: role → what stands before its text.
      ends: role → what stands after its text (not the assistant).
      stop: what ends an assistant's text; supervised with it.
      after_stop: what follows, not supervised.
      start: what a sequence begins with.
      system: text of the system turn that is put before dialogues that begin without one; None for none.
      gap: what stands between an assistant's header and its text, as a part of the text.
      last_stop: what ends a dialogue's last turn, where that is not what ends the others.
      trained_spaces: what VILA's training made of a turn's text, see `TextRules.spaces`.
      rules: how text around images becomes tokens.
    """

    name: str
    headers: Mapping[str, tuple[Part, ...]]
    ends: Mapping[str, tuple[Part, ...]]
    stop: tuple[Part, ...]
    after_stop: tuple[Part, ...] = ()
    start: tuple[Part, ...] = ()
    system: str | None = None
    gap: str = ""
    last_stop: tuple[Part, ...] | None = None
    trained_spaces: Callable[[str], str] = normalise_markers
    rules: TextRules = ALL_CLEAN

    def stop_ids(self, tokenizer: TokenizerLike) -> tuple[int, ...]:
        """Ids at which an answer ends."""
        parts = (*self.stop, *(self.last_stop or ()))
        control = (tokenizer.token_id(part.token) for part in parts if isinstance(part, Special))
        return tuple(dict.fromkeys((*control, tokenizer.eos_id)))


# An expert speaks under the user's header, as in VILA-M3.
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
    """Llama 3's headers with VILA's system text; the last turn of a training dialogue ends the text."""
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
    """As VILA renders its vflan data: of the system turn only the ending is left, spaces stay."""
    return dataclasses.replace(
        template,
        name=f"{template.name}_nosys",
        start=template.ends["system"],
        system=None,
        trained_spaces=_as_it_is,
    )


def _vicuna(name: str, system: str, trained_spaces: Callable[[str], str] = normalise_markers) -> Template:
    """`USER: ... ASSISTANT: ...</s>`: words, not control tokens, open the turns."""
    asks = ("USER: ",)
    return Template(
        name=name,
        headers={"system": (), "user": asks, "expert": asks, "assistant": ("ASSISTANT:",)},
        ends=dict.fromkeys(("system", "user", "expert"), (" ",)),
        stop=(Eos(),),
        start=(Bos(),),
        system=system,
        gap=" ",
        trained_spaces=trained_spaces,
    )


CHATML = _chatml("chatml")
# The beginning matters: an LLM parks its attention on the first token, and that must not be what a projector
# from nothing makes of an image (docs/training.md, "What comes first").
PLAIN = Template(
    name="plain", headers=_SILENT, ends=_SILENT, start=(Bos(),), stop=("\n",), trained_spaces=_as_it_is
)
_LLAMA_3 = _llama_3()
_HERMES_2 = _chatml("hermes-2", "Answer the questions.", after=())
# VILA's conversation modes, under its names; `v1` is its other name for vicuna_v1.
TEMPLATES = {
    template.name: template
    for template in (
        CHATML,
        PLAIN,
        _LLAMA_3,
        _without_system(_LLAMA_3),
        _vicuna("v1", _CURIOUS.format(person="user")),
        _vicuna("vicuna_v1", _CURIOUS.format(person="user")),
        _vicuna("vicuna_v1_nosys", "", _as_it_is),
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


def get_template(name: str) -> Template:
    """Returns a template by name.

    Raises:
      UserError: there is none; lists those there are.
    """
    if name not in TEMPLATES:
        raise UserError(f"template {name!r}: unknown; known are {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


def model_template(model: Any, changes: str = "") -> Template:
    """Returns the template of a `config.model`, with its text rules.

    Args:
      model: has `template` and may have `text`.
      changes: of the rules, see `TextRules.changed`.

    Raises:
      UserError: an unknown template, rule or value.
    """
    rules = TextRules.of(model.get("text")).changed(changes)
    return dataclasses.replace(get_template(model.template), rules=rules)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One tokenised sample of n tokens.

    Attributes:
      tokens: int32 [n]; the pad id where an image token stands.
      loss_mask: float32 [n], 1 where the token is a target.
      image_of_token: int32 [n], ordinal of the sample's image standing there, -1 for text.
      visual_offset: int32 [n], which of that image's tokens, 0 for text.
      num_images: number of images the tokens refer to.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    image_of_token: np.ndarray
    visual_offset: np.ndarray
    num_images: int

    def __len__(self) -> int:
        return len(self.tokens)


class _Builder:
    """Appends parts and texts; what opens a sequence or a piece after an image follows the rules."""

    def __init__(
        self, tokenizer: TokenizerLike, template: Template, tokens_per_image: int, *, at_start: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._tokens_per_image = tokens_per_image
        self._split = template.rules.split == AS_TRAINED
        self._loses_first = template.rules.bos == AS_TRAINED and _loses_first(tokenizer, template)
        end = template.rules.image_end
        self._image_end = tokenizer.encode_continued(end) if end else []
        self._tokens: list[int] = []
        self._mask: list[float] = []
        self._image: list[int] = []
        self._offset: list[int] = []
        self._images = 0
        self._text = ""
        self._text_supervised = False
        self._at_start = at_start
        self._after_image = False

    def start(self, template: Template) -> None:
        """Appends what a sequence begins with."""
        if template.rules.bos != AS_TRAINED:
            self.parts(template.start, False)
            return
        if self._tokenizer.adds_bos:
            self.parts((Bos(),), False)
        self.parts([part for part in template.start if not isinstance(part, Bos)], False)

    def ids(self, ids: Sequence[int], supervised: bool) -> None:
        self.cut()
        self._append(ids, supervised)
        self._at_start = False

    def parts(self, parts: Sequence[Part], supervised: bool) -> None:
        for part in parts:
            if isinstance(part, str):
                self._add(part, supervised)
            elif isinstance(part, Special):
                self.ids([self._tokenizer.token_id(part.token)], supervised)
            elif isinstance(part, Eos):
                self.ids([self._tokenizer.eos_id], supervised)
            elif self._tokenizer.bos_id is not None:
                # Tokenizers put their first space after the beginning, too: what follows is still the start.
                self._append([self._tokenizer.bos_id], supervised)

    def text(self, text: str, supervised: bool) -> None:
        for position, chunk in enumerate(text.split(IMAGE_MARKER)):
            if position:
                self._place_image()
            self._add(chunk, supervised)

    def cut(self) -> None:
        """Encodes the text so far: what comes next is encoded apart from it."""
        if self._text:
            encode = self._tokenizer.encode_opening if self._at_start else self._tokenizer.encode_continued
            self._append(encode(self._text), self._text_supervised)
            self._text, self._at_start = "", False

    def _add(self, text: str, supervised: bool) -> None:
        if supervised != self._text_supervised:
            self.cut()
            self._text_supervised = supervised
        self._text += text

    def _append(self, ids: Sequence[int], supervised: bool) -> None:
        if self._after_image and ids:
            ids = ids[1:] if self._loses_first else ids
            self._after_image = False
        self._tokens += ids
        self._mask += [float(supervised)] * len(ids)
        self._image += [-1] * len(ids)
        self._offset += [0] * len(ids)

    def _place_image(self) -> None:
        self.cut()
        count = self._tokens_per_image
        self._tokens += [self._tokenizer.pad_id] * count
        self._mask += [0.0] * count
        self._image += [self._images] * count
        self._offset += range(count)
        self._images += 1
        self._after_image = False
        self._append(self._image_end, False)
        self._at_start, self._after_image = self._split, True

    def done(self) -> Encoded:
        self.cut()
        return Encoded(
            np.asarray(self._tokens, np.int32),
            np.asarray(self._mask, np.float32),
            np.asarray(self._image, np.int32),
            np.asarray(self._offset, np.int32),
            self._images,
        )


def _loses_first(tokenizer: TokenizerLike, template: Template) -> bool:
    """Whether VILA's rule takes a token of the text after an image.

    It drops the first id of every piece once the first piece begins with BOS. Where the tokenizer puts BOS
    before every piece by itself, that is what goes; where the template wrote it, a token of the text goes.
    """
    opening = [part for part in (*template.start, *template.headers["user"]) if not isinstance(part, Bos)][:1]
    written = [tokenizer.token_id(part.token) for part in opening if isinstance(part, Special)]
    return not tokenizer.adds_bos and written == [tokenizer.bos_id]


def _start(build: _Builder, template: Template, turns: Sequence[Turn]) -> None:
    build.start(template)
    if template.system is not None and (not turns or turns[0].role != "system"):
        _turns(build, template, [Turn("system", template.system)])


def _turns(build: _Builder, template: Template, turns: Sequence[Turn], *, whole: bool = False) -> None:
    """Writes turns; those of a `whole` dialogue end as `template.last_stop` says."""
    for number, turn in enumerate(turns, start=1):
        text = template.trained_spaces(turn.text) if template.rules.spaces == AS_TRAINED else turn.text
        last_stop = template.last_stop if whole and number == len(turns) else None
        build.parts(template.headers[turn.role], False)
        if turn.role != "assistant":
            build.text(text, turn.supervised)
            build.parts(last_stop or template.ends[turn.role], False)
            continue
        build.cut()
        build.text(template.gap + text if text else "", turn.supervised)
        build.parts(last_stop or template.stop, turn.supervised)
        build.parts(template.after_stop, False)


def encode_conversation(
    tokenizer: TokenizerLike, template: Template, turns: Sequence[Turn], tokens_per_image: int
) -> Encoded:
    """Encodes turns for training.

    Of a supervised assistant turn, the text and the stop are targets; header and what follows are not.

    Args:
      tokenizer: its `encode` must read control tokens in a text as plain characters.
      template: the wire format.
      turns: any roles; every `<image>` in a text becomes `tokens_per_image` positions.
      tokens_per_image: the projector's output length.
    """
    build = _Builder(tokenizer, template, tokens_per_image)
    _start(build, template, turns)
    _turns(build, template, turns, whole=True)
    return build.done()


def encode_document(
    tokenizer: TokenizerLike, turns: Sequence[Turn], tokens_per_image: int, rules: TextRules = ALL_CLEAN
) -> Encoded:
    """Encodes interleaved text and images without roles; all text and the closing eos are targets.

    It begins as captions do, with `Bos`.
    """
    plain = dataclasses.replace(PLAIN, rules=rules)
    build = _Builder(tokenizer, plain, tokens_per_image)
    build.start(plain)
    for turn in turns:
        build.text(turn.text, True)
    build.ids([tokenizer.eos_id], True)
    return build.done()


def encode_prompt(
    tokenizer: TokenizerLike,
    template: Template,
    turns: Sequence[Turn],
    tokens_per_image: int,
    *,
    after_answer: bool = False,
) -> Encoded:
    """Encodes turns for generation: they end with the assistant's header; nothing is a target.

    Args:
      tokenizer: as for `encode_conversation`, as are `template`, `turns` and `tokens_per_image`.
      after_answer: the turns follow an answer that was generated without its stop: that comes first.
    """
    build = _Builder(tokenizer, template, tokens_per_image, at_start=not after_answer)
    turns = [dataclasses.replace(turn, supervised=False) for turn in turns]
    if after_answer:
        build.parts((*template.stop, *template.after_stop), False)
    else:
        _start(build, template, turns)
    _turns(build, template, turns)
    build.parts(template.headers["assistant"], False)
    return build.done()


def encode_caption(tokenizer: TokenizerLike, caption: str, length: int) -> Encoded:
    """Encodes a caption for the text tower: at most `length` tokens, eos last; cut if longer."""
    ids = [*tokenizer.encode(caption)[: length - 1], tokenizer.eos_id]
    count = len(ids)
    return Encoded(
        np.asarray(ids, np.int32),
        np.ones(count, np.float32),
        np.full(count, -1, np.int32),
        np.zeros(count, np.int32),
        1,
    )
