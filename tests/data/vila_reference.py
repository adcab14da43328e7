"""VILA's way from a dialogue to ids and labels, written again from the facts (spec §1.7, §1.8, §2).

Whole strings, split on `<image>`, one call of the tokenizer for each piece, labels by comparison with a
dialogue whose answers are replaced. Slow and simple; nothing of vilam3_jax is used. As a program it writes
the golden ids of `goldens/vila_tokens.json`, in an environment with VILA's own transformers:

    python tests/data/vila_reference.py llama2=FOLDER llama3=FOLDER

(`qwen3=FOLDER` in another, whose tokenizers read its file.) For llama2 the folder had a SentencePiece model
made of the package's vocabulary: byte pieces, scores falling with the id, runs of spaces last, as in the
order of its merges.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

IMAGE = -200
SENTINEL = "[VILA-SENTINEL]"
GOLDENS = Path(__file__).parent / "goldens" / "vila_tokens.json"
Dialogue = Sequence[tuple[str, str]]  # ("user" or "assistant", text)

SYSTEM = {
    "v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions.",
    "llama_3": "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural language.",
    "hermes-2": "Answer the questions.",
    "mpt": "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers.",
    "qwen2": "You are a helpful assistant",
}
DIALOGUES: dict[str, Dialogue] = {
    "one_turn": [
        ("user", "<image>\nDescribe the image in detail."),
        ("assistant", "There is a moderate left pleural effusion. No pneumothorax."),
    ],
    "multi_turn": [
        ("user", "<image>\nIs there a fracture?"),
        ("assistant", "no"),
        ("user", "Where is the effusion?"),
        ("assistant", "On the left.\nIt is moderate, about 250 ml. "),
        ("user", "Danke für das Bild "),
        ("assistant", "You are welcome."),
    ],
    "multi_image": [
        (
            "user",
            "T1(contrast enhanced): <image>, T1: <image>, T2: <image>, FLAIR: <image> These are different "
            "MRI modalities.\nWhat glioma grade is shown in the image?",
        ),
        ("assistant", "This looks like an MRI image sequence. Let me first trigger <BRATS()>."),
        (
            "user",
            "The results are <image>. The colors in this image describe\nyellow and red: tumor core\nUse "
            "this result to respond to this prompt:\nWhat glioma grade is shown in the image?.",
        ),
        ("assistant", "The scan indicates high grade glioma."),
    ],
    "expert": [
        (
            "user",
            "Give the model <NAME(args)> when selecting a suitable expert model.\n<image>This is a CXR "
            "image.\nIs there pneumonia?",
        ),
        ("assistant", "This looks like an chest x-ray. Let me first trigger <CXR()>."),
        (
            "user",
            "The resulting predictions are:\natelectasis: no\npneumonia: yes\n. Analyze the image and take "
            "these predictions into account when responding to this prompt:\nIs there pneumonia?",
        ),
        ("assistant", "Yes, in the right lower lobe."),
    ],
    "image_last": [("user", "What is it?\n<image>"), ("assistant", "A CT image.")],
}


@dataclasses.dataclass(frozen=True)
class Words:
    """A tokenizer: `encode` as it is called by default, `continued` for text that follows other tokens."""

    bos_id: int | None
    encode: Callable[[str], list[int]]
    continued: Callable[[str], list[int]]


def normalised(mode: str, text: str) -> str:
    """Spaces and line ends around images as trained."""
    if "<image>" in text:
        *leading, last = [piece.strip() for piece in text.split("<image>")]
        text = "".join(piece + " " + "<image>\n" for piece in leading) + last
        text = text.strip()
        text = text.replace("<image>", "<image>\n").replace("<image>\n\n", "<image>\n")
    return text.strip() if mode == "qwen2" else text


def rendered(mode: str, dialogue: Dialogue, *, asks: bool = False) -> str:
    """The whole string; with `asks` the prompt for the next answer."""
    if mode == "v1":
        text = SYSTEM[mode] + " "
        for role, said in dialogue:
            text += f"USER: {said} " if role == "user" else f"ASSISTANT: {said}</s>"
        return text + ("ASSISTANT:" if asks else "")
    if mode == "llama_3":
        turns = [("system", SYSTEM[mode]), *dialogue]
        text = "<|begin_of_text|>"
        for number, (role, said) in enumerate(turns):
            last = number == len(turns) - 1 and not asks
            end = "<|end_of_text|>" if last else "<|eot_id|>"
            text += f"<|start_header_id|>{role}<|end_header_id|>\n\n{said}{end}"
        return text + ("<|start_header_id|>assistant<|end_header_id|>\n\n" if asks else "")
    after = "\n" if mode == "qwen2" else ""
    turns = [("system", SYSTEM[mode]), *dialogue]
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>{after}" for role, said in turns)
    return text + ("<|im_start|>assistant\n" if asks else "")


def tokenised(text: str, words: Words, *, clean: bool) -> list[int]:
    """Ids, with -200 for an image."""
    first, *others = text.split("<image>")
    if clean:
        ids = words.encode(first)
        for piece in others:
            ids = [*ids, IMAGE, *words.continued(piece)]
        return ids
    chunks = [words.encode(piece) for piece in (first, *others)]
    ids, offset = [], 0
    if chunks[0] and chunks[0][0] == words.bos_id:
        ids, offset = [chunks[0][0]], 1
    for number, chunk in enumerate(chunks):
        ids += ([IMAGE] if number else []) + chunk[offset:]
    return ids


def labelled(ids: list[int], template: list[int], sentinel: list[int]) -> list[bool]:
    """Which ids are targets: those that the dialogue without answers and stops does not have."""
    kept, position = [], 0
    while position < len(template):
        if template[position : position + len(sentinel)] == sentinel:
            position += len(sentinel) + 1
        else:
            kept.append(template[position])
            position += 1
    targets, waiting = [], 0
    for index in ids:
        known = waiting < len(kept) and index == kept[waiting]
        waiting += known
        targets.append(not known)
    assert waiting == len(kept), "VILA would leave this sample out of the loss"
    return targets


def reference(
    mode: str, dialogue: Dialogue, words: Words, *, clean: bool = False, spaces: bool = True
) -> tuple[list[int], list[bool]]:
    """Ids and targets of a training dialogue.

    Args:
      mode: a key of `SYSTEM`.
      dialogue: begins with the user.
      words: the tokenizer.
      clean: text goes on after an image, and no token is dropped.
      spaces: as trained.
    """
    if spaces:
        dialogue = [(role, normalised(mode, said)) for role, said in dialogue]
    emptied = [(role, SENTINEL if role == "assistant" else said) for role, said in dialogue]
    ids, template = (tokenised(rendered(mode, turns), words, clean=clean) for turns in (dialogue, emptied))
    bare = words.encode(SENTINEL)
    return ids, labelled(ids, template, bare[1:] if bare[0] == words.bos_id else bare)


def _spans(targets: list[bool]) -> list[list[int]]:
    around = zip([False, *targets], [*targets, False], strict=True)
    edges = [number for number, (before, after) in enumerate(around) if before != after]
    return [edges[i : i + 2] for i in range(0, len(edges), 2)]


def _write(folders: dict[str, str]) -> None:
    from transformers import AutoTokenizer

    modes = {"llama2": ["v1"], "llama3": ["llama_3"], "qwen3": ["hermes-2", "qwen2"]}
    found = json.loads(GOLDENS.read_text()) if GOLDENS.exists() else {"made_with": {}, "rows": []}
    for name, folder in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=name != "llama2", legacy=False)
        stop = "</s>" if name == "llama2" else ""
        words = Words(
            tokenizer.bos_token_id,
            lambda text, t=tokenizer: t(text).input_ids,
            lambda text, t=tokenizer, s=stop: t(s + text, add_special_tokens=False).input_ids[bool(s) :],
        )
        packages = ["transformers", "tokenizers"] + ["sentencepiece"] * (name == "llama2")
        versions = [f"{package} {importlib.metadata.version(package)}" for package in packages]
        found["made_with"][name] = ", ".join([type(tokenizer).__name__, *versions])
        found["rows"] = [row for row in found["rows"] if row["tokenizer"] != name]
        for mode in modes[name]:
            for title, dialogue in DIALOGUES.items():
                for rules in ("as_trained", "demo", "clean"):
                    if name == "qwen3" and rules != "as_trained":
                        continue
                    clean, spaces = rules == "clean", rules == "as_trained"
                    ids, targets = reference(mode, dialogue, words, clean=clean, spaces=spaces)
                    found["rows"].append(
                        {"tokenizer": name, "mode": mode, "dialogue": title, "rules": rules}
                        | {"ids": ids, "targets": _spans(targets)}
                    )
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in found["rows"])
    GOLDENS.parent.mkdir(exist_ok=True)
    GOLDENS.write_text(f'{{"made_with": {json.dumps(found["made_with"])},\n"rows": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    _write(dict(argument.split("=", 1) for argument in sys.argv[1:]))
