"""Scans that experts annotated, as studies of slices, and films, without a word.

The rules of `data/experts/dialogues` make a dialogue of a study when it is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
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
from vilam3_jax.datasets.conversations import metadata
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.labelled_scans import (
    AXIS,
    Scan,
    SliceOptions,
    file_of,
    held_names,
    read_scan,
    slice_records,
)
from vilam3_jax.datasets.samples import INDEX_NAME, MODALITY_CODES, read_samples
from vilam3_jax.datasets.slices import MIN_PIXELS, body_slices, pick, pick_halves
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_MODALITIES = {"ct": "CT", "mr": "MR", "film": "film"}
_VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
_FILMS = (".png", ".jpg", ".jpeg")
_MAX_FILES = 10_000_000
_MAX_JSON_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Study:
    """A scan, a case of several scans on one grid, or a film.

    Attributes:
      name: unique.
      files: (role, path below the source folder); the role is '' for a single file.
      facts: further values of `Example.meta`, such as `grade` and `patient`.
    """

    name: str
    files: tuple[tuple[str, str], ...]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def patient(self) -> str:
        """What stays on one side of the split."""
        return str(self.facts.get("group") or self.facts.get("patient") or self.name)


@dataclasses.dataclass(frozen=True)
class Making:
    """What decides which slices of a study become records.

    Attributes:
      store: the annotations.
      said: their digest, so that shards made of others are not used again.
      cards: whose experts count.
      slices: of a study, at most.
      min_pixels: of a structure.
    """

    store: AnnotationStore
    said: str
    cards: tuple[Card, ...]
    slices: int
    min_pixels: int


class ExpertSlices(Dataset):
    """Studies of axial slices on which an expert found something, and films that an expert has seen.

    A slice is left out if it shows little of the body, nothing of `--min-pixels` pixels (where an expert
    looked for lesions, it may show none), or fewer than 20 pixels of a lesion. Half of a study's slices show
    a lesion, as far as there are such slices. The variant says what the files are, as most do not state it.
    """

    name = "expert_slices"
    description = "Slices of one's own scans, and films, that experts annotated."
    licence = "unverified"
    access = "credentialed"
    instructions = (
        "The source folder is the one that was annotated: `vilam3-experts annotate --expert NAME --data DIR "
        "--out STORE`. Give the store with --annotations."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "ct": "CT volumes",
        "mr": "MR volumes, with --cases in studies of several sequences",
        "film": "chest films",
    }

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declares where the annotations are, and which studies and slices are taken."""
        parser.add_argument("--annotations", default="", help="folder of annotations (needed)")
        parser.add_argument(
            "--cases", default="", help="JSON file of cases with several scans, as for annotating"
        )
        parser.add_argument(
            "--facts", default="", help='JSON file: {"study name": {"grade": "HGG", "patient": "7"}}'
        )
        parser.add_argument(
            "--cards", default="experts", help="card list whose experts count (default: experts)"
        )
        parser.add_argument("--slices", type=int, default=16, help="most slices of a study (default: 16)")
        parser.add_argument(
            "--min-pixels", type=int, default=100, help="least size of a structure (default: 100)"
        )
        parser.add_argument("--heldout", type=float, default=0.0, help="share of the patients (default: 0)")

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        """Train, and with `--heldout` heldout, divided by patient or study."""
        options = self.options
        if options.slices < 1 or options.min_pixels < 1 or not 0 <= options.heldout < 1:
            raise UserError("--slices and --min-pixels must be positive, --heldout a share below 1")
        if not options.annotations:
            raise UserError(f"{source.root}: give --annotations STORE with what the experts said of it")
        store = AnnotationStore(options.annotations)
        cards = tuple(load_cards(options.cards))
        making = Making(store, store.digest(), cards, options.slices, options.min_pixels)
        studies = list(find_studies(source.root, self.config, options.cases, options.facts))
        make = functools.partial(make_study, making=making)
        divided: dict[str, list[Study]] = {"train": []} | ({"heldout": []} if options.heldout else {})
        held = held_names((study.patient for study in studies), options.heldout, self.name)
        for study in studies:
            divided["heldout" if study.patient in held else "train"].append(study)
        per_item = 1 if self.config == "film" else options.slices
        return {split: Split(items, make, _name_of, per_item=per_item) for split, items in divided.items()}


def find_studies(data: paths.PathLike, variant: str, cases: str = "", facts: str = "") -> Iterator[Study]:
    """Yields the studies of a folder.

    Args:
      data: a samples folder, or any folder of volumes or films.
      variant: a key of `ExpertSlices.configs`: of a samples folder, those studies alone.
      cases: JSON file {"cases": [{"name": …, role: path below `data`, …}]}, as for annotating; '' for single
        scans.
      facts: JSON file {study name: {"grade": "HGG", "patient": …}}; '' for none.

    Raises:
      UserError: no such folder or file, or one that cannot be read.
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
            said = {"group": sample.split_group, "patient": sample.patient, "licence": sample.licence}
            if code == _MODALITIES[variant] and (code != "film" or sample.body_region == "chest"):
                path = sample.path.relative_to(root).as_posix()
                yield Study(sample.name, (("", path),), said | dict(known.get(sample.name, {})))
        return
    endings = _FILMS if variant == "film" else _VOLUMES
    for file in sorted(list_files(root, _MAX_FILES, lambda: None).files):
        path = epath.Path(file).relative_to(root).as_posix()
        if path.lower().endswith(endings) and not os.path.basename(path).startswith("._"):
            yield Study(path, (("", path),), known.get(path, {}))


def make_study(study: Study, context: Context, making: Making) -> Iterator[Example]:
    """The records of one study.

    Raises:
      SkipItem: no expert said anything about it, or no slice is worth a record.
      UserError: a file cannot be read.
    """
    facts = {k: v for k, v in study.facts.items() if k not in ("group", "patient", "licence")}
    if context.config == "film":
        yield _film(study, context, making, facts)
        return
    scan = read_scan(context, study.name, study.files, _MODALITIES[context.config])
    said = _annotations(making, [(role, key) for (role, _), key in zip(scan.files, scan.keys, strict=True)])
    if not said:
        raise SkipItem("no annotation")
    indices = _worthwhile(scan, said, making, context)
    records = slice_records(
        context, scan, [], SliceOptions(), {"patient": study.patient, **facts}, indices=indices
    )
    for record in records:
        yield _licensed(record, study)


def _film(study: Study, context: Context, making: Making, facts: Mapping[str, Any]) -> Example:
    path = study.files[0][1]
    key = image_key(load_pixels(file_of(context, path)))
    if not _annotations(making, [("", key)]):
        raise SkipItem("no annotation")
    meta = metadata(context, modality="CXR", patient=study.patient, **facts) | {"input_key": key}
    return _licensed(Example(study.name, "study", (context.image(path),), meta=meta), study)


def _licensed(record: Example, study: Study) -> Example:
    """The record under the licence of its scan, where that is known."""
    licence = study.facts.get("licence")
    return dataclasses.replace(record, meta={**record.meta, "licence": licence}) if licence else record


def _annotations(making: Making, inputs: Sequence[tuple[str, str]]) -> list[Annotation]:
    """What experts said of these inputs, failures too."""
    keys = dict(inputs)
    found = []
    for card in making.cards:
        if set(card.roles) <= set(keys):
            key = inputs_key([(role, keys[role]) for role in card.roles])
            found += [making.store.get(key, card.name, args) for args in card.args or ("",)]
    return [annotation for annotation in found if annotation is not None]


def _worthwhile(scan: Scan, said: Sequence[Annotation], making: Making, context: Context) -> list[int]:
    """The slices that become records, ascending."""
    volume = scan.volume
    shown = body_slices(volume, AXIS)
    largest, lesions = np.zeros(len(shown), np.int64), np.zeros(len(shown), np.int64)
    doubtful, looked = np.zeros(len(shown), bool), False
    for annotation in said:
        if annotation.status == "failed":
            looked = True  # a record for the question that stays open
            continue
        if annotation.label_shape != volume.voxels.shape:
            raise SkipItem(f"annotation of {annotation.expert} lies on another grid; annotate again")
        structures, lesion_pixels, for_lesions = _pixels(annotation)
        looked |= for_lesions
        largest = np.maximum(largest, structures)
        lesions = np.maximum(lesions, lesion_pixels)
        doubtful |= (lesion_pixels > 0) & (lesion_pixels < MIN_PIXELS)
    enough = shown & ~doubtful & ((largest >= making.min_pixels) | looked)
    rng = context.rng(scan.name)
    with_lesion = np.flatnonzero(enough & (lesions > 0)).tolist()
    without = np.flatnonzero(enough & (lesions == 0)).tolist()
    if not with_lesion:
        return pick(without, making.slices, rng)
    return pick_halves(with_lesion, without, making.slices, rng)


def _pixels(annotation: Annotation) -> tuple[np.ndarray, np.ndarray, bool]:
    """Pixels of the largest structure and of lesions, [Z] int64 each, and whether it looks for lesions."""
    group = label_group(annotation.expert, annotation.args)
    names = dict(group.names if group else annotation.label_names)
    nested = annotation.expert == "BRATS"
    ids = [i for i, name in names.items() if nested or is_lesion(name)]
    assert annotation.labels is not None  # of a failed one nobody asks
    depth = annotation.labels.shape[AXIS]
    largest, lesions = np.zeros(depth, np.int64), np.zeros(depth, np.int64)
    for z in range(depth):
        counts = np.bincount(apply_group(group, annotation.labels.plane(z)).ravel(), minlength=1)
        counts[0] = 0
        largest[z] = counts.max()
        lesions[z] = sum(int(counts[i]) for i in ids if i < len(counts))
    return largest, lesions, nested or is_lesion(annotation.args)


def _read_json(path: str) -> Any:
    try:
        return json.loads(paths.read_bytes(path, _MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON ({str(error)[:100]}); correct it") from error


def _facts(path: str) -> Mapping[str, Mapping[str, Any]]:
    if not path:
        return {}
    content = _read_json(path)
    if not isinstance(content, dict) or not all(isinstance(row, dict) for row in content.values()):
        raise UserError(f'{path}: must be {{"study name": {{"grade": "HGG"}}}}; correct it')
    return content


def _cases(path: str) -> Iterator[Study]:
    content = _read_json(path)
    rows = content.get("cases") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{path}: holds no list "cases"; correct it')
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not all(isinstance(v, str) and v for v in row.values()):
            raise UserError(f"{path}: case {number} is no object of texts; correct it")
        files = tuple((role, file) for role, file in row.items() if role != "name")
        if "name" not in row or not files:
            raise UserError(f"{path}: case {number} has no name or no scan; correct it")
        for _, file in files:
            if problem := path_problem(file):
                raise UserError(f"{path}: case {row['name']!r}: {problem}; give paths below the data folder")
        yield Study(row["name"], files)


def _name_of(study: Study) -> str:
    return study.files[0][1]
