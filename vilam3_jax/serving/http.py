"""Middleware: request ids, logs and metrics; hosts, origins, API keys and limits; reading of bodies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vilam3_jax.serving.engine import BusyError
from vilam3_jax.serving.errors import ApiError, as_api_error, error_response
from vilam3_jax.serving.fields import Fields, parse_json
from vilam3_jax.serving.metrics import Metrics
from vilam3_jax.serving.service import Places, Settings

_LOG = logging.getLogger(__name__)
_BODY_SECONDS = 60.0
_UPLOAD_SECONDS = 900.0
_DISCARD_BYTES, _DISCARD_SECONDS = 16 << 20, 10.0  # of the body of a request that is refused
_SEND_SECONDS = 60.0  # in which a client must read on
_UPLOAD_SLACK = 1 << 20  # bytes of a form around its file
CLIENT_LEFT = 499  # the status of nginx for it; nobody receives it
PAGE_PATH = "/page/"
_OPEN_PATHS = ("/", "/healthz")  # without an API key, as the page, which asks for one
_SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_API_POLICY = "default-src 'none'; frame-ancestors 'none'"
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)

T = TypeVar("T")


class ClientLeft(Exception):
    """The client closed the connection before the answer began."""


class Observer:
    """The outermost application: request ids, security headers, one line per request, and no traceback."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        """`app` answers the requests."""
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        request_id = scope["vilam3.request_id"] = secrets.token_hex(8)

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                is_page = headers.get("content-type", "").startswith("text/html")
                headers.setdefault("Content-Security-Policy", _PAGE_POLICY if is_page else _API_POLICY)
            try:
                async with asyncio.timeout(_SEND_SECONDS):
                    await send(message)
            except TimeoutError:
                raise ClientDisconnect from None

        try:
            await self._app(scope, receive, observed)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except Exception as error:
            log_failure(error, scope)
            if not status:
                await error_response(as_api_error(error))(scope, receive, observed)
        finally:
            route = scope.get("vilam3.route", "other")
            seconds = time.monotonic() - started
            self._metrics.request(route, status or CLIENT_LEFT, seconds)
            # Paths and queries may hold what a user wrote.
            _LOG.info("%s %s %s %d %.3fs", request_id, scope["method"], route, status or CLIENT_LEFT, seconds)


def log_failure(error: BaseException, scope: Scope) -> None:
    """Logs once where an internal error arose, without its message, which may quote a request."""
    if scope.get("vilam3.failed") is not error:
        scope["vilam3.failed"] = error
        trace = "".join(traceback.format_tb(error.__traceback__))
        _LOG.error("%s: %s\n%s", scope["vilam3.request_id"], type(error).__name__, trace)


class Guard:
    """Refuses foreign hosts and origins, requests without a key, and bodies over the limit."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, *, uploads: Sequence[str]):
        """`uploads` are the paths that receive files."""
        self._app, self._settings, self._metrics, self._uploads = app, settings, metrics, tuple(uploads)
        self._keys = [_digest(key) for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_origin(headers)
            scope["vilam3.owner"] = self._owner(headers, scope["path"])
            limited = self._limited(headers, scope, receive)
        except ApiError as error:
            self._metrics.error(error.code)
            await error_response(error, {"Connection": "close"})(scope, receive, send)
            return
        await self._app(scope, limited, send)

    def _check_origin(self, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._settings.hosts and _host_name(host) not in self._settings.hosts:
            # A web page of another name that resolves to this address.
            raise ApiError(
                403, "unknown Host header; use the address that the server binds to", "unknown_host"
            )
        origin = headers.get("origin")
        if origin is None or origin in self._settings.cors_origins:
            return
        if origin.lower().partition("://")[2] != host.lower():
            raise ApiError(
                403, "requests from other web origins are off; start the server with --cors_origin", "origin"
            )

    def _owner(self, headers: Headers, path: str) -> str:
        """Who asks: '' without keys, else a hash of the key."""
        if not self._keys or path in _OPEN_PATHS or path.startswith(PAGE_PATH):
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", ""))
        matches = [hmac.compare_digest(given, known) for known in self._keys]  # all of them, in constant time
        if not any(matches):
            raise ApiError(401, "no valid API key; send Authorization: Bearer KEY", "invalid_api_key")
        return given.hex()

    def _limited(self, headers: Headers, scope: Scope, receive: Receive) -> Receive:
        """`receive` that stops at the limit of the path."""
        is_upload = scope["path"] in self._uploads and not _is_json(headers)
        limit = self._settings.max_upload + _UPLOAD_SLACK if is_upload else self._settings.max_body
        too_large = ApiError(413, f"the body is larger than {limit >> 20} MiB; send less", "too_large")
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise too_large
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise too_large
            return message

        return limited


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host_name(host: str) -> str | None:
    """A Host header without its port; None if it is malformed."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _is_json(headers: Headers) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"


async def read_json(request: Request) -> Fields:
    """The body of a request; raises `ApiError` if it is no JSON object or comes too slowly."""
    if not _is_json(request.headers):
        raise ApiError(415, "send JSON with Content-Type: application/json", "content_type")
    body = await in_time(request.body(), _BODY_SECONDS)
    return await asyncio.to_thread(parse_json, body)


async def in_time(reading: Awaitable[T], seconds: float = _UPLOAD_SECONDS) -> T:
    """Waits for a body; raises `ApiError` (408) if it takes too long, and `ClientLeft`."""
    try:
        async with asyncio.timeout(seconds):
            return await reading
    except TimeoutError:
        raise ApiError(408, "the body came too slowly; send it again", "timeout") from None
    except ClientDisconnect:
        raise ClientLeft from None


@contextlib.asynccontextmanager
async def place(places: Places, request: Request) -> AsyncIterator[None]:
    """Takes a place for a body; raises `BusyError` without one.

    A small body is read before: a client that still sends would see a closed connection, not the refusal.
    """
    try:
        taken = places.take()
    except BusyError:
        with contextlib.suppress(TimeoutError, ClientDisconnect):
            async with asyncio.timeout(_DISCARD_SECONDS):
                read = 0
                async for chunk in request.stream():
                    if (read := read + len(chunk)) > _DISCARD_BYTES:
                        break
        raise
    with taken:
        yield


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work`; cancels it and raises `ClientLeft` if the client leaves. The body must be read before."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
