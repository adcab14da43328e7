"""The engines: identical records, and failures that cost at most one input."""

import collections
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import faulty
import numpy as np
import pytest
import vilam3_experts
from PIL import Image
from vilam3_experts import audit
from vilam3_experts import inputs as inputs_module
from vilam3_experts.annotate import Engine, annotate
from vilam3_experts.cli import main
from vilam3_experts.engine import committer as committer_module
from vilam3_experts.engine.job import Outcome, in_shard
from vilam3_experts.engine.local import worker_environments
from vilam3_experts.engine.memory import is_out_of_memory
from vilam3_experts.engine.summary import MAX_REASONS, RunSummary
from vilam3_experts.engine.worker import Worker
from vilam3_experts.host import serve

import vilam3_jax
from vilam3_jax.data.experts.host_client import write_frame
from vilam3_jax.data.experts.store import AnnotationStore, AnnotationWriter
from vilam3_jax.errors import UnavailableError, UserError

LOCAL = Engine(workers=2)
ONE = Engine(workers=1)


def picture(path, number, fault=255):
    pixels = np.random.default_rng(number).integers(0, 255, (6, 5, 3)).astype(np.uint8)
    pixels[0, 0] = fault
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Creates a folder with `good` images and one of each fault; the expert logs its runs."""
    monkeypatch.setenv("FAULTY_LOG", str(tmp_path / "log"))

    def make(good, *faults):
        for n in range(good):
            picture(tmp_path / "data" / f"{n:04d}.png", n)
        for n, fault in enumerate(faults):
            picture(tmp_path / "data" / f"{faulty.NAMES[fault]}_{n}.png", 1000 + n, fault)
        return tmp_path / "data"

    return make


def log(tmp_path):
    """The lines that the expert logged, without the process ids."""
    return [line.split(" ", 1)[1] for line in (tmp_path / "log").read_text().splitlines()]


def records(store):
    opened = AnnotationStore(store)
    return [opened.get(*key) for key in opened.keys()]  # noqa: SIM118


def reasons(store):
    return sorted(record.reason for record in records(store) if record.status == "failed")


def test_engines_give_the_same_records(folder, tmp_path):
    data = folder(12, faulty.DECLINES, faulty.RAISES, faulty.OOM)
    (data / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    digests = set()
    for name, engine in {"here": Engine(), "local": LOCAL, "batch": Engine(workers=1, batch=4)}.items():
        expert = faulty.descriptor("Batched") if name == "batch" else faulty.FAULTY
        summary = annotate(expert, data, tmp_path / name, engine=engine)
        assert summary.counts == {"annotated": 13, "failed": 2, "unreadable": 1}, name
        digests.add(AnnotationStore(tmp_path / name).digest())
    assert len(digests) == 1
    before = len(log(tmp_path))
    assert annotate(faulty.FAULTY, data, tmp_path / "local", engine=LOCAL).counts["skipped"] == 15
    assert len(log(tmp_path)) == before  # neither run nor built


def test_every_fault_costs_one_input(folder, tmp_path):
    data = folder(10, faulty.KILLS, faulty.HANGS, faulty.OOM, faulty.ALWAYS_OOM, faulty.CUDA, faulty.DECLINES)
    engine = Engine(workers=2, timeout=4)
    summary = annotate(faulty.FAULTY, data, tmp_path / "store", engine=engine, audit=tmp_path / "audit")
    assert summary.counts == {"annotated": 11, "failed": 5}
    assert summary.exit_code == 0
    killed, oom, cuda, hung = (
        "its process was ended by signal 9 (SIGKILL), as the system does when memory is short, 3 times",
        "out of memory, also in its smallest form; use a larger device",
        "RuntimeError: CUDA error: device-side assert triggered, 3 times",
        "took longer than the 4 s of --timeout",
    )
    assert reasons(tmp_path / "store") == sorted([killed, oom, cuda, hung, "no film of this kind"])
    runs = collections.Counter(line.split()[1] for line in log(tmp_path) if line.startswith("run"))
    assert {int(fault): count for fault, count in runs.items()} == {
        255: 10, faulty.KILLS: 3, faulty.HANGS: 1, faulty.OOM: 3, faulty.ALWAYS_OOM: 4, faulty.CUDA: 3,
        faulty.DECLINES: 1,
    }  # fmt: skip
    table = "\n".join(summary.table())
    assert "1  failed       took longer than the 4 s of --timeout  [hangs_1.png]" in table
    listed = json.loads((tmp_path / "store" / "problems-FAULTY.json").read_text())
    assert {row["input"] for row in listed} == {path.name for path in data.glob("[a-z]*")} - {"oom_2.png"}
    report = audit.verify(tmp_path / "audit")
    assert report.ok and report.calls == 16
    for record in records(tmp_path / "store"):
        assert record.version == "1" and record.expert == "FAULTY"


def test_a_batch_that_kills_is_run_one_by_one(folder, tmp_path):
    data = folder(7, faulty.KILLS)
    expert = faulty.descriptor("Batched")
    summary = annotate(expert, data, tmp_path / "store", engine=Engine(workers=1, batch=8))
    assert summary.counts == {"annotated": 7, "failed": 1}
    assert [line for line in log(tmp_path) if line.startswith("batch")] == ["batch 8"]


def test_an_input_that_kills_while_it_is_read(folder, tmp_path, monkeypatch):
    data = folder(2, faulty.KILLS)
    code = "import os, signal\nimport vilam3_experts.inputs as i\nload = i.Input.load\n"
    code += "i.Input.load = lambda self: os.kill(os.getpid(), 9) if 'kills' in self.name else load(self)\n"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))  # imported when Python starts
    summary = annotate(faulty.FAULTY, data, tmp_path / "store", engine=Engine(workers=1))
    assert summary.counts == {"annotated": 2, "unreadable": 1}
    (reason,) = summary.reasons.values()
    assert reason.text.startswith("while it was read: its process was ended by signal 9")


def test_experts_that_cannot_be_built_end_the_run(folder, tmp_path):
    data = folder(3)
    with pytest.raises(UserError, match=r"FAULTY cannot start .*no weights of mine"):
        annotate(faulty.descriptor("refuses"), data, tmp_path / "s", engine=ONE)
    with pytest.raises(UnavailableError, match=r"signal 9 .* while the expert was built, 3 times"):
        annotate(faulty.descriptor("Unbuildable"), data, tmp_path / "s", engine=ONE)
    assert not records(tmp_path / "s")


def test_killed_workers_lose_nothing(folder, tmp_path, monkeypatch):
    """Repeated kill -9 of the active worker."""
    monkeypatch.setenv("FAULTY_SECONDS", "0.03")
    data = folder(40)
    ended, killed = threading.Event(), set()

    def kill():
        while not ended.wait(0.01) and len(killed) < 3:
            seen = (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
            pid = seen[-1].split()[0] if seen else ""
            if pid not in killed and sum(line.startswith(f"{pid} run") for line in seen) >= 3:
                killed.add(pid)
                os.kill(int(pid), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    summary = annotate(faulty.FAULTY, data, tmp_path / "store", engine=Engine(workers=1))
    ended.set()
    killer.join()
    assert summary.counts == {"annotated": 40}
    assert len(killed) == 3 and log(tmp_path).count("built") == 4
    assert AnnotationStore(tmp_path / "store").digest() == digest_of(data, tmp_path)


def digest_of(data, tmp_path):
    annotate(faulty.FAULTY, data, tmp_path / "reference")
    return AnnotationStore(tmp_path / "reference").digest()


DRIVER = """
import sys, faulty
from vilam3_experts.annotate import Engine, annotate
print(annotate(faulty.FAULTY, sys.argv[1], sys.argv[2], engine=Engine(workers=2)).line())
"""


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    data = folder(600)
    roots = [pathlib.Path(m.__file__).parents[1] for m in (vilam3_jax, vilam3_experts)]
    path = os.pathsep.join(map(str, (*roots, pathlib.Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": path, "FAULTY_SECONDS": "0.005"}
    command = [sys.executable, "-c", DRIVER, str(data), str(tmp_path / "store")]
    driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "store").glob("*.index")):
        assert driver.poll() is None
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    committed = len(AnnotationStore(tmp_path / "store"))
    assert 256 <= committed < 600
    workers = {int(line.split()[0]) for line in (tmp_path / "log").read_text().splitlines()}
    deadline = time.monotonic() + 10
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):  # they end with the driver
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (tmp_path / "log").unlink()
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert out == f"{600 - committed} annotated, {committed} skipped, 0 failed, 0 unreadable\n"
    runs = [line for line in log(tmp_path) if line.startswith("run")]
    assert len(runs) == len(set(runs)) == 600 - committed  # no finished record was computed again
    assert AnnotationStore(tmp_path / "store").digest() == digest_of(data, tmp_path)


@pytest.mark.parametrize("engine", [Engine(), ONE], ids=["here", "local"])
def test_a_full_disk_ends_the_run_and_the_next_goes_on(folder, tmp_path, monkeypatch, engine):
    data = folder(30)
    monkeypatch.setattr(committer_module, "COMMIT_RECORDS", 10)
    real, calls = AnnotationWriter.flush, []

    def flush(self):
        calls.append(1)
        if len(calls) > 1:
            raise UserError("store: cannot be written (No space left on device); free space")
        real(self)

    monkeypatch.setattr(AnnotationWriter, "flush", flush)
    with pytest.raises(UserError, match="No space left"):
        annotate(faulty.FAULTY, data, tmp_path / "store", engine=engine)
    monkeypatch.setattr(AnnotationWriter, "flush", real)
    assert len(records(tmp_path / "store")) == 10
    assert annotate(faulty.FAULTY, data, tmp_path / "store", engine=engine).counts["skipped"] == 10
    assert AnnotationStore(tmp_path / "store").digest() == digest_of(data, tmp_path)


@pytest.mark.slow
def test_records_do_not_wait_for_the_next_one(folder, tmp_path, monkeypatch):
    """A record is committed in time even if the next input takes long."""
    data = folder(1, faulty.HANGS)
    monkeypatch.setattr(committer_module, "COMMIT_SECONDS", 0.5)
    engine = Engine(workers=1, timeout=6)
    thread = threading.Thread(
        target=annotate, args=(faulty.FAULTY, data, tmp_path / "s"), kwargs={"engine": engine}
    )
    thread.start()
    deadline = time.monotonic() + 30
    while not list((tmp_path / "s").glob("*.index")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert thread.is_alive()
    assert len(records(tmp_path / "s")) == 1
    thread.join()


def test_finished_files_are_not_read_again(folder, tmp_path, monkeypatch):
    data = folder(6, faulty.DECLINES)
    (data / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    annotate(faulty.FAULTY, data, tmp_path / "s")
    read, load = [], inputs_module.Input.load
    monkeypatch.setattr(inputs_module.Input, "load", lambda self: (read.append(self.name), load(self))[1])
    assert annotate(faulty.FAULTY, data, tmp_path / "s").counts == {"skipped": 7, "unreadable": 1}
    assert read == ["damaged.png"]
    read.clear()
    picture(data / "0003.png", 77)  # replaced by another image
    os.utime(data / "0004.png", ns=(1, 1))
    (known,) = (tmp_path / "s").glob("*.known")
    assert b"png" not in known.read_bytes() and known.stat().st_size == 48 * 7
    with open(known, "ab") as file:
        file.write(b"torn")
    summary = annotate(faulty.FAULTY, data, tmp_path / "s", retry_failed=True)
    assert summary.counts == {"annotated": 1, "failed": 1, "skipped": 5, "unreadable": 1}
    assert sorted(read) == ["0003.png", "0004.png", "damaged.png", "declines_0.png"]
    read.clear()
    assert annotate(faulty.descriptor("Batched"), data, tmp_path / "other").counts["annotated"] == 6
    assert len(read) == 8  # another store has no cache


def test_equal_inputs_are_run_once(folder, tmp_path):
    data = folder(1)
    for n in range(5):
        picture(data / f"copy_{n}.png", 0)
    assert annotate(faulty.FAULTY, data, tmp_path / "s", engine=LOCAL).counts == {
        "annotated": 1,
        "skipped": 5,
    }
    assert log(tmp_path).count("built") == 1


def test_dry_run_changes_nothing(folder, tmp_path, capsys, monkeypatch):
    data = folder(4)
    summary = annotate(faulty.FAULTY, data, tmp_path / "s", dry_run=True, engine=ONE, audit=tmp_path / "a")
    assert summary.counts == {"planned": 4} and summary.planned[0].endswith(".png")
    assert not (tmp_path / "s").exists() and not (tmp_path / "a").exists() and not (tmp_path / "log").exists()
    annotate(faulty.FAULTY, data, tmp_path / "s", limit=1)
    monkeypatch.setattr("vilam3_experts.descriptors.BUILT_IN", (faulty.FAULTY,))
    assert (
        main(
            [
                "annotate",
                "--expert=FAULTY",
                f"--data={data}",
                f"--out={tmp_path}/s",
                "--dry-run",
                "--workers=0",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert out.count("would run: ") == 3 and "weights: none" in out and "1 skipped" in out
    (data / "broken.png").write_bytes(b"?")
    main(["annotate", "--expert=FAULTY", f"--data={data}", f"--out={tmp_path}/s", "--dry-run", "--workers=0"])
    assert "[broken.png]" in capsys.readouterr().err


def test_parts_are_disjoint_and_complete(folder, tmp_path):
    data = folder(20)
    names = [path.name for path in data.iterdir()]
    for count in (1, 3, 7):
        parts = [{name for name in names if in_shard(name, (i, count))} for i in range(1, count + 1)]
        assert sum(map(len, parts)) == len(names) and set().union(*parts) == set(names)
    done = [
        annotate(faulty.FAULTY, data, tmp_path / "s", shard=(i, 3)).counts["annotated"] for i in (1, 2, 3)
    ]
    assert sum(done) == 20 and min(done) > 0
    assert annotate(faulty.FAULTY, data, tmp_path / "s", shard=(2, 3), limit=2).counts == {"skipped": 2}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--shard=0/3"], "--shard 0/3"),
        (["--shard=4/3"], "--shard 4/3"),
        (["--shard=a"], "--shard a"),
        (["--workers=-1"], "--workers -1"),
        (["--engine=ray", "--workers=0"], "--workers 0"),
        (["--batch=0"], "--batch 0"),
        (["--timeout=0"], "--timeout 0"),
        (["--timeout=nan"], "--timeout nan"),
        (["--workers=0", "--timeout=9"], "give --workers 1 or more"),
        (["--address=auto"], "for --engine ray"),
        (["--object-store-gb=0"], "--object-store-gb 0"),
    ],
)
def test_bad_options(plugin, images, tmp_path, capsys, extra, message):
    code = main(["annotate", "--expert=FAKE", f"--data={images}", f"--out={tmp_path}/s", *extra])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_summary_stays_small():
    summary = RunSummary()
    for n in range(5000):
        reason = f"/data/{n}/{n}.png: PNG image of {n} bytes" if n % 2 else f"unlike {chr(0x4E00 + n)} others"
        summary.add(Outcome(n, f"{n}/{n}.png", "unreadable", reason, (f"note {n}",)))
    assert len(summary.reasons) == MAX_REASONS + 1 and summary.noted == 5000
    table = summary.table()
    assert table[0].split()[:2] == ["2500", "unreadable"] and "[1/1.png, 3/3.png, 5/5.png, ...]" in table[0]
    assert sum(int(line.split()[0]) for line in table) == 5000
    assert summary.exit_code == 2
    summary.add(Outcome(1, "x", "annotated"))
    assert summary.exit_code == 0
    summary.add(Outcome(1, "x", "unavailable", "gs://bucket/x: does not answer"))
    assert summary.exit_code == 1


def test_out_of_memory_is_recognised():
    torch = pytest.importorskip("torch")
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_logged_calls_can_be_made_again(plugin, images, tmp_path, capsys):
    """A run and the live host share one log."""
    common = ["annotate", "--expert=FAKE", f"--data={images}", f"--out={tmp_path}/s", "--workers=0"]
    assert main([*common, f"--audit={tmp_path}/audit"]) == 0
    request = {"id": 1, "expert": "FAKE", "args": "fine"}
    request["inputs"] = [{"role": "", "image_bytes": (images / "a dim.png").read_bytes()}]
    source, sink = io.BytesIO(), io.BytesIO()
    write_frame(source, request)
    source.seek(0)
    assert serve(None, source, sink, audit=tmp_path / "audit") == 0
    assert audit.verify(tmp_path / "audit").calls == 3
    capsys.readouterr()
    assert main(["audit", "replay", f"{tmp_path}/audit", f"--data={images}"]) == 0
    assert "2 answers are the same, 0 differ" in capsys.readouterr().out


def test_workers_share_the_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = worker_environments(3, ["0", "GPU-abc"])
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["0", "GPU-abc", "0"]
    assert len({one["OMP_NUM_THREADS"] for one in found}) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert worker_environments(1, []) == [{}]


def test_the_default_builds_nothing_in_this_process(folder, tmp_path, monkeypatch):
    """By default, the command runs the expert in a separate process."""
    monkeypatch.setattr("vilam3_experts.descriptors.BUILT_IN", (faulty.FAULTY,))
    monkeypatch.setattr(Worker, "run", lambda *_: pytest.fail("in this process"))
    data = folder(1)
    assert main(["annotate", "--expert=FAULTY", f"--data={data}", f"--out={tmp_path}/s"]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0, "timeout": 1.0}, "give --workers 1 or more"),
        ({"kind": "ray", "workers": None, "cpus_per_worker": -1.0}, "--cpus-per-worker -1"),
        ({"kind": "ray", "workers": None, "gpus_per_worker": float("nan")}, "--gpus-per-worker nan"),
    ],
)
def test_engines_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Engine(**settings).check()
