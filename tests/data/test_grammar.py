"""Writing and parsing of a model's calls."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilam3_jax.data.experts.grammar import Call, joined, parse_turn

names = st.from_regex(r"[A-Z][A-Z0-9_]{0,31}", fullmatch=True)
arguments = st.text("abc xyz,.-/'", max_size=30).map(lambda text: text.strip(" '"))
calls = st.builds(Call, names, arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("This looks like an chest x-ray. Let me first trigger <CXR()>.", ("CXR", "")),
        ("Let me trigger <VISTA3D(hepatic tumor)>. ", ("VISTA3D", "hepatic tumor")),
        ("<VISTA3D( muscles )>", ("VISTA3D", "muscles")),
        ("<VISTA3D('organs')>", ("VISTA3D", "organs")),
        ("<VISTA3D(' \"Crohn's\" ' )>", ("VISTA3D", "Crohn's")),
        ("a < b <image> <BRATS()>", ("BRATS", "")),
        ("<vista3d(organs)>", None),
        ("<VISTA3D(organs)", None),
        ("<VISTA3D>", None),
        ("<VISTA3D(a\nb)>", None),
        ("", None),
    ],
)
def test_a_single_call(text, expected):
    turn = parse_turn(text)
    assert turn.calls == (() if expected is None else (Call(*expected),))
    assert turn.kept == (text.strip() if turn.calls else text) and not turn.cut


@pytest.mark.parametrize(
    ("text", "made", "cut", "dropped"),
    [
        ("<A()><B(x)>", ["A", "B"], "", []),
        ("I call <A()>, <B()> and then <C(y)>.", ["A", "B", "C"], "", []),
        ("<A()> The results are x: yes (0.99).", ["A"], "The results are x: yes (0.99).", []),
        ("<A()> says yes, so <B()>", ["A"], "says yes, so <B()>", ["B"]),
        ("<A()>\n<B()> and more", ["A", "B"], "and more", []),
        ("Let me trigger <A()>. It found nothing.", ["A"], "It found nothing.", []),
        ("<A()> band <B()>", ["A"], "band <B()>", ["B"]),
    ],
)
def test_several_calls_are_made_in_order_and_the_rest_is_cut(text, made, cut, dropped):
    turn = parse_turn(text)
    assert [call.expert for call in turn.calls] == made
    assert turn.cut == cut and [call.expert for call in turn.dropped] == dropped
    assert turn.kept == text[: len(turn.kept)]


@given(st.lists(calls, min_size=1, max_size=4))
def test_what_is_written_is_read(made):
    sentence = f"This looks like a CT image. Let me trigger {joined(made)}."
    turn = parse_turn(sentence)
    assert turn.calls == tuple(made) and turn.kept == sentence and not turn.cut


@given(st.text())
def test_any_text_is_read_without_an_error(text):
    for wrapped in (text, f"<A({text})>", "<A(" * 200 + text):
        turn = parse_turn(wrapped)
        assert all(call.problem() is None for call in turn.calls)
        assert not turn.calls or wrapped.startswith(turn.kept)


def test_calls_that_cannot_be_written_say_why():
    assert Call("VISTA3D", "hepatic tumor").problem() is None
    assert "upper case" in Call("vista").problem()
    assert "cannot be written" in Call("A", ")>").problem()
    assert "cannot be written" in Call("A", "x" * 201).problem()
    for args in (" x", "x'", '"x"'):  # they would parse as x
        assert "must not begin or end" in Call("A", args).problem()
