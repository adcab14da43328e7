"""Arms: queries to the agent, rows, and the majority answer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vilam3_jax.data.examples import Example, ImageRef, Turn
from vilam3_jax.data.experts.store import Annotation
from vilam3_jax.errors import UserError
from vilam3_jax.evals import answerers, changes, conditions
from vilam3_jax.evals import protocol as protocols
from vilam3_jax.evals.items import Item, item_set_hash
from vilam3_jax.inference.agent import Message, Transcript

QUICKSTART = protocols.get("quickstart@1")
IMAGE = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)


def item(name="e/q0", **changes):
    values = {
        "id": name, "example": name[:-3], "dataset": "d",
        "images": (ImageRef(path="scan.nii", axis=2, index=7),),
        "input_keys": ("k",), "modality": "CT",
        "question": "Is the liver visible?", "answer": "yes", "question_type": "organ_present",
        "label_source": "map", "options": ("yes", "no"), "expert": "ORGANS", "args": "organs",
        "oracle": True, "cluster": "p1",
    }  # fmt: skip
    return Item(**(values | changes))


def spoken(answer, trigger=None, annotation=None):
    turns = [Message("user", "PROMPT"), Message("assistant", answer)]
    text = None
    if trigger:
        text = f"Let me trigger <{trigger[0]}({trigger[1]})>."
        turns[1:1] = [Message("assistant", text), Message("expert", "EXPERT")]
    called = () if trigger is None else (annotation or Annotation("k", *trigger),)
    return Transcript(tuple(turns), answer, called, text)


class FakeAgent:
    def __init__(self, answer="yes"):
        self.answer, self.queries = answer, []

    def script(self, query, *, earlier, max_new_tokens, sampling):
        assert max_new_tokens == QUICKSTART.max_new_tokens and earlier is None
        self.queries.append(query)
        return query

    def run_scripts(self, scripts):
        for _ in scripts:
            yield spoken(self.answer)


def asked(agent, arm, items, done=0):
    """Rows of an arm, answered by an agent."""
    answerer = answerers.ModelAnswerer(
        lambda _: agent,
        lambda item: [IMAGE + len(item.id)] * len(item.images),
        context=answerers.StoredContext(None),
        seed=0,
    )
    arm = conditions.ARMS[arm]
    return [
        conditions.row_of(QUICKSTART, arm, answer)
        for answer in answerer.answers(QUICKSTART, arm, items, done)
    ]


def row_of(arm, one, transcript, falsify_seed=None):
    details = answerers.transcript_details(one, transcript, falsify_seed=falsify_seed)
    answer = conditions.Answer(one, transcript.answer, details)
    return conditions.row_of(QUICKSTART, conditions.ARMS[arm], answer)


def test_arms_mean_what_their_names_say():
    assert conditions.arm_of("stage4_falsified", None, None).experts == "falsified"
    assert conditions.arm_of("stage4_blank", "off", "blank").images == "blank"
    assert conditions.arm_of(None, "on", None).name == "experts_on_images_true"
    assert conditions.arm_of("mine", "on", "blank") == conditions.Arm("mine", "", "on", "blank")
    with pytest.raises(UserError, match="means --experts=off, not on"):
        conditions.arm_of("stage4_no_experts", "on", None)


def test_items_are_asked_in_their_order_with_their_slices():
    agent = FakeAgent()
    items = [item(f"e{i}/q0") for i in range(5)]
    rows = asked(agent, "stage3", items)
    query = agent.queries[0]
    (scan,) = query.scans
    assert (query.question, scan.axis, scan.index, scan.input_key) == ("Is the liver visible?", 2, 7, "k")
    assert np.array_equal(scan.image, IMAGE + 5)
    assert [row["item"] for row in rows] == [one.id for one in items]
    assert all(row["correct"] and row["falsify_seed"] is None for row in rows)
    assert asked(FakeAgent(), "stage3", items, done=3) == rows[3:]


def test_the_blank_arm_shows_nothing_of_the_image():
    agent = FakeAgent()
    asked(agent, "stage4_blank", [item()])
    shown = agent.queries[0].scans[0].image
    assert shown.shape == IMAGE.shape and len(np.unique(shown)) == 1
    asked(agent, "no_image", [item()])
    assert agent.queries[1].scans == ()


def test_another_patients_image_comes_with_its_own_key():
    items = [item(f"e{i}/q0", cluster=f"p{i // 2}", input_keys=(f"k{i}",)) for i in range(10)]
    agent = FakeAgent()
    rows = asked(agent, "other_patient", items)
    shown = [int(query.scans[0].input_key[1:]) for query in agent.queries]
    assert len(rows) == 10 and all(theirs // 2 != own // 2 for own, theirs in enumerate(shown))
    assert len(set(shown)) > 4  # spread over patients
    again = FakeAgent()
    asked(again, "other_patient", items[::-1])
    assert [int(query.scans[0].input_key[1:]) for query in again.queries] == shown[::-1]
    assert asked(FakeAgent(), "experts_other_modality", items) == []  # there is only one modality
    mixed = [*items, item("film/q0", modality="CXR", cluster="film", input_keys=("film",))]
    agent = FakeAgent()
    asked(agent, "experts_other_modality", mixed)
    keys = [query.scans[0].input_key for query in agent.queries]
    assert keys[:10] == ["film"] * 10 and keys[10] != "film"


def test_only_the_region_is_hidden():
    image = np.arange(10 * 20 * 3, dtype=np.uint8).reshape(10, 20, 3)
    change = changes.IMAGE_CHANGES["region_hidden"]
    hidden = change.pixels(image, item(region=(0.5, 0.2, 0.75, 0.4)))
    differs = (hidden != image).any(axis=-1)
    inside = np.zeros((10, 20), bool)
    inside[2:4, 10:15] = True
    assert not differs[~inside].any() and len(np.unique(hidden[inside], axis=0)) == 1
    whole, part = item(), item("f/q0", region=(0, 0, 1, 1))
    assert [one.id for one, _ in changes.asked_items([whole, part], "region_hidden", "true")] == ["f/q0"]


@pytest.mark.parametrize("name", ["jpeg", "rotated", "wider_window"])
def test_a_changed_image_is_another_of_the_same_size(name):
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    changed = changes.IMAGE_CHANGES[name].pixels(image, item())
    assert changed.shape == image.shape and changed.dtype == np.uint8 and (changed != image).any()


def test_reversed_options_move_in_question_and_options():
    question = "Which organ?\n(A) liver\n(B) spleen\n(C) kidney"
    asked_item = item(question=question, options=("liver", "spleen", "kidney"))
    (found,) = changes.asked_items([asked_item, item()], "true", "options_reversed")
    assert found[0].question == "Which organ?\n(A) kidney\n(B) spleen\n(C) liver"
    assert found[0].options == ("kidney", "spleen", "liver") and found[0].answer == asked_item.answer


def test_a_row_tells_what_was_said_and_who_was_called():
    annotation = Annotation("k", "ORGANS", "organs", version="1+falsified.3")
    transcript = spoken("No.", ("ORGANS", "organs"), annotation)
    row = row_of("stage4_falsified", item(), transcript, 3)
    assert row["output"] == "No." and row["parsed"] == "no" and row["gold"] == "yes"
    assert not row["correct"] and not row["unparsed"]
    assert row["trigger"] == "Let me trigger <ORGANS(organs)>." and row["expert_called"] == "ORGANS"
    assert row["expert_right"] is True and row["expert_text"] == "EXPERT" and row["expert_status"] == "ok"
    assert row["falsify_seed"] == 3 and row["expert_version"].endswith("falsified.3")
    wrong = row_of("stage4_experts", item(), spoken("The liver"))
    assert wrong["expert_right"] is False and wrong["trigger"] is None and wrong["unparsed"]
    nobody = item(expert=None, args="")
    assert row_of("stage3", nobody, spoken("yes"))["expert_right"] is None


def training(kind, question, answers, options):
    for number, answer in enumerate(answers):
        yield Example(
            f"{kind}{question}{number}",
            "conversation",
            (ImageRef(data=b"x"),),
            (Turn("user", "<image>"), Turn("assistant", "a", True)),
            meta={"qa": [{"type": kind, "question": question, "answer": answer, "options": options}]},
        )


def test_majority_goes_by_question_then_type_then_place():
    examples = [
        *training("organ_present", "Is the liver visible?", ["no", "no", "yes"], ["yes", "no"]),
        *training("organ_present", "Is the spleen visible?", ["yes"] * 5, ["yes", "no"]),
        *training(
            "range", "How large?", ["under 5 ml", "under 5 ml", "over 9 ml"], ["under 5 ml", "over 9 ml"]
        ),
        *training("range", "How large is it?", ["over 70 ml"] * 2, ["under 20 ml", "over 70 ml"]),
        *training("which", "Which?", ["liver, spleen", "liver, spleen", "none"], ["liver", "spleen", "none"]),
    ]
    majority = conditions.Majority(examples)
    assert majority.answer(item()) == "no"
    assert majority.answer(item(question="Is the aorta visible?")) == "yes"
    # No training answer is among these options: the place counts (second: 1 + 2 of 5, first: 2 of 5).
    ranges = item(question_type="range", question="?", options=("under 1 ml", "over 2 ml"))
    assert majority.answer(ranges) == "over 2 ml"
    which = item(question_type="which", question="?", options=("spleen", "liver", "aorta", "none"))
    assert majority.answer(which) == "liver, spleen"
    assert majority.answer(dataclasses.replace(which, options=("aorta", "none"))) == "none"
    assert majority.answer(item(question_type="unseen")) == ""
    with pytest.raises(UserError, match="no questions"):
        conditions.Majority([])


def test_majority_rows_are_scored_like_any_other():
    examples = list(training("organ_present", "Is the liver visible?", ["no", "no", "yes"], ["yes", "no"]))
    (row,) = conditions.majority_rows(QUICKSTART, [item()], examples)
    assert (row["arm"], row["output"], row["correct"]) == ("majority", "no", False)


def test_item_set_hash_sees_every_change_but_order():
    items = [item("a/q0"), item("b/q0")]
    whole = item_set_hash(items)
    assert whole == item_set_hash(items[::-1])
    assert whole != item_set_hash(items[:1])
    assert whole != item_set_hash([items[0], item("b/q0", answer="no")])
