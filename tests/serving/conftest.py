"""Fixtures of the server's tests: a tiny model behind a real server on a free port."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time

import openai
import pytest

from tests.inference.tiny import (  # noqa: F401
    export,
    model_config,
    params,
    tokenizer,
    tokenizer_dir,
    world,
)
from vilam3_jax.inference.assistant import Assistant
from vilam3_jax.serving.app import make_server
from vilam3_jax.serving.service import Service, Settings

KEY = "a-key-of-the-tests"


@dataclasses.dataclass
class Running:
    """A server, its address and its parts."""

    url: str
    service: Service

    def client(self, key=KEY, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)


@contextlib.contextmanager
def serve(assistant, *, experts=True, audit=None, **settings):
    """A server in a thread."""
    service = Service(assistant, Settings(**{"drain": 2.0, **settings}), experts=experts, audit=audit)
    server = make_server(service)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def assistant(export, world):  # noqa: F811
    with Assistant(
        export, annotations=world.annotations, expert_host="off", max_length=1024, batch_size=4
    ) as assistant:
        yield assistant


@pytest.fixture(scope="module")
def server(assistant):
    with serve(assistant, model="tiny", max_new_tokens=16) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client
