"""Tests run on the CPU, with 8 virtual devices standing in for a mesh."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Programs of several virtual devices that overlap can wait for each other for ever when cores are few.
jax.config.update("jax_cpu_enable_async_dispatch", False)
