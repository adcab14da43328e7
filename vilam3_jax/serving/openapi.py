"""The OpenAPI 3.1 description of the server, served at `/openapi.json`; a test compares it with the code."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import vilam3_jax
from vilam3_jax.data.volumes import AXES
from vilam3_jax.serving import inputs
from vilam3_jax.serving.inputs import LABELS
from vilam3_jax.serving.viewing import CT_PRESETS, MIN_MAX, MODEL

Schema = dict[str, Any]

_ANY: Schema = {}
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}


def document() -> Schema:
    """The description of a server."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "vilam3 serve",
            "version": vilam3_jax.__version__,
            "description": "A medical vision-language model. Research use only, not for clinical use.",
        },
        "paths": _paths(),
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        # Servers on this machine alone have no keys.
        "security": [{}, {"key": []}],
    }


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(properties: Schema, required: Iterable[str] = (), *, closed: bool = True) -> Schema:
    """An object; `closed`: other properties are refused."""
    schema: Schema = {"type": "object", "properties": properties, "required": list(required)}
    return {**schema, "additionalProperties": False} if closed else schema


def _list(items: Schema, least: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def _or_null(*schemas: Schema) -> Schema:
    """A field that may be null, which is the same as absent."""
    return {"anyOf": [*schemas, {"type": "null"}]}


def _number(kind: str, low: float, high: float) -> Schema:
    return _or_null({"type": kind, "minimum": low, "maximum": high})


def _choice(*values: Any) -> Schema:
    """One of a few values, or null."""
    return {"enum": [*values, None]}


_UNUSED: Schema = {"anyOf": [{"type": "array", "maxItems": 0}, {"type": "object", "maxProperties": 0},
                             {"type": "null"}]}  # fmt: skip
_ID = _or_null({"type": "string", "maxLength": inputs.MAX_ID})

# Of an image, see `inputs.view_of`.
_VIEW: Schema = {
    "axis": _choice(*sorted(AXES)),
    "slice": _number("integer", 0, inputs.MAX_NUMBER),
    "slices": _number("integer", 1, inputs.MAX_SLICES),
    "window": _or_null(
        {
            "type": "array",
            "prefixItems": [
                {"type": "number", "minimum": -inputs.MAX_NUMBER, "maximum": inputs.MAX_NUMBER},
                {"type": "number", "exclusiveMinimum": 0, "maximum": inputs.MAX_NUMBER},
            ],
            "minItems": 2,
            "maxItems": 2,
        }
    ),
    "modality": _or_null({"type": "string", "maxLength": 16}),
    "series": _or_null({"type": "string", "maxLength": 128}),
    "frame": _number("integer", 0, inputs.MAX_NUMBER),
}
_SWITCHES: Schema = {name: _or_null(_FLAG) for name in ("experts", "images", "masks", "transcript")}
_IMAGE_URL: Schema = {"type": "string", "pattern": "^([dD][aA][tT][aA]:|file-)"}


def _shared() -> Schema:
    """Fields of both interfaces."""
    return {
        "model": _or_null(_TEXT),
        "stream": _or_null(_FLAG),
        "store": _or_null(_FLAG),
        "temperature": _number("number", 0, 2),
        "top_p": _number("number", 0, 1),
        "seed": _number("integer", -(2**63), 2**63 - 1),
        "top_logprobs": _choice(0),
        "tool_choice": _choice("none", "auto"),
        "tools": _UNUSED,
        **dict.fromkeys(LABELS, _ANY),
    }


def _schemas() -> Schema:
    tokens = _number("integer", 1, inputs.MAX_NUMBER)
    texts = _or_null(_TEXT)
    schema_form = _object(
        {"name": _ANY, "description": _ANY, "strict": _ANY, "schema": {"type": "object"}}, ["schema"]
    )
    chat = _object(
        {
            **_shared(),
            "messages": _list(_ref("ChatMessage"), 1, inputs.MAX_MESSAGES),
            "max_tokens": tokens,
            "max_completion_tokens": tokens,
            "logprobs": _or_null(_FLAG),
            "n": _choice(1),
            "stop": _or_null(
                {"type": "string", "minLength": 1, "maxLength": inputs.MAX_STOP_CHARACTERS},
                _list(
                    {"type": "string", "minLength": 1, "maxLength": inputs.MAX_STOP_CHARACTERS},
                    0,
                    inputs.MAX_STOPS,
                ),
            ),
            "response_format": _or_null(
                _object({"type": {"enum": ["text", "json_object"]}}, ["type"]),
                _object(
                    {"type": {"const": "json_schema"}, "json_schema": schema_form}, ["type", "json_schema"]
                ),
            ),
            "stream_options": _or_null(
                _object({"include_usage": _or_null(_FLAG), "include_obfuscation": _ANY})
            ),
            "frequency_penalty": _choice(0),
            "presence_penalty": _choice(0),
            **dict.fromkeys(
                ("functions", "logit_bias", "audio", "web_search_options", "prediction"), _UNUSED
            ),
            "function_call": _choice("none", "auto"),
            **dict.fromkeys(("modalities", "reasoning_effort", "verbosity"), _ANY),
            "vilam3": _or_null(_object({**_SWITCHES, **_VIEW, "previous": _ID})),
        },
        ["messages"],
    )
    responses = _object(
        {
            **_shared(),
            "input": {"anyOf": [_TEXT, _list(_ref("ResponsesItem"), 1, inputs.MAX_MESSAGES)]},
            "instructions": texts,
            "previous_response_id": _ID,
            "max_output_tokens": tokens,
            "text": _or_null(
                _object(
                    {
                        "format": _or_null(
                            _object({"type": {"enum": ["text", "json_object"]}}, ["type"]),
                            _object(
                                {"type": {"const": "json_schema"}, **schema_form["properties"]},
                                ["type", "schema"],
                            ),
                        ),
                        "verbosity": _ANY,
                    }
                )
            ),
            "include": _or_null(_list({"const": "message.output_text.logprobs"}, 0, 1)),
            "background": _choice(False),
            "truncation": _choice("disabled"),
            **dict.fromkeys(("conversation", "prompt", "context_management"), _UNUSED),
            **dict.fromkeys(("max_tool_calls", "reasoning", "stream_options"), _ANY),
            "vilam3": _or_null(_object({**_SWITCHES, **_VIEW})),
        },
        ["input"],
    )
    return {
        "ChatRequest": chat,
        "ChatMessage": {"anyOf": list(_chat_messages())},
        "ResponsesRequest": responses,
        "ResponsesItem": {"anyOf": list(_response_items())},
        "ImageOptions": _object(
            {**_VIEW, "role": _or_null({"type": "string", "pattern": "^([a-z][a-z0-9]{0,15})?$"})}
        ),
        "Error": _object(
            {
                "error": _object(
                    {"message": _TEXT, "type": _TEXT, "param": texts, "code": _TEXT},
                    ["message", "type", "param", "code"],
                )
            },
            ["error"],
        ),
        "ChatCompletion": _object(
            {
                "id": _TEXT,
                "object": {"const": "chat.completion"},
                "created": {"type": "integer"},
                "model": _TEXT,
                "choices": _list(_object({"message": {"type": "object"}}, ["message"], closed=False), 1, 1),
                "usage": {"type": "object"},
                "vilam3": _ref("Extra"),
            },
            ["id", "object", "created", "model", "choices", "usage", "vilam3"],
        ),
        "Response": _object(
            {
                "id": _TEXT,
                "object": {"const": "response"},
                "status": {"enum": ["completed", "incomplete"]},
                "output": {"type": "array", "items": {"type": "object"}, "minItems": 1},
                "usage": {"type": "object"},
                "vilam3": _ref("Extra"),
            },
            ["id", "object", "status", "output", "usage", "vilam3"],
            closed=False,
        ),
        "Extra": _object(
            {
                "description": _TEXT,
                "notes": {"type": "array", "items": _TEXT},
                "known": {
                    "type": "array",
                    "items": _object({"name": _TEXT, "args": _TEXT}, ["name", "args"]),
                },
                "image": _TEXT,
                "overlay": _TEXT,
                "transcript": {"type": "array", "items": {"type": "object"}},
            },
            ["description", "notes", "known"],
        ),
        "File": _object(
            {
                "id": _TEXT,
                "object": {"const": "file"},
                "bytes": {"type": "integer"},
                "created_at": {"type": "integer"},
                "expires_at": {"type": "integer"},
                "filename": _TEXT,
                "purpose": _TEXT,
                "status": _TEXT,
                "vilam3": {"type": "object"},
            },
            ["id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status", "vilam3"],
        ),
        "Deleted": _object(
            {"id": _TEXT, "object": _TEXT, "deleted": {"const": True}}, ["id", "object", "deleted"]
        ),
        "Model": _object(
            {
                "id": _TEXT,
                "object": {"const": "model"},
                "created": {"type": "integer"},
                "owned_by": _TEXT,
                "vilam3": {"type": "object"},
            },
            ["id", "object", "created", "owned_by", "vilam3"],
        ),
    }


def _chat_messages() -> Iterable[Schema]:
    text = _object({"type": {"const": "text"}, "text": _TEXT}, ["type", "text"])
    images = [
        _object(
            {
                "type": {"const": kind},
                kind: _object({key: _IMAGE_URL, "detail": _ANY, "filename": _ANY}, [key]),
                "vilam3": _or_null(_ref("ImageOptions")),
            },
            ["type", kind],
        )
        for kind, key in (("image_url", "url"), ("file", "file_id"), ("file", "file_data"))
    ]

    def message(roles: Iterable[str], parts: list[Schema], more: Schema, **other: Schema) -> Schema:
        content = {"anyOf": [_TEXT, _list({"anyOf": parts}, 1, inputs.MAX_PARTS), *other.values()]}
        needed = ["role"] if other else ["role", "content"]
        return _object({"role": {"enum": list(roles)}, "content": content, "name": _ANY, **more}, needed)

    answers = (
        "experts",
        "tool_calls",
        "function_call",
        "refusal",
        "audio",
        "annotations",
        "reasoning_content",
    )
    yield message(("user",), [text, *images], {})
    yield message(("system", "developer"), [text], {})
    yield message(("assistant",), [text], dict.fromkeys(answers, _ANY), null={"type": "null"})


def _response_items() -> Iterable[Schema]:
    texts = _object(
        {
            "type": {"enum": ["input_text", "output_text"]},
            "text": _TEXT,
            "annotations": _ANY,
            "logprobs": _ANY,
        },
        ["type", "text"],
    )
    images = [
        _object(
            {
                "type": {"const": kind},
                **dict.fromkeys(("file_id", "detail", "filename"), _ANY),
                key: _IMAGE_URL,
                "vilam3": _or_null(_ref("ImageOptions")),
            },
            ["type", key],
        )
        for kind, keys in (
            ("input_image", ("file_id", "image_url")),
            ("input_file", ("file_id", "file_data")),
        )
        for key in keys
    ]
    for roles, parts in ((["user"], [texts, *images]), (["system", "developer", "assistant"], [texts])):
        yield _object(
            {
                "type": _choice("message"),
                "role": {"enum": roles},
                "content": {"anyOf": [_TEXT, _list({"anyOf": parts}, 1, inputs.MAX_PARTS)]},
                **dict.fromkeys(("id", "status", "phase"), _ANY),
            },
            ["role", "content"],
        )
    # Of earlier answers; they are not read again.
    yield _object({"type": {"enum": ["mcp_call", "reasoning"]}}, ["type"], closed=False)


def _answer(schema: Schema, kind: str = "application/json", *, streams: bool = False) -> Schema:
    """The responses of an operation; `streams`: also server-sent events, which 3.1 cannot describe."""
    content: Schema = {kind: {"schema": schema}}
    if streams:
        content["text/event-stream"] = {}
    return {"200": {"description": "Success", "content": content}, **_ERRORS}


_ERRORS: Schema = {
    "default": {
        "description": "One sentence that says what to do; docs/serving.md lists the statuses.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
}


def _parameter(name: str, schema: Schema, *, where: str = "query") -> Schema:
    return {"name": name, "in": where, "required": where == "path", "schema": schema}


def _paths() -> Schema:
    """The paths, with the methods of each."""
    json_of = lambda name: {"required": True, "content": {"application/json": {"schema": _ref(name)}}}  # noqa: E731
    axis = _parameter("axis", {"enum": sorted(AXES)})
    index = _parameter("index", {"type": "string", "pattern": "^[0-9]{1,7}$"})
    modality = _parameter("modality", {"type": "string", "pattern": "^[A-Za-z]{1,16}$"})
    number = r"-?[0-9]{1,7}(\.[0-9]{1,6})?"
    names = "|".join((*CT_PRESETS, MIN_MAX, MODEL))
    window = _parameter("window", {"type": "string", "pattern": f"^({names}|{number},{number})$"})
    binary: Schema = {"type": "string", "contentMediaType": "application/octet-stream"}
    image: Schema = {"type": "string", "contentMediaType": "image/png"}
    form = {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": _object({"file": binary, "purpose": _TEXT}, ["file"], closed=False)
            }
        },
    }

    def of(name: str) -> Schema:
        return {"parameters": [_parameter(name, _TEXT, where="path")]}

    answer, file, mask = of("answer"), of("file"), of("mask")
    forget = {"delete": {"summary": "Forget a dialogue that was kept", "responses": _answer(_ref("Deleted"))}}
    prompt = [
        _parameter("Prompt", _TEXT),
        _parameter("stream", {"enum": ["true", "false", "0", "1"]}),
    ]
    chat = _answer(_ref("ChatCompletion"), streams=True)
    return {
        "/healthz": {
            "get": {
                "summary": "Whether the server answers",
                "responses": {
                    **_answer(_object({"status": {"const": "ok"}}, ["status"])),
                    "503": {
                        "description": "It is stopping",
                        "content": {"application/json": {"schema": _object({"status": _TEXT}, ["status"])}},
                    },
                },
            }
        },
        "/metrics": {"get": {"summary": "Prometheus metrics", "responses": _answer(_TEXT, "text/plain")}},
        "/openapi.json": {"get": {"summary": "This description", "responses": _answer({"type": "object"})}},
        "/v1/models": {
            "get": {
                "summary": "The model",
                "responses": _answer(
                    _object({"object": _TEXT, "data": _list(_ref("Model"), 1, 1)}, ["object", "data"])
                ),
            }
        },
        "/v1/models/{model}": {
            **of("model"),
            "get": {"summary": "The model by its name", "responses": _answer(_ref("Model"))},
        },
        "/v1/chat/completions": {
            "post": {
                "summary": "A chat completion in OpenAI's form",
                "requestBody": json_of("ChatRequest"),
                "responses": chat,
            }
        },
        "/v1/chat/completions/": {
            "post": {
                "summary": "A prompt of the module for 3D Slicer, or a chat completion without `Prompt`",
                "parameters": prompt,
                "requestBody": {
                    "content": {**form["content"], "application/json": {"schema": _ref("ChatRequest")}}
                },
                "responses": _answer({"type": "object"}, streams=True),
            }
        },
        "/v1/chat/completions/{answer}": {**answer, **forget},
        "/v1/responses": {
            "post": {
                "summary": "A response in OpenAI's form",
                "requestBody": json_of("ResponsesRequest"),
                "responses": _answer(_ref("Response"), streams=True),
            }
        },
        "/v1/responses/{answer}": {**answer, **forget},
        "/v1/files": {
            "post": {
                "summary": "Upload an image or a scan",
                "requestBody": form,
                "responses": _answer(_ref("File")),
            }
        },
        "/v1/samples/{sample}": {
            **of("sample"),
            "post": {"summary": "Copy a sample to the uploads", "responses": _answer(_ref("File"))},
        },
        "/v1/files/{file}": {
            **file,
            "get": {"summary": "An upload", "responses": _answer(_ref("File"))},
            "delete": {"summary": "Delete an upload", "responses": _answer(_ref("Deleted"))},
        },
        "/v1/files/{file}/view": {
            **file,
            "get": {
                "summary": "Kind, planes and windows of a file",
                "parameters": [modality],
                "responses": _answer({"type": "object"}),
            },
        },
        "/v1/files/{file}/slice": {
            **file,
            "get": {
                "summary": "A slice",
                "parameters": [axis, index, window, modality],
                "responses": _answer(image, "image/png"),
            },
        },
        "/v1/files/{file}/volume": {
            **file,
            "get": {
                "summary": "The volume as NIfTI",
                "responses": _answer(binary, "application/octet-stream"),
            },
        },
        "/v1/masks/{mask}": {
            **mask,
            "get": {
                "summary": "A label map of an expert as NIfTI",
                "responses": _answer(binary, "application/octet-stream"),
            },
        },
        "/v1/masks/{mask}/slice": {
            **mask,
            "get": {
                "summary": "A slice of a label map",
                "parameters": [axis, index],
                "responses": _answer(image, "image/png"),
            },
        },
        "/info/": {"get": {"summary": "For 3D Slicer", "responses": _answer(_TEXT)}},
        "/upload/": {
            "post": {
                "summary": "An upload of 3D Slicer",
                "requestBody": form,
                "responses": _answer(
                    _object({"filename": _TEXT, "id": _TEXT, "status": _TEXT}, ["filename", "id", "status"])
                ),
            }
        },
    }
