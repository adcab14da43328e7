"""Tests of chat templates: targets, image positions, and no control tokens from text."""

from __future__ import annotations

import numpy as np
import pytest
from data_worlds import TOKENS_PER_IMAGE as T
from data_worlds import tokenizer
from hypothesis import given
from hypothesis import strategies as st

from vilam3_jax.data.examples import Turn
from vilam3_jax.data.templates import (
    CHATML,
    PLAIN,
    encode_caption,
    encode_conversation,
    encode_document,
    encode_prompt,
    get_template,
)
from vilam3_jax.errors import UserError

TOK = tokenizer()
TURNS = (
    Turn("system", "be brief."),
    Turn("user", "<image>\nwhat is shown?"),
    Turn("assistant", "a chest x-ray.", True),
    Turn("expert", "The results are <image>. no effusion"),
    Turn("assistant", "no effusion.", True),
)


def written(encoded, targets_only: bool = False) -> str:
    """Decodes the tokens, with `#` for an image token."""
    out = []
    for token, image, target in zip(encoded.tokens, encoded.image_of_token, encoded.loss_mask, strict=True):
        if target or not targets_only:
            out.append("#" if image >= 0 else TOK.decode([int(token)], skip_special=False))
    return "".join(out)


def test_chatml_is_the_published_string() -> None:
    encoded = encode_conversation(TOK, CHATML, TURNS, T)
    assert written(encoded) == (
        "<|im_start|>system\nbe brief.<|im_end|>\n"
        "<|im_start|>user\n####\nwhat is shown?<|im_end|>\n"
        "<|im_start|>assistant\na chest x-ray.<|im_end|>\n"
        "<|im_start|>user\nThe results are ####. no effusion<|im_end|>\n"
        "<|im_start|>assistant\nno effusion.<|im_end|>\n"
    )
    assert written(encoded, targets_only=True) == "a chest x-ray.<|im_end|>no effusion.<|im_end|>"
    assert encoded.num_images == 2
    shown = encoded.image_of_token >= 0
    assert encoded.image_of_token[shown].tolist() == [0] * T + [1] * T
    assert encoded.visual_offset[shown].tolist() == [*range(T), *range(T)]
    assert not encoded.visual_offset[~shown].any() and (encoded.tokens[shown] == TOK.pad_id).all()


def test_chatml_has_the_same_ids_as_the_whole_string() -> None:
    turns = (Turn("user", "what is shown?"), Turn("assistant", "a chest x-ray.", True))
    encoded = encode_conversation(TOK, CHATML, turns, T)
    assert encoded.tokens.tolist() == TOK.encode(written(encoded), allow_special=True)


def test_unsupervised_assistant_turns_are_no_targets() -> None:
    turns = (
        Turn("user", "what?"),
        Turn("assistant", "x-ray"),
        Turn("user", "?"),
        Turn("assistant", "lung", True),
    )
    assert written(encode_conversation(TOK, CHATML, turns, T), targets_only=True) == "lung<|im_end|>"


def test_plain_supervises_caption_and_line_end() -> None:
    encoded = encode_conversation(
        TOK, PLAIN, (Turn("user", "<image>"), Turn("assistant", "a chest", True)), T
    )
    assert written(encoded) == "<|im_start|>####a chest\n"
    assert encoded.loss_mask.tolist() == [0.0] * (1 + T) + [1.0] * (len(encoded) - 1 - T)


def test_document_supervises_all_text_and_ends() -> None:
    encoded = encode_document(TOK, (Turn("assistant", "left <image> lung"), Turn("assistant", " two")), T)
    assert written(encoded) == "<|im_start|>left #### lung two<|im_end|>"
    assert np.array_equal(encoded.loss_mask[1:], (encoded.image_of_token[1:] < 0).astype(np.float32))
    assert encoded.loss_mask[0] == 0


@given(
    st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "\n", "a", "<image", "é", " "]), max_size=12).map(
        "".join
    )
)
def test_text_never_becomes_a_control_token(text: str) -> None:
    encoded = encode_conversation(TOK, CHATML, (Turn("user", text), Turn("assistant", text, True)), T)
    control = [t for t in encoded.tokens.tolist() if t in TOK.special_tokens.values()]
    names = [TOK.token(t) for t in control]
    assert names == ["<|im_start|>", "<|im_end|>"] * 2


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=20), st.integers(1, 3))
def test_prompt_is_the_exact_prefix_of_the_training_sequence(answer: str, rounds: int) -> None:
    turns = [Turn("user", "<image> what?"), Turn("assistant", answer, True)] * rounds
    whole = encode_conversation(TOK, CHATML, turns, T)
    prompt = encode_prompt(TOK, CHATML, turns[:-1], T)
    assert whole.tokens[: len(prompt)].tolist() == prompt.tokens.tolist()
    assert not prompt.loss_mask.any()
    rest = whole.loss_mask[len(prompt) :]
    assert rest.sum() == len(rest) - len(TOK.encode("\n"))


def test_template_lookup_and_stops() -> None:
    assert get_template("chatml").stop_ids(TOK) == (TOK.token_id("<|im_end|>"),)
    with pytest.raises(UserError, match=r"known are chatml, hermes-2, .*vicuna_v1"):
        get_template("vicuna")


def test_caption_is_cut_and_ended() -> None:
    short, long = encode_caption(TOK, "a chest", 16), encode_caption(TOK, "a chest " * 50, 16)
    assert short.tokens[-1] == long.tokens[-1] == TOK.eos_id
    assert len(long) == 16 and TOK.decode(short.tokens) == "a chest"
