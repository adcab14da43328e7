"""The warm-up: typical questions compile nothing afterwards."""

from __future__ import annotations

import jax
import pytest

from vilam3_jax.inference.agent import Query
from vilam3_jax.inference.assistant import Assistant
from vilam3_jax.inference.images import open_image
from vilam3_jax.serving import warm_up
from vilam3_jax.serving.engine import Engine, EngineError

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled():
    """Programs that were compiled since the test began."""
    events = []

    def heard(name, seconds, **_):
        if name == COMPILED:
            events.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield events
    jax.monitoring.unregister_event_duration_listener(heard)


def test_typical_questions_compile_nothing_after_it(export, world, compiled):
    options = dict(annotations=world.annotations, expert_host="off", max_length=1024, batch_size=2)
    with Assistant(export, **options) as fresh, Engine(fresh.generator) as engine:
        lines = []
        warm_up.run(fresh, engine, experts=True, tell=lines.append)
        assert len(lines) == 5 and "up to 256 positions (1 of 5)" in lines[0] and len(compiled) > 20
        del compiled[:]
        processor = fresh.generator.processor
        scan = open_image(world.film, processor.kept_size, preprocessing=processor.preprocessing)
        for experts in (True, False):
            for scans in ((scan,), ()):
                for limit in (16, 300):
                    asked = dict(scans=scans, experts=experts, max_new_tokens=limit)
                    engine.submit(fresh.script("Does this film show pneumonia?", **asked)).result(60)
                earlier = fresh.replay([(Query("Is it?", scans), "No, it is not.")], experts=experts)
                script = fresh.script("Why?", earlier=earlier, experts=experts, max_new_tokens=16)
                engine.submit(script).result(60)
        assert not compiled


def test_a_model_that_fails_is_not_served(assistant, monkeypatch):
    def fails(*_):
        raise RuntimeError("broken")

    with Engine(assistant.generator) as engine:
        monkeypatch.setattr("vilam3_jax.inference.batching.Batcher._decode", fails)
        with pytest.raises(EngineError):
            warm_up.run(assistant, engine, experts=False, tell=lambda _: None)
