"""Expert cards: the published text byte for byte, and the parser."""

import importlib.resources
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilam3_jax.data.experts.cards import (
    Card,
    card_list,
    load_cards,
    parse_cards,
    render_cards,
    with_card_list,
)
from vilam3_jax.errors import UserError

CARDS = load_cards("vila_m3")


def test_published_text_is_reproduced():
    text = (importlib.resources.files("vilam3_jax.data.experts") / "tables" / "vila_m3.txt").read_bytes()
    assert len(text) == 1373
    assert render_cards(parse_cards(text.decode())).encode() == text
    assert [c.name for c in CARDS] == ["BRATS", "VISTA3D", "VISTA2D", "CXR"]
    assert CARDS[1].args[:2] == ("everything", "hepatic tumor") and len(CARDS[1].args) == 10
    assert CARDS[1].accuracy == "127 organs: 0.792 Dice on average"
    assert CARDS[0].args == () and not any(c.stand_in for c in CARDS)


def test_quickstart_cards_are_short_and_say_what_they_are():
    cards = load_cards("quickstart")
    assert {c.name: c.args for c in cards} == {
        "ORGANS": ("organs",), "BRAINSEG": (), "BRAINTUMOR": (), "PNEUMONIA": (),
    }  # fmt: skip
    assert all(c.stand_in and "stand-in" in c.render() for c in cards)
    assert all(len(c.render()) <= 125 for c in cards)
    assert parse_cards(render_cards(cards)) == cards


words = st.text("abcdefgh XYZ:.-()", min_size=0, max_size=20)
cards = st.builds(
    Card,
    name=st.from_regex(r"[A-Z][A-Z0-9]{0,8}", fullmatch=True),
    args=st.lists(st.from_regex(r"[a-z][a-z ]{0,8}", fullmatch=True), max_size=4).map(tuple),
    modality=words,
    task=words,
    overview=words,
    accuracy=words,
)


@given(st.lists(cards, max_size=4))
def test_any_cards_survive_their_text(some):
    assert parse_cards(render_cards(some)) == some


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "lower"},
        {"overview": "two\nlines"},
        {"task": "x, Accuracy: forged"},
        {"args": ("a)>",)},
        {"stand_in": True},
        {"overview": "a stand-in"},
    ],
)
def test_cards_that_would_not_parse_are_refused(fields):
    good = {"name": "A", "args": (), "modality": "m", "task": "t", "overview": "o", "accuracy": "a"}
    with pytest.raises(ValueError):
        Card(**{**good, **fields})


def test_card_files(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([{"name": "A", "args": ["x"], "modality": "m", "task": "t",
                                 "overview": "o", "accuracy": "a"}]))  # fmt: skip
    assert load_cards(str(path))[0].args == ("x",)
    path.write_text('[{"name": "A"}]')
    for name in (str(path), "nonexistent", str(tmp_path / "none.txt")):
        with pytest.raises(UserError):
            load_cards(name)


def test_what_a_card_states_beyond_its_text_comes_from_the_facts():
    brats, vista = CARDS[0], CARDS[1]
    assert brats.roles == ("t1c", "t1", "t2", "flair") and brats.modalities == ("MR",)
    assert vista.roles == ("",) and vista.modalities == ("CT",)
    own = Card.from_dict({**vista.to_dict(), "modalities": ["CT", "MR"]})
    assert own.modalities == ("CT", "MR") and own.render() == vista.render()


def test_cards_travel_inside_a_model():
    model = with_card_list({"cards": "vila_m3", "template": "vicuna"})
    restored = json.loads(json.dumps(model))
    assert card_list(restored) == CARDS
    assert card_list({**restored, "cards": "a list that is nowhere"}) == CARDS
    with pytest.raises(UserError, match="card_list of the model"):
        card_list({"card_list": [{"name": "A"}]})
