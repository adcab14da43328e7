"""`vilam3 COMMAND ...`: finds the command's module and runs its `main`; nothing else is imported."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence

import vilam3_jax
from vilam3_jax.errors import UserError, use_one_line_notes
from vilam3_jax.runtime import logs

# Command → (module with `main(argv) -> int`, what it does for the user).
COMMANDS = {
    "prepare": ("vilam3_jax.datasets.prepare", "turn a dataset you downloaded into training records"),
    "data": ("vilam3_jax.data.main", "scan folders, look at training records, strip identifiers"),
    "train": ("vilam3_jax.train", "run or resume a training stage"),
    "export": ("vilam3_jax.training.export_checkpoint", "make an export of any checkpoint of a run"),
    "plan": ("vilam3_jax.plan.main", "compile training or generation for TPUs: memory, speed, cost"),
    "convert": ("vilam3_jax.convert.main", "read Hugging Face and GGUF checkpoints"),
    "evaluate": ("vilam3_jax.evals.main", "measure a model on a protocol, and compare results"),
    "chat": ("vilam3_jax.inference.chat", "ask a model about an image"),
    "serve": ("vilam3_jax.serving.main", "serve a model over HTTP, as OpenAI's interfaces do"),
    "mcp": ("vilam3_jax.serving.mcp_main", "serve a model to agents as tools (MCP)"),
    "report": ("vilam3_jax.report.main", "put a run's plots and tables into one HTML file"),
}
BROKEN_PIPE = 141  # 128 + SIGPIPE
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str]) -> int:
    """Runs one command.

    Args:
      argv: command and its arguments, without the program's name.

    Returns:
      Exit code: the command's own; 2 for a `UserError` or an unknown command; 130 for an interrupt.
    """
    if not argv:
        print(_help(), file=sys.stderr)
        return 2
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"vilam3 {vilam3_jax.__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        print(f"vilam3: unknown command {name!r}; {hint}commands are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return guarded(f"vilam3 {name}", lambda rest: importlib.import_module(COMMANDS[name][0]).main(rest), rest)


def guarded(program: str, command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Runs `command(argv)`; the user's errors become one line on stderr and their code, an interrupt 130."""
    use_one_line_notes()
    logs.configure()
    try:
        return command(argv)
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the output is piped into `head` or a closed pager
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED


def run() -> None:
    """Entry point of the `vilam3` program."""
    sys.exit(main(sys.argv[1:]))


def _help() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: vilam3 COMMAND [ARGUMENTS]

A medical vision-language model that asks domain experts for help.

commands:
{commands}

`vilam3 COMMAND --help` explains one command."""


if __name__ == "__main__":
    run()
