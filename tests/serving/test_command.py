"""`vilam3 serve`: its flags, its errors, and its end by SIGTERM."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx2 as httpx
import pytest

from vilam3_jax.errors import UserError
from vilam3_jax.serving import main as command


@pytest.fixture
def start(export, tmp_path):
    """Starts servers as processes, and returns them with their addresses."""
    running = []

    def start(*flags):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)}
        process = subprocess.Popen(
            [sys.executable, "-m", "vilam3_jax.cli", "serve", f"--checkpoint={export}", "--port=0", *flags],
            stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        running.append(process)
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                return process, found[0], lines
        raise AssertionError("".join(lines))

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stderr.close()


def test_sigterm_drains_and_leaves_no_files(start, world, tmp_path):
    process, url, lines = start("--expert_host=off", "--slots=2", "--model_name=m", "--max_length=800")
    assert httpx.get(f"{url}/healthz", timeout=60).json() == {"status": "ok"}
    with world.film.open("rb") as file:
        stored = httpx.post(f"{url}/v1/files", files={"file": ("film.png", file)}).json()
    assert list(tmp_path.glob("vilam3-files-*/*/scan"))
    part = {"type": "image_url", "image_url": {"url": stored["id"]}}
    content = [{"type": "text", "text": "Is it?"}, part]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 300, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as stream:
        events = stream.iter_lines()
        next(events)
        process.send_signal(signal.SIGTERM)
        assert "data: [DONE]" in list(events)
    reader = threading.Thread(target=lambda: lines.extend(process.stderr))
    reader.start()
    assert process.wait(30) == 0
    reader.join()
    assert not list(tmp_path.glob("vilam3-files-*"))
    text = "".join(lines)
    assert (
        text.count("POST /v1/chat/completions 200") == 1 and "Is it?" not in text and "Traceback" not in text
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host=0.0.0.0"], "--api_key_file"),
        (["--host=example.org"], "--insecure"),
        (["--port=70000"], "from 0 to 65535"),
        (["--slots=0"], "above 0"),
        (["--deadline=nan"], "above 0"),
        (["--drain=inf"], "0 or more"),
        (["--cors_origin=example.org"], "https://"),
        (["--api_key_file=/nowhere"], "no such file"),
        (["--samples=/nowhere"], "no such folder"),
    ],
)
def test_flags_that_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        command.main(["--checkpoint=/nowhere", *flags])


def test_a_port_in_use_is_told_before_the_model_is_loaded():
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(UserError, match="choose another port"):
        command.main(["--checkpoint=/nowhere", f"--port={taken.getsockname()[1]}"])


def test_key_files(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# for the ward\n\nfirst-key-of-sixteen\n second-key-of-sixteen \n")
    assert command._keys(str(file)) == ("first-key-of-sixteen", "second-key-of-sixteen")
    for text, words in (("# nothing\n", "holds no keys"), ("short\n", "less than 16")):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            command._keys(str(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        command._keys(str(file))
