"""SLAKE 1.0: questions in English and Chinese about CT, MR and X-ray images (Liu et al., ISBI 2021)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import rows, vqa
from vilam3_jax.datasets.conversations import metadata, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.rows import Row
from vilam3_jax.datasets.source_files import SourceFolder
from vilam3_jax.errors import UserError

_LANGUAGES = ("en", "zh")
_FILES = {
    "train": "train.json",
    "validation": ("validate.json", "validation.json"),
    "test": "test.json",
}
_COUNTS = {
    "en": {"train": 4919, "validation": 1053, "test": 1061},
    "zh": {"train": 4916, "validation": 1046, "test": 1033},
}
_MODALITIES = {"ct": "CT", "mri": "MR"}


class Slake(Dataset):
    """SLAKE in one of its languages.

    The image stands before or after the question at random, as in the paper of VILA-M3, which trains on train
    and validation and tests on test, both in English.

    `parity` keeps the spaces of texts, and `meta.reference_id` holds the reference's id: the row's number in
    its file, which train and validation share.
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
                "The two languages divide the images differently, so both together would train on images of "
                "the test sets"
            )
        super().__init__(options, config)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--train-on-validation", action="store_true", help="add the validation questions to train"
        )

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        files = dict(zip(_FILES, source.require(*_FILES.values(), "imgs")[:-1], strict=True))
        taken: set[str] = set()
        splits = {
            split: Split(
                _questions(source, file, self.config, taken), _make, _name_of, _COUNTS[self.config][split]
            )
            for split, file in files.items()
        }
        if self.options.train_on_validation:
            splits["train"] = vqa.joined(splits["train"], splits.pop("validation"))
        return splits


class _Question(NamedTuple):
    """A row and the language that is built."""

    row: Row
    language: str


def _questions(source: SourceFolder, file: str, language: str, taken: set[str]) -> list[_Question]:
    others = {one for one in _LANGUAGES if one != language}
    listed = rows.rows_of(file, enumerate(source.json_list(file), 1), _qid, taken=taken)
    return [_Question(row, language) for row in listed if _language(row.values) not in others]


def _qid(values: Any) -> object:
    return values["qid"]


def _language(values: Any) -> str | None:
    found = values.get("q_lang") if isinstance(values, dict) else None
    return found.strip().lower() if isinstance(found, str) else None


def _name_of(item: _Question) -> str:
    return rows.name_of(item.row)


def _make(item: _Question, context: Context) -> Iterator[Example]:
    values = rows.fields(item.row)
    if _language(values) != item.language:
        raise SkipItem("the language is neither en nor zh")
    kind = text_of(values.get("answer_type"), "answer type").strip().lower()
    if kind not in ("open", "closed"):
        raise SkipItem("the answer type is neither OPEN nor CLOSED")
    image = text_of(values.get("img_name"), "image name").strip()
    location = text_of(values.get("location"), "location").strip()
    content = text_of(values.get("content_type"), "content type").strip()
    reference = {"reference_id": str(item.row.number)} if context.parity else {}
    yield vqa.question_example(
        item.row.id,
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
            language=item.language,
            label_source="physician",
            **reference,
        ),
        marker=vqa.random_marker(context.rng(item.row.id)),
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
