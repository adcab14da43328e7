"""Wire formats: how turns become tokens, which of them are targets, and where images stand.

A template is data. Its control tokens are inserted as ids; what people wrote is encoded as plain text, so no
text can open or close a turn. Every piece is encoded on its own: a prompt for generation is the exact prefix
of the training sequence, and supervision needs no search for borders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from vilam3_jax.data.examples import IMAGE_MARKER, Turn
from vilam3_jax.errors import UserError


class TokenizerLike(Protocol):
    """What templates and loaders need of `data.tokenizer.Tokenizer`."""

    eos_id: int
    pad_id: int
    vocab_size: int

    def encode(self, text: str) -> list[int]: ...

    def token_id(self, token: str) -> int: ...


@dataclasses.dataclass(frozen=True)
class Special:
    """A control token of the vocabulary, inserted by id."""

    token: str


Part = str | Special


@dataclasses.dataclass(frozen=True)
class Template:
    """A chat format.

    Attributes:
      name: as in `config.model.template`.
      headers: role → what stands before its text.
      ends: role → what stands after its text (not the assistant).
      stop: what ends an assistant's text; supervised with it.
      after_stop: what follows, not supervised.
    """

    name: str
    headers: Mapping[str, tuple[Part, ...]]
    ends: Mapping[str, tuple[Part, ...]]
    stop: tuple[Part, ...]
    after_stop: tuple[Part, ...] = ()

    def stop_ids(self, tokenizer: TokenizerLike) -> tuple[int, ...]:
        """Ids at which an answer ends."""
        control = (tokenizer.token_id(part.token) for part in self.stop if isinstance(part, Special))
        return tuple(dict.fromkeys((*control, tokenizer.eos_id)))


def _chatml() -> Template:
    start, end = Special("<|im_start|>"), Special("<|im_end|>")
    # An expert speaks under the user's header, as in VILA-M3.
    written = {"system": "system", "user": "user", "assistant": "assistant", "expert": "user"}
    return Template(
        name="chatml",
        headers={role: (start, f"{name}\n") for role, name in written.items()},
        ends={role: (end, "\n") for role in ("system", "user", "expert")},
        stop=(end,),
        after_stop=("\n",),
    )


_SILENT: Mapping[str, tuple[Part, ...]] = dict.fromkeys(("system", "user", "assistant", "expert"), ())

CHATML = _chatml()
PLAIN = Template(name="plain", headers=_SILENT, ends=_SILENT, stop=("\n",))
TEMPLATES = {template.name: template for template in (CHATML, PLAIN)}


def get_template(name: str) -> Template:
    """Returns a template by name.

    Raises:
      UserError: there is none; lists those there are.
    """
    if name not in TEMPLATES:
        raise UserError(f"template {name!r}: unknown; known are {', '.join(sorted(TEMPLATES))}")
    return TEMPLATES[name]


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
    def __init__(self, tokenizer: TokenizerLike, tokens_per_image: int) -> None:
        self._tokenizer = tokenizer
        self._tokens_per_image = tokens_per_image
        self._tokens: list[int] = []
        self._mask: list[float] = []
        self._image: list[int] = []
        self._offset: list[int] = []
        self._images = 0

    def ids(self, ids: Sequence[int], supervised: bool) -> None:
        self._tokens += ids
        self._mask += [float(supervised)] * len(ids)
        self._image += [-1] * len(ids)
        self._offset += [0] * len(ids)

    def parts(self, parts: Sequence[Part], supervised: bool) -> None:
        for part in parts:
            if isinstance(part, Special):
                self.ids([self._tokenizer.token_id(part.token)], supervised)
            else:
                self.ids(self._tokenizer.encode(part), supervised)

    def text(self, text: str, supervised: bool) -> None:
        for position, chunk in enumerate(text.split(IMAGE_MARKER)):
            if position:
                self._place_image()
            if chunk:
                self.ids(self._tokenizer.encode(chunk), supervised)

    def _place_image(self) -> None:
        count = self._tokens_per_image
        self._tokens += [self._tokenizer.pad_id] * count
        self._mask += [0.0] * count
        self._image += [self._images] * count
        self._offset += range(count)
        self._images += 1

    def done(self) -> Encoded:
        return Encoded(
            np.asarray(self._tokens, np.int32),
            np.asarray(self._mask, np.float32),
            np.asarray(self._image, np.int32),
            np.asarray(self._offset, np.int32),
            self._images,
        )


def _turns(build: _Builder, template: Template, turns: Sequence[Turn]) -> None:
    for turn in turns:
        build.parts(template.headers[turn.role], False)
        build.text(turn.text, turn.supervised)
        if turn.role == "assistant":
            build.parts(template.stop, turn.supervised)
            build.parts(template.after_stop, False)
        else:
            build.parts(template.ends[turn.role], False)


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
    build = _Builder(tokenizer, tokens_per_image)
    _turns(build, template, turns)
    return build.done()


def encode_document(tokenizer: TokenizerLike, turns: Sequence[Turn], tokens_per_image: int) -> Encoded:
    """Encodes interleaved text and images without roles; all text and the closing eos are targets."""
    build = _Builder(tokenizer, tokens_per_image)
    for turn in turns:
        build.text(turn.text, True)
    build.ids([tokenizer.eos_id], True)
    return build.done()


def encode_prompt(
    tokenizer: TokenizerLike, template: Template, turns: Sequence[Turn], tokens_per_image: int
) -> Encoded:
    """Encodes turns for generation: they end with the assistant's header; nothing is a target."""
    build = _Builder(tokenizer, tokens_per_image)
    _turns(build, template, [dataclasses.replace(turn, supervised=False) for turn in turns])
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
