"""Blocks the network in dataset tests: credentialed data must never leave the user's machine."""

import importlib.util
import os
import socket
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent / "blocked_network"


def _blocked_network():
    spec = importlib.util.spec_from_file_location("blocked_network", _FOLDER / "sitecustomize.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_BLOCKED = _blocked_network()


@pytest.fixture(autouse=True)
def blocked_network(monkeypatch):
    """Blocks this process and those that the test starts; yields the hosts that were reached for."""
    for name, call in _BLOCKED.METHODS.items():
        monkeypatch.setattr(socket.socket, name, call, raising=False)
    for name, call in _BLOCKED.LOOKUPS.items():
        monkeypatch.setattr(socket, name, call)
    monkeypatch.setenv("PYTHONPATH", str(_FOLDER), prepend=os.pathsep)
    _BLOCKED.attempts.clear()
    yield _BLOCKED.attempts
    assert not _BLOCKED.attempts, "a test of datasets reached for the network"
