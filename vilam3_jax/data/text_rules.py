"""Rules for text around images: those of VILA's training, or clean ones.

Models trained from scratch here use clean rules. Weights trained with VILA's rules (the released VILA-M3)
require them for inference and fine-tuning as well. The rules are part of `config.model.text` and of exports.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vilam3_jax.data.examples import IMAGE_MARKER
from vilam3_jax.errors import UserError

CLEAN, AS_TRAINED = "clean", "as_trained"
TEXT_HELP = (
    "text rules that override the export's: as_trained, clean, or RULE=VALUE,... with split, bos, spaces"
)


@dataclasses.dataclass(frozen=True)
class TextRules:
    """Three rules, each 'clean' or 'as_trained', and the text after an image.

    Attributes:
      split: as_trained: encode every piece of text between images separately, so a SentencePiece tokenizer
        starts each with its space. clean: text after an image continues the text before it.
      bos: as_trained: BOS from both the tokenizer and the template, possibly twice; if only the template has
        one (Llama 3), the first token after every image is dropped. clean: the template's BOS, and no token
        is dropped.
      spaces: as_trained: VILA's normalization of spaces and line ends, see `Template.trained_spaces`.
        clean: unchanged text.
      image_end: text encoded separately after every image, never a target. A line end in NVILA (spec §3.6).
    """

    split: str = CLEAN
    bos: str = CLEAN
    spaces: str = CLEAN
    image_end: str = ""

    def __post_init__(self) -> None:
        for rule in ("split", "bos", "spaces"):
            value = getattr(self, rule)
            if value not in (CLEAN, AS_TRAINED):
                raise UserError(f"text rule {rule}={value!r}: use {CLEAN} or {AS_TRAINED}")
        if not isinstance(self.image_end, str) or IMAGE_MARKER in self.image_end:
            raise UserError(f"text rule image_end={self.image_end!r}: must be plain text, such as '\\n'")

    @classmethod
    def of(cls, section: Any) -> TextRules:
        """Reads a `config.model.text` (None in older exports: clean); raises `UserError` if invalid."""
        section = dict(section or {})
        unknown = section.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise UserError(
                f"text rule {min(unknown)!r}: unknown; use {CLEAN} or {AS_TRAINED} for all, or for one of "
                "split=, bos= and spaces="
            )
        return cls(**section)

    def changed(self, words: str) -> TextRules:
        """Applies overrides: '' for none, `as_trained` or `clean` for all rules, or `RULE=VALUE,...`.

        Raises `UserError` for an unknown rule or value, and for `image_end`, which belongs to the model.
        """
        if words in (CLEAN, AS_TRAINED):
            return dataclasses.replace(self, split=words, bos=words, spaces=words)
        pairs = (word.partition("=") for word in words.split(",") if word)
        changes = {rule: value for rule, _, value in pairs}
        if "image_end" in changes:
            raise UserError("text rule image_end: belongs to the model; set config.model.text.image_end")
        return TextRules.of(dataclasses.asdict(self) | changes)


ALL_CLEAN = TextRules()


def normalise_markers(text: str) -> str:
    """Applies VILA's normalization to one turn: one line end after each `<image>`, at most one space before.

    Source: spec §1.7, steps 2 and 3; commit 355fda9. A turn without `<image>` is unchanged.
    """
    if IMAGE_MARKER not in text:
        return text
    chunks = [chunk.strip() for chunk in text.split(IMAGE_MARKER)]
    chunks = [chunk + " " for chunk in chunks[:-1]] + chunks[-1:]
    text = f"{IMAGE_MARKER}\n".join(chunks).strip()
    text = text.replace(IMAGE_MARKER, f"{IMAGE_MARKER}\n")
    return text.replace(f"{IMAGE_MARKER}\n\n", f"{IMAGE_MARKER}\n")
