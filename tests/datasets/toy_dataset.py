"""An unregistered dataset: a list of images, questions and answers."""

import os
import signal

from vilam3_jax.datasets.conversations import conversation, metadata, question_meta, text_of
from vilam3_jax.datasets.dataset import Dataset, Split


def make(row, context):
    if row.get("kill") == os.environ.get("TOY_KILL", "never"):
        os.kill(os.getpid(), signal.SIGKILL)
    image = context.image(row["image"])
    question, answer = text_of(row["question"], "question"), text_of(row["answer"], "answer")
    meta = metadata(context, modality="CXR", patient=row["patient"])
    asked = question_meta(question, answer, "open")
    yield conversation(row["id"], [image], [(question, answer)], meta, questions=[asked])


def name_of(row):
    return f"rows.json row {row['row']}"


class Toy(Dataset):
    name = "toy"
    version = "1.2.0"
    description = "A toy."
    licence = "CC0-1.0"
    instructions = "Write rows.json and the pictures beside it."

    def splits(self, source):
        source.require("rows.json")
        rows = source.json_list("rows.json")
        return {
            split: Split(
                [{**row, "row": number} for number, row in enumerate(rows) if row["split"] == split],
                make,
                name_of,
                expected=getattr(self, "expected", None),
                per_item=1024,  # two items a shard
            )
            for split in ("train", "test")
        }
