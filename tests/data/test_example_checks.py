"""Tests of type checks: invalid values are named, and only `UserError` is raised."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
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
from vilam3_jax.errors import UserError

# Values that msgpack or JSON can represent, and values that neither can.
ANYTHING = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.binary(max_size=8),
        st.sampled_from(["user", "assistant", "expert", "system", "<image>", "../x", "\0", 10**400]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=6), inner, max_size=4),
        st.sets(st.integers()),
    ),
    max_leaves=6,
)  # fmt: skip
JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8),
        st.sampled_from(["human", "gpt", "user", "<image>", "a.png", "text", "image"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["id", "image", "images", "conversations", "messages", "from", "value", "role", "content",
                 "type", "text", "vilam3", "slices", "experts", "roles", "supervised", "meta", "format"]
            ),
            inner, max_size=5,
        ),
    ),
    max_leaves=12,
)  # fmt: skip


def good(**changes: Any) -> Example:
    example = Example(
        "x1",
        "conversation",
        (ImageRef(path="v.nii.gz", axis=2, index=1, window=(50.0, 400.0), modality="CT"),),
        (Turn("user", "<image>\nWhat?"), Turn("assistant", "A chest.", True)),
        (ExpertRequest("CXR"),),
        {"input_key": "k", "qa": [{"type": "x"}]},
    )
    return dataclasses.replace(example, **changes)


def refused(example: Example) -> str:
    with pytest.raises(UserError) as error:
        example.validate()
    return str(error.value)


FIELDS = [
    *[(None, field.name) for field in dataclasses.fields(Example)],
    *[("images", field.name) for field in dataclasses.fields(ImageRef)],
    *[("turns", field.name) for field in dataclasses.fields(Turn)],
    *[("expert_requests", field.name) for field in dataclasses.fields(ExpertRequest)],
]


def with_value(part: Any, field: Any, value: Any) -> Example:
    example = good()
    if part is None:
        return dataclasses.replace(example, **{field: value})
    first, *rest = getattr(example, part)
    return dataclasses.replace(example, **{part: (dataclasses.replace(first, **{field: value}), *rest)})


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(FIELDS), ANYTHING)
def test_any_value_in_any_field_is_used_or_named(where: tuple[str | None, str], value: Any) -> None:
    example = with_value(*where, value)
    reason = example.problem()
    if reason is None:
        assert example.validate() is example
        return
    assert "\n" not in reason and len(reason) < 600
    with pytest.raises(UserError):
        example.validate()


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.text(max_size=5), ANYTHING, max_size=3))
def test_any_meta_is_used_or_named(meta: dict[str, Any]) -> None:
    example = good(meta=meta)
    if example.problem() is None:
        json.dumps(meta, allow_nan=False)
    else:
        refused(example)


@settings(deadline=None, max_examples=300)
@given(JSON)
def test_any_instruction_item_is_read_or_named(item: Any) -> None:
    try:
        example = from_instruction(item)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 800
    else:
        assert example.problem() is None


@pytest.mark.parametrize(
    ("where", "value", "reason"),
    [
        ((None, "id"), 7, "has no id"),
        ((None, "id"), "x" * 2000, "id has 2000 characters"),
        ((None, "id"), "\ud800", "id is not valid Unicode"),
        ((None, "format"), ["conversation"], "format is a list, not text"),
        ((None, "images"), None, "images is null, not a list"),
        ((None, "turns"), "hello", "turns is a str, not a list"),
        ((None, "turns"), [{"role": "user"}], "turns 0 is a dict, not Turn"),
        ((None, "expert_requests"), [None], "expert_requests 0 is null"),
        ((None, "meta"), None, "meta is null, not a dict"),
        ((None, "meta"), {"a": math.nan}, "meta contains a number that is not finite"),
        ((None, "meta"), {"a": {1, 2}}, "meta contains a set"),
        ((None, "meta"), {1: 2}, "meta has a key that is an int"),
        ((None, "meta"), {"input_key": 5}, "meta.input_key"),
        ((None, "meta"), {"question_types": 5}, "meta.question_types is an int, not a list"),
        ((None, "meta"), {"qa": ["x"]}, "meta.qa contains entries that are not dicts"),
        (("images", "data"), "text", "image 0 data is a str, not bytes"),
        (("images", "path"), 3, "image 0 path is an int"),
        (("images", "path"), b"a.png", "image 0 path is a bytes"),
        (("images", "axis"), True, "image 0 axis is a bool, not an integer"),
        (("images", "index"), 1.0, "image 0 index is a float"),
        (("images", "index"), 2**70, "image 0 index is an int"),
        (("images", "window"), (math.nan, 1.0), "image 0 window"),
        (("images", "window"), (1.0,), "image 0 window"),
        (("images", "window"), [50.0, 400.0], "image 0 window is a list"),
        (("images", "modality"), 5, "image 0 modality"),
        (("turns", "text"), [{"type": "text"}], "turn 0 text is a list, not text"),
        (("turns", "text"), None, "turn 0 text is null"),
        (("turns", "text"), "x" * (1 << 21), "turn 0 text has 2097152 characters"),
        (("turns", "supervised"), 0, "turn 0 supervised is an int, not true or false"),
        (("turns", "role"), "expert", "starts with an expert turn"),
        (("expert_requests", "before_turn"), "1", "request 0 before_turn is a str"),
        (("expert_requests", "images"), (0,), "request 0 inputs 0 is an int"),
        (("expert_requests", "images"), (RequestImage(True),), "request 0 input 0 image is a bool"),
        (("expert_requests", "args"), None, "request 0 args is null"),
    ],
)
def test_values_of_a_wrong_type_are_named_with_their_place(where: Any, value: Any, reason: str) -> None:
    assert reason in refused(with_value(where[0], where[1], value))


def test_no_reason_quotes_a_text() -> None:
    secret = "Jane Doe, born 1950"
    wrong = [
        with_value("turns", "text", [secret]), with_value(None, "turns", secret),
        with_value(None, "meta", {"note": {secret}}), with_value("images", "data", secret),
    ]  # fmt: skip
    assert all(secret not in refused(example) for example in wrong)


def test_an_assistant_shows_no_images_and_requests_are_for_conversations() -> None:
    quoted = (Turn("user", "What?"), Turn("assistant", "The tag <image> is a place.", True))
    assert "turn 1 contains a marker" in refused(good(turns=quoted))
    caption = (Turn("user", "<image>"), Turn("assistant", "A chest.", True))
    assert "only a conversation can" in refused(good(format="caption", turns=caption))


def ask(question: str, answer: str = "A lung.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def markers(**item: Any) -> list[int]:
    return [turn.text.count("<image>") for turn in from_instruction({"id": "i", **item}).turns]


def test_the_marker_goes_into_the_first_user_turn() -> None:
    brief = {"from": "system", "value": "Be brief."}
    assert markers(image="a.png", conversations=[brief, *ask("What?")]) == [0, 1, 0]
    assert markers(image="a.png", conversations=ask("What?")) == [1, 0]
    assert markers(image="a.png", conversations=[*ask("What?"), *ask("And <image> here?")]) == [0, 0, 1, 0]
    with pytest.raises(UserError, match="markers for 1 images"):
        markers(image="a.png", conversations=ask("What?", "The tag <image> is a place."))


@pytest.mark.parametrize("absent", [{"image": None}, {"images": None}, {"images": []}, {"image": ""}, {}])
def test_text_only_items_may_say_so_with_null(absent) -> None:
    assert markers(conversations=ask("What is a lung?"), **absent) == [0, 0]


def test_role_and_content_are_read_as_from_and_value() -> None:
    spoken = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "x"}]
    for key in ("conversations", "messages"):
        example = from_instruction({"id": 3, key: spoken})
        assert example.id == "3"
        assert example.turns == (Turn("user", "What?"), Turn("assistant", "x", True))


def test_content_may_come_in_parts() -> None:
    def parts(*images: dict[str, Any]) -> list[dict[str, Any]]:
        content = [*images, {"type": "text", "text": "What?"}]
        return [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
        ]

    inside = from_instruction({"id": "a", "messages": parts({"type": "image", "image": "a.png"})})
    assert inside.turns[0].text == "<image>What?" and inside.images == (ImageRef(path="a.png"),)
    asked = {"type": "image_url", "image_url": {"url": "b/c.png"}}
    assert from_instruction({"id": "a", "messages": parts(asked)}).images[0].path == "b/c.png"
    beside = from_instruction({"id": "a", "image": "a.png", "messages": parts({"type": "image"})})
    assert beside == inside
    for item, reason in (
        ({"messages": parts(asked), "image": "a.png"}, "both in its turns and outside"),
        ({"messages": parts({"type": "video"})}, "neither text nor an image"),
        ({"messages": parts({"type": "image", "image": 4})}, "an image that is an int"),
        ({"messages": parts({"type": "image_url", "image_url": {"url": "http://x/y.png"}})}, "not relative"),
        ({"image": "a", "images": ["b"], "messages": parts()}, "both image and images"),
        ({"image": {"bytes": ""}, "messages": parts()}, "its images are a dict"),
        ({"images": ["a", None], "messages": parts()}, "image 1 is null"),
        ({"messages": {"0": 1}}, "messages is a dict, not a list"),
        ({}, "has none of conversations, messages"),
        ({"messages": [None]}, "turn 0 is null"),
        ({"messages": [{"role": "user", "content": None}]}, "the text of turn 0 is null"),
        ({"messages": [{"role": "robot", "content": ""}]}, "the role of turn 0 is not one of"),
    ):
        with pytest.raises(UserError, match=f"'a'.*{reason}"):
            from_instruction({"id": "a", **item})
    with pytest.raises(UserError, match="is a list, not an object"):
        from_instruction([])


def test_a_whole_volume_keeps_its_form() -> None:
    example = good(images=(ImageRef(path="v.nii.gz", axis=2, modality="CT"),)).validate()
    item, files = to_instruction(example)
    assert not files and from_instruction(json.loads(json.dumps(item))) == example
