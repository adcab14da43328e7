"""OmniMedVQA, open-access part: multiple-choice questions from 42 image datasets, for evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import multiple_choice
from vilam3_jax.datasets.conversations import metadata, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, Split
from vilam3_jax.datasets.rows import Row, below, fields, name_of, rows_of, word
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

_LETTERS = "ABCD"
_OPEN = "QA_information/Open-access"
_RESTRICTED = "QA_information/Restricted-access"
_NO_RESTRICTED = (
    "the restricted part of omni_med_vqa is not supported: its images come from about thirty other owners, "
    "whose file names are not verified"
)
_EXPECTED = 88_996
# First match wins; other modalities are kept in upper case.
_MODALITIES = (
    (r"\bct\b|computed tomography", "CT"),
    (r"\bmri?\b|magnetic", "MR"),
    (r"\boct\b|optical coherence", "OCT"),
    (r"x-?\s?ray|radiograph", "XR"),
    (r"ultraso", "US"),
    (r"fundus|retinograph", "FUNDUS"),
    (r"dermoscop", "DERMOSCOPY"),
    (r"endoscop", "ENDOSCOPY"),
    (r"patholog", "PATHOLOGY"),
    (r"microscop", "MICROSCOPY"),
)
_CHEST = re.compile(r"chest|cxr|covid|corona|pulmonary|lung", re.IGNORECASE)


class OmniMedVqa(Dataset):
    """Questions with two to four options; a single split "test".

    - The answer is the option with equal text, ignoring case, repeated spaces and surrounding punctuation.
      The question is skipped if two options match.
    - X-rays of sources named after the chest are "CXR", others "XR".
    - Many of the source datasets are common training data: check for leaks before comparing models.
    """

    name = "omni_med_vqa"
    description = "Multiple-choice questions about images of 42 public datasets, for evaluation."
    homepage = "https://huggingface.co/datasets/foreverbeliever/OmniMedVQA"
    citation = "Hu et al., OmniMedVQA: A New Large-Scale Comprehensive Evaluation Benchmark, CVPR 2024"
    licence = "per source dataset"
    instructions = """
        Fetch OmniMedVQA.zip from https://huggingface.co/datasets/foreverbeliever/OmniMedVQA and unpack it:
        the folder has Images/ and QA_information/Open-access/ with 42 JSON files.
        """

    def __init__(self, options: Any = None, config: str = "") -> None:
        if "restrict" in config.lower():
            raise UserError(_NO_RESTRICTED)
        super().__init__(options, config)

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        base = "OmniMedVQA/" if source.find("OmniMedVQA/QA_information") else ""
        if source.find(base + _RESTRICTED) and not source.find(base + _OPEN):
            raise UserError(f"{source.root}: has no {_OPEN}, and {_NO_RESTRICTED}")
        source.require(base + _OPEN, f"{base}Images")
        files = source.glob(f"{base}{_OPEN}/*.json")
        if not files:
            raise UserError(f"{source.root / base / _OPEN}: has no JSON files; unpack OmniMedVQA.zip again")
        taken: set[str] = set()
        rows = []
        for file in files:
            numbered = enumerate(source.json_list(file), 1)
            rows += rows_of(file, numbered, lambda row: row["question_id"], taken=taken)
        return {"test": Split(rows, _make, name_of, _EXPECTED)}


def _make(row: Row, context: Context) -> Iterator[Example]:
    values = fields(row)
    options = multiple_choice.lettered_options(
        {letter: values.get(f"option_{letter}") for letter in _LETTERS}, optional="CD"
    )
    letter = multiple_choice.right_letter(options, text=text_of(values.get("gt_answer"), "answer"))
    choice = multiple_choice.choice(text_of(values.get("question"), "question"), options, letter)
    base = row.file.partition("QA_information/")[0].rstrip("/")
    image = below(base, values.get("image_path"))
    source = word(values, "dataset") or row.file.rpartition("/")[2].removesuffix(".json")
    modality = modality_of(word(values, "modality_type") or word(values, "modality"), source)
    kind = word(values, "question_type") or "multiple_choice"
    meta = metadata(context, modality=modality, group=image, source=source)
    yield choice.example(row.id, [context.image(image)], meta, kind)


def modality_of(stated: str, source: str) -> str:
    """Returns the modality code for a modality of the source.

    >>> modality_of("CT(Computed Tomography)", "Chest CT Scan"), modality_of("X-Ray", "Knee Osteoarthritis")
    ('CT', 'XR')
    """
    words = stated.strip().lower()
    found = next((word for pattern, word in _MODALITIES if re.search(pattern, words)), stated.strip().upper())
    return "CXR" if found == "XR" and _CHEST.search(source) else found
