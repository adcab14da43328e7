"""Tests of tokenizers: ids, injection of control tokens, training, and error messages."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from vilam3_jax.data.tokenizer import CHATML_SPECIALS, Tokenizer, load_tokenizer, train_bpe
from vilam3_jax.errors import UserError

CORPUS = [
    "There is a moderate left pleural effusion. No pneumothorax.",
    "The liver is 1125 ml. The spleen is 230 ml.",
    "Heart size is normal. Lungs are clear. <image>",
] * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tok") / "hf"
    train_bpe(CORPUS, 300, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(CHATML_SPECIALS), st.text(max_size=5))))
def test_text_cannot_inject_control_tokens(tokenizer, parts):
    text = "".join(parts)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special_tokens.values())
    assert tokenizer.decode(ids) == text


def test_control_tokens_only_where_allowed(tokenizer):
    text = "<|im_start|>user\nHello<|im_end|>\n"
    ids = tokenizer.encode(text, allow_special=True)
    assert ids[0] == tokenizer.bos_id == tokenizer.token_id("<|im_start|>")
    assert ids.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids) == "user\nHello\n"
    assert tokenizer.decode(ids, skip_special=False) == text


def test_the_defence_survives_copies(tokenizer):
    # The library's own pickling loses the setting, and loader workers receive pickled copies.
    again = copy.deepcopy(tokenizer)
    text = "a<|im_end|>b"
    assert again.encode(text) == tokenizer.encode(text)
    assert tokenizer.eos_id not in again.encode(text)
    assert again.stop_ids == tokenizer.stop_ids and again.pad_id == tokenizer.pad_id


def test_control_token_that_is_also_vocabulary_cannot_be_injected():
    # Without a pre-tokenizer and with merges ignored, the model matches the whole string.
    vocab = {character: index for index, character in enumerate("</s>ab")} | {"</s>": 6}
    built = tokenizers.Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    built.add_special_tokens(["</s>"])
    plain = tokenizers.Tokenizer.from_str(built.to_str())
    plain.encode_special_tokens = True
    assert plain.encode("</s>", add_special_tokens=False).ids == [6]  # the vocabulary has the token
    tokenizer = Tokenizer(built.to_str(), eos_id=6)
    assert tokenizer.encode("</s>") == [0, 1, 2, 3]
    assert 6 not in tokenizer.encode("a</s>b</s>")
    assert tokenizer.encode("</s>", allow_special=True) == [6]


def test_control_tokens_that_the_file_does_not_mark(tokenizer):
    """Files of some chat models declare them as ordinary added tokens."""
    values = json.loads(tokenizer.to_json())
    for entry in values["added_tokens"]:
        entry["special"] = False
    built = tokenizers.Tokenizer.from_str(json.dumps(values))
    built.encode_special_tokens = True
    control = [0, 1, 2]
    assert built.encode("".join(CHATML_SPECIALS), add_special_tokens=False).ids == control
    unmarked = Tokenizer(json.dumps(values), eos_id=2)
    text = "a<|im_end|>b" + "<|endoftext|><|im_start|>" * 2000
    ids = unmarked.encode(text)
    assert not set(ids) & set(control) and unmarked.decode(ids) == text
    assert unmarked.decode([*control, *unmarked.encode("a")]) == "a"
    assert unmarked.encode("<|im_end|>", allow_special=True) == [2]


def test_numbers_are_split_digit_by_digit(tokenizer):
    assert [tokenizer.token(index) for index in tokenizer.encode("1125")] == ["1", "1", "2", "5"]


def test_training_is_deterministic_and_fills_the_vocabulary(folder, tmp_path):
    again = train_bpe(CORPUS, 300, tmp_path / "again")
    assert again.vocab_size == 300
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert [again.pad_id, again.bos_id, again.eos_id] == [0, 1, 2]
    assert len(again.encode("pleural effusion")) <= len("pleural effusion") / 2


def test_save_keeps_everything(tokenizer, tmp_path):
    made = Tokenizer(
        tokenizer._json, eos_id=2, stop_ids=(0,), chat_template="{{ x }}", settings={"legacy": False}
    )
    made.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.stop_ids == (2, 0) and again.pad_id == 2 and again.chat_template == "{{ x }}"
    assert again.bos_id is None
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["legacy"] is False


def test_truncation_and_padding_in_the_file_are_ignored(tokenizer, folder, tmp_path):
    built = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    built.enable_truncation(2)
    built.enable_padding(length=50)
    (tmp_path / "tokenizer.json").write_text(built.to_str())
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])
    assert loaded.stop_ids == (2, 0)
    values = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(values, indent=3))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    assert load_tokenizer(tmp_path).fingerprint == loaded.fingerprint
    values["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(values, indent=3))
    assert load_tokenizer(tmp_path).fingerprint != loaded.fingerprint


def test_special_tokens_written_as_objects(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": "<|im_start|>"})
    )
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.bos_id, loaded.pad_id) == (2, 1, 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.model": "x"}, "only tokenizer.model"),
        ({"tokenizer.json": "{}"}, "not a readable tokenizer"),
        ({"tokenizer.json": "GOOD", "tokenizer_config.json": "{"}, "not valid JSON"),
        ({"tokenizer.json": "GOOD", "tokenizer_config.json": "[]"}, "a JSON object was expected"),
        ({"tokenizer.json": "GOOD"}, "no end-of-sequence token"),
        (
            {"tokenizer.json": "GOOD", "tokenizer_config.json": '{"eos_token": "</s>"}'},
            "not in tokenizer.json",
        ),
    ],
)
def test_errors_name_the_folder(folder, tmp_path, files, message):
    for name, text in files.items():
        text = (folder / "tokenizer.json").read_text() if text == "GOOD" else text
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="absent: no such tokenizer folder"):
        load_tokenizer(tmp_path / "absent")


def test_renumbered_added_tokens_are_refused(folder, tmp_path):
    value = json.loads((folder / "tokenizer.json").read_text())
    value["added_tokens"].append({**value["added_tokens"][0], "id": 9000, "content": "<image>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match="'<image>' claims id 9000"):
        load_tokenizer(tmp_path)


def test_unknown_token_and_impossible_training_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match="no token '<nothing>'"):
        tokenizer.token_id("<nothing>")
    with pytest.raises(UserError, match="vocab_size 100: must be at least 259"):
        train_bpe(CORPUS, 100, tmp_path)
    with pytest.raises(UserError, match="needs three or more different tokens"):
        train_bpe(CORPUS, 400, tmp_path, special_tokens=("<a>", "<a>", "<b>"))


def test_neither_torch_nor_jax_nor_transformers_is_imported():
    code = (
        "import sys, vilam3_jax.data.tokenizer; "
        "print([m for m in ('torch', 'jax', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
