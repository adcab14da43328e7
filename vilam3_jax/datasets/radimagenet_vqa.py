"""RadImageNet-VQA, the benchmark: questions about slices of CT and MRI, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import multiple_choice, parquet
from vilam3_jax.datasets.conversations import conversation, free_question, metadata, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.rows import word
from vilam3_jax.datasets.source_files import SourceFolder

_COLUMNS = {name: (name,) for name in ("image", "question", "choices", "answer", "question_type", "metadata")}
_MODALITIES = {"ct": "CT", "mri": "MR", "mr": "MR"}
_KEPT = ("pathology", "location", "content_type", "question_id")


class RadImageNetVqa(Dataset):
    """The source's variant "benchmark"; a single split "test".

    The training variants are not supported: their counts and ids are not verified. A question with choices
    gets lettered options in the source's order; its answer may be the text or the letter of an option. An
    example's id is `test/` and the row number, counted over all files.
    """

    name = "radimagenet_vqa"
    description = "Questions about slices of CT and MRI with 97 pathologies: the benchmark, for evaluation."
    homepage = "https://huggingface.co/datasets/raidium/RadImageNet-VQA"
    licence = "unverified"
    access = "registered"
    instructions = """
        Ask for access to https://huggingface.co/datasets/raidium/RadImageNet-VQA and fetch
        benchmark/test-*.parquet, all of its parts, into a folder benchmark/.
        """

    def splits(self, source: SourceFolder) -> Mapping[str, Split]:
        files = parquet.parts(source, "benchmark/test-*.parquet", "test-*.parquet")
        return {"test": Split(parquet.rows(source, files, _COLUMNS, "test"), _make)}


def _make(row: parquet.Place, context: Context) -> Iterator[Example]:
    context.file(row.file)
    values = parquet.read(context.root, row)
    image = ImageRef(data=parquet.image_bytes(values["image"]))
    question = text_of(values["question"], "question").strip()
    answer = text_of(values["answer"], "answer").strip()
    kind = word(values, "question_type") or "open"
    described = values["metadata"] if isinstance(values["metadata"], dict) else {}
    modality = word(described, "modality")
    meta = metadata(
        context,
        modality=_MODALITIES.get(modality.lower(), modality.upper()),
        group=row.id,
        **{key: word(described, key) or None for key in _KEPT},
    )
    if choices := values["choices"]:
        if not isinstance(choices, list):
            raise SkipItem("the choices are not a list")
        yield multiple_choice.listed_choice(question, choices, answer).example(row.id, [image], meta, kind)
    else:
        qa = free_question(question, answer, kind)
        yield conversation(row.id, [image], [(question, answer)], meta, questions=[qa])
