"""The audit log of the server."""

from __future__ import annotations

import errno
import json
import os
import threading
import time

import httpx2 as httpx
import openai
import pytest

from tests.serving.conftest import KEY, serve
from tests.serving.test_chat import ask, calls_an_expert, data_url, with_image  # noqa: F401
from vilam3_jax.data.experts.store import AnnotationStore, content_sha256
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.serving import audit as audit_lib
from vilam3_jax.serving import main as command
from vilam3_jax.serving.audit import AuditLog

SECRET = "Mrs. Secret, born in May"


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(path, event):
    """The lines, once there is one of the event; those of failures are written soon."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = lines_of(path)
        if any(line["event"] == event for line in found):
            return found
        time.sleep(0.02)
    raise AssertionError(f"no line {event}")


@pytest.fixture(scope="module")
def audited(assistant, tmp_path_factory):
    """Servers that share a model: one logs no texts, one does."""
    folder = tmp_path_factory.mktemp("audit")
    logs = {content: AuditLog(folder / f"{content}.jsonl", content=content) for content in (False, True)}
    options = dict(model="tiny", max_new_tokens=16, keys=(KEY,))
    with (
        serve(assistant, audit=logs[False], **options) as plain,
        serve(assistant, audit=logs[True], **options) as full,
    ):
        yield {False: (plain, folder / "False.jsonl"), True: (full, folder / "True.jsonl")}


@pytest.fixture(params=[False, True], ids=["plain", "content"])
def running(request, audited):
    """(server, empty log, whether it logs texts)."""
    server, path = audited[request.param]
    path.write_text("")
    return server, path, request.param


def test_an_answer_is_recorded(running, world, calls_an_expert):  # noqa: F811
    server, path, content = running
    with server.client() as client:
        response = client.chat.completions.with_raw_response.create(
            model="tiny",
            messages=[{"role": "user", "content": with_image(data_url(world.film), SECRET)}],
        )
    answer = response.parse().choices[0].message.content
    asked, answered = lines_of(path)
    assert (asked["event"], answered["event"]) == ("asked", "answered")
    assert asked["request"] == answered["request"] == response.headers["x-request-id"]
    assert len(asked["key"]) == 16 and asked["key"] == answered["key"] and KEY not in path.read_text()
    assert asked["characters"] == len(SECRET) and asked["images"] == 1 and asked["experts"] is True
    found = answered["transcript"]
    assert [turn["role"] for turn in found["turns"]] == ["user", "assistant", "expert", "assistant"]
    assert found["turns"][0]["images"] == [
        {"height": 32, "width": 32, "sha256": found["turns"][0]["images"][0]["sha256"]}
    ]
    assert found["turns"][3]["tokens"] == 16 and found["turns"][3]["log_prob"] < 0
    assert 0 < found["turns"][1]["seconds"] <= found["seconds"] <= answered["seconds"]
    (call,) = found["calls"]
    assert (call["expert"], call["args"], call["status"], call["turn"]) == ("PNEUMONIA", "", "ok", 2)
    assert call["probabilities"] == {"pneumonia": 0.2, "normal": 0.8} and not call["known"]
    stored = AnnotationStore(world.annotations).get(call["input_key"], "PNEUMONIA")
    assert call["record_sha256"] == content_sha256(stored)
    assert (SECRET in path.read_text()) == content
    assert found.get("answer") == (answer if content else None)


def test_failures_are_recorded(running):
    server, path, content = running
    with server.client() as client:
        with pytest.raises(openai.BadRequestError):
            ask(client, SECRET, max_tokens=1, temperature=9)
        with pytest.raises(openai.BadRequestError):
            ask(client, f"{SECRET} " * 2000)
    refused = wait_for(path, "failed")
    until = time.monotonic() + 30
    while len(refused) < 2 and time.monotonic() < until:
        refused = lines_of(path)
    assert {line["code"] for line in refused if line["event"] == "failed"} >= {"invalid_value"}
    assert all(("message" in line) == content for line in refused if line["event"] == "failed")


def test_a_client_that_leaves_is_recorded(running):
    server, path, _ = running
    body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 900, "stream": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    url = f"{server.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as stream:
        next(stream.iter_lines())
    events = [line["event"] for line in wait_for(path, "cancelled")]
    assert events == ["asked", "cancelled"]


def test_a_bad_disk_refuses_answers(running, monkeypatch):
    """Nothing is answered that is not recorded; the server goes on when the disk is back."""
    server, path, _ = running

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with server.client() as client:
        with monkeypatch.context() as broken:
            broken.setattr(audit_lib.os, "write", full)
            with pytest.raises(openai.InternalServerError, match="audit log cannot be written") as caught:
                ask(client, "Why?")
            assert caught.value.status_code == 503 and caught.value.code == "unavailable"
            assert path.read_text() == ""
        assert ask(client, "Why?").choices[0].message.content
    # The failure is recorded if the disk comes back in time.
    assert [line["event"] for line in lines_of(path) if line["event"] != "failed"] == ["asked", "answered"]


def test_an_answer_that_cannot_be_recorded_is_withheld(running, monkeypatch):
    server, path, _ = running
    plain, count = os.write, 0

    def once(file, data):
        nonlocal count
        if not data.startswith(b"{"):
            return plain(file, data)
        count += 1
        if count > 1:
            raise OSError(errno.EIO, "Input/output error")
        return plain(file, data)

    monkeypatch.setattr(audit_lib.os, "write", once)
    with server.client() as client, pytest.raises(openai.InternalServerError, match="audit log"):
        ask(client, "Why?")
    assert [line["event"] for line in lines_of(path)] == ["asked"], "nothing else could be written"


def test_lines_of_threads_are_whole_and_a_torn_one_is_closed(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_text('{"event": "as')
    log = AuditLog(path)
    work = [threading.Thread(target=log.append, args=(f"e{n}", "r"), kwargs={"n": n}) for n in range(20)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    torn, *whole = path.read_text().splitlines()
    assert torn == '{"event": "as' and sorted(json.loads(line)["n"] for line in whole) == list(range(20))
    path.rename(tmp_path / "old")
    log.append("later", "r")
    assert [line["event"] for line in lines_of(path)] == ["later"], "the file may be rotated"
    assert AuditLog(tmp_path / "new").content is False and (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_every_line_is_synced(tmp_path, monkeypatch):
    log, synced = AuditLog(tmp_path / "a"), []
    monkeypatch.setattr(audit_lib.os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    log.append("one", "r")
    log.append("two", "r")
    sizes = [len(line) for line in (tmp_path / "a").read_bytes().splitlines(keepends=True)]
    assert synced == [sizes[0], sum(sizes)]


def test_logs_that_cannot_be_written_are_refused(tmp_path):
    for path, words in (
        ("gs://bucket/log", "local file"),
        (tmp_path, "cannot be written"),
        ("/dev/null", "no file"),
    ):
        with pytest.raises(UserError, match=words):
            AuditLog(path)
    log = AuditLog(tmp_path / "folder.jsonl")
    (tmp_path / "folder.jsonl").unlink()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(UnavailableError, match="nothing is answered"):
        log.append("e", "r")
    with pytest.raises(UserError, match="needs --audit_log"):
        command.main(["--checkpoint=/nowhere", "--audit_content"])
