"""The quickstart's datasets, made from a folder of samples: pairs, captions, reports and dialogues.

Everything is split by `Sample.split_group`, never by slice. The folder it writes is complete in
itself: the images are copied beside the records. Experts' answers are not in it; they are joined
from the annotation store when a record is loaded.
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
from vilam3_jax.data.images import encode_png, load_film
from vilam3_jax.datasets.reports import Report, generated_reports, read_reports
from vilam3_jax.datasets.samples import MODALITY_CODES, Sample, asset, read_samples
from vilam3_jax.datasets.slices import MIN_PIXELS, PLANE_OF_AXIS
from vilam3_jax.errors import UserError
from vilam3_jax.quickstart import captions as wording
from vilam3_jax.quickstart.films import film_facts, film_variant
from vilam3_jax.quickstart.questions import Facts, Question, QuestionMaker, dialogue_turns
from vilam3_jax.quickstart.volumes import BRAIN_EXPERT, LabelledVolume

VERSION = 1
DATASETS = ("pairs", "captions", "reports", "instruct")
SPLITS = ("train", "heldout")
REPORTS_ASSET = "iu_reports"
GENERATED = "generated"  # the origin of phantoms

# Public samples need no secret: the salt keeps the key from being read as the subject's name.
_PATIENT_SALT = b"vilam3 quickstart"
# Only the held-out subjects count, so these are fixed and not drawn: every kind of question has a
# subject of its own there (organs, reference brain mask, both tumour masks).
_HELD_OUT_GROUPS = frozenset(
    {"totalseg-2", "totalseg-3", "mni152", "pyradiomics-lung1", "pyradiomics-brain2"}
)
_TRAIN_GROUPS = frozenset(
    {
        "totalseg-1",
        "totalseg-4",
        "ct-head-atlas",
        "pyradiomics-lung2",
        "pyradiomics-brain1",
        "pydeface-mean",
    }
)
_HELD_OUT_FILMS = 0.6  # of the patients of a class: two classes of eight give ten clusters
_HELD_OUT_REPORTS = 0.1
# (centre, width) in HU that are usual for a region. A few training scans in one window each would teach that
# a chest in another window is no CT; a head in the window for lungs is a picture that nobody takes.
_CT_WINDOWS = {
    "head": ((40.0, 80.0), (35.0, 120.0), (80.0, 200.0)),
    "chest": ((-600.0, 1500.0), (50.0, 400.0), (40.0, 250.0)),
    "abdomen": ((50.0, 400.0), (40.0, 250.0), (60.0, 600.0), (400.0, 1800.0)),
}
_MOST_ROUNDS = 4  # over the pictures of an expert that has few, so that choosing it can be learned
# Slices of one sample in which the brain surely is, or surely is not, by eye: (plane, slices, answer).
_READ_BY_EYE: Mapping[str, tuple[tuple[str, range, bool], ...]] = {
    "pyradiomics_brain1": (("axial", range(0, 2), False), ("axial", range(3, 23), True)),
    "pyradiomics_brain2": (("axial", range(0, 1), False), ("axial", range(3, 21), True)),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much to make.

    Attributes:
      slices: slices per plane of a training volume.
      heldout_slices: the same for a held-out volume.
      films: altered training copies per class of films, the originals included.
      captions: wordings per training image.
      dialogues: dialogues per training image.
      reports: most training reports.
      questions: most questions in a dialogue.
    """

    slices: int
    heldout_slices: int
    films: int
    captions: int
    dialogues: int
    reports: int
    questions: int = 9


SIZES = {
    "smoke": Size(slices=3, heldout_slices=2, films=2, captions=1, dialogues=1, reports=40),
    "default": Size(
        slices=24, heldout_slices=12, films=12, captions=2, dialogues=2, reports=600, questions=6
    ),
    "full": Size(slices=72, heldout_slices=20, films=40, captions=3, dialogues=3, reports=1800),
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image, ready to be talked about.

    Attributes:
      key: unique within the build.
      ref: the copy below the output folder.
      facts: what is known of it.
      structures: visible organs, largest first.
      sample: where it comes from.
      input_key: content key of what the expert saw: the whole volume, or the film as it was taken.
    """

    key: str
    ref: ImageRef
    facts: Facts
    structures: tuple[str, ...]
    sample: Sample
    input_key: str


class Build:
    """One run of the builder: reads `source`, copies images below `out`, makes the examples."""

    def __init__(
        self,
        source: epath.Path,
        out: epath.Path,
        size: Size,
        seed: int,
        annotations: AnnotationStore | None = None,
    ):
        """Reads the list of samples and decides the split.

        Args:
          source: folder written by the samples or the phantoms command.
          out: where the images go.
          size: how much to make.
          seed: of every choice; the same seed gives the same records.
          annotations: if given, training scans of heads without a reference mask get brain questions labelled
            from the brain expert's own record (`label_source` says so). Held-out labels never come from an
            expert.

        Raises:
          UserError: the samples cannot be read.
        """
        self.source, self.out, self.size, self.seed = source, out, size, seed
        self.annotations = annotations
        self.samples = list(read_samples(source))
        self.splits = assign_splits(self.samples, seed)
        self.left_out: collections.Counter[str] = collections.Counter()
        self.notes: collections.Counter[str] = collections.Counter()

    def examples(self) -> Iterator[tuple[str, str, Example]]:
        """Yields (dataset, split, example)."""
        pictures: dict[str, list[Picture]] = {split: [] for split in SPLITS}
        film_copies = self._film_copies()
        for sample in self.samples:
            split = self.splits[sample.split_group]
            rng = self._rng("slices", sample.name)
            if sample.kind == "film":
                made = self._film(sample, film_copies[sample.name], rng)
            else:
                made = self._volume(sample, split, rng)
            pictures[split] += made
        for split in SPLITS:
            yield from self._described(pictures[split], split)
            yield from self._dialogues(pictures[split], split)
        yield from self._reports()

    def _rng(self, *parts: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *parts))))

    def _film_copies(self) -> dict[str, int]:
        """How many pictures of each film: classes are made equally frequent in training."""
        classes: dict[tuple, list[str]] = {}
        for sample in self.samples:
            if sample.kind == "film" and self.splits[sample.split_group] == "train":
                classes.setdefault((sample.body_region, sample.class_name), []).append(sample.name)
        copies = {sample.name: 1 for sample in self.samples}
        for names in classes.values():
            for position, name in enumerate(names):
                copies[name] = max(1, len(range(position, self.size.films, len(names))))
        return copies

    def _film(self, sample: Sample, copies: int, rng: random.Random) -> list[Picture]:
        image = load_film(sample.path)
        # The expert sees the film once, as it was taken; altered copies of it share what it said.
        input_key = image_key(image)
        facts = film_facts(sample)
        pictures = []
        for number in range(copies):
            path = f"images/{sample.name}" + (f"_copy{number}.png" if number else _suffix(sample.path))
            if number:
                shown = film_variant(image, rng, mirror=sample.body_region == "head")
                self._write(path, encode_png(shown))
            elif sample.path.suffix == ".dcm":
                # Loaders decode pictures; a film's DICOM header would also carry what nobody needs.
                path = f"images/{sample.name}.png"
                self._write(path, encode_png(image))
            else:
                self._write(path, sample.path.read_bytes())
            key = f"{sample.name}/{number}"
            pictures.append(Picture(key, ImageRef(path=path), facts, (), sample, input_key))
        return pictures

    def _volume(self, sample: Sample, split: str, rng: random.Random) -> list[Picture]:
        labelled = LabelledVolume.load(sample)
        self.notes.update(labelled.volume.notes)
        path = f"images/{sample.name}{_suffix(sample.path)}"
        self._copy(sample.path, path)
        record = self._brain_record(labelled, split)
        count = self.size.slices if split == "train" else self._heldout_count(sample)
        pictures = []
        for axis, index in labelled.slices(count, rng):
            facts = _read_by_eye(sample, axis, index, labelled.facts(axis, index))
            if record is not None:
                facts = _from_record(facts, record, axis, index)
            window = self._window(sample, split, rng)
            modality = MODALITY_CODES[sample.kind]
            ref = ImageRef(path=path, axis=axis, index=index, window=window, modality=modality)
            key = f"{sample.name}/{PLANE_OF_AXIS[axis]}/{index}"
            names = tuple(labelled.structures(axis, index))
            pictures.append(Picture(key, ref, facts, names, sample, labelled.volume.content_key))
        if not pictures:
            self.left_out[f"volume {sample.name}: no slice with enough of the body"] += 1
        return pictures

    def _window(self, sample: Sample, split: str, rng: random.Random) -> tuple[float, float] | None:
        """The scan's own window; about half of the training slices of a CT in another one that is usual."""
        if split != "train" or sample.kind != "ct" or rng.random() < 0.5:
            return sample.window
        usual = _CT_WINDOWS.get(sample.body_region, ())
        return rng.choice([window for window in usual if window != sample.window] or [sample.window])

    def _heldout_count(self, sample: Sample) -> int:
        """Slices per plane; several scans of the same subject share its number."""
        same = [s for s in self.samples if s.split_group == sample.split_group and s.kind != "film"]
        return max(2, self.size.heldout_slices // len(same))

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
            self.left_out[f"{sample.name}: no {BRAIN_EXPERT} record to ask about the brain"] += 1
            return None
        mask = found.label_map() > 0
        pixels = [mask.sum(axis=tuple(i for i in range(3) if i != axis)) for axis in range(3)]
        return pixels, sum(segment.volume_ml for segment in found.segments)

    def _described(self, pictures: list[Picture], split: str) -> Iterator[tuple[str, str, Example]]:
        for picture in pictures:
            text = wording.pair_caption(picture.facts)
            yield "pairs", split, self._caption("pairs", "pair", picture, split, 0, text)
            count = self.size.captions if split == "train" else 1
            rng = self._rng("captions", picture.key)
            texts = wording.captions(picture.facts, picture.structures, rng, count)
            for number, text in enumerate(texts):
                yield "captions", split, self._caption("captions", "caption", picture, split, number, text)

    def _caption(
        self, dataset: str, form: str, picture: Picture, split: str, number: int, text: str
    ) -> Example:
        turns = (Turn("user", IMAGE_MARKER), Turn("assistant", text, True))
        meta = self._meta(dataset, picture, split, [])
        return Example(f"{dataset}/{picture.key}/{number}", form, (picture.ref,), turns, (), meta)

    def _dialogues(self, pictures: list[Picture], split: str) -> Iterator[tuple[str, str, Example]]:
        training = split == "train"
        maker = QuestionMaker(self._rng("questions", split), training=training, limit=self.size.questions)
        made: collections.Counter[str] = collections.Counter()
        for number in range(_MOST_ROUNDS * self.size.dialogues if training else 1):
            # Mixed order: balance is kept question by question, and neighbours are alike.
            order = [p for p in pictures if self._asked_in(number, p.facts.expert, made)]
            self._rng("order", split, number).shuffle(order)
            for picture in order:
                example = self._dialogue(picture, split, number, maker.dialogue(picture.facts))
                if number < self.size.dialogues or example.expert_requests:
                    made.update(request.expert for request in example.expert_requests)
                    yield "instruct", split, example
        for reason, count in maker.unasked.items():
            self.left_out[f"{split}: question not asked, {reason}"] += count

    def _asked_in(self, number: int, expert: str | None, made: Mapping[str, int]) -> bool:
        """Whether a picture with this expert, or none, is asked about in a round.

        All are in the first; those with an expert in as many as the size says; later those whose expert
        was met less than half as often as the most frequent one.
        """
        if number == 0 or expert is None:
            return number == 0
        return number < self.size.dialogues or made.get(expert, 0) < 0.5 * max(made.values(), default=0)

    def _dialogue(self, picture: Picture, split: str, number: int, questions: list[Question]) -> Example:
        facts = picture.facts
        requests = ()
        first = next((i for i, question in enumerate(questions) if question.expert is not None), None)
        if first is not None:
            # The expert speaks before the answer to the first question that it helps with.
            request = ExpertRequest(
                str(facts.expert), facts.expert_args, before_turn=2 * first + 1, policy="optional"
            )
            requests = (request,)
        return Example(
            f"instruct/{picture.key}/{number}",
            "conversation",
            (picture.ref,),
            dialogue_turns(questions),
            requests,
            self._meta("instruct", picture, split, questions),
        )

    def _meta(self, dataset: str, picture: Picture, split: str, questions: list[Question]) -> dict:
        sample, facts = picture.sample, picture.facts
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
            "input_key": picture.input_key,
            "question_types": [question.type for question in questions],
            "label_source": [question.label_source for question in questions],
            "qa": [question.to_meta() for question in questions],
        }

    def _reports(self) -> Iterator[tuple[str, str, Example]]:
        reports, origin = self._report_texts()
        self._rng("reports").shuffle(reports)
        held_out = max(1, round(min(len(reports), self.size.reports) * _HELD_OUT_REPORTS))
        parts = {"heldout": reports[:held_out], "train": reports[held_out:][: self.size.reports]}
        self.left_out["report: more than this size takes"] += len(reports) - sum(map(len, parts.values()))
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

    def _report_texts(self) -> tuple[list[Report], str]:
        if all(sample.origin == GENERATED for sample in self.samples):
            # Phantoms come without texts, and real ones would need the network.
            return generated_reports(self.size.reports * 2, self._rng("report texts")), GENERATED
        reports, left_out = read_reports(asset(self.source, REPORTS_ASSET))
        self.left_out += left_out
        return reports, "Indiana University chest X-ray collection"

    def _write(self, path: str, data: bytes) -> None:
        target = self.out / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.write_bytes(data)
        except OSError as error:
            raise UserError(
                f"{target}: cannot be written ({error}); free space or choose another folder"
            ) from error

    def _copy(self, source: epath.Path, path: str) -> None:
        if source.is_dir():
            for child in sorted(source.iterdir()):
                self._write(f"{path}/{child.name}", child.read_bytes())
        else:
            self._write(path, source.read_bytes())


def hashed(patient: str) -> str:
    """A key that groups the records of a subject without naming it."""
    return hashlib.blake2b(patient.encode(), key=_PATIENT_SALT, digest_size=8).hexdigest()


def _suffix(path: epath.Path) -> str:
    """`.nii.gz` whole; nothing for the folder of a DICOM series."""
    if path.is_dir():
        return ""
    return ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix


def _read_by_eye(sample: Sample, axis: int, index: int, facts: Facts) -> Facts:
    if facts.brain is not None:
        return facts
    for plane, slices, answer in _READ_BY_EYE.get(sample.name, ()):
        if plane == PLANE_OF_AXIS[axis] and index in slices:
            return dataclasses.replace(facts, brain=answer, brain_source="slice range read by eye")
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
    """Decides for every split group, as a whole, on which side it is.

    Films of one class are drawn, most of them held out, so that intervals over patients exist. Volumes are
    few: the known ones have a fixed side, of others every second group with the same kind, region and label
    source is held out.

    Args:
      samples: all samples.
      seed: of the draw.

    Returns:
      split group -> `train` or `heldout`; a group that has no other to be drawn with trains.
    """
    strata: dict[str, tuple] = {}
    for sample in samples:
        stratum = (sample.kind, sample.body_region, sample.class_name or "", sample.label_source or "")
        # A group's labelled member says what it is good for.
        known = strata.get(sample.split_group)
        if known is None or (not known[3] and stratum[3]):
            strata[sample.split_group] = stratum
    members: dict[tuple, list[str]] = {}
    for group, stratum in sorted(strata.items()):
        members.setdefault(stratum, []).append(group)
    for stratum in [s for s, groups in members.items() if s[0] == "film" and len(groups) == 1]:
        # Alone in its class: drawn together with the others of its region that are.
        members.setdefault((*stratum[:2], "alone", ""), []).extend(members.pop(stratum))
    out: dict[str, str] = {}
    for stratum, groups in sorted(members.items()):
        fixed = [g for g in groups if g in _HELD_OUT_GROUPS | _TRAIN_GROUPS]
        out |= {g: "heldout" if g in _HELD_OUT_GROUPS else "train" for g in fixed}
        free = [g for g in groups if g not in fixed]
        random.Random(f"{seed}/split/{stratum}").shuffle(free)
        if stratum[0] == "film":
            count = min(int(np.ceil(_HELD_OUT_FILMS * len(free))), len(free) - 1)
        else:
            count = len(free) // 2
        out |= {g: "heldout" if i < count else "train" for i, g in enumerate(free)}
    return out
