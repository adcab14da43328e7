"""A third-party expert, and tiny networks in the formats of the real ones."""

import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import vilam3_experts
from expert_helpers import write_png

import vilam3_jax

PLUGIN = """
import os, pathlib, time
from vilam3_experts.base import ExpertFailure, Output
from vilam3_experts.descriptors import Descriptor
from vilam3_jax.data.experts.cards import Card

ARGS = ("fine", "crash", "hang", "noise", "raise", "decline", "dim only")
FAKE = Descriptor(
    card=Card("FAKE", ARGS, "any", "classification", "tells how bright it is", "perfect"),
    version="1", input="image", kind="classification", factory="fake_plugin:Fake")

class Fake:
    def __init__(self, weights):
        pass

    def run(self, data, args):
        if args == "crash":
            os.write(2, b"out of memory, says the fake\\n")
            os._exit(3)
        if args == "hang" or (args == "dim only" and data.mean() > 128):
            pathlib.Path(os.environ["FAKE_MARK"]).touch()
            time.sleep(100)
        if args == "noise":
            print("stray text", flush=True)
            os.write(1, b"more stray text")
        if args == "raise":
            raise RuntimeError("bad\\nthing")
        if args == "decline":
            raise ExpertFailure("not my field")
        return Output(probabilities={"bright": float(data.mean()) / 255})
"""


@pytest.fixture(scope="session")
def plugin_path(tmp_path_factory):
    """Folder of an installed distribution that registers the expert FAKE."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "fake_plugin.py").write_text(PLUGIN)
    info = folder / "fake_experts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-experts\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vilam3.experts]\nFAKE = fake_plugin:FAKE\n")
    return folder


@pytest.fixture
def plugin(plugin_path, monkeypatch):
    """The same, visible in this process."""
    monkeypatch.syspath_prepend(str(plugin_path))
    yield
    sys.modules.pop("fake_plugin", None)


@pytest.fixture
def environment(plugin_path, tmp_path):
    """Environment of a child process that finds both packages and the plug-in."""
    roots = [pathlib.Path(m.__file__).parents[1] for m in (vilam3_jax, vilam3_experts)]
    path = os.pathsep.join(str(p) for p in (*roots, plugin_path))
    return {**os.environ, "PYTHONPATH": path, "FAKE_MARK": str(tmp_path / "mark")}


@pytest.fixture
def images(tmp_path):
    """Folder of three images, one of them damaged."""
    folder = tmp_path / "images"
    write_png(folder / "a dim.png", 51)
    write_png(folder / "deeper" / "c bright.png", 204)
    (folder / "b damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    return folder


class Threshold(torch.nn.Module):
    """Two channels, of which the second marks bright voxels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = (x > 0.6).to(x.dtype)
        return torch.cat([1 - bright, bright], dim=1)


@pytest.fixture(scope="session")
def torchscript_bytes():
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Threshold()), buffer)
    return buffer.getvalue()


def _field(number, value):
    """One field of a protocol buffer message."""

    def varint(n):
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def _tensor(name, array):
    kind = {np.dtype(np.float32): 1, np.dtype(np.int64): 7}[array.dtype]
    sizes = b"".join(_field(1, n) for n in array.shape)
    return sizes + _field(2, kind) + _field(8, name) + _field(9, array.tobytes())


def _value(name, shape):
    sizes = b"".join(_field(1, _field(1, n)) for n in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, sizes)))


def _node(operator, inputs, output):
    return b"".join(_field(1, i) for i in inputs) + _field(2, output) + _field(4, operator)


@pytest.fixture(scope="session")
def onnx_bytes():
    """Softmax of the mean colour times a matrix: red is class 0, green 1, blue 2, black 3.

    Encoded field by field, so that the tests need no onnx package.
    """
    matrix = np.array([[9, 0, 0, 1], [0, 9, 0, 1], [0, 0, 9, 1]], np.float32)
    graph = (
        _field(1, _node("ReduceMean", ["input", "axes"], "mean"))
        + _field(1, _node("Reshape", ["mean", "flat"], "rows"))
        + _field(1, _node("MatMul", ["rows", "matrix"], "scores"))
        + _field(1, _node("Add", ["scores", "offset"], "logits"))
        + _field(1, _node("Softmax", ["logits"], "classes"))
        + _field(2, "tiny")
        + _field(5, _tensor("axes", np.array([1, 2])))
        + _field(5, _tensor("flat", np.array([1, 3])))
        + _field(5, _tensor("matrix", matrix))
        + _field(5, _tensor("offset", np.array([[0, 0, 0, 3]], np.float32)))
        + _field(11, _value("input", (1, 240, 240, 3)))
        + _field(12, _value("classes", (1, 4)))
    )
    return _field(1, 8) + _field(8, _field(1, "") + _field(2, 18)) + _field(7, graph)


KERAS_CODE = """
import keras, numpy as np, sys
inputs = keras.Input((150, 150, 3))
outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(inputs))
model = keras.Model(inputs, outputs)
model.set_weights([np.array([[-1.0, 1.0]] * 3, np.float32), np.zeros(2, np.float32)])
model.save(sys.argv[1])
"""


@pytest.fixture(scope="session")
def keras_bytes(tmp_path_factory):
    """A network that classifies bright images as pneumonia."""
    path = tmp_path_factory.mktemp("keras") / "model.keras"
    env = {**os.environ, "KERAS_BACKEND": "torch"}
    subprocess.run([sys.executable, "-c", KERAS_CODE, path], check=True, env=env, capture_output=True)
    return path.read_bytes()
