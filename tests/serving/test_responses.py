"""Responses by the official client."""

from __future__ import annotations

import json

QUESTION = "Is the liver visible?"
OFF = {"vilam3": {"experts": False}}


def test_the_text_is_that_of_a_chat_completion(client):
    chat = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}],
        extra_body=OFF,
    )
    found = client.responses.create(model="tiny", instructions="Be brief.", input=QUESTION, extra_body=OFF)
    assert found.output_text == chat.choices[0].message.content and found.output_text
    assert found.status == "incomplete" and found.incomplete_details.reason == "max_output_tokens"
    assert found.usage.total_tokens == chat.usage.total_tokens


def test_a_stream_and_its_events(client):
    with client.responses.stream(model="tiny", input=QUESTION, extra_body=OFF) as stream:
        events = list(stream)
    whole = client.responses.create(model="tiny", input=QUESTION, extra_body=OFF)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-1].response.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.incomplete"


def test_the_dialogue_so_far_and_a_form(client):
    first = client.responses.create(model="tiny", input=QUESTION, extra_body=OFF)
    items = [{"role": "user", "content": QUESTION}, *(item.to_dict() for item in first.output)]
    schema = {
        "type": "object",
        "properties": {"plane": {"enum": ["axial", "coronal"]}},
        "required": ["plane"],
    }
    schema["additionalProperties"] = False
    found = client.responses.create(
        model="tiny",
        input=[*items, {"role": "user", "content": "Which plane?"}],
        text={"format": {"type": "json_schema", "name": "plane", "schema": schema}},
        include=["message.output_text.logprobs"],
        extra_body=OFF,
    )
    assert json.loads(found.output_text)["plane"] in ("axial", "coronal") and found.status == "completed"
    assert found.output[0].content[0].logprobs
