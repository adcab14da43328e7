"""Builds datasets: shards in parallel, resumable, published atomically as a TFDS dataset.

`vilam3 prepare` calls `prepare`; `tfds_builder` offers the same build as a `tfds.core.DatasetBuilder`. The
shard writer is ours: without TensorFlow, TFDS's cannot build a split of more than 1,000 MiB, keeps nothing of
a killed build, and uses one process.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

import vilam3_jax
from vilam3_jax.data import child_process, tfds_folder
from vilam3_jax.data.content_keys import DECODER_VERSION
from vilam3_jax.data.example_features import features_dict
from vilam3_jax.data.examples import SCHEMA_VERSION
from vilam3_jax.data.records import Counts
from vilam3_jax.datasets import shard_jobs
from vilam3_jax.datasets.dataset import Dataset, Split
from vilam3_jax.datasets.shard_jobs import Settings, ShardJob, ShardReport
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import locks, paths

_RECORDS_PER_SHARD = 2048
_MAX_LISTED = 1000  # pairs of records with a shared patient or image, in the metadata


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Options of a build.

    Attributes:
      processes: number of worker processes; 1 builds in this process.
      seed, parity, copy_images: see `dataset.Context`.
      input_keys, decode_side: see `shard_jobs.Settings`.
      strict: unofficial item counts, and patients or images in several splits, are errors.
      progress: show a progress bar.
    """

    processes: int = 1
    seed: int = 0
    parity: bool = False
    copy_images: bool = True
    input_keys: bool = True
    decode_side: int = 0
    strict: bool = False
    progress: bool = False


@dataclasses.dataclass(frozen=True)
class Built:
    """A complete build.

    Attributes:
      folder: the folder of this version of the dataset.
      info: its metadata, see `tfds_folder.read_info`.
      reused: it existed before the call.
      warnings: one sentence each, for the user.
    """

    folder: epath.Path
    info: dict[str, Any]
    reused: bool
    warnings: tuple[str, ...]


def prepare(
    dataset: Dataset, source: paths.PathLike, out: paths.PathLike, options: BuildOptions | None = None
) -> Built:
    """Builds a dataset under `OUT/NAME/[VARIANT/]VERSION`, or reuses a complete build.

    Args:
      dataset: the dataset.
      source: folder (or file, see `Dataset.source_is_file`) that the user downloaded.
      out: local folder or `gs://` prefix. For a prefix, shards are built in a local temporary folder, the
        same in every call, and uploaded.
      options: None for the defaults.

    Raises:
      UserError: files are missing, the folder holds another build, or no item is usable.
      UnavailableError: a disk, a network or a process failed; finished shards are kept for the next call.
    """
    options = options or BuildOptions()
    root = paths.as_path(out)
    target = root / dataset.name / dataset.config / dataset.version
    folder = _source_folder(dataset, source)
    build = _Build(dataset, folder, target, options)
    reused = (target / tfds_folder.INFO_NAME).exists()
    if reused:
        if tfds_folder.read_info(target)["provenance"].get("inputs") != build.inputs():
            raise UserError(
                f"{target}: holds a build of other files or options; remove it or choose another --out"
            )
    elif paths.children(target):
        raise UserError(f"{target}: not empty and no complete build; remove it or choose another --out")
    elif "://" not in os.fspath(root):
        _with_tfds(build, root)
    else:
        name = f"vilam3-{hashlib.sha256(str(root).encode()).hexdigest()[:16]}"
        local = epath.Path(tempfile.gettempdir()) / name
        build = _Build(dataset, folder, local / target.relative_to(root), options, data_root_from=target)
        if not (build.target / tfds_folder.INFO_NAME).exists():
            _with_tfds(build, local)
        _upload(build.target, target)
        shutil.rmtree(local, ignore_errors=True)
    info = tfds_folder.read_info(target)
    warnings = list(info.get("notes", ()))
    for pair, found in (info.get("shared") or {}).items():
        reason = f" ({dataset.shared_images})" if dataset.shared_images else ""
        warnings.append(
            f"{pair} share {found['patients']} patients or groups and {found['images']} images{reason}"
        )
    return Built(target, info, reused, tuple(warnings))


def _source_folder(dataset: Dataset, source: paths.PathLike) -> SourceFolder:
    if not dataset.source_is_file:
        return SourceFolder(source, dataset.instructions)
    path = paths.as_path(source)
    if not path.exists() or path.is_dir():
        raise UserError(f"{source}: --source of {dataset.name} is a file; give one that exists")
    dataset.options.source_file = path.name
    return SourceFolder(path.parent, dataset.instructions)


def _with_tfds(build: _Build, root: epath.Path) -> None:
    with tempfile.TemporaryDirectory(prefix="vilam3-prepare-") as unused:
        config = tfds.download.DownloadConfig(manual_dir=str(build.folder.root))
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # TFDS reports downloads, but there are none
                _builder(build, root).download_and_prepare(download_dir=unused, download_config=config)
        except OSError as error:
            raise paths.write_error(build.target, error) from error


def tfds_builder(dataset: Dataset, out: paths.PathLike, options: BuildOptions | None = None) -> Any:
    """A `tfds.core.DatasetBuilder` whose `download_and_prepare` builds the dataset.

    The source is the `manual_dir` of TFDS's `DownloadConfig`; `out` is TFDS's `data_dir`, local.
    """
    root = paths.as_path(out)
    target = root / dataset.name / dataset.config / dataset.version
    return _builder(_Build(dataset, None, target, options or BuildOptions()), root)


def _builder(build: _Build, root: epath.Path) -> Any:
    dataset = build.dataset
    attributes = {
        "name": dataset.name,
        "VERSION": tfds.core.Version(dataset.version),
        "RELEASE_NOTES": {dataset.version: "see the documentation"},
        "MANUAL_DOWNLOAD_INSTRUCTIONS": dataset.instructions,
        "BUILDER_CONFIGS": [
            tfds.core.BuilderConfig(name=name, description=text) for name, text in dataset.configs.items()
        ],
        "build": build,
        "__module__": __name__,
        "__doc__": dataset.description,
    }
    builder = type("ExampleBuilder", (_ExampleBuilder,), attributes, skip_registration=True)
    return builder(data_dir=root, config=dataset.config or None)


class _ExampleBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """The TFDS builder of a dataset; a subclass per dataset sets the class attributes."""

    name = "example_builder"
    VERSION = tfds.core.Version("0.0.0")
    build: _Build

    def _info(self) -> tfds.core.DatasetInfo:
        dataset = self.build.dataset
        return tfds.core.DatasetInfo(
            builder=self,
            description=dataset.description,
            features=features_dict(),
            homepage=dataset.homepage or None,
            citation=dataset.citation or None,
            license=f"{dataset.licence} (access: {dataset.access})",
            metadata=tfds.core.MetadataDict(),
        )

    def download_and_prepare(self, **settings: Any) -> None:
        """As in TFDS, but in one process at a time."""
        with self.build.exclusive():
            super().download_and_prepare(**settings)

    def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
        raise NotImplementedError("shards are built by _download_and_prepare")

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        """Builds the shards in the temporary folder that TFDS renames at the end."""
        build = self.build
        if build.source is None:
            manual = SourceFolder(dl_manager.manual_dir, build.dataset.instructions)
            build = dataclasses.replace(build, source=manual)
        metadata = build.run(epath.Path(self.data_dir))
        self.info.set_file_format(tfds_folder.FILE_FORMAT, override=True)
        assert self.info.metadata is not None  # set in `_info`
        self.info.metadata.update(metadata)
        self.info.set_splits(tfds_folder.split_dict(epath.Path(self.data_dir), build.dataset.name, metadata))


@dataclasses.dataclass
class _Build:
    """One build into the folder `target`. `source` is None until TFDS passes it.

    `data_root_from` is the final folder, if it is not `target`.
    """

    dataset: Dataset
    source: SourceFolder | None
    target: epath.Path
    options: BuildOptions
    data_root_from: epath.Path | None = None

    @property
    def folder(self) -> SourceFolder:
        assert self.source is not None  # set by TFDS or by the caller
        return self.source

    def jobs(self) -> dict[str, list[ShardJob]]:
        """The shards of every split."""
        settings = Settings(self.options.input_keys and self.dataset.expert_inputs, self.options.decode_side)
        context = {key: getattr(self.options, key) for key in ("seed", "parity", "copy_images")}
        jobs = {}
        for name, split in self.splits.items():
            of_split = self.dataset.context(self.folder, name, **context)
            target = f"{self._work() / name}-"
            jobs[name] = [
                ShardJob(part, of_split, settings, self.dataset.version, f"{target}{number:05d}")
                for number, part in enumerate(_parts(split))
            ]
        return jobs

    @functools.cached_property
    def splits(self) -> dict[str, Split]:
        """The splits that have items, of which there must be one."""
        found = {name: split for name, split in self.dataset.splits(self.folder).items() if split.items}
        if not found:
            raise UserError(f"{self.folder.root}: holds no record of {self.dataset.name}; check --source")
        return found

    def inputs(self) -> str:
        """Hash of the items and of everything else that determines the records."""
        digests = {name: [job.digest() for job in jobs] for name, jobs in self.jobs().items()}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

    def _work(self) -> epath.Path:
        return self.target.parent / f".{self.target.name}.work"

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Locks the work folder against other processes, and removes it once the dataset is published."""
        work = self._work()
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
        try:
            # Another process may have removed the folder between opening and locking it.
            if not (
                locks.try_lock(lock) and work.exists() and os.path.samestat(os.fstat(lock), os.stat(work))
            ):
                raise UserError(f"{self.target}: another process builds it; run the command again afterwards")
            for incomplete in self.target.parent.glob(f"incomplete.*_{self.target.name}"):
                incomplete.rmtree(missing_ok=True)  # left by TFDS when a build was killed
            yield
            shutil.rmtree(work, ignore_errors=True)
        finally:
            os.close(lock)

    def run(self, folder: epath.Path) -> dict[str, Any]:
        """Builds all shards and moves them into `folder`; returns the metadata."""
        start = time.perf_counter()
        jobs = self.jobs()
        warnings = [
            f"split {name} has {len(split.items):,} items, the official release {split.expected:,}; "
            "is the download complete?"
            for name, split in self.splits.items()
            if split.expected not in (None, len(split.items))
        ]
        if warnings and self.options.strict:
            raise UserError(f"{self.folder.root}: {warnings[0]} Drop --strict to build it all the same")
        reports = _without_duplicates(jobs, self._reports(jobs))
        shared = _shared(reports)
        if self.options.strict and shared and not self.dataset.shared_images:
            pair, found = next(iter(shared.items()))
            raise UserError(
                f"{self.folder.root}: {pair} share {found['patients']} patients and {found['images']} "
                "images; change the split, or drop --strict"
            )
        splits = {name: self._split(name, jobs[name], reports[name], folder) for name in jobs}
        empty = [name for name, content in splits.items() if not content["records"]]
        if len(empty) == len(splits):
            named = [pair for of_split in reports.values() for report in of_split for pair in report.named]
            first = [f"{record}: {reason}" for record, reason in named[:3]] or ["it has no items"]
            reasons = "; ".join([*first, *self._notes({})])
            raise UserError(f"{self.folder.root}: no usable record in it; {reasons}")
        licences = sorted(
            {licence for content in splits.values() for licence in content["counts"].get("licence", {})}
        )
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.dataset.name,
            "data_root": self._data_root(),
            "licences": licences or [self.dataset.licence],
            "provenance": self._provenance() | {"seconds": round(time.perf_counter() - start, 1)},
            "splits": {name: content for name, content in splits.items() if content["records"]},
            "empty_splits": {name: splits[name] for name in empty},
            "shared": shared,
            "notes": [*warnings, *self._notes(splits)],
        }

    def _reports(self, jobs: Mapping[str, Sequence[ShardJob]]) -> dict[str, list[ShardReport]]:
        """Builds the missing shards; returns the reports of all."""
        all_jobs = list(itertools.chain(*jobs.values()))
        done = {job.target: report for job in all_jobs if (report := shard_jobs.finished(job)) is not None}
        missing = [job for job in all_jobs if job.target not in done]
        built = _built(missing, self.options.processes)
        bar = tqdm(
            built, total=len(missing), desc=f"{self.dataset.name} shards", disable=not self.options.progress
        )
        done |= {job.target: report for job, report in bar}
        return {name: [done[job.target] for job in of_split] for name, of_split in jobs.items()}

    def _split(
        self, name: str, jobs: Sequence[ShardJob], reports: Sequence[ShardReport], folder: epath.Path
    ) -> dict[str, Any]:
        """Moves the shards that hold records; returns the metadata of the split."""
        kept = [(job, report) for job, report in zip(jobs, reports, strict=True) if report.shard["records"]]
        shards, counts = [], Counts()
        for number, (job, report) in enumerate(kept):
            file = tfds_folder.shard_name(self.dataset.name, name, number, len(kept))
            try:  # a hard link, so that the work folder keeps the shard if the build fails later
                os.link(job.target, folder / file)
            except OSError:  # a file system without hard links
                shutil.copyfile(job.target, folder / file)
            shards.append({**report.shard, "file": file})
            counts.merge(report.counts)
        reasons: collections.Counter[str] = collections.Counter()
        for report in reports:
            reasons.update(report.reasons)
        named = [pair for report in reports for pair in report.named]
        split = self.splits[name]
        return {
            "records": sum(shard["records"] for shard in shards),
            "shards": shards,
            "counts": counts.plain(),
            "items": len(split.items),
            "expected_items": split.expected,
            "image_bytes": [sum(report.image_bytes[place] for report in reports) for place in (0, 1)],
            "skipped": {
                "total": sum(reasons.values()),
                "reasons": dict(reasons.most_common(shard_jobs.MAX_NAMED)),
                "first": named[: shard_jobs.MAX_NAMED],
            },
        }

    def _notes(self, splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
        return self.folder.notes + [
            f"split {name} is omitted, because none of its {content['items']:,} items gives a record"
            for name, content in splits.items()
            if not content["records"]
        ]

    def _data_root(self) -> str:
        """Root of image paths: relative if both folders are local, so that they can be moved together."""
        root = self.dataset.context(self.folder, "").root
        target = os.fspath(self.data_root_from or self.target)
        if "://" in root or "://" in target:
            return root
        return os.path.relpath(root, target)

    def _provenance(self) -> dict[str, Any]:
        dataset = self.dataset
        plain = {
            key: value
            for key, value in vars(dataset.options).items()
            if value is None or isinstance(value, str | int | float)
        }
        return {
            "dataset": dataset.name,
            "version": dataset.version,
            "config": dataset.config,
            "options": plain,
            "homepage": dataset.homepage,
            "citation": dataset.citation,
            "access": dataset.access,
            "shared_images": dataset.shared_images,
            "parity": self.options.parity,
            "seed": self.options.seed,
            "decode_side": self.options.decode_side,
            "decoder_version": DECODER_VERSION,
            "package_version": vilam3_jax.__version__,
            "inputs": self.inputs(),
        }


def _parts(split: Split) -> Iterator[Split]:
    """Cuts the split into runs of items, one per shard."""
    count = max(1, -(-len(split.items) * split.per_item // _RECORDS_PER_SHARD))
    count = min(count, len(split.items))
    for number in range(count):
        start, end = (len(split.items) * part // count for part in (number, number + 1))
        yield dataclasses.replace(split, items=split.items[start:end])


def _built(jobs: Sequence[ShardJob], processes: int) -> Iterator[tuple[ShardJob, ShardReport]]:
    """Builds shards; yields them in order of completion."""
    if processes <= 1 or len(jobs) <= 1:
        yield from ((job, shard_jobs.build(job)) for job in jobs)
        return
    # Spawned: libraries that run threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    workers = min(processes, len(jobs))
    with concurrent.futures.ProcessPoolExecutor(workers, context, _begin_worker) as pool:
        futures = {pool.submit(shard_jobs.build, job): job for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise UnavailableError(
                "a worker process was killed, perhaps for lack of memory; run the command again with fewer "
                "--processes, finished shards are kept"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """Makes a worker end with the command, on Ctrl-C and when the command is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    child_process.end_with_parent()


def _without_duplicates(
    jobs: Mapping[str, Sequence[ShardJob]], reports: dict[str, list[ShardReport]]
) -> dict[str, list[ShardReport]]:
    """Removes records whose id is in an earlier shard."""
    places = [(name, number) for name, of_split in reports.items() for number in range(len(of_split))]
    ids = [reports[name][number].ids for name, number in places]
    all_ids = np.concatenate(ids) if ids else np.zeros((0, 2), np.uint64)
    _, first = np.unique(all_ids, axis=0, return_index=True)
    repeated = np.ones(len(all_ids), bool)
    repeated[first] = False
    start = 0
    for (name, number), of_shard in zip(places, ids, strict=True):
        remove = {row.tobytes() for row in of_shard[repeated[start : start + len(of_shard)]]}
        if remove:
            reports[name][number] = shard_jobs.without(jobs[name][number], reports[name][number], remove)
        start += len(of_shard)
    return reports


def _shared(reports: Mapping[str, Sequence[ShardReport]]) -> dict[str, dict[str, Any]]:
    """Pair of splits, as "train and test" → numbers of shared patients and images, and their records."""
    persons, images = (
        {
            name: dict(itertools.chain.from_iterable(getattr(report, key).items() for report in of_split))
            for name, of_split in reports.items()
        }
        for key in ("persons", "images")
    )
    shared = {}
    for one, other in itertools.combinations(reports, 2):
        counts, pairs = [], set()
        for records in (persons, images):
            hashes = records[one].keys() & records[other].keys()
            counts.append(len(hashes))
            pairs |= {(records[one][hashed], records[other][hashed]) for hashed in hashes}
        if pairs:
            listed = [list(pair) for pair in sorted(pairs)[:_MAX_LISTED]]
            shared[f"{one} and {other}"] = {"patients": counts[0], "images": counts[1], "records": listed}
    return shared


def _upload(folder: epath.Path, target: epath.Path) -> None:
    """Copies a finished dataset; `dataset_info.json`, which marks it as complete, is last."""
    files = sorted(folder.iterdir(), key=lambda path: (path.name == tfds_folder.INFO_NAME, path.name))
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.copy(target / file.name, overwrite=True)
    except OSError as error:
        raise paths.write_error(target, error) from error
