"""Tests of VILA's text rules with real tokenizers, against transformers and an independent rendering."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import real_tokenizers
import vila_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vila_reference import DIALOGUES, IMAGE, Words, reference

from vilam3_jax.data.examples import Turn
from vilam3_jax.data.render import encode_example
from vilam3_jax.data.templates import TEMPLATES, Encoded, Template, encode_conversation, encode_prompt
from vilam3_jax.data.text_rules import AS_TRAINED, CLEAN, TextRules, normalise_markers
from vilam3_jax.data.tokenizer import Tokenizer, load_tokenizer

RULES = {
    "as_trained": TextRules(AS_TRAINED, AS_TRAINED, AS_TRAINED),
    "demo": TextRules(AS_TRAINED, AS_TRAINED, CLEAN),
    "clean": TextRules(),
}
MODES = {"v1": "llama2", "llama_3": "llama3", "hermes-2": "qwen3", "mpt": "qwen3", "qwen2": "qwen3"}
ROWS = json.loads(vila_reference.GOLDENS.read_text())["rows"]
LINE_END = 198  # Llama 3's


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")

    @functools.cache  # also caches failures, so tests wait for an unresponsive registry only once
    def fetched(name: str) -> Path | real_tokenizers.Unreachable:
        try:
            return real_tokenizers.tokenizer_folder(name, root)
        except real_tokenizers.Unreachable as error:
            return error

    def folder(name: str) -> Path:
        found = fetched(name)
        if isinstance(found, real_tokenizers.Unreachable):
            pytest.skip(f"the real tokenizer of {name} cannot be fetched: {found}")
        return found

    return folder


@pytest.fixture(scope="module")
def tokenizer(folders):
    return functools.cache(lambda name: load_tokenizer(folders(name)))


@pytest.fixture(scope="module")
def words(folders):
    """transformers' tokenizers, called like in VILA."""
    from transformers import AutoTokenizer

    @functools.cache
    def load(name: str) -> Words:
        theirs = AutoTokenizer.from_pretrained(folders(name))
        if name != "llama2":
            encode = functools.cache(lambda text: theirs(text).input_ids)
            return Words(theirs.bos_token_id, encode, encode)

        def continued(text: str) -> list[int]:
            return theirs("</s>" + text, add_special_tokens=False).input_ids[1:]

        def encode(text: str) -> list[int]:
            # transformers 5 prepends no space before a space; SentencePiece and VILA's version do.
            spaced = text.startswith((" ", "▁"))
            return [theirs.bos_token_id, *continued(" " + text)] if spaced else theirs(text).input_ids

        return Words(theirs.bos_token_id, encode, continued)

    return load


def template_of(mode: str, rules: str) -> Template:
    return dataclasses.replace(TEMPLATES[mode], rules=RULES[rules])


def turns_of(dialogue) -> list[Turn]:
    return [Turn(role, text, role == "assistant") for role, text in dialogue]


def ids_of(encoded: Encoded) -> list[int]:
    """Token ids, with -200 for an image of one token."""
    return np.where(encoded.image_of_token >= 0, IMAGE, encoded.tokens).tolist()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(list(row.values())[:4]))
def test_ids_and_targets_of_vilas_own_tokenizers(row, tokenizer):
    template = template_of(row["mode"], row["rules"])
    encoded = encode_conversation(
        tokenizer(row["tokenizer"]), template, turns_of(DIALOGUES[row["dialogue"]]), 1
    )
    assert ids_of(encoded) == row["ids"]
    targets = np.zeros(len(row["ids"]), np.float32)
    for start, end in row["targets"]:
        targets[start:end] = 1
    assert encoded.loss_mask.tolist() == targets.tolist()


def test_the_same_from_the_file_that_transformers_saves(folders, tmp_path):
    """transformers' Llama 2 prepends no space before a space, which VILA's pieces require."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folders("llama2")).save_pretrained(tmp_path)
    tok = load_tokenizer(tmp_path)
    assert tok.adds_bos and tok.encode(" a") == tok.encode("a")
    for row in ROWS:
        if row["tokenizer"] == "llama2":
            template, turns = template_of(row["mode"], row["rules"]), turns_of(DIALOGUES[row["dialogue"]])
            assert ids_of(encode_conversation(tok, template, turns, 1)) == row["ids"]


FRAGMENTS = [
    "<image>",
    "\n",
    " ",
    "\t",
    ". ",
    ", T1:",
    "The results",
    "liver",
    " 1125 ml",
    "é",
    "日本",
    "'s",
    "?",
]
FRAGMENTS += ["<CXR()>", "ASSISTANT", "a", ":", "▁"]
QUESTIONS = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=8).map("".join)
# Without images and leading spaces in answers, which VILA's search for answers does not handle.
ANSWERS = QUESTIONS.map(lambda text: text.replace("<image>", "").lstrip() or "no")
SPACED_ANSWERS = QUESTIONS.map(lambda text: text.replace("<image>", "") or " no")
ROUNDS = st.lists(st.tuples(QUESTIONS, ANSWERS), min_size=1, max_size=3)
many = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("mode", MODES)
@many
@given(rounds=ROUNDS, rules=st.sampled_from(sorted(RULES)))
def test_any_dialogue_is_what_vila_makes_of_it(mode, tokenizer, words, rounds, rules):
    if mode == "qwen2":  # VILA's search mistakes a lone line end in an answer for the one after the stop
        rounds = [(asked, said.replace("\n", "; ")) for asked, said in rounds]
    dialogue = [turn for asked, said in rounds for turn in (("user", asked), ("assistant", said))]
    theirs, template = words(MODES[mode]), template_of(mode, rules)
    clean, spaces = rules == "clean", rules == "as_trained"
    encoded = encode_conversation(tokenizer(MODES[mode]), template, turns_of(dialogue), 1)
    ids, targets = reference(mode, dialogue, theirs, clean=clean, spaces=spaces)
    assert ids_of(encoded) == ids
    assert encoded.loss_mask.astype(bool).tolist() == targets

    asked = [
        (role, vila_reference.normalised(mode, text) if spaces else text) for role, text in dialogue[:-1]
    ]
    string = vila_reference.rendered(mode, asked, asks=True)
    prompt = encode_prompt(tokenizer(MODES[mode]), template, turns_of(dialogue[:-1]), 1)
    assert ids_of(prompt) == vila_reference.tokenised(string, theirs, clean=clean)


@pytest.mark.parametrize("mode", MODES)
@many
@given(
    rounds=st.lists(st.tuples(QUESTIONS, SPACED_ANSWERS), min_size=2, max_size=3),
    rules=st.sampled_from(sorted(RULES)),
)
def test_prompts_are_prefixes_and_continue(mode, tokenizer, rounds, rules):
    tok, template = tokenizer(MODES[mode]), template_of(mode, rules)
    turns = turns_of([turn for asked, said in rounds for turn in (("user", asked), ("assistant", said))])
    whole = encode_conversation(tok, template, turns, 1)
    prompt = encode_prompt(tok, template, turns[:1], 1)
    assert ids_of(whole)[: len(prompt)] == ids_of(prompt)
    # The agent appends this after the answer, which is cached without its stop:
    rest = encode_prompt(tok, template, turns[2:3], 1, after_answer=True)
    answer = len(encode_prompt(tok, template, turns[:3], 1)) - len(rest)
    assert ids_of(whole)[answer : answer + len(rest)] == ids_of(rest)
    assert whole.loss_mask[len(prompt) : answer].all()


# ---- the open question of spec §1.7


def test_llama_3_adds_no_bos_and_loses_the_first_token_after_an_image(tokenizer, words):
    tok = tokenizer("llama3")
    assert not tok.adds_bos and words("llama3").encode("") == []
    assert tokenizer("llama2").adds_bos and tokenizer("qwen3").bos_id is None
    question = [Turn("user", "<image>This is a CXR image.\nQ"), Turn("assistant", "no", True)]

    def read(rules: str) -> str:
        encoded = encode_conversation(tok, template_of("llama_3", rules), question, 1)
        after = encoded.tokens[np.argmax(encoded.image_of_token >= 0) + 1 :]
        return tok.decode(after, skip_special=False).partition("<|eot_id|>")[0]

    assert read("clean") == "This is a CXR image.\nQ"
    assert read("demo") == " is a CXR image.\nQ"  # a word is dropped
    assert read("as_trained") == "This is a CXR image.\nQ"  # the line end inserted in training is dropped


@many
@given(text=QUESTIONS)
def test_trained_spaces_leave_llama_3_only_a_line_end_to_lose(words, text):
    pieces = normalise_markers(text).split("<image>")[1:]
    assert all(words("llama3").encode(piece)[0] == LINE_END for piece in pieces)
    assert normalise_markers(normalise_markers(text)) == normalise_markers(text)


def test_a_tokenizer_that_adds_bos_itself_gives_two_and_loses_nothing(folders, tmp_path):
    """Later versions of Llama 3's file have such a post-processor."""
    data = json.loads((folders("llama3") / "tokenizer.json").read_text())
    piece, bos = {"Sequence": {"id": "A", "type_id": 0}}, "<|begin_of_text|>"
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, piece],
        "pair": [piece, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {bos: {"id": bos, "ids": [128_000], "tokens": [bos]}},
    }
    tok = Tokenizer(json.dumps(data), bos_id=128_000, eos_id=128_001)
    from transformers import PreTrainedTokenizerFast

    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=bos)
    encode = functools.cache(lambda text: theirs(text).input_ids)
    for dialogue in DIALOGUES.values():
        encoded = encode_conversation(tok, template_of("llama_3", "demo"), turns_of(dialogue), 1)
        ids, _ = reference("llama_3", dialogue, Words(128_000, encode, encode), spaces=False)
        assert ids_of(encoded) == ids and ids[:2] == [128_000] * 2


# ---- other effects of the rules


@pytest.mark.parametrize("name", ["llama2", "llama3", "qwen3"])
@pytest.mark.parametrize("rules", RULES)
def test_captions_are_plain(name, rules, tokenizer, words):
    """`<image>caption` and a line end, after BOS; as trained, only if the tokenizer adds it."""
    tok, theirs = tokenizer(name), words(name)
    turns = [Turn("user", "<image>"), Turn("assistant", "A chest X-ray.", True)]
    encoded = encode_example(tok, template_of("v1", rules), "caption", turns, 1)
    if rules == "clean":
        start = [] if tok.bos_id is None else [tok.bos_id]
        expected = [*start, IMAGE, *theirs.continued("A chest X-ray.\n")]
    else:
        expected = vila_reference.tokenised("<image>A chest X-ray.\n", theirs, clean=False)
    assert ids_of(encoded) == expected
    first = expected.index(IMAGE) + 1
    assert encoded.loss_mask.tolist() == [0.0] * first + [1.0] * (len(expected) - first)
    document = encode_example(tok, template_of("v1", rules), "document", turns[1:] + turns[:1], 1)
    assert (document.tokens[0] == tok.bos_id) == (expected[0] == tok.bos_id)


@pytest.mark.parametrize(
    ("template", "name", "string"),
    [  # spec §1.8, vflan
        ("vicuna_v1_nosys", "llama2", " USER: <image>\n<image>\nU ASSISTANT: A</s>"),
        (
            "llama_3_nosys",
            "llama3",
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\n<image>\nU<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA<|end_of_text|>",
        ),
        (
            "hermes-2_nosys",
            "qwen3",
            "<|im_end|><|im_start|>user\n<image>\n<image>\nU<|im_end|><|im_start|>assistant\nA<|im_end|>",
        ),
    ],
)
def test_vflan_without_system_text(template, name, string, tokenizer, words):
    turns = [Turn("user", "<image>\n<image>\nU"), Turn("assistant", "A", True)]
    encoded = encode_conversation(tokenizer(name), template_of(template, "as_trained"), turns, 1)
    assert ids_of(encoded) == vila_reference.tokenised(string, words(name), clean=False)


CONTROL = [
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<s>",
    "</s>",
    "<unk>",
]
CONTROL += ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "\n", " ", "user", "<image>"]


@pytest.mark.parametrize("mode", MODES)
@many
@given(
    text=st.lists(st.sampled_from(CONTROL), min_size=1, max_size=6).map("".join),
    rules=st.sampled_from(sorted(RULES)),
)
def test_no_text_can_write_a_control_token(mode, tokenizer, text, rules):
    """Also as trained, where the end of a turn is dropped if an image precedes it."""
    tok, template = tokenizer(MODES[mode]), template_of(mode, rules)

    def control(asked: str) -> list[str | None]:
        turns = [Turn("user", asked), Turn("assistant", text.replace("<image>", ""), True)]
        encoded = encode_conversation(tok, template, turns, 1)
        words = encoded.tokens[encoded.image_of_token < 0].tolist()
        return [tok.token(index) for index in words if index in tok.special_tokens.values()]

    expected = control("a")
    if mode == "llama_3" and rules == "demo" and text.endswith("<image>"):
        expected.remove("<|eot_id|>")
    assert sorted(map(str, control(text))) == sorted(map(str, expected))
