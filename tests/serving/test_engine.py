"""The engine: one thread owns the model, and requests come and go."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest

from vilam3_jax.inference.batching import Batcher, Turn, Wait
from vilam3_jax.inference.generate import Chunk
from vilam3_jax.serving.engine import BusyError, ClosedError, DeadlineError, Engine, EngineError


def says(tokens, seed=0, started=None):
    answer = yield Turn(
        Chunk.text([20 + seed, 30, 40]),
        tokens,
        (),
        on_tokens=None if started is None else lambda _: started.set(),
    )
    return answer.ids


@pytest.fixture
def generator(assistant):
    return assistant.generator


def eventually(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_requests_of_many_threads_are_answered_as_alone(generator):
    expected = {seed: next(Batcher(generator).run([says(20, seed)])) for seed in range(6)}
    found = {}
    with Engine(generator) as engine:
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: engine.submit(says(20, n)).result(60)}))
            for n in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        eventually(lambda: engine.load == 0)
    assert found == expected and len(set(map(tuple, found.values()))) == 6


def test_a_full_queue_a_deadline_and_a_client_that_leaves(generator):
    with Engine(generator, queue=3) as engine:
        started = threading.Event()
        leaves = engine.submit(says(900, started=started))
        late = engine.submit(says(900), seconds=0.3)
        short = engine.submit(says(5))
        with pytest.raises(BusyError, match="busy"):
            engine.submit(says(5))
        assert started.wait(60) and leaves.cancel()
        with pytest.raises(DeadlineError, match="deadline"):
            late.result(60)
        assert len(short.result(60)) == 5
        eventually(lambda: engine.load == 0)
        with pytest.raises(CancelledError):
            leaves.result(0)
        assert len(engine.submit(says(5)).result(60)) == 5


def test_a_deadline_ends_a_wait_for_an_expert(generator):
    release = threading.Event()

    def waits():
        yield Wait(release.wait)

    with Engine(generator) as engine:
        late = engine.submit(waits(), seconds=0.1)
        with pytest.raises(DeadlineError):
            late.result(30)
        assert engine.load == 0
        release.set()


def test_an_error_of_a_script_is_its_own(generator):
    def fails():
        yield from says(2)
        raise ValueError("mine")

    with Engine(generator) as engine:
        failing, other = engine.submit(fails()), engine.submit(says(40))
        with pytest.raises(ValueError, match="mine"):
            failing.result(60)
        assert len(other.result(60)) == 40


def test_the_engine_survives_a_failure_of_the_model(generator, monkeypatch, caplog):
    plain, failures = Batcher.step, [RuntimeError("secret content"), SystemError("secret content")]

    def step(self):
        if failures and self.unfinished:
            raise failures.pop()
        return plain(self)

    monkeypatch.setattr(Batcher, "step", step)
    with Engine(generator) as engine:
        for _ in range(2):
            with pytest.raises(EngineError, match="try again"):
                engine.submit(says(5)).result(60)
        assert len(engine.submit(says(5)).result(60)) == 5
    assert "RuntimeError" in caplog.text and "secret" not in caplog.text


def test_close_drains_or_cancels(generator):
    engine = Engine(generator)
    last = engine.submit(says(60))
    engine.close()
    assert len(last.result(0)) == 60 and not engine.alive
    with pytest.raises(ClosedError):
        engine.submit(says(1))
    engine.close()
    engine = Engine(generator)
    waiting = [engine.submit(says(900)) for _ in range(6)]
    engine.close(seconds=0.2)
    assert all(one.cancelled() for one in waiting)
