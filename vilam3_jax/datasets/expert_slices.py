"""`python -m vilam3_jax.datasets.expert_slices`: annotated scans become a dataset of studies.

A study is the picture of a slice, or of one film, without a word: the rules of `data/experts/dialogues` make
a dialogue of it when it is loaded.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from etils import epath

from vilam3_jax import paths
from vilam3_jax.data.content_keys import image_key, inputs_key
from vilam3_jax.data.examples import Example, ImageRef, path_problem
from vilam3_jax.data.experts.cards import Card, load_cards
from vilam3_jax.data.experts.labels import apply_group, is_lesion, label_group
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.folder_walk import list_files
from vilam3_jax.data.images import load_film
from vilam3_jax.data.records import ExampleWriter
from vilam3_jax.data.volumes import Volume, read_volume
from vilam3_jax.datasets.samples import INDEX_NAME, MODALITY_CODES, read_samples
from vilam3_jax.datasets.slices import PLANE_OF_AXIS, body_slices
from vilam3_jax.errors import UnavailableError, UserError

AXIS = 2
_WORDS = {"CT": "CT", "MR": "MRI"}
_VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
_FILMS = (".png", ".jpg", ".jpeg")
_MIN_LESION = 20  # pixels; with fewer, but some, a slice is doubtful and left out
_MAX_FILES = 10_000_000
_MAX_JSON_BYTES = 64 << 20


@dataclasses.dataclass(frozen=True)
class Study:
    """A scan, a case of several scans on one grid, or a film.

    Attributes:
      name: unique.
      files: (role, path below the data folder); the role is '' for a single file.
      modality: DICOM's code if it is known, `film` for a film.
      facts: further values of `Example.meta`, such as `grade` and `patient`.
    """

    name: str
    files: tuple[tuple[str, str], ...]
    modality: str | None = None
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def patient(self) -> str:
        """What stays on one side of the split."""
        return str(self.facts.get("group") or self.facts.get("patient") or self.name)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A record that could be written: a study's slice, None for a film, and whether it shows a lesion."""

    study: int
    index: int | None
    lesion: bool


def find_studies(
    data: paths.PathLike, modality: str | None, cases: str = "", facts: str = ""
) -> Iterator[Study]:
    """Yields the studies of a folder.

    Args:
      data: a samples folder, or any folder of volumes or films.
      modality: DICOM's code of files that do not state it; `film` for pictures.
      cases: JSON file {"cases": [{"name": …, role: path below `data`, …}]}, as for annotating; '' for single
        scans.
      facts: JSON file {study name: {"grade": "HGG", "patient": …}}; '' for none.

    Raises:
      UserError: no such folder or file, or one that cannot be read.
    """
    root = paths.as_path(data)
    known = _facts(facts)
    if cases:
        for study in _cases(cases, modality):
            yield dataclasses.replace(study, facts=known.get(study.name, {}))
        return
    if (root / INDEX_NAME).exists():
        for sample in read_samples(root):
            code = MODALITY_CODES.get(sample.kind, "film")
            said = {"group": sample.split_group, "patient": sample.patient, "licence": sample.licence}
            if code != "film" or sample.body_region == "chest":
                path = sample.path.relative_to(root).as_posix()
                yield Study(sample.name, (("", path),), code, said | dict(known.get(sample.name, {})))
        return
    endings = _FILMS if modality == "film" else _VOLUMES
    for file in sorted(list_files(root, _MAX_FILES, lambda: None).files):
        path = epath.Path(file).relative_to(root).as_posix()
        if path.lower().endswith(endings):
            yield Study(path, (("", path),), modality, known.get(path, {}))


def write_slices(
    data: paths.PathLike,
    annotations: paths.PathLike,
    out: paths.PathLike,
    studies: Sequence[Study],
    *,
    cards: Sequence[Card],
    size: int = 100_000,
    seed: int = 0,
    min_pixels: int = 100,
    lesion_share: float = 0.5,
    heldout: float = 0.0,
) -> dict[str, Any]:
    """Writes studies of slices on which an expert found something.

    Slices are axial. One is left out if it shows little of the body, nothing of `min_pixels` pixels (where an
    expert looked for lesions, it may show none), or fewer than 20 pixels of a lesion.

    Args:
      data: folder that the studies' files lie in.
      annotations: what the experts said of them.
      out: the dataset's folder.
      studies: of `find_studies`.
      cards: whose experts' annotations count.
      size: most records.
      seed: of the sample and of the split.
      min_pixels: of a structure.
      lesion_share: of the records, as far as there are slices with a lesion; matters where not all are taken.
      heldout: share of the patients whose slices go to the split `heldout`.

    Returns:
      `records`, `studies`, `lesions` (records that show one), `splits`, and `left_out` (reason to count).

    Raises:
      UserError: nothing to write, or `out` cannot be written.
    """
    root, store = paths.as_path(data), AnnotationStore(annotations)
    left_out: collections.Counter[str] = collections.Counter()
    first_of: dict[str, str] = {}
    candidates: list[Candidate] = []
    keys: dict[int, tuple[list[str], str]] = {}
    for number, study in enumerate(tqdm.tqdm(studies, desc="studies", unit="study", disable=None)):
        try:
            found, keys[number] = _candidates(root, number, study, store, cards, min_pixels)
        except UnavailableError:
            raise
        except UserError as error:
            left_out[str(error)] += 1
            first_of.setdefault(str(error), study.name)
            continue
        candidates += found
    if not candidates:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in left_out.most_common(3))
        raise UserError(f"{data}: no slice with enough on it ({reasons or 'no study found'})")
    chosen = _sample(candidates, size, lesion_share, random.Random(seed))
    splits: dict[str, list[Candidate]] = collections.defaultdict(list)
    for candidate in chosen:
        held = _fraction(seed, studies[candidate.study].patient) < heldout
        splits["heldout" if held else "train"].append(candidate)
    for split, members in sorted(splits.items()):
        with ExampleWriter(out, split, data_root=_data_root(data, out)) as writer:
            for one in members:
                writer.write(_example(studies[one.study], one.index, *keys[one.study]))
    return {
        "records": len(chosen),
        "studies": len({one.study for one in chosen}),
        "lesions": sum(one.lesion for one in chosen),
        "splits": {split: len(members) for split, members in sorted(splits.items())},
        "left_out": {f"{why} (first: {first_of[why]})": n for why, n in left_out.most_common()},
    }


def _candidates(
    root: epath.Path,
    number: int,
    study: Study,
    store: AnnotationStore,
    cards: Sequence[Card],
    min_pixels: int,
) -> tuple[list[Candidate], tuple[list[str], str]]:
    """The slices of one study worth a record, and (the keys of its files, its modality)."""
    if study.modality == "film":
        key = image_key(load_film(root / study.files[0][1]))
        if not _annotations(store, cards, [("", key)]):
            raise UserError("no annotation")
        return [Candidate(number, None, False)], ([key], "CXR")
    keys, first = [], None
    for _, path in study.files:
        volume = read_volume(root / path, modality=study.modality)
        keys.append(volume.content_key)
        if first is None:
            first = volume
        elif volume.voxels.shape != first.voxels.shape:
            raise UserError("its scans lie on different grids")
    assert first is not None  # a study has a file
    if first.modality not in _WORDS:
        raise UserError("states no modality of CT or MR; give --modality")
    inputs = [(role, key) for (role, _), key in zip(study.files, keys, strict=True)]
    said = _annotations(store, cards, inputs)
    if not said:
        raise UserError("no annotation")
    return _worthwhile(number, first, said, min_pixels), (keys, _WORDS[first.modality])


def _annotations(
    store: AnnotationStore, cards: Sequence[Card], inputs: Sequence[tuple[str, str]]
) -> list[Annotation]:
    """What experts said of these inputs, failures too."""
    keys = dict(inputs)
    found = []
    for card in cards:
        if set(card.roles) <= set(keys):
            key = inputs_key([(role, keys[role]) for role in card.roles])
            found += [store.get(key, card.name, args) for args in card.args or ("",)]
    return [annotation for annotation in found if annotation is not None]


def _worthwhile(number: int, volume: Volume, said: Sequence[Annotation], min_pixels: int) -> list[Candidate]:
    shown = body_slices(volume, AXIS)
    largest, lesions = np.zeros(len(shown), np.int64), np.zeros(len(shown), np.int64)
    doubtful, looked = np.zeros(len(shown), bool), False
    for annotation in said:
        if annotation.status == "failed":
            looked = True  # a record for the question that stays open
            continue
        if annotation.label_shape != volume.voxels.shape:
            raise UserError(f"annotation of {annotation.expert} lies on another grid; annotate again")
        structures, lesion_pixels, for_lesions = _pixels(annotation)
        looked |= for_lesions
        largest = np.maximum(largest, structures)
        lesions = np.maximum(lesions, lesion_pixels)
        doubtful |= (lesion_pixels > 0) & (lesion_pixels < _MIN_LESION)
    enough = shown & ~doubtful & ((largest >= min_pixels) | looked)
    return [Candidate(number, int(i), bool(lesions[i])) for i in np.flatnonzero(enough)]


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


def _sample(
    candidates: Sequence[Candidate], size: int, lesion_share: float, rng: random.Random
) -> list[Candidate]:
    """At most `size`, in the order in which they lie, so that neighbours share what is decoded."""
    if len(candidates) > size:
        with_lesion = [i for i, one in enumerate(candidates) if one.lesion]
        without = [i for i, one in enumerate(candidates) if not one.lesion]
        wanted = min(len(with_lesion), max(round(lesion_share * size), size - len(without)))
        places = rng.sample(with_lesion, wanted) + rng.sample(without, size - wanted)
        candidates = [candidates[i] for i in sorted(places)]
    return list(candidates)


def _example(study: Study, index: int | None, keys: Sequence[str], modality: str) -> Example:
    code = None if study.modality == "film" else study.modality
    cut = (None, None) if index is None else (AXIS, index)
    images = tuple(ImageRef(None, path, *cut, None, code) for _, path in study.files)
    meta: dict[str, Any] = {"dataset": "expert_slices", **study.facts, "modality": modality}
    meta |= {"patient": study.patient, "input_key": list(keys) if len(keys) > 1 else keys[0]}
    if len(keys) > 1:
        meta["roles"] = [role for role, _ in study.files]
    if index is not None:
        meta["plane"] = PLANE_OF_AXIS[AXIS]
    name = study.name if index is None else f"{study.name}:{index}"
    return Example(name, "study", images, meta=meta)


def _data_root(data: paths.PathLike, out: paths.PathLike) -> str:
    """Relative where both are local, so that they can be moved together."""
    if "://" in os.fspath(data) or "://" in os.fspath(out):
        return os.fspath(data)
    return os.path.relpath(os.path.abspath(data), os.path.abspath(out))


def _fraction(seed: int, patient: str) -> float:
    digest = hashlib.sha256(f"{seed}/{patient}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / (1 << 48)


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


def _cases(path: str, modality: str | None) -> Iterator[Study]:
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
        yield Study(row["name"], files, modality)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vilam3_jax.datasets.expert_slices",
        description="List annotated slices as a data set, whose dialogues are made when it is loaded.",
    )
    parser.add_argument("--data", required=True, help="folder of the scans that were annotated")
    parser.add_argument("--annotations", required=True, help="folder of annotations")
    parser.add_argument("--out", required=True, help="folder of the data set")
    parser.add_argument(
        "--modality", choices=("CT", "MR", "film"), help="of files that do not state it, or of all pictures"
    )
    parser.add_argument(
        "--cases", default="", help="JSON file of cases with several scans, as for annotating"
    )
    parser.add_argument(
        "--facts", default="", help='JSON file: {"study name": {"grade": "HGG", "patient": "7"}}'
    )
    parser.add_argument("--cards", default="experts", help="card list whose experts count (default: experts)")
    parser.add_argument("--size", type=int, default=100_000, help="most slices (default: 100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    parser.add_argument(
        "--min-pixels", type=int, default=100, help="least size of a structure (default: 100)"
    )
    parser.add_argument(
        "--lesion-share", type=float, default=0.5, help="of slices with a lesion (default: 0.5)"
    )
    parser.add_argument("--heldout", type=float, default=0.0, help="share of the patients (default: 0)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Command line of this module."""
    args = _parser().parse_args(argv)
    if args.size < 1 or args.min_pixels < 1 or not (0 <= args.lesion_share <= 1 and 0 <= args.heldout < 1):
        raise UserError(
            "--size and --min-pixels must be positive, --lesion-share and --heldout shares below 1"
        )
    made = write_slices(
        args.data,
        args.annotations,
        args.out,
        list(find_studies(args.data, args.modality, args.cases, args.facts)),
        cards=load_cards(args.cards),
        size=args.size,
        seed=args.seed,
        min_pixels=args.min_pixels,
        lesion_share=args.lesion_share,
        heldout=args.heldout,
    )
    splits = ", ".join(f"{count} {split}" for split, count in made["splits"].items())
    print(f"{made['records']} records of {made['studies']} studies in {args.out}: {splits}")
    print(f"{made['lesions']} show a lesion")
    for reason, count in made["left_out"].items():
        print(f"left out {count}: {reason}")
    return 0


if __name__ == "__main__":
    from vilam3_jax.cli import guarded

    sys.exit(guarded("expert_slices", main, sys.argv[1:]))
