"""The scans an expert is run over: a samples folder, or any folder (or file) of images and volumes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Literal

from etils import epath

from vilam3_experts import cases
from vilam3_experts.base import ExpertInputs, Stated
from vilam3_experts.descriptors import Descriptor
from vilam3_experts.weights import is_samples_folder
from vilam3_jax.data import dicom, file_kinds
from vilam3_jax.data.folder_walk import list_files
from vilam3_jax.data.images import load_image
from vilam3_jax.data.limits import DEFAULT_LIMITS
from vilam3_jax.data.volumes import read_listed_series, read_volume
from vilam3_jax.datasets.samples import MODALITY_CODES, read_samples
from vilam3_jax.errors import UserError, warn_of
from vilam3_jax.runtime import paths

Kind = Literal["volume", "image"]
_READERS = {"volume": ("nifti", "nifti pair", "nrrd", "metaimage"), "image": ("picture",)}
# Files with these names are listed even if their content is not recognised: they are damaged, and named.
_SUFFIXES = {
    "volume": (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"),
    "image": (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"),
}
MAX_FILES = 20_000_000  # in a folder and its subfolders, which stays a list of paths
_LIMITS = dataclasses.replace(DEFAULT_LIMITS, files=MAX_FILES)
_DATA_OF_HEADER = (".img", ".img.gz", ".raw", ".zraw")  # the halves that come with a header file


@dataclasses.dataclass(frozen=True)
class Input:
    """One scan, or one case of several, not yet read.

    Attributes:
      name: unique among the inputs; a sample's name or the path below the data folder.
      path: file, or the folder of a DICOM series.
      kind: how it is read.
      modality: DICOM's code, where the dataset states what the file does not.
      series: what the headers of a DICOM folder say; None for everything else.
      channel: volume (from 0) of a 4-D NIfTI file; None for a 3-D one.
      parts: (role, scan) of a case, in the order of the expert's roles; empty for a single scan.
      notes: how it was found, for people.
      problem: why it cannot be used, although it was found; '' otherwise.
    """

    name: str
    path: epath.Path
    kind: Kind
    modality: str | None = None
    series: dicom.Series | None = None
    channel: int | None = None
    parts: tuple[tuple[str, Input], ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""

    def load(self) -> ExpertInputs:
        """Reads and decodes it.

        Raises:
          UserError: names the file and what is wrong with it.
        """
        if self.problem:
            raise UserError(self.problem)
        if self.parts:
            return ExpertInputs(tuple((role, part.load().first) for role, part in self.parts))
        if self.kind == "image":
            picture = load_image(self.path)
            warn_of(picture.notes, self.path)
            return ExpertInputs.of(picture.pixels, Stated(picture.modality, picture.body_part))
        if self.series is not None:
            volume = read_listed_series(self.series, self.path)
        else:
            volume = read_volume(self.path, modality=self.modality, channel=self.channel)
        return ExpertInputs.of(dataclasses.replace(volume, notes=(*self.notes, *volume.notes)))


class Inputs:
    """What an expert is run over, found while it is iterated: a million scans need no list of objects.

    Iterate once. The order depends on nothing but the names of folders and files.

    Attributes:
      at_most: how many there can be; exact when the iteration has ended.
    """

    def __init__(self, data: paths.PathLike, descriptor: Descriptor, roles: str | None = None) -> None:
        """Lists the files; opens none.

        Args:
          data: a samples folder, or any folder or file.
          descriptor: the expert. If its card has roles, the inputs are cases.
          roles: which scan of a case has which role, see `cases.parse_roles`; None finds it out.

        Raises:
          UserError: no such folder or file, or `roles` cannot be used.
        """
        self.at_most = 0
        self._data, self._descriptor, self._has_patterns = data, descriptor, False
        root = paths.as_path(data)
        if not root.exists():
            raise UserError(f"{data}: no such file or folder; check --data")
        if root.is_dir() and is_samples_folder(root):
            found = list(_from_samples(root, descriptor))
            self._items, self.at_most = iter(found), len(found)
        elif root.is_dir():
            files = list_files(root, MAX_FILES, lambda: None).files
            self._items, self.at_most = self._from_folder(root, files), len(files)
        else:
            self._items, self.at_most = iter([Input(root.name, root, descriptor.input)]), 1
        wanted = descriptor.card.roles
        if wanted == ("",):
            if roles is not None:
                raise UserError(f"--roles: {descriptor.name} reads single scans; leave it out")
            return
        stated = None if roles is None else cases.parse_roles(roles, wanted)
        if stated is not None and stated.cases:
            template = Input("", root, descriptor.input)
            self._items, self.at_most = cases.from_manifest(template, stated, root), len(stated.cases)
        else:
            self._has_patterns = stated is not None
            self._items = self._cases(self._items, wanted, stated)

    def _cases(
        self, items: Iterator[Input], roles: tuple[str, ...], stated: cases.Roles | None
    ) -> Iterator[Input]:
        found = list(cases.group(items, roles, stated))  # which scans belong together is known at the end
        self.at_most = len(found)
        yield from found

    def __iter__(self) -> Iterator[Input]:
        """Yields the inputs.

        Raises:
          UserError: at the end, when there was none.
        """
        count = 0
        for item in self._items:
            count += 1
            yield item
        if not count and self._has_patterns:
            raise UserError(f"--roles: no scan below {self._data} fits a pattern; correct them or --data")
        if not count:
            raise UserError(
                f"{self._data}: nothing in it that {self._descriptor.name} reads ({self._descriptor.input}); "
                "check --data"
            )

    def _from_folder(self, root: epath.Path, files: list[str]) -> Iterator[Input]:
        kind: Kind = self._descriptor.input
        has_dicom = False
        for file in map(epath.Path, files):
            name = file.relative_to(root).as_posix()
            self.at_most -= 1
            if file.name.startswith(".") or (kind == "volume" and name.lower().endswith(_DATA_OF_HEADER)):
                continue
            reader = file_kinds.identify(file).reader
            has_dicom |= reader == "dicom"
            if reader in _READERS[kind] or (reader is None and name.lower().endswith(_SUFFIXES[kind])):
                self.at_most += 1
                yield Input(name, file, kind)
        if has_dicom:
            series = list(_from_dicom(root, kind))
            self.at_most += len(series)
            yield from series


def find_inputs(data: paths.PathLike, descriptor: Descriptor) -> list[Input]:
    """Lists what `descriptor` is meant for, by name.

    Of a samples folder: the samples of the expert's kind, region and modality. Of any other folder, with its
    subfolders: every file that the expert reads, recognised by its content, and every DICOM series. Damaged
    files and series that cannot be read are listed, too, so that they are counted and named.

    Raises:
      UserError: no such folder or file, or nothing in it for this expert.
    """
    return sorted(Inputs(data, descriptor), key=lambda item: item.name)


def _from_samples(root: epath.Path, descriptor: Descriptor) -> Iterator[Input]:
    wanted = {
        "kind": descriptor.sample_kind,
        "body_region": descriptor.body_region,
        "modality": descriptor.modality,
    }
    for sample in read_samples(root):
        if (sample.kind == "film") == (descriptor.input == "volume"):
            continue
        if all(value is None or getattr(sample, field) == value for field, value in wanted.items()):
            yield Input(sample.name, sample.path, descriptor.input, MODALITY_CODES.get(sample.kind))


def _from_dicom(root: epath.Path, kind: Kind) -> Iterator[Input]:
    found, skipped = dicom.survey(root, limits=_LIMITS)
    for series in found:
        members = [epath.Path(member.path) for member in series.members]
        if kind == "volume" and series.kind == "volume":
            folder = epath.Path(os.path.commonpath([os.fspath(member.parent) for member in members]))
            name = (folder.relative_to(root) / series.identifier).as_posix()
            yield Input(name, folder, kind, series=series)
        elif kind == "image" and series.kind == "picture":
            yield from (Input(m.relative_to(root).as_posix(), m, kind) for m in members)
    damaged = [epath.Path(path) for path, reason in skipped if reason == dicom.DAMAGED_HEADER]
    yield from (Input(path.relative_to(root).as_posix(), path, kind) for path in damaged)
