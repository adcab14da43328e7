"""`vilam3 mcp`: a model as tools for agents, by the Model Context Protocol over standard input and output."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
from collections.abc import Sequence

from vilam3_jax.errors import UserError
from vilam3_jax.inference.assistant import NOT_CLINICAL
from vilam3_jax.serving.main import (
    add_audit_flags,
    add_engine_flags,
    check_limits,
    load_model,
    model_name,
    opened_audit_log,
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilam3 mcp",
        description="Serve a trained model to agents, as tools of the Model Context Protocol over stdin and "
        "stdout: ask, annotate, list_experts. " + NOT_CLINICAL,
    )
    parser.add_argument("--files", help="folder below which tools may read images (default: none)")
    add_engine_flags(parser)
    add_audit_flags(parser)
    parser.add_argument(
        "--max_file", type=int, default=512, help="MiB of an image or a folder (default: 512)"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Entry of `vilam3 mcp`."""
    options = _parser().parse_args(argv)
    check_limits(options, "max_file")
    try:
        from vilam3_jax.serving.service import Service, Settings
        from vilam3_jax.serving.tools import Files, Tools
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; install vilam3-jax[mcp]") from error
    files = Files(options.files, max_bytes=options.max_file << 20)
    settings = Settings(
        model=model_name(options),
        queue=options.queue,
        deadline=options.deadline,
        max_new_tokens=options.max_new_tokens,
        max_upload=options.max_file << 20,
        drain=0.0,  # nobody is left to read answers
    )
    # A client that is in a hurry ends the process; its files must go all the same.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.getLogger("mcp").setLevel(logging.WARNING)  # its messages hold names of files
    audit = opened_audit_log(options)
    with contextlib.ExitStack() as stack:
        assistant, experts = load_model(options, stack)
        service = stack.enter_context(Service(assistant, settings, experts=experts, audit=audit))
        Tools(service, files).server().run("stdio")
    return 0
