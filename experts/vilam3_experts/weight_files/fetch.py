"""Downloads: resumed where they stopped, bounded, and in place only when whole."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from vilam3_experts import __version__
from vilam3_experts.weight_files.sources import Download
from vilam3_jax.errors import UnavailableError, UserError

_TIMEOUT_S = 30
_TRIES = 3
_PIECE = 1 << 20
_UNPACKED_TIMES = 4  # an archive of weights hardly shrinks


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect that leaves https."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise urllib.error.URLError("it redirects to an address without https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_Redirects)


def from_url(download: Download, target: Path) -> None:
    """Fetches a plain address into `target`.

    What a broken connection left in `.NAME.partial` is continued if the server says that the file is the same
    (a strong ETag); otherwise it is fetched anew.

    Raises:
      UnavailableError: the server cannot be reached, or the connection broke.
      UserError: the server has no such file, or it is larger than `download.max_bytes`.
    """
    partial = target.with_name(f".{target.name}.partial")
    state = target.with_name(f".{target.name}.etag")
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as file, _alone(file, target):
        for attempt in range(1, _TRIES + 1):
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
                if attempt == _TRIES and file.tell() == before:
                    raise _unreachable(download, target, error) from error
                if attempt == _TRIES:
                    raise UnavailableError(
                        f"{download.url}: the connection broke at {file.tell()} bytes; start again to go on"
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


@contextlib.contextmanager
def _alone(file: BinaryIO, target: Path) -> Iterator[None]:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"{target}: another process fetches it; wait until it is done") from error
    yield  # closing the file ends the lock


def _transfer(download: Download, file: BinaryIO, state: Path) -> None:
    """Appends what is missing to `file`."""
    done, etag = file.tell(), _etag(state, download.url)
    headers = {"User-Agent": f"vilam3-experts/{__version__}", "Accept-Encoding": "identity"}
    if done and etag:
        headers |= {"Range": f"bytes={done}-", "If-Range": etag}
    request = urllib.request.Request(download.url, headers=headers)
    with _OPENER.open(request, timeout=_TIMEOUT_S) as response:
        if response.status != 206 or not response.headers.get("Content-Range", "").startswith(
            f"bytes {done}-"
        ):
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
            while piece := response.read(_PIECE):
                if file.tell() + len(piece) > download.max_bytes:
                    file.truncate(0)
                    raise _too_large(download, file.tell() + len(piece))
                file.write(piece)
                bar.update(len(piece))
    file.flush()
    if total is not None and file.tell() != total:
        raise http.client.IncompleteRead(b"", total - file.tell())


def _too_large(download: Download, found: int) -> UserError:
    return UserError(
        f"{download.origin}: {found} bytes or more, expected about {download.megabytes:g} MB;"
        f" the address may serve something else now, look at it"
    )


def _etag(state: Path, url: str) -> str:
    """The ETag of the partial file, '' if it is unknown or of another address."""
    try:
        stored = json.loads(state.read_text())
        return str(stored["etag"]) if stored["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def from_hub(download: Download, revision: str, target: Path, *, endpoint: str | None = None) -> str:
    """Fetches a file of the Hugging Face hub into `target`, without the user's token.

    Args:
      download: repository and path.
      revision: a commit, or a branch or tag that is resolved to one.
      target: where it lands.
      endpoint: the hub's address; `HF_ENDPOINT` or the public hub by default.

    Returns:
      The commit.

    Raises:
      UnavailableError: the hub cannot be reached.
      UserError: no such file, or it is too large.
    """
    import huggingface_hub
    from huggingface_hub import errors as hub_errors

    staging = target.parent / f".{target.name}.hub"
    try:
        url = huggingface_hub.hf_hub_url(download.repo, download.path, revision=revision, endpoint=endpoint)
        known = huggingface_hub.get_hf_file_metadata(url, token=False, timeout=_TIMEOUT_S)
        if known.size is None or known.size > download.max_bytes:
            raise _too_large(download, known.size or 0)
        commit = known.commit_hash or revision
        staging.mkdir(parents=True, exist_ok=True)
        got = huggingface_hub.hf_hub_download(
            download.repo,
            download.path,
            revision=commit,
            local_dir=staging,
            token=False,
            endpoint=endpoint,
        )
    except (hub_errors.RepositoryNotFoundError, hub_errors.EntryNotFoundError) as error:
        if isinstance(error, hub_errors.LocalEntryNotFoundError):
            raise _unreachable(download, target, error) from error
        raise UserError(f"{download.origin}: not there at revision {revision}; get it elsewhere") from error
    except (hub_errors.HfHubHTTPError, hub_errors.OfflineModeIsEnabled) as error:
        raise _unreachable(download, target, error) from error
    except UserError:
        raise
    except Exception as error:  # the hub's client raises its HTTP library's errors
        raise _unreachable(download, target, error) from error
    if Path(got).stat().st_size != known.size:
        raise UnavailableError(f"{download.origin}: came incomplete; start again")
    Path(got).replace(target)
    shutil.rmtree(staging)
    return commit


def unpack(archive: Path, download: Download, folder: Path) -> None:
    """Takes the wanted members out of a bundle's archive; nothing else, and to our own names.

    Raises:
      UserError: damaged, a member is missing or there twice, or it is larger than weights of this kind are.
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
                    raise UserError(f"{archive}: {member} is in it {len(found)} times; {fix}")
                if found[0].file_size > _UNPACKED_TIMES * download.max_bytes:
                    raise UserError(f"{archive}: {member} would be {found[0].file_size} bytes; {fix}")
                target = folder / member
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".{target.name}.partial")
                with opened.open(found[0]) as source, partial.open("wb") as sink:
                    # zipfile reads no more than the stated size, and checks the CRC at the end.
                    shutil.copyfileobj(source, sink, _PIECE)
                partial.replace(target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise UserError(f"{archive}: is no archive of a bundle ({type(error).__name__}); {fix}") from error
