"""`vilam3 mcp` by the SDK's own client, over stdio and in this process."""

from __future__ import annotations

import base64
import json
import logging
import os
import sys

import anyio
import pytest

pytest.importorskip("mcp")
import numpy as np
from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

from tests.serving.test_audit import SECRET
from tests.serving.test_chat import QUESTION, data_url
from vilam3_jax.data.experts.store import AnnotationStore
from vilam3_jax.data.images import encode_png
from vilam3_jax.errors import UserError
from vilam3_jax.serving import mcp_main, tools
from vilam3_jax.serving.audit import AuditLog
from vilam3_jax.serving.service import Service, Settings
from vilam3_jax.serving.tools import Files, Tools


@pytest.fixture(scope="module")
def root(world, tmp_path_factory):
    """A folder of a server, with links that lead out of it."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "film.png").write_bytes(world.film.read_bytes())
    (folder / "series").mkdir()
    (folder / "series" / "scan.nii.gz").write_bytes(world.volume.read_bytes())
    (folder / "text.txt").write_text("no image")
    (folder / "away").symlink_to(world.volume)
    (folder / "leaking").mkdir()
    (folder / "leaking" / "a.dcm").symlink_to(world.film)
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("audit") / "log"


@pytest.fixture(scope="module")
def server(assistant, root, log):
    settings = Settings(model="tiny", max_new_tokens=8, max_body=1 << 20, deadline=60)
    with Service(assistant, settings, experts=True, audit=AuditLog(log)) as service:
        yield Tools(service, Files(str(root), max_bytes=1 << 20)).server()


def call(server, name, **arguments):
    """The result of a tool, or the text of its error."""

    async def run():
        async with Client(server) as client:
            return await client.call_tool(name, arguments)

    result = anyio.run(run)
    return result.content[0].text if result.is_error else result.structured_content


def test_the_tools_describe_themselves(server):
    async def run():
        async with Client(server) as client:
            return (await client.list_tools()).tools

    found = {tool.name: tool for tool in anyio.run(run)}
    assert sorted(found) == ["annotate", "ask", "list_experts"]
    assert found["ask"].input_schema["required"] == ["question"]
    assert all(tool.description and tool.annotations.read_only_hint for tool in found.values())


def test_ask_answers_as_the_assistant_does(server, assistant, world):
    expected = assistant.ask(world.film, QUESTION, experts=False, max_new_tokens=5)
    for given in ({"image": "film.png"}, {"image_data": data_url(world.film)}):
        found = call(server, "ask", question=QUESTION, experts=False, max_new_tokens=5, **given)
        assert found["answer"] == expected.answer and not found["complete"] and not found["experts"]
        assert "not for clinical use" in " ".join(found["notes"]).lower()
    view = {"axis": "coronal", "slice": 3, "window": [40, 400], "modality": "CT"}
    expected = assistant.ask(
        world.volume, QUESTION, experts=False, max_new_tokens=5, axis="coronal", index=3, window=(40, 400),
        modality="CT",
    )  # fmt: skip
    found = call(
        server, "ask", question=QUESTION, image="series/scan.nii.gz", experts=False, max_new_tokens=5, **view
    )
    assert found["answer"] == expected.answer and "coronal slice 3" in found["description"]
    assert call(server, "ask", question="What is a CT?")["answer"]


def test_annotate_gives_the_experts_result(server, world, log):
    log.write_text("")
    stored = AnnotationStore(world.annotations)
    found = call(server, "annotate", call="<ORGANS(organs)>", image="series/scan.nii.gz")
    assert found["status"] == "ok" and found["function"]["name"] == "ORGANS"
    (segment,) = found["result"]["segments"]
    assert segment == {"name": "liver", "volume_ml": 7.7, "components": 1}
    found = call(server, "annotate", call="PNEUMONIA()", image_data=data_url(world.film))
    assert found["result"]["probabilities"] == {"pneumonia": 0.2, "normal": 0.8}
    failed = call(server, "annotate", call="BRAINSEG()", image="film.png")
    assert failed["status"] == "failed" and "no stored result" in failed["reason"]
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["asked", "answered"] * 3
    assert lines[1]["call"]["input_key"] in {key for key, *_ in list(stored.keys())}
    assert lines[1]["call"]["mask"]["labelled_voxels"] == 640 and "film" not in log.read_text()


def test_experts_are_listed(server, assistant):
    found = call(server, "list_experts")
    assert [card["name"] for card in found["experts"]] == [card.name for card in assistant.cards]
    assert found["experts"][0]["args"] == ["organs"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image": "../etc/passwd"}, "no such file below"),
        ({"image": "/etc/passwd"}, "no such file below"),
        ({"image": "away"}, "no such file below"),
        ({"image": "no\x00thing"}, "no such file below"),
        ({"image": "x" * 5000}, "no such file below"),
        ({"image": "missing.png"}, "no such file below"),
        ({"image": "leaking"}, "a link that leads out"),
        ({"image": "pipe"}, "no plain file"),
        ({"image": "text.txt"}, "text.txt"),
        ({"image": "film.png", "image_data": "data:image/png;base64,AAAA"}, "only one"),
        ({"image_data": "https://example.org/film.png"}, "fetches no URLs"),
        ({"image_data": "AAAA"}, "must be a data URL"),
        ({"image_data": "data:image/png;base64,????"}, "not valid base64"),
        ({"image_data": "data:image/png;base64," + "A" * (1 << 20)}, "larger than 1 MiB"),
        ({"image": "film.png", "window": [1]}, "CENTRE"),
        ({"image": "film.png", "slice": 3}, "is a 2-D image"),
        ({"image": "series/scan.nii.gz", "slice": 99}, "slice 99"),
        ({"image": "series/scan.nii.gz", "axis": "oblique"}, "axial or coronal or sagittal"),
        ({"axis": "axial"}, "there is no image"),
        ({"question": "  "}, "question is empty"),
        ({"question": "x" * 100_000}, "ask something shorter"),
        ({"question": "What is <image>?"}, "leave it out"),
        ({"question": "\ud800"}, "surrogate"),
        ({"max_new_tokens": 0}, "from 1 to"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_questions_get_a_sentence(server, root, arguments, words):
    told = call(server, "ask", **{"question": QUESTION, **arguments})
    assert isinstance(told, str) and words in told
    assert str(root) not in told and "Traceback" not in told and "vilam3-files" not in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"call": "SHELL(rm)"}, "there is no expert SHELL"),
        ({"call": "ORGANS(feet)"}, "does not take the argument"),
        ({"call": "please"}, "must be like"),
        ({"call": "PNEUMONIA() and <ORGANS(organs)"}, "must be like"),
        ({"image": None}, "name a file"),
    ],
    ids=str,
)
def test_bad_calls_get_a_sentence(server, arguments, words):
    assert words in call(server, "annotate", **{"call": "PNEUMONIA()", "image": "film.png", **arguments})


def test_large_files_are_refused(assistant, tmp_path):
    (tmp_path / "large.png").write_bytes(b"x" * (1 << 20))
    (tmp_path / "many").mkdir()
    for n in range(3):
        (tmp_path / "many" / str(n)).write_bytes(b"x" * (1 << 19))
    files = Files(str(tmp_path), max_bytes=1_000_000)
    for name in ("large.png", "many"):
        with pytest.raises(UserError, match="larger than"):
            files.find(name)
    with pytest.raises(UserError, match="reads no files"):
        Files(None, max_bytes=1).find("large.png")
    with pytest.raises(UserError, match="no such folder"):
        Files(str(tmp_path / "nothing"), max_bytes=1)


def test_a_failure_inside_shows_nothing(server, monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError(SECRET)

    monkeypatch.setattr("vilam3_jax.serving.inputs.read", fails)
    with caplog.at_level(logging.INFO):
        told = call(server, "ask", question=QUESTION)
    assert "internal error" in told and "RuntimeError" in caplog.text
    assert SECRET not in told + caplog.text


def test_without_experts_there_are_none(assistant):
    with Service(assistant, Settings(max_new_tokens=4), experts=False) as service:
        server = Tools(service, Files(None, max_bytes=1)).server()
        assert call(server, "list_experts")["experts"] == []
        film = "data:image/png;base64," + base64.b64encode(encode_png(np.zeros((8, 8, 3), np.uint8))).decode()
        assert "this server has none" in call(server, "annotate", call="PNEUMONIA()", image_data=film)
        assert "this server has none" in call(server, "ask", question=QUESTION, experts=True)


def test_the_command_speaks_over_stdio(export, world, tmp_path):
    arguments = [
        "-m", "vilam3_jax.cli", "mcp", f"--checkpoint={export}", f"--annotations={world.annotations}",
        "--expert_host=off", f"--files={world.film.parent}", "--slots=1", "--max_length=1024",
        f"--audit_log={tmp_path / 'log'}",
    ]  # fmt: skip
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)}
    parameters = StdioServerParameters(command=sys.executable, args=arguments, env=environment)

    async def run():
        async with Client(stdio_client(parameters)) as client:
            asked = {"question": QUESTION, "image": "film.png", "max_new_tokens": 3}
            return (
                await client.call_tool("ask", asked),
                await client.call_tool("annotate", {"call": "PNEUMONIA()", "image": "film.png"}),
                await client.call_tool("ask", {"question": QUESTION, "image": "../nothing"}),
            )

    answered, annotated, refused = anyio.run(run)
    assert answered.structured_content["answer"] and annotated.structured_content["status"] == "ok"
    assert refused.is_error and "no such file" in refused.content[0].text
    assert not list(tmp_path.glob("vilam3-files-*")), "nothing is left behind"
    events = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
    assert events[:4] == ["asked", "answered"] * 2


def test_flags_that_are_refused(tmp_path):
    for flags, words in ((["--files=/nowhere"], "no such folder"), (["--max_file=0"], "above 0")):
        with pytest.raises(UserError, match=words):
            mcp_main.main(["--checkpoint=/nowhere", *flags])
    assert tools.Files(str(tmp_path), max_bytes=1)
