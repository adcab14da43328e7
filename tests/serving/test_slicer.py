"""The calls of the module for 3D Slicer."""

from __future__ import annotations

import httpx2 as httpx

QUESTION = "Is the liver visible?"


def test_an_upload_and_prompts_about_it(server, assistant, world):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.get("/info/").json() == "VILA-M3 model"
        query = {"Prompt": QUESTION, "stream": "false"}
        none = client.post("/v1/chat/completions/", params=query)
        assert none.status_code == 400 and "upload one" in none.json()["error"]["message"]
        with world.volume.open("rb") as file:
            stored = client.post("/upload/", files={"file": ("ct.nii.gz", file)})
        assert stored.status_code == 200 and "successfully" in stored.json()["status"]
        found = client.post("/v1/chat/completions/", params=query).json()
        expected = assistant.ask(world.volume, QUESTION, max_new_tokens=16).answer
        part = {"type": "text", "text": expected}
        assert found["choices"][0]["message"]["content"] == {"role": "assistant", "content": [part]}
        with world.film.open("rb") as file:
            found = client.post("/v1/chat/completions/", params=query, files={"file": ("film.png", file)})
        text = found.json()["choices"][0]["message"]["content"]["content"][0]["text"]
        assert text == assistant.ask(world.film, QUESTION, max_new_tokens=16).answer
        with client.stream("POST", "/v1/chat/completions/", params={**query, "stream": "true"}) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert "data: [DONE]" in list(stream.iter_lines())


def test_urls_are_not_fetched(server):
    with httpx.Client(base_url=server.url) as client:
        for options in (
            {"data": {"file": "https://example.org/ct.nii.gz"}},
            {"files": {"file": (None, "http://a")}},
        ):
            refused = client.post("/upload/", **options)
            assert refused.status_code == 400 and "fetches no URLs" in refused.json()["error"]["message"]


def test_openai_clients_may_add_the_slash(server):
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 2}
    found = httpx.post(f"{server.url}/v1/chat/completions/", json=body, timeout=60)
    assert isinstance(found.json()["choices"][0]["message"]["content"], str)
