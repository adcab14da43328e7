"""Follow-up questions about dialogues that the server keeps, with the results of their experts."""

from __future__ import annotations

import httpx2 as httpx
import openai
import pytest

from tests.serving.conftest import KEY, serve
from tests.serving.test_chat import QUESTION, ask, data_url, with_image
from tests.serving.test_page import calls_organs  # noqa: F401
from vilam3_jax.serving.errors import ApiError
from vilam3_jax.serving.kept import Kept

VIEW = {"axis": "axial", "slice": 8, "modality": "CT"}


def follow(client, first, text="Are you sure?", **options):
    extra = {"previous": first.id, **options.pop("vilam3", {})}
    return ask(client, text, extra_body={"vilam3": extra}, **options)


@pytest.mark.parametrize("stream", [False, True])
def test_a_follow_up_knows_the_results_of_experts(client, assistant, world, calls_organs, stream):  # noqa: F811
    stored = client.files.create(file=world.volume, purpose="vision")
    content = with_image(stored.id, vilam3=VIEW)
    first = ask(client, content, store=True)
    assert first.choices[0].message.experts[0]["status"] == "ok" and first.vilam3["known"] == []
    options = dict(axis="axial", index=8, modality="CT")
    chat = assistant.chat(world.volume, max_new_tokens=16, **options)
    replies = [chat.ask(QUESTION), chat.ask("Are you sure?"), chat.ask("Why?")]
    assert replies[0].answer == first.choices[0].message.content
    name = first.id
    for question, reply in zip(("Are you sure?", "Why?"), replies[1:], strict=True):
        found = ask(client, question, store=True, stream=stream, extra_body={"vilam3": {"previous": name}})
        if stream:
            chunks = list(found)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            name, extra = chunks[-1].id, chunks[-1].vilam3
        else:
            text, name, extra = found.choices[0].message.content, found.id, found.vilam3
            assert not getattr(found.choices[0].message, "experts", None)
        assert text == reply.answer
        assert extra["known"] == [{"name": "ORGANS", "args": "organs"}]
    # The same messages without the results are another question.
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": replies[0].answer},
        {"role": "user", "content": "Are you sure?"},
    ]
    replayed = ask(client, messages)
    assert replayed.vilam3["known"] == [] and replayed.usage.prompt_tokens < chat_length(client, first)


def chat_length(client, first):
    return follow(client, first).usage.prompt_tokens


def test_responses_follow_each_other(client, world):
    image = {"type": "input_image", "image_url": data_url(world.film)}
    content = [{"type": "input_text", "text": QUESTION}, image]
    options = dict(model="tiny", extra_body={"vilam3": {"experts": False}})
    first = client.responses.create(input=[{"role": "user", "content": content}], store=True, **options)
    second = client.responses.create(input="Why?", previous_response_id=first.id, **options)
    items = [{"role": "user", "content": content}, *(item.to_dict() for item in first.output)]
    whole = client.responses.create(input=[*items, {"role": "user", "content": "Why?"}], **options)
    assert second.output_text == whole.output_text and second.previous_response_id == first.id
    assert first.store and not second.store
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="send all messages again"):
        client.responses.create(input="Why?", previous_response_id=first.id, **options)


def test_what_is_not_kept(client):
    first = ask(client, extra_body={"vilam3": {"experts": False}})
    with pytest.raises(openai.NotFoundError, match="store: true"):
        follow(client, first)
    kept = ask(client, store=True, extra_body={"vilam3": {"experts": False}})
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    with pytest.raises(openai.BadRequestError, match="only the question that follows"):
        ask(client, system, extra_body={"vilam3": {"previous": kept.id}})
    assert follow(client, kept).choices[0].message.content
    assert client.chat.completions.delete(kept.id).deleted
    with pytest.raises(openai.NotFoundError):
        follow(client, kept)


def test_dialogues_belong_to_one_key(assistant):
    other = "another-key-of-the-tests"
    running = serve(assistant, model="tiny", max_new_tokens=4, keys=(KEY, other))
    with running as running, running.client() as mine, running.client(other) as stranger:
        first = ask(mine, store=True, extra_body={"vilam3": {"experts": False}})
        with pytest.raises(openai.NotFoundError):
            follow(stranger, first)
        with pytest.raises(openai.NotFoundError):
            stranger.chat.completions.delete(first.id)
        assert follow(mine, first).choices[0].message.content


def test_a_client_that_leaves_keeps_nothing(server):
    body = {"messages": [{"role": "user", "content": "Is it?"}], "max_tokens": 900, "store": True}
    body |= {"stream": True, "vilam3": {"experts": False}}
    before = len(server.service.dialogues)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as stream:
        next(stream.iter_lines())
    assert len(server.service.dialogues) == before


def test_kept_values_expire_and_are_bounded():
    kept = Kept("thing", "ask again", seconds=100, max_bytes=10, size=len)
    for name in ("a", "b", "c"):
        kept.add(name, "four", "me")
    assert len(kept) == 2 and "a" not in kept and kept.get("c", "me") == "four"
    for name, owner in (("a", "me"), ("c", "you"), ("", "me")):
        with pytest.raises(ApiError, match="no such thing; ask again") as caught:
            kept.get(name, owner)
        assert caught.value.status == 404
    kept.add("large", "x" * 100, "me")
    assert len(kept) == 1 and kept.get("large", "me")
    kept.delete("large", "me")
    assert len(kept) == 0
    kept.add("d", "four", "me")
    kept.add("e", "four", "me")
    assert len(kept) == 2, "deleted bytes are free again"
    old = Kept("thing", "ask again", seconds=-1, max_bytes=10, size=len)
    old.add("a", "four", "me")
    with pytest.raises(ApiError):
        old.get("a", "me")
    old.sweep()
    assert len(old) == 0
