"""The texts of an expert exchange: calls, results and questions.

`PLAIN` is this project's own wording. `VILA_M3` is the wording that the released checkpoints were trained on,
kept verbatim, mistakes included.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from vilam3_jax.data.examples import IMAGE_MARKER
from vilam3_jax.data.experts.cards import Card
from vilam3_jax.data.experts.grammar import Call, joined
from vilam3_jax.data.experts.labels import component_counts, is_lesion, visible_segments
from vilam3_jax.data.experts.overlays import brats_legend, legend, palette_of, reference_brats_legend
from vilam3_jax.data.experts.record import THRESHOLD, Annotation, Verdict
from vilam3_jax.errors import UserError

MAX_EXPERT_TEXT = 200  # characters of a name or a sentence that an expert supplies
_MAX_DOUBTS = 16
_BRACKETS = frozenset("<>|[]")
# Of Unicode's default-ignorable characters those that count as printable: they could hide text.
_INVISIBLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
# Card modality to a noun phrase.
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
    """The slice of a volume that a model sees; empty for a 2-D image."""

    axis: int | None = None
    index: int | None = None


class Wording:
    """The plain wording, and the interface of all wordings.

    Attributes:
      reports_measurements: whether volumes and counts of labels are part of the texts.
    """

    reports_measurements = True

    def call(self, cards: Sequence[Card], calls: Sequence[Call]) -> str:
        """The assistant's turn that makes `calls` to the experts of `cards`."""
        modality = cards[0].modality
        what = IMAGE_OF.get(modality, f"an image of the modality {modality}")
        return f"This looks like {what}. Let me trigger {joined(calls)}."

    def inputs(self, roles: Sequence[str], modality: str = "") -> str:
        """The image markers before a question, one per role; `modality` is a DICOM code, if known."""
        del modality
        if len(roles) == 1:
            return f"{IMAGE_MARKER}\n"
        return ", ".join(f"{_ROLE_WORDS.get(r, r)}: {IMAGE_MARKER}" for r in roles) + "\n"

    def segmentation(self, annotation: Annotation, plane: Plane) -> str:
        """The labels on a slice, with one image marker."""
        visible = visible_labels(annotation, plane)
        if not visible:
            return f"The results are {IMAGE_MARKER}. No labelled structure is visible in this image. "
        colours = _legend(annotation, visible, brats_legend)
        volumes = ", ".join(f"{name} {format_ml(ml)}" for _, name, _, ml in visible)
        counts = component_counts(annotation)
        lesions = ", ".join(f"{name} {counts[i]}" for i, name, *_ in visible if is_lesion(name))
        return (
            f"The results are {IMAGE_MARKER}. The colors in this image describe {colours}. "
            f"Volumes in ml: {volumes}. "
        ) + (f"Separate parts in the scan: {lesions}. " if lesions else "")

    def classification(self, annotation: Annotation, threshold: float = THRESHOLD) -> str:
        """Class probabilities, the most probable first; a class above `threshold` counts as present."""
        shown = sorted(self.probabilities(annotation).items(), key=lambda item: (-item[1], item[0]))
        lines = [f"{class_name(n)}: {'yes' if p > threshold else 'no'} ({p:.2f})\n" for n, p in shown]
        return "The resulting predictions are:\n" + "".join(lines)

    def probabilities(self, annotation: Annotation) -> Mapping[str, float]:
        """The probabilities that `classification` reports."""
        return {**annotation.probabilities, **annotation.calibrated}  # a class may lack a calibration

    def failure(self, annotation: Annotation) -> str:
        """The text of a failed annotation."""
        del annotation  # the reason may contain anything; verdicts hold what a model may see
        return "The expert could not analyse this image. "

    def question(self, question: str, tasks: Sequence[str]) -> str:
        """Repeats the question after results of `tasks` (`segmentation`, `classification` or `failure`)."""
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


class _VilaM3(Wording):
    reports_measurements = False

    def call(self, cards: Sequence[Card], calls: Sequence[Call]) -> str:
        what, first = {"CXR": ("an chest x-ray", "first "), "MRI": ("an MRI image sequence", "first ")}.get(
            cards[0].modality.split(" (")[0].replace("chest x-ray", "CXR"), ("a CT image", "")
        )
        return f"This looks like {what}. Let me {first}trigger {joined(calls)}."

    def inputs(self, roles: Sequence[str], modality: str = "") -> str:
        if len(roles) > 1:
            return super().inputs(roles).rstrip("\n") + " These are different MRI modalities.\n"
        return _VILA_M3_INPUTS.get(modality, f"{IMAGE_MARKER}\n")

    def segmentation(self, annotation: Annotation, plane: Plane) -> str:
        visible = visible_labels(annotation, plane)
        words = _legend(annotation, visible, reference_brats_legend)
        words = f"\n{words}\n" if annotation.expert == "BRATS" else f" {words}. "
        return f"The results are {IMAGE_MARKER}. The colors in this image describe{words}"

    def classification(self, annotation: Annotation, threshold: float = THRESHOLD) -> str:
        shown = self.probabilities(annotation).items()
        lines = [f"{class_name(n)}: {'yes' if p > threshold else 'no'}\n" for n, p in shown]
        return "The resulting predictions are:\n" + "".join(lines) + ". "

    def probabilities(self, annotation: Annotation) -> Mapping[str, float]:
        return annotation.probabilities

    def question(self, question: str, tasks: Sequence[str]) -> str:
        stop = "." if tasks == ["segmentation"] else ""
        return super().question(question, tasks) + stop


PLAIN, VILA_M3 = Wording(), _VilaM3()
WORDINGS: Mapping[str, Wording] = {"plain": PLAIN, "vila_m3": VILA_M3}


def wording_named(name: str) -> Wording:
    """The wording of `model.expert_wording`; raises `UserError` for an unknown name."""
    if name not in WORDINGS:
        raise UserError(f"config model.expert_wording={name!r}: use one of {', '.join(WORDINGS)}")
    return WORDINGS[name]


_LABELLED = rf"(?:T1\(contrast enhanced\)|[A-Za-z0-9_-]{{1,16}}): ?{IMAGE_MARKER},? ?"
_SHOWN = re.compile(
    rf"\s*(?:(?:{_LABELLED})+|(?:{IMAGE_MARKER}\s*)+)"
    r"(?:This is an? [A-Z]{2,3} image\.\n|These are different MRI modalities\.\n|\n)?"
)


def question_of(text: str) -> str:
    """A user turn without the prefix of `Wording.inputs` and without further image markers."""
    shown = _SHOWN.match(text)
    return re.sub(rf" ?{IMAGE_MARKER}", "", text[shown.end() if shown else 0 :]).strip()


def doubts(verdicts: Sequence[Verdict]) -> str:
    """A sentence on the checks that raised doubts; '' if none did."""
    found = doubt_messages(verdicts)
    return f"Checks doubt this: {'; '.join(found)}. " if found else ""


def doubt_messages(verdicts: Sequence[Verdict]) -> list[str]:
    """One clause per doubt, up to a limit; labels that the scan cuts off share a clause."""
    found = [v for v in verdicts if v.status in ("warn", "fail") and v.message]
    cut = [sanitized(v.subject) for v in found if v.check == "border"]
    messages = [sanitized(v.message) for v in found if v.check != "border" or len(cut) == 1]
    if len(cut) > 1:
        labels = joined(_limited(cut, "labels"))
        messages.append(f"{labels} reach the border of the scan, so their volumes are lower bounds")
    return _limited(messages, "doubts")


def _limited(texts: list[str], what: str) -> list[str]:
    more = len(texts) - _MAX_DOUBTS
    return [*texts[:_MAX_DOUBTS], f"{more} more {what}"] if more > 0 else texts


def visible_labels(annotation: Annotation, plane: Plane) -> list[tuple[int, str, int, float]]:
    """(label id, sanitized name, voxels on the slice, ml in the scan) of the labels on a slice."""
    assert plane.axis is not None and plane.index is not None  # see Result.problem
    found = visible_segments(annotation, axis=plane.axis, index=plane.index)
    return [(label_id, sanitized(name), voxels, ml) for label_id, name, voxels, ml in found]


def _legend(
    annotation: Annotation,
    visible: Sequence[tuple[int, str, int, float]],
    nested: Callable[[Mapping[int, str]], str],
) -> str:
    """The colours of the `visible_labels`; `nested` describes those of BraTS."""
    if annotation.expert == "BRATS":
        return nested(palette_of([i for i, *_ in visible]))
    colours = legend({i: name for i, name, *_ in visible}, [i for i, *_ in visible])
    return ", ".join(f"{colour}: {name}" for colour, name in colours.items())


def class_name(name: str) -> str:
    """A class name as it appears in texts."""
    return sanitized(name.lower().replace("_", " "))


def one_line(text: str, limit: int) -> str:
    """Up to `limit` characters of a text on one line, without control characters and invisible ones."""
    shown = _INVISIBLE.sub("", text[: 4 * limit])
    # Format characters, such as marks of direction, stand within words.
    shown = "".join(c for c in shown if unicodedata.category(c) != "Cf")
    return " ".join("".join(c if c.isprintable() else " " for c in shown).split())[:limit]


def sanitized(text: str) -> str:
    """An expert's text on one line, without characters that could form a marker, a call or a token.

    Characters that a tokenizer may fold to such characters are left out, too.
    """
    plain = "".join(" " if _BRACKETS & set(unicodedata.normalize("NFKC", c)) else c for c in text)
    return one_line(plain, MAX_EXPERT_TEXT)


def format_ml(ml: float) -> str:
    """A volume in millilitres as it appears in texts."""
    return f"{ml:.0f}" if ml >= 10 else f"{ml:.1f}"
