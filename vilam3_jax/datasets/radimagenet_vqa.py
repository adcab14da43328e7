"""RadImageNet-VQA, its benchmark: questions about slices of CT and MRI. For evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vilam3_jax.data.examples import Example, ImageRef
from vilam3_jax.datasets import multiple_choice, parquet, vqa
from vilam3_jax.datasets.conversations import conversation, metadata, question_meta, text_of
from vilam3_jax.datasets.dataset import Context, Dataset, SkipItem, Split
from vilam3_jax.datasets.rows import word
from vilam3_jax.datasets.source_files import SourceFolder

_COLUMNS = {name: (name,) for name in ("image", "question", "choices", "answer", "question_type", "metadata")}
_MODALITIES = {"ct": "CT", "mri": "MR", "mr": "MR"}
_KEPT = ("pathology", "location", "content_type", "question_id")


class RadImageNetVqa(Dataset):
    """The variant "benchmark" of the source; one split, "test".

    Its training variants are left out, because nobody has verified their counts and ids. A question with
    choices is asked with lettered options, in the source's order; the answer may be the text or the letter of
    one. An example's id is `test/` and the row, counted over all files.
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
        """Reads the footers of the parquet files."""
        files = parquet.parts(source, "benchmark/test-*.parquet", "test-*.parquet")
        return {"test": Split(parquet.rows(source, files, _COLUMNS, "test"), make)}


def make(row: parquet.Place, context: Context) -> Iterator[Example]:
    """One question about one image."""
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
    if values["choices"]:
        if not isinstance(values["choices"], list):
            raise SkipItem("the choices are no list")
        asked = multiple_choice.listed_choice(question, values["choices"], answer)
        qa = question_meta(question, asked.answer, kind, options=asked.options)
        exchange = (asked.prompt, asked.reply)
    else:
        closed = vqa.is_yes_no(answer)
        right = answer.rstrip(".").lower() if closed else answer
        qa = question_meta(question, right, kind, options=vqa.YES_NO if closed else ())
        exchange = (question, answer)
    yield conversation(row.id, [image], [exchange], meta, questions=[qa])
