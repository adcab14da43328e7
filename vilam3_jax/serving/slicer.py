"""The calls of VILA-M3's module for 3D Slicer: an upload, then prompts about it, in the query."""

from __future__ import annotations

import collections
from typing import Any

from starlette.requests import Request

from vilam3_jax.serving import inputs
from vilam3_jax.serving.answers import Answer
from vilam3_jax.serving.chat_api import ChatWriter
from vilam3_jax.serving.errors import ApiError, bad_request
from vilam3_jax.serving.files import FileStore, StoredFile
from vilam3_jax.serving.inputs import Ask, ImagePart, Options, Said, View
from vilam3_jax.serving.service import Service

_CLIENTS = 1000


class LastFiles:
    """The last upload of each client, told by its address and its API key."""

    def __init__(self) -> None:
        self._ids: collections.OrderedDict[tuple[str, str], str] = collections.OrderedDict()

    def remember(self, request: Request, stored: StoredFile) -> StoredFile:
        """Keeps a file as the client's last; returns it."""
        client = _client(request)
        self._ids[client] = stored.id
        self._ids.move_to_end(client)
        while len(self._ids) > _CLIENTS:
            self._ids.popitem(last=False)
        return stored

    def last(self, request: Request, store: FileStore) -> StoredFile | None:
        """The client's last file; None if it uploaded none. Raises `ApiError` if it expired."""
        found = self._ids.get(_client(request))
        return None if found is None else store.get(found, request.scope["vilam3.owner"])


def _client(request: Request) -> tuple[str, str]:
    return request.client.host if request.client else "", request.scope["vilam3.owner"]


def flag(text: str | None) -> bool:
    """A boolean of a query; raises `ApiError`."""
    values = {None: False, "false": False, "0": False, "true": True, "1": True}
    value = values.get(None if text is None else text.lower())
    if value is None:
        raise bad_request("stream: must be true or false", "stream")
    return value


def check(prompt: str, file: StoredFile | None, service: Service) -> Ask:
    """Makes the request; raises `ApiError`."""
    if file is None:
        raise ApiError(
            400, "no file: upload one to /upload/, or send it with the prompt", "no_file", param="file"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise bad_request("Prompt: holds bytes that are no UTF-8", "Prompt") from None
    said = Said("user", prompt, (ImagePart(file.id, View()),))
    return Ask(
        inputs.dialogue_of([said], service.max_length),
        Options(service.experts),
        min(service.settings.max_new_tokens, service.max_length),
    )


class SlicerWriter(ChatWriter):
    """A chat completion whose content is a message with a list of parts, as the module reads it."""

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        body = super().whole(answer)
        message = body["choices"][0]["message"]
        content = [{"type": "text", "text": message["content"]}]
        message["content"] = {"role": "assistant", "content": content}
        return body
