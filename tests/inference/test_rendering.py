"""Replies in notebooks: self-contained, escaped HTML with the images as the model saw them."""

from __future__ import annotations

import base64
import dataclasses
from html.parser import HTMLParser

import numpy as np
import pytest

import vilam3_jax
from vilam3_jax.data.images import decode_image
from vilam3_jax.data.tokenizer import Tokenizer
from vilam3_jax.inference import assistant as assistant_lib

HOSTILE = '<script>alert(1)</script><img src="https://example.org/x" onerror="alert(2)">&amp;"\''


class Page(HTMLParser):
    """What a browser would make of a page: elements, pictures and text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.images, self.colours, self.text, self.attributes = [], [], [], "", set()
        self.open = []
        self.feed(html)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.attributes |= values.keys()
        if tag == "img":
            kind, _, data = values["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.images.append(decode_image(base64.b64decode(data)))
        else:
            self.open.append(tag)
        if "background:" in (style := values.get("style") or ""):
            self.colours.append(style.partition("background:")[2].partition(";")[0])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def model(export, world):
    with vilam3_jax.load(export, annotations=world.annotations, expert_host="off", max_length=1500) as model:
        yield model


@pytest.fixture
def asked(model, world, monkeypatch):
    """A chat about a volume: the model calls an expert and answers, then answers again."""
    spoken = iter(
        ["This looks like a CT image. Let me trigger <ORGANS(organs)>.", "The liver. " + HOSTILE, "I am"]
    )
    chat = model.chat(world.volume, modality="CT", index=8, max_new_tokens=2)
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "decode", lambda self, ids: next(spoken))
        chat.ask("Is the liver visible? " + HOSTILE)
        chat.ask("Are you sure?")
    return chat


def test_a_reply_shows_image_overlay_legend_and_dialogue(asked):
    reply = asked.replies[0]
    page = Page(reply._repr_html_())
    assert len(page.images) == 2
    for shown, expected in zip(page.images, (reply.image, reply.overlay), strict=True):
        np.testing.assert_array_equal(shown, expected)
    assert not np.array_equal(reply.image, reply.overlay)
    assert page.colours == ["red"] and "liver" in page.text
    assert set(page.tags) <= {
        *("div", "figure", "figcaption", "img", "span", "p", "b", "details", "summary", "ul", "li")
    }
    assert page.attributes <= {"style", "src", "alt"}
    assert page.text.count(HOSTILE) == 3  # the question, its repetition by the expert, the answer
    for said in ("You: ", "Model: ", "Expert ORGANS: ", "<ORGANS(organs)>", assistant_lib.NOT_CLINICAL):
        assert said in page.text
    assert "axial slice 8 of 0 to 15" in page.text and "Cards of the experts" in page.text


def test_a_conversation_shows_every_picture_once(asked):
    page = Page(asked._repr_html_())
    assert len(page.images) == 2 and "Are you sure?" in page.text and "I am" in page.text
    assert page.text.count(assistant_lib.NOT_CLINICAL) == 1
    assert len(Page(asked.replies[1]._repr_html_()).images) == 2, "a follow-up keeps the overlay"


def test_another_image_has_no_overlay_of_the_first_one(asked, world, monkeypatch):
    asked.show(world.film, modality=None, index=None)
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: "no")
    reply = asked.ask("And here?")
    assert reply.overlay is None and len(Page(reply._repr_html_()).images) == 1
    assert len(Page(asked._repr_html_()).images) == 3


def test_representations_are_short(asked):
    assert repr(asked.replies[1]) == (
        "Reply('I am', image='axial slice 8 of 0 to 15, window 50, 400', 2 notes)"
    )
    assert "experts=['<ORGANS(organs)>']" in repr(asked.replies[0])
    assert repr(asked).startswith("Chat(2 replies, the last Reply('I am'")
    assert len(repr(asked.replies[0].transcript)) < 3000 and "array(" not in repr(asked.replies[0].transcript)


def test_text_without_image(asked):
    reply = dataclasses.replace(asked.replies[1], image=None, overlay=None, description="")
    assert Page(reply._repr_html_()).images == []
