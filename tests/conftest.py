"""Tests run on the CPU, with 8 virtual devices standing in for a mesh."""

import os
import signal

# A shell starts its background jobs deaf to SIGINT, and programs started by tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most of the tests' time is LLVM optimising programs that run once.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

from vilam3_jax import compat

compat.use_cpu_devices(8)
