"""Tests of text rules: selection, and invariants for all rules."""

from __future__ import annotations

import dataclasses

import pytest
from data_worlds import tokenizer
from ml_collections import ConfigDict
from vilam3_jax.configs import models

from vilam3_jax.data.examples import Turn
from vilam3_jax.data.templates import TEMPLATES, encode_conversation, encode_prompt, model_template
from vilam3_jax.data.text_rules import TextRules
from vilam3_jax.errors import UserError

TRAINED = TextRules("as_trained", "as_trained", "as_trained")


@pytest.mark.parametrize(
    ("words", "rules"),
    [
        ("", TextRules(bos="as_trained")),
        ("clean", TextRules()),
        ("as_trained", TRAINED),
        ("bos=clean,spaces=as_trained", TextRules(spaces="as_trained")),
    ],
)
def test_rules_are_changed_by_words(words, rules) -> None:
    assert TextRules(bos="as_trained").changed(words) == rules


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trained", "'trained': unknown; use clean or as_trained"),
        ("space=clean", "'space': unknown"),
        ("spaces=dirty", "spaces='dirty': use clean or as_trained"),
        ("spaces", "spaces='': use clean"),
        ("image_end=x", "image_end: belongs to the model"),
    ],
)
def test_wrong_words_are_named(words, message) -> None:
    with pytest.raises(UserError, match=message):
        TextRules().changed(words)


def test_a_model_has_rules() -> None:
    model = models.get("vila_m3_8b")
    assert model_template(model) == TEMPLATES["llama_3"]  # clean
    model = models.get("vila_m3_8b,template=v1,text=as_trained")
    assert model_template(model) == dataclasses.replace(TEMPLATES["v1"], rules=TRAINED)
    assert model_template(model, "spaces=clean").rules == dataclasses.replace(TRAINED, spaces="clean")
    assert model_template(ConfigDict({"template": "v1"})).rules == TextRules()  # an older export
    with pytest.raises(UserError, match="'space': unknown"):
        model_template(ConfigDict({"template": "v1", "text": {"space": "clean"}}))


def test_the_last_turn_is_the_last_not_one_like_it() -> None:
    template = dataclasses.replace(TEMPLATES["chatml"], last_stop=("LAST",))
    turns = [Turn("user", "what?"), Turn("assistant", "lung", True)] * 2
    text = tokenizer().decode(encode_conversation(tokenizer(), template, turns, 1).tokens)
    assert text.count("LAST") == 1 and text.rstrip().endswith("LAST")
    asked = encode_conversation(tokenizer(), template, turns[:3], 1)
    assert tokenizer().decode(asked.tokens).endswith("what?LAST")
    assert "LAST" not in tokenizer().decode(encode_prompt(tokenizer(), template, turns, 1).tokens)


def test_nvila_strips_every_turn() -> None:
    template = dataclasses.replace(TEMPLATES["qwen2"], rules=TextRules(spaces="as_trained"))
    turns = [Turn("user", " what? \n"), Turn("assistant", " lung ", True)]
    stripped = [dataclasses.replace(turn, text=turn.text.strip()) for turn in turns]
    left, right = (encode_conversation(tokenizer(), template, each, 1) for each in (turns, stripped))
    assert left.tokens.tolist() == right.tokens.tolist()


def test_what_follows_an_image_is_encoded_by_itself() -> None:
    words = tokenizer()
    turns = [Turn("user", "<image>\nwhat <image><image>?"), Turn("assistant", "lung", True)]
    plain = dataclasses.replace(TEMPLATES["qwen2"], rules=TextRules(spaces="as_trained"))
    ended = dataclasses.replace(plain, rules=TextRules(spaces="as_trained", image_end="\n"))
    before, after = (encode_conversation(words, template, turns, 2) for template in (plain, ended))
    (end,) = words.encode("\n")
    expected, of_token = [], []
    for position, token in enumerate(before.tokens.tolist()):
        expected.append(token)
        of_token.append(before.image_of_token[position])
        if before.visual_offset[position] == 1:  # the last token of an image
            expected.append(end)
            of_token.append(-1)
    assert after.tokens.tolist() == expected and after.image_of_token.tolist() == of_token
    assert after.loss_mask.sum() == before.loss_mask.sum()
    kept = dataclasses.replace(ended.rules, split="as_trained")
    assert ended.rules.changed("split=as_trained") == kept
    assert TextRules(image_end="\n").changed("as_trained").image_end == "\n"
    for wrong in (3, None, "<image>"):
        with pytest.raises(UserError, match="image_end"):
            TextRules(image_end=wrong)
