"""The words of an expert exchange: how a model calls, and how it is told what experts said.

`PLAIN` is this project's own wording. `VILA_M3` is the one that the released checkpoints were trained on,
kept to the letter, slips included.

This module imports neither jax nor flax nor torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from vilam3_jax.data.examples import IMAGE_MARKER
from vilam3_jax.data.experts.brats_legend import brats_legend
from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.grammar import Call, joined, write_calls
from vilam3_jax.data.experts.labels import component_counts, is_lesion, visible_segments
from vilam3_jax.data.experts.overlays import legend, palette_of
from vilam3_jax.data.experts.record import THRESHOLD, Annotation, Verdict
from vilam3_jax.errors import UserError

_LONGEST = 200  # of a name or a sentence that an expert brings
# The modalities of cards, as images in a sentence.
IMAGE_OF = {"CT": "a CT image", "MRI": "an MRI image", "CXR": "a chest X-ray"}
_VILA_M3_INPUTS = {
    "CT": f" {IMAGE_MARKER}This is a CT image.\n",
    "MR": f"{IMAGE_MARKER}This is a MRI image.\n",
    "CR": f"{IMAGE_MARKER} This is a CXR image.\n",
    "DX": f"{IMAGE_MARKER} This is a CXR image.\n",
    "US": f"{IMAGE_MARKER}This is a US image.\n",
}
_ROLE_WORDS = {"t1c": "T1(contrast enhanced)", "t1": "T1", "t2": "T2", "flair": "FLAIR"}


@dataclasses.dataclass(frozen=True)
class Plane:
    """The slice of a volume that a model sees; nothing for a 2-D image."""

    axis: int | None = None
    index: int | None = None


class Wording(Protocol):
    """What differs between the two.

    Attributes:
      tells_figures: whether volumes and counts of labels are told.
    """

    tells_figures: bool

    def call(self, cards: Sequence[Card], calls: Sequence[Call]) -> str:
        """The assistant's turn that makes `calls`, of the experts `cards`."""
        ...

    def inputs(self, roles: Sequence[str], modality: str = "") -> str:
        """The image markers before a question, one for each role; `modality` is DICOM's code, if known."""
        ...

    def segmentation(self, annotation: Annotation, plane: Plane) -> str:
        """A label map on a slice, with one image marker."""
        ...

    def classification(self, annotation: Annotation, threshold: float = THRESHOLD) -> str:
        """Class probabilities; above `threshold` a class counts as present."""
        ...

    def told_probabilities(self, annotation: Annotation) -> Mapping[str, float]:
        """The probabilities that `classification` tells."""
        ...

    def failure(self, annotation: Annotation) -> str:
        """No result."""
        ...

    def question(self, question: str, tasks: Sequence[str]) -> str:
        """Asks again, after results of `tasks` (`segmentation`, `classification` or `failure`)."""
        ...


class _Plain:
    tells_figures = True

    def call(self, cards: Sequence[Card], calls: Sequence[Call]) -> str:
        modality = cards[0].modality
        what = IMAGE_OF.get(modality, f"an image of the modality {modality}")
        return f"This looks like {what}. Let me trigger {write_calls(calls)}."

    def inputs(self, roles: Sequence[str], modality: str = "") -> str:
        del modality
        if len(roles) == 1:
            return f"{IMAGE_MARKER}\n"
        return ", ".join(f"{_ROLE_WORDS.get(r, r)}: {IMAGE_MARKER}" for r in roles) + "\n"

    def segmentation(self, annotation: Annotation, plane: Plane) -> str:
        visible = told_labels(annotation, plane)
        if not visible:
            return f"The results are {IMAGE_MARKER}. No labelled structure is visible in this image. "
        if annotation.expert == "BRATS":
            colours = brats_legend(palette_of([i for i, *_ in visible]), "correct")
        else:
            colours = ", ".join(f"{colour}: {name}" for colour, name in _colours(visible).items())
        volumes = ", ".join(f"{name} {told_volume(ml)}" for _, name, _, ml in visible)
        return (
            f"The results are {IMAGE_MARKER}. The colors in this image describe {colours}. "
            f"Volumes in ml: {volumes}. {_counts(annotation, visible)}"
        )

    def classification(self, annotation: Annotation, threshold: float = THRESHOLD) -> str:
        told = self.told_probabilities(annotation)
        lines = [f"{told_class(n)}: {'yes' if p > threshold else 'no'} ({p:.2f})\n" for n, p in told.items()]
        return "The resulting predictions are:\n" + "".join(lines)

    def told_probabilities(self, annotation: Annotation) -> Mapping[str, float]:
        return {**annotation.probabilities, **annotation.calibrated}  # a class may lack a calibration

    def failure(self, annotation: Annotation) -> str:
        del annotation  # its reason may hold anything; a verdict says what a model may be told
        return "The expert could not analyse this image. "

    def question(self, question: str, tasks: Sequence[str]) -> str:
        if all(task == "failure" for task in tasks):
            return f"Respond to this prompt:\n{question}"
        if len(tasks) > 1:
            return f"Use these results to respond to this prompt:\n{question}"
        if tasks[0] == "segmentation":
            return f"Use this result to respond to this prompt:\n{question}"
        return (
            "Analyze the image and take these predictions into account when responding to this prompt:\n"
            + question
        )


class _VilaM3(_Plain):
    tells_figures = False

    def call(self, cards: Sequence[Card], calls: Sequence[Call]) -> str:
        what, first = {
            "CXR": ("an chest x-ray", "first "),
            "MRI": ("an MRI image sequence", "first "),
        }.get(cards[0].modality.split(" (")[0].replace("chest x-ray", "CXR"), ("a CT image", ""))
        return f"This looks like {what}. Let me {first}trigger {write_calls(calls)}."

    def inputs(self, roles: Sequence[str], modality: str = "") -> str:
        if len(roles) > 1:
            return super().inputs(roles).rstrip("\n") + " These are different MRI modalities.\n"
        return _VILA_M3_INPUTS.get(modality, f"{IMAGE_MARKER}\n")

    def segmentation(self, annotation: Annotation, plane: Plane) -> str:
        visible = told_labels(annotation, plane)
        if annotation.expert == "BRATS":
            words = brats_legend(palette_of([i for i, *_ in visible]), "trained")
            return f"The results are {IMAGE_MARKER}. The colors in this image describe\n{words}\n"
        words = ", ".join(f"{colour}: {name}" for colour, name in _colours(visible).items())
        return f"The results are {IMAGE_MARKER}. The colors in this image describe {words}. "

    def classification(self, annotation: Annotation, threshold: float = THRESHOLD) -> str:
        told = self.told_probabilities(annotation)
        lines = [f"{told_class(n)}: {'yes' if p > threshold else 'no'}\n" for n, p in told.items()]
        return "The resulting predictions are:\n" + "".join(lines) + ". "

    def told_probabilities(self, annotation: Annotation) -> Mapping[str, float]:
        return annotation.probabilities

    def question(self, question: str, tasks: Sequence[str]) -> str:
        stop = "." if tasks == ["segmentation"] else ""
        return super().question(question, tasks) + stop


PLAIN, VILA_M3 = _Plain(), _VilaM3()
WORDINGS: Mapping[str, Wording] = {"plain": PLAIN, "vila_m3": VILA_M3}


def wording_named(name: str) -> Wording:
    """The wording of `model.expert_wording`.

    Raises:
      UserError: there is none of this name.
    """
    if name not in WORDINGS:
        raise UserError(f"config model.expert_wording={name!r}: use one of {', '.join(WORDINGS)}")
    return WORDINGS[name]


_LABELLED = rf"(?:T1\(contrast enhanced\)|[A-Za-z0-9_-]{{1,16}}): ?{IMAGE_MARKER},? ?"
_SHOWN = re.compile(
    rf"\s*(?:(?:{_LABELLED})+|(?:{IMAGE_MARKER}\s*)+)"
    r"(?:This is an? [A-Z]{2,3} image\.\n|These are different MRI modalities\.\n|\n)?"
)


def question_of(text: str) -> str:
    """A user turn without what `Wording.inputs` puts before the question, and without further markers."""
    shown = _SHOWN.match(text)
    return re.sub(rf" ?{IMAGE_MARKER}", "", text[shown.end() if shown else 0 :]).strip()


def doubts(verdicts: Sequence[Verdict]) -> str:
    """A sentence on the checks that found something; '' where all passed or nothing is known."""
    found = told_doubts(verdicts)
    return f"Checks doubt this: {'; '.join(found)}. " if found else ""


def told_doubts(verdicts: Sequence[Verdict]) -> list[str]:
    """What checks found, a clause each; labels that the scan cuts off share one."""
    found = [v for v in verdicts if v.status in ("warn", "fail") and v.message]
    cut = [told_words(v.subject) for v in found if v.check == "border"]
    told = [told_words(v.message) for v in found if v.check != "border" or len(cut) == 1]
    if len(cut) > 1:
        told.append(f"{joined(cut)} reach the border of the scan, so their volumes are lower bounds")
    return told


def told_labels(annotation: Annotation, plane: Plane) -> list[tuple[int, str, int, float]]:
    """(label id, name as it is told, voxels on the slice, ml in the scan) of the labels on a slice."""
    assert plane.axis is not None and plane.index is not None  # see Result.problem
    found = visible_segments(annotation, axis=plane.axis, index=plane.index)
    return [(label_id, told_words(name), voxels, ml) for label_id, name, voxels, ml in found]


def _colours(visible: Sequence[tuple[int, str, int, float]]) -> dict[str, str]:
    return legend({i: name for i, name, *_ in visible}, [i for i, *_ in visible])


def _counts(annotation: Annotation, visible: Sequence[tuple[int, str, int, float]]) -> str:
    """How many of each lesion: a slice does not show it."""
    counts = component_counts(annotation)
    told = [f"{name} {counts[i]}" for i, name, *_ in visible if is_lesion(name)]
    return f"Separate parts in the scan: {', '.join(told)}. " if told else ""


def told_class(name: str) -> str:
    """The name of a class as it is told."""
    return told_words(name.lower().replace("_", " "))


def told_words(text: str) -> str:
    """An expert's own words on one line, without what could pass for a marker, a call or a token."""
    return " ".join(re.sub(r"[<>|\[\]]", " ", text).split())[:_LONGEST]


def told_volume(ml: float) -> str:
    """A volume in millilitres as it is told."""
    return f"{ml:.0f}" if ml >= 10 else f"{ml:.1f}"
