"""Arms: queries to the agent, rows, and the majority answer."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vilam3_jax.data.examples import Example, ImageRef, Turn
from vilam3_jax.data.experts.store import Annotation
from vilam3_jax.errors import UserError
from vilam3_jax.evals import conditions
from vilam3_jax.evals import protocol as protocols
from vilam3_jax.inference.agent import Message, Transcript

QUICKSTART = protocols.get("quickstart@1")
IMAGE = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)


def item(name="e/q0", **changes):
    values = {
        "id": name, "image": ImageRef(path="scan.nii", axis=2, index=7), "input_key": "k", "modality": "CT",
        "question": "Is the liver visible?", "answer": "yes", "question_type": "organ_present",
        "label_source": "map", "options": ("yes", "no"), "expert": "ORGANS", "args": "organs",
        "oracle": True, "cluster": "p1",
    }  # fmt: skip
    return protocols.Item(**(values | changes))


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

    def run(self, queries, *, max_new_tokens):
        assert max_new_tokens == QUICKSTART.max_new_tokens
        for query in queries:
            self.queries.append(query)
            yield spoken(self.answer)


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
    rows = list(
        conditions.answer_items(
            agent, QUICKSTART, conditions.ARMS["stage3"], items, lambda _: IMAGE, falsify_seed=0
        )
    )
    query = agent.queries[0]
    (scan,) = query.scans
    assert (query.question, scan.axis, scan.index, scan.input_key) == ("Is the liver visible?", 2, 7, "k")
    assert np.array_equal(scan.image, IMAGE)
    assert [row["item"] for row in rows] == [one.id for one in items]
    assert all(row["correct"] and row["falsify_seed"] is None for row in rows)


def test_the_blank_arm_shows_nothing_of_the_image():
    agent = FakeAgent()
    list(
        conditions.answer_items(
            agent, QUICKSTART, conditions.ARMS["stage4_blank"], [item()], lambda _: IMAGE, falsify_seed=0
        )
    )
    shown = agent.queries[0].scans[0].image
    assert shown.shape == IMAGE.shape and len(np.unique(shown)) == 1


def test_a_row_tells_what_was_said_and_who_was_called():
    annotation = Annotation("k", "ORGANS", "organs", version="1+falsified.3")
    transcript = spoken("No.", ("ORGANS", "organs"), annotation)
    row = conditions.row_of(
        QUICKSTART, conditions.ARMS["stage4_falsified"], item(), transcript, falsify_seed=3
    )
    assert row["output"] == "No." and row["parsed"] == "no" and row["gold"] == "yes"
    assert not row["correct"] and not row["unparsed"]
    assert row["trigger"] == "Let me trigger <ORGANS(organs)>." and row["expert_called"] == "ORGANS"
    assert row["expert_right"] is True and row["expert_text"] == "EXPERT" and row["expert_status"] == "ok"
    assert row["falsify_seed"] == 3 and row["expert_version"].endswith("falsified.3")
    wrong = conditions.row_of(
        QUICKSTART, conditions.ARMS["stage4_experts"], item(), spoken("The liver"), falsify_seed=3
    )
    assert wrong["expert_right"] is False and wrong["trigger"] is None and wrong["unparsed"]
    nobody = item(expert=None, args="")
    assert (
        conditions.row_of(QUICKSTART, conditions.ARMS["stage3"], nobody, spoken("yes"), falsify_seed=0)[
            "expert_right"
        ]
        is None
    )


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
    whole = conditions.item_set_hash(items)
    assert whole == conditions.item_set_hash(items[::-1])
    assert whole != conditions.item_set_hash(items[:1])
    assert whole != conditions.item_set_hash([items[0], item("b/q0", answer="no")])
