"""Queue, deadline, clients that leave, keys, hosts, origins, sizes, metrics, and the logs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest

from tests.serving.conftest import KEY, serve
from vilam3_jax.inference.batching import Batcher
from vilam3_jax.serving import app
from vilam3_jax.serving.http import Observer

SECRET = "Mr Secret Patient"
BODY = {"messages": [{"role": "user", "content": SECRET}], "vilam3": {"experts": False}}
LONG = {**BODY, "max_tokens": 900}


@pytest.fixture(scope="module")
def small(assistant):
    """A server with a short queue and small limits."""
    limits = dict(queue=2, max_body=1 << 20, max_upload=2 << 20, hosts=("127.0.0.1", "localhost"))
    with serve(
        assistant, model="tiny", max_new_tokens=8, cors_origins=("https://page.test",), **limits
    ) as running:
        yield running


@pytest.fixture
def slow(monkeypatch):
    """A model that decodes slowly: 900 tokens take 5 seconds, or 45 if they are streamed."""
    plain = Batcher.step

    def step(self):
        time.sleep(0.2)
        return plain(self)

    monkeypatch.setattr(Batcher, "step", step)


def post(running, body, **options):
    return httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60, **options)


def eventually(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def code_of(response):
    return response.status_code, response.json()["error"]["code"]


def test_several_clients_at_once(server):
    def one(number):
        with server.client() as client:
            content = f"Question {number}?"
            messages = [{"role": "user", "content": content}]
            options = dict(model="tiny", messages=messages, extra_body={"vilam3": {"experts": False}})
            whole = client.chat.completions.create(**options).choices[0].message.content
            chunks = client.chat.completions.create(**options, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
            return whole

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(8)))
    assert len(set(found)) == 8 and one(3) == found[3]


def test_a_client_that_leaves_frees_its_slot(small, slow, caplog):
    with httpx.stream(
        "POST", f"{small.url}/v1/chat/completions", json={**LONG, "stream": True}, timeout=60
    ) as stream:
        next(stream.iter_lines())
    eventually(lambda: small.service.load == 0, seconds=60)  # what has to be compiled is
    for body in (LONG, {**LONG, "stream": True}):
        with httpx.Client(timeout=60) as client:
            if body.get("stream"):
                with client.stream("POST", f"{small.url}/v1/chat/completions", json=body) as stream:
                    next(stream.iter_lines())
                    assert small.service.engine.load == 1
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{small.url}/v1/chat/completions", json=body, timeout=0.5)
        eventually(lambda: small.service.load == 0, seconds=3)
    assert post(small, BODY).status_code == 200
    text = httpx.get(f"{small.url}/metrics").text
    assert 'route="/v1/chat/completions",status="499"' in text and 'status="500"' not in text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_full_queue(small, slow):
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(post, small, {**BODY, "max_tokens": 100}) for _ in range(2)]
        eventually(lambda: small.service.load == 2)
        refused = post(small, BODY)
        assert code_of(refused) == (429, "busy") and int(refused.headers["Retry-After"]) > 0
        assert [one.result().status_code for one in running] == [200, 200]


def test_a_deadline(assistant, slow):
    with serve(assistant, model="tiny", deadline=0.5) as running:
        assert code_of(post(running, LONG)) == (504, "deadline_exceeded")
        with running.client() as client, pytest.raises(openai.APIError, match="deadline"):
            options = dict(
                messages=LONG["messages"], max_tokens=900, extra_body={"vilam3": {"experts": False}}
            )
            list(client.chat.completions.create(model="tiny", stream=True, **options))
        assert running.service.load == 0


def test_keys(assistant, world):
    other = "another-key-of-the-tests"
    with serve(assistant, model="tiny", keys=(KEY, other)) as running:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {KEY}"},
            {"X-Api-Key": "é"},
        ):
            refused = post(running, BODY, headers={k: v.encode() for k, v in headers.items()})
            assert code_of(refused) == (401, "invalid_api_key")
        assert httpx.get(f"{running.url}/healthz").json() == {"status": "ok"}
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        with running.client() as client, running.client(other) as stranger:
            assert client.models.list()
            stored = client.files.create(file=world.film, purpose="vision")
            with pytest.raises(openai.NotFoundError):
                stranger.files.retrieve(stored.id)
            assert client.files.retrieve(stored.id).id == stored.id


def test_a_page_needs_no_key(assistant, tmp_path, monkeypatch):
    (tmp_path / "index.html").write_text("<title>vilam3</title>")
    (tmp_path / "page.js").write_text("ask()")
    monkeypatch.setattr(app, "PAGE", tmp_path)
    with serve(assistant, model="tiny", keys=(KEY,)) as running:
        page = httpx.get(f"{running.url}/", follow_redirects=True)
        assert "vilam3" in page.text and "script-src 'self'" in page.headers["content-security-policy"]
        assert httpx.get(f"{running.url}/page/page.js").text == "ask()"
        assert httpx.get(f"{running.url}/page/../v1/models").status_code == 401
        assert httpx.get(f"{running.url}/page/%2e%2e/conftest.py").status_code == 404
        assert httpx.get(f"{running.url}/v1/models").status_code == 401


def test_a_server_without_experts(assistant):
    with serve(assistant, model="tiny", experts=False, max_new_tokens=4) as running:
        assert httpx.get(f"{running.url}/v1/models").json()["data"][0]["vilam3"]["experts"] == []
        assert post(running, {"messages": BODY["messages"]}).status_code == 200
        refused = post(running, {**BODY, "vilam3": {"experts": True}})
        assert refused.status_code == 400 and "--annotations" in refused.json()["error"]["message"]


def test_hosts_and_origins(small):
    models = f"{small.url}/v1/models"
    assert code_of(httpx.get(models, headers={"Host": "evil.test"})) == (403, "unknown_host")
    assert code_of(httpx.get(models, headers={"Host": "[::1"})) == (403, "unknown_host")
    assert code_of(httpx.get(models, headers={"Origin": "https://evil.test"})) == (403, "origin")
    assert httpx.get(models, headers={"Origin": small.url}).status_code == 200
    allowed = httpx.get(models, headers={"Origin": "https://page.test"})
    assert allowed.headers["access-control-allow-origin"] == "https://page.test"
    headers = {"Origin": "https://page.test", "Access-Control-Request-Method": "POST"}
    assert httpx.options(models, headers=headers).status_code == 200
    assert allowed.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in allowed.headers["content-security-policy"]


def test_bodies_over_the_limit(small):
    too_long = {"messages": [{"role": "user", "content": "x" * (1 << 20)}]}
    assert code_of(post(small, too_long)) == (413, "too_large")

    def chunks():
        for _ in range(40):
            yield b" " * (1 << 16)

    headers = {"Content-Type": "application/json"}
    try:
        refused = httpx.post(f"{small.url}/v1/chat/completions", content=chunks(), headers=headers)
    except httpx.WriteError:  # the server closed the connection before all was sent
        pass
    else:
        assert code_of(refused) == (413, "too_large")
    upload = httpx.post(f"{small.url}/v1/files", files={"file": ("a.png", b"x" * ((2 << 20) + 1))})
    assert code_of(upload) == (413, "too_large")
    assert len(small.service.store) == 0


def test_nothing_of_a_request_is_logged_or_counted(small, caplog):
    with caplog.at_level(logging.INFO):
        assert post(small, BODY).status_code == 200
        assert post(small, {**BODY, SECRET: 1}).status_code == 400
        httpx.post(f"{small.url}/v1/chat/completions/", params={"Prompt": SECRET})
        httpx.get(f"{small.url}/{SECRET}")
    assert "POST /v1/chat/completions 200" in caplog.text
    logged = "".join(record.getMessage() for record in caplog.records if record.name != httpx.__name__)
    assert "Secret" not in logged
    text = httpx.get(f"{small.url}/metrics").text
    assert 'vilam3_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert 'vilam3_tokens_total{kind="completion"}' in text and "vilam3_queue 0.0" in text
    assert "Secret" not in text


def test_a_failure_inside_is_a_clear_500(small, monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError(SECRET)

    monkeypatch.setattr("vilam3_jax.serving.inputs.read", fails)
    failed = post(small, BODY)
    assert code_of(failed) == (500, "internal_error") and "Secret" not in failed.text
    assert failed.headers["x-request-id"] in caplog.text and "RuntimeError" in caplog.text
    assert "Secret" not in caplog.text


def test_a_client_that_stops_reading_is_left(small, monkeypatch):
    monkeypatch.setattr("vilam3_jax.serving.http._SEND_SECONDS", 0.2)
    ended = []

    async def never(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def stream(scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data", "more_body": True})
        finally:
            ended.append(scope["path"])

    async def run():
        scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
        await Observer(stream, small.service.metrics)(scope, never, never)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert ended == ["/x"]


def test_bodies_and_uploads_that_are_being_received_are_limited(assistant):
    limits = dict(queue=2, max_upload=2 << 20, upload_space=2 << 20)
    with (
        serve(assistant, model="tiny", max_new_tokens=2, **limits) as running,
        contextlib.ExitStack() as stack,
    ):
        address = running.url.removeprefix("http://").split(":")

        def begin(path, kind, data):
            connection = stack.enter_context(socket.create_connection((address[0], int(address[1]))))
            head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: 999\r\n\r\n"
            connection.sendall(head.encode() + data)
            return connection

        halves = [begin("/v1/chat/completions", "application/json", b"{") for _ in range(2)]
        eventually(lambda: running.service.bodies._free == 0)
        assert code_of(post(running, BODY)) == (429, "busy")
        halves.append(begin("/v1/files", "multipart/form-data; boundary=b", b"--b\r\n"))
        eventually(lambda: running.service.uploads._free == 0)
        large = {"file": ("a", bytes(2 << 20))}  # more than the buffers of a connection
        assert code_of(httpx.post(f"{running.url}/v1/files", files=large, timeout=60)) == (429, "busy")
        for connection in halves:
            connection.close()
        eventually(lambda: running.service.bodies._free == 2 and running.service.uploads._free == 1)
        assert post(running, BODY).status_code == 200


def test_half_a_request_hurts_nobody(small):
    host, port = small.url.removeprefix("http://").split(":")
    for data in (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{",
                 b"\x16\x03\x01\x00garbage\r\n\r\n"):  # fmt: skip
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(data)
    assert post(small, BODY).status_code == 200
