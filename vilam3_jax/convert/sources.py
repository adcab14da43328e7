"""An opened foreign checkpoint, whatever its file format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vilam3_jax.data.tokenizer import Tokenizer
from vilam3_jax.errors import UserError
from vilam3_jax.models import families
from vilam3_jax.models.hugging_face import TensorRule
from vilam3_jax.runtime.settings import Section

# (tensor name, start, stop) → those rows of its first axis, as floats in the foreign layout.
Reader = Callable[[str, int, int], np.ndarray]


@dataclass
class Source:
    """One opened component.

    Attributes:
      component: 'llm', 'vision_tower' or 'projector', first name of its parameter paths; or 'contrastive' for
        a whole two-tower model.
      config: the component's section of our model config.
      tensors: tensor name → shape, with the names of `rules`.
      rules: where each of our parameters is stored.
      reader: reads the tensors.
      files: all files read for the weights; the provenance records their hashes.
      unused: tensor name → reason why it is not imported.
      licence: `name` and `text` of the source's licence.
      dtypes: storage types of the tensors.
      tokenizer: loads the source's tokenizer; None if it has none.
    """

    component: str
    config: dict[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    rules: list[TensorRule]
    reader: Reader
    files: list[Path]
    unused: dict[str, str] = field(default_factory=dict)
    licence: dict[str, str] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ()
    tokenizer: Callable[[], Tokenizer] | None = None


@dataclass
class Checkpoint:
    """An opened component, or a whole model in parts.

    Attributes:
      kind: 'generative', 'contrastive', or the component's name.
      config: our model config, without `kind`, `name` and `param_dtype`.
      parts: the components.
    """

    kind: str
    config: dict[str, Any]
    parts: list[Source]

    @classmethod
    def of(cls, source: Source) -> Checkpoint:
        """A checkpoint of one component."""
        return cls(source.component, {source.component: source.config}, [source])

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Storage types of all parts."""
        return tuple(sorted({dtype for part in self.parts for dtype in part.dtypes}))

    @property
    def tokenizer(self) -> Callable[[], Tokenizer] | None:
        """Loads the tokenizer of the first part that has one; None if none has."""
        return next((part.tokenizer for part in self.parts if part.tokenizer), None)

    @property
    def tokenizer_folder(self) -> Path | None:
        """The folder of that part."""
        return next((part.files[0].parent for part in self.parts if part.tokenizer), None)


def section_of(component: str, config: Mapping[str, Any], where: Path) -> Section:
    """The section of a family; errors name the source `where`."""
    try:
        return families.config_of(component, config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
