"""The warm-up: typical questions compile no program of the model afterwards."""

from __future__ import annotations

import jax
import pytest

from vilam3_jax.inference.agent import Query
from vilam3_jax.inference.assistant import Assistant
from vilam3_jax.inference.images import open_image
from vilam3_jax.serving import warm_up
from vilam3_jax.serving.engine import Engine, EngineError

QUESTION = warm_up._QUESTION
COMPILED = "/jax/core/compile/backend_compile_duration"
MODEL = {"prefill", "decode"}  # the programs that run the model, by their names in `inference.programs`


@pytest.fixture
def compiled():
    """Names of the programs that were compiled since the test began."""
    names = []

    def heard(event, _, *, fun_name="", **__):
        if event == COMPILED:
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield names
    jax.monitoring.unregister_event_duration_listener(heard)


def of_model(names):
    return [name for name in names if any(part in name for part in MODEL)]


def test_typical_questions_compile_nothing_after_it(export, world, compiled):
    options = dict(annotations=world.annotations, expert_host="off", max_length=1024, batch_size=2)
    with Assistant(export, **options) as fresh, Engine(fresh.generator) as engine:
        lines = []
        warm_up.run(fresh, engine, experts=True, max_new_tokens=300, tell=lines.append)
        assert len(lines) == 4 and lines[0] == "questions about an image, with experts (1 of 4)"
        assert all(sum(part in name for name in compiled) >= 4 for part in MODEL), compiled
        del compiled[:]
        processor = fresh.generator.processor
        scan = open_image(world.film, processor.kept_size, preprocessing=processor.preprocessing)
        for experts in (True, False):
            for scans in ((scan,), ()):
                for limit in (64, 300):
                    asked = dict(experts=experts, max_new_tokens=limit)
                    first = engine.submit(fresh.script(QUESTION, scans=scans, **asked)).result(60)
                    assert len(first.answer) > 10
                    earlier = fresh.replay([(Query(QUESTION, scans), warm_up._ANSWER)], experts=experts)
                    engine.submit(fresh.script(QUESTION, earlier=earlier, **asked)).result(60)
        assert not of_model(compiled)


def test_a_model_that_fails_is_not_served(assistant, monkeypatch):
    def fails(*_):
        raise RuntimeError("broken")

    with Engine(assistant.generator) as engine:
        monkeypatch.setattr("vilam3_jax.inference.batching.Batcher._decode", fails)
        with pytest.raises(EngineError):
            warm_up.run(assistant, engine, experts=False, max_new_tokens=8, tell=lambda _: None)
