"""`vilam3 serve`: a model behind an OpenAI-compatible HTTP interface."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from vilam3_jax.data.text_rules import TEXT_HELP
from vilam3_jax.errors import UserError
from vilam3_jax.inference.assistant import NOT_CLINICAL, Assistant, host_command, load
from vilam3_jax.inference.model_flags import CHECKPOINT_HELP, add_model_flags, model_options
from vilam3_jax.runtime import paths, process_flags, processes
from vilam3_jax.serving.samples import samples_of

if TYPE_CHECKING:
    from vilam3_jax.serving.audit import AuditLog

_LOG = logging.getLogger(__name__)
_LOCAL = ("127.0.0.1", "localhost", "::1")
_MAX_KEY_FILE = 1 << 20
_SHORTEST_KEY = 16
_LARGEST = 10_000_000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vilam3 serve",
        description="Serve a trained model over HTTP, as OpenAI's chat completions and responses. "
        + NOT_CLINICAL,
    )
    add_engine_flags(parser)
    add_audit_flags(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to bind to (default: 127.0.0.1, this machine alone)")
    add("--port", type=int, default=8000, help="port; 0 is any free one (default: 8000)")
    add("--api_key_file", help="file with one API key a line, of 16 or more characters")
    add("--insecure", action="store_true", help="bind to other addresses without API keys")
    add(
        "--cors_origin",
        action="append",
        default=[],
        help="web origin that may use the server; may be repeated",
    )
    add("--samples", help="folder of images that the page offers")
    add(
        "--no_warm_up",
        action="store_true",
        help="listen at once; the first question of each length then waits for the compiler",
    )
    add("--drain", type=float, default=60, help="seconds for answers in progress after SIGTERM (default: 60)")
    add("--max_upload", type=int, default=512, help="MiB of an uploaded file (default: 512)")
    add("--upload_space", type=int, default=8192, help="MiB of all uploaded files (default: 8192)")
    add("--max_body", type=int, default=64, help="MiB of a JSON body, data URLs included (default: 64)")
    add(
        "--file_minutes",
        type=float,
        default=60,
        help="uploaded files are deleted after this time (default: 60)",
    )
    return parser


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the model, its experts and its engine, which `vilam3 mcp` has, too."""
    add = parser.add_argument
    add("--checkpoint", required=True, help=CHECKPOINT_HELP)
    add("--model_name", help="name of the model in requests (default: the folder's)")
    add("--annotations", help="annotation store, which is preferred to the expert host")
    add("--expert_host", default="auto", help="auto (the installed vilam3-experts), off, or a command")
    add("--expert_weights", help="folder of the experts' weights, for the host")
    add("--text", default="", help=TEXT_HELP)
    add("--slots", type=int, default=8, help="dialogues that are decoded together (default: 8)")
    add("--queue", type=int, default=64, help="requests that may wait or run; more get a 429 (default: 64)")
    add("--deadline", type=float, default=300, help="seconds for an answer, then a 504 (default: 300)")
    add("--max_length", type=int, default=2048, help="maximum positions of a dialogue, images included")
    add(
        "--max_new_tokens", type=int, default=512, help="limit of a turn if a request has none (default: 512)"
    )
    add_model_flags(parser)


def add_audit_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the audit log."""
    add = parser.add_argument
    add("--audit_log", help="file to which a JSON line is appended per question, answer and failure")
    add(
        "--audit_content",
        action="store_true",
        help="write texts to the audit log, too; they may identify patients",
    )


def check_limits(options: argparse.Namespace, *more: str) -> None:
    """Raises `UserError` for limits out of range, contradictory audit flags, and several processes."""
    if processes.several(**process_flags.argument_values(options)):
        raise UserError(
            "a server is one process: start it on one host, and share the model over its devices by --mesh; "
            "for a larger model, `vilam3 convert export` writes folders for servers that span hosts"
        )
    for name in ("slots", "queue", "deadline", "max_length", "max_new_tokens", *more):
        if not 0 < getattr(options, name) < _LARGEST:
            raise UserError(f"--{name}={getattr(options, name)}: must be above 0 and below {_LARGEST}")
    if options.audit_content and not options.audit_log:
        raise UserError("--audit_content: needs --audit_log=FILE")


def model_name(options: argparse.Namespace) -> str:
    """The name of the model in requests."""
    return options.model_name or os.path.basename(os.path.abspath(options.checkpoint))


def opened_audit_log(options: argparse.Namespace) -> AuditLog | None:
    """The audit log of the flags; raises `UserError` if it cannot be written."""
    from vilam3_jax.serving.audit import AuditLog  # needs the extra `serve`

    return AuditLog(options.audit_log, content=options.audit_content) if options.audit_log else None


def load_model(options: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Assistant, bool]:
    """The model, closed by `stack`, and whether it has experts."""
    assistant = stack.enter_context(
        load(
            options.checkpoint,
            annotations=options.annotations,
            expert_host=options.expert_host,
            expert_weights=options.expert_weights,
            max_length=options.max_length,
            batch_size=options.slots,
            text=options.text,
            **model_options(options),
        )
    )
    wanted = bool(options.annotations) or options.expert_host not in ("auto", "off")
    found = bool(assistant.cards and host_command(options.expert_host, required=False))
    return assistant, wanted or found


def _keys(path: str | None) -> tuple[str, ...]:
    """The API keys of a file; lines that begin with # are comments."""
    if path is None:
        return ()
    if not paths.exists(path):
        raise UserError(f"--api_key_file={path}: no such file")
    try:
        lines = paths.read_bytes(path, _MAX_KEY_FILE).decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--api_key_file={path}: is no text in UTF-8") from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise UserError(f"--api_key_file={path}: holds no keys; write one on a line")
    if min(map(len, keys)) < _SHORTEST_KEY:
        raise UserError(
            f"--api_key_file={path}: a key has less than {_SHORTEST_KEY} characters; make it longer"
        )
    return tuple(keys)


def _is_local(host: str) -> bool:
    try:
        return host in _LOCAL or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check(options: argparse.Namespace) -> None:
    check_limits(options, "max_upload", "upload_space", "max_body", "file_minutes")
    if not 0 <= options.drain < _LARGEST:
        raise UserError(f"--drain={options.drain}: must be 0 or more and below {_LARGEST}")
    if not 0 <= options.port < 1 << 16:
        raise UserError(f"--port={options.port}: must be from 0 to 65535")
    for origin in options.cors_origin:
        if "://" not in origin or origin.endswith("/"):
            raise UserError(f"--cors_origin={origin}: must be like https://example.org, without a path")
    if not _is_local(options.host) and not options.api_key_file and not options.insecure:
        raise UserError(
            f"--host={options.host}: others could reach the server; give --api_key_file, or --insecure if "
            "the network is trusted"
        )


def main(argv: Sequence[str]) -> int:
    """Entry of `vilam3 serve`."""
    options = _parser().parse_args(argv)
    _check(options)
    keys = _keys(options.api_key_file)
    samples = samples_of(options.samples) if options.samples else ()
    try:
        from vilam3_jax.serving.app import make_server
        from vilam3_jax.serving.service import Service, Settings
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed; install vilam3-jax[serve]") from error
    name = model_name(options)
    settings = Settings(
        model=name,
        queue=options.queue,
        deadline=options.deadline,
        max_new_tokens=options.max_new_tokens,
        max_body=options.max_body << 20,
        max_upload=options.max_upload << 20,
        upload_space=options.upload_space << 20,
        file_seconds=options.file_minutes * 60,
        drain=options.drain,
        cors_origins=tuple(options.cors_origin),
        keys=keys,
        # Without keys, a web page must not reach the server under a name of its own.
        samples=samples,
        hosts=() if keys or not _is_local(options.host) else (*_LOCAL, options.host),
    )
    audit = opened_audit_log(options)
    with _bound(options.host, options.port) as listener, contextlib.ExitStack() as stack:
        assistant, has_experts = load_model(options, stack)
        service = stack.enter_context(Service(assistant, settings, experts=has_experts, audit=audit))
        # Orbax, by way of absl, gives the root logger a handler, which would print every line again.
        logging.getLogger("vilam3_jax").propagate = False
        signal.signal(signal.SIGTERM, _end)  # so that the service is closed
        if not options.no_warm_up:
            started = time.monotonic()
            service.warm_up(lambda line: _LOG.info("warm-up: %s", line))
            _LOG.info("warm-up: done after %.0f s", time.monotonic() - started)
        experts = "with experts" if service.experts else "without experts"
        server = make_server(service)
        # uvicorn drains at these signals, and raises them again at its end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: setattr(server, "should_exit", True))
        listener.listen()
        _LOG.info("%s is served at %s, %s. %s", name, _url(listener), experts, NOT_CLINICAL)
        server.run(sockets=[listener])
    return 0


def _end(*_: object) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)


def _bound(host: str, port: int) -> socket.socket:
    """A socket on the address; raises `UserError` before the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: cannot bind ({error.strerror or error}); choose another port"
        ) from error
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
