"""Samples of WebDataset shards, read from tar files without extraction.

The rules are WebDataset's (`webdataset/tariterators.py`: `base_plus_ext`, `group_by_keys`): a sample's key is
the path up to the first dot of the base name, its members are adjacent, and extensions are unique. A shard is
untrusted input: nothing is written to disk, links and devices are skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

from etils import epath

from vilam3_jax.data.examples import ImageRef, path_problem
from vilam3_jax.datasets.conversations import text_of
from vilam3_jax.datasets.dataset import Context, SkipItem, Skipped
from vilam3_jax.datasets.image_files import stored_image
from vilam3_jax.runtime import paths

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_MAX_MEMBER_BYTES = 64 << 20
_MAX_SAMPLE_BYTES = 256 << 20
_MAX_MEMBERS = 64
_MAX_JSON_BYTES = 4 << 20
_MAX_HEADER_BYTES = 1 << 20
_PAX_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_HEADERS = (*_PAX_HEADERS, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_BLOCK = tarfile.BLOCKSIZE


class _Member(tarfile.TarInfo):
    """Refuses huge names and extended headers, which tarfile would read into memory."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _HEADERS and self.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header is too large")
        return super()._proc_member(archive)  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Members with the same key.

    Attributes:
      key: path without extension.
      parts: extension in lower case → content.
      problem: the reason why the sample is unusable, or None.
    """

    key: str
    parts: Mapping[str, bytes]
    problem: str | None = None

    def image(self) -> ImageRef:
        """The image, stored.

        Raises:
          SkipItem: there is not exactly one, or its format is not supported.
        """
        found = [extension for extension in IMAGE_EXTENSIONS if extension in self.parts]
        if len(found) != 1:
            raise SkipItem(f"has {len(found)} images ({', '.join(IMAGE_EXTENSIONS[:4])}, ...); one is needed")
        return stored_image(self.parts[found[0]], f"{self.key}.{found[0]}")

    def record(self) -> dict[str, Any]:
        """The object in `.json`; empty without that member.

        Raises:
          SkipItem: it is not an object.
        """
        data = self.parts.get("json")
        if data is None:
            return {}
        if len(data) > _MAX_JSON_BYTES:
            raise SkipItem(f"its .json has {len(data)} bytes; up to {_MAX_JSON_BYTES} are read")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            raise SkipItem("its .json is not JSON") from None
        if not isinstance(value, dict):
            raise SkipItem("its .json is not an object")
        return value


def caption(sample: Sample, record: Mapping[str, Any]) -> str:
    """The caption: `.txt`, else the field that img2dataset or LAION use.

    Raises:
      SkipItem: the caption is missing or not UTF-8, or the download of the image failed.
    """
    if record.get("status", "success") != "success":
        raise SkipItem("its image was not downloaded (status is not success)")
    try:
        text = sample.parts["txt"].decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SkipItem("its .txt is not UTF-8 text") from None
    except KeyError:
        names = {str(name).lower(): value for name, value in record.items()}
        text = next((names[name] for name in ("caption", "text") if names.get(name) is not None), None)
    return text_of(text, "caption").strip()


def samples(context: Context, shard: str) -> Iterator[Sample | Skipped]:
    """Yields the samples of a shard in order, and `Skipped` for its unusable parts.

    A shard may also be a folder with the same members, as in img2dataset's output format "files". A truncated
    shard yields the samples before the last one.

    Raises:
      SkipItem: it is not a tar file.
      UnavailableError: the disk or the network fails.
    """
    path = context.file(shard)
    seen: set[str] = set()
    try:
        with contextlib.nullcontext() if path.is_dir() else path.open("rb") as file:
            members = _files(path) if file is None else _members(file, shard)
            for sample in _grouped(members):
                if isinstance(sample, Sample) and sample.key in seen:
                    sample = Skipped(f"{shard}:{sample.key}", "its members are not adjacent")
                elif isinstance(sample, Sample):
                    seen.add(sample.key)
                yield sample
    except OSError as error:
        paths.check_passing(path, error)
        raise SkipItem("cannot be read") from error


def _members(file: IO[bytes], shard: str) -> Iterator[tuple[str, str, bytes | str] | Skipped]:
    """Yields (key, extension, content or problem) of every member with an extension."""
    try:
        archive = tarfile.open(fileobj=file, mode="r:", tarinfo=_Member)  # noqa: SIM115
    except tarfile.TarError:
        raise SkipItem("is not a tar file; decompress .tar.gz files first") from None
    try:
        while (member := archive.next()) is not None:
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile keeps all members
            if member.isdir():
                continue
            name = _NAME.fullmatch(member.name.removeprefix("./"))
            if name is None:
                continue
            if problem := _problem(member):
                yield name[1], name[2].lower(), problem
                continue
            opened = archive.extractfile(member)
            data = opened.read(_MAX_MEMBER_BYTES + 1) if opened else b""
            if len(data) != member.size:
                yield Skipped(shard, "ends early; download it again")
                return
            yield name[1], name[2].lower(), data
    except (tarfile.TarError, ValueError, EOFError) as error:
        yield Skipped(shard, f"is damaged ({type(error).__name__}); download it again")
        return
    file.seek(archive.offset)
    end = file.read(_BLOCK)
    if len(end) < _BLOCK or end.strip(b"\0"):
        yield Skipped(shard, "lacks its end marker, so samples may be missing; download it again")


def _files(folder: epath.Path) -> Iterator[tuple[str, str, bytes | str]]:
    """The same for the files of a folder."""
    for path in paths.children(folder):
        name = _NAME.fullmatch(path.name)
        if name is None or path.is_dir():
            continue
        size = paths.file_size(path)
        if size > _MAX_MEMBER_BYTES:
            yield name[1], name[2].lower(), f"a file has {size} bytes; up to {_MAX_MEMBER_BYTES} are read"
        else:
            yield name[1], name[2].lower(), paths.read_bytes(path, _MAX_MEMBER_BYTES)


def _problem(member: tarfile.TarInfo) -> str | None:
    if not member.isreg() or member.issparse():
        return "a member is a link, a device or a sparse file"
    if path_problem(member.name) is not None:
        return "a member's path is absolute or leaves the shard"
    if member.size > _MAX_MEMBER_BYTES:
        return f"a member has {member.size} bytes; up to {_MAX_MEMBER_BYTES} are read"
    return None


def _grouped(members: Iterator[tuple[str, str, bytes | str] | Skipped]) -> Iterator[Sample | Skipped]:
    key: str | None = None
    parts: dict[str, bytes] = {}
    problem: str | None = None
    size = 0
    for member in members:
        if isinstance(member, Skipped):
            problem = problem or "may lack members, because its shard is damaged after it"
            yield member
            continue
        name, extension, content = member
        if name != key:
            if key is not None:
                yield Sample(key, parts, problem)
            key, parts, problem, size = name, {}, None, 0
        if isinstance(content, str):
            problem = problem or content
            continue
        size += len(content)
        if extension in parts:
            problem = problem or f"has two members .{extension[:20]}"
        elif size > _MAX_SAMPLE_BYTES or len(parts) >= _MAX_MEMBERS:
            problem = problem or f"has over {_MAX_SAMPLE_BYTES} bytes or {_MAX_MEMBERS} members"
        else:
            parts[extension] = content
    if key is not None:
        yield Sample(key, parts, problem)
