"""MedXpertQA: examination questions with images (MM) or without (Text), for evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import multiple_choice
from vilam3_jax.datasets.conversations import metadata, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.rows import Row, below, fields, name_of, rows_of, word
from vilam3_jax.datasets.source_files import SourceFolder

_FOLDERS = {"mm": "MM", "text": "Text"}
_IMAGES = "images"
_SPLITS = {"validation": "dev", "test": "test"}
_EXPECTED = {"mm": {"validation": 5, "test": 2_000}, "text": {"validation": 5, "test": 2_450}}
# Questions end with a list of their options.
_LISTED = re.compile(r"\s*Answer Choices\s*:(?=\s*\(?A\b)", re.IGNORECASE)


class MedXpertQa(Dataset):
    """Medical examination questions with images and five options (MM) or with ten options (Text).

    The list of options at the end of each question is removed, since the prompt lists them in the source's
    order. `dev` becomes validation. Text has no images and cannot be used where an image is required.
    """

    name = "medxpert_qa"
    description = "Examination questions for experts, with images (MM) or as text, for evaluation."
    homepage = "https://huggingface.co/datasets/TsinghuaC3I/MedXpertQA"
    citation = "Zuo et al., MedXpertQA: Benchmarking Expert-Level Medical Reasoning and Understanding, 2025"
    licence = "MIT"
    instructions = """
        Fetch from https://huggingface.co/datasets/TsinghuaC3I/MedXpertQA, for mm: MM/dev.jsonl, MM/test.jsonl
        and images.zip, unpacked to images/; for text: Text/dev.jsonl and Text/test.jsonl.
        """
    configs: Mapping[str, str] = {
        "mm": "questions about one to six images, five options",
        "text": "questions without images, ten options",
    }

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        files = {split: f"{_FOLDERS[self.config]}/{stem}.jsonl" for split, stem in _SPLITS.items()}
        source.require(*files.values(), *([_IMAGES] if self.config == "mm" else []))
        taken: set[str] = set()
        return {
            split: Split(
                rows_of(file, source.json_lines(file), lambda row: row["id"], taken=taken),
                _make,
                name_of,
                _EXPECTED[self.config][split],
            )
            for split, file in files.items()
        }


def _make(row: Row, context: Context) -> Iterator[Example]:
    values = fields(row)
    texts = multiple_choice.lettered_options(values.get("options"))
    letter = multiple_choice.right_letter(texts, letter=text_of(values.get("label"), "label"))
    question = _LISTED.split(text_of(values.get("question"), "question"))
    stem = text_of("Answer Choices:".join(question[:-1] or question), "question before its options")
    choice = multiple_choice.choice(stem, texts, letter)
    names = values.get("images") if context.config != "text" else []
    if not isinstance(names, list) or (context.config != "text" and not names):
        raise SkipItem("names no images")
    names = [name.removeprefix(f"{_IMAGES}/") if isinstance(name, str) else name for name in names]
    images = [context.image(below(_IMAGES, name)) for name in names]
    words = {key: word(values, key) or None for key in ("medical_task", "body_system", "question_type")}
    meta = metadata(context, modality="", group=row.id, **words)
    yield choice.example(row.id, images, meta, words["question_type"] or "multiple_choice")
