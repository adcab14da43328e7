"""Records of axial slices from scans with label maps, and questions answered by the labels.

A record shows one slice. It is a study, turned into a dialogue at load time by the rules of
`data/experts/dialogues`, or a conversation of questions and answers. Both store questions in `meta["qa"]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from scipy import ndimage

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.data.experts.dialogues.phrases import plural, said, with_article
from vilam3_jax.data.volumes import GRID_TOLERANCE, Volume, grid_distance, load_label_map, read_volume
from vilam3_jax.datasets.conversations import YES_NO, metadata, question_conversation, question_meta
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Skipped, Split
from vilam3_jax.datasets.slices import MIN_PIXELS, PLANE_OF_AXIS, body_slices, pick_halves
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

AXIS = 2
LABEL_SOURCE = "segmentation"
MIN_LESION_ML = 0.1  # smallest counted component, as in dialogues (`data.dialogue_min_lesion_ml`)
_MAX_ASKED = 3  # structures on a slice, and as many that are not on it
# All wordings fit singular and plural names.
_PRESENCE = (
    "Does this slice show the {name}?",
    "Can any part of the {name} be seen in this slice?",
    "Does the {name} appear in this slice?",
)
_LESION = (
    "Does this slice show {name}?",
    "Can {name} be seen in this slice?",
    "Is there {name} in this slice?",
)
_COUNT = ("How many {names} does this scan show?", "What is the number of {names} in this scan?")


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """A segmented structure.

    Attributes:
      name: as in the experts' label tables, such as "hepatic tumor".
      kind: "lesion", "organ", or "part" of a lesion; determines question types.
      pixels: pixels on each axial slice, [Z] int64.
      ml: volume in the whole scan.
      parts: number of 26-connected components of at least `MIN_LESION_ML`; None if not counted.
    """

    name: str
    kind: str
    pixels: np.ndarray
    ml: float
    parts: int | None = None

    @property
    def lesion(self) -> bool:
        return self.kind == "lesion"

    def on(self, index: int) -> bool | None:
        """Returns whether the structure is on a slice; None if it has too few pixels to tell."""
        count = int(self.pixels[index])
        return None if 0 < count < MIN_PIXELS else bool(count)


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """A scan, or several sequences on the same grid.

    Attributes:
      name: unique in the dataset.
      files: (role, path below the root); the role of a single scan is "".
      modality: DICOM code.
      volume: volume of the first file.
      keys: content keys of the files.
    """

    name: str
    files: tuple[tuple[str, str], ...]
    modality: str
    volume: Volume
    keys: tuple[str, ...]

    @property
    def voxel_ml(self) -> float:
        return float(abs(np.linalg.det(self.volume.affine[:3, :3]))) / 1000.0


@dataclasses.dataclass(frozen=True)
class SliceOptions:
    """Options of the records of a scan.

    Attributes:
      slices: maximum per scan.
      labelled_only: exclude slices without labels.
      questions: records are conversations instead of studies.
    """

    slices: int = 16
    labelled_only: bool = False
    questions: bool = False

    def __post_init__(self) -> None:
        if self.slices < 1:
            raise UserError(f"--slices {self.slices}: must be at least 1")


class LabelledScans(Dataset):
    """Base class of datasets of scans with label maps."""

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares the options of slices."""
        parser.add_argument("--slices", type=int, default=16, help="maximum slices of a scan (default: 16)")
        parser.add_argument("--labelled-only", action="store_true", help="exclude slices without labels")
        parser.add_argument(
            "--records",
            choices=("studies", "questions"),
            default="studies",
            help="studies, turned into dialogues at load time from annotations, or questions answered by the "
            "label maps (default: studies)",
        )

    def slice_options(self) -> SliceOptions:
        """Returns the options of slices.

        Raises:
          UserError: `--slices` is below 1.
        """
        given = self.options
        return SliceOptions(given.slices, given.labelled_only, given.records == "questions")

    def case_split(
        self,
        cases: Sequence[Any],
        make: Callable[[Any, Context, SliceOptions], Iterable[Example | Skipped]],
        expected: int | None = None,
    ) -> Split:
        """Returns a split of cases with the attributes `row` (name in messages) and `problem` (or "")."""
        options = self.slice_options()
        checked = functools.partial(_make, make=make, options=options)
        return Split(cases, checked, operator.attrgetter("row"), expected, options.slices)


def _make(
    case: Any, context: Context, *, make: Callable[..., Iterable[Example | Skipped]], options: SliceOptions
) -> Iterable[Example | Skipped]:
    if case.problem:
        raise SkipItem(case.problem)
    return make(case, context, options)


def file_of(context: Context, path: str) -> epath.Path:
    """Returns a file of the source folder.

    Raises:
      SkipItem: the path leaves the folder, or the file is missing.
    """
    return paths.as_path(context.root) / str(context.volume(path).path)


def read_scan(context: Context, name: str, files: Sequence[tuple[str, str]], modality: str) -> Scan:
    """Reads a scan, given (role, path below the root) of at least one file.

    Raises:
      SkipItem: a file is missing, or the grids differ.
      UserError: a file is unreadable.
    """
    kept = [(role, str(context.volume(path).path)) for role, path in files]
    first, keys = None, []
    for _, path in kept:
        volume = read_volume(paths.as_path(context.root) / path, modality=modality)
        keys.append(volume.content_key)
        if first is None:
            first = volume
        elif volume.voxels.shape != first.voxels.shape or (
            grid_distance(volume.affine, first) > GRID_TOLERANCE * first.spacing.min()
        ):
            raise SkipItem("its scans have different grids")
    assert first is not None  # `files` is not empty
    return Scan(name, tuple(kept), modality, first, tuple(keys))


def read_labels(context: Context, path: str, scan: Scan) -> np.ndarray:
    """Reads the label map of a scan, [X, Y, Z] uint8 or uint16.

    Raises:
      SkipItem: it is missing.
      UserError: it is unreadable, or its grid differs.
    """
    return load_label_map(file_of(context, path), scan.volume)


def structure(
    name: str, marked: np.ndarray, scan: Scan, kind: str = "organ", *, counted: bool = False
) -> Structure:
    """Measures a structure given its mask, [X, Y, Z] bool; `counted` counts connected components."""
    pixels = marked.sum(axis=(0, 1), dtype=np.int64)
    ml = float(pixels.sum()) * scan.voxel_ml
    return Structure(name, kind, pixels, ml, _parts(marked, scan.voxel_ml) if counted else None)


def _parts(marked: np.ndarray, voxel_ml: float) -> int:
    boxes: list[Any] = ndimage.find_objects(marked.astype(np.uint8))
    if not boxes:
        return 0
    numbered = np.empty(marked[boxes[0]].shape, np.int32)
    ndimage.label(marked[boxes[0]], np.ones((3, 3, 3)), output=numbered)
    voxels = np.bincount(numbered.ravel())[1:]
    # Tolerates rounding of the voxel volume: components of exactly the minimum size count.
    return int((voxels * voxel_ml >= MIN_LESION_ML * (1 - 1e-6)).sum())


def choose_slices(
    scan: Scan, structures: Sequence[Structure], options: SliceOptions, rng: random.Random
) -> list[int]:
    """Selects axial slices, ascending.

    Slices with little of the body, or with a lesion of fewer than 20 pixels, are excluded. If possible, half
    of the slices show a lesion.
    """
    depth = scan.volume.voxels.shape[AXIS]
    enough = body_slices(scan.volume, AXIS)
    marked, lesion = np.zeros(depth, bool), np.zeros(depth, bool)
    for one in structures:
        marked |= one.pixels >= MIN_PIXELS
        if one.lesion:
            lesion |= one.pixels >= MIN_PIXELS
            enough &= (one.pixels == 0) | (one.pixels >= MIN_PIXELS)
    if options.labelled_only:
        enough &= marked
    with_lesion, without = (np.flatnonzero(enough & chosen).tolist() for chosen in (lesion, ~lesion))
    return pick_halves(with_lesion, without, options.slices, rng)


def slice_records(
    context: Context,
    scan: Scan,
    structures: Sequence[Structure],
    options: SliceOptions,
    facts: Mapping[str, Any],
    *,
    indices: Sequence[int] | None = None,
    shown: Sequence[int] | None = None,
    on_lesions: Sequence[Mapping[str, Any]] = (),
) -> Iterator[Example]:
    """Yields the records of a scan.

    Args:
      context, scan: of the records.
      structures: structures of the scan; empty without labels.
      options: options of the records.
      facts: further arguments of `conversations.metadata`, such as the patient.
      indices: slices; None to use `choose_slices`.
      shown: index of the scan's file for each image of a record; None for all files in order.
      on_lesions: further questions, of `question_meta`, for slices that show a lesion.

    Raises:
      SkipItem: no slice qualifies, or questions need labels that are missing.
    """
    if options.questions and not structures:
        raise SkipItem("has no label map that answers questions")
    rng = context.rng(scan.name)
    chosen = choose_slices(scan, structures, options, rng) if indices is None else indices
    if not len(chosen):
        raise SkipItem("has no slice that shows enough")
    meta = metadata(context, modality=scan.modality, **facts)
    meta |= {"input_key": scan.keys[0] if len(scan.keys) == 1 else list(scan.keys)}
    if len(scan.files) > 1:
        meta["roles"] = [role for role, _ in scan.files]
    if structures:
        meta["label_source"] = LABEL_SOURCE
        if parts := {one.name: one.parts for one in structures if one.parts is not None}:
            meta["lesions"] = parts
    order = range(len(scan.files)) if shown is None else shown

    def images(index: int | None) -> list[ImageRef]:
        return [
            context.volume(scan.files[i][1], axis=AXIS, index=index, modality=scan.modality) for i in order
        ]

    for index in chosen:
        name, slice_meta = f"{scan.name}:{index}", {**meta, "plane": PLANE_OF_AXIS[AXIS]}
        questions = slice_questions(structures, index, context.rng(name))
        if any(one.lesion and one.on(index) for one in structures):
            questions += [dict(question) for question in on_lesions]
        if options.questions:
            if questions:
                yield question_conversation(name, images(index), slice_meta, questions)
        else:
            slice_meta |= {"qa": questions} if questions else {}
            yield Example(name, "study", tuple(images(index)), meta=slice_meta)
    if options.questions and (counts := count_questions(structures, rng)):
        yield question_conversation(scan.name, images(None), meta, counts)


def slice_questions(structures: Sequence[Structure], index: int, rng: random.Random) -> list[dict[str, Any]]:
    """Returns questions about the presence of structures on a slice, as of `question_meta`.

    Asks for every lesion, and for up to three other structures that are on the slice and three that are not.
    The latter are preferably on other slices of the scan, so that the answer does not follow from the scan.
    """
    known = [(one, present) for one in structures if (present := one.on(index)) is not None]
    asked = [(one, present) for one, present in known if one.lesion]
    on = [one for one, present in known if present and not one.lesion]
    off = [one for one, present in known if not present and not one.lesion]
    rng.shuffle(off)
    off.sort(key=lambda one: one.ml == 0)
    asked += [(one, True) for one in rng.sample(on, min(_MAX_ASKED, len(on)))]
    asked += [(one, False) for one in off[:_MAX_ASKED]]
    rng.shuffle(asked)
    return [_presence(one, present, rng) for one, present in asked]


def _presence(one: Structure, present: bool, rng: random.Random) -> dict[str, Any]:
    words = rng.choice(_LESION if one.lesion else _PRESENCE)
    name = with_article(one.name) if one.lesion else said(one.name)
    answer = YES_NO[0] if present else YES_NO[1]
    return question_meta(
        words.format(name=name), answer, f"{one.kind}_present", options=YES_NO, label_source=LABEL_SOURCE
    )


def count_questions(structures: Sequence[Structure], rng: random.Random) -> list[dict[str, Any]]:
    """Returns questions about the number of components of counted structures in the scan."""
    return [
        question_meta(
            rng.choice(_COUNT).format(names=plural(one.name)),
            str(one.parts),
            "lesion_count",
            label_source=LABEL_SOURCE,
        )
        for one in structures
        if one.parts is not None
    ]


def held_names(names: Iterable[str], share: float, prefix: str) -> set[str]:
    """Draws held-out names by hash, independently of other names: at least one unless `share` is 0, not all.

    Args:
      names: such as patients.
      share: expected share.
      prefix: hashed with each name.
    """

    def fraction(name: str) -> float:
        digest = hashlib.sha256(f"{prefix}/{name}".encode()).digest()
        return int.from_bytes(digest[:6], "big") / (1 << 48)

    ordered = sorted(set(names), key=fraction)
    if not share or len(ordered) < 2:
        return set()
    count = sum(fraction(name) < share for name in ordered)
    return set(ordered[: min(max(count, 1), len(ordered) - 1)])
