"""The OpenAPI description says what the server does."""

from __future__ import annotations

import json

import httpx2 as httpx
import jsonschema
import pytest
from starlette.routing import Route

from tests.serving.test_chat import data_url
from vilam3_jax.serving import chat_api, openapi, responses_api
from vilam3_jax.serving.app import Api
from vilam3_jax.serving.fields import Fields

NOT_DESCRIBED = {"/"}  # leads to the page
CHAT = {"messages": [{"role": "user", "content": "Is it?"}]}


@pytest.fixture(scope="module")
def described(server):
    return httpx.get(f"{server.url}/openapi.json").json()


def validator(described, name):
    schema = {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
    return jsonschema.Draft202012Validator(schema)


def test_the_paths_and_methods_are_those_of_the_routes(server, described):
    routes = {
        (route.path.replace(":path", ""), method)
        for route in Api(server.service).routes()
        if isinstance(route, Route) and route.path not in NOT_DESCRIBED
        for method in (route.methods or ()) - {"HEAD"}
    }
    paths = {
        (path, method.upper())
        for path, operations in described["paths"].items()
        for method in operations
        if method != "parameters"
    }
    assert paths == routes


@pytest.mark.parametrize(
    ("name", "check", "body"),
    [
        ("ChatRequest", chat_api.check, CHAT),
        ("ResponsesRequest", responses_api.check, {"input": "Is it?"}),
    ],
)
def test_the_fields_are_those_that_are_read(server, described, name, check, body):
    fields = Fields({**body, "vilam3": {}})
    check(fields, server.service)
    assert set(described["components"]["schemas"][name]["properties"]) == fields._known
    assert validator(described, name).is_valid(body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": []},
        {"messages": [{"role": "pope", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}
            ]
        },
        {
            "messages": [
                {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}
            ]
        },
        {**CHAT, "max_tokens": 0},
        {**CHAT, "n": 2},
        {**CHAT, "stop": [""]},
        {**CHAT, "temperature": 3},
        {**CHAT, "colour": 1},
        {**CHAT, "vilam3": {"window": [1, -1]}},
        {**CHAT, "vilam3": {"axis": "diagonal"}},
        {**CHAT, "response_format": {"type": "json_schema"}},
        {**CHAT, "tools": [1]},
    ],
    ids=json.dumps,
)
def test_what_the_schema_forbids_is_refused(server, described, body):
    assert not validator(described, "ChatRequest").is_valid(body)
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert refused.status_code == 400
    validator(described, "Error").validate(refused.json())


def test_answers_have_the_described_form(server, described, world):
    content = [
        {"type": "text", "text": "Is it?"},
        {"type": "image_url", "image_url": {"url": data_url(world.film)}, "vilam3": {"role": ""}},
    ]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2, "stop": ["x"], "seed": 7}
    body |= {"logprobs": True, "store": False, "n": 1, "response_format": {"type": "text"}, "metadata": {}}
    body["vilam3"] = {"images": True, "transcript": True, "masks": True, "experts": False}
    validator(described, "ChatRequest").validate(body)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        validator(described, "ChatCompletion").validate(http.post("/v1/chat/completions", json=body).json())
        found = http.post("/v1/responses", json={"input": "Is it?", "max_output_tokens": 2})
        validator(described, "Response").validate(found.json())
        (model,) = http.get("/v1/models").json()["data"]
        validator(described, "Model").validate(model)
        with world.film.open("rb") as file:
            stored = http.post("/v1/files", files={"file": ("a", file)}).json()
        validator(described, "File").validate(stored)
        validator(described, "Deleted").validate(http.delete(f"/v1/files/{stored['id']}").json())


def test_the_description_is_valid(described):
    for schema in described["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    references = json.dumps(described).split('"$ref": "#/components/schemas/')[1:]
    assert {one.partition('"')[0] for one in references} == set(described["components"]["schemas"])
    assert openapi.document() == described
