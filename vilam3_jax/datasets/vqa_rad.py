"""VQA-RAD: clinicians' questions about radiology images of MedPix (Lau et al., Scientific Data 2018)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import rows, vqa
from vilam3_jax.datasets.conversations import metadata, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Skipped, Split
from vilam3_jax.datasets.rows import Row
from vilam3_jax.datasets.source_files import SourceFolder

_TABLES = ("VQA_RAD Dataset Public.json", "VQA_RAD_Dataset_Public.json")
_FOLDERS = ("VQA_RAD Image Folder", "VQA_RAD_Image_Folder")
_MEVF_FOLDERS = ("images", *_FOLDERS)

# Key → field names in the JSON, then column headers in the spreadsheet of the same release.
_KEYS = {
    "qid": ("qid", "QID_unique"),
    "phrase_type": ("phrase_type", "QID_para"),
    "image": ("image_name", "IMAGE", "IMAGEID"),
    "organ": ("image_organ", "IMAGE_organ"),
    "question": ("question", "QUESTION"),
    "rephrase": ("question_rephrase", "Q_REPHASE", "Q_REPHRASE"),
    "question_type": ("question_type", "Q_TYPE"),
    "answer": ("answer", "ANSWER"),
    "answer_type": ("answer_type", "A_TYPE"),
}
_PHRASE_TYPES = ("freeform", "para", "test_freeform", "test_para")
_ORGAN_QUESTIONS = (
    "What is the visible organ?",
    "What organ is it?",
    "Is any organ visible?",
    "Which organ can be seen?",
    "Any visible organs?",
)
_REFERENCE_ORGAN_QUESTIONS = (*_ORGAN_QUESTIONS[:3], "Which can organ can be seen?", _ORGAN_QUESTIONS[4])

# The release's images are head CT or MR, chest films, and abdominal CT (Lau et al., Methods).
_MODALITIES = {"CHEST": "CXR", "ABD": "CT"}


class VqaRad(Dataset):
    """VQA-RAD with the official test questions.

    A training row gives up to three records, as in the VILA-M3 paper: the question, a question about the
    organ in one of five wordings, and the rephrased question. A test row gives the question ("open" or
    "closed") and the rephrased question ("open_rephrased" or "closed_rephrased"); the official 451 are the
    first two types. Training questions that the test set asks about the same image are skipped.

    `parity` restores the reference's defects: only rows whose answer type is exactly "CLOSED" are tested,
    whitespace is kept, one organ question is garbled, test questions stay in train, and `meta.reference_id`
    is the reference's running number.
    """

    has_parity = True
    name = "vqa_rad"
    description = "Questions of clinicians about radiology images of head, chest and abdomen."
    homepage = "https://osf.io/89kps"
    citation = "Lau et al. A dataset of clinically generated visual questions and answers. Sci Data 2018."
    licence = "CC0-1.0"
    instructions = (
        "osf: from https://osf.io/89kps, `VQA_RAD Dataset Public.json` and the folder `VQA_RAD Image Folder` "
        "(spaces or underscores). "
        "hf: from https://huggingface.co/datasets/flaviagiammarino/vqa-rad at revision bcf91e7, the folder "
        "`data` with its two parquet files. "
        "mevf: `trainset.json`, `testset.json`, optionally `valset.json`, and the folder `images`."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "osf": "the authors' release, with rephrased questions",
        "hf": "the Hugging Face copy, without rephrased questions and without duplicates",
        "mevf": "the copy of MEVF and M3AE: one file per split, rephrased questions as separate rows",
    }
    shared_images = "the official split divides questions, not images"

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        if self.config == "hf":
            counts = {"train": 1793, "test": 451}
            return vqa.copied_splits(source, counts, modality="", label_source="clinician", marker="after")
        if self.config == "mevf":
            train, test, folder = source.require("trainset.json", "testset.json", _MEVF_FOLDERS)
            files = {"train": train, "validation": source.find("valset.json"), "test": test}
            tables = {split: (file, _listed(source, file)) for split, file in files.items() if file}
            expected = {"test": 451} if "validation" in tables else {"train": 3064, "test": 451}
        else:
            table, folder = source.require(_TABLES, _FOLDERS)
            listed = _listed(source, table)
            tables: dict[str, Any] = {"train": (table, []), "test": (table, [])}
            for row in listed:
                tables["test" if _phrase_type(row[1]).startswith("test") else "train"][1].append(row)
            expected = {"test": 451}  # published counts of the training rows differ: 1,797 and 3,064
        tested = frozenset().union(*(_asked(values).values() for _, values in tables["test"][1]))
        make, qid_of = functools.partial(_make, folder=folder), functools.partial(_value, key="qid")
        taken: set[str] = set()
        return {
            split: Split(
                _questions(rows.rows_of(file, listed, qid_of, taken=taken), split, tested),
                make,
                _name_of,
                expected.get(split),
                per_item=2 if split == "test" else 3,
            )
            for split, (file, listed) in tables.items()
        }


class _Question(NamedTuple):
    row: Row
    number: int  # reference id of its first sample; the reference counts samples over the split
    tested: frozenset[str]  # which of "question" and "rephrase" the test set asks about the same image


def _listed(source: SourceFolder, file: str) -> list[tuple[int, Any]]:
    return list(enumerate(source.json_list(file), 1))


def _value(values: Any, key: str) -> Any:
    """Returns the value under the first name of `_KEYS[key]`, ignoring case only if none matches exactly."""
    if not isinstance(values, dict):
        return None
    lower = {name.lower(): value for name, value in values.items() if isinstance(name, str)}
    exact = (values[name] for name in _KEYS[key] if name in values)
    return next(exact, next((lower[n.lower()] for n in _KEYS[key] if n.lower() in lower), None))


def _phrase_type(values: Any) -> str:
    phrase = _value(values, "phrase_type")
    return phrase.strip().lower() if isinstance(phrase, str) else ""


def _asked(values: Any) -> dict[str, tuple[str, str]]:
    """Maps "question" and "rephrase" to (image name, text), both normalized."""
    image = _value(values, "image")
    return {
        key: (image.strip().lower(), " ".join(text.lower().split()))
        for key in ("question", "rephrase")
        if isinstance(text := _value(values, key), str) and isinstance(image, str)
    }


def _questions(listed: Sequence[Row], split: str, tested: frozenset[tuple[str, str]]) -> list[_Question]:
    number, questions = 0, []
    for row in listed:
        asked = () if split == "test" else _asked(row.values).items()
        questions.append(_Question(row, number, frozenset(key for key, text in asked if text in tested)))
        rephrased = _value(row.values, "rephrase") not in (None, "NULL")
        if split != "test":
            number += 2 + rephrased
        elif _value(row.values, "answer_type") == "CLOSED":
            number += 1 + rephrased
    return questions


def _name_of(item: _Question) -> str:
    return rows.name_of(item.row)


def _make(item: _Question, context: Context, *, folder: str) -> Iterator[Example | Skipped]:
    values = rows.fields(item.row)
    answer_type = text_of(_value(values, "answer_type"), "answer type")
    if context.parity and context.split == "test" and answer_type != "CLOSED":
        raise SkipItem("the answer type is not exactly CLOSED; the reference tests no other")
    if context.config == "osf" and not context.parity and _phrase_type(values) not in _PHRASE_TYPES:
        raise SkipItem(f"its split is unknown: the phrase type is none of {', '.join(_PHRASE_TYPES)}")
    kind = answer_type.strip().lower()
    if kind not in ("open", "closed"):
        raise SkipItem("the answer type is neither OPEN nor CLOSED")
    organ = _optional(values, "organ").strip().upper()
    codes = [code.strip().upper() for code in _optional(values, "question_type").split(",") if code.strip()]
    name = text_of(_value(values, "image"), "image name").strip()
    images = [context.image(rows.below(folder, name))]
    meta = metadata(
        context,
        modality=_MODALITIES.get(organ, ""),
        group=name.lower(),
        organ=organ or None,
        question_types=codes,
        label_source="clinician",
    )
    number = item.number
    for part, question, answer, sample_kind in _samples(values, kind, item.row.id, context):
        if part in item.tested and not context.parity:
            yield Skipped(f"{_name_of(item)} ({part})", "the test set asks the same about the same image")
            continue
        reference = {"reference_id": str(number)} if context.parity else {}
        number += 1
        yield vqa.question_example(
            item.row.id if part == "question" else f"{item.row.id}-{part}",
            images,
            question,
            answer,
            sample_kind,
            {**meta, **reference},
            marker="after",
            label_source="clinician",
            verbatim=context.parity,
        )


def _samples(
    values: Mapping[str, Any], kind: str, name: str, context: Context
) -> Iterator[tuple[str, Any, Any, str]]:
    """Yields (part, question, answer, question type) for the samples of a row, in the reference's order."""
    question, answer = _value(values, "question"), _value(values, "answer")
    yield "question", question, answer, kind
    organ = _optional(values, "organ")
    if context.split != "test" and organ.strip():
        wordings = _REFERENCE_ORGAN_QUESTIONS if context.parity else _ORGAN_QUESTIONS
        yield "organ", context.rng(name, "organ").choice(wordings), organ, "organ"
    rephrase = _value(values, "rephrase")
    words = rephrase.strip().upper() if isinstance(rephrase, str) and not context.parity else rephrase
    if words not in (None, "", "NULL"):
        yield "rephrase", rephrase, answer, f"{kind}_rephrased" if context.split == "test" else kind


def _optional(values: Mapping[str, Any], key: str) -> str:
    value = _value(values, key)
    return "" if value is None or value == "" else text_of(value, key.replace("_", " "))
