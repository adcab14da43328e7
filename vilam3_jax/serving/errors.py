"""Errors as HTTP clients see them: a status and one sentence as JSON, in the shape of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.inference.agent import ModelError
from vilam3_jax.serving.engine import BusyError, DeadlineError, EngineError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
RETRY_SECONDS = 5


class ApiError(UserError):
    """A refusal with its HTTP status."""

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry: int | None = None
    ):
        """`code` is for programs, `param` the field at fault, `retry` the seconds until another attempt."""
        super().__init__(message)
        self.status, self.code, self.param, self.retry = status, code, param, retry


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A 400."""
    return ApiError(400, message, code, param=param)


def as_api_error(error: BaseException) -> ApiError:
    """What a client learns of an error; internal ones show neither message nor traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, BusyError):
        return ApiError(429, str(error), "busy", retry=RETRY_SECONDS)
    if isinstance(error, DeadlineError):
        return ApiError(504, str(error), "deadline_exceeded")
    if isinstance(error, UnavailableError):
        return ApiError(503, str(error), "unavailable", retry=RETRY_SECONDS)
    if isinstance(error, (EngineError, ModelError)):
        return ApiError(500, str(error), "model_error")
    if isinstance(error, UserError):
        message = str(error)
        code = "context_length_exceeded" if "more than max_length" in message else "invalid_value"
        return bad_request(message, code=code)
    return ApiError(500, "internal error; the server's log has the request id", "internal_error")


def error_body(error: ApiError) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    inner = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    return {"error": inner}


def error_response(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """The response of an error."""
    retry = {} if error.retry is None else {"Retry-After": str(error.retry)}
    return JSONResponse(error_body(error), error.status, {**retry, **(headers or {})})
