"""Items, limits and answer parsers of the evaluation protocols."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilam3_jax.data.examples import Example, ImageRef, Turn
from vilam3_jax.errors import UserError
from vilam3_jax.evals import items, retrieval
from vilam3_jax.evals import parsers as parser_registry
from vilam3_jax.evals import protocol as protocols
from vilam3_jax.evals.parsers import anchored

QUICKSTART = protocols.get("quickstart@1")
VOLUMES = ("less than 50 ml", "50 to 200 ml", "more than 200 ml")


def qa(question="Is the liver visible?", answer="yes", **changes):
    return {
        "question": question,
        "answer": answer,
        "type": "organ_present",
        "label_source": "mask",
        "options": ["yes", "no"],
        "expert": "ORGANS",
        "args": "organs",
        "oracle": True,
        **changes,
    }


def example(name="e1", split="heldout", patient="p1", questions=None):
    return Example(
        id=name,
        format="conversation",
        images=(ImageRef(data=b"png"),),
        turns=(Turn("user", "<image>\nIs the liver visible?"), Turn("assistant", "yes", True)),
        meta={
            "split": split,
            "patient": patient,
            "input_key": "ab" * 32,
            "modality": "CT",
            "qa": [qa()] if questions is None else questions,
        },
    )


def test_hash_is_pinned_so_that_a_change_needs_a_new_version():
    """If this fails, the meaning of quickstart@1 changed: make it quickstart@2 instead."""
    assert QUICKSTART.hash == "d374810c1703c7376b1ea59bf0836b665cfb5b28c49f3f8ab20c5c0199049fd4"


def test_the_hash_of_retrieval_is_pinned_too():
    assert protocols.get("retrieval@2") is retrieval.RETRIEVAL
    assert retrieval.RETRIEVAL.hash == "07edeb6f0bb82ff0d3d1eae9f45afd04aaedf34092715bf4c19948594e2427ad"


def test_every_field_enters_the_hash():
    for field in dataclasses.fields(QUICKSTART):
        value = getattr(QUICKSTART, field.name)
        grown = {
            bool: lambda v: not v,
            int: lambda v: v + 1,
            float: lambda v: v + 0.5,
            str: lambda v: v + "x",
            tuple: lambda v: (*v, ("x", "y")),
        }
        other = grown[type(value)](value)
        assert dataclasses.replace(QUICKSTART, **{field.name: other}).hash != QUICKSTART.hash


def test_json_has_the_hash_and_all_fields_without_a_default():
    back = json.loads(json.dumps(QUICKSTART.record))
    assert protocols.content_hash(back) == QUICKSTART.hash
    wanted = {field.name for field in dataclasses.fields(QUICKSTART) if field.default is dataclasses.MISSING}
    assert back.keys() == wanted
    assert dataclasses.replace(QUICKSTART, temperature=0.2).record["temperature"] == 0.2


def test_unknown_protocol_lists_the_known():
    with pytest.raises(UserError, match="quickstart@1"):
        protocols.get("quickstart@9")


def test_items_are_the_questions_of_the_split():
    data = [
        example(
            "a",
            questions=[
                qa(),
                qa("Which modality?", "CT", type="modality", options=["CT", "MRI"], expert=None),
            ],
        ),
        example("b", split="train"),
        example("c", questions=[]),
    ]
    found = items.items_of(data, QUICKSTART)
    assert [item.id for item in found] == ["a/q0", "a/q1"]
    assert found[0].oracle and found[0].expert == "ORGANS" and found[0].args == "organs"
    assert found[1].expert is None and found[1].options == ("CT", "MRI")
    only = dataclasses.replace(QUICKSTART, question_types=("modality",))
    assert [item.id for item in items.items_of(data, only)] == ["a/q1"]


def test_items_name_what_is_wrong():
    broken = qa()
    del broken["label_source"]
    with pytest.raises(UserError, match=r"example 'e1', question 0.*label_source"):
        items.items_of([example(questions=[broken])], QUICKSTART)
    with pytest.raises(UserError, match="'e1/q0' is twice in the data"):
        items.items_of([example(), example()], QUICKSTART)
    with pytest.raises(UserError, match="no question in split 'heldout'"):
        items.items_of([example(split="train")], QUICKSTART)


def test_limit_spreads_over_clusters_and_is_deterministic():
    data = [example(f"e{p}-{k}", patient=f"p{p}") for p in range(4) for k in range(p + 1)]
    found = items.items_of(data, QUICKSTART)
    kept = items.limit_items(found, 6)
    assert Counter(item.cluster for item in kept) in (
        Counter(p0=1, p1=2, p2=2, p3=1),
        Counter(p0=1, p1=2, p2=1, p3=2),
        Counter(p0=1, p1=1, p2=2, p3=2),
    )
    assert {item.id for item in kept} == {item.id for item in items.limit_items(found[::-1], 6)}
    assert [item.id for item in kept] == [item.id for item in found if item in kept]
    assert items.limit_items(found, None) == found
    assert len(items.limit_items(found, 1000)) == len(found)
    with pytest.raises(UserError, match="at least 1"):
        items.limit_items(found, 0)
    with pytest.raises(UserError, match="at least 1"):
        items.limit_items(found, 3, 0)


def test_questions_without_an_independent_label_have_a_limit_of_their_own():
    kinds = [qa(oracle=False), qa(oracle=True), qa(expert=None)]
    data = [example(f"e{p}", patient=f"p{p}", questions=kinds) for p in range(9)]
    found = items.items_of(data, QUICKSTART)
    kept = items.limit_items(found, 5, 2)
    assert Counter((item.expert is None or item.oracle) for item in kept) == {False: 5, True: 2}
    assert len(items.limit_items(found, 5)) == 5
    assert len(items.limit_items(found, None, 2)) == 9 + 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        (" Yes.", "yes"),
        ("No, there is none.", "no"),
        ("A lung nodule is present.", None),
        ("There is an abnormal opacity", None),
        ("abnormal", None),
        ("none", None),
        ("not seen", None),
        ("No evidence ... yes", "no"),
        ("yesterday", None),
        ("", None),
    ],
)
def test_yes_no_is_anchored(text, expected):
    assert anchored.parse_yes_no(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no tumor", "no tumor"),
        ("No tumor is seen.", "no tumor"),
        ("glioma", "glioma"),
        ("Glioma.", "glioma"),
        ("glioma grade 2", "glioma grade 2"),
        ("glioma grade 2, probably", "glioma grade 2"),
        ("gliomatosis", None),
        ("glioma-like", None),
        ("It is a glioma", None),
        ("", None),
    ],
)
def test_options_match_at_the_start_longest_first(text, expected):
    assert anchored.parse_option(text, ["glioma", "glioma grade 2", "no tumor"]) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50 to 200 ml", "50 to 200 ml"),
        ("50-200 ml.", "50 to 200 ml"),
        ("between 50 and 200 ml", "50 to 200 ml"),
        ("120 ml", "50 to 200 ml"),
        ("about 50 ml", "50 to 200 ml"),
        ("200", "more than 200 ml"),
        ("under 50 ml", "less than 50 ml"),
        ("> 200 ml", "more than 200 ml"),
        ("3.5 ml", "less than 50 ml"),
        ("100 to 300 ml", None),
        ("30-", None),
        ("large", None),
        ("50mls", None),
    ],
)
def test_number_ranges(text, expected):
    assert anchored.parse_number_range(text, VOLUMES) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("spleen, liver", "liver, spleen"),
        ("Liver and spleen.", "liver, spleen"),
        ("liver", "liver"),
        ("none", "none"),
        ("liver, aorta", None),
        ("the liver", None),
        ("", None),
    ],
)
def test_subset_of_options(text, expected):
    assert anchored.parse_subset(text, ["liver", "spleen", "kidney", "none"]) == expected


def test_question_type_overrides_the_parser():
    organs = qa(answer="spleen, liver", options=["liver", "spleen", "kidney", "none"], type="which_organs")
    item = items.items_of([example(questions=[organs])], QUICKSTART)[0]
    assert protocols.score(QUICKSTART, item, "liver, spleen").correct
    assert not protocols.score(QUICKSTART, item, "spleen").correct


def test_parser_is_chosen_by_options():
    parse = anchored.parse_by_options
    assert parse("no, unlikely", ["Yes", "No"]) == "no"
    assert parse("no, unlikely", ["no tumor", "tumor"]) is None
    assert parse("70 ml", VOLUMES) == "50 to 200 ml"
    assert parse("Spleen and liver, aorta.", []) == "aorta, liver, spleen"
    assert parse(" . ", []) is None


def item_of(answer, options):
    return items.items_of([example(questions=[qa(answer=answer, options=options)])], QUICKSTART)[0]


def test_score():
    assert protocols.score(QUICKSTART, item_of("yes", ["yes", "no"]), "Yes, it is.").correct
    unparsed = protocols.score(QUICKSTART, item_of("yes", ["yes", "no"]), "The liver")
    assert unparsed.unparsed and not unparsed.correct and unparsed.gold == "yes"
    assert protocols.score(QUICKSTART, item_of("liver, spleen", []), "Spleen and liver.").correct
    assert not protocols.score(QUICKSTART, item_of("liver, spleen", []), "Spleen").correct
    with pytest.raises(UserError, match=r"e1/q0.*'maybe' is none of"):
        protocols.score(QUICKSTART, item_of("maybe", ["yes", "no"]), "yes")


@given(st.text(max_size=40), st.lists(st.text(min_size=1, max_size=12), max_size=4))
def test_parsers_never_raise_and_return_options(text, options):
    for name, parse in parser_registry.PARSERS.items():
        found = parse(text, options)
        assert found != ""  # no text is no answer: None
        if name in ("option", "number_range"):
            assert found is None or found in options


@given(st.sampled_from(VOLUMES))
def test_right_answers_score_right(answer):
    assert protocols.score(QUICKSTART, item_of(answer, list(VOLUMES)), answer).correct
