"""A fake run, shared by the tests that do not modify it."""

import shutil

import fake_run
import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return fake_run.make_run(tmp_path_factory.mktemp("runs") / "quickstart")


@pytest.fixture
def run(made, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "run")
