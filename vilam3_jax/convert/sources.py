"""An opened foreign checkpoint, whatever its file format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vilam3_jax.data.tokenizer import Tokenizer
from vilam3_jax.models.hugging_face import TensorRule


class Reader(Protocol):
    """Reads rows `start` to `stop` (of the first axis) of one tensor, in the source's layout, as floats."""

    def __call__(self, name: str, start: int, stop: int) -> np.ndarray: ...


@dataclass
class Source:
    """One opened checkpoint of one component.

    Attributes:
      component: 'llm', 'vision_tower' or 'projector', the key of its parameters in ours; or 'contrastive'
        for all of a two-tower model.
      config: the section of that name in our model config.
      tensors: name → shape, as the rules see them. Reading happens tensor by tensor through `reader`.
      rules: how our parameters are made.
      unused: name → why a tensor is rightly left out.
      files: every file read for the weights; their hashes go into the provenance.
      licence: what the source says of its licence (`name`, `text`).
      dtypes: storage types found, for the table.
      tokenizer: makes the tokenizer that came along; None where there is none.
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
    """What one import makes an export of: a component, or a whole model in parts.

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
        """One component alone."""
        return cls(source.component, {source.component: source.config}, [source])

    @property
    def tokenizer(self) -> Callable[[], Tokenizer] | None:
        """Makes the tokenizer that came along with a part; None where there is none."""
        return next((part.tokenizer for part in self.parts if part.tokenizer), None)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where it is kept; the folder of the part's first file."""
        return next((part.files[0].parent for part in self.parts if part.tokenizer), None)
