"""Finds evaluation records that a training set contains, for each pair of sets, and reports them."""

from __future__ import annotations

import collections
import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vilam3_jax import __version__
from vilam3_jax.data.leaks.fingerprints import NEAR_DISTANCE, Fingerprint, NearIndex
from vilam3_jax.data.leaks.signatures import RecordSignature, SignatureReader, read_signatures
from vilam3_jax.data.leaks.texts import RUN, TextIndex
from vilam3_jax.data.records import ExampleSource
from vilam3_jax.data.tfds_folder import datasets_in, read_info, resolve
from vilam3_jax.errors import InputWarning, UserError
from vilam3_jax.runtime import paths

logger = logging.getLogger(__name__)

REPORT_NAME = "leaks.json"
SCHEMA_VERSION = 1
TEXT_SHARE = 0.8
# A run that more training records contain than both bounds is a common phrase.
_COMMON_SHARE, _COMMON_RECORDS = 0.01, 10

KINDS = {
    "image": "the same pixels",
    "near_image": "nearly the same image",
    "volume": "slices of the same volume",
    "patient": "the same patient",
    "group": "the same group of the source",
    "text": "the same words",
}
_MAX_IDS = 100_000
_MAX_PAIRS = 50
_BATCH = 512
_MAX_REPORT_BYTES = 1 << 30


def find_leaks(
    directories: Sequence[paths.PathLike],
    *,
    training: Sequence[str] = ("train",),
    distance: int = NEAR_DISTANCE,
    workers: int = 0,
) -> dict[str, Any]:
    """Compares every training set with every evaluation set. Progress is logged.

    Reads training sets once, record by record; memory grows with the evaluation sets.

    Args:
      directories: datasets, or folders of datasets.
      training: names of the training splits; all others are evaluation sets.
      distance: maximum Hamming distance between hashes of near images, of 255 bits.
      workers: number of threads; 0: one per core.

    Returns:
      The report described in docs/leaks.md: record ids and numbers, no texts and no paths.

    Raises:
      UserError: no dataset, no training set or no evaluation set.
      UnavailableError: disk or network failure.
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
    reader, workers = SignatureReader(), workers or os.cpu_count() or 1
    counts = {
        name: collections.Counter(images=0, unreadable_images=0, damaged_records=0, without_patient=0)
        for name in sources
    }
    pairs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # may concern a million images; failures are counted
        indices = {}
        for name, source in evaluated.items():
            logger.info("reading %s: %d records", name, len(source))
            indices[name] = _EvaluationIndex(_batches(read_signatures(source, reader, workers), counts[name]))
        for name, source in trained.items():
            logger.info("comparing %s: %d records", name, len(source))
            comparisons = {other: _Comparison(index, distance) for other, index in indices.items()}
            for batch in _batches(read_signatures(source, reader, workers), counts[name]):
                for comparison in comparisons.values():
                    comparison.add(batch)
            for other, comparison in comparisons.items():
                reason = _stated_reason(source, evaluated[other])
                pairs.append({"training": name, "evaluation": other, **comparison.result(reason)})
    leaks = any(pair["leaked_records"] and not pair["stated_reason"] for pair in pairs)
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


def provenance(folder: paths.PathLike, sources: Iterable[Any]) -> dict[str, Any] | None:
    """Extracts from the report in a data folder what a checkpoint's provenance records.

    Returns:
      The verdict ("clean", "leaks" or "incomplete"), the pairs of the run's training sets `sources` without
      ids, and `not_covered`, the sets that are absent from the report or were rewritten since. None without a
      report; raises `UserError` for a damaged one.
    """
    path = paths.as_path(folder) / REPORT_NAME
    if not paths.exists(path):
        return None
    kept = ("training", "evaluation", "evaluation_records", "leaked_records", "stated_reason")
    try:
        report = json.loads(paths.read_bytes(path, _MAX_REPORT_BYTES))
        if report["schema_version"] != SCHEMA_VERSION:
            raise ValueError("schema_version")
        digests = {str(row["digest"]): str(row["name"]) for row in report["sets"]}
        labelled = [(f"{source.name}/{source.split}", digests.get(_digest(source))) for source in sources]
        names = {name for _, name in labelled}
        pairs = [
            {key: pair[key] for key in kept}
            | {"kinds": {kind: row["evaluation_records"] for kind, row in pair["kinds"].items()}}
            for pair in report["pairs"]
            if pair["training"] in names
        ]
        missing = sorted({label for label, name in labelled if name is None})
        leaks = any(pair["leaked_records"] and not pair["stated_reason"] for pair in pairs)
        return {
            "verdict": "leaks" if leaks else "incomplete" if missing else "clean",
            "version": report["version"],
            "settings": report["settings"],
            "pairs": pairs,
            "not_covered": missing,
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a report of `vilam3 data leaks`; run it again or remove the file"
        ) from error


def to_text(report: Mapping[str, Any]) -> str:
    """Formats the report for a terminal."""
    lines = ["sets"]
    for row in report["sets"]:
        keys = ("records", "images", "damaged_records", "unreadable_images", "without_patient")
        counts = [f"{row[key]} {key.replace('_', ' ')}" for key in keys if row[key]]
        lines.append(f"  {row['name']} ({row['role']}): {', '.join(counts)}")
    lines += ["", "evaluation records that a training set contains"]
    shared = [pair for pair in report["pairs"] if pair["kinds"]]
    for pair in shared:
        lines.append(
            f"  {pair['training']} -> {pair['evaluation']}: {pair['leaked_records']} of "
            f"{pair['evaluation_records']} leaked"
        )
        if pair["stated_reason"]:
            lines.append(f"    stated by the dataset: {pair['stated_reason']}")
        for kind, row in pair["kinds"].items():
            first = row["pairs"][0] if row["pairs"] else None
            example = f", such as {first['evaluation']} in {first['training']}" if first else ""
            note = "" if row["leaked_records"] else " (not a leak on its own)"
            lines.append(f"    {kind:<11} {row['evaluation_records']:>8}  {KINDS[kind]}{note}{example}")
    lines.append(f"  {len(report['pairs']) - len(shared)} pairs of sets share nothing")
    return "\n".join([*lines, "", f"verdict: {report['verdict']}"]) + "\n"


class _Matches:
    """Matches of one kind between two sets."""

    def __init__(self, ids: Sequence[str]) -> None:
        self.evaluation = np.zeros(len(ids), bool)
        self.training: dict[str, None] = {}
        self.pairs: list[dict[str, Any]] = []
        self._ids = ids
        self._seen: set[str] = set()

    def add(self, training: str, key: str, evaluation: Sequence[int], **more: Any) -> None:
        """Adds a training record that shares `key` with evaluation records, which `key` determines."""
        if not evaluation:
            return
        self.training[training] = None
        if key not in self._seen:
            self._seen.add(key)
            self.evaluation[list(evaluation)] = True
        for record in evaluation[: _MAX_PAIRS - len(self.pairs)]:
            self.pairs.append({"training": training, "evaluation": self._ids[record], **more})

    def result(self, leaked: np.ndarray) -> dict[str, Any]:
        """Returns the entry of the report; `leaked` marks the evaluation records that count as leaks."""
        ids = [self._ids[record] for record in np.flatnonzero(self.evaluation).tolist()]
        return {
            "evaluation_records": len(ids),
            "leaked_records": int(leaked.sum()),
            "training_records": len(self.training),
            "pairs": self.pairs,
            "evaluation_ids": ids[:_MAX_IDS],
            "training_ids": list(self.training)[:_MAX_IDS],
            "truncated": max(len(ids), len(self.training)) > _MAX_IDS,
        }


class _EvaluationIndex:
    """An evaluation set, indexed by everything that a training record may share with it."""

    def __init__(self, batches: Iterable[list[RecordSignature]]) -> None:
        self.ids: list[str] = []
        self.has_images: list[bool] = []
        self.records: dict[str, dict[str, list[int]]] = collections.defaultdict(
            dict
        )  # kind -> key -> records
        images: dict[str, Fingerprint] = {}
        texts = []
        for batch in batches:
            for one in batch:
                record = len(self.ids)
                self.ids.append(one.id)
                self.has_images.append(bool(one.keys["image"] or one.keys["volume"] or one.unreadable_images))
                for kind, keys in one.keys.items():
                    for key in keys:
                        self.records[kind].setdefault(key, []).append(record)
                images |= {image.key: image for image in one.images}
                texts += [(record, hashes) for hashes in one.texts]
        self.images = list(images.values())
        self.near = NearIndex(self.images)
        self.texts = TextIndex(texts)


class _Comparison:
    """Compares one training set with one evaluation set."""

    def __init__(self, evaluation: _EvaluationIndex, distance: int) -> None:
        self._evaluation = evaluation
        self._distance = distance
        self._matches = {kind: _Matches(evaluation.ids) for kind in KINDS}
        self._training_ids: list[str] = []
        evaluation.texts.reset()

    def add(self, batch: Sequence[RecordSignature]) -> None:
        """Compares a batch of training records."""
        index = self._evaluation
        images: dict[str, Fingerprint] = {}
        owners: dict[str, list[str]] = collections.defaultdict(list)
        for one in batch:
            index.texts.count(len(self._training_ids), one.texts)
            self._training_ids.append(one.id)
            for kind, keys in one.keys.items():
                for key in keys:
                    self._matches[kind].add(one.id, key, index.records[kind].get(key, []))
            for image in one.images:
                images[image.key] = image
                owners[image.key].append(one.id)
        queries = list(images.values())
        for (query, image), distance in sorted(index.near.near(queries, self._distance).items()):
            key = index.images[image].key
            if key != queries[query].key:
                for owner in owners[queries[query].key]:
                    self._matches["near_image"].add(
                        owner, key, index.records["image"][key], distance=distance
                    )

    def result(self, stated_reason: str) -> dict[str, Any]:
        """Returns the entry of the report, without the names of the sets."""
        index = self._evaluation
        max_records = max(_COMMON_RECORDS, int(_COMMON_SHARE * len(self._training_ids)))
        for record, first in index.texts.covered(TEXT_SHARE, max_records).items():
            self._matches["text"].add(self._training_ids[first], str(record), [record])
        leaked = np.zeros(len(index.ids), bool)
        kinds = {}
        for kind, matches in self._matches.items():
            if matches.evaluation.any():
                counted = matches.evaluation
                if kind == "text":  # questions and reports about different images repeat without a leak
                    counted = counted & ~np.array(index.has_images)
                leaked |= counted
                kinds[kind] = matches.result(counted)
        return {
            "evaluation_records": len(index.ids),
            "leaked_records": int(leaked.sum()),
            "stated_reason": stated_reason,
            "kinds": kinds,
        }


def _batches(
    signatures: Iterable[RecordSignature | None], counts: collections.Counter[str]
) -> Iterable[list[RecordSignature]]:
    """Batches the signatures and updates `counts`."""
    batch: list[RecordSignature] = []
    for one in signatures:
        if one is None:
            counts["damaged_records"] += 1
            continue
        counts["images"] += len(one.images)
        counts["unreadable_images"] += one.unreadable_images
        counts["without_patient"] += not one.keys["patient"]
        batch.append(one)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch


def _named_sources(directories: Sequence[paths.PathLike]) -> dict[str, ExampleSource]:
    """Opens every split of every dataset, named `dataset/split`."""
    found: dict[str, ExampleSource] = {}
    datasets = [resolve(dataset) for folder in directories for dataset in datasets_in(folder)]
    for dataset in {os.fspath(dataset): dataset for dataset in datasets}.values():
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
    """Returns why the official splits of a dataset share images, if its builder states it."""
    if training.directory != evaluation.directory:
        return ""
    reason = training.info.get("provenance", {}).get("shared_images", "")
    return reason if isinstance(reason, str) else ""
