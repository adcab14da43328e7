"""The inputs of a run: scans from a samples folder, or from any folder or file of images and volumes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Literal

from etils import epath

from vilam3_experts import cases
from vilam3_experts.base import ExpertInputs, ImageMetadata
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
_READERS = {"volume": ("nifti", "nifti pair", "nrrd", "metaimage"), "image": ("image",)}
# Files with these names but unrecognised content are damaged; they are listed, so that they are reported.
_SUFFIXES = {
    "volume": (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd"),
    "image": (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"),
}
MAX_FILES = 20_000_000  # in a folder and its subfolders, held as a list of paths
_LIMITS = dataclasses.replace(DEFAULT_LIMITS, files=MAX_FILES)
_DETACHED_DATA = (".img", ".img.gz", ".raw", ".zraw")  # listed through their header file


@dataclasses.dataclass(frozen=True)
class Input:
    """One scan, or one case of several scans, not yet read.

    Attributes:
      name: unique among the inputs; the sample's name, or the path below the data folder.
      path: file, or the folder of a DICOM series.
      modality: DICOM's code, if the dataset states it and the file does not.
      channel: index of a volume in a 4-D NIfTI file.
      parts: (role, scan) of a case, in the order of the expert's roles; empty for a single scan.
      problem: why it cannot be used, or ''.
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
        """Reads and decodes the input; raises `UserError` if that fails."""
        if self.problem:
            raise UserError(self.problem)
        if self.parts:
            return ExpertInputs(tuple((role, part.load().first) for role, part in self.parts))
        if self.kind == "image":
            image = load_image(self.path)
            warn_of(image.notes, self.path)
            return ExpertInputs.of(image.pixels, ImageMetadata(image.modality, image.body_part))
        if self.series is not None:
            volume = read_listed_series(self.series, self.path)
        else:
            volume = read_volume(self.path, modality=self.modality, channel=self.channel)
        return ExpertInputs.of(dataclasses.replace(volume, notes=(*self.notes, *volume.notes)))


class Inputs:
    """The inputs of a run, listed lazily, so that a million scans need no list of objects.

    Can be iterated once. The order depends only on the names of folders and files.

    Attributes:
      at_most: upper bound of their number; exact at the end of the iteration.
    """

    def __init__(self, data: paths.PathLike, descriptor: Descriptor, roles: str | None = None) -> None:
        """Lists the files of a samples folder, or of any folder or file, without opening them.

        If the expert's card has roles, the inputs are cases; `roles` states which scan has which role, see
        `cases.parse_roles`, and None detects it. Raises `UserError` for a missing folder or invalid `roles`.
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
                raise UserError(f"--roles: {descriptor.name} reads single scans; omit it")
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
        found = list(cases.group(items, roles, stated))  # grouping needs all scans
        self.at_most = len(found)
        yield from found

    def __iter__(self) -> Iterator[Input]:
        """Yields the inputs; raises `UserError` at the end if there were none."""
        count = 0
        for item in self._items:
            count += 1
            yield item
        if not count and self._has_patterns:
            raise UserError(f"--roles: no scan below {self._data} matches a pattern; correct them or --data")
        if not count:
            raise UserError(
                f"{self._data}: contains no {self._descriptor.input} that {self._descriptor.name} reads; "
                "check --data"
            )

    def _from_folder(self, root: epath.Path, files: list[str]) -> Iterator[Input]:
        kind: Kind = self._descriptor.input
        has_dicom = False
        for file in map(epath.Path, files):
            name = file.relative_to(root).as_posix()
            self.at_most -= 1
            if file.name.startswith(".") or (kind == "volume" and name.lower().endswith(_DETACHED_DATA)):
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
    """Lists the inputs of an expert, sorted by name; raises `UserError` if there is none.

    In a samples folder: the samples of the expert's kind, region and modality. In any other folder and its
    subfolders: every file of a type that the expert reads, recognised by content, and every DICOM series.
    Damaged files and unreadable series are listed, too, so that they are reported.
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
        elif kind == "image" and series.kind == "image":
            yield from (Input(m.relative_to(root).as_posix(), m, kind) for m in members)
    damaged = [epath.Path(path) for path, reason in skipped if reason == dicom.DAMAGED_HEADER]
    yield from (Input(path.relative_to(root).as_posix(), path, kind) for path in damaged)
