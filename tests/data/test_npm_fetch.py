"""Fetching the real tokenizers: the user's registry, pinned bytes, and what counts as unreachable."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading

import pytest
import real_tokenizers
from real_tokenizers import NpmPackage, Unreachable, archive_of, npm_registry, tokenizer_folder

from vilam3_jax.datasets.package_index import Member
from vilam3_jax.errors import UserError


def made(files: dict[str, bytes]) -> tuple[bytes, NpmPackage]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as bundle:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            bundle.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    members = tuple(
        Member(name, hashlib.sha256(content).hexdigest(), len(content))
        for name, content in files.items()
        if name.startswith("package/models/")
    )
    return data, NpmPackage("@scope/words", "1.0.0", hashlib.sha256(data).hexdigest(), members)


ARCHIVE, PACKAGE = made(
    {"package/models/tokenizer.json": b"{}", "../outside.json": b"x", "package/a.js": b"y"}
)


@pytest.fixture
def registry(monkeypatch):
    """A registry that serves `files`, and logs what it was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            server.log.append(self.path)
            body = server.files.get(self.path)
            if body is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *arguments: None
    server.log, server.files = [], {"/npm/@scope/words/-/words-1.0.0.tgz": ARCHIVE}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_port}/npm/")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(real_tokenizers.shutil, "which", lambda program: None)
    yield server
    server.shutdown()
    server.server_close()


def test_listed_files_only_and_once(registry, monkeypatch, tmp_path):
    monkeypatch.setitem(real_tokenizers.PACKAGES, "made", PACKAGE)
    out = tmp_path / "out"
    out.mkdir()
    folder = tokenizer_folder("made", out, tmp_path / "cache")
    assert [path.name for path in tmp_path.rglob("*.json")] == ["tokenizer.json"]
    assert (folder / "tokenizer.json").read_bytes() == b"{}"
    asked = len(registry.log)
    archive_of(PACKAGE, tmp_path / "cache")
    assert len(registry.log) == asked


def test_other_bytes_are_refused_unopened(registry, tmp_path):
    registry.files = dict.fromkeys(registry.files, b"not the archive")
    with pytest.raises(UserError, match="sha256"):
        archive_of(PACKAGE, tmp_path)
    assert not list(tmp_path.glob("*.tgz"))


def test_a_registry_without_the_package_is_an_error_not_a_skip(registry, tmp_path):
    registry.files = {}
    with pytest.raises(UserError, match="HTTP 404"):
        archive_of(PACKAGE, tmp_path)


def test_no_answer_is_unreachable(registry, monkeypatch, tmp_path):
    registry.server_close()
    monkeypatch.setenv("npm_config_registry", "http://name:secret@127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"no answer from http://127\.0\.0\.1:9/") as refused:
        archive_of(PACKAGE, tmp_path)
    assert "secret" not in str(refused.value)


def test_registry_is_the_users(monkeypatch):
    answers = {"registry": "https://mine.example/npm/\n", "@lenml:registry": "undefined\n"}
    monkeypatch.setattr(real_tokenizers.shutil, "which", lambda program: "/usr/bin/npm")
    monkeypatch.setattr(
        real_tokenizers.subprocess,
        "run",
        lambda command, **_: real_tokenizers.subprocess.CompletedProcess(
            command, 0, answers[command[-1]], ""
        ),
    )
    for name in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        monkeypatch.delenv(name, raising=False)
    assert npm_registry("@lenml") == npm_registry() == "https://mine.example/npm"
    answers["@lenml:registry"] = "https://scoped.example\n"
    assert npm_registry("@lenml") == "https://scoped.example" and npm_registry() == "https://mine.example/npm"
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://environment.example/")
    assert npm_registry() == "https://environment.example"
    monkeypatch.delenv("NPM_CONFIG_REGISTRY")
    monkeypatch.setattr(real_tokenizers.shutil, "which", lambda program: None)
    with pytest.raises(Unreachable, match="install npm or set npm_config_registry"):
        npm_registry("@lenml")
