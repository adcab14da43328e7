"""Hooks: when they are due, in what order they run, and what surrounds them."""

import contextlib

import pytest

from vilam3_jax.training.hooks import Hook, run_hooks


@pytest.mark.parametrize(
    "every, final, due",
    [
        (1, None, [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, None, [0, 3, 6]),
        (3, 7, [0, 3, 6, 7]),
        (3, 6, [0, 3, 6]),
        (0, None, []),
        (0, 7, []),  # off: not even at the last step
    ],
)
def test_a_hook_runs_at_its_steps(every, final, due):
    steps = []
    hook = Hook(lambda step, value: steps.append((step, value)), every, final)
    for step in range(8):
        run_hooks([hook], step, f"state {step}")
    assert steps == [(step, f"state {step}") for step in due]


def test_hooks_run_in_order_each_in_its_context():
    events = []

    @contextlib.contextmanager
    def around():
        events.append("enter")
        yield
        events.append("exit")

    first = Hook(lambda *_: events.append("first"), every=2, around=around)
    run_hooks([first, Hook(lambda *_: events.append("second"))], 2, None)
    assert events == ["enter", "first", "exit", "second"]
    run_hooks([first, Hook(lambda *_: events.append("second"))], 3, None)
    assert events[4:] == ["second"], "the context of a hook that is not due was entered"


def test_an_error_of_a_hook_ends_the_run_and_leaves_its_context():
    events = []

    @contextlib.contextmanager
    def around():
        try:
            yield
        finally:
            events.append("exit")

    def fail(step, value):
        raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        run_hooks([Hook(fail, around=around), Hook(lambda *_: events.append("next"))], 1, None)
    assert events == ["exit"]
