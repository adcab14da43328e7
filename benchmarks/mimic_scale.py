"""How long and how much memory do the MIMIC-CXR datasets take at their full size?

Run: python benchmarks/mimic_scale.py [--folder=DIR] [--dataset=NAME[:VARIANT]...] [--build=NAME]
     [--out=DIR] [--processes=N]

Writes a synthetic MIMIC-CXR-JPG of 377,110 films in 227,835 studies of 65,379 made-up patients, with a text
report for each study, 700,703 questions about pairs and an annotation file. The films are hard links to a few
small JPEG files. A folder that is there is used again.

For each dataset, a process of its own reads the lists (`Dataset.splits`) and prints the time and the peak of
its memory. With --build, the dataset is built as by `vilam3 prepare`, opened, and read in the order of one
shuffled pass; started again, it goes on with the shards that are whole.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import grain
import numpy as np
from PIL import Image

from vilam3_jax.data.records import ExampleSource
from vilam3_jax.datasets import builder, registry
from vilam3_jax.datasets.mimic_cxr import study_path
from vilam3_jax.datasets.mimic_cxr_class import FINDINGS
from vilam3_jax.datasets.source_files import SourceFolder

FILMS, STUDIES, PATIENTS, QUESTIONS, ANNOTATED = 377_110, 227_835, 65_379, 700_703, 276_778
SPLITS = {"test": 5_159, "validate": 2_991}  # films; the rest is for training
_IMAGES = 64  # a file system has a bound on the links of one file
_SENTENCES = (
    "The lungs are clear.",
    "There is no pleural effusion.",
    "No pleural effusion is seen.",
    "The cardiac silhouette is mildly enlarged.",
    "There is mild pulmonary edema.",
    "No pneumothorax.",
    "In comparison with the study of ___, there is little change.",
    "A right-sided line ends in the superior vena cava.",
)
_KINDS = ("abnormality", "location", "level", "view", "type", "presence", "difference")


def films() -> Iterator[tuple[str, str, str, str]]:
    """(subject, study, dicom, split): studies of patients, films of studies, patients of splits in order."""
    for number in range(FILMS):
        study = number * STUDIES // FILMS
        patient = study * PATIENTS // STUDIES
        split = "test" if number < SPLITS["test"] else "train"
        if SPLITS["test"] <= number < sum(SPLITS.values()):
            split = "validate"
        dicom = "-".join(f"{number * 5 + part:08x}" for part in range(5))
        yield f"{10_000_000 + patient * 100}", f"{50_000_000 + study}", dicom, split


def make_source(folder: Path) -> None:
    """Writes tables, reports and films."""
    rng = random.Random(0)
    everything = list(films())
    split_of = {}
    for subject, _, _, split in everything:  # a patient at a border belongs to its first film's split
        split_of.setdefault(subject, split)
    studies = {study: subject for subject, study, _, _ in everything}
    release = "mimic-cxr-2.0.0"
    _table(
        folder / f"{release}-split.csv.gz",
        ["dicom_id", "study_id", "subject_id", "split"],
        ([dicom, study, subject, split_of[subject]] for subject, study, dicom, _ in everything),
    )
    views = [rng.choice(("PA", "AP", "AP", "LATERAL", "")) for _ in everything]
    _table(
        folder / f"{release}-metadata.csv.gz",
        ["dicom_id", "ViewPosition", "Rows", "ViewCodeSequence_CodeMeaning"],
        ([f[2], view, 2544, "lateral"] for f, view in zip(everything, views, strict=True)),
    )
    names = [finding.replace("_", " ") for finding in FINDINGS] + ["No Finding"]
    usual = [[rng.choice(("", "", "", "1.0", "0.0", "-1.0")) for _ in FINDINGS] for _ in range(5_000)]
    labels = ([study, subject, *rng.choice(usual), ""] for study, subject in studies.items())
    _table(folder / f"{release}-chexpert.csv.gz", ["study_id", "subject_id", *names], labels)
    read = ([study, *("0" for _ in names)] for study in list(studies)[:687])
    _table(folder / "mimic-cxr-2.1.0-test-set-labeled.csv", ["study_id", *names], read)
    _questions(folder, everything, views, split_of, rng)
    _annotation(folder, everything, split_of, rng)
    _files(folder, everything, studies, rng)


def _table(path: Path, header: Sequence[str], rows: Iterator[list]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)


def _questions(folder: Path, everything: list, views: list, split_of: dict, rng: random.Random) -> None:
    header = ["subject_id", "study_id", "dicom_id", "view", "split"]
    rows = ([p, s, d, v, split_of[p]] for (p, s, d, _), v in zip(everything, views, strict=True))
    _table(folder / "mimic_all.csv", header, rows)

    def asked() -> Iterator[list]:
        for number in range(QUESTIONS):
            place = number * FILMS // QUESTIONS
            subject, study, _, _ = everything[place]
            other = everything[max(place - 2, 0)][1]
            kind, split = _KINDS[number % 7], rng.choice(("train",) * 8 + ("val", "test"))
            yield [
                study,
                subject,
                other,
                kind,
                f"what about {kind} {number % 5}?",
                f"answer {number % 999}",
                split,
            ]

    columns = ["study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split"]
    _table(folder / "mimic_pair_questions.csv", columns, asked())


def _annotation(folder: Path, everything: list, split_of: dict, rng: random.Random) -> None:
    lists: dict[str, list] = {"train": [], "val": [], "test": []}
    for subject, study, dicom, _ in everything[:ANNOTATED]:
        name = split_of[subject].replace("validate", "val")
        path = f"{study_path(subject, study)}/{dicom}.jpg".removeprefix("files/")
        report = " ".join(rng.choices(_SENTENCES, k=8)).lower()
        item = {"id": dicom, "study_id": int(study), "subject_id": int(subject), "report": report}
        lists[name].append({**item, "image_path": [path], "split": name})
    (folder / "mimic_annotation.json").write_text(json.dumps(lists))


def _files(folder: Path, everything: list, studies: dict, rng: random.Random) -> None:
    base = folder / "images"
    base.mkdir()
    for number in range(_IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4), np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(base / f"{number}.jpg", quality=50)
    for study, subject in studies.items():
        path = folder / study_path(subject, study)
        path.mkdir(parents=True)
        body = " ".join(rng.choices(_SENTENCES, k=8))
        path.with_suffix(".txt").write_text(
            f" FINAL REPORT\n FINDINGS:\n\n {body}\n\n IMPRESSION: No change.\n"
        )
    for number, (subject, study, dicom, _) in enumerate(everything):
        os.link(base / f"{number % _IMAGES}.jpg", folder / f"{study_path(subject, study)}/{dicom}.jpg")


def read_lists(folder: str, name: str) -> None:
    """Prints time and memory of `Dataset.splits`."""
    dataset, _, variant = name.partition(":")
    before = _peak()
    began, worked = time.perf_counter(), time.process_time()
    splits = registry.get(dataset)(None, variant).splits(SourceFolder(folder))
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    counts = ", ".join(f"{split} {len(content.items):,}" for split, content in splits.items())
    print(f"{name}: lists read in {seconds:.1f} s ({worked:.1f} s of a core); {counts}")
    print(f"  peak {_peak():,} MiB, of which {before:,} before", flush=True)


def build(folder: str, name: str, out: str, processes: int) -> None:
    """Prints time and memory of a build, of opening it and of one shuffled pass over it."""
    dataset, _, variant = name.partition(":")
    options = builder.BuildOptions(processes=processes)
    began = time.perf_counter()
    built = builder.prepare(registry.get(dataset)(None, variant), folder, out, options)
    seconds = time.perf_counter() - began
    records = {split: content["records"] for split, content in built.info["splits"].items()}
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
    print(f"{name}: built in {seconds:.0f} s with {processes} processes, {records}")
    print(f"  peak {_peak():,} MiB here and at most {children:,} MiB in each process", flush=True)
    began = time.perf_counter()
    source = ExampleSource(built.folder, "train")
    opened = time.perf_counter() - began
    order = [int(place or 0) for place in grain.MapDataset.range(len(source)).shuffle(seed=0)]
    began = time.perf_counter()
    read = sum(len(source[place].images) for place in order)
    seconds = time.perf_counter() - began
    print(
        f"  opened in {opened:.2f} s; {read:,} images in shuffled order in {seconds:.0f} s, "
        f"peak {_peak():,} MiB"
    )


def _peak() -> int:
    """Largest resident memory of this program so far, in MiB; `getrusage` counts what started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "mimic_scale"))
    parser.add_argument("--dataset", action="append", help="default: all, or with --build none")
    parser.add_argument("--build", help="dataset that is built")
    parser.add_argument("--out", help="of the build (FOLDER_built)")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(argv)
    folder = Path(options.folder)
    done = folder / "done"
    if not done.exists():
        began = time.perf_counter()
        folder.mkdir(parents=True)
        make_source(folder)
        done.touch()
        print(f"source written in {time.perf_counter() - began:.0f} s", flush=True)
    everything = ["mimic_cxr_class", "mimic_cxr_reports", "mimic_cxr_reports:pooled", "mimic_annotation"]
    everything += ["medical_diff_vqa", "medical_diff_vqa:difference"]
    spawn = multiprocessing.get_context("spawn")
    for name in options.dataset or ([] if options.build else everything):
        child = spawn.Process(target=read_lists, args=(str(folder), name))
        child.start()
        child.join()
    if options.build:
        build(str(folder), options.build, options.out or f"{options.folder}_built", options.processes)


if __name__ == "__main__":
    main(sys.argv[1:])
