"""Downloads that resume, are bounded in size, and appear at their path only when complete."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from vilam3_experts import __version__
from vilam3_experts.weight_files.sources import Download
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.runtime import locks

_TIMEOUT_S = 30
_ATTEMPTS = 3
_CHUNK_BYTES = 1 << 20
_MAX_EXPANSION = 4  # of an archive; weights hardly compress


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect that leaves https."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError("it redirects to an address without https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_Redirects)


def from_url(download: Download, target: Path) -> None:
    """Fetches a plain URL to `target`.

    A partial download in `.NAME.partial` is resumed if a strong ETag shows that the file is unchanged, and
    restarted otherwise.

    Raises `UnavailableError` if the server cannot be reached or the connection breaks, and `UserError` if
    there is no such file or it is larger than `download.max_bytes`.
    """
    partial = target.with_name(f".{target.name}.partial")
    state = target.with_name(f".{target.name}.etag")
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as file:
        if not locks.try_lock(file.fileno()):
            raise UserError(f"{target}: another process is fetching it; wait until it is done")
        for attempt in range(1, _ATTEMPTS + 1):
            before = file.tell()
            try:
                _transfer(download, file, state)
                break
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                    raise UserError(
                        f"{download.url}: the server answers {error.code} {error.reason};"
                        f" get {download.file} elsewhere and put it into {target.parent}"
                    ) from error
                if attempt == _ATTEMPTS and file.tell() == before:
                    raise _unreachable(download, target, error) from error
                if attempt == _ATTEMPTS:
                    raise UnavailableError(
                        f"{download.url}: the connection broke at {file.tell()} bytes; start again to resume"
                    ) from error
                time.sleep(attempt)
        os.fsync(file.fileno())
        partial.replace(target)
        state.unlink(missing_ok=True)


def _unreachable(download: Download, target: Path, error: Exception) -> UnavailableError:
    reason = getattr(error, "reason", None) or error
    return UnavailableError(
        f"{download.origin}: cannot be reached ({str(reason)[:200] or type(error).__name__}); fetch it where"
        f" there is a network, put it into {target.parent} as {download.file} and start again"
    )


def _transfer(download: Download, file: BinaryIO, state: Path) -> None:
    """Appends the missing bytes to `file`."""
    done, etag = file.tell(), _stored_etag(state, download.url)
    headers = {"User-Agent": f"vilam3-experts/{__version__}", "Accept-Encoding": "identity"}
    if done and etag:
        headers |= {"Range": f"bytes={done}-", "If-Range": etag}
    request = urllib.request.Request(download.url, headers=headers)
    with _OPENER.open(request, timeout=_TIMEOUT_S) as response:
        content_range = response.headers.get("Content-Range", "")
        if response.status != 206 or not content_range.startswith(f"bytes {done}-"):
            file.truncate(0)
            file.seek(0)
            done = 0
        found = response.headers.get("ETag", "")
        strong = found if found.startswith('"') else ""
        state.write_text(json.dumps({"url": download.url, "etag": strong}))
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdigit() else None
        if total is not None and total > download.max_bytes:
            raise _too_large(download, total)
        with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=download.file[:40]) as bar:
            while chunk := response.read(_CHUNK_BYTES):
                if file.tell() + len(chunk) > download.max_bytes:
                    file.truncate(0)
                    raise _too_large(download, file.tell() + len(chunk))
                file.write(chunk)
                bar.update(len(chunk))
    file.flush()
    if total is not None and file.tell() != total:
        raise http.client.IncompleteRead(b"", total - file.tell())


def _too_large(download: Download, found: int) -> UserError:
    return UserError(
        f"{download.origin}: {found} bytes or more, expected about {download.megabytes:g} MB;"
        f" check whether the address serves something else now"
    )


def _stored_etag(state: Path, url: str) -> str:
    """The ETag of the partial file; '' if it is unknown or belongs to another URL."""
    try:
        stored = json.loads(state.read_text())
        return str(stored["etag"]) if stored["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def from_hub(download: Download, revision: str, target: Path, *, endpoint: str | None = None) -> str:
    """Fetches a file of the Hugging Face hub to `target`, without the user's token; returns its commit.

    `revision` is a commit, or a branch or tag that is resolved to one; `endpoint` defaults to `HF_ENDPOINT`
    or the public hub. Raises `UnavailableError` if the hub cannot be reached, and `UserError` if there is no
    such file or it is too large.
    """
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    staging = target.parent / f".{target.name}.hub"
    try:
        url = huggingface_hub.hf_hub_url(download.repo, download.path, revision=revision, endpoint=endpoint)
        found = huggingface_hub.get_hf_file_metadata(url, token=False, timeout=_TIMEOUT_S)
        if found.size is None or found.size > download.max_bytes:
            raise _too_large(download, found.size or 0)
        commit = found.commit_hash or revision
        staging.mkdir(parents=True, exist_ok=True)
        fetched = huggingface_hub.hf_hub_download(
            download.repo, download.path, revision=commit, local_dir=staging, token=False, endpoint=endpoint
        )
    except (hub_errors.RepositoryNotFoundError, hub_errors.EntryNotFoundError) as error:
        if isinstance(error, hub_errors.LocalEntryNotFoundError):
            raise _unreachable(download, target, error) from error
        raise UserError(f"{download.origin}: not found at revision {revision}; get it elsewhere") from error
    except UserError:
        raise
    except Exception as error:  # the hub's errors, and those of its HTTP library
        raise _unreachable(download, target, error) from error
    if Path(fetched).stat().st_size != found.size:
        raise UnavailableError(f"{download.origin}: the download is incomplete; start again")
    Path(fetched).replace(target)
    shutil.rmtree(staging)
    return commit


def unpack(archive: Path, download: Download, folder: Path) -> None:
    """Extracts the listed members of a bundle's archive, and nothing else, to paths chosen by us.

    Raises `UserError` if the archive is damaged, or a member is missing, duplicated or too large.
    """
    fix = "delete it and fetch it again"
    try:
        with zipfile.ZipFile(archive) as opened:
            members: dict[str, list[zipfile.ZipInfo]] = {}
            for info in opened.infolist():
                parts = info.filename.split("/", 1)
                members.setdefault(parts[-1] if len(parts) == 2 else "", []).append(info)
            for member in download.unpack:
                found = members.get(member, [])
                if len(found) != 1:
                    raise UserError(f"{archive}: has {len(found)} members {member}, expected one; {fix}")
                if found[0].file_size > _MAX_EXPANSION * download.max_bytes:
                    raise UserError(f"{archive}: {member} would be {found[0].file_size} bytes; {fix}")
                target = folder / member
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".{target.name}.partial")
                with opened.open(found[0]) as source, partial.open("wb") as sink:
                    # zipfile reads at most the stated size, and checks the CRC at the end.
                    shutil.copyfileobj(source, sink, _CHUNK_BYTES)
                partial.replace(target)
    # zipfile: NotImplementedError for unknown compression, RuntimeError for encryption.
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(f"{archive}: not an archive of a bundle ({type(error).__name__}); {fix}") from error
