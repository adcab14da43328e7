"""The audit log: every change to a finished chain is detected, and distinguished from a crash."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vilam3_experts import audit, cli
from vilam3_experts.audit import AuditLog, verify
from vilam3_experts.audit import chain as chain_lib
from vilam3_experts.audit import log as log_lib
from vilam3_experts.commands import audit as commands_audit

from vilam3_jax.data.experts.record import Annotation, failed
from vilam3_jax.data.experts.store import content_sha256
from vilam3_jax.errors import UserError
from vilam3_jax.runtime.paths import as_path

WEIGHTS = "f" * 64


def make(number, **fields):
    key = f"{number:064x}"
    return Annotation(
        key, "CXR", version="1", weights_sha256=WEIGHTS, probabilities={"effusion": number / 1000}, **fields
    )


def write(folder, numbers):
    with AuditLog(folder) as log:
        for number in numbers:
            log.append(make(number, seconds=0.25))
        return log.chain


def file_of(folder, chain):
    (path,) = folder.glob(f"{chain}-*.jsonl")
    return path


def texts(report):
    return [problem.text for problem in report.problems]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A log of one chain, with 5 calls between its opening and closing lines."""
    folder = tmp_path_factory.mktemp("audit") / "log"
    write(folder, range(5))
    return folder


def test_a_line_holds_the_call_and_no_identifier(tmp_path):
    with AuditLog(tmp_path / "patient 4711") as log:
        log.append(make(3, seconds=1.25))
        log.append(failed(f"{4:064x}", "CXR", "", "/data/patient_4711/film.png: too dark", version="1"))
    report = verify(tmp_path / "patient 4711")
    assert report.ok and (report.chains, report.calls) == (1, 2) and not report.notes
    done, not_done = audit.calls(tmp_path / "patient 4711")
    assert (done.input, done.expert, done.version, done.weights) == (f"{3:064x}", "CXR", "1", WEIGHTS)
    assert (done.status, done.seconds, not_done.status) == ("ok", 1.25, "failed")
    assert done.output == content_sha256(make(3)) != content_sha256(make(4))
    text = file_of(tmp_path / "patient 4711", log.chain).read_text()
    assert "4711" not in text and "film" not in text and "/" not in text


@pytest.mark.parametrize(
    "annotation",
    [
        Annotation("scan_of_j_doe", "CXR"),
        Annotation("a" * 64, "CXR", weights_sha256="/models/cxr"),
        Annotation("a" * 64, "CXR", args="/data/j_doe.nii"),
        Annotation("a" * 64, "CXR", args="x" * 5000),
    ],
)
def test_what_may_name_somebody_is_not_logged(tmp_path, annotation):
    with AuditLog(tmp_path) as log, pytest.raises(ValueError, match="logged"):
        log.append(annotation)
    assert verify(tmp_path).ok and verify(tmp_path).calls == 0


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_found(finished, tmp_path, data):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(finished, folder)
    (path,) = folder.glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    what = data.draw(st.sampled_from(["byte", "remove", "swap", "repeat", "insert", "cut", "forge"]))
    number = data.draw(st.integers(0, len(lines) - 1))
    if what == "byte":
        at = data.draw(st.integers(0, len(lines[number]) - 1))
        new = data.draw(st.integers(0, 255).filter(lambda value: value != lines[number][at]))
        lines[number] = lines[number][:at] + bytes([new]) + lines[number][at + 1 :]
    elif what == "remove":
        del lines[number : number + data.draw(st.integers(1, 3))]
    elif what == "swap":
        other = data.draw(st.integers(0, len(lines) - 1).filter(lambda value: value != number))
        lines[number], lines[other] = lines[other], lines[number]
    elif what == "repeat":
        lines.insert(number, lines[data.draw(st.integers(0, len(lines) - 1))])
    elif what == "insert":
        lines.insert(number, data.draw(st.sampled_from([b"\n", b"{}\n", b"[1]\n", b'"call"\n', b"null\n"])))
    elif what == "cut":
        whole = b"".join(lines)
        lines = [whole[: data.draw(st.integers(0, len(whole) - 1))]]
    else:  # another answer with a matching hash
        fields = json.loads(lines[number])
        fields["seconds"] = 9.0
        del fields["hash"]
        digest = hashlib.sha256(chain_lib.canonical(fields)).hexdigest()
        lines[number] = chain_lib.canonical({**fields, "hash": digest}) + b"\n"
    path.write_bytes(b"".join(lines))
    assert not verify(folder).ok


def test_problems_are_named(finished, tmp_path):
    def changed(change):
        shutil.rmtree(tmp_path / "log", ignore_errors=True)
        shutil.copytree(finished, tmp_path / "log")
        (path,) = (tmp_path / "log").glob("*.jsonl")
        lines = path.read_bytes().splitlines(keepends=True)
        change(lines)
        path.write_bytes(b"".join(lines))
        return [(p.line, p.text) for p in verify(tmp_path / "log").problems]

    assert changed(lambda lines: None) == []
    assert changed(lambda lines: lines.__delitem__(slice(2, 4))) == [(3, "lines before it were removed: 2")]
    assert changed(lambda lines: lines.__setitem__(2, lines[2].replace(b"CXR", b"CTX"))) == [
        (3, "was changed")
    ]
    assert changed(lambda lines: lines.__setitem__(2, lines[2].replace(b",", b", "))) == [(3, "was changed")]
    assert changed(lambda lines: lines.pop()) == [(0, "ends too early: 1 of 7 lines are missing")]
    found = changed(lambda lines: lines.insert(2, lines.pop(4)))
    assert (4, "was moved here, or inserted") in found


@pytest.mark.parametrize("fields", [{"event": "closed", "others": [1]}, {"event": "call", "input": "x"}])
def test_a_line_of_another_form_is_a_problem(tmp_path, fields):
    with audit.AuditLog(tmp_path) as log:
        log.append(make(0))
    (path,) = tmp_path.glob("*.jsonl")
    last = chain_lib.parse_line(path.read_bytes().splitlines(keepends=True)[-1])
    fields = {**fields, "sequence": last["sequence"] + 1, "previous": last["hash"]}
    digest = hashlib.sha256(chain_lib.canonical(fields)).hexdigest()
    path.write_bytes(path.read_bytes() + chain_lib.canonical({**fields, "hash": digest}) + b"\n")
    assert [note.text for note in audit.verify(tmp_path).notes] == [
        "is unfinished; the next writer repairs it"
    ]
    assert len(list(audit.calls(tmp_path))) == 1


def test_removed_chains_and_entries_are_found(tmp_path):
    first = AuditLog(tmp_path)
    second = write(tmp_path, range(3))
    first.close()  # sees the second
    assert verify(tmp_path).ok and verify(tmp_path).chains == 2
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "manifest", copy)
    entry = tmp_path / "manifest" / f"{second}.json"
    path, kept = file_of(tmp_path, second), entry.read_bytes()
    lines = path.read_bytes()

    entry.unlink()
    assert texts(verify(tmp_path)) == ["its entry in the manifest was removed, or it was inserted"]
    path.unlink()
    assert texts(verify(tmp_path)) == ["was removed"]  # the other chain has seen it
    entry.write_bytes(kept)
    assert texts(verify(tmp_path)) == ["was removed"]
    entry.write_bytes(b"{}")
    assert "damaged entry" in texts(verify(tmp_path))[0]

    # A copy of the manifest detects that a chain and its entry were both rewritten.
    path.write_bytes(lines)
    entry.write_bytes(kept)
    assert verify(tmp_path, audit.heads(copy)).ok
    path.unlink()
    entry.unlink()
    forged = write(tmp_path / "elsewhere", range(3))
    for old, new in ((file_of(tmp_path / "elsewhere", forged), path),):
        new.write_bytes(old.read_bytes())
    entry.write_bytes((tmp_path / "elsewhere" / "manifest" / f"{forged}.json").read_bytes())
    assert not verify(tmp_path, audit.heads(copy)).ok
    assert cli.main(["audit", "verify", str(tmp_path), "--manifest", str(copy)]) == 1


def test_a_chain_goes_on_and_one_in_use_is_left_alone(tmp_path):
    chain = write(tmp_path, [1])
    assert write(tmp_path, [2]) == chain
    with AuditLog(tmp_path) as log:
        assert log.chain == chain and write(tmp_path, [3]) != chain
    report = verify(tmp_path)
    assert report.ok and (report.chains, report.calls) == (2, 3)
    log.close()
    with pytest.raises(ValueError, match="closed"):
        log.append(make(1))


@pytest.mark.parametrize("torn", [b"{", b'{"args":"","event":"call","expe', b"\xff\x00"])
def test_an_unfinished_line_is_repaired_and_stays(tmp_path, torn):
    chain = write(tmp_path, [1, 2])
    path = file_of(tmp_path, chain)
    with path.open("ab") as file:
        file.write(torn)
    report = verify(tmp_path)
    assert report.ok and "unfinished" in report.notes[0].text
    assert write(tmp_path, [3]) == chain
    report = verify(tmp_path)
    assert report.ok and report.calls == 3 and "repaired" in report.notes[0].text
    assert torn in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(torn + b"\n", torn + b"x\n"))
    assert texts(verify(tmp_path)) == ["was changed"]


def test_a_damaged_chain_is_not_gone_on_with(tmp_path):
    chain = write(tmp_path, [1, 2])
    path = file_of(tmp_path, chain)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-9] + b"\n", whole[: whole[:-1].rindex(b"\n") + 1]):
        path.write_bytes(damaged)
        assert write(tmp_path, [3]) != chain
        assert not verify(tmp_path).ok and path.read_bytes() == damaged


def test_killed_writers_lose_nothing_that_was_appended(tmp_path):
    code = f"""
import os, signal
from vilam3_experts.audit import AuditLog
from vilam3_jax.data.experts.record import Annotation
log = AuditLog({str(tmp_path)!r})
for i in range(50):
    log.append(Annotation(f"{{i:064x}}", "CXR"))
print(log.chain, flush=True)
input()  # until both have opened the log
os.kill(os.getpid(), signal.SIGKILL)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    chains = {run.stdout.readline().strip() for run in runs if run.stdout is not None}
    for run in runs:
        run.communicate("go\n")
    assert [run.returncode for run in runs] == [-9, -9] and len(chains) == 2
    assert write(tmp_path, [1]) in chains
    report = verify(tmp_path)
    assert report.ok and (report.chains, report.calls) == (2, 101)


def test_threads_share_a_log(tmp_path):
    with AuditLog(tmp_path) as log:
        work = [threading.Thread(target=lambda: [log.append(make(i)) for i in range(40)]) for _ in range(4)]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
    assert verify(tmp_path).ok and verify(tmp_path).calls == 160


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    write_whole = os.write
    with AuditLog(tmp_path) as log:
        log.append(make(1))
        monkeypatch.setattr(os, "write", lambda file, data: write_whole(file, data[:20]))
        with pytest.raises(UserError, match="cannot be written"):
            log.append(make(2))
        monkeypatch.undo()
        log.append(make(3))
    report = verify(tmp_path)
    assert report.ok and report.calls == 2 and not report.notes


def test_a_log_in_a_bucket(bucket, monkeypatch):
    monkeypatch.setattr(log_lib, "_REMOTE_SECONDS", 0.0)
    folder = as_path("gs://bucket/store/audit")
    chains = {write(folder, range(3)) for _ in range(2)}
    assert set(audit.heads(folder / "manifest")) == chains
    files = sorted((bucket / "store/audit").glob("*.jsonl"))
    report = verify(folder)
    assert report.ok and (report.chains, report.calls, len(files)) == (2, 6, 10)
    files[1].unlink()  # the first call
    assert texts(verify(folder)) == ["lines before it were removed: 1"]


@pytest.mark.slow
def test_a_log_behind_the_protocol_of_cloud_storage():
    from tests.training.bucket_server import serve

    with serve("bucket"):
        folder = "gs://bucket/audit"
        for _ in range(2):
            write(folder, range(3))
        report = verify(folder)
        assert report.ok and (report.chains, report.calls) == (2, 6)
        gone = chain_lib.chain_files(as_path(folder)).popitem()[1][0][1]
        gone.unlink()
        assert not verify(folder).ok


def test_replay_tells_same_other_and_missing_answers(tmp_path):
    write(tmp_path, [1, 2, 3, 1])

    def answer(call):
        number = int(call.input, 16)
        answers = {1: make(1, seconds=7.0), 2: dataclasses.replace(make(2), probabilities={"effusion": 0.9})}
        return answers.get(number)

    found = audit.replay(tmp_path, answer)
    assert (found.same, len(found.different), len(found.missing)) == (1, 1, 1) and not found.ok
    assert found.different[0][0].input == f"{2:064x}" and found.missing[0].input == f"{3:064x}"


def test_commands_verify_and_replay(plugin, images, tmp_path, capsys, monkeypatch):
    from vilam3_experts import descriptors
    from vilam3_experts.annotate import annotate

    store, log = tmp_path / "store", tmp_path / "log"
    made = []
    annotate(descriptors.get("FAKE"), images, store, args="fine", show=lambda _, a: made.append(a))
    with AuditLog(log) as audit_log:
        for annotation in made:
            audit_log.append(annotation)
    assert cli.main(["audit", "verify", str(log)]) == 0
    assert f"{len(made)} calls in 1 chains: intact" in capsys.readouterr().out
    assert cli.main(["audit", "replay", str(log), "--data", str(images)]) == 0
    assert f"{len(made)} answers are the same" in capsys.readouterr().out
    key = made[0].input_key
    monkeypatch.setattr(commands_audit, "inputs_key", lambda keys: "0" if keys[0][1] == key else keys[0][1])
    assert cli.main(["audit", "replay", str(log), "--data", str(images)]) == 1
    assert "1 cannot be computed" in capsys.readouterr().out
    assert cli.main(["audit", "verify", str(tmp_path / "nothing")]) == 2
    assert cli.main(["store", "info", str(store)]) == 0
    assert f"{len(made):9d}  ok      FAKE(fine)  version 1" in capsys.readouterr().out
