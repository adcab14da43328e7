"""A server that implements enough of Google Cloud Storage for gcsfs and TensorStore."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any
from unittest import mock

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_MOVE = r"/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<dest_object_id>.*[^/]+)$"


class _Between:
    """A storage whose listings respect the range of a request, which the emulator ignores."""

    def __init__(self, storage: Any, query: dict[str, list[str]]) -> None:
        self._storage = storage
        self._first = query.get("startOffset", [""])[0]
        self._end = query["endOffset"][0] if "endOffset" in query else None

    def get_file_list(self, *arguments: Any, **named: Any) -> tuple[list[dict[str, Any]], list[str]]:
        files, prefixes = self._storage.get_file_list(*arguments, **named)
        return [f for f in files if self._holds(f["name"])], [p for p in prefixes if self._holds(p)]

    def _holds(self, name: str) -> bool:
        return self._first <= name and (self._end is None or name < self._end)


def _list(request: Any, response: Any, storage: Any, *rest: Any, **named: Any) -> None:
    objects.ls(request, response, _Between(storage, request.query), *rest, **named)


def _move(request: Any, response: Any, storage: Any, *_: Any, **__: Any) -> None:
    bucket, source = request.params["bucket_name"], request.params["object_id"]
    target = request.params["dest_object_id"]
    try:
        response.json(objects._copy(request.base_url, storage, bucket, source, bucket, target))
        storage.delete_file(bucket, source)
    except NotFound:
        response.status = HTTPStatus.NOT_FOUND


@contextlib.contextmanager
def serve(bucket: str) -> Iterator[None]:
    """An empty `gs://BUCKET` for this process and its children."""
    handlers = tuple(
        (pattern, {verb: _list if made is objects.ls else made for verb, made in verbs.items()})
        for pattern, verbs in server.HANDLERS
    )
    moves = tuple((re.escape(prefix) + _MOVE, {server.POST: _move}) for prefix in ("/storage/v1", ""))
    running = server.create_server("localhost", 0, in_memory=True, default_bucket=bucket)
    with mock.patch.object(server, "HANDLERS", moves + handlers), running:
        address = f"http://localhost:{running._api._httpd.server_port}"
        names = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
        # gcsfs would query the type of the bucket, which needs credentials.
        names |= {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        with mock.patch.dict(os.environ, names):
            yield
