"""The dispatcher: listed commands exist; errors have one line and an exit code."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
import warnings

import pytest

from vilam3_jax import cli
from vilam3_jax.errors import InputWarning, UnavailableError, UserError


@pytest.fixture
def command(monkeypatch):
    """Replaces `vilam3 train` by a function."""

    def install(function):
        module = types.ModuleType("fake_command")
        module.main = function
        monkeypatch.setitem(sys.modules, "fake_command", module)
        monkeypatch.setitem(cli.COMMANDS, "train", ("fake_command", "a test"))

    return install


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_listed_command_exists(name):
    assert callable(importlib.import_module(cli.COMMANDS[name][0]).main)


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, description) in cli.COMMANDS.items():
        assert f"  {name}" in text and description in text


def test_no_command_is_an_error_with_the_help(capsys):
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "commands:" in captured.err


def test_arguments_and_exit_code_pass_through(command):
    seen = []
    command(lambda argv: seen.extend(argv) or 7)
    assert cli.main(["train", "--config=x", "--help"]) == 7
    assert seen == ["--config=x", "--help"]


def test_unknown_command_is_one_line(capsys):
    assert cli.main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "'trian'" in error and "did you mean train?" in error and "convert" in error


@pytest.mark.parametrize("error, code", [(UserError, 2), (UnavailableError, 1)])
def test_user_error_is_one_line_with_its_exit_code(command, capsys, error, code):
    def fail(argv):
        raise error("x.json: broken")

    command(fail)
    assert cli.main(["train"]) == code
    assert capsys.readouterr().err == "vilam3 train: error: x.json: broken\n"


def test_interrupt_has_the_shells_exit_code(command):
    def fail(argv):
        raise KeyboardInterrupt

    command(fail)
    assert cli.main(["train"]) == 130


def test_other_errors_are_not_hidden(command):
    def fail(argv):
        raise ZeroDivisionError

    command(fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_help_is_fast_because_jax_is_not_imported():
    code = "import sys; from vilam3_jax import cli; cli.main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_notes_on_inputs_are_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert cli.guarded("vilam3 test", lambda argv: 0, []) == 0
    shown = warnings.formatwarning(InputWarning("scan.nii: millimetres are assumed"), InputWarning, "a.py", 1)
    assert shown == "note: scan.nii: millimetres are assumed\n"
    assert "a.py:1: UserWarning: other" in warnings.formatwarning(
        UserWarning("other"), UserWarning, "a.py", 1
    )


def test_a_closed_pipe_ends_a_command_quietly():
    command = f"{sys.executable} -m vilam3_jax.cli train --config=configs/stage1_vision.py:tiny --print"
    done = subprocess.run(f"{command} | head -1", shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == "name = 'stage1_vision'\n" and "Error" not in done.stderr
