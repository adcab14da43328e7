"""Tests of VILA's conversation modes with a byte-level and a SentencePiece-like vocabulary."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from vilam3_jax.data.examples import Turn
from vilam3_jax.data.templates import encode_conversation, encode_prompt, get_template
from vilam3_jax.data.tokenizer import Tokenizer, digit_byte_level

T = 3
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
DIALOGUE = (
    Turn("user", "<image>\nWhat is it?"),
    Turn("assistant", "<CXR()>", True),
    Turn("expert", "pneumonia: yes"),
    Turn("assistant", "a lung", True),
)
CURIOUS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions."
)
SEES = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
STRINGS = {
    "llama_3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + SEES + "<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n###\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<CXR()><|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\npneumonia: yes<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na lung<|end_of_text|>",
        "<CXR()><|eot_id|>a lung<|end_of_text|>",
    ),
    "vicuna_v1": (
        f"<s>{CURIOUS} USER: ###\nWhat is it? ASSISTANT: <CXR()></s>"
        "USER: pneumonia: yes ASSISTANT: a lung</s>",
        " <CXR()></s> a lung</s>",
    ),
    "vicuna_v1_nosys": (
        "<s> USER: ###\nWhat is it? ASSISTANT: <CXR()></s>USER: pneumonia: yes ASSISTANT: a lung</s>",
        " <CXR()></s> a lung</s>",
    ),
    "hermes-2": (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n###\nWhat is it?<|im_end|>"
        "<|im_start|>assistant\n<CXR()><|im_end|><|im_start|>user\npneumonia: yes<|im_end|>"
        "<|im_start|>assistant\na lung<|im_end|>",
        "<CXR()><|im_end|>a lung<|im_end|>",
    ),
    "qwen2": (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        "<|im_start|>user\n###\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\n<CXR()><|im_end|>\n<|im_start|>user\npneumonia: yes<|im_end|>\n"
        "<|im_start|>assistant\na lung<|im_end|>\n",
        "<CXR()><|im_end|>a lung<|im_end|>",
    ),
}
TEXTS = [
    CURIOUS,
    SEES,
    "USER: What is it? ASSISTANT: a lung",
    "user assistant system\n\nAnswer the questions.",
]


@functools.cache
def sentencepiece_like() -> Tokenizer:
    """A BPE with byte fallback that prepends a space to texts, like Llama 2's."""
    built = Library(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    built.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({c for text in TEXTS for c in text if c != "\n"} - {" "})
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=specials, initial_alphabet=[*letters, "▁"])
    words = [word for text in TEXTS for word in text.replace("\n", " ").split(" ")]
    built.train_from_iterator(words, trainer)
    text = built.to_str()
    # Bytes must be ordinary entries, not control tokens.
    data = json.loads(text)
    data["added_tokens"] = [token for token in data["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer(json.dumps(data), bos_id=1, eos_id=2)


@functools.cache
def byte_level(specials: tuple[str, ...]) -> Tokenizer:
    built = Library(models.BPE())
    built.pre_tokenizer = digit_byte_level()
    built.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet)
    built.train_from_iterator(TEXTS, trainer)
    return Tokenizer(built.to_str(), bos_id=0, eos_id=1)


def tokenizer_for(name: str) -> Tokenizer:
    if name == "llama_3":
        return byte_level(LLAMA_3)
    return sentencepiece_like() if "v1" in name else byte_level(CHATML)


def written(tok, encoded, targets_only=False) -> str:
    """Decodes the tokens, with `#` for an image token and a space for `▁`."""
    out = []
    for token, image, target in zip(encoded.tokens, encoded.image_of_token, encoded.loss_mask, strict=True):
        if target or not targets_only:
            piece = "#" if image >= 0 else tok.decode([int(token)], skip_special=False)
            out.append(piece)
    return "".join(out)


@pytest.mark.parametrize("name", STRINGS)
def test_published_string_and_targets(name):
    tok = tokenizer_for(name)
    encoded = encode_conversation(tok, get_template(name), DIALOGUE, T)
    whole, targets = STRINGS[name]
    # SentencePiece's prepended space comes after <s>.
    assert written(tok, encoded).replace("<s> A", "<s>A").replace("<s>  ", "<s> ") == whole
    assert written(tok, encoded, targets_only=True) == targets


@pytest.mark.parametrize("name", STRINGS)
def test_same_ids_as_the_whole_string(name):
    """Between images, encoding in pieces equals encoding the whole string."""
    tok = tokenizer_for(name)
    turns = tuple(turn for turn in DIALOGUE if "<image>" not in turn.text)
    turns = (Turn("user", "What is it?"), *turns)
    encoded = encode_conversation(tok, get_template(name), turns, T)
    whole = STRINGS[name][0].replace("###\n", "")
    if "v1" not in name:
        assert encoded.tokens.tolist() == tok.encode(whole, allow_special=True)
        return
    pieces = whole.removeprefix("<s>").split("</s>")[:-1]
    expected = [tok.bos_id]
    for number, piece in enumerate(pieces):
        expected += [*(tok.encode_continued(piece) if number else tok.encode(piece)), tok.eos_id]
    assert encoded.tokens.tolist() == expected


@pytest.mark.parametrize("name", STRINGS)
def test_prompts_are_prefixes_and_continue(name):
    tok, template = tokenizer_for(name), get_template(name)
    whole = encode_conversation(tok, template, DIALOGUE, T).tokens.tolist()
    first = encode_prompt(tok, template, DIALOGUE[:1], T).tokens.tolist()
    assert whole[: len(first)] == first
    said = encode_conversation(tok, template, DIALOGUE[:2], T)
    answer = said.tokens[len(first) :][said.loss_mask[len(first) :] > 0][:-1].tolist()  # without its stop
    rest = encode_prompt(tok, template, [DIALOGUE[2]], T, after_answer=True).tokens.tolist()
    assert whole[: len(first) + len(answer) + len(rest)] == first + answer + rest


def test_a_system_turn_replaces_the_default():
    tok = tokenizer_for("llama_3")
    turns = (Turn("system", "Be brief."), *DIALOGUE)
    text = written(tok, encode_conversation(tok, get_template("llama_3"), turns, T))
    assert "Be brief.<|eot_id|>" in text and "helpful language" not in text


@given(text=st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\x00"), max_size=20))
def test_continued_text_is_the_text(text):
    tok = sentencepiece_like()
    before = tok.encode("a")
    assert tok.decode(before + tok.encode_continued(text)) == tok.decode(before) + text.replace("▁", " ")
