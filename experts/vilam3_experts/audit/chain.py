"""The lines of the audit log, and the files that hold them."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.experts.store import content_sha256
from vilam3_jax.errors import UserError
from vilam3_jax.runtime import paths

_CHAIN = r"\d{8}T\d{6}Z-[0-9a-f]{8}"
_SEGMENT = re.compile(rf"({_CHAIN})-(\d{{10}})\.jsonl")
_HEAD = re.compile(rf"({_CHAIN})\.json")
_SHA256 = re.compile("[0-9a-f]{64}")
MAX_LINE = 4 << 20  # an opening line lists all chains
_MAX_OBJECT = 1 << 30
_MAX_HEAD = 4096
_MAX_ARGS = 1000


class Head(NamedTuple):
    """The end of a chain: its number of lines, and the hash of the last line."""

    count: int
    hash: str


@dataclasses.dataclass(frozen=True)
class Call:
    """One logged call.

    `input`, `weights` and `output` are sha256 (hex) of the input's key, the weights (or '') and
    `content_sha256` of the answer. `status` is 'ok' or 'failed', `time` the end of the call, UTC, ISO 8601.
    """

    input: str
    expert: str
    version: str
    weights: str
    args: str
    status: str
    output: str
    seconds: float
    time: str

    @classmethod
    def of(cls, annotation: Annotation) -> Call:
        """The call that returned `annotation`.

        Raises `ValueError`, so that nothing is logged, if a key or digest is not a sha256 or the arguments
        may contain a path.
        """
        call = cls(
            input=annotation.input_key,
            expert=annotation.expert,
            version=annotation.version,
            weights=annotation.weights_sha256,
            args=annotation.args,
            status=annotation.status,
            output=content_sha256(annotation),
            seconds=round(annotation.seconds, 6),
            time=timestamp(),
        )
        if not _SHA256.fullmatch(call.input) or not (call.weights == "" or _SHA256.fullmatch(call.weights)):
            raise ValueError(f"call of {call.expert}: input key and weights must be sha256 to be logged")
        if len(call.args) > _MAX_ARGS or "/" in call.args or "\\" in call.args or not call.args.isprintable():
            raise ValueError(f"call of {call.expert}: not logged, its arguments are too long or hold a path")
        return call


_CALL_FIELDS = frozenset(field.name for field in dataclasses.fields(Call))


def new_chain() -> tuple[str, Head]:
    now = datetime.datetime.now(datetime.UTC)
    chain = f"{now:%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    return chain, Head(0, genesis(chain))


def genesis(chain: str) -> str:
    return hashlib.sha256(chain.encode()).hexdigest()


def read_tail(file: int, chain: str) -> tuple[Head, bytes] | None:
    """The head of a chain's file and the bytes after its last complete line; None if that line is damaged."""
    size = os.lseek(file, 0, os.SEEK_END)
    end = os.pread(file, min(size, MAX_LINE), max(0, size - MAX_LINE))
    whole, newline, torn = end.rpartition(b"\n")
    if not newline:
        return (Head(0, genesis(chain)), torn) if size <= MAX_LINE else None
    line = parse_line(whole.rpartition(b"\n")[2] + b"\n")
    return None if line is None else (Head(line["sequence"] + 1, line["hash"]), torn)


def canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def timestamp() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def parse_line(raw: bytes) -> dict[str, Any] | None:
    """The fields of a line; None unless the line is byte for byte as a writer would write it."""
    try:
        fields = json.loads(raw)
        bare = {name: value for name, value in fields.items() if name != "hash"}
        valid = (
            hashlib.sha256(canonical(bare)).hexdigest() == fields["hash"]
            and canonical(fields) + b"\n" == raw
            and isinstance(fields["sequence"], int)
            and isinstance(fields["previous"], str)
            and isinstance(fields["event"], str)
            and all(
                isinstance(count, int) and isinstance(last, str)
                for count, last in fields.get("others", {}).values()
            )
            and (fields["event"] != "call" or fields.keys() >= _CALL_FIELDS)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return fields if valid else None


def chain_files(folder: epath.Path) -> dict[str, list[tuple[int, epath.Path]]]:
    """The files of every chain with the number of their first line, in order."""
    found: dict[str, list[tuple[int, epath.Path]]] = {}
    for path in paths.children(folder):
        if match := _SEGMENT.fullmatch(path.name):
            found.setdefault(match[1], []).append((int(match[2]), path))
    return {chain: sorted(segments) for chain, segments in found.items()}


def write_head(folder: epath.Path, chain: str, head: Head) -> None:
    text = canonical({"chain": chain, "count": head.count, "hash": head.hash})
    paths.write_bytes_durable(folder / "manifest" / f"{chain}.json", text + b"\n")


def read_head(path: epath.Path) -> Head:
    """Reads an entry of a manifest; raises `UserError` if it is missing or damaged."""
    try:
        fields = json.loads(paths.read_bytes(path, _MAX_HEAD))
        head = Head(int(fields["count"]), str(fields["hash"]))
        if head.count < 0 or not _SHA256.fullmatch(head.hash):
            raise ValueError("not the head of a chain")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged entry of the audit manifest ({error}); restore it") from error
    return head


def head_files(manifest: paths.PathLike) -> dict[str, epath.Path]:
    """The entries of a manifest, by chain."""
    entries = ((path, _HEAD.fullmatch(path.name)) for path in paths.children(manifest))
    return {match[1]: path for path, match in entries if match}


def heads(manifest: paths.PathLike) -> dict[str, Head]:
    """Reads a manifest (the folder `manifest` of a log, or a copy of it): chain to head.

    With a copy that is kept elsewhere, `verify` detects a chain that was rewritten. Raises `UserError` if an
    entry is damaged.
    """
    return {chain: read_head(path) for chain, path in head_files(manifest).items()}


def read_lines(segments: list[tuple[int, epath.Path]]) -> Iterator[bytes]:
    """Yields lines with their newlines, which the last line of a file may lack."""
    for _, path in segments:
        if "://" in str(path):
            yield from io.BytesIO(paths.read_bytes(path, _MAX_OBJECT))
            continue
        try:
            with open(path, "rb") as file:
                while line := file.readline(MAX_LINE):
                    yield line
        except OSError as error:
            paths.check_passing(path, error)
            raise UserError(f"{path}: cannot be read ({error}); check the path") from error


def calls(folder: paths.PathLike) -> Iterator[Call]:
    """Yields every logged call, chain by chain. Damaged lines are skipped, so run `verify` first."""
    for files in chain_files(paths.as_path(folder)).values():
        for raw in read_lines(files):
            fields = parse_line(raw)
            if fields is not None and fields["event"] == "call":
                yield Call(**{name: fields[name] for name in _CALL_FIELDS})
