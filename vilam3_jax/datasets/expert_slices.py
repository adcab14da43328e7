"""User-supplied scans and films annotated by experts, as studies without text.

The rules of `data/experts/dialogues` turn a study into a dialogue at load time.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from etils import epath

from vilam3_jax.data.content_keys import image_key, inputs_key
from vilam3_jax.data.examples import Example, path_problem
from vilam3_jax.data.experts.cards import Card, load_cards
from vilam3_jax.data.experts.labels import apply_group, is_lesion, label_group
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.folder_walk import list_files
from vilam3_jax.data.images import load_pixels
from vilam3_jax.datasets import labelled_scans
from vilam3_jax.datasets.conversations import metadata
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.labelled_scans import AXIS, Scan, SliceOptions
from vilam3_jax.datasets.samples import INDEX_NAME, MODALITY_CODES, read_samples
from vilam3_jax.datasets.slices import MIN_PIXELS, body_slices, pick_halves
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.datasets.user_data import read_json
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_MODALITIES = {"ct": "CT", "mr": "MR", "film": "film"}
_VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
_FILMS = (".png", ".jpg", ".jpeg")
_MAX_FILES = 10_000_000


@dataclasses.dataclass(frozen=True)
class Study:
    """A scan, a case of several scans on the same grid, or a film."""

    name: str  # unique
    files: tuple[tuple[str, str], ...]  # (role, path below the source folder); "" for a single file
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of `Example.meta`, such as `grade`

    @property
    def patient(self) -> str:
        """What must stay in one split."""
        return str(self.facts.get("group") or self.facts.get("patient") or self.name)


@dataclasses.dataclass(frozen=True)
class _Selection:
    """Criteria for the slices of a study."""

    store: AnnotationStore
    digest: str  # of the annotations, so that other annotations invalidate shards
    cards: tuple[Card, ...]  # of the considered experts
    slices: int  # maximum per study
    min_pixels: int  # minimum size of a structure


class ExpertSlices(Dataset):
    """Studies of annotated axial slices, and annotated films.

    Slices are excluded if they show little of the body, a lesion of fewer than 20 pixels, or no structure of
    `--min-pixels` pixels (unless an expert searched for lesions). If possible, half of the slices of a study
    show a lesion. The variant sets the modality, which most files do not state.
    """

    name = "expert_slices"
    description = "Slices of user-supplied scans, and films, annotated by experts."
    licence = "unverified"
    access = "credentialed"
    instructions = (
        "The source folder is the annotated one: `vilam3-experts annotate --expert NAME --data DIR "
        "--out STORE`. Give the store with --annotations."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "ct": "CT volumes",
        "mr": "MR volumes, with --cases in studies of several sequences",
        "film": "chest films",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--annotations", default="", help="annotation store (required)")
        add("--cases", default="", help="JSON file of cases with several scans, as for annotating")
        add("--facts", default="", help='JSON file: {"study name": {"grade": "HGG", "patient": "7"}}')
        add("--cards", default="experts", help="card list of the considered experts (default: experts)")
        add("--slices", type=int, default=16, help="maximum slices of a study (default: 16)")
        add("--min-pixels", type=int, default=100, help="minimum size of a structure (default: 100)")
        add("--heldout", type=float, default=0.0, help="held-out share of the patients (default: 0)")

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Returns train and, with `--heldout`, heldout, split by patient or study."""
        options = self.options
        if options.slices < 1 or options.min_pixels < 1 or not 0 <= options.heldout < 1:
            raise UserError("--slices and --min-pixels must be positive, --heldout a share below 1")
        if not options.annotations:
            raise UserError(f"{source.root}: give --annotations STORE with its annotations")
        store = AnnotationStore(options.annotations)
        cards = tuple(load_cards(options.cards))
        selection = _Selection(store, store.digest(), cards, options.slices, options.min_pixels)
        studies = list(find_studies(source.root, self.config, options.cases, options.facts))
        make = functools.partial(_make_study, selection=selection)
        divided: dict[str, list[Study]] = {"train": []} | ({"heldout": []} if options.heldout else {})
        patients = (study.patient for study in studies)
        held = labelled_scans.held_names(patients, options.heldout, self.name)
        for study in studies:
            divided["heldout" if study.patient in held else "train"].append(study)
        per_item = 1 if self.config == "film" else options.slices
        return {split: Split(items, make, _name_of, per_item=per_item) for split, items in divided.items()}


def find_studies(data: paths.PathLike, variant: str, cases: str = "", facts: str = "") -> Iterator[Study]:
    """Yields the studies of a folder.

    Args:
      data: a samples folder, or a folder of volumes or films.
      variant: a key of `ExpertSlices.configs`; selects studies of a samples folder.
      cases: JSON file {"cases": [{"name": …, role: path below `data`, …}]}, as for annotating; "" for none.
      facts: JSON file {study name: {"grade": "HGG", "patient": …}}; "" for none.

    Raises:
      UserError: a folder or file is missing or unreadable.
    """
    root = paths.as_path(data)
    known = _facts(facts)
    if cases:
        for study in _cases(cases):
            yield dataclasses.replace(study, facts=known.get(study.name, {}))
        return
    if (root / INDEX_NAME).exists():
        for sample in read_samples(root):
            code = MODALITY_CODES.get(sample.kind, "film")
            stated = {"group": sample.split_group, "patient": sample.patient, "licence": sample.licence}
            if code == _MODALITIES[variant] and (code != "film" or sample.body_region == "chest"):
                path = sample.path.relative_to(root).as_posix()
                yield Study(sample.name, (("", path),), stated | dict(known.get(sample.name, {})))
        return
    endings = _FILMS if variant == "film" else _VOLUMES
    for file in sorted(list_files(root, _MAX_FILES, lambda: None).files):
        path = epath.Path(file).relative_to(root).as_posix()
        if path.lower().endswith(endings) and not os.path.basename(path).startswith("._"):
            yield Study(path, (("", path),), known.get(path, {}))


def _make_study(study: Study, context: Context, selection: _Selection) -> Iterator[Example]:
    facts = {k: v for k, v in study.facts.items() if k not in ("group", "patient", "licence")}
    facts = {"patient": study.patient, **facts}
    if context.config == "film":
        records = iter([_film(study, context, selection, facts)])
    else:
        scan = labelled_scans.read_scan(context, study.name, study.files, _MODALITIES[context.config])
        indices = _slices(scan, selection, context)
        records = labelled_scans.slice_records(context, scan, [], SliceOptions(), facts, indices=indices)
    licence = study.facts.get("licence")
    for record in records:
        yield dataclasses.replace(record, meta={**record.meta, "licence": licence}) if licence else record


def _film(study: Study, context: Context, selection: _Selection, facts: Mapping[str, Any]) -> Example:
    path = study.files[0][1]
    key = image_key(load_pixels(labelled_scans.file_of(context, path)))
    _annotations(selection, {"": key})
    meta = metadata(context, modality="CXR", **facts) | {"input_key": key}
    return Example(study.name, "study", (context.image(path),), meta=meta)


def _annotations(selection: _Selection, keys: Mapping[str, str]) -> list[Annotation]:
    """Returns the annotations, failures included, for content keys by role."""
    found = []
    for card in selection.cards:
        if set(card.roles) <= set(keys):
            key = inputs_key([(role, keys[role]) for role in card.roles])
            found += [selection.store.get(key, card.name, args) for args in card.args or ("",)]
    if annotations := [annotation for annotation in found if annotation is not None]:
        return annotations
    raise SkipItem("no annotation")


def _slices(scan: Scan, selection: _Selection, context: Context) -> list[int]:
    """Selects slices, ascending."""
    roles = (role for role, _ in scan.files)
    annotations = _annotations(selection, dict(zip(roles, scan.keys, strict=True)))
    shown = body_slices(scan.volume, AXIS)
    largest, lesions = np.zeros(len(shown), np.int64), np.zeros(len(shown), np.int64)
    doubtful, searched = np.zeros(len(shown), bool), False
    for annotation in annotations:
        if annotation.status == "failed":
            searched = True  # the question remains open
            continue
        if annotation.label_shape != scan.volume.voxels.shape:
            raise SkipItem(f"the annotation of {annotation.expert} has another grid; annotate again")
        structures, lesion_pixels, searches = _pixels(annotation)
        searched |= searches
        largest = np.maximum(largest, structures)
        lesions = np.maximum(lesions, lesion_pixels)
        doubtful |= (lesion_pixels > 0) & (lesion_pixels < MIN_PIXELS)
    enough = shown & ~doubtful & ((largest >= selection.min_pixels) | searched)
    rng = context.rng(scan.name)
    with_lesion = np.flatnonzero(enough & (lesions > 0)).tolist()
    without = np.flatnonzero(enough & (lesions == 0)).tolist()
    return pick_halves(with_lesion, without, selection.slices, rng)


def _pixels(annotation: Annotation) -> tuple[np.ndarray, np.ndarray, bool]:
    """Returns pixels of the largest structure and of lesions, [Z] int64, and whether it searches lesions."""
    group = label_group(annotation.expert, annotation.args)
    names = dict(group.names if group else annotation.label_names)
    nested = annotation.expert == "BRATS"
    ids = [i for i, name in names.items() if nested or is_lesion(name)]
    assert annotation.labels is not None  # it did not fail
    depth = annotation.labels.shape[AXIS]
    largest, lesions = np.zeros(depth, np.int64), np.zeros(depth, np.int64)
    for z in range(depth):
        counts = np.bincount(apply_group(group, annotation.labels.plane(z)).ravel(), minlength=1)
        counts[0] = 0
        largest[z] = counts.max()
        lesions[z] = sum(int(counts[i]) for i in ids if i < len(counts))
    return largest, lesions, nested or is_lesion(annotation.args)


def _facts(path: str) -> Mapping[str, Mapping[str, Any]]:
    if not path:
        return {}
    content = read_json(path)
    if not isinstance(content, dict) or not all(isinstance(row, dict) for row in content.values()):
        raise UserError(f'{path}: must be {{"study name": {{"grade": "HGG"}}}}; correct it')
    return content


def _cases(path: str) -> Iterator[Study]:
    content = read_json(path)
    rows = content.get("cases") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{path}: has no list "cases"; correct it')
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(v, str) and v for v in row.values()):
            raise UserError(f"{path}: case {number} is not an object of texts; correct it")
        files = tuple((role, file) for role, file in row.items() if role != "name")
        if "name" not in row or not files:
            raise UserError(f"{path}: case {number} has no name or no scan; correct it")
        for _, file in files:
            if problem := path_problem(file):
                raise UserError(f"{path}: case {row['name']!r}: {problem}; give paths below the data folder")
        yield Study(row["name"], files)


def _name_of(study: Study) -> str:
    return study.files[0][1]
