"""The interface of a dataset: its files, its terms, and the conversion of its items to examples.

A dataset is one file with one subclass of `Dataset` and one row in `registry.DATASETS`. It lists the items of
the user's files and converts one item to examples. `builder.py` handles processes, shards, resumption and the
TFDS format, so a dataset is tested by calling two functions.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from etils import epath

from vilam3_jax.data.examples import Example, ImageRef, path_problem
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import paths

MAX_IMAGE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An item, or a part of one, without an example.

    Attributes:
      record: its name, which must not identify a patient, such as "train.json row 17".
      reason: one clause, such as "the answer is empty".
    """

    record: str
    reason: str


class SkipItem(Exception):
    """Skips the (rest of the) item; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The items of one split.

    Attributes:
      items: small picklable values, such as rows of a table or paths of shards.
      make: converts an item to examples; a module-level function or a `functools.partial` of one, so that it
        can be pickled. `SkipItem`, `UserError`, ValueError, TypeError, LookupError and AttributeError skip
        the item under the name `name_of(item)`.
      name_of: names an item in messages; must not identify a patient.
      expected: number of items in the official release; None if unknown.
      per_item: approximate number of examples per item; determines the number of shards.
    """

    items: Sequence[Any]
    make: Callable[[Any, Context], Iterable[Example | Skipped]]
    name_of: Callable[[Any], str] = str
    expected: int | None = None
    per_item: int = 1


@dataclasses.dataclass(frozen=True)
class Context:
    """Values shared by all items of a split. Picklable.

    Attributes:
      root: the source folder.
      dataset, split: their names.
      config: the variant; "" if there is only one.
      licence: licence of its records.
      patients: namespace of patient ids, shared by datasets of the same patients.
      seed: seed of every choice.
      parity: reproduce the reference's known defects.
      copy_images: store images in the records, not their paths.
      opened: files below the root returned by `image`, `volume` and `file`. A finished shard is reused only
        if they are unchanged.
    """

    root: str
    dataset: str
    config: str = ""
    split: str = "train"
    licence: str = ""
    patients: str = ""
    seed: int = 0
    parity: bool = False
    copy_images: bool = True
    opened: list[str] = dataclasses.field(default_factory=list, compare=False, repr=False)

    def image(self, path: str) -> ImageRef:
        """An image of the source folder.

        Args:
          path: below the root, as in the source; '\\' is read as '/'.

        Raises:
          SkipItem: the path leaves the root, or the file is missing, empty or too large.
          UnavailableError: the disk or the network fails, or the source folder is gone.
        """
        path = self._checked(path)
        file = self.file(path)
        try:
            size = paths.file_size(file)
        except OSError as error:
            paths.check_passing(file, error)
            raise self._missing(f"image {path}") from None
        if not 0 < size <= MAX_IMAGE_BYTES:
            raise SkipItem(f"image {path} has {size} bytes; up to {MAX_IMAGE_BYTES} are read")
        if not self.copy_images:
            return ImageRef(path=path)
        return ImageRef(data=paths.read_bytes(file, MAX_IMAGE_BYTES))

    def volume(
        self,
        path: str,
        *,
        axis: int = 2,
        index: int | None = None,
        window: tuple[float, float] | None = None,
        modality: str | None = None,
    ) -> ImageRef:
        """A slice of a volume of the source folder, or with `index=None` the volume; always stored as a path.

        Raises:
          SkipItem: the path leaves the root, or the file is missing.
          UnavailableError: the disk or the network fails, or the source folder is gone.
        """
        path = self._checked(path)
        if not paths.exists(self.file(path)):
            raise self._missing(f"volume {path}")
        return ImageRef(path=path, axis=axis, index=index, window=window, modality=modality)

    def file(self, path: str) -> epath.Path:
        """A file of the source folder, for archives and tables that are read while examples are made.

        Args:
          path: below the root; from `SourceFolder`, not from the content of a file.
        """
        self.opened.append(path)
        return paths.as_path(self.root) / path

    def patient(self, identifier: object) -> str:
        """The patient key: a hash in the namespace `patients`, never the identifier."""
        return hashlib.sha256(f"{self.patients or self.dataset}\0{identifier}".encode()).hexdigest()[:24]

    def rng(self, *parts: object) -> random.Random:
        """A generator that depends only on the seed and `parts`, not on shards or processes."""
        return random.Random("/".join(map(str, (self.seed, self.dataset, *parts))))

    def _missing(self, what: str) -> Exception:
        """The error for a missing file: not the item's if the whole folder is gone."""
        if not paths.exists(self.root):
            return UnavailableError(f"{self.root}: the source folder is gone; restore it and start again")
        return SkipItem(f"{what} is missing")

    def _checked(self, path: object) -> str:
        if not isinstance(path, str) or not path:
            raise SkipItem("names no image")
        path = os.path.normpath(path.replace("\\", "/")) if path.strip() else path
        if reason := path_problem(path):
            raise SkipItem(reason)
        return path


class Dataset:
    """A dataset that users download. Subclasses set the class attributes and define `splits`.

    Attributes:
      name: lower-case letters, digits and '_'; also the folder of the dataset.
      version: version of the records; any change of them must raise it.
      description: one sentence for users.
      homepage, citation: of the source.
      licence: SPDX id or name of the terms; "unverified" if nobody could read them.
      access: "open", "registered" or "credentialed".
      instructions: what to download from where, and the layout of the folder (TFDS's
        MANUAL_DOWNLOAD_INSTRUCTIONS).
      configs: variant → description; the first is the default. Empty: a single variant.
      patients: namespace of patient ids; "" for a separate one.
      has_parity: `--parity` reproduces defects of the reference's own preparation.
      expert_inputs: experts annotate its images, so records get content keys (`meta.input_key`), which costs
        decoding each image once.
      shared_images: the reason why official splits share images; "" if they must not.
      source_is_file: `--source` is a file, not a folder; `options.source_file` is then its name, and the
        source folder its parent.
    """

    name: ClassVar[str]
    version: ClassVar[str] = "1.0.0"
    description: ClassVar[str]
    homepage: ClassVar[str] = ""
    citation: ClassVar[str] = ""
    licence: ClassVar[str]
    access: ClassVar[str] = "open"
    instructions: ClassVar[str]
    configs: ClassVar[Mapping[str, str]] = {}
    patients: ClassVar[str] = ""
    has_parity: ClassVar[bool] = False
    expert_inputs: ClassVar[bool] = True
    shared_images: ClassVar[str] = ""
    source_is_file: ClassVar[bool] = False

    def __init__(self, options: argparse.Namespace | None = None, config: str = "") -> None:
        """Selects a variant ("" for the default), with the options of `add_arguments`.

        Raises:
          UserError: no such variant.
        """
        if config and config not in self.configs:
            known = ", ".join(self.configs) or "none"
            raise UserError(f"dataset {self.name} has no variant {config!r}; there are: {known}")
        if options is None:
            parser = argparse.ArgumentParser()
            self.add_arguments(parser)
            options = parser.parse_args([])
        self.options = options
        self.config = config or next(iter(self.configs), "")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares options that only this dataset has."""

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Reads the lists in the source folder; opens no image.

        Returns:
          Split name ("train", "validation", "test") → its items.

        Raises:
          UserError: files are missing (the message names all of them and their source) or unreadable.
        """
        raise NotImplementedError

    def context(self, source: SourceFolder, split: str, **settings: Any) -> Context:
        """The context of a split."""
        return Context(
            root=str(source.root),
            dataset=self.name,
            config=self.config,
            split=split,
            licence=self.licence,
            patients=self.patients,
            **settings,
        )


def examples_of(split: Split, context: Context) -> Iterator[Example | Skipped]:
    """Converts items to validated examples; yields `Skipped` for the rest.

    Raises:
      UnavailableError: the disk or the network fails.
    """
    for item in split.items:
        try:
            for made in split.make(item, context):
                if isinstance(made, Skipped):
                    yield made
                    continue
                problem = made.problem()
                yield made if problem is None else Skipped(made.id, problem)
        except UnavailableError:
            raise
        except (SkipItem, UserError) as reason:
            yield Skipped(split.name_of(item), str(reason))
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            # Omit the text of the error: it may quote a report.
            yield Skipped(split.name_of(item), f"a value is not as documented ({type(error).__name__})")
