"""The record of a dialogue as JSON."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import time

import pytest

from tests.inference.hostile import Repeater, Source, make_tokenizers
from tests.inference.test_injection import CARDS, KEY, QUESTION, about_a_slice, segmentation
from vilam3_jax.data.experts.record import Verdict, failed
from vilam3_jax.data.experts.store import content_sha256
from vilam3_jax.data.templates import CHATML
from vilam3_jax.inference.agent import Agent, Query
from vilam3_jax.inference.generate import Decoded


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizers(tmp_path_factory.mktemp("tokenizers"))["marked"]


class Scored(Repeater):
    """Gives every token a log-probability."""

    def answer(self, script):
        return super().answer(_scored(script))


def _scored(script):
    value = None
    try:
        while True:
            value = yield script.send(value)
            if isinstance(value, Decoded):
                value = dataclasses.replace(value, log_probs=(-0.5,) * len(value.ids))
    except StopIteration as end:
        return end.value


@pytest.fixture(scope="module")
def dialogue(tokenizer):
    """A call of each kind, text that is cut, and a follow-up."""
    doubt = Verdict(
        "volume_ml", "warn", subject="liver", value=60.0, low=300.0, message="small, says Mrs. Secret"
    )
    organs = segmentation("liver", verdicts=[doubt])
    broken = failed(KEY, "BRAINSEG", "", "no such file /data/Secret.nii")
    source = Source({("ORGANS", "organs"): organs, ("BRAINSEG", ""): broken})
    said = "<ORGANS(organs)>, <BRAINSEG()> and <ORGANS(Mrs. Secret)>. Secretly, it is large. <PNEUMONIA()>"
    model = Scored(tokenizer, said, "yes, Secret")
    agent = Agent(model, CHATML, cards=CARDS, provider=source)
    first = model.answer(agent.script(about_a_slice(f"{QUESTION} Secret?")))
    model = Scored(tokenizer, "<ORGANS(organs)>", "still yes")
    again = model.answer(
        Agent(model, CHATML, cards=CARDS, provider=source).script(Query("Sure?"), earlier=first)
    )
    return first, again, organs


def test_everything_is_recorded(dialogue, tokenizer):
    first, again, organs = dialogue
    found = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    asked, called, told, answered = found["turns"]
    assert [turn["role"] for turn in found["turns"]] == ["user", "assistant", "expert", "assistant"]
    assert [turn["text"] for turn in found["turns"]] == [turn.text for turn in first.turns]
    assert (
        found["answer"] == "yes, Secret" and found["cut"] and found["unexecuted_calls"] == ["<PNEUMONIA()>"]
    )
    count = len(tokenizer.encode("yes, Secret"))
    assert (answered["tokens"], answered["log_prob"]) == (count, -0.5 * count)
    assert asked["tokens"] is None and told["log_prob"] is None
    picture = first.turns[2].images[0]
    (shown,) = told["images"]
    assert shown == {"height": 32, "width": 32, "sha256": hashlib.sha256(picture.tobytes()).hexdigest()}
    times = [datetime.datetime.fromisoformat(turn["time"]) for turn in (asked, called, told, answered)]
    assert times == sorted(times) and abs(times[0].timestamp() - time.time()) < 600
    assert found["seconds"] >= called["seconds"] + answered["seconds"] >= 0
    good, broken, refused = found["calls"]
    assert [(one["expert"], one["args"], one["status"], one["accepted"]) for one in found["calls"]] == [
        ("ORGANS", "organs", "ok", True),
        ("BRAINSEG", "", "failed", True),
        ("ORGANS", "Mrs. Secret", "failed", False),
    ]
    assert good["mask"]["shape"] == [12, 10, 4] and good["mask"]["labelled_voxels"] == 6
    assert good["mask"]["sha256"] == hashlib.sha256(organs.labels.blob).hexdigest()
    assert good["record_sha256"] == content_sha256(organs)
    assert good["segments"] == [
        {"label": 1, "name": "liver", "voxels": 6, "volume_ml": 60.0, "components": 1}
    ]
    assert good["verdicts"][0]["value"] == 60.0 and good["verdicts"][0]["high"] is None
    assert broken["reason"].endswith("Secret.nii") and refused["turn"] == good["turn"] == 2
    later = again.to_dict()
    assert later["earlier_turns"] == 4 and later["turns"][0]["role"] == "user"
    assert later["calls"][0]["known"] and later["calls"][0]["turn"] == 2


def test_without_content_there_is_no_text(dialogue):
    for transcript in dialogue[:2]:
        found = transcript.to_dict(content=False)
        text = json.dumps(found, allow_nan=False)
        assert "Secret" not in text and QUESTION not in text and "reason" not in text
        assert [turn["characters"] for turn in found["turns"]] == [
            len(turn.text) for turn in transcript.turns[transcript.first_turn :]
        ]
    good, broken, refused = dialogue[0].to_dict(content=False)["calls"]
    assert good["segments"][0]["name"] == "liver" and good["verdicts"][0]["status"] == "warn"
    assert broken["expert"] == "BRAINSEG" and refused["expert"] is refused["args"] is None
