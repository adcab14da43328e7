"""OpenAI's responses: https://platform.openai.com/docs/api-reference/responses."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from vilam3_jax.serving import inputs
from vilam3_jax.serving.answers import Answer, Step
from vilam3_jax.serving.chat_api import token_entries
from vilam3_jax.serving.errors import ApiError
from vilam3_jax.serving.fields import Fields
from vilam3_jax.serving.inputs import Ask, ImagePart, Said
from vilam3_jax.serving.service import Service

_LOG_PROBS = "message.output_text.logprobs"
_SERVER = "experts"  # label of the expert calls


def check(body: Fields, service: Service) -> Ask:
    """Reads a request; raises `ApiError` naming the field and the fix."""
    service.check_model(body.text("model", service.settings.model))
    extra = body.object("vilam3") or Fields({}, "vilam3")
    options = inputs.options_of(extra, experts=service.experts)
    previous = body.text("previous_response_id", "", limit=inputs.MAX_ID)
    instructions = body.text("instructions", "")
    said = [Said("system", instructions)] if instructions else []
    given = body.take("input")
    if isinstance(given, str):
        said.append(Said("user", given))
    else:
        items = body.objects("input", limit=inputs.MAX_MESSAGES)
        said += [one for item in items if (one := _said(item, options)) is not None]
    text = body.object("text")
    form = None
    if text is not None:
        form = inputs.form_of(text, "format", nested=False)
        text.ignore("verbosity")
        text.finish()
    include = body.take("include")
    if include not in (None, [], [_LOG_PROBS]):
        raise body.error("include", f"only {_LOG_PROBS} is supported")
    ask = Ask(
        said=inputs.dialogue_of(said, service.max_length, previous=previous),
        options=options,
        max_new_tokens=inputs.limit_of(
            body, ("max_output_tokens",), service.settings.max_new_tokens, service.max_length
        ),
        sampling=inputs.sampling_of(body),
        form=form,
        log_probs=bool(include),
        previous=previous,
        store=body.flag("store", False),
    )
    body.only("top_logprobs", (0,), "only the log-probabilities of the chosen tokens are known")
    body.only("background", (False,), "not supported")
    for name in ("tools", "conversation", "prompt", "context_management"):
        body.only(name, (), "not supported")
    body.only("tool_choice", ("none", "auto"), "not supported")
    body.only("truncation", ("disabled",), "not supported")
    body.ignore(*inputs.LABELS, "stream", "max_tool_calls", "reasoning", "stream_options")
    body.finish()
    return ask


def _said(item: Fields, options: inputs.Options) -> Said | None:
    """A message; None for items that the model does not read again."""
    kind = item.text("type", "message")
    if kind in ("mcp_call", "reasoning"):
        return None
    if kind != "message":
        raise item.error("type", "must be message")
    role = item.choice("role", ("system", "developer", "user", "assistant"))
    role = "system" if role == "developer" else role
    item.ignore("id", "status", "phase")
    content = item.take("content")
    if isinstance(content, str):
        item.finish()
        return Said(role, content)
    texts: list[str] = []
    images: list[ImagePart] = []
    for part in item.objects("content", limit=inputs.MAX_PARTS):
        kind = part.text("type")
        if kind in ("input_text", "output_text"):
            texts.append(part.text("text"))
            part.ignore("annotations", "logprobs")
        elif kind in ("input_image", "input_file") and role == "user":
            names = ("file_id", "image_url" if kind == "input_image" else "file_data")
            key = next((name for name in names if part.has(name)), names[1])
            images.append(inputs.image_part(part, part.text(key), part.name(key), options.view))
            part.ignore("detail", "filename", *names)
        else:
            allowed = (
                "input_text, input_image or input_file" if role == "user" else "input_text or output_text"
            )
            raise part.error("type", f"must be {allowed}")
        part.finish()
    item.finish()
    return Said(role, "\n".join(texts), tuple(images))


class ResponsesWriter:
    """Writes the answer to one request."""

    def __init__(self, model: str, *, store: bool = False, previous: str | None = None):
        """`store`: whether the dialogue is kept; `previous` is the id of the response that it follows."""
        token = secrets.token_hex(16)
        self._message_id = f"msg_{token}"
        self.id = f"resp_{token}"
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": [],
            "store": store,
            "previous_response_id": previous,
        }
        self._number = self._index = 0
        self._begun = False

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of an answer."""
        prompt, completion = answer.usage.prompt, answer.usage.completion
        message = self._message(self._output_text(answer.text, answer), _status(answer))
        details = None if answer.complete else {"reason": "max_output_tokens"}
        return {
            **self._head,
            "status": _status(answer),
            "error": None,
            "incomplete_details": details,
            "output": [*map(_call_item, answer.experts), message],
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + completion,
            },
            "vilam3": answer.extra,
        }

    def first(self) -> list[dict[str, Any]]:
        """The events that begin a stream."""
        response = {**self._head, "status": "in_progress", "output": []}
        return [self._event(f"response.{name}", response=response) for name in ("created", "in_progress")]

    def step(self, step: Step) -> list[dict[str, Any]]:
        """The events of a step; drafts are not shown."""
        if step.kind == "text":
            return [*self._begin(), self._in_part("response.output_text.delta", delta=step.text, logprobs=[])]
        if step.record is None:
            return []
        item = _call_item(step.record)
        place = {"item_id": item["id"], "output_index": self._index}
        if step.kind == "call":
            added = self._event("response.output_item.added", output_index=self._index, item=item)
            return [added, self._event("response.mcp_call.in_progress", **place)]
        name = "completed" if item["status"] == "completed" else "failed"
        events = [
            self._event(f"response.mcp_call.{name}", **place),
            self._event("response.output_item.done", output_index=self._index, item=item),
        ]
        self._index += 1
        return events

    def last(self, answer: Answer) -> list[dict[str, Any]]:
        """The events that end a stream."""
        part = self._output_text(answer.text, answer)
        message = self._message(part, _status(answer))
        return [
            *self._begin(),
            self._in_part("response.output_text.done", text=answer.text, logprobs=part["logprobs"]),
            self._in_part("response.content_part.done", part=part),
            self._event("response.output_item.done", output_index=self._index, item=message),
            self._event(f"response.{_status(answer)}", response=self.whole(answer)),
        ]

    def error(self, error: ApiError) -> dict[str, Any]:
        """The event of an error."""
        return self._event("error", code=error.code, message=str(error), param=error.param)

    def _begin(self) -> list[dict[str, Any]]:
        """The events before the first text."""
        if self._begun:
            return []
        self._begun = True
        message = {**self._message({}, "in_progress"), "content": []}
        return [
            self._event("response.output_item.added", output_index=self._index, item=message),
            self._in_part("response.content_part.added", part=self._output_text("", None)),
        ]

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **values}

    def _in_part(self, kind: str, **values: Any) -> dict[str, Any]:
        place = {"item_id": self._message_id, "output_index": self._index, "content_index": 0}
        return self._event(kind, **place, **values)

    def _message(self, part: dict[str, Any], status: str) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [part],
        }

    @staticmethod
    def _output_text(text: str, answer: Answer | None) -> dict[str, Any]:
        tokens = token_entries(answer.tokens) if answer is not None and answer.tokens else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}


def _status(answer: Answer) -> str:
    return "completed" if answer.complete else "incomplete"


def _call_item(record: dict[str, Any]) -> dict[str, Any]:
    """An expert call as a tool that ran on the server, which clients do not run again."""
    status = {"running": "in_progress", "ok": "completed"}.get(record["status"], "failed")
    return {
        "id": record["id"],
        "type": "mcp_call",
        "server_label": _SERVER,
        "name": record["function"]["name"],
        "arguments": record["function"]["arguments"],
        "status": status,
        "output": json.dumps(record["result"]) if "result" in record else None,
        "error": record.get("reason"),
    }
