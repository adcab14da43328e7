"""SLAKE 1.0: questions in English and Chinese about CT, MR and X-ray images (Liu et al., ISBI 2021)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import rows, vqa
from vilam3_jax.datasets.conversations import metadata, text_of
from vilam3_jax.datasets.dataset import Context, SkipItem, Split
from vilam3_jax.datasets.rows import Row
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

_LANGUAGES = {"en", "zh"}
_FILES = {"train": "train.json", "validation": ("validate.json", "validation.json"), "test": "test.json"}
_COUNTS = {
    "en": {"train": 4919, "validation": 1053, "test": 1061},
    "zh": {"train": 4916, "validation": 1046, "test": 1033},
}
_MODALITIES = {"ct": "CT", "mri": "MR"}


class Slake(vqa.TrainOnValidation):
    """SLAKE in one language.

    The image comes before or after the question at random, as in the VILA-M3 paper, which trains on the
    English train and validation questions and tests on the English test questions.

    `parity` keeps whitespace and stores the reference's id in `meta.reference_id`: the row number in the
    file, so train and validation have equal ids.
    """

    has_parity = True
    name = "slake"
    description = "Questions of physicians about CT, MR and X-ray images, in English or Chinese."
    homepage = "https://www.med-vqa.com/slake"
    citation = "Liu et al. SLAKE: a semantically-labeled knowledge-enhanced dataset. ISBI 2021."
    licence = "unverified"
    instructions = (
        "From https://www.med-vqa.com/slake (`Slake1.0.zip`) or "
        "https://huggingface.co/datasets/BoKelvin/SLAKE (unpack `imgs.zip`): `train.json`, `validate.json` "
        "or `validation.json`, `test.json`, and the folder `imgs` with `xmlab0/source.jpg` and so on."
    )
    configs: ClassVar[Mapping[str, str]] = {
        "en": "the English questions, which the paper uses",
        "zh": "the Chinese questions",
    }

    def __init__(self, options: argparse.Namespace | None = None, config: str = "") -> None:
        if config and config not in self.configs:
            raise UserError(
                f"dataset {self.name} has no variant {config!r}; there are: {', '.join(self.configs)}. "
                "The two languages split the images differently, so training on both would include test "
                "images"
            )
        super().__init__(options, config)

    def published_splits(self, source: SourceFolder) -> dict[str, Split]:
        files = dict(zip(_FILES, source.require(*_FILES.values(), "imgs")[:-1], strict=True))
        taken: set[str] = set()
        splits = {}
        for split, file in files.items():
            listed = rows.rows_of(
                file, enumerate(source.json_list(file), 1), lambda row: row["qid"], taken=taken
            )
            items = [row for row in listed if _language(row.values) not in _LANGUAGES - {self.config}]
            splits[split] = Split(items, _make, rows.name_of, _COUNTS[self.config][split])
        return splits


def _language(values: Any) -> str | None:
    language = values.get("q_lang") if isinstance(values, dict) else None
    return language.strip().lower() if isinstance(language, str) else None


def _make(row: Row, context: Context) -> Iterator[Example]:
    values = rows.fields(row)
    if _language(values) != context.config:
        raise SkipItem("the language is neither en nor zh")
    kind = text_of(values.get("answer_type"), "answer type").strip().lower()
    if kind not in ("open", "closed"):
        raise SkipItem("the answer type is neither OPEN nor CLOSED")
    image = text_of(values.get("img_name"), "image name").strip()
    location = text_of(values.get("location"), "location").strip()
    content = text_of(values.get("content_type"), "content type").strip()
    yield vqa.question_example(
        row.id,
        [context.image(rows.below("imgs", image))],
        values.get("question"),
        values.get("answer"),
        kind,
        metadata(
            context,
            modality=_modality(text_of(values.get("modality"), "modality"), location),
            group=image,
            location=location,
            question_types=[content],
            needs_knowledge=values.get("base_type") == "kvqa",
            language=context.config,
            label_source="physician",
            reference_id=str(row.number) if context.parity else None,
        ),
        marker=vqa.random_marker(context.rng(row.id)),
        label_source="physician",
        verbatim=context.parity,
    )


def _modality(source: str, location: str) -> str:
    word = source.strip().lower()
    if word in ("x-ray", "xray"):
        chest = any(part in location.lower() for part in ("chest", "lung"))
        return "CXR" if chest else "XR"
    if word not in _MODALITIES:
        raise SkipItem("the modality is none of CT, MRI, X-Ray")
    return _MODALITIES[word]
