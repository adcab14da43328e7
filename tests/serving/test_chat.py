"""Chat completions by the official client."""

from __future__ import annotations

import base64
import json

import httpx2 as httpx
import openai
import pytest

from vilam3_jax.errors import UserError
from vilam3_jax.inference import agent

QUESTION = "Is the liver visible?"


def data_url(path, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def ask(client, content=QUESTION, **options):
    messages = (
        content
        if isinstance(content, list) and "role" in content[0]
        else [{"role": "user", "content": content}]
    )
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def with_image(url, text=QUESTION, **extra):
    return [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}, **extra}]


def streamed(stream):
    chunks = list(stream)
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks


def test_the_answer_is_that_of_the_assistant(client, assistant, world):
    found = ask(client, with_image(data_url(world.film)), extra_body={"vilam3": {"experts": False}})
    expected = assistant.ask(world.film, QUESTION, experts=False, max_new_tokens=16)
    choice = found.choices[0]
    assert choice.message.content == expected.answer and expected.answer
    assert choice.finish_reason == "length" and found.usage.completion_tokens == 16
    assert found.usage.prompt_tokens > assistant.generator.tokens_per_image


@pytest.mark.parametrize("experts", [False, True])
def test_a_stream_has_the_same_text(client, world, experts):
    content = with_image(data_url(world.film))
    options = dict(extra_body={"vilam3": {"experts": experts}})
    whole = ask(client, content, **options).choices[0].message.content
    text, chunks = streamed(
        ask(client, content, stream=True, stream_options={"include_usage": True}, **options)
    )
    assert text == whole
    assert chunks[-1].usage.completion_tokens == 16 and not chunks[-1].choices
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "length"
    if not experts:
        assert sum(bool(c.choices and c.choices[0].delta.content) for c in chunks) > 1, "in pieces"


def test_an_uploaded_volume_is_answered_as_by_the_assistant(client, assistant, world):
    stored = client.files.create(file=world.volume, purpose="vision")
    assert stored.id.startswith("file-") and stored.filename == "scan"
    view = {"axis": "coronal", "slice": 3, "window": [40, 400], "modality": "CT"}
    part = with_image(stored.id, vilam3=view)
    found = ask(client, part, extra_body={"vilam3": {"experts": False}})
    by_body = ask(client, with_image(stored.id), extra_body={"vilam3": {"experts": False, **view}})
    options = dict(axis="coronal", index=3, window=(40, 400), modality="CT")
    expected = assistant.ask(world.volume, QUESTION, experts=False, max_new_tokens=16, **options)
    assert found.choices[0].message.content == by_body.choices[0].message.content == expected.answer
    assert "coronal slice 3" in found.vilam3["description"]
    assert any("clinical" in note for note in found.vilam3["notes"])
    as_url = data_url(world.volume, "application/octet-stream")
    inline = ask(client, with_image(as_url, vilam3=view), extra_body={"vilam3": {"experts": False}})
    assert inline.choices[0].message.content == expected.answer
    assert client.files.delete(stored.id).deleted
    with pytest.raises(openai.NotFoundError, match="upload it again"):
        ask(client, with_image(stored.id))


def test_the_history_is_read_again(client, assistant, world):
    first = with_image(data_url(world.film))
    options = dict(experts=False, max_new_tokens=16)
    chat = assistant.chat(world.film, **options)
    replies = [chat.ask(QUESTION), chat.ask("Which plane?"), chat.ask("Why?")]
    messages = [{"role": "user", "content": first}]
    for question, reply in zip(["Which plane?", "Why?"], replies, strict=False):
        messages.append({"role": "assistant", "content": reply.answer})
        messages.append({"role": "user", "content": question})
    found = ask(client, messages, extra_body={"vilam3": {"experts": False}})
    assert found.choices[0].message.content == replies[-1].answer
    alone = ask(client, "Why?", extra_body={"vilam3": {"experts": False}})
    assert alone.choices[0].message.content != replies[-1].answer


def test_a_system_message_is_read(client):
    system = {"role": "system", "content": "Answer in Latin, briefly, and never guess."}
    user = {"role": "user", "content": QUESTION}
    plain, told = ask(client, [user]), ask(client, [system, user])
    again = ask(client, [user, {"role": "developer", "content": system["content"]}])
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens
    assert told.choices[0].message.content == again.choices[0].message.content


def test_json_of_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"visible": {"type": "boolean"}, "plane": {"enum": ["axial", "coronal"]}},
        "required": ["visible", "plane"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "finding", "schema": schema, "strict": True}}
    found = ask(client, response_format=form, max_tokens=60)
    value = json.loads(found.choices[0].message.content)
    assert set(value) == {"visible", "plane"} and found.choices[0].finish_reason == "stop"
    text, _ = streamed(ask(client, response_format=form, max_tokens=60, stream=True))
    assert json.loads(text) == value


def test_stops_sampling_and_log_probs(client):
    off = {"extra_body": {"vilam3": {"experts": False}}}
    whole = ask(client, logprobs=True, max_completion_tokens=12, **off).choices[0]
    assert len(whole.logprobs.content) == 12 and all(one.logprob <= 0 for one in whole.logprobs.content)
    text = whole.message.content
    stop = text[len(text) // 2 :][:2]
    cut = ask(client, stop=[stop, "never said"], max_completion_tokens=12, **off).choices[0]
    assert cut.finish_reason == "stop" and cut.message.content == text.split(stop)[0].strip()
    pieces, _ = streamed(ask(client, stop=stop, max_completion_tokens=12, stream=True, **off))
    assert pieces == cut.message.content
    sampled = [
        ask(client, temperature=1.5, seed=seed, **off).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n": 2}, "one answer per request"),
        ({"logprobs": True, "top_logprobs": 3}, "log-probabilities of the chosen tokens"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias: not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: not supported"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "x"}}}},
         "schema"),
    ],
)  # fmt: skip
def test_what_is_refused(client, options, words):
    with pytest.raises(openai.BadRequestError, match=words):
        ask(client, **options)


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029", "\x1c", "\r", "é"])
def test_no_character_ends_the_line_of_an_event(server, monkeypatch, character):
    text = f"a{character}b"
    monkeypatch.setattr("vilam3_jax.serving.chat_api.ChatWriter.first", lambda self: [{"text": text}])
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as stream:
        first = next(stream.iter_lines())
    assert json.loads(first.removeprefix("data: ")) == {"text": text}


@pytest.fixture
def calls_an_expert(monkeypatch):
    """The first turn of every dialogue becomes a call."""
    plain = agent._Dialogue.add_answer

    def add_answer(row, tokenizer, decoded):
        plain(row, tokenizer, decoded)
        if not row.results:
            row.turns[-1] = agent.Message("assistant", "Let me see. <PNEUMONIA()>.")

    monkeypatch.setattr(agent._Dialogue, "add_answer", add_answer)


def test_expert_calls_are_shown(client, world, calls_an_expert):
    content = with_image(data_url(world.film))
    found = ask(client, content, extra_body={"vilam3": {"images": True}})
    (call,) = found.choices[0].message.experts
    assert call["function"] == {"name": "PNEUMONIA", "arguments": '{"args": ""}'}
    assert call["status"] == "ok" and call["result"]["probabilities"] == {"pneumonia": 0.2, "normal": 0.8}
    assert found.choices[0].finish_reason == "length" and found.vilam3["image"].startswith("data:image/png")
    text, chunks = streamed(ask(client, content, stream=True))
    assert text == found.choices[0].message.content
    records = [one for c in chunks for one in getattr(c.choices[0].delta, "experts", None) or []]
    assert [one["status"] for one in records] == ["running", "ok"] and len(
        {one["id"] for one in records}
    ) == 1
    response = client.responses.create(model="tiny", input=[{"role": "user", "content": [
        {"type": "input_text", "text": QUESTION}, {"type": "input_image", "image_url": data_url(world.film)},
    ]}])  # fmt: skip
    assert [item.type for item in response.output] == ["mcp_call", "message"]
    assert response.output_text == text


def test_a_damaged_store_is_not_the_clients_fault(client, world, calls_an_expert, monkeypatch):
    def damaged(*_):
        raise UserError(f"{world.annotations}: damaged")

    monkeypatch.setattr(agent.AnnotationStore, "get", damaged)
    with pytest.raises(openai.InternalServerError, match="tell who runs the server") as caught:
        ask(client, with_image(data_url(world.film)))
    assert caught.value.status_code == 503 and str(world.annotations) not in str(caught.value)


def test_models(client):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").vilam3["experts"]
    with pytest.raises(openai.NotFoundError, match="this server has tiny"):
        client.models.retrieve("gpt-5")
