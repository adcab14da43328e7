"""Parsers: an adversarial corpus of our own sentences, arbitrary texts, and renderings that are read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilam3_jax.evals import parsers as package
from vilam3_jax.evals.parsers import PARSERS, boxes, labels, numbers, published

CORPUS = [
    json.loads(line)
    for line in Path(__file__).with_name("adversarial_answers.jsonl").read_text("utf-8").splitlines()
]
NEVER_UNPARSED = {"vila_m3_yes_no_cxr14", "flare_labels", "flare_number"}


def read(case):
    return PARSERS[case["parser"]](case["text"], case.get("options", []), **case.get("spec", {}))


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: f"{case['parser']}-{case['text'][:30]!a}")
def test_adversarial_answers(case):
    found = read(case)
    assert found == case["expected"]
    assert type(found) is type(case["expected"])


def test_corpus_has_every_parser_and_both_outcomes():
    parsers = {case["parser"] for case in CORPUS}
    # Protocols register parsers of their own, which their tests cover.
    of_package = {name for name, parse in PARSERS.items() if parse.__module__.startswith(package.__name__)}
    assert parsers == of_package - {"yes_no", "option", "number_range"}  # parts of by_options
    unparsed = {case["parser"] for case in CORPUS if case["expected"] is None}
    assert parsers - unparsed == NEVER_UNPARSED | {"vila_m3_lower", "flare_class"}


WORDS = st.sampled_from(
    (
        "yes", "no", "none", "not", "A", "B", "(B)", "(", ")", "[", "]", "{", "}", ",", ";", ".", ":", "-",
        "12", "1,200", "3.5", "ml", "mm", "%", "to", "or", "and", "the", "answer", "is", "<", ">", "e", "x",
        "/", "|", "\\boxed{", "\n",
    )
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(WORDS, max_size=8).map(" ".join))
SPECS = st.fixed_dictionaries(
    {},
    optional={
        "unit": st.sampled_from(sorted(numbers.UNITS)),
        "minimum": st.floats(-10, 10),
        "maximum": st.floats(10, 1e4),
        "integer": st.booleans(),
        "answer_type": st.sampled_from(["open", "closed"]),
        "something": st.text(max_size=3),
    },
)


@given(TEXTS, st.lists(st.text(min_size=1, max_size=12), max_size=4), SPECS)
@settings(max_examples=300)
def test_no_parser_raises_and_all_return_json(text, options, spec):
    for name, parse in PARSERS.items():
        found = parse(text, options, **spec)
        assert json.loads(json.dumps(found)) == found
        assert found is not None or name not in NEVER_UNPARSED
        if name in ("option", "number_range", "choice"):
            assert found is None or found in options
        if name == "choices":
            assert found is None or set(found) <= set(options)


@given(TEXTS, SPECS)
def test_a_number_is_inside_its_range(text, spec):
    found = numbers.parse_number(text, **spec)
    if found is not None:
        assert spec.get("minimum", found) <= found <= spec.get("maximum", found)
        assert isinstance(found, int) == spec.get("integer", False)


FLOATS = st.floats(-1e15, 1e15).filter(lambda value: value == 0 or abs(value) > 1e-90)


@given(FLOATS, st.sampled_from(sorted(numbers.UNITS)))
def test_a_rendered_number_is_read_back(value, unit):
    assert numbers.parse_number(f"It is {value!r} {unit}.", unit=unit) == value
    assert numbers.parse_number(repr(value), unit=unit) == value


@given(st.integers(1 - 10**15, 10**15 - 1))
def test_a_rendered_count_is_read_back(value):
    assert numbers.parse_number(f"{value:,} cells", integer=True) == value
    assert numbers.parse_number(str(value), integer=True) == value


@given(
    st.integers(1, 10**6),
    st.sampled_from([("l", "ml", 1000), ("cm", "mm", 10), ("g/dl", "mg/dl", 1000), ("week", "days", 7)]),
)
def test_units_convert_exactly(value, units):
    large, small, factor = units
    assert numbers.parse_number(f"{value} {large}", unit=small) == value * factor
    assert numbers.parse_number(f"{value * factor} {small}", unit=large) == value
    assert numbers.parse_number(f"{value} {large} ({value * factor} {small})", unit=small) == value * factor


def test_unknown_unit_is_an_error_of_the_protocol():
    with pytest.raises(ValueError, match="unit 'furlong' unknown"):
        numbers.parse_number("3", unit="furlong")


@given(st.sets(st.sampled_from(["Edema", "Pleural effusion", "Lung opacity", "Fracture"])))
def test_rendered_labels_are_read_back(chosen):
    options = ["Edema", "Fracture", "Lung opacity", "Pleural effusion"]
    assert labels.parse_labels(labels.render_labels(sorted(chosen)), options) == sorted(chosen)
    assert labels.parse_choices("; ".join(sorted(chosen)), options) == (sorted(chosen) or None)


CORNERS = st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(501, 999), st.integers(501, 999))


@given(st.lists(st.tuples(st.sampled_from(["", "1", "caries"]), CORNERS), max_size=5))
def test_rendered_boxes_are_read_back(found):
    boxes_of = [{"label": label, "box": list(map(float, corners))} for label, corners in found]
    expected = sorted(boxes_of, key=lambda one: (one["label"], one["box"]))
    assert boxes.parse_boxes(json.dumps(boxes_of)) == expected
    by_label = {label: [corners for own, corners in found if own == label] for label, _ in found}
    assert boxes.parse_boxes(json.dumps(by_label)) == expected


def test_boxes_are_limited():
    assert boxes.parse_boxes(json.dumps([[0, 0, 1, 1]] * 1000)) is not None
    assert boxes.parse_boxes(json.dumps([[0, 0, 1, 1]] * 1001)) is None
    assert boxes.parse_boxes(" " * 100_001) is None
    assert boxes.parse_boxes("[" * 90_000) is None


TOKENS = st.sampled_from(["ab,", "1.5", "dont", "the", "none", "one", "-", "x", "?", "2,3", ".", "yall've"])


@given(st.lists(TOKENS, max_size=6))
def test_a_normalised_word_has_no_articles_or_question_marks(words):
    found = published.normalise_word(" ".join(words))
    assert not {"a", "an", "the", "?", "none"} & set(found.split())


def test_contractions_are_those_of_the_vqa_challenge():
    """Each may lack one apostrophe, not two; 'somebodyd' is the challenge's own slip."""
    assert published.normalise_word("couldntve") == "couldntve"
    assert published.normalise_word("couldn'tve couldnt've") == "couldn't've couldn't've"
    assert published.normalise_word("somebody'd hes wed") == "somebodyd he's wed"


def test_only_the_first_32_full_stops_are_deleted():
    assert published.normalise_word("x." * 40) == "x" * 32 + "x." * 8


@pytest.mark.parametrize(
    "part",
    [
        "(",
        "(a",
        "<answer>",
        "\\boxed{",
        "1 ",
        "1,",
        "1,200,",
        "no ",
        "yes or ",
        "a, ",
        "the answer is ",
        "- ",
        "?",
        "[",
    ],
)
def test_a_long_hostile_answer_ends(part):
    """A parser whose time grows with the square of the length would take hours here."""
    text = part * (200_000 // len(part))
    for parse in PARSERS.values():
        for options in ((), ("yes", "no"), ("A", "B"), ("less than 5 ml", "more than 5 ml")):
            parse(text, options)
