"""What a resumed run tells about changed settings, and what it refuses."""

import json
import signal

import pytest

from vilam3_jax import config as config_lib
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import processes
from vilam3_jax.training import resumption

RECIPE = "configs/stage3_instruct.py:tiny"


def changes(before, now):
    stored = json.loads(config_lib.load(RECIPE, before).to_json())
    return resumption.changes(stored, config_lib.load(RECIPE, now))


def test_equal_settings_have_no_changes():
    assert changes({}, {}) == {}
    assert changes({"data.mixture": (("instruct", 1),)}, {"data.mixture": (("instruct", 1),)}) == {}


def test_changes_name_key_and_values():
    found = changes({"schedule.peak": 1e-3, "num_steps": 5}, {"schedule.peak": 2e-3, "num_steps": 5})
    assert found == {"schedule.peak": "0.001 → 0.002"}
    assert changes({"data.mixture": (("a", 1),)}, {"data.mixture": (("a", 2),)}) == {
        "data.mixture": '[["a", 1]] → [["a", 2]]'
    }
    assert changes({"trainable": ((r".*", 1.0),)}, {"trainable": ((r"llm/.*", 0.5), (r".*", 0.0))})


def test_keys_of_other_versions_are_left_out():
    stored = json.loads(config_lib.load(RECIPE).to_json())
    del stored["ema_decay"], stored["telemetry"]
    stored["kind"] = stored.pop("task")
    assert resumption.changes(stored, config_lib.load(RECIPE, {"ema_decay": 0.9})) == {}


def test_another_origin_of_the_weights_is_refused():
    resumption.check_init(changes({}, {"num_steps": 7}))
    for before, now in (({}, "a"), ({"init.everything": "b"}, "a")):
        with pytest.raises(UserError, match=r"config init.everything: .* → \"a\".*another --workdir"):
            resumption.check_init(changes(before, {"init.everything": now}))
    several = {"init.llm": "a", "init.projector": "b"}
    with pytest.raises(UserError, match=r"config init.llm: .*; init.projector: .*set them back"):
        resumption.check_init(changes({}, several))


def test_ctrl_c_asks_once_and_interrupts_the_second_time(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with processes.Preemption() as preemption:
        assert not preemption.reached(1)
        signal.raise_signal(signal.SIGINT)
        assert preemption.reached(2) and preemption.interrupted
        assert "saved" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with processes.Preemption() as preemption:
        signal.raise_signal(signal.SIGTERM)
        assert preemption.reached(1) and not preemption.interrupted
