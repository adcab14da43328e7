"""What a dataset is here: its files, its terms, and how its items become examples.

A dataset is one file with one subclass of `Dataset` and one row in `registry.DATASETS`. It says which items
the user's files hold and how one item becomes examples. Processes, shards, resumption and the TFDS format are
the business of `builder.py`, so a dataset is tested by calling two functions.
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

ACCESS_CLASSES = ("open", "registered", "credentialed")
_MAX_IMAGE_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Skipped:
    """An item, or a part of one, that gives no example.

    Attributes:
      record: names it without naming a patient, such as "train.json row 17".
      reason: one clause, such as "the answer is empty".
    """

    record: str
    reason: str


class SkipItem(Exception):
    """Raised while an item is read: it gives no (further) example; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Split:
    """The items of one split.

    Attributes:
      items: small picklable values, such as the rows of a table or the paths of shards. Each process gets its
        own run of them.
      make: picklable, so a function of a module or a `functools.partial` of one. Turns an item into examples.
        `SkipItem`, `UserError`, and what a malformed value raises (ValueError, TypeError, LookupError,
        AttributeError) set the item aside, under the name `name_of(item)`.
      name_of: names an item in messages, without naming a patient.
      expected: number of items of the official release; None where nobody has counted them.
      per_item: about how many examples an item gives; decides the number of shards.
    """

    items: Sequence[Any]
    make: Callable[[Any, Context], Iterable[Example | Skipped]]
    name_of: Callable[[Any], str] = str
    expected: int | None = None
    per_item: int = 1


@dataclasses.dataclass(frozen=True)
class Context:
    """What is the same for all items of a split. Picklable.

    Attributes:
      root: the source folder.
      dataset: the dataset's name.
      config: the variant that is built, "" for the only one.
      split: the split's name.
      licence: of its records.
      patients: namespace of patient ids: datasets of the same patients share it.
      seed: of every choice.
      parity: the reference's known defects are put in.
      copy_images: pictures are stored in the records; otherwise records name them by path.
      opened: files that `image`, `volume` and `file` gave out, below the root. A shard that was built before
        is used again only if they are still the same.
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
        """A picture of the source folder.

        Args:
          path: below the root, as the source states it; '\\' is read as '/'.

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
        if not 0 < size <= _MAX_IMAGE_BYTES:
            raise SkipItem(f"image {path} has {size} bytes; up to {_MAX_IMAGE_BYTES} are read")
        return (
            ImageRef(data=paths.read_bytes(file, _MAX_IMAGE_BYTES))
            if self.copy_images
            else ImageRef(path=path)
        )

    def volume(
        self,
        path: str,
        *,
        axis: int = 2,
        index: int | None = None,
        window: tuple[float, float] | None = None,
        modality: str | None = None,
    ) -> ImageRef:
        """A slice of a volume of the source folder, or with `index=None` the volume. Always named by path.

        Raises:
          SkipItem: the path leaves the root, or the file is missing.
          UnavailableError: the disk or the network fails, or the source folder is gone.
        """
        path = self._checked(path)
        if not paths.exists(self.file(path)):
            raise self._missing(f"volume {path}")
        return ImageRef(path=path, axis=axis, index=index, window=window, modality=modality)

    def file(self, path: str) -> epath.Path:
        """A file of the source folder, for datasets that read archives or tables while they make examples.

        Args:
          path: below the root; from `SourceFolder`, not from the content of a file.
        """
        self.opened.append(path)
        return paths.as_path(self.root) / path

    def patient(self, identifier: object) -> str:
        """The patient key: a hash under the namespace `patients`, never the identifier itself."""
        return hashlib.sha256(f"{self.patients or self.dataset}\0{identifier}".encode()).hexdigest()[:24]

    def rng(self, *parts: object) -> random.Random:
        """A generator that depends on the seed and `parts` alone, so not on shards or processes."""
        return random.Random("/".join(map(str, (self.seed, self.dataset, *parts))))

    def _missing(self, what: str) -> Exception:
        """What to raise for a missing file; a whole folder that is gone is no fault of the item."""
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
    """A dataset that users fetch themselves. Subclasses set the class attributes and define `splits`.

    Attributes:
      name: lower-case letters, digits and '_'; the folder of the dataset.
      version: of what this builder makes: raise it with any change of its records.
      description: what it is, for people.
      homepage, citation: of the source.
      licence: SPDX id or the name of the terms; "unverified" where nobody could read them.
      access: "open", "registered" or "credentialed".
      instructions: what to fetch from where, and how the folder must look
        (TFDS's MANUAL_DOWNLOAD_INSTRUCTIONS).
      configs: variant → what it is; the first is the default. Empty: there is one variant.
      patients: namespace of patient ids; "" for the dataset's own.
      has_parity: the reference prepared it too, with defects that `--parity` puts in.
      expert_inputs: experts are run over its images, so records get content keys (`meta.input_key`), which
        costs a decoding of each image.
      shared_images: why the official splits share images, where they do; "" where they must not.
      source_is_file: `--source` names a file, not a folder; `options.source_file` is then its name and the
        source folder is where it lies.
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
        """Takes the options of `add_arguments` and a variant.

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
          UserError: files are missing (all of them are named, with where they come from) or unreadable.
        """
        raise NotImplementedError

    def context(self, source: SourceFolder, split: str, **settings: Any) -> Context:
        """The context of a split's items."""
        return Context(
            root=str(source.root),
            dataset=self.name,
            config=self.config,
            split=split,
            licence=self.licence,
            patients=self.patients,
            **settings,
        )


def examples_of(
    split: Split, context: Context, items: Iterable[Any] | None = None
) -> Iterator[Example | Skipped]:
    """The examples of items, checked, and what was skipped.

    Args:
      split: whose `make` is called.
      context: of the split.
      items: some of the split's items; None: all.

    Raises:
      UnavailableError: the disk or the network fails.
    """
    for item in split.items if items is None else items:
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
            # The text of such errors quotes values, which may be report text.
            yield Skipped(split.name_of(item), f"a value is not as documented ({type(error).__name__})")
