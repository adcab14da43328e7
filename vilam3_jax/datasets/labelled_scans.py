"""From a scan and its label map to records of axial slices, with questions that the labels answer.

A record shows one slice. It is a study, whose dialogue the rules of `data/experts/dialogues` make at load
time, or a conversation of questions with answers. Both keep the questions in `meta["qa"]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from scipy import ndimage

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.data.experts.dialogues.phrases import plural, said, with_article
from vilam3_jax.data.volumes import GRID_TOLERANCE, Volume, grid_distance, load_label_map, read_volume
from vilam3_jax.datasets.conversations import conversation, metadata, question_meta
from vilam3_jax.datasets.dataset import Context, SkipItem
from vilam3_jax.datasets.slices import MIN_PIXELS, PLANE_OF_AXIS, body_slices, pick, pick_halves
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

AXIS = 2
LABEL_SOURCE = "segmentation"
# Smaller parts are specks. Dialogues count from the same size on (`data.dialogue_min_lesion_ml`).
MIN_LESION_ML = 0.1
YES_NO = ("yes", "no")
_MOST_SHOWN = 3  # structures on a slice that are asked for, and as many that are not on it
# Each fits names in the singular and in the plural.
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
_COUNT = (
    "How many {names} does this scan show?",
    "What is the number of {names} in this scan?",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Structure:
    """What is marked under one name.

    Attributes:
      name: as the experts' label tables have it, such as "hepatic tumor".
      kind: "lesion", "organ", or "part" of a lesion; names the questions' types.
      pixels: marked pixels on every axial slice, [Z] int64.
      ml: volume in the whole scan.
      parts: 26-connected parts of at least `MIN_LESION_ML`; None where nobody counts them.
    """

    name: str
    kind: str
    pixels: np.ndarray
    ml: float
    parts: int | None = None

    @property
    def lesion(self) -> bool:
        """Whether it is a lesion."""
        return self.kind == "lesion"

    def on(self, index: int) -> bool | None:
        """Whether it is on a slice; None where so few pixels are marked that nobody should ask."""
        count = int(self.pixels[index])
        return None if 0 < count < MIN_PIXELS else bool(count)


@dataclasses.dataclass(frozen=True, eq=False)
class Scan:
    """One scan, or several sequences on one grid, as read.

    Attributes:
      name: unique in the dataset.
      files: (role, path below the root); the role is "" for a single scan.
      modality: DICOM's code.
      volume: the first file's.
      keys: content keys of the files.
    """

    name: str
    files: tuple[tuple[str, str], ...]
    modality: str
    volume: Volume
    keys: tuple[str, ...]

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel."""
        return float(abs(np.linalg.det(self.volume.affine[:3, :3]))) / 1000.0


@dataclasses.dataclass(frozen=True)
class SliceOptions:
    """Which records a scan becomes.

    Attributes:
      slices: of each scan, at most.
      labelled_only: slices on which nothing is marked are left out.
      questions: records are conversations, not studies.
    """

    slices: int = 16
    labelled_only: bool = False
    questions: bool = False

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Declares the options that datasets of volumes share."""
        parser.add_argument("--slices", type=int, default=16, help="most slices of a scan (default: 16)")
        parser.add_argument(
            "--labelled-only", action="store_true", help="leave out slices on which nothing is marked"
        )
        parser.add_argument(
            "--records",
            choices=("studies", "questions"),
            default="studies",
            help="studies, whose dialogues are made at load time from annotations, or questions that the "
            "label maps answer (default: studies)",
        )

    @classmethod
    def of(cls, options: argparse.Namespace) -> SliceOptions:
        """Reads the options.

        Raises:
          UserError: no slice is wanted.
        """
        if options.slices < 1:
            raise UserError(f"--slices {options.slices}: must be at least 1")
        return cls(options.slices, options.labelled_only, options.records == "questions")


def file_of(context: Context, path: str) -> epath.Path:
    """A file of the source folder.

    Raises:
      SkipItem: the path leaves the folder, or there is no such file.
    """
    return paths.as_path(context.root) / str(context.volume(path).path)


def read_scan(context: Context, name: str, files: Sequence[tuple[str, str]], modality: str) -> Scan:
    """Reads the files of a scan.

    Args:
      context: of the split.
      name: of the scan.
      files: (role, path below the root), at least one.
      modality: DICOM's code.

    Raises:
      SkipItem: a file is missing, or the files lie on different grids.
      UserError: a file cannot be read.
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
            raise SkipItem("its scans lie on different grids")
    assert first is not None  # there is a file
    return Scan(name, tuple(kept), modality, first, tuple(keys))


def read_labels(context: Context, path: str, scan: Scan) -> np.ndarray:
    """The label map of a scan, [X, Y, Z] uint8 or uint16.

    Raises:
      SkipItem: it is missing.
      UserError: it cannot be read, or lies on another grid.
    """
    return load_label_map(file_of(context, path), scan.volume)


def structure(
    name: str, marked: np.ndarray, scan: Scan, kind: str = "organ", *, counted: bool = False
) -> Structure:
    """Measures what is marked.

    Args:
      name: of the structure.
      marked: [X, Y, Z] bool.
      scan: that it is marked in.
      kind: of the structure.
      counted: whether its parts are counted.
    """
    pixels = marked.sum(axis=(0, 1), dtype=np.int64)
    ml = float(pixels.sum()) * scan.voxel_ml
    return Structure(name, kind, pixels, ml, _parts(marked, scan.voxel_ml) if counted else None)


def _parts(marked: np.ndarray, voxel_ml: float) -> int:
    """26-connected parts of at least `MIN_LESION_ML`."""
    boxes: list[Any] = ndimage.find_objects(marked.astype(np.uint8))
    if not boxes:
        return 0
    numbered = np.empty(marked[boxes[0]].shape, np.int32)
    ndimage.label(marked[boxes[0]], np.ones((3, 3, 3)), output=numbered)
    voxels = np.bincount(numbered.ravel())[1:]
    # A part of exactly the least size counts, whatever the rounding of the voxel's volume.
    return int((voxels * voxel_ml >= MIN_LESION_ML * (1 - 1e-6)).sum())


def choose_slices(
    scan: Scan, structures: Sequence[Structure], options: SliceOptions, rng: random.Random
) -> list[int]:
    """Axial slices worth a record, ascending.

    A slice is left out if it shows little of the body or fewer than 20 pixels of a lesion. Where lesions are
    marked, half of the slices show one, as far as there are such slices.

    Args:
      scan: the scan.
      structures: what is marked; empty for a scan without labels.
      options: how many, and whether something must be marked.
      rng: makes the choice.
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
    with_lesion = np.flatnonzero(enough & lesion).tolist()
    if not with_lesion:
        return pick(np.flatnonzero(enough).tolist(), options.slices, rng)
    return pick_halves(with_lesion, np.flatnonzero(enough & ~lesion).tolist(), options.slices, rng)


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
    """The records of a scan.

    Args:
      context: of the split.
      scan: the scan.
      structures: what is marked in it; empty for a scan without labels.
      options: which records.
      facts: further arguments of `conversations.metadata`, such as the patient.
      indices: the slices; None: those of `choose_slices`.
      shown: for each image of a record, which file of the scan it shows; None: all, in their order.
      on_lesions: further questions, of `question_meta`, for slices that show a lesion.

    Raises:
      SkipItem: no slice is worth a record, or questions are wanted and nothing is known to answer them.
    """
    if options.questions and not structures:
        raise SkipItem("has no label map that answers questions")
    rng = context.rng(scan.name)
    chosen = choose_slices(scan, structures, options, rng) if indices is None else indices
    if not len(chosen):
        raise SkipItem("has no slice with enough on it")
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
        name, told = f"{scan.name}:{index}", {**meta, "plane": PLANE_OF_AXIS[AXIS]}
        questions = slice_questions(structures, index, context.rng(name))
        if any(one.lesion and one.on(index) for one in structures):
            questions += [dict(question) for question in on_lesions]
        if options.questions:
            if questions:
                yield _conversation(name, images(index), told, questions)
        else:
            kept = {**told, "qa": questions} if questions else told
            yield Example(name, "study", tuple(images(index)), meta=kept)
    if options.questions and (counted := count_questions(structures, rng)):
        yield _conversation(scan.name, images(None), meta, counted)


def slice_questions(structures: Sequence[Structure], index: int, rng: random.Random) -> list[dict[str, Any]]:
    """Questions whether structures are on a slice, as `question_meta` has them.

    Every lesion is asked for. Of the others, those that are on the slice and as many that are not, of which
    the ones that are elsewhere in the scan come first: that they exist does not give the answer away.
    """
    asked: list[tuple[Structure, bool]] = []
    on: list[Structure] = []
    off: list[Structure] = []
    for one in structures:
        there = one.on(index)
        if there is not None and one.lesion:
            asked.append((one, there))
        elif there is not None:
            (on if there else off).append(one)
    rng.shuffle(off)
    off.sort(key=lambda one: one.ml == 0)
    asked += [(one, True) for one in rng.sample(on, min(_MOST_SHOWN, len(on)))]
    asked += [(one, False) for one in off[:_MOST_SHOWN]]
    rng.shuffle(asked)
    return [_presence(one, there, rng) for one, there in asked]


def _presence(one: Structure, there: bool, rng: random.Random) -> dict[str, Any]:
    words = rng.choice(_LESION if one.lesion else _PRESENCE)
    name = with_article(one.name) if one.lesion else said(one.name)
    answer = YES_NO[0] if there else YES_NO[1]
    return question_meta(
        words.format(name=name), answer, f"{one.kind}_present", options=YES_NO, label_source=LABEL_SOURCE
    )


def count_questions(structures: Sequence[Structure], rng: random.Random) -> list[dict[str, Any]]:
    """How many parts each lesion whose parts were counted has in the whole scan."""
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


def _conversation(
    name: str, images: Sequence[ImageRef], meta: Mapping[str, Any], questions: Sequence[Mapping[str, Any]]
) -> Example:
    exchanges = [(q["question"], q["answer"]) for q in questions]
    return conversation(name, images, exchanges, meta, questions=questions)


def held_names(names: Iterable[str], share: float, *parts: object) -> set[str]:
    """Names whose `fraction` lies below the share: at least one if any share is asked for, but never all.

    Args:
      names: what is divided, such as patients.
      share: about this share of them is held out.
      parts: what the fractions depend on besides the names.
    """
    ordered = sorted(set(names), key=lambda name: fraction(*parts, name))
    if not share or len(ordered) < 2:
        return set()
    count = sum(fraction(*parts, name) < share for name in ordered)
    return set(ordered[: min(max(count, 1), len(ordered) - 1)])


def fraction(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone, for splits that are stable when cases come or go."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)
