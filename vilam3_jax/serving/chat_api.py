"""OpenAI's chat completions: https://platform.openai.com/docs/api-reference/chat."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from vilam3_jax.serving import inputs
from vilam3_jax.serving.answers import Answer, Step
from vilam3_jax.serving.errors import ApiError, error_body
from vilam3_jax.serving.fields import Fields
from vilam3_jax.serving.inputs import Ask, ImagePart, Said
from vilam3_jax.serving.service import Service

_ROLES = ("system", "developer", "user", "assistant")
_OTHER_ROLES = ("tool", "function")


def check(body: Fields, service: Service) -> Ask:
    """Reads a request; raises `ApiError` naming the field and the fix."""
    service.check_model(body.text("model", service.settings.model))
    extra = body.object("vilam3") or Fields({}, "vilam3")
    previous = extra.text("previous", "", limit=inputs.MAX_ID)
    options = inputs.options_of(extra, experts=service.experts)
    messages = [_said(one, options) for one in body.objects("messages", limit=inputs.MAX_MESSAGES)]
    ask = Ask(
        said=inputs.dialogue_of(messages, service.max_length, previous=previous),
        options=options,
        max_new_tokens=inputs.limit_of(
            body,
            ("max_completion_tokens", "max_tokens"),
            service.settings.max_new_tokens,
            service.max_length,
        ),
        sampling=inputs.sampling_of(body),
        stops=inputs.stops_of(body),
        form=inputs.form_of(body, "response_format", nested=True),
        log_probs=body.flag("logprobs", False),
        previous=previous,
        store=body.flag("store", False),
    )
    body.ignore("stream", "stream_options")  # read by `wants_stream`
    body.only("top_logprobs", (0,), "only the log-probabilities of the chosen tokens are known")
    body.only("n", (1,), "one answer per request")
    for name in ("frequency_penalty", "presence_penalty"):
        body.only(name, (0,), "not supported")
    for name in ("tools", "functions", "logit_bias", "audio", "web_search_options", "prediction"):
        body.only(name, (), "not supported")
    for name in ("tool_choice", "function_call"):
        body.only(name, ("none", "auto"), "not supported")
    body.ignore(*inputs.LABELS, "modalities", "reasoning_effort", "verbosity")
    body.finish()
    return ask


def wants_stream(body: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether the last chunk has the usage."""
    stream, options = body.flag("stream", False), body.object("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise body.error("stream_options", "only with stream: true")
    usage = options.flag("include_usage", False)
    options.ignore("include_obfuscation")
    options.finish()
    return stream, usage


def _said(message: Fields, options: inputs.Options) -> Said:
    role = message.text("role")
    if role in _OTHER_ROLES:
        raise message.error("role", "tools are not supported; experts are called by the server")
    if role not in _ROLES:
        raise message.error("role", "must be system, user or assistant")
    role = "system" if role == "developer" else role
    message.ignore("name")
    if role == "assistant":  # what an answer of this server holds besides its text
        message.ignore(
            "experts", "tool_calls", "function_call", "refusal", "audio", "annotations", "reasoning_content"
        )
    content = message.take("content")
    if content is None and role == "assistant":
        content = ""
    if isinstance(content, str):
        message.finish()
        return Said(role, content)
    texts: list[str] = []
    images: list[ImagePart] = []
    for part in message.objects("content", limit=inputs.MAX_PARTS):
        kind = part.text("type")
        if kind == "text":
            texts.append(part.text("text"))
        elif kind in ("image_url", "file") and role == "user":
            images.append(_image(part, kind, options))
        else:
            allowed = "text, image_url or file" if role == "user" else "text"
            raise part.error("type", f"must be {allowed}")
        part.finish()
    message.finish()
    return Said(role, "\n".join(texts), tuple(images))


def _image(part: Fields, kind: str, options: inputs.Options) -> ImagePart:
    inner = part.object(kind)
    if inner is None:
        raise part.error(kind, "is missing")
    key = "url" if kind == "image_url" else "file_id" if inner.has("file_id") else "file_data"
    found = inputs.image_part(part, inner.text(key), inner.name(key), options.view)
    inner.ignore("detail", "filename")
    inner.finish()
    return found


class ChatWriter:
    """Writes the answer to one request."""

    def __init__(self, model: str, *, usage: bool = False):
        """`usage`: whether the last chunk of a stream has it."""
        self._usage = usage
        self.id = f"chatcmpl-{secrets.token_hex(16)}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.experts:
            message["experts"] = list(answer.experts)
        choice = {
            "index": 0,
            "message": message,
            "logprobs": _log_probs(answer),
            "finish_reason": _finish(answer),
        }
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(answer),
            "vilam3": answer.extra,
        }

    def first(self) -> list[dict[str, Any]]:
        """The chunk that begins a stream."""
        return [self._chunk({"role": "assistant", "content": ""})]

    def step(self, step: Step) -> list[dict[str, Any]]:
        """The chunk of a step."""
        if step.kind == "text":
            return [self._chunk({"content": step.text})]
        return [self._chunk({"draft": step.text} if step.kind == "draft" else {"experts": [step.record]})]

    def last(self, answer: Answer) -> list[dict[str, Any]]:
        """The chunks that end a stream."""
        end = self._chunk({}, finish=_finish(answer), log_probs=_log_probs(answer))
        chunks = [{**end, "vilam3": answer.extra}]
        if self._usage:
            chunks.append({**self._chunk({}), "choices": [], "usage": _usage(answer)})
        return chunks

    def error(self, error: ApiError) -> dict[str, Any]:
        """The event of an error."""
        return error_body(error)

    def _chunk(
        self, delta: dict[str, Any], finish: str | None = None, log_probs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": log_probs, "finish_reason": finish}
        usage = {"usage": None} if self._usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage}


def _finish(answer: Answer) -> str:
    return "stop" if answer.complete else "length"


def _log_probs(answer: Answer) -> dict[str, Any] | None:
    if answer.tokens is None:
        return None
    return {"content": token_entries(answer.tokens), "refusal": None}


def token_entries(tokens: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities in OpenAI's form."""
    return [
        {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []}
        for text, value in tokens
    ]


def _usage(answer: Answer) -> dict[str, Any]:
    prompt, completion = answer.usage.prompt, answer.usage.completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
