"""PMC-VQA: multiple-choice questions about figures of open-access articles."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from vilam3_jax.data.examples import Example
from vilam3_jax.datasets import multiple_choice
from vilam3_jax.datasets.conversations import metadata, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, Split
from vilam3_jax.datasets.rows import Row, below, fields, name_of, rows_of
from vilam3_jax.datasets.source_files import SourceFolder

_LETTERS = "ABCD"
_COLUMNS = {
    "figure": ("Figure_path",),
    "question": ("Question",),
    **{letter: (f"Choice {letter}", f"Choice_{letter}") for letter in _LETTERS},
    "answer": ("Answer", "Anwser"),
}
_OPTIONAL = {"label": ("Answer_label",), "index": ("index",), "source_split": ("split",)}
# Variant → (folder of the figures, split → table). Both releases name files PMC<id>_..., so each has a
# separate folder.
_FILES = {
    "v1": ("images", {"train": "train.csv", "test": "test.csv", "test_clean": "test_clean.csv"}),
    "v2": ("figures", {"train": "train_2.csv", "test": "test_2.csv"}),
}
_EXPECTED = {"test_clean": 2_000}
_ARTICLE = re.compile(r"(PMC\d+)_")


class PmcVqa(Dataset):
    """Questions with four options about figures of PubMed Central.

    - The options of training questions are shuffled; those of test questions keep their order.
    - The caption is not shown: questions were generated from it, and it often states the answer.
    - The split `test_clean` repeats the manually checked questions of `test`.
    - `meta.article` is the PMC number, which identifies the article in PMC-OA and LLaVA-Med.
    """

    name = "pmc_vqa"
    description = "Multiple-choice questions about figures of articles, written by a language model."
    homepage = "https://huggingface.co/datasets/xmcmic/PMC-VQA"
    citation = "Zhang et al., PMC-VQA: Visual Instruction Tuning for Medical Visual Question Answering, 2023"
    licence = "CC-BY-SA-4.0"
    instructions = """
        Fetch from https://huggingface.co/datasets/xmcmic/PMC-VQA (also RadGenome/PMC-VQA), for v1: train.csv,
        test.csv, test_clean.csv and images.zip, unpacked to images/; for v2: train_2.csv, test_2.csv and
        images_2.zip, unpacked to figures/. The two releases do not share figures.
        """
    configs: Mapping[str, str] = {
        "v1": "all figures, with the checked split test_clean",
        "v2": "figures without sub-figures",
    }
    shared_images = "the source does not say that its splits divide figures, and test_clean is a part of test"

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        folder, tables = _FILES[self.config]
        source.require(folder, *tables.values())
        found = {}
        for split, file in tables.items():
            numbered = enumerate(source.table(file, _COLUMNS, optional=_OPTIONAL), 1)
            rows = rows_of(file, numbered, lambda row: row["index"], prefix=split)
            found[split] = Split(rows, _make, name_of, _EXPECTED.get(split))
        return found


def _make(row: Row, context: Context) -> Iterator[Example]:
    cells = fields(row)
    question = text_of(cells["question"], "question")
    options = multiple_choice.lettered_options({letter: cells[letter] for letter in _LETTERS})
    choice = multiple_choice.choice(question, options, _right(cells, options, context.config))
    if context.split == "train":
        choice = choice.shuffled(context.rng(row.id))
    figure = below(_FILES[context.config][0], cells["figure"])
    article = _ARTICLE.match(figure.rpartition("/")[2])
    meta = metadata(
        context,
        modality="",
        group=figure,
        article=article and article[1],
        label_source="generated",
        source_split=cells.get("source_split") or None,
    )
    yield choice.example(row.id, [context.image(figure)], meta, label_source="generated")


def _right(cells: Mapping[str, str], options: Mapping[str, str], variant: str) -> str:
    """Returns the letter of the answer. v2 states it; v1 the text and, in some revisions, the letter too."""
    answer = text_of(cells["answer"], "answer")
    if label := multiple_choice.single_letter(cells.get("label"), _LETTERS):
        text = "" if multiple_choice.single_letter(answer, _LETTERS) == label else _without_letter(answer)
        return multiple_choice.right_letter(options, letter=label, text=text)
    letter = multiple_choice.single_letter(answer, _LETTERS)
    if letter and (variant == "v2" or answer.strip() not in options.values()):
        return letter
    return multiple_choice.right_letter(options, text=_without_letter(answer))


def _without_letter(answer: str) -> str:
    """Removes the letter of the option, as in " A:liver"."""
    return re.sub(rf"^\s*[{_LETTERS}]\s*:", "", answer)
