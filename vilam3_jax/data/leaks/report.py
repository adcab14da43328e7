"""The ledger: which evaluation records a training set has seen, pair of sets by pair of sets."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vilam3_jax import __version__
from vilam3_jax.data.leaks.fingerprints import NEAR_DISTANCE, Fingerprint, NearIndex
from vilam3_jax.data.leaks.marks import MarkReader, Marks, read_marks
from vilam3_jax.data.leaks.texts import RUN, TextIndex
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.data.tfds_folder import datasets_in, read_info, resolve
from vilam3_jax.errors import InputWarning, UserError
from vilam3_jax.runtime import paths

LEDGER_NAME = "leaks.json"
SCHEMA_VERSION = 1
TEXT_SHARE = 0.8
TEXT_SHARE_OF_RECORDS = 0.01
TEXT_LEAST_COMMON = 10

KINDS = {
    "image": "the same pixels",
    "near_image": "nearly the same image",
    "volume": "slices of the same volume",
    "patient": "the same patient",
    "group": "the same group of the source",
    "text": "the same words",
}
_LISTED_IDS = 100_000
_LISTED_PAIRS = 50
_BATCH = 512
_MAX_LEDGER_BYTES = 1 << 30


def ledger(
    directories: Sequence[paths.PathLike],
    *,
    training: Sequence[str] = ("train",),
    distance: int = NEAR_DISTANCE,
    workers: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compares every training set with every evaluation set.

    Memory grows with the evaluation sets; training sets are read once, record by record.

    Args:
      directories: datasets, or folders of datasets.
      training: names of the splits that are trained on; all others are evaluation sets.
      distance: bits of 255 by which the hashes of near images may differ.
      workers: threads; 0: one for each core.
      progress: is told what is read.

    Returns:
      The ledger, as docs/leaks.md describes it: record ids and numbers, no texts and no paths.

    Raises:
      UserError: no dataset, or no training or no evaluation set among them.
      UnavailableError: the disk or the network fails.
    """
    sources = _named_sources(directories)
    trained = {name: source for name, source in sources.items() if source.split in training}
    evaluated = {name: source for name, source in sources.items() if source.split not in training}
    if not trained or not evaluated:
        lacking = "training" if not trained else "evaluation"
        raise UserError(
            f"no {lacking} set among {', '.join(sources)}; training sets are splits named "
            f"{' or '.join(training)}"
        )
    reader = MarkReader()
    threads = workers or os.cpu_count() or 1
    counts: dict[str, collections.Counter[str]] = {}
    pairs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # of a million images; unreadable ones are counted
        indexed = {}
        for name, source in evaluated.items():
            progress(f"reading {name}: {len(source)} records")
            indexed[name] = _Evaluation(
                read_marks(source, reader, threads), counts.setdefault(name, _counter())
            )
        for name, source in trained.items():
            progress(f"comparing {name}: {len(source)} records")
            counted = counts.setdefault(name, _counter())
            comparisons = {other: _Comparison(index, distance) for other, index in indexed.items()}
            records = 0
            for batch in _batches(read_marks(source, reader, threads), counted):
                for comparison in comparisons.values():
                    comparison.add(batch)
                records += len(batch)
            for other, comparison in comparisons.items():
                known = _stated_reason(source, evaluated[other])
                pairs.append(comparison.result(name, other, records, known))
    leaks = sum(pair["leaked_records"] for pair in pairs if not pair["stated_reason"])
    return {
        "schema_version": SCHEMA_VERSION,
        "version": __version__,
        "settings": {"near_distance": distance, "words": RUN, "text_share": TEXT_SHARE},
        "verdict": "leaks" if leaks else "clean",
        "sets": [
            {
                "name": name,
                "role": "training" if name in trained else "evaluation",
                "records": len(source),
                "digest": _digest(source),
                **counts[name],
            }
            for name, source in sources.items()
        ],
        "pairs": pairs,
    }


def carried(folder: paths.PathLike, sources: Iterable[Any]) -> dict[str, Any] | None:
    """What a checkpoint's provenance keeps of the ledger in a data folder.

    Args:
      folder: of the run's data.
      sources: the training sets of the run.

    Returns:
      The verdict ("clean", "leaks" or "incomplete"), the pairs of these training sets without ids, and
      `not_covered`: the training sets that it does not speak of, or that were written anew since. None where
      the folder has no ledger.

    Raises:
      UserError: it is damaged.
    """
    path = paths.as_path(folder) / LEDGER_NAME
    if not paths.exists(path):
        return None
    try:
        content = json.loads(paths.read_bytes(path, _MAX_LEDGER_BYTES))
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError("schema_version")
        digests = {str(row["digest"]): str(row["name"]) for row in content["sets"]}
        ours = [(f"{source.name}/{source.split}", digests.get(_digest(source))) for source in sources]
        names = {name for _, name in ours}
        pairs = [
            {
                key: pair[key]
                for key in ("training", "evaluation", "evaluation_records", "leaked_records", "stated_reason")
            }
            | {"kinds": {kind: row["evaluation_records"] for kind, row in pair["kinds"].items()}}
            for pair in content["pairs"]
            if pair["training"] in names
        ]
        missing = sorted({label for label, name in ours if name is None})
        leaks = any(pair["leaked_records"] and not pair["stated_reason"] for pair in pairs)
        return {
            "verdict": "leaks" if leaks else "incomplete" if missing else "clean",
            "version": content["version"],
            "settings": content["settings"],
            "pairs": pairs,
            "not_covered": missing,
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: is no ledger of `vilam3 data leaks`; make it again or remove it") from error


def to_text(content: Mapping[str, Any]) -> str:
    """The ledger as a table for people."""
    lines = ["sets"]
    for row in content["sets"]:
        notes = [
            f"{row[key]} {words}"
            for key, words in (
                ("damaged_records", "damaged records"),
                ("unreadable_images", "images that cannot be read"),
                ("without_patient", "records without a patient key"),
            )
            if row[key]
        ]
        lines.append(
            f"  {row['name']} ({row['role']}): {row['records']} records, {row['images']} images"
            + (f"; {', '.join(notes)}" if notes else "")
        )
    lines += ["", "evaluation records that a training set has too"]
    shared = [pair for pair in content["pairs"] if pair["kinds"]]
    for pair in shared:
        total = pair["evaluation_records"]
        lines.append(
            f"  {pair['training']} -> {pair['evaluation']}: {pair['leaked_records']} of {total} leaked"
        )
        if pair["stated_reason"]:
            lines.append(f"    stated by the dataset: {pair['stated_reason']}")
        for kind, row in pair["kinds"].items():
            first = row["pairs"][0] if row["pairs"] else None
            example = f", such as {first['evaluation']} in {first['training']}" if first else ""
            note = "" if row["leaked_records"] else " (no leak by itself)"
            lines.append(f"    {kind:<11} {row['evaluation_records']:>8}  {KINDS[kind]}{note}{example}")
    lines.append(f"  {len(content['pairs']) - len(shared)} pairs of sets share nothing")
    lines += ["", f"verdict: {content['verdict']}"]
    return "\n".join(lines) + "\n"


class _Finding:
    """What one kind of mark says of a pair of sets."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.evaluation = np.zeros(len(ids), bool)
        self.training: dict[str, None] = {}
        self.pairs: list[dict[str, Any]] = []
        self._ids = ids
        self._met: set[str] = set()

    def add(self, training: str, key: str, evaluation: Sequence[int], **more: Any) -> None:
        """Notes that a training record shares `key` with evaluation records, always the same for a key."""
        if not evaluation:
            return
        self.training[training] = None
        if key not in self._met:
            self._met.add(key)
            self.evaluation[list(evaluation)] = True
        for record in evaluation[: _LISTED_PAIRS - len(self.pairs)]:
            self.pairs.append({"training": training, "evaluation": self._ids[record], **more})


class _Evaluation:
    """An evaluation set, by everything that a training record may share with it."""

    def __init__(self, marks: Iterable[Marks | None], counts: collections.Counter[str]) -> None:
        self.ids: list[str] = []
        self.has_images: list[bool] = []
        self.keyed: dict[str, dict[str, list[int]]] = {
            kind: collections.defaultdict(list) for kind in ("image", "volume", "patient", "group")
        }
        images: dict[str, Fingerprint] = {}
        texts = []
        for batch in _batches(marks, counts):
            for mark in batch:
                place = len(self.ids)
                self.ids.append(mark.id)
                self.has_images.append(bool(mark.images or mark.volumes or mark.unreadable))
                for kind, keys in _keys(mark).items():
                    for key in keys:
                        self.keyed[kind][key].append(place)
                images |= {image.key: image for image in mark.images}
                texts += [(place, hashes) for hashes in mark.texts]
        self.images = list(images.values())
        self.near = NearIndex(self.images)
        self.texts = TextIndex(texts)


class _Comparison:
    """One training set against one evaluation set."""

    def __init__(self, evaluation: _Evaluation, distance: int) -> None:
        self._evaluation = evaluation
        self._distance = distance
        self._findings = {kind: _Finding(evaluation.ids) for kind in KINDS}
        self._training_ids: list[str] = []
        evaluation.texts.forget()

    def add(self, batch: Sequence[Marks]) -> None:
        """Compares training records."""
        queries: dict[str, Fingerprint] = {}
        owners: dict[str, list[str]] = collections.defaultdict(list)
        for mark in batch:
            self._evaluation.texts.count(len(self._training_ids), mark.texts)
            self._training_ids.append(mark.id)
            for kind, keys in _keys(mark).items():
                for key in keys:
                    self._findings[kind].add(mark.id, key, self._evaluation.keyed[kind].get(key, []))
            for image in mark.images:
                queries[image.key] = image
                owners[image.key].append(mark.id)
        known = list(queries.values())
        found = self._evaluation.near.near(known, self._distance)
        for (query, image), distance in sorted(found.items()):
            key = self._evaluation.images[image].key
            if key == known[query].key:
                continue
            for owner in owners[known[query].key]:
                records = self._evaluation.keyed["image"][key]
                self._findings["near_image"].add(owner, key, records, distance=distance)

    def result(self, training: str, evaluation: str, records: int, stated_reason: str) -> dict[str, Any]:
        """The row of the ledger."""
        index = self._evaluation
        most = max(TEXT_LEAST_COMMON, int(TEXT_SHARE_OF_RECORDS * records))
        for record, first in index.texts.covered(TEXT_SHARE, most).items():
            self._findings["text"].add(self._training_ids[first], str(record), [record])
        leaked = np.zeros(len(index.ids), bool)
        kinds = {}
        for kind, finding in self._findings.items():
            if not finding.evaluation.any():
                continue
            # Questions and reports about different images repeat each other without a leak.
            counted = (
                finding.evaluation & ~np.array(index.has_images) if kind == "text" else finding.evaluation
            )
            leaked |= counted
            hit = [index.ids[record] for record in np.flatnonzero(finding.evaluation)]
            kinds[kind] = {
                "evaluation_records": len(hit),
                "leaked_records": int(counted.sum()),
                "training_records": len(finding.training),
                "pairs": finding.pairs,
                "evaluation_ids": hit[:_LISTED_IDS],
                "training_ids": list(finding.training)[:_LISTED_IDS],
                "truncated": max(len(hit), len(finding.training)) > _LISTED_IDS,
            }
        return {
            "training": training,
            "evaluation": evaluation,
            "evaluation_records": len(index.ids),
            "leaked_records": int(leaked.sum()),
            "stated_reason": stated_reason,
            "kinds": kinds,
        }


def _keys(mark: Marks) -> dict[str, set[str]]:
    return {
        "image": {image.key for image in mark.images},
        "volume": set(mark.volumes),
        "patient": {mark.patient} - {""},
        "group": {mark.group} - {""},
    }


def _counter() -> collections.Counter[str]:
    return collections.Counter(images=0, unreadable_images=0, damaged_records=0, without_patient=0)


def _batches(marks: Iterable[Marks | None], counts: collections.Counter[str]) -> Iterable[list[Marks]]:
    batch: list[Marks] = []
    for mark in marks:
        if mark is None:
            counts["damaged_records"] += 1
            continue
        counts["images"] += len(mark.images)
        counts["unreadable_images"] += mark.unreadable
        counts["without_patient"] += not mark.patient
        batch.append(mark)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch


def _named_sources(directories: Sequence[paths.PathLike]) -> dict[str, ExampleSource]:
    """Every split of every dataset, under `dataset/split`."""
    found: dict[str, ExampleSource] = {}
    seen: set[str] = set()
    for folder in directories:
        for dataset in map(resolve, datasets_in(folder)):
            if os.fspath(dataset) in seen:
                continue
            seen.add(os.fspath(dataset))
            for split in read_info(dataset)["splits"]:
                source = ExampleSource(dataset, split)
                name, number = f"{source.name}/{split}", 1
                while name in found:
                    number += 1
                    name = f"{source.name}#{number}/{split}"
                found[name] = source
    return found


def _digest(source: Any) -> str:
    return hashlib.sha256(json.dumps(source.digests()).encode()).hexdigest()


def _stated_reason(training: ExampleSource, evaluation: ExampleSource) -> str:
    """Why the source's own splits share images, as its builder states it."""
    if training.directory != evaluation.directory:
        return ""
    reason = training.info.get("provenance", {}).get("shared_images", "")
    return reason if isinstance(reason, str) else ""
