"""Runs of two processes: equal to one process, and errors and signals of one reach the other."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.training.process_worlds import (
    arguments,
    children,
    copy_run,
    losses,
    make_world,
    run,
    run_script,
    start,
)
from vilam3_jax.checkpoints import exports
from vilam3_jax.runtime import workdir as workdir_lib
from vilam3_jax.training import telemetry

STEPS = 20
ONE = {"mesh.cpu_devices": 8, "num_steps": STEPS, "eval_every": 10}
TWO = ONE | {"mesh.cpu_devices": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def parameters(workdir: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(exports.load_export(workdir / "export")[0])]


def wait_for(process, workdir: Path, step: int) -> None:
    deadline = time.monotonic() + 900
    while max(losses(workdir), default=0) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def in_two(world):
    """An uninterrupted run of two processes."""
    workdir = world / "in_two"
    run(world, 2, arguments(world, workdir, **TWO))
    return workdir


def assert_nearly(one: Path, two: Path, rtol: float = 1e-5) -> None:
    """The same samples in every step; losses differ only by the order of sums."""
    rows = [{row["step"]: row for row in telemetry.read_metrics(w) if "loss" in row} for w in (one, two)]
    assert rows[0].keys() == rows[1].keys() == set(range(1, STEPS + 1))
    for step, row in rows[0].items():
        assert all(rows[1][step][key] == row[key] for key in ("tokens", "supervised"))
        np.testing.assert_allclose(rows[1][step]["loss"], row["loss"], rtol=rtol, err_msg=str(step))


def assert_same_run(one: Path, two: Path) -> None:
    assert losses(one) == losses(two)
    for left, right in zip(parameters(one), parameters(two), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.slow
def test_two_processes_equal_one(world, in_two):
    whole = world / "in_one"
    run(world, 1, arguments(world, whole, **ONE))
    assert_nearly(whole, in_two)
    heldout = [[row for row in telemetry.read_metrics(w) if "heldout_true" in row] for w in (whole, in_two)]
    assert len(heldout[0]) == len(heldout[1]) == 3
    for left, right in zip(*heldout, strict=True):
        for key in left.keys() & {"heldout_true", "heldout_swapped"}:
            np.testing.assert_allclose(right[key], left[key], rtol=1e-5)


@pytest.mark.slow
def test_two_processes_equal_one_for_pairs(world):
    workdirs = [world / "pairs_one", world / "pairs_two"]
    for workdir, settings in zip(workdirs, (ONE, TWO), strict=True):
        run(world, 1 + (settings is TWO), arguments(world, workdir, "stage1_vision", **settings))
    assert_nearly(*workdirs)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on(world, in_two):
    workdir = world / "killed"
    argv = arguments(world, workdir, **TWO, checkpoint_every=3)
    process = start(world, 2, argv)
    wait_for(process, workdir, 8)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    # From a broken collective, or from JAX's service if devices of one process wait for each other.
    assert process.returncode and ("no answer from process 1" in said or "task died" in said), said
    assert 8 <= max(losses(workdir)) < STEPS
    run(world, 2, argv)
    assert_same_run(workdir, in_two)


@pytest.mark.slow
def test_all_processes_wait_for_a_run_that_has_the_folder(world):
    folder = world / "waited_for"
    with workdir_lib.claimed(folder):
        process = start(world, 2, arguments(world, folder, **TWO | {"num_steps": 2}))
        time.sleep(60)  # a collective would time out after 30
        assert process.poll() is None
        assert [entry.name for entry in folder.iterdir()] == [workdir_lib.CLAIM_FILE]
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0 and f"process {os.getpid()} of" in said, said
    assert sorted(losses(folder)) == [1, 2]


@pytest.fixture(scope="module")
def preempted(world, in_two):
    """Two processes, one of which got a SIGTERM."""
    workdir = world / "preempted"
    process = start(world, 2, arguments(world, workdir, **TWO))
    wait_for(process, workdir, 4)
    os.kill(children(process.pid)[1], signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert steps == [max(losses(workdir))] and 4 <= steps[0] < STEPS
    return workdir


@pytest.mark.slow
def test_preempted_together_and_resumed(world, in_two, preempted):
    workdir = copy_run(preempted, world / "preempted_two")
    run(world, 2, arguments(world, workdir, **TWO))
    assert_same_run(workdir, in_two)


@pytest.mark.slow
def test_goes_on_in_another_number_of_processes_on_another_mesh(world, in_two, preempted):
    workdir = copy_run(preempted, world / "preempted_one")
    other = {"mesh.cpu_devices": 4, "mesh.fsdp": 2, "mesh.tensor": 2}
    run(world, 1, arguments(world, workdir, **{**TWO, **other}))
    assert_nearly(in_two, workdir, rtol=1e-4)


SCRIPT = """
    import os, signal, sys
    from absl import flags
    from vilam3_jax.runtime import processes
    from vilam3_jax.errors import UserError
    import jax
    values = flags.FlagValues()
    processes.define_flags(values)
    values(["test", *sys.argv[2:]])
    with processes.group("program", **processes.flag_values(values)):
        assert jax.process_count() == 2
        assert processes.gather({"a": "x" * jax.process_index()}) == [{"a": ""}, {"a": "x"}]
        assert processes.from_primary_process(jax.process_index() + 7) == 7
        if jax.process_index() == int(sys.argv[1][-1]):
            match sys.argv[1][:-1]:
                case "user":
                    raise UserError("data: no such folder; check --data")
                case "program":
                    raise RuntimeError("a defect")
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] != "none9":
            processes.barrier("never")
    print("done")
"""


PREEMPTED = """
    import os, signal, sys, time
    from absl import flags
    from vilam3_jax.runtime import processes
    import jax
    values = flags.FlagValues()
    processes.define_flags(values)
    values(["test", *sys.argv[2:]])
    start = signalled = int(sys.argv[1])
    with processes.group("program", **processes.flag_values(values)), processes.Preemption() as preemption:
        def terminate():
            if jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(3)
        if sys.argv[1][0] == "0":
            signalled += 5
        else:
            terminate()
        step = start
        while step < start + 100 and not preemption.reached(step):
            processes.gather(step)
            step += 1
            if step == signalled:
                terminate()
    print(step - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("start, latest", [("500", 1), ("0500", 10), ("00", 10)])
def test_a_run_that_goes_on_hears_signals_from_its_beginning(start: str, latest: int):
    """JAX counts the steps at which all can stop from the first one it was asked about."""
    results = run_script(PREEMPTED, 2, start)
    assert all(code == 0 for code, _, _ in results), results
    stopped = {int(out.split()[-1]) for _, out, _ in results}
    assert len(stopped) == 1 and stopped.pop() <= latest, results


def pair(case: str, script: str = SCRIPT) -> list[tuple[int, str, str]]:
    return run_script(script, 2, case)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("case,code", [("user", 2), ("program", 1), ("killed", -signal.SIGKILL)])
def test_an_error_in_one_process_ends_the_other_by_name(case, code, failing):
    done = pair(f"{case}{failing}")
    assert done[failing][0] == code, done
    ended = done[1 - failing][0]
    assert ended not in (0, -signal.SIGKILL) if case == "killed" else ended == code, done
    other = done[1 - failing][2]
    reason = {
        "user": f"process {1 - failing}: stopped, because process {failing} failed: data: no such",
        "program": f"stopped, because process {failing} failed: RuntimeError: a defect",
        "killed": f"no answer from process {failing}",
    }[case]
    if (case, failing) == ("killed", 0):  # process 0 runs the service, so JAX ends the others
        reason = "another task died"
    assert reason in other, done
    assert ("Traceback" in done[failing][2]) == (case == "program")


PLACED = """
    import sys
    from absl import flags
    import numpy as np
    from vilam3_jax.runtime import compat, processes
    from vilam3_jax.data.batches import PackedBatch, arrays
    from vilam3_jax.sharding import mesh
    from vilam3_jax.training import device_put
    values = flags.FlagValues()
    processes.define_flags(values)
    values(["test", *sys.argv[2:]])
    with processes.group("program", **processes.flag_values(values)):
        compat.use_cpu_devices(2)
        own = processes.jax.process_index()
        tokens, images, valid = np.arange(32).reshape(8, 4), np.arange(8).reshape(4, 2), np.ones((4, 2), bool)
        whole = PackedBatch(tokens, tokens, tokens, tokens, tokens, images, valid)
        halves, everything = [[0, 1], [2, 3]][own], [0, 1, 2, 3]
        for fsdp, context, tensor, local in ((4, 1, 1, halves), (2, 1, 2, halves), (1, 2, 2, everything)):
            config = mesh.MeshConfig(fsdp=fsdp, context=context, tensor=tensor)
            put = device_put.DevicePut(4, mesh.build_mesh(config))
            assert put.local_units == local, (put.local_units, local)
            rows = tokens.reshape(4, 2, 4)[local].reshape(-1, 4)
            own = PackedBatch(rows, rows, rows, rows, rows, images[local], valid[local])
            for name, array in arrays(put(own)).items():
                expected = getattr(whole, name)
                assert array.shape == expected.shape
                for shard in array.addressable_shards:
                    assert np.array_equal(shard.data, expected[shard.index]), (name, shard)
    print("done")
"""


@pytest.mark.slow
def test_each_process_holds_the_rows_of_its_devices():
    done = pair("placed", PLACED)
    assert [code for code, *_ in done] == [0, 0], done


LATE = """
    import sys, time
    from absl import flags
    from vilam3_jax.runtime import compat, processes
    values = flags.FlagValues()
    processes.define_flags(values)
    values(["test", *sys.argv[2:]])
    with processes.group("program", **processes.flag_values(values)):
        compat.use_cpu_devices(2)
        if processes.jax.process_index():
            time.sleep(40)
        if sys.argv[1] == "lined_up":
            processes.host_barrier("step")
        assert processes.gather(7) == [7, 7]
"""


@pytest.mark.slow
@pytest.mark.parametrize("case, fails", [("lined_up", False), ("at_once", True)])
def test_a_process_that_comes_late_to_a_program_is_waited_for(case, fails):
    done = pair(case, LATE)
    assert all((code != 0) == fails for code, *_ in done), done


@pytest.mark.slow
def test_processes_that_end_well():
    assert [code for code, *_ in pair("none9")] == [0, 0]
