"""The live host: its output, crashes and hangs must not affect the model's process."""

import io
import os
import pathlib
import signal
import struct
import sys
import threading
import time

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vilam3_experts.host import serve

from vilam3_jax.data.content_keys import image_key
from vilam3_jax.data.experts import host_client as expert_host
from vilam3_jax.data.experts.host_client import ExpertHost, FrameError, read_frame, write_frame
from vilam3_jax.data.images import encode_png
from vilam3_jax.data.volumes import VolumeSource

IMAGE = np.full((4, 5, 3), 51, np.uint8)
PNG, KEY = encode_png(IMAGE), image_key(IMAGE)
COMMAND = (sys.executable, "-m", "vilam3_experts", "host")


@pytest.fixture
def host(environment):
    with ExpertHost(COMMAND, timeout=60, environment=environment) as running:
        yield running


def ask(host, args, key=KEY):
    return host.ask("FAKE", args, input_key=key, inputs=[("", PNG)])


def test_answers_cross_the_pipe_whatever_is_printed(host):
    for args in ("fine", "noise", "fine"):
        record = ask(host, args)
        assert record.status == "ok" and record.key == (KEY, "FAKE", args)
        assert record.probabilities == {"bright": pytest.approx(0.2)}


def test_crash_is_a_failed_annotation_and_the_next_request_works(host):
    record = ask(host, "crash")
    assert record.status == "failed"
    assert "exit code 3" in record.reason and "out of memory, says the fake" in record.reason
    assert ask(host, "fine").status == "ok"


def test_idle_host_that_is_killed_comes_back(host):
    assert ask(host, "fine").status == "ok"
    os.kill(host._process.pid, signal.SIGKILL)
    host._process.wait()
    assert ask(host, "fine").status == "ok"


def test_host_killed_in_the_middle_of_an_answer(host, environment):
    results = []
    thread = threading.Thread(target=lambda: results.append(ask(host, "hang")))
    thread.start()
    mark = pathlib.Path(environment["FAKE_MARK"])
    deadline = time.monotonic() + 60
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(host._process.pid, signal.SIGKILL)
    thread.join(timeout=30)
    assert results[0].status == "failed" and "exit code -9" in results[0].reason


def test_timeout_is_a_failed_annotation(host):
    assert ask(host, "fine").status == "ok"
    host._timeout = 0.3
    start = time.monotonic()
    record = ask(host, "hang")
    assert record.reason == "expert host: no answer within 0.3 s"
    assert time.monotonic() - start < 20


def test_what_the_host_refuses_is_told(host, tmp_path):
    assert "no expert 'NOSUCH'" in host.ask("NOSUCH", input_key=KEY, inputs=[("", PNG)]).reason
    assert "no argument" in ask(host, "bogus").reason
    assert "another input" in ask(host, "fine", key="0" * 64).reason
    missing = host.ask("BRAINSEG", input_key=KEY, inputs=[("", VolumeSource(str(tmp_path / "none.nii")))])
    assert missing.status == "failed" and "none.nii" in missing.reason
    assert host.ask("FAKE", "fine", input_key=KEY, inputs=[("", b"no image")]).status == "failed"
    assert host.ask("PNEUMONIA", input_key=KEY, inputs=[("", PNG)]).reason.startswith("PNEUMONIA needs files")
    assert ask(host, "fine").status == "ok"  # all by one process
    assert "without inputs" in host.ask("FAKE", "fine", input_key=KEY, inputs=[]).reason


def test_missing_program_is_told(tmp_path):
    with ExpertHost((str(tmp_path / "nothing"),)) as host:
        assert "does not start" in ask(host, "fine").reason


def test_nonsense_on_the_pipe_is_told():
    code = "import sys, time; sys.stdout.write('Welcome to the expert!'); sys.stdout.flush(); time.sleep(30)"
    with ExpertHost((sys.executable, "-c", code), timeout=30) as host:
        assert "expert host: frame of" in ask(host, "fine").reason


@given(
    st.dictionaries(st.text(), st.none() | st.integers(0, 2**40) | st.binary() | st.text()),
    st.integers(0, 50),
)
def test_frames_survive_and_cuts_are_noticed(message, cut):
    buffer = io.BytesIO()
    write_frame(buffer, message)
    data = buffer.getvalue()
    assert read_frame(io.BytesIO(data)) == message
    assert read_frame(io.BytesIO()) is None
    if 0 < cut < len(data):
        with pytest.raises(FrameError, match="cut short"):
            read_frame(io.BytesIO(data[:-cut]))


@pytest.mark.parametrize("body", [b"\xc1", msgpack.packb([1]), msgpack.packb({1: 2}), b""])
def test_other_payloads_are_refused(body):
    with pytest.raises(FrameError):
        read_frame(io.BytesIO(struct.pack(">I", len(body)) + body))


def test_size_limit_holds_both_ways(monkeypatch):
    monkeypatch.setattr(expert_host, "MAX_FRAME_BYTES", 100)
    with pytest.raises(FrameError, match="limit"):
        write_frame(io.BytesIO(), {"x": b"\0" * 101})
    source = io.BytesIO(struct.pack(">I", 1 << 31) + b"rest")
    with pytest.raises(FrameError, match="limit"):
        read_frame(source)
    assert source.tell() == 4  # the body was not read


def test_host_ends_after_a_broken_frame():
    sink = io.BytesIO()
    assert serve(None, io.BytesIO(b"\xff\xff\xff\xff"), sink) == 1
    assert "limit" in read_frame(io.BytesIO(sink.getvalue()))["error"]
    assert serve(None, io.BytesIO(), io.BytesIO()) == 0
