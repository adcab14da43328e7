"""FLARE-MLLM-2D: questions of the FLARE 2025 and 2026 challenges about 2D images of 19 datasets."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import multiple_choice
from vilam3_jax.datasets.conversations import metadata, question_conversation, question_meta, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.rows import Row, below, fields, name_of, rows_of, word
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

# Split → (folders, suffix of the question file, folder of the images).
_SPLITS = {
    "train": (("training",), "train", "imagesTr"),
    "validation": (("validation-public", "validation_public"), "val", "imagesVal"),
    "validation_hidden": (("validation-hidden", "validation_hidden"), "val", "imagesVal"),
    "test": (("testing",), "test", "imagesTs"),
}
_MODALITIES = {
    "retinography": "FUNDUS",
    "ultrasound": "US",
    "xray": "XR",
    "clinical": "PHOTO",
    "microscopy": "MICROSCOPY",
    "endoscopy": "ENDOSCOPY",
    "dermatology": "DERMOSCOPY",
    "mammography": "MG",
}
# Flags of absent labels.
_ABSENT = ("", "0", "0.0", "no", "false", "none", "n", "absent", "negative")
_CHEST = ("IU_XRay", "chestdr")
_MULTI_LABEL = "multi_label_classification"
# Task name in a row (lower case, no punctuation) → the challenge's name of the task family.
_FAMILIES = {
    "classification": "disease_diagnosis_classification",
    "cls": "disease_diagnosis_classification",
    "disease diagnosis": "disease_diagnosis_classification",
    "disease diagnosis classification": "disease_diagnosis_classification",
    "multi label classification": _MULTI_LABEL,
    "multilabel": _MULTI_LABEL,
    "detection": "detection",
    "instance detection": "detection",
    "cell counting": "cell_counting",
    "counting": "cell_counting",
    "count": "cell_counting",
    "regression": "regression",
    "report generation": "report_generation",
    "report": "report_generation",
}


class FlareMllm2d(Dataset):
    """Classification, multi-label classification, detection, counting, regression and reports.

    - The folder determines the split, not the field `Split`. The hidden validation set is the split
      `validation_hidden`; its file without answers is ignored if the one with answers is present. Questions
      without an answer are skipped.
    - A question shows all its images.
    - Label lists are joined by "; "; an empty list becomes "none", a row that the challenge's scorer drops.
      Boxes are JSON, in pixels of the stored image.
    - Options listed in a separate field get letters; those of training questions are shuffled.
    """

    name = "flare_mllm_2d"
    description = "Questions of the FLARE challenges about 2D images from 19 datasets in eight categories."
    homepage = "https://huggingface.co/datasets/FLARE-MedFM/FLARE-Task5-MLLM-2D"
    licence = "unverified"
    access = "registered"
    instructions = """
        Request access to https://huggingface.co/datasets/FLARE-MedFM/FLARE-Task5-MLLM-2D and download
        training/, validation-public/, validation-hidden/ or testing/, or some of their datasets. Unpack every
        imagesTr.zip, imagesVal.zip and imagesTs.zip in place:
        training/Xray/dental/{imagesTr/, dental_questions_train.json}.
        """

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        source.require([folder for folders, _, _ in _SPLITS.values() for folder in folders])
        taken: set[str] = set()
        found = {}
        for split, (folders, ending, images) in _SPLITS.items():
            if folder := source.find(*folders):
                files = _question_files(source, folder, ending)
                _check_images(source, files, images)
                rows = []
                for file in files:
                    prefix, numbered = f"{split}/{file.split('/')[-2]}", enumerate(source.json_list(file), 1)
                    rows += rows_of(file, numbered, _source_id, prefix=prefix, taken=taken)
                found[split] = Split(rows, _make, name_of)
        return found


def _make(row: Row, context: Context) -> Iterator[Example]:
    values = {str(key).lower(): value for key, value in fields(row).items()}
    category, dataset = row.file.split("/")[-3:-1]
    family = _family(word(values, "tasktype"))
    names = _image_names(values)
    images = [_image(name, row.file, context) for name in names]
    question = text_of(values.get("question"), "question").strip()
    answer = _answer(_first(values, "answer", "report"), family)
    options = _first(values, "choices", "options")
    if options and not isinstance(options, list | dict):
        raise SkipItem(f"the options are a {type(options).__name__}, not a list")
    modality = "CXR" if dataset in _CHEST else _MODALITIES.get(category.lower(), category.upper())
    meta = metadata(
        context,
        modality=modality,
        group=f"{posixpath.dirname(row.file)}/{posixpath.basename(names[0])}",
        source=dataset,
        source_split=word(values, "split") or None,
    )
    if options:
        choice = multiple_choice.listed_choice(question, options, answer)
        if context.split == "train":
            choice = choice.shuffled(context.rng(row.id))
        yield choice.example(row.id, images, meta, family)
    else:
        yield question_conversation(row.id, images, meta, [question_meta(question, answer, family)])


def _question_files(source: SourceFolder, folder: str, ending: str) -> list[str]:
    """Finds the question files below a split's folder; of two versions, the one with answers."""
    answered = source.glob(f"{folder}/*/*/*_questions_{ending}_withGT.json")
    known = {file.removesuffix("_withGT.json") for file in answered}
    plain = source.glob(f"{folder}/*/*/*_questions_{ending}.json")
    files = sorted(answered + [file for file in plain if file.removesuffix(".json") not in known])
    if not files:
        raise UserError(f"{source.root / folder}: no CATEGORY/DATASET/*_questions_{ending}.json")
    return files


def _check_images(source: SourceFolder, files: list[str], images: str) -> None:
    lacking = [
        f"{folder}/{images}"
        for folder in sorted({posixpath.dirname(file) for file in files})
        if not source.find(f"{folder}/{images}")
    ]
    if lacking:
        packed = " (unpack its .zip)" if source.find(f"{lacking[0]}.zip") else ""
        raise UserError(f"{source.root}: {', '.join(lacking)} missing{packed}")


def _source_id(row: Mapping[str, Any]) -> object:
    lower = {str(key).lower(): value for key, value in row.items()}
    return _first(lower, "id", "qid", "questionid", "case_id")


def _first(values: Mapping[str, Any], *keys: str) -> Any:
    return next((values[key] for key in keys if values.get(key) is not None), None)


def _family(stated: str) -> str:
    """Returns the challenge's name of a task family; an unknown one is kept, normalized.

    >>> _family("Multi-label Classification"), _family("Instance_Detection"), _family("Triage")
    ('multi_label_classification', 'detection', 'triage')
    """
    words = " ".join(re.sub(r"[-_()]", " ", stated.lower()).split())
    return _FAMILIES.get(words, words.replace(" ", "_") or "open")


def _image_names(values: Mapping[str, Any]) -> list[str]:
    names = values.get("imagename")
    names = names if isinstance(names, list) else [names]
    if not names:
        raise SkipItem("names no images")
    return [text_of(name, "image name").strip() for name in names]


def _image(name: str, file: str, context: Context) -> ImageRef:
    """Finds an image by path, otherwise by file name in the folder of images.

    Paths may be relative to the folder of the question file, of the images, or to the source folder.
    """
    folder = posixpath.dirname(file)
    images = f"{folder}/{_SPLITS[context.split][2]}"
    places = [below(folder, name), below(images, name), below("", name)] if "/" in name else []
    for place in places:
        try:
            return context.image(place)
        except SkipItem:
            continue
    return context.image(below(images, posixpath.basename(name)))


def _answer(value: Any, family: str) -> str:
    """Returns the answer as text.

    >>> _answer(["caries", "crown"], _MULTI_LABEL), _answer({"caries": 0, "crown": 1}, _MULTI_LABEL)
    ('caries; crown', 'crown')
    >>> _answer([[1, 2, 30, 40]], "detection"), _answer(17, "cell_counting"), _answer([], _MULTI_LABEL)
    ('[[1, 2, 30, 40]]', '17', 'none')
    """
    if family == _MULTI_LABEL and isinstance(value, list | dict):
        chosen = [key for key, flag in value.items() if _is_set(flag)] if isinstance(value, dict) else value
        return "; ".join(text_of(label, "label").strip() for label in chosen) or "none"
    if family == "detection" and isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text_of(value, "answer").strip()


def _is_set(flag: Any) -> bool:
    return flag.strip().lower() not in _ABSENT if isinstance(flag, str) else bool(flag)
