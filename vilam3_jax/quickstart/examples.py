"""The examples of the quickstart's datasets, from a folder of samples: pairs, captions, reports, dialogues.

Splits are by `Sample.split_group`, never by slice. Images are copied beside the records, so the output folder
is self-contained. Expert results are joined from the annotation store when a record is loaded.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from etils import epath

from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.examples import IMAGE_MARKER, Example, ExpertRequest, ImageRef, Turn
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.images import encode_png, load_pixels
from vilam3_jax.datasets.reports import generated_reports, read_reports
from vilam3_jax.datasets.samples import MODALITY_CODES, Sample, asset, read_samples
from vilam3_jax.datasets.slices import MIN_PIXELS, PLANE_OF_AXIS
from vilam3_jax.quickstart.captions import captions, pair_caption
from vilam3_jax.quickstart.films import film_facts, film_variant
from vilam3_jax.quickstart.lookups import lookups
from vilam3_jax.quickstart.questions import Facts, Question, QuestionMaker, dialogue_turns
from vilam3_jax.quickstart.volumes import BRAIN_EXPERT, LabelledVolume
from vilam3_jax.runtime import paths

VERSION = 2
DATASETS = ("pairs", "captions", "reports", "lookups", "instruct")
SPLITS = ("train", "heldout")
REPORTS_ASSET = "iu_reports"
GENERATED = "generated"  # origin of phantoms

# Public samples need no secret. The salt keeps the key from being read as the subject's name.
_PATIENT_SALT = b"vilam3 quickstart"
# Fixed, not drawn, so that each kind of question has a held-out subject: organs, reference brain mask, both
# tumor masks.
_HELD_OUT_GROUPS = {"totalseg-2", "totalseg-3", "mni152", "pyradiomics-lung1", "pyradiomics-brain2"}
_TRAIN_GROUPS = {"totalseg-1", "totalseg-4", "ct-head-atlas", "pydeface-mean"}
_TRAIN_GROUPS |= {"pyradiomics-lung2", "pyradiomics-brain1"}
_HELD_OUT_FILMS = 0.6  # of the patients of a class: two classes of eight patients give ten clusters
_HELD_OUT_REPORTS = 0.1
# Usual (centre, width) in HU per region. With one window for each of a few training scans, a model learns
# that a chest in another window is no CT. Nobody views a head in the lung window, so each region has its own.
_CT_WINDOWS = {
    "head": ((40.0, 80.0), (35.0, 120.0), (80.0, 200.0)),
    "chest": ((-600.0, 1500.0), (50.0, 400.0), (40.0, 250.0)),
    "abdomen": ((50.0, 400.0), (40.0, 250.0), (60.0, 600.0), (400.0, 1800.0)),
}
_HELD_OUT_QUESTIONS = 9  # most in a dialogue
_MAX_CALLS = 1  # in a dialogue; questions after them are answered from the results so far
_MAX_ROUNDS = 6  # over the images of a rare expert, so that calling it can be learned
# Kinds of questions that call an expert: one with more of them needs more dialogues. "" is for tumors that no
# expert can see; not to call one is as hard as two kinds.
_KINDS_OF_CALLS = {"ORGANS": 3, "BRAINTUMOR": 3, "BRAINSEG": 2, "PNEUMONIA": 1, "": 2}
# Slices in which the brain is certainly visible or not, read by eye: (plane, slices, visible).
_READ_BY_EYE: Mapping[str, tuple[tuple[str, range, bool], ...]] = {
    "pyradiomics_brain1": (("axial", range(0, 2), False), ("axial", range(3, 23), True)),
    "pyradiomics_brain2": (("axial", range(0, 1), False), ("axial", range(3, 21), True)),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """Amount of data.

    Attributes:
      slices, heldout_slices: per plane of a training or held-out volume.
      films: training images per class of films, augmented copies included.
      captions, dialogues: per training image.
      reports, lookups: numbers of training reports (at most) and of training look-ups.
      questions: most questions in a training dialogue.
    """

    slices: int
    heldout_slices: int
    films: int
    captions: int
    dialogues: int
    reports: int
    lookups: int
    questions: int = 9


SIZES = {
    "smoke": Size(slices=3, heldout_slices=2, films=2, captions=1, dialogues=1, reports=40, lookups=40),
    "default": Size(
        slices=16,
        heldout_slices=12,
        films=24,
        captions=2,
        dialogues=2,
        reports=600,
        lookups=1200,
        questions=4,
    ),
    "full": Size(slices=72, heldout_slices=20, films=40, captions=3, dialogues=3, reports=1800, lookups=2400),
}


@dataclasses.dataclass(frozen=True)
class LabelledImage:
    """One image with everything that captions and dialogues need.

    Attributes:
      key, ref: unique name, and the copy below the output folder.
      facts, structures: known facts, and visible organs, largest first.
      sample: its sample.
      input_key: content key of the expert's input: the whole volume, or the unaltered film.
    """

    key: str
    ref: ImageRef
    facts: Facts
    structures: tuple[str, ...]
    sample: Sample
    input_key: str


class ExampleBuilder:
    """Reads a folder of samples, copies its images below `out` and yields the examples.

    Attributes:
      samples, splits: the samples, and split group → split.
      skipped, notes: reason → number of skipped parts, and note → number of volumes.
    """

    def __init__(
        self,
        source: epath.Path,
        out: epath.Path,
        size: Size,
        seed: int,
        annotations: AnnotationStore | None = None,
    ):
        """Reads the samples of `source` and assigns the splits; equal seeds give equal records.

        With `annotations`, training heads without a reference mask get brain questions labelled from the
        brain expert's own record (`label_source` says so). Held-out labels never come from an expert.

        Raises:
          UserError: the samples cannot be read.
        """
        self.source, self.out, self.size, self.seed = source, out, size, seed
        self.annotations = annotations
        self.samples = list(read_samples(source))
        self.splits = assign_splits(self.samples, seed)
        self.skipped: collections.Counter[str] = collections.Counter()
        self.notes: collections.Counter[str] = collections.Counter()

    def examples(self) -> Iterator[tuple[str, str, Example]]:
        """Yields (dataset, split, example)."""
        images: dict[str, list[LabelledImage]] = {split: [] for split in SPLITS}
        film_copies = self._film_copies()
        for sample in self.samples:
            split = self.splits[sample.split_group]
            rng = self._rng("slices", sample.name)
            if sample.kind == "film":
                images[split] += self._film(sample, film_copies[sample.name], rng)
            else:
                images[split] += self._volume(sample, split, rng)
        for split in SPLITS:
            yield from self._captioned(images[split], split)
            yield from self._dialogues(images[split], split)
        yield from self._reports()
        for split in SPLITS:
            count = self.size.lookups if split == "train" else max(4, self.size.lookups // 20)
            for example in lookups(count, self._rng("lookups", split), split):
                yield "lookups", split, example

    def _rng(self, *parts: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *parts))))

    def _film_copies(self) -> dict[str, int]:
        """Number of images per film: classes become equally frequent in training."""
        classes: dict[tuple, list[str]] = {}
        for sample in self.samples:
            if sample.kind == "film" and self.splits[sample.split_group] == "train":
                classes.setdefault((sample.body_region, sample.class_name), []).append(sample.name)
        copies = {sample.name: 1 for sample in self.samples}
        for names in classes.values():
            for position, name in enumerate(names):
                copies[name] = max(1, len(range(position, self.size.films, len(names))))
        return copies

    def _film(self, sample: Sample, copies: int, rng: random.Random) -> list[LabelledImage]:
        pixels = load_pixels(sample.path)
        input_key = image_key(pixels)  # augmented copies share the expert's result for the original
        facts = film_facts(sample)
        images = []
        for number in range(copies):
            path = f"images/{sample.name}" + (f"_copy{number}.png" if number else _suffix(sample.path))
            if number:
                data = encode_png(film_variant(pixels, rng, mirror=sample.body_region == "head"))
            elif sample.path.suffix == ".dcm":
                # Loaders decode ordinary images; a DICOM header would also carry data that nobody needs.
                path, data = f"images/{sample.name}.png", encode_png(pixels)
            else:
                data = sample.path.read_bytes()
            paths.write_bytes_atomic(self.out / path, data)
            key = f"{sample.name}/{number}"
            images.append(LabelledImage(key, ImageRef(path=path), facts, (), sample, input_key))
        return images

    def _volume(self, sample: Sample, split: str, rng: random.Random) -> list[LabelledImage]:
        labelled = LabelledVolume.load(sample)
        self.notes.update(labelled.volume.notes)
        path = f"images/{sample.name}{_suffix(sample.path)}"
        for file in sorted(sample.path.iterdir()) if sample.path.is_dir() else [sample.path]:
            name = path if file == sample.path else f"{path}/{file.name}"
            paths.write_bytes_atomic(self.out / name, file.read_bytes())
        record = self._brain_record(labelled, split)
        count = self.size.slices
        if split != "train":  # the scans of one subject share the number
            same = [s for s in self.samples if s.split_group == sample.split_group and s.kind != "film"]
            count = max(2, self.size.heldout_slices // len(same))
        images = []
        for axis, index in labelled.slices(count, rng):
            facts = _read_by_eye(sample, axis, index, labelled.facts(axis, index))
            if record is not None:
                facts = _from_record(facts, record, axis, index)
            window = self._window(sample, split, rng)
            modality = MODALITY_CODES[sample.kind]
            ref = ImageRef(path=path, axis=axis, index=index, window=window, modality=modality)
            key = f"{sample.name}/{PLANE_OF_AXIS[axis]}/{index}"
            names = tuple(labelled.structures(axis, index))
            images.append(LabelledImage(key, ref, facts, names, sample, labelled.volume.content_key))
        if not images:
            self.skipped[f"volume {sample.name}: no slice with enough of the body"] += 1
        return images

    def _window(self, sample: Sample, split: str, rng: random.Random) -> tuple[float, float] | None:
        """The scan's own window; for about half of the training slices of a CT another usual one."""
        if split != "train" or sample.kind != "ct" or rng.random() < 0.5:
            return sample.window
        usual = _CT_WINDOWS.get(sample.body_region, ())
        return rng.choice([window for window in usual if window != sample.window] or [sample.window])

    def _brain_record(self, labelled: LabelledVolume, split: str) -> tuple[list[np.ndarray], float] | None:
        """(pixels per slice along each axis, ml) of the expert's own brain mask, for training only."""
        sample = labelled.sample
        wanted = split == "train" and sample.kind == "mr" and sample.body_region == "head"
        if not wanted or "brain" in labelled.volumes_ml:
            return None
        found = None
        if self.annotations is not None:
            found = self.annotations.get(labelled.volume.content_key, BRAIN_EXPERT, "")
        if found is None or found.status != "ok" or found.labels is None:
            self.skipped[f"{sample.name}: no {BRAIN_EXPERT} record to ask about the brain"] += 1
            return None
        mask = found.label_map() > 0
        pixels = [mask.sum(axis=tuple(i for i in range(3) if i != axis)) for axis in range(3)]
        return pixels, sum(segment.volume_ml for segment in found.segments)

    def _captioned(self, images: list[LabelledImage], split: str) -> Iterator[tuple[str, str, Example]]:
        for image in images:
            count = self.size.captions if split == "train" else 1
            rng = self._rng("captions", image.key)
            texts = {
                ("pairs", "pair"): [pair_caption(image.facts)],
                ("captions", "caption"): captions(image.facts, image.structures, rng, count),
            }
            for (dataset, form), of_dataset in texts.items():
                for number, text in enumerate(of_dataset):
                    turns = (Turn("user", IMAGE_MARKER), Turn("assistant", text, True))
                    meta = self._meta(dataset, image, split, [])
                    identifier = f"{dataset}/{image.key}/{number}"
                    yield dataset, split, Example(identifier, form, (image.ref,), turns, (), meta)

    def _dialogues(self, images: list[LabelledImage], split: str) -> Iterator[tuple[str, str, Example]]:
        training = split == "train"
        limit = self.size.questions if training else _HELD_OUT_QUESTIONS
        maker = QuestionMaker(self._rng("questions", split), training=training, limit=limit)
        asked: dict[str, float] = collections.defaultdict(float)
        for number in range(_MAX_ROUNDS * self.size.dialogues if training else 1):
            # Shuffled: answers are balanced question by question, and neighbouring slices are alike.
            order = [image for image in images if self._in_round(number, image.facts, asked)]
            self._rng("order", split, number).shuffle(order)
            for image in order:
                example = self._dialogue(image, split, number, maker.dialogue(image.facts))
                unaided = (
                    _tumor_without_expert(image.facts) and "tumor_present" in example.meta["question_types"]
                )
                if number == 0 or unaided or example.expert_requests:
                    yield "instruct", split, example
                if unaided or example.expert_requests:
                    name = image.facts.expert or ""
                    asked[name] += 1 / _KINDS_OF_CALLS[name]
        for reason, count in maker.unasked.items():
            self.skipped[f"{split}: question not asked, {reason}"] += count

    def _in_round(self, number: int, facts: Facts, asked: Mapping[str, float]) -> bool:
        """All images are in the first round of dialogues, those with an expert in `size.dialogues` rounds.

        Later rounds have those whose expert has fewer calls of a kind than the one with most, and scans whose
        tumor no expert can see: that a question about tumors does not always call one must be learned, too.
        """
        if number == 0 or (facts.expert is None and not _tumor_without_expert(facts)):
            return number == 0
        if number < self.size.dialogues:
            return True
        return asked.get(facts.expert or "", 0) < 0.9 * max(asked.values(), default=0)

    def _dialogue(self, image: LabelledImage, split: str, number: int, questions: list[Question]) -> Example:
        facts = image.facts
        helped = [i for i, question in enumerate(questions) if question.expert is not None]
        requests = tuple(
            # A result precedes the answer that it helps with.
            ExpertRequest(str(facts.expert), facts.expert_args, before_turn=2 * i + 1, policy="optional")
            for i in helped[:_MAX_CALLS]
        )
        meta = self._meta("instruct", image, split, questions)
        identifier = f"instruct/{image.key}/{number}"
        return Example(identifier, "conversation", (image.ref,), dialogue_turns(questions), requests, meta)

    def _meta(self, dataset: str, image: LabelledImage, split: str, questions: list[Question]) -> dict:
        sample, facts = image.sample, image.facts
        return {
            "dataset": f"quickstart/{dataset}",
            "split": split,
            "sample": sample.name,
            "modality": facts.modality,
            "plane": facts.plane or "",
            "region": facts.region,
            "patient": hashed(sample.patient),
            "group": hashed(sample.split_group),
            "licence": sample.licence,
            "origin": sample.origin,
            "input_key": image.input_key,
            "question_types": [question.type for question in questions],
            "label_source": [question.label_source for question in questions],
            "qa": [vars(question) | {"options": list(question.options)} for question in questions],
        }

    def _reports(self) -> Iterator[tuple[str, str, Example]]:
        if all(sample.origin == GENERATED for sample in self.samples):  # a smoke run has no network
            reports, origin = generated_reports(self.size.reports * 2, self._rng("report texts")), GENERATED
        else:
            reports, skipped = read_reports(asset(self.source, REPORTS_ASSET))
            self.skipped += skipped
            origin = "Indiana University chest X-ray collection"
        self._rng("reports").shuffle(reports)
        held_out = max(1, round(min(len(reports), self.size.reports) * _HELD_OUT_REPORTS))
        parts = {"heldout": reports[:held_out], "train": reports[held_out:][: self.size.reports]}
        self.skipped["report: more than this size takes"] += len(reports) - sum(map(len, parts.values()))
        for split in SPLITS:
            for report in parts[split]:
                meta = {
                    "dataset": "quickstart/reports",
                    "split": split,
                    "modality": "X-ray",
                    "region": "chest",
                    "patient": hashed(report.id),
                    "group": hashed(report.id),
                    "licence": report.licence,
                    "origin": origin,
                }
                turns = (Turn("assistant", report.text, True),)
                yield "reports", split, Example(f"reports/{report.id}", "document", (), turns, (), meta)


def _tumor_without_expert(facts: Facts) -> bool:
    return facts.expert is None and facts.tumor is not None and facts.modality == "CT"


def hashed(patient: str) -> str:
    """A key that groups the records of a subject without naming it."""
    return hashlib.blake2b(patient.encode(), key=_PATIENT_SALT, digest_size=8).hexdigest()


def _suffix(path: epath.Path) -> str:
    """The file extension, `.nii.gz` included; empty for the folder of a DICOM series."""
    if path.is_dir():
        return ""
    return ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix


def _read_by_eye(sample: Sample, axis: int, index: int, facts: Facts) -> Facts:
    for plane, slices, visible in _READ_BY_EYE.get(sample.name, ()) if facts.brain is None else ():
        if plane == PLANE_OF_AXIS[axis] and index in slices:
            return dataclasses.replace(facts, brain=visible, brain_source="slice range read by eye")
    return facts


def _from_record(facts: Facts, record: tuple[list[np.ndarray], float], axis: int, index: int) -> Facts:
    pixels, millilitres = record
    count, source = int(pixels[axis][index]), f"{BRAIN_EXPERT} record"
    if facts.brain is None and (count == 0 or count >= MIN_PIXELS):
        facts = dataclasses.replace(facts, brain=count > 0, brain_source=source, brain_oracle=True)
    if count >= MIN_PIXELS:
        facts = dataclasses.replace(
            facts, brain_ml=millilitres, brain_volume_source=source, brain_volume_oracle=True
        )
    return facts


def assign_splits(samples: Iterable[Sample], seed: int) -> dict[str, str]:
    """Split group → `train` or `heldout`.

    Films of one class are drawn, most of them held out, so that there are enough patients for confidence
    intervals. Volumes are few: known groups have a fixed split; of others with equal kind, region and label
    source, half are held out. A group that is alone in its stratum is in `train`.
    """
    strata: dict[str, tuple] = {}
    for sample in samples:
        stratum = (sample.kind, sample.body_region, sample.class_name or "", sample.label_source or "")
        # The labelled sample of a group decides its stratum.
        known = strata.get(sample.split_group)
        if known is None or (not known[3] and stratum[3]):
            strata[sample.split_group] = stratum
    members: dict[tuple, list[str]] = {}
    for group, stratum in sorted(strata.items()):
        members.setdefault(stratum, []).append(group)
    for stratum in [s for s, groups in members.items() if s[0] == "film" and len(groups) == 1]:
        # Groups that are alone in their class are drawn together, by region.
        members.setdefault((*stratum[:2], "alone", ""), []).extend(members.pop(stratum))
    splits: dict[str, str] = {}
    for stratum, groups in sorted(members.items()):
        fixed = [g for g in groups if g in _HELD_OUT_GROUPS | _TRAIN_GROUPS]
        splits |= {g: "heldout" if g in _HELD_OUT_GROUPS else "train" for g in fixed}
        free = [g for g in groups if g not in fixed]
        random.Random(f"{seed}/split/{stratum}").shuffle(free)
        if stratum[0] == "film":
            count = min(int(np.ceil(_HELD_OUT_FILMS * len(free))), len(free) - 1)
        else:
            count = len(free) // 2
        splits |= {g: "heldout" if i < count else "train" for i, g in enumerate(free)}
    return splits
