"""Tests run on the CPU, with 8 virtual devices standing in for a mesh."""

import atexit
import os
import shutil
import signal
import tempfile

# A shell starts its background jobs deaf to SIGINT, and programs started by tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most of the tests' time is LLVM optimising programs that run once.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
# Workers, and the programs that tests start, share what they compile; whoever made the folder removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vilam3-compiled-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import hypothesis
import pytest
from etils.epath import testing

from tests.experts.torchvision_operators import declare_operators
from vilam3_jax.runtime import compat

compat.use_cpu_devices(8)

# Busy machines are slow, so no example has a time limit.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")

_OPERATORS = declare_operators()  # the declarations end with the object


@pytest.fixture
def bucket(tmp_path):
    """`gs://bucket` lies below a local folder; files there are not appended to."""

    def local(path):
        return str(path).replace("gs://", f"{tmp_path}/")

    def opened(function, path, mode):
        assert mode in ("r", "rb", "w", "wb"), "gcsfs would begin a new file"
        return function(local(path), mode)

    def one(function, path, *args, **kwargs):
        return function(local(path), *args, **kwargs)

    def two(function, path, target, *args, **kwargs):
        return function(local(path), local(target), *args, **kwargs)

    names = ("exists", "glob", "isdir", "listdir", "makedirs", "mkdir", "remove", "stat")
    both = ("copy", "rename", "replace")
    with testing.mock_epath(**dict.fromkeys(names, one), **dict.fromkeys(both, two), open=opened):
        yield tmp_path / "bucket"
