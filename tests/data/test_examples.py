"""Tests of examples: validation, and conversion from and to VILA's instruction JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from instruction_items import to_instruction

from vilam3_jax.data.examples import (
    Example,
    ExpertRequest,
    ImageRef,
    RequestImage,
    Turn,
    from_instruction,
)
from vilam3_jax.data.text_rules import normalise_markers
from vilam3_jax.errors import UserError

TEXT = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30).map(
    lambda text: text.replace("<image>", "")
)
IMAGE = st.one_of(
    st.builds(ImageRef, data=st.binary(min_size=1, max_size=40)),
    st.builds(ImageRef, path=st.sampled_from(["a.png", "b/c.jpg"])),
    st.builds(
        ImageRef,
        path=st.just("ct/v.nii.gz"),
        axis=st.integers(0, 2),
        index=st.integers(0, 500),
        window=st.one_of(st.none(), st.tuples(st.floats(-500, 500), st.floats(1, 2000))),
        modality=st.sampled_from([None, "CT", "MR"]),
    ),
)


@st.composite
def conversations(draw: st.DrawFn) -> Example:
    images = draw(st.lists(IMAGE, max_size=3))
    rounds = draw(st.integers(1, 3))
    turns = [Turn("system", draw(TEXT))] if draw(st.booleans()) else []
    for position in range(rounds):
        markers = "<image>" * len(images) if position == 0 else ""
        turns += [Turn("user", markers + draw(TEXT)), Turn("assistant", draw(TEXT), True)]
    requests = []
    if images and draw(st.booleans()):
        requests = [
            ExpertRequest(
                "CXR",
                "a b",
                tuple(RequestImage(0, role) for role in draw(st.sampled_from([("",), ("t1", "t2")]))),
                len(turns) - 1,
                draw(st.sampled_from(["always", "optional"])),
            )
        ]
    meta = draw(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(-9, 9), TEXT), max_size=3))
    name = draw(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=8))
    return Example(name, "conversation", tuple(images), tuple(turns), tuple(requests), meta)


@given(conversations())
def test_instruction_round_trip(example: Example) -> None:
    item, files = to_instruction(example)
    again = from_instruction(json.loads(json.dumps(item)))
    filled = [
        dataclasses.replace(image, path=None, data=files[image.path]) if image.path in files else image
        for image in again.images
    ]
    assert dataclasses.replace(again, images=tuple(filled)) == example


def conversation(**changes) -> Example:
    example = Example(
        "x1",
        "conversation",
        (ImageRef(data=b"1"),),
        (Turn("user", "<image>\nWhat?"), Turn("assistant", "A chest.", True)),
    )
    return dataclasses.replace(example, **changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": ()}, "1 <image> markers for 0 images"),
        ({"format": "poem"}, "format 'poem'"),
        ({"turns": ()}, "no turns"),
        ({"id": ""}, "no id"),
        (
            {"turns": (Turn("user", "<image>", True), Turn("assistant", "a", True))},
            "supervised but has role user",
        ),
        ({"turns": (Turn("assistant", "<image>", True), Turn("user", "a"))}, "alternate"),
        ({"turns": (Turn("user", "<image>"), Turn("assistant", "a"))}, "no turn is supervised"),
        ({"turns": (Turn("user", "<image>"), Turn("robot", "a"))}, "role 'robot'"),
        ({"format": "caption"}, "a caption is"),
        ({"format": "document"}, "supervised assistant turns only"),
        ({"images": (ImageRef(path="../secret.png"),)}, "leaves the data root"),
        ({"images": (ImageRef(path="/etc/secret.png"),)}, "not relative"),
        ({"images": (ImageRef(path="gs://bucket/x.png"),)}, "not relative"),
        ({"images": (ImageRef(path="C:\\x.png"),)}, "not relative"),
        ({"images": (ImageRef(path="a", index=2),)}, "an index but no axis"),
        ({"images": (ImageRef(path="a", axis=3, index=0),)}, "is not a slice"),
        ({"images": (ImageRef(path="a", data=b"1"),)}, "not both"),
        ({"images": (ImageRef(path="a", axis=0, index=0, window=(0.0, 0.0)),)}, "width > 0"),
        ({"images": (ImageRef(path="a", axis=0, index=0, modality="ct"),)}, "not a DICOM code"),
        ({"images": (ImageRef(path="a", modality="CT"),)}, "of a volume"),
        ({"expert_requests": (ExpertRequest("CXR", images=(RequestImage(1),)),)}, "image 1 of 1"),
        ({"expert_requests": (ExpertRequest("CXR", before_turn=0),)}, "not an assistant turn"),
        ({"expert_requests": (ExpertRequest("CXR", before_turn=7),)}, "turn 7 of 2"),
        ({"expert_requests": (ExpertRequest("CXR"), ExpertRequest("CXR"))}, "duplicated before turn 1"),
        ({"expert_requests": (ExpertRequest("CXR", ")>"),)}, "cannot be written"),
        ({"expert_requests": (ExpertRequest("CXR", policy="never"),)}, "policy 'never'"),
    ],
)
def test_broken_examples_are_refused_with_id_and_reason(changes: dict, reason: str) -> None:
    example = conversation(**changes)
    with pytest.raises(UserError, match=repr(example.id)) as refused:
        example.validate()
    assert reason in str(refused.value)


def test_good_formats_pass() -> None:
    image = (ImageRef(data=b"1"),)
    Example("a", "pair", image, (Turn("user", "<image>"), Turn("assistant", "cap", True))).validate()
    Example("b", "document", image, (Turn("assistant", "one <image> two", True),)).validate()
    conversation(expert_requests=(ExpertRequest("CXR"),)).validate()


@pytest.mark.parametrize(
    ("before", "after"),
    [  # outputs of the reference, spec §1.7
        ("Q?\n<image>", "Q? <image>\n"),
        ("<image>\nQ?", "<image>\nQ?"),
        ("CARDS.\n<image> This is a CXR image.\nQ", "CARDS. <image>\nThis is a CXR image.\nQ"),
        ("T1: <image>, T2: <image> These\nQ", "T1: <image>\n, T2: <image>\nThese\nQ"),
        ("The results are <image>. The", "The results are <image>\n. The"),
        ("kept trailing space ", "kept trailing space "),
    ],
)
def test_marker_normalisation_is_vilas(before: str, after: str) -> None:
    assert normalise_markers(before) == after


def test_plain_vila_items() -> None:
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A chest."}]
    example = from_instruction({"id": 7, "image": "a/b.png", "conversations": talk})
    assert example.turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "A chest.", True))
    assert example.images == (ImageRef(path="a/b.png"),) and example.id == "7"
    led = [{"from": "gpt", "value": "Hello"}, *talk]
    assert from_instruction({"id": "t", "conversations": led}).turns[0] == Turn("user", "What?")
    with pytest.raises(UserError, match=r"'bad'.*VILA's format"):
        from_instruction({"id": "bad", "conversations": [{"from": "alien", "value": ""}]})
    with pytest.raises(UserError, match="leaves the data root"):
        from_instruction({"id": "p", "image": "../a.png", "conversations": talk})


def test_items_without_a_modality_are_read() -> None:
    example = Example(
        "a",
        "caption",
        (ImageRef(path="v.nii.gz", axis=2, index=3, window=(50.0, 400.0)),),
        (Turn("user", "<image>"), Turn("assistant", "A liver.", True)),
    )
    item, _ = to_instruction(example)
    item["vilam3"]["slices"] = [cut[:3] for cut in item["vilam3"]["slices"]]
    assert from_instruction(item) == example
