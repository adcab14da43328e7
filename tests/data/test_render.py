"""Tests of rendering: cards, triggers, expert turns and overlays; images must be below the data root."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from data_worlds import WORDS, ct_annotation, ct_example, ct_volume, film, picture, tokenizer

from vilam3_jax.data import render
from vilam3_jax.data.examples import Example, ExpertRequest, ImageRef, RequestImage, Turn
from vilam3_jax.data.experts.cards import load_cards, render_cards
from vilam3_jax.data.experts.exchange import Result, exchange
from vilam3_jax.data.experts.grammar import Call, parse_turn
from vilam3_jax.data.experts.overlays import expert_overlay
from vilam3_jax.data.experts.record import Annotation, failed
from vilam3_jax.data.experts.wording import Plane, question_of
from vilam3_jax.data.images import decode_scaled
from vilam3_jax.data.preprocessing import DEFAULT_PREPROCESSING
from vilam3_jax.data.render import ImageReader, Renderer, encode_example
from vilam3_jax.data.templates import CHATML
from vilam3_jax.data.volumes import load_volume
from vilam3_jax.errors import UserError

CARDS = load_cards("quickstart")
SIZE = 8


class Store(dict):
    def get(self, input_key: str, expert: str, args: str = "") -> Annotation | None:
        return super().get((input_key, expert, args))


def store(*annotations: Annotation) -> Store:
    return Store({a.key: a for a in annotations})


def renderer(experts: str = "on", annotations: Store | None = None, **settings) -> Renderer:
    return Renderer(
        image_reader=ImageReader(SIZE),
        experts=experts,
        cards=CARDS,
        annotations=store() if annotations is None else annotations,
        **settings,
    )


@pytest.fixture
def ct(tmp_path):
    key = ct_volume(tmp_path)
    return tmp_path, ct_example(key), ct_annotation(key)


def test_segmentation_dialogue_with_expert(ct) -> None:
    root, example, annotation = ct
    out = renderer(annotations=store(annotation)).render(example, root)
    assert [t.role for t in out.turns] == ["user", "assistant", "expert", "assistant"]
    user, trigger, expert, answer = out.turns
    assert user.text == render_cards(CARDS) + "<image>\nIs the liver here?"
    assert trigger.supervised and parse_turn(trigger.text).calls == (Call("ORGANS", "organs"),)
    assert trigger.text == "This looks like a CT image. Let me trigger <ORGANS(organs)>."
    result = Result(annotation, "segmentation", Plane(2, 5))
    expected = exchange([result], "Is the liver here?").text
    assert expert == Turn("expert", expected) and "liver" in expert.text
    assert answer == example.turns[1] and out.experts == ("ORGANS",)
    plane = DEFAULT_PREPROCESSING.slice_image(load_volume(root / "ct.nii.gz"), 2, 5, (50.0, 400.0), SIZE)
    assert np.array_equal(out.images[0], plane)
    assert np.array_equal(out.images[1], expert_overlay(annotation, plane, axis=2, index=5))
    assert not np.array_equal(out.images[0], out.images[1])
    encoded = encode_example(tokenizer(), CHATML, example.format, out.turns, 4)
    assert encoded.num_images == len(out.images) == 2


def test_experts_off_answers_directly(ct) -> None:
    root, example, annotation = ct
    out = renderer("off", store(annotation)).render(example, root)
    assert out.turns == example.turns and len(out.images) == 1 and out.experts == ()


def test_a_dialogue_that_needs_no_expert_shows_the_cards_all_the_same(ct) -> None:
    root, example, annotation = ct
    plain = dataclasses.replace(example, expert_requests=())
    out = renderer("on", store(annotation)).render(plain, root)
    assert out.turns[0].text == render_cards(CARDS) + example.turns[0].text
    assert out.turns[1:] == example.turns[1:] and out.experts == ()
    assert renderer("off").render(plain, root).turns == example.turns


def test_classification_dialogue_has_no_overlay(tmp_path) -> None:
    example = film(3, np.random.default_rng(0), expert=True)
    said = Annotation("key3", "PNEUMONIA", probabilities={"Lung_Opacity": 0.75, "Normal": 0.25})
    out = renderer(annotations=store(said)).render(example, tmp_path)
    assert "lung opacity: yes (0.75)" in out.turns[2].text and len(out.images) == 1
    assert out.turns[2].text.endswith("this prompt:\nWhat is shown?")
    assert out.images[0].shape == (SIZE, SIZE, 3) and (out.images[0] == 3).all()


def test_images_keep_the_order_of_their_markers(ct) -> None:
    root, example, annotation = ct
    turns = (*example.turns, Turn("user", "and <image> here?"), Turn("assistant", "No.", True))
    example = dataclasses.replace(example, turns=turns, images=(*example.images, ImageRef(data=picture(77))))
    out = renderer(annotations=store(annotation)).render(example.validate(), root)
    assert len(out.images) == 3 and (out.images[2] == 77).all()
    markers = [turn.text.count("<image>") for turn in out.turns]
    assert markers == [1, 0, 1, 0, 1, 0]
    later = dataclasses.replace(
        example, expert_requests=(ExpertRequest("ORGANS", "organs", (RequestImage(),), 3, "always"),)
    )
    out = renderer(annotations=store(annotation)).render(later.validate(), root)
    assert [t.role for t in out.turns] == ["user", "assistant", "user", "assistant", "expert", "assistant"]
    assert out.turns[0].text.startswith("Here is a list") and (out.images[1] == 77).all()
    assert out.turns[4].text.endswith("prompt:\nand here?")


def test_policies_without_annotation(ct) -> None:
    root, example, annotation = ct
    with pytest.raises(UserError, match=r"no annotation of ORGANS\(organs\)"):
        renderer().render(example, root)
    request = dataclasses.replace(example.expert_requests[0], policy="optional")
    optional = dataclasses.replace(example, expert_requests=(request,))
    assert renderer().render(optional, root).turns == example.turns
    broken = failed(annotation.input_key, "ORGANS", "organs", "out of memory")
    out = renderer(annotations=store(broken)).render(example, root)
    assert "could not analyse" in out.turns[2].text and len(out.images) == 1


def test_requests_that_cannot_be_met_are_named(ct) -> None:
    root, example, _ = ct
    unknown = dataclasses.replace(example, expert_requests=(ExpertRequest("BRATS"),))
    with pytest.raises(UserError, match="BRATS has no card"):
        renderer().render(unknown, root)
    keyless = dataclasses.replace(example, meta={})
    with pytest.raises(UserError, match="input_key"):
        renderer().render(keyless, root)
    with pytest.raises(UserError, match="experts='loud'"):
        renderer("loud")
    with pytest.raises(UserError, match=r"set data\.annotations"):
        Renderer(image_reader=ImageReader(SIZE), experts="on")


def test_falsified_says_something_else_and_the_same_each_time(ct) -> None:
    root, example, annotation = ct
    truth = renderer(annotations=store(annotation)).render(example, root)
    lies = [renderer("falsified", store(annotation), seed=5).render(example, root) for _ in range(2)]
    assert lies[0].turns == lies[1].turns and np.array_equal(lies[0].images[1], lies[1].images[1])
    assert lies[0].turns[2] != truth.turns[2] and lies[0].turns[:2] == truth.turns[:2]
    assert lies[0].turns[3] == truth.turns[3]  # the answer is not falsified


def test_mixed_is_on_for_three_of_four_by_position_and_seed(ct) -> None:
    root, example, annotation = ct

    def spoken(seed: int) -> list[bool]:
        render = renderer("mixed", store(annotation), seed=seed).render
        return [bool(render(example, root, coin).experts) for coin in range(200)]

    assert spoken(1) == spoken(1) != spoken(2)
    assert 130 < sum(spoken(1)) < 170


@pytest.mark.parametrize("path", ["../out.png", "/etc/hostname", "a/../../b.png", "gs://x/y.png"])
def test_no_path_leaves_the_data_root(tmp_path, path: str) -> None:
    (tmp_path / "out.png").write_bytes(picture(1))
    (tmp_path / "root").mkdir()
    with pytest.raises(UserError, match="data root"):
        ImageReader(SIZE).read(ImageRef(path=path), tmp_path / "root")


def test_images_are_decoded_once_and_within_budget(tmp_path, monkeypatch) -> None:
    decoded = []

    def decode(data: bytes, *args, **keywords) -> np.ndarray:
        decoded.append(data)
        return decode_scaled(data, *args, **keywords)

    monkeypatch.setattr(render, "decode_scaled", decode)
    reader = ImageReader(SIZE, image_cache_bytes=3 * SIZE * SIZE * 3)
    for number in (1, 1, 2, 3, 1, 4, 5):
        assert (reader.read(ImageRef(data=picture(number)), tmp_path) == number).all()
    assert decoded == [picture(number) for number in (1, 2, 3, 4, 5)]
    assert reader.images.bytes <= 3 * SIZE * SIZE * 3
    (tmp_path / "a.png").write_bytes(picture(9))
    assert (reader.read(ImageRef(path="a.png"), tmp_path) == 9).all()
    with pytest.raises(UserError, match=r"missing\.png"):
        reader.read(ImageRef(path="missing.png"), tmp_path)


def test_captions_take_the_plain_form_whatever_the_template() -> None:
    turns = (Turn("user", "<image>"), Turn("assistant", WORDS, True))
    encoded = encode_example(tokenizer(), CHATML, "caption", turns, 4)
    assert encoded.tokens[0] == tokenizer().bos_id and not encoded.loss_mask[:5].any()
    assert tokenizer().decode(encoded.tokens[5:], skip_special=False) == WORDS + "\n"


def test_questions_lose_their_markers() -> None:
    labelled = "T1(contrast enhanced): <image>, T1: <image>, T2: <image>, FLAIR: <image>"
    for text in (
        "<image>\nWhat?",
        "What? <image>\n",
        "<image> What?",
        f"{labelled}\nWhat?",
        f"{labelled} These are different MRI modalities.\nWhat?",
        " <image>This is a CT image.\nWhat?",
        "<image> This is a CXR image.\nWhat?",
    ):
        assert question_of(text) == "What?"


def test_every_request_names_its_own_image_key(ct) -> None:
    root, example, annotation = ct
    two = Example(
        "two",
        "conversation",
        (ImageRef(data=picture(1)), *example.images),
        (Turn("user", "<image><image> Liver?"), Turn("assistant", "Yes.", True)),
        (dataclasses.replace(example.expert_requests[0], images=(RequestImage(1),)),),
        {"input_key": ["other", annotation.input_key]},
    )
    out = renderer(annotations=store(annotation)).render(two.validate(), root)
    assert len(out.images) == 3 and "liver" in out.turns[2].text
