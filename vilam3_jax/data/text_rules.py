"""Rules for text around images: as VILA's training had them, or clean.

Our own training is clean. Weights that were trained by VILA's rules (the released VILA-M3) want them in
inference and fine-tuning, too. The rules stand in `config.model.text`, so that an export carries them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vilam3_jax.data.examples import IMAGE_MARKER
from vilam3_jax.errors import UserError

CLEAN, AS_TRAINED = "clean", "as_trained"
TEXT_HELP = (
    "other text rules than the export's: as_trained, clean, or RULE=VALUE,... of split, bos, spaces "
    "(default: the export's)"
)


@dataclasses.dataclass(frozen=True)
class TextRules:
    """Three rules, each 'clean' or 'as_trained', and what follows an image.

    Attributes:
      split: as_trained: every piece of text between images is encoded as a text of its own, so that a
        SentencePiece tokenizer begins each with its space. clean: the text goes on after an image.
      bos: as_trained: a sequence begins with BOS where the tokenizer puts it there by itself or the template
        writes it, twice where both do; if only the template does (Llama 3), the first token after every image
        is lost. clean: one BOS where the template has one, and no token is lost.
      spaces: as_trained: VILA's normalisation of spaces and line ends, see `Template.trained_spaces`.
        clean: text stays as it is.
      image_end: text encoded by itself after every image; never a target. NVILA has a line end (spec §3.6).
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
        """The rules of a `config.model.text`; clean where there is none (exports older than the rules).

        Raises:
          UserError: an unknown rule or value.
        """
        section = dict(section or {})
        unknown = section.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise UserError(
                f"text rule {min(unknown)!r}: unknown; use {CLEAN} or {AS_TRAINED} for all, or for one of "
                "split=, bos= and spaces="
            )
        return cls(**section)

    def changed(self, words: str) -> TextRules:
        """These rules with changes from a command line.

        Args:
          words: '' for none, `as_trained` or `clean` for all three, or `RULE=VALUE` joined by commas.
            `image_end` belongs to the model and cannot be changed so.

        Raises:
          UserError: an unknown rule or value.
        """
        if words in (CLEAN, AS_TRAINED):
            return dataclasses.replace(self, split=words, bos=words, spaces=words)
        pairs = (word.partition("=") for word in words.split(",") if word)
        changes = {rule: value for rule, _, value in pairs}
        if "image_end" in changes:
            raise UserError(
                "text rule image_end: belongs to the model; train one with config.model.text.image_end"
            )
        return TextRules.of(dataclasses.asdict(self) | changes)


ALL_CLEAN = TextRules()


def normalise_markers(text: str) -> str:
    """VILA's normalisation of one turn: one line end after each `<image>`, at most one space before (spec
    §1.7, steps 2 and 3; commit 355fda9). A turn without `<image>` stays as it is."""
    if IMAGE_MARKER not in text:
        return text
    chunks = [chunk.strip() for chunk in text.split(IMAGE_MARKER)]
    chunks = [chunk + " " for chunk in chunks[:-1]] + chunks[-1:]
    text = f"{IMAGE_MARKER}\n".join(chunks).strip()
    text = text.replace(IMAGE_MARKER, f"{IMAGE_MARKER}\n")
    return text.replace(f"{IMAGE_MARKER}\n\n", f"{IMAGE_MARKER}\n")
