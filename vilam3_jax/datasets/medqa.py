"""MedQA-USMLE with four options: questions of the United States medical licensing examination."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import multiple_choice
from vilam3_jax.datasets.conversations import metadata, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, Split
from vilam3_jax.datasets.rows import Row, fields, name_of, rows_of
from vilam3_jax.datasets.source_files import SourceFolder

_OPTIONS = "questions/US/4_options/"
_FOLDERS = ("", _OPTIONS, f"data_clean/{_OPTIONS}", "US/4_options/", "4_options/")
_PARTS = {"train": ("train", 10_178), "validation": ("dev", 1_272), "test": ("test", 1_273)}


class MedQa(Dataset):
    """Text-only questions: 10,178 for training (VILA-M3's "USMLE"), 1,272 for validation, 1,273 for test.

    The paper does not specify a prompt. Here the lettered options follow the question, one per line, and the
    answer is the letter and text of the right one. The Hugging Face copy has no `dev` file and so no
    validation split. The source has no ids; a record's id is its split and line.
    """

    name = "medqa"
    description = "Questions of the US medical licensing examination with four options, text only."
    homepage = "https://github.com/jind11/MedQA"
    citation = "Jin et al., What Disease Does This Patient Have?, Applied Sciences 2021"
    licence = "unverified"
    instructions = (
        "Fetch phrases_no_exclude_train.jsonl, phrases_no_exclude_test.jsonl and, of the original archive, "
        "phrases_no_exclude_dev.jsonl: https://huggingface.co/datasets/GBaker/MedQA-USMLE-4-options, or "
        "data_clean/questions/US/4_options/ of the archive that https://github.com/jind11/MedQA names."
    )
    expert_inputs = False

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        accepted = {
            split: [f"{folder}phrases_no_exclude_{stem}.jsonl" for folder in _FOLDERS]
            for split, (stem, _) in _PARTS.items()
        }
        source.require(accepted["train"], accepted["test"])
        found = {split: source.find(*names) for split, names in accepted.items()}
        return {
            split: Split(
                rows_of(file, source.json_lines(file), lambda row: None, prefix=split),
                _make,
                name_of,
                _PARTS[split][1],
            )
            for split, file in found.items()
            if file is not None
        }


def _make(row: Row, context: Context) -> Iterator[Example]:
    values = fields(row)
    texts = multiple_choice.lettered_options(values.get("options"))
    letter = multiple_choice.right_letter(
        texts,
        letter=text_of(values.get("answer_idx"), "answer_idx"),
        text=text_of(values.get("answer"), "answer"),
    )
    choice = multiple_choice.choice(text_of(values.get("question"), "question"), texts, letter)
    step = values.get("meta_info")
    meta = metadata(context, modality="", group=row.id, step=step if isinstance(step, str) else None)
    yield choice.example(row.id, [], meta)
