"""LLaVA-Med: figures of PubMed Central with captions, and dialogues generated from them by GPT-4."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vilam3_jax.data.examples import IMAGE_MARKER, Example
from vilam3_jax.datasets import caption_lists, instruction_lists
from vilam3_jax.datasets.conversations import metadata, question_conversation, question_meta, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, Split
from vilam3_jax.datasets.image_files import ImageFiles, find_image_files
from vilam3_jax.datasets.instruction_lists import Record
from vilam3_jax.datasets.rows import Row, fields, name_of, rows_of
from vilam3_jax.datasets.source_files import SourceFolder

_FILES = {
    "alignment": "llava_med_alignment_500k.json",
    "instruct": "llava_med_instruct_60k_inline_mention.json",
    "instruct_60k": "llava_med_instruct_60k.json",
    "instruct_10k": "llava_med_instruct_10k.json",
    "fig_captions": "llava_med_instruct_fig_captions.json",
    "eval": "llava_med_eval_qa50_qa.jsonl",
}
_MODALITIES = {"chest_xray": "CXR", "mri": "MR", "ct_scan": "CT", "histology": "PATHOLOGY", "gross": "GROSS"}
_FIGURE = re.compile(r"(.+?)_F[^_]*\.\w+$")


class LlavaMed(Dataset):
    """Figures of articles with a caption (alignment) or a dialogue (instruct).

    The release contains no images; `llava_med_image_urls.jsonl` lists the PMC packages that do. Records whose
    image is missing are skipped. The figures of an article form a group. `modality` is set if the record's
    `domain` names exactly one.
    """

    name = "llava_med"
    description = "Figures of PubMed Central with captions and dialogues (LLaVA-Med)."
    homepage = "https://github.com/microsoft/LLaVA-Med"
    citation = "Li et al., LLaVA-Med, NeurIPS Datasets and Benchmarks 2023"
    licence = "CC-BY-NC-4.0, research only"
    instructions = (
        "Fetch the variant's list (such as llava_med_alignment_500k.json) as "
        "https://github.com/microsoft/LLaVA-Med describes, and the figures that llava_med_image_urls.jsonl "
        "lists from PMC, to images/ under the names of the records (<pmid>_F<k>.jpg)."
    )
    configs: Mapping[str, str] = {
        "alignment": "one instruction and the caption, 500k records",
        "instruct": "dialogues about 60k figures, generated from captions and the text that mentions them",
        "instruct_60k": "dialogues about 60k figures, generated from captions",
        "instruct_10k": "dialogues about 10k figures",
        "fig_captions": "a further list of dialogues generated from captions",
        "eval": "evaluation questions of the release, with answers by GPT-4",
    }
    expert_inputs = False

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        file, _ = source.require(_FILES[self.config], ("images", "images.zip"))
        image_files = find_image_files(source, ["images"], ["images.zip"])
        if self.config == "eval":
            items = rows_of(file, source.json_lines(file), lambda row: row["question_id"])
            return {"test": Split(items, functools.partial(_make_question, image_files=image_files), name_of)}
        path = str(source.root / file)
        make = functools.partial(_make, image_files=image_files)
        return {"train": instruction_lists.split_of(path, instruction_lists.scan(path).records, make)}


def _make(item: Record, context: Context, *, path: str, image_files: ImageFiles) -> Iterator[Example]:
    example, record = caption_lists.read(item, context, path, image_files)
    meta = _metadata(context, record, caption_lists.group_of(record))
    yield caption_lists.shaped(example, meta, "conversation")


def _make_question(row: Row, context: Context, *, image_files: ImageFiles) -> Iterator[Example]:
    record = fields(row)
    question = text_of(record.get("text"), "question").replace(IMAGE_MARKER, "").strip()
    answer = text_of(record.get("gpt4_answer"), "answer of GPT-4")
    image = image_files.ref(context, record.get("image"))
    meta = _metadata(context, record, str(record["image"]))
    qa = question_meta(question, answer, "open", label_source="GPT-4")
    yield question_conversation(row.id, [image], meta, [qa])


def _metadata(context: Context, record: Mapping[str, Any], image: str | None) -> dict[str, Any]:
    domain = record.get("domain")
    marked = [key for key in _MODALITIES if isinstance(domain, dict) and domain.get(key) is True]
    article = _FIGURE.match(image) if image else None
    return metadata(
        context,
        modality=_MODALITIES[marked[0]] if len(marked) == 1 else "",
        group=article[1] if article else image,
        domains=marked or None,
    )
