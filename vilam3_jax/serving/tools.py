"""The tools of `vilam3 mcp`: ask the model, call an expert, list the experts.

They share the engine, the limits and the audit log of the HTTP server. Files are read below one folder.
"""

from __future__ import annotations

import logging
import os
import secrets
import stat
import traceback
from collections.abc import Awaitable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field

import vilam3_jax
from vilam3_jax.data.experts.grammar import Call, parse_call
from vilam3_jax.errors import UserError
from vilam3_jax.inference.assistant import NOT_CLINICAL
from vilam3_jax.serving import inputs
from vilam3_jax.serving.answers import Answer, call_record
from vilam3_jax.serving.engine import EngineError
from vilam3_jax.serving.errors import ApiError, bad_request
from vilam3_jax.serving.fields import Fields
from vilam3_jax.serving.inputs import Ask, ImagePart, Options, Said, View
from vilam3_jax.serving.service import Service

_LOG = logging.getLogger(__name__)
_MAX_MEMBERS = 5_000  # of a folder
_READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)

T = TypeVar("T")

Image = Annotated[
    str | None,
    Field(
        description="path of an image, a volume or a folder of DICOM files, below the folder of the server"
    ),
]
ImageData = Annotated[
    str | None, Field(description="a 2-D image as a data URL, such as data:image/png;base64,…")
]
Axis = Annotated[str | None, Field(description="plane of a volume: axial, coronal or sagittal")]
Slice = Annotated[int | None, Field(description="slice of a volume; the middle one by default")]
Window = Annotated[list[float] | None, Field(description="[centre, width] in the units of the volume")]
Modality = Annotated[str | None, Field(description="DICOM code of a file that states none, such as CT")]


class Files:
    """Files below a folder, or none."""

    def __init__(self, folder: str | None, *, max_bytes: int):
        """`max_bytes` limits a file, or the files of a folder.

        Raises `UserError` if there is no such folder.
        """
        self._root = None if folder is None else Path(folder).resolve()
        self._max_bytes = max_bytes
        if self._root is not None and not self._root.is_dir():
            raise UserError(f"--files={folder}: no such folder")

    def find(self, name: str) -> Path:
        """The path of a file or folder by its name below the folder.

        Raises `ApiError` for anything that lies elsewhere, also by way of a link, or is too large.
        """
        if self._root is None:
            raise bad_request("image: this server reads no files; send image_data, or start it with --files")
        try:
            path = (self._root / name).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            path = None
        if path is None or not path.is_relative_to(self._root):
            raise ApiError(404, "image: no such file below the folder of this server", "no_such_file")
        size = 0
        for count, member in enumerate(self._members(path)):
            if count >= _MAX_MEMBERS:
                raise bad_request(f"image: the folder holds more than {_MAX_MEMBERS} files; name one series")
            size += member.stat().st_size
        if size > self._max_bytes:
            raise ApiError(413, f"image: is larger than {self._max_bytes >> 20} MiB", "too_large")
        return path

    def _members(self, path: Path) -> list[Path]:
        """The file, or the files of the folder; refuses links that lead out."""
        found = (
            [Path(at, name) for at, _, names in os.walk(path) for name in names] if path.is_dir() else [path]
        )
        for member in found:
            target = member.resolve()
            if not target.is_relative_to(self._root or target) or not stat.S_ISREG(target.stat().st_mode):
                raise bad_request("image: the folder holds a link that leads out of it, or no plain file")
        return found

    def without_paths(self, message: str) -> str:
        """A message in which paths are relative to the folder."""
        return message if self._root is None else message.replace(f"{self._root}{os.sep}", "")


class Tools:
    """The tools of a service."""

    def __init__(self, service: Service, files: Files):
        """`files` are those that clients may name."""
        self._service, self._files = service, files

    def server(self) -> MCPServer:
        """An MCP server with the tools; call its `run`."""
        server = MCPServer(
            "vilam3",
            version=vilam3_jax.__version__,
            instructions="Questions about medical images, answered by a vision-language model that may call "
            f"expert models. {NOT_CLINICAL}",
        )
        for tool in (self.ask, self.annotate, self.list_experts):
            server.add_tool(tool, annotations=_READS)
        return server

    async def ask(
        self,
        question: str,
        image: Image = None,
        image_data: ImageData = None,
        experts: bool | None = None,
        axis: Axis = None,
        slice: Slice = None,
        window: Window = None,
        modality: Modality = None,
        max_new_tokens: int | None = None,
    ) -> dict[str, Any]:
        """Asks the model a question, about an image or without one. The model may call experts."""
        fields = Fields({"experts": experts, "max_new_tokens": max_new_tokens})
        view = {"axis": axis, "slice": slice, "window": window, "modality": modality}

        def check() -> Ask:
            with_experts = fields.flag("experts", self._service.experts)
            if with_experts and not self._service.experts:
                raise fields.error("experts", inputs.NO_EXPERTS)
            longest = self._service.max_length
            limit = inputs.limit_of(
                fields, ("max_new_tokens",), self._service.settings.max_new_tokens, longest
            )
            said = self._said(question, image, image_data, view)
            return Ask(inputs.dialogue_of([said], longest), Options(with_experts), limit)

        return await self._told(self._ask(check))

    async def _ask(self, check: Any) -> dict[str, Any]:
        name = secrets.token_hex(8)
        happening = self._service.answer(check, "", name, stream=False, request=name)
        answer = [item async for item in happening][-1]
        assert isinstance(answer, Answer)
        return {
            "answer": answer.text,
            "complete": answer.complete,
            "experts": list(answer.experts),
            "description": answer.reply.description,
            "notes": list(answer.notes),
        }

    async def annotate(
        self,
        call: Annotated[str, Field(description="expert and argument as on its card: VISTA3D(hepatic tumor)")],
        image: Image = None,
        image_data: ImageData = None,
        modality: Modality = None,
    ) -> dict[str, Any]:
        """Calls an expert on a whole image or volume, without the model. Returns its findings."""

        def check() -> Ask:
            said = self._said(call, image, image_data, {"modality": modality})
            if not said.images:
                raise bad_request("image: is missing; name a file, or send image_data")
            return Ask(inputs.dialogue_of([said], self._service.max_length), Options(experts=True))

        return await self._told(self._annotate(check, call))

    async def _annotate(self, check: Any, call: str) -> dict[str, Any]:
        parsed = parse_call(call)
        if parsed is None:
            raise bad_request("call: must be like VISTA3D(hepatic tumor); list_experts has the names")
        request = secrets.token_hex(8)
        annotation = await self._service.annotate(check, parsed, "", request=request)
        made = Call(annotation.expert, annotation.args)
        return call_record(made, request, annotation, self._without_paths)

    async def list_experts(self) -> dict[str, Any]:
        """Lists the experts, what they do, and their valid arguments."""
        cards = self._service.assistant.cards if self._service.experts else ()
        return {"experts": [card.to_dict() for card in cards], "note": NOT_CLINICAL}

    def _said(self, text: str, image: str | None, data: str | None, view: dict[str, Any]) -> Said:
        """The user's message; raises `ApiError`."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise bad_request("the text holds half of a surrogate pair; send valid Unicode") from None
        if image is not None and data is not None:
            raise bad_request("image, image_data: give only one of them")
        shown = inputs.view_of(Fields(view))
        source: bytes | Path
        if image is not None:
            source = self._files.find(image)
        elif data is not None:
            if len(data) > self._service.settings.max_body:
                raise ApiError(
                    413,
                    f"image_data: is larger than {self._service.settings.max_body >> 20} MiB",
                    "too_large",
                )
            source = inputs.data_of(data, "image_data")
        elif shown != View():
            raise bad_request("there is no image; leave axis, slice, window and modality out")
        else:
            return Said("user", text)
        return Said("user", text, (ImagePart(source, shown),))

    def _without_paths(self, message: str) -> str:
        return self._files.without_paths(self._service.store.without_paths(message))

    async def _told(self, work: Awaitable[T]) -> T:
        """The result; errors become one sentence for the client, and texts do not reach the log."""
        try:
            return await work
        except Exception as error:
            if isinstance(error, UserError | EngineError):
                raise ToolError(self._without_paths(str(error))) from None
            # Messages of libraries may quote what they failed on.
            trace = "".join(traceback.format_tb(error.__traceback__))
            _LOG.error("a tool failed: %s\n%s", type(error).__name__, trace)
            raise ToolError("internal error; the server's log tells where") from None
