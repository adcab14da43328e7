"""Sources of weights: downloads from a local server, the lock file, the quarantined converter."""

import collections
import dataclasses
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import weight_server
import xrv_reference
from safetensors.torch import load_file
from vilam3_experts import descriptors
from vilam3_experts.cli import main
from vilam3_experts.weight_files import fetch, pickled
from vilam3_experts.weight_files.install import install, to_safetensors
from vilam3_experts.weight_files.lock import FILE, LockFile
from vilam3_experts.weight_files.pickled import InvalidFileError, read_tensors
from vilam3_experts.weight_files.sources import Download, Source
from vilam3_experts.weights import load_weights
from vilam3_experts.xrv.expert import Ensemble
from vilam3_experts.xrv.members import Table, load_table

from vilam3_jax.errors import UnavailableError, UserError

CONTENT = np.random.default_rng(0).bytes(300_000)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def server():
    with weight_server.serving() as running:
        running.files["/w.bin"] = CONTENT
        yield running


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)


def small(server, **fields):
    return Download("w.bin", 0.4, url=f"{server.url}/w.bin", **fields)


def left_in(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# Downloads


def test_download_lands_whole_under_our_name(server, tmp_path):
    server.redirect["/w.bin"] = f"{server.url}/../../other%2Fname"
    server.files["/../../other%2Fname"] = CONTENT
    fetch.from_url(small(server), tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == CONTENT
    assert left_in(tmp_path) == ["w.bin"]


def test_broken_download_goes_on_where_it_stopped(server, tmp_path):
    server.break_after = [100_000, 50_000]
    fetch.from_url(small(server), tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == CONTENT
    assert [wanted for _, _, wanted in server.requests] == ["", "bytes=100000-", "bytes=150000-"]


def test_a_later_start_goes_on_unless_the_file_changed(server, tmp_path):
    server.break_after = [100_000, 0, 0]
    with pytest.raises(UnavailableError, match=r"cannot be reached|broke at 100000 bytes; start again"):
        fetch.from_url(small(server), tmp_path / "w.bin")
    assert not (tmp_path / "w.bin").exists()
    server.files["/w.bin"], server.etag = CONTENT[::-1], '"v2"'
    fetch.from_url(small(server), tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == CONTENT[::-1]


def test_without_an_etag_nothing_is_pieced_together(server, tmp_path):
    server.etag, server.break_after = "", [100_000]
    fetch.from_url(small(server), tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == CONTENT
    assert [wanted for _, _, wanted in server.requests] == ["", ""]


@pytest.mark.parametrize("length", [True, False])
def test_oversized_download_is_refused(server, tmp_path, length):
    server.files["/w.bin"], server.length = bytes(2_000_000), length
    with pytest.raises(UserError, match=r"expected about 0\.4 MB"):
        fetch.from_url(small(server), tmp_path / "w.bin")
    assert not (tmp_path / "w.bin").exists()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 1000


def test_server_without_the_file_and_no_server(server, tmp_path):
    server.status = 404
    with pytest.raises(UserError, match="answers 404") as refused:
        fetch.from_url(small(server), tmp_path / "w.bin")
    assert not isinstance(refused.value, UnavailableError)
    server.status = 503
    with pytest.raises(UnavailableError, match="Service Unavailable"):
        fetch.from_url(small(server), tmp_path / "w.bin")
    nowhere = Download("w.bin", 1, url="http://127.0.0.1:9/w.bin")
    with pytest.raises(
        UnavailableError, match=r"cannot be reached .*refused.*; fetch it where there is a network"
    ):
        fetch.from_url(nowhere, tmp_path / "w.bin")


def test_https_is_not_left():
    handler = fetch._Redirects()
    request = fetch.urllib.request.Request("https://example.org/w.bin")
    with pytest.raises(fetch.urllib.error.URLError, match="without https"):
        handler.redirect_request(request, None, 302, "Found", {}, "http://example.org/w.bin")


HUB = Download("w.bin", 0.4, repo="someone/model", path="deeper/w.bin")


def test_hub_resolves_a_branch_to_its_commit(server, tmp_path):
    for revision in ("main", weight_server.COMMIT):
        server.files[f"/someone/model/resolve/{revision}/deeper/w.bin"] = CONTENT
    commit = fetch.from_hub(HUB, "main", tmp_path / "w.bin", endpoint=server.url)
    assert commit == weight_server.COMMIT
    assert (tmp_path / "w.bin").read_bytes() == CONTENT and left_in(tmp_path) == ["w.bin"]


def test_hub_refusals(server, tmp_path):
    target = tmp_path / "w.bin"
    with pytest.raises(UserError, match=r"someone/model: deeper/w\.bin"):
        fetch.from_hub(HUB, "main", target, endpoint=server.url)
    server.files["/someone/model/resolve/main/deeper/w.bin"] = bytes(2_000_000)
    with pytest.raises(UserError, match=r"2000000 bytes or more, expected about 0\.4 MB"):
        fetch.from_hub(HUB, "main", target, endpoint=server.url)
    with pytest.raises(UnavailableError, match="cannot be reached"):
        fetch.from_hub(HUB, "main", target, endpoint="http://127.0.0.1:9")
    assert not target.exists()


# The lock file, and whole sources


def url_source(*downloads):
    return Source("release", "url", "1", "MIT", downloads)


def test_first_use_pins_and_a_change_is_refused(server, tmp_path):
    source = url_source(small(server))
    ((path, pin),) = install("TOY", source, tmp_path)
    assert path == tmp_path / "TOY" / "w.bin" and pin.sha256 == sha256(CONTENT)
    stored = json.loads((tmp_path / FILE).read_text())["files"]["TOY/w.bin"]
    assert stored["sha256"] == sha256(CONTENT) and stored["origin"] == f"{server.url}/w.bin"
    fetches = len(server.requests)
    list(install("TOY", source, tmp_path))
    assert len(server.requests) == fetches  # existing files are not fetched again

    path.write_bytes(b"changed")
    with pytest.raises(
        UserError, match=rf"TOY/w\.bin: sha256 .*, but {sha256(CONTENT)} was pinned at first use"
    ):
        list(install("TOY", source, tmp_path))
    path.unlink()
    server.files["/w.bin"] = CONTENT[::-1]
    with pytest.raises(UserError, match="pinned at first use"):
        list(install("TOY", source, tmp_path))
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"version": 2, "files": {}}', '{"version": 1, "files": {"a": {"sha256": "x", "size": 1}}}'],
)
def test_damaged_lock_file_is_refused(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=rf"{FILE}: not a lock file of version 1"):
        LockFile(tmp_path)


def test_bundle_is_unpacked_by_our_names_only(server, tmp_path):
    def archive(*members):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as made:
            for name, content in members:
                made.writestr(name, content)
        return buffer.getvalue()

    state = io.BytesIO()
    torch.save({"a.weight": torch.arange(6.0).reshape(2, 3)}, state)
    members = [("toy/configs/metadata.json", b"{}"), ("toy/models/model.pt", state.getvalue())]
    hostile = [("toy/../../evil.py", b"x"), ("toy/scripts/run.py", b"x"), ("/etc/evil", b"x")]
    server.files["/w.bin"] = archive(*members, *hostile)
    download = small(
        server,
        unpack=("configs/metadata.json", "models/model.pt"),
        convert=(("models/model.pt", "models/model.safetensors"),),
    )
    found = dict(install("TOY", url_source(download), tmp_path / "w"))
    made = tmp_path / "w" / "TOY" / "models" / "model.safetensors"
    assert set(found) == {tmp_path / "w" / "TOY" / "configs" / "metadata.json", made}
    assert found[made].converted_from == sha256(state.getvalue())
    np.testing.assert_array_equal(load_file(made)["a.weight"], [[0, 1, 2], [3, 4, 5]])
    assert left_in(tmp_path) == ["metadata.json", "model.safetensors", FILE]

    for name, bad, told in [
        ("none", archive(members[0]), "has 0 members models/model.pt, expected one"),
        ("twice", archive(*members, ("b/models/model.pt", b"x")), "has 2 members models/model.pt, expected"),
        ("cut", archive(*members)[:90], "not an archive of a bundle"),
    ]:
        server.files["/w.bin"] = bad
        with pytest.raises(UserError, match=told):
            list(install(name, url_source(download), tmp_path / "w"))


@pytest.mark.slow
def test_release_file_becomes_a_running_expert(server, tmp_path):
    """End to end: a module pickled like the release is fetched, converted, pinned, loaded and run."""
    member = next(m for m in load_table().members if m.name == "densenet121-res224-all")
    network = xrv_reference.densenet(5)
    release = io.BytesIO()
    torch.save(network, release, _use_new_zipfile_serialization=False)
    server.files["/w.bin"] = release.getvalue()
    download = Download(
        member.file, 29, url=f"{server.url}/w.bin", convert=((member.file, member.weights_file),)
    )
    list(install("CXR", url_source(download), tmp_path))
    assert left_in(tmp_path) == [member.weights_file, FILE]

    descriptor = dataclasses.replace(
        descriptors.CXR, weights=tuple(w for w in descriptors.CXR.weights if w.name == member.name)
    )
    weights = load_weights(descriptor, tmp_path)
    assert weights.sha256 == sha256((tmp_path / "CXR" / member.weights_file).read_bytes())
    table = Table(load_table().classes, (member,), {})
    film = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    ours = Ensemble(weights, table=table).run(film, "").probabilities
    pixels = torch.from_numpy((2 * (film[None, None, :, :, 0].astype(np.float32) / 255) - 1) * 1024)
    theirs = xrv_reference.answer(network, pixels, torch.tensor(member.thresholds))[0].tolist()
    assert list(ours.values()) == pytest.approx(theirs, abs=1e-5)

    (tmp_path / "CXR" / member.weights_file).write_bytes(b"other")
    with pytest.raises(UserError, match="pinned at first use; restore the file"):
        load_weights(descriptor, tmp_path)


# The command


def test_command_says_where_everything_comes_from(tmp_path, capsys):
    assert main(["weights"]) == 0
    told = capsys.readouterr().out
    for member in load_table().members:
        assert member.url in told
    assert "licence" in told and "deepbet==1.0.2" in told
    assert main(["weights", "--expert", "CXR", "--weights", str(tmp_path)]) == 1
    missing = capsys.readouterr().out
    assert f"run `vilam3-experts weights --fetch --expert CXR --weights {tmp_path}`" in missing


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--fetch", "--expert", "CXR"], "give --expert and --weights"),
        (["--fetch", "--weights", "W"], "give --expert and --weights"),
        (["--source", "hub"], "add --fetch"),
        (["--fetch", "--expert", "BRAINSEG", "--weights", "W"], "nothing to fetch; its files are in deepbet"),
        (
            ["--fetch", "--expert", "CXR", "--weights", "W", "--source", "x"],
            "no source 'x'; choose from release",
        ),
        (["--expert", "NONE"], "no expert 'NONE'"),
    ],
)
def test_command_refuses(given, told, capsys):
    assert main(["weights", *given]) == 2
    assert told in capsys.readouterr().err


def test_command_fetches(server, tmp_path, monkeypatch, capsys):
    toy = dataclasses.replace(
        descriptors.CXR, weights=(), needs_folder=True, sources=(url_source(small(server)),)
    )
    monkeypatch.setattr(descriptors, "registry", lambda: {"CXR": toy})
    given = ["--expert", "CXR", "--weights", str(tmp_path)]
    assert main(["weights", *given]) == 1
    assert main(["weights", "--fetch", *given]) == 0
    assert sha256(CONTENT) in capsys.readouterr().out
    assert main(["weights", *given]) == 0
    assert "ok: 1 files" in capsys.readouterr().out
    weights = load_weights(toy, tmp_path)
    assert weights.folder == tmp_path / "CXR" and weights.sha256 == sha256(CONTENT)
    (tmp_path / "CXR" / "w.bin").write_bytes(b"changed")
    assert main(["weights", *given]) == 1
    with pytest.raises(UserError, match="pinned at first use"):
        load_weights(toy, tmp_path)


def test_command_without_a_network(tmp_path, monkeypatch, capsys):
    nowhere = url_source(Download("w.bin", 1, url="http://127.0.0.1:9/w.bin"))
    toy = dataclasses.replace(descriptors.CXR, sources=(nowhere,))
    monkeypatch.setattr(descriptors, "registry", lambda: {"CXR": toy})
    given = ["weights", "--fetch", "--expert", "CXR", "--weights", str(tmp_path)]
    assert main(given) == 1  # a restart with a network helps
    told = capsys.readouterr().err
    assert told.startswith("error: http://127.0.0.1:9/w.bin: cannot be reached") and told.count("\n") == 1
    (tmp_path / "CXR" / "w.bin").write_bytes(CONTENT)  # placed there by the user
    assert main(given) == 0


# The converter


class Small(torch.nn.Module):
    """A class without a stub."""


def module():
    torch.manual_seed(0)
    made = torch.nn.Sequential(
        collections.OrderedDict(
            conv=torch.nn.Conv2d(1, 4, 3), norm=torch.nn.BatchNorm2d(4), act=torch.nn.ReLU()
        )
    )
    made.register_buffer("transient", torch.zeros(3), persistent=False)
    made.register_buffer("scale", torch.ones(2, dtype=torch.float16))
    made.tied = made.conv
    return made


def saved(value, path, legacy=False):
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_module_is_read_as_its_state_dict(tmp_path, legacy):
    made = module()
    found = read_tensors(saved(made, tmp_path / "m.pt", legacy))
    wanted = made.state_dict()
    assert found.keys() == wanted.keys() and "transient" not in found
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    views = {"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.arange(9)[2:5], "c": torch.zeros(0, 3)}
    found = read_tensors(saved(views, tmp_path / "v.pt", legacy))
    assert all(torch.equal(found[name], tensor) for name, tensor in views.items())


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(mark):
    return {
        "posix.system": Calls(os.system, f"touch {mark}"),
        "builtins.eval": Calls(eval, f"open({str(mark)!r}, 'w')"),
        "builtins.exec": Calls(exec, f"open({str(mark)!r}, 'w')"),
        "builtins.getattr": Calls(getattr, "text", "encode"),
        "commands.Popen": Calls(subprocess.Popen, ["touch", str(mark)]),
        "torch.hub.load": Calls(torch.hub.load, "someone/model", "x"),
        "test_weights.Small": Small(),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", list(hostile("")))
def test_other_globals_are_refused_by_name(tmp_path, name, legacy):
    mark = tmp_path / "mark"
    for value in (hostile(mark)[name], {"weight": torch.zeros(3), "x": hostile(mark)[name]}):
        path = saved(value, tmp_path / "m.pt", legacy)
        with pytest.raises(
            InvalidFileError, match=rf"^it asks for {name.replace('builtins', '(builtins|__builtin__)')}"
        ):
            read_tensors(path)
    assert not mark.exists()


def deep(times):
    made = torch.nn.Sequential(torch.nn.ReLU())
    for _ in range(times):
        made = torch.nn.Sequential(made, made)  # 2**times paths
    return made


def cycle():
    made = torch.nn.Sequential(torch.nn.ReLU())
    made._modules["self"] = made
    return made


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (deep(40), "nested too deeply"),
        (cycle(), "nested too deeply"),
        ({"a": torch.zeros(1).expand(10**9)}, "larger than"),
        ({"a": 3}, "entry 'a' is not a tensor"),
        ({1: torch.zeros(1)}, "the name of a tensor is not a string"),
        ([torch.zeros(1)], "neither a module nor a dict"),
        (torch.nn.ReLU(), "holds no tensors"),
    ],
)
def test_odd_content_is_refused(tmp_path, value, told):
    for legacy in (False, True):
        with pytest.raises(InvalidFileError, match=told):
            read_tensors(saved(value, tmp_path / "m.pt", legacy))


def test_truncated_files_are_refused(tmp_path):
    for legacy in (False, True):
        whole = saved(module(), tmp_path / "m.pt", legacy).read_bytes()
        for size in (0, 1, 2, 20, len(whole) // 2, len(whole) - 5):
            (tmp_path / "cut.pt").write_bytes(whole[:size])
            with pytest.raises(InvalidFileError):
                read_tensors(tmp_path / "cut.pt")


def rezipped(path, change):
    """The archive of `path` with members passed through `change(name, content) -> content`."""
    with zipfile.ZipFile(path) as archive:
        members = [(n, change(n, archive.read(n))) for n in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def test_archives_that_are_not_torchs_are_refused(tmp_path):
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(50_000_000))
    with pytest.raises(InvalidFileError, match="compressed"):
        read_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"x")
        archive.writestr("b/data.pkl", b"x")
    with pytest.raises(InvalidFileError, match=r"no data\.pkl, or several"):
        read_tensors(path)
    saved(module(), path)
    with pytest.raises(InvalidFileError, match="big-endian"):
        read_tensors(rezipped(path, lambda n, c: b"big" if n.endswith("byteorder") else c))
    saved(module(), path)
    with pytest.raises(InvalidFileError, match="cut short"):
        read_tensors(rezipped(path, lambda n, c: c[:-4] if "/data/" in n else c))
    content = bytearray(saved(module(), path).read_bytes())
    at = content.rindex(b"PK\x01\x02")  # the last entry of the directory claims a gigabyte
    content[at + 24 : at + 28] = (1 << 30).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(InvalidFileError, match="larger than the archive"):
        read_tensors(path)


def test_quarantine_refuses_in_one_sentence_and_leaves_nothing(tmp_path):
    mark, path, out = tmp_path / "mark", tmp_path / "m.pt", tmp_path / "m.safetensors"
    saved(hostile(mark)["posix.system"], path)
    with pytest.raises(
        UserError, match=r"m\.pt: cannot be converted: it asks for posix\.system, .*; fetch the file"
    ):
        to_safetensors(path, out)
    # A memo of 2^31 entries would take 32 GB.
    path.write_bytes(pickle.PROTO + b"\x02]" + pickle.LONG_BINPUT + (2**31 - 1).to_bytes(4, "little") + b".")
    with pytest.raises(UserError, match="cannot be converted: it asks for more memory"):
        to_safetensors(path, out)
    assert left_in(tmp_path) == ["m.pt"]


def test_quarantine_converts_what_both_readers_read(tmp_path):
    path, out = tmp_path / "m.pt", tmp_path / "m.safetensors"
    wanted = module().state_dict()
    for value in (module(), {"state_dict": wanted}):
        to_safetensors(saved(value, path), out)
        found = load_file(out)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


HOOK = """
import os, pathlib, socket, subprocess, sys
from vilam3_experts.weight_files import quarantine
quarantine._drop_network()
quarantine._add_audit_hook(pathlib.Path(sys.argv[1]))
open(sys.argv[1], "w").close()
try:
    {action}
except BaseException as error:
    print("caught", error)
print("survived")
"""


@pytest.mark.parametrize(
    "action",
    [
        "os.system('true')",
        "subprocess.run(['true'])",
        "socket.create_connection(('127.0.0.1', 9))",
        "open(sys.argv[1] + '2', 'w')",
        "os.fork()",
        "os.remove(sys.argv[1])",
        "__import__('ctypes').CDLL(None).system(b'true')",
    ],
)
def test_quarantine_ends_where_code_would_run(tmp_path, action):
    """Code that tricked the unpickler into running would end the process."""
    code = HOOK.format(action=action)
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 3 and "survived" not in done.stdout and "refused" in done.stderr


FUZZ = """
import random, sys
from pathlib import Path
from vilam3_experts.weight_files import quarantine
from vilam3_experts.weight_files.pickled import InvalidFileError, read_tensors
source = Path(sys.argv[1]).read_bytes()
quarantine._limit_resources(len(source))
out = Path(sys.argv[1] + ".fuzz")
rng, refused = random.Random(0), 0
for _ in range(600):
    content = bytearray(source)
    for _ in range(rng.choice((1, 3, 20))):
        content[rng.randrange(min(len(content), 6000))] = rng.choice((rng.randrange(256), *b"crRbiotq."))
    out.write_bytes(content)
    try:
        read_tensors(out)
    except (InvalidFileError, MemoryError):
        refused += 1
print(refused)
"""


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
def test_damage_is_refused_or_harmless(tmp_path, legacy):
    path = saved(module(), tmp_path / "m.pt", legacy)
    done = subprocess.run([sys.executable, "-c", FUZZ, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100


def test_stand_ins_do_nothing():
    made = pickled._Stub(1, x=2)
    made.__setstate__({"_modules": 3})
    assert made.attributes == {"_modules": 3}
