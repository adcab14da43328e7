"""The web application: routes, streams of events, start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import math
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from vilam3_jax.data.experts.cards import Card
from vilam3_jax.errors import UnavailableError, UserError
from vilam3_jax.serving import chat_api, http, metrics, openapi, responses_api, slicer
from vilam3_jax.serving.answers import Answer, Step
from vilam3_jax.serving.errors import ApiError, as_api_error, bad_request, error_response
from vilam3_jax.serving.fields import Fields
from vilam3_jax.serving.files import StoredFile, file_object
from vilam3_jax.serving.inputs import Ask
from vilam3_jax.serving.masks import Mask
from vilam3_jax.serving.samples import Sample
from vilam3_jax.serving.service import Service
from vilam3_jax.serving.viewing import slice_query

PAGE = Path(__file__).with_name("page")
NIIVUE = "vendor/niivue.js"
_PING_SECONDS = 15.0
_KEEP_ALIVE_SECONDS = 60  # longer than clients keep idle connections, or they would send into a closing one
_MAX_FIELDS = 8
_MAX_FIELD_BYTES = 1 << 16

# Of the page, by modality; "" for questions without an image.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "CT": ("Is there a hepatic tumor?", "Which organs are visible in this slice?", "Is the liver visible?"),
    "MR": ("Is there a brain tumor?", "Which sequence is this?", "Describe this image."),
    "CR": ("Does this film show pneumonia?", "Is there a pleural effusion?", "Describe this image."),
    "other": ("What imaging modality is this?", "Describe this image.", "Is there anything abnormal?"),
    "": ("What is a hepatic tumor?", "When is an MRI of the brain made?"),
}

Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


class Writer(Protocol):
    """Writes an answer in the form of an interface; `id` is the answer's."""

    id: str

    def whole(self, answer: Answer) -> dict[str, Any]: ...

    def first(self) -> list[dict[str, Any]]: ...

    def step(self, step: Step) -> list[dict[str, Any]]: ...

    def last(self, answer: Answer) -> list[dict[str, Any]]: ...

    def error(self, error: ApiError) -> dict[str, Any]: ...


class Api:
    """The endpoints of a service."""

    def __init__(self, service: Service):
        """`service` answers."""
        self._service = service
        self._slicer = slicer.LastFiles()

    def routes(self) -> list[BaseRoute]:
        """All routes; the page is served if it is installed."""
        page: list[BaseRoute] = []
        if PAGE.is_dir():
            page = [
                _route("/", self.root, "GET"),
                Mount(http.PAGE_PATH.rstrip("/"), StaticFiles(directory=PAGE, html=True)),
            ]
        return [
            _route("/healthz", self.health, "GET"),
            _route("/metrics", self.metrics, "GET"),
            _route("/openapi.json", self.openapi, "GET"),
            _route("/v1/models", self.models, "GET"),
            _route("/v1/models/{model:path}", self.model, "GET"),
            # The module for 3D Slicer adds a slash.
            *(_route(f"/v1/chat/completions{end}", self.any_chat, "POST") for end in ("", "/")),
            _route("/info/", self.info, "GET"),
            _route("/upload/", self.slicer_upload, "POST"),
            _route("/v1/chat/completions/{answer}", self.forget, "DELETE"),
            _route("/v1/responses", self.responses, "POST"),
            _route("/v1/responses/{answer}", self.forget, "DELETE"),
            _route("/v1/files", self.upload, "POST"),
            _route("/v1/samples/{sample}", self.sample, "POST"),
            _route("/v1/files/{file}", self.file, "GET", "DELETE"),
            _route("/v1/files/{file}/view", self.view, "GET"),
            _route("/v1/files/{file}/slice", self.slice, "GET"),
            _route("/v1/files/{file}/volume", self.volume, "GET"),
            _route("/v1/masks/{mask}", self.mask, "GET"),
            _route("/v1/masks/{mask}/slice", self.mask_slice, "GET"),
            *page,
        ]

    async def health(self, _: Request) -> Response:
        """Whether the engine runs."""
        alive = self._service.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    async def root(self, _: Request) -> Response:
        """Leads to the page."""
        return RedirectResponse(http.PAGE_PATH)

    async def metrics(self, _: Request) -> Response:
        """Prometheus' text format."""
        return Response(self._service.metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def openapi(self, _: Request) -> Response:
        """The description of this interface."""
        return JSONResponse(openapi.document())

    async def models(self, _: Request) -> Response:
        """The only model, as a list."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The model by its name."""
        self._service.check_model(request.path_params["model"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        service = self._service
        extra = {
            "experts": [card.name for card in service.assistant.cards] if service.experts else [],
            "max_length": service.max_length,
            "cards": [_card(card) for card in service.assistant.cards] if service.experts else [],
            "questions": QUESTIONS,
            "samples": [sample.describe(number) for number, sample in enumerate(service.settings.samples)],
            "niivue": (PAGE / NIIVUE).is_file(),
        }
        head = {"id": service.settings.model, "object": "model", "created": service.started}
        return {**head, "owned_by": "vilam3", "vilam3": extra}

    async def chat(self, request: Request) -> Response:
        """Chat completions."""
        body = await self._body(request)
        stream, usage = chat_api.wants_stream(body)
        writer = chat_api.ChatWriter(self._service.settings.model, usage=usage)
        check = functools.partial(chat_api.check, body, self._service)
        return await self._answer(request, check, writer, stream=stream, done=True)

    async def responses(self, request: Request) -> Response:
        """Responses."""
        body = await self._body(request)
        previous = body.text("previous_response_id") if body.has("previous_response_id") else None
        writer = responses_api.ResponsesWriter(
            self._service.settings.model, store=body.flag("store", False), previous=previous
        )
        check = functools.partial(responses_api.check, body, self._service)
        return await self._answer(request, check, writer, stream=body.flag("stream", False))

    async def forget(self, request: Request) -> Response:
        """Forgets a dialogue that was kept."""
        name = request.path_params["answer"]
        self._service.dialogues.delete(name, request.scope["vilam3.owner"])
        kind = "chat.completion.deleted" if name.startswith("chatcmpl-") else "response.deleted"
        return JSONResponse({"id": name, "object": kind, "deleted": True})

    async def info(self, _: Request) -> Response:
        """What the module for 3D Slicer asks first."""
        return JSONResponse("VILA-M3 model")

    async def slicer_upload(self, request: Request) -> Response:
        """Stores a file that the next prompts of this client are about."""
        async with self._form(request) as form:
            stored = await self._stored(form, request)
        self._slicer.remember(request, stored)
        return JSONResponse({"filename": stored.id, "id": stored.id, "status": "File uploaded successfully"})

    async def any_chat(self, request: Request) -> Response:
        """A chat completion, or a prompt of the module for 3D Slicer, which is told by its query."""
        return await (self.slicer_chat if "Prompt" in request.query_params else self.chat)(request)

    async def slicer_chat(self, request: Request) -> Response:
        """A prompt of the module for 3D Slicer."""
        query = request.query_params
        request.scope["vilam3.route"] = "/v1/chat/completions/?Prompt"
        stream = slicer.flag(query.get("stream"))
        async with self._form(request) as form:
            file = None
            if isinstance(form.get("file"), UploadFile):
                file = self._slicer.remember(request, await self._stored(form, request))
        file = file or self._slicer.last(request, self._service.store)
        writer = slicer.SlicerWriter(self._service.settings.model)
        check = functools.partial(slicer.check, query["Prompt"], file, self._service)
        return await self._answer(request, check, writer, stream=stream, done=True)

    async def _body(self, request: Request) -> Fields:
        """The JSON of a request."""
        async with http.place(self._service.bodies, request):
            return await http.read_json(request)

    async def _answer(
        self, request: Request, check: Callable[[], Ask], writer: Writer, *, stream: bool, done: bool = False
    ) -> Response:
        """Answers at once, or as a stream of events that may end with `[DONE]`."""
        owner, request_id = request.scope["vilam3.owner"], request.scope["vilam3.request_id"]
        happening = self._service.answer(check, owner, writer.id, stream=stream, request=request_id)
        if not stream:
            answer = await http.while_connected(request, _last(happening))
            return JSONResponse(writer.whole(answer))
        # An error before the first step has its own status.
        try:
            first = await http.while_connected(request, anext(happening))
        except BaseException:
            await happening.aclose()
            raise
        return _EventStream(happening, self._events(request, first, happening, writer, done))

    async def _events(
        self,
        request: Request,
        first: Step | Answer,
        happening: AsyncGenerator[Step | Answer, None],
        writer: Writer,
        done: bool,
    ) -> AsyncGenerator[str, None]:
        """Server-sent events; a comment now and then shows that the server is alive."""
        try:
            for event in writer.first():
                yield _event(event)
            async for item in _with_pings(first, happening):
                if item is None:
                    yield ": waiting\n\n"
                    continue
                for event in writer.last(item) if isinstance(item, Answer) else writer.step(item):
                    yield _event(event)
        except Exception as error:
            yield _event(writer.error(self._refusal(request, error)))
        if done:
            yield "data: [DONE]\n\n"

    def _refusal(self, request: Request, error: Exception) -> ApiError:
        """What the client learns of an error, which is counted; internal ones are logged."""
        shown = as_api_error(error)
        self._service.metrics.error(shown.code)
        if not isinstance(error, UserError):
            http.log_failure(error, request.scope)
        return shown

    async def refuse(self, request: Request, error: Exception) -> Response:
        """The response of an error that an endpoint raised."""
        return error_response(self._refusal(request, error))

    async def left(self, *_: object) -> Response:
        """Ends a request whose client left; the status is for the log and the metrics."""
        return Response(status_code=http.CLIENT_LEFT)

    async def refuse_http(self, request: Request, error: Exception) -> Response:
        """The response of an error of the framework: no such route, wrong method, malformed form."""
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        message = {
            404: "no such path; docs/serving.md lists them",
            405: "this path does not support the method; use "
            + (error.headers or {}).get("Allow", "another"),
        }.get(error.status_code, f"the request is malformed: {error.detail}")
        shown = ApiError(error.status_code, message, code)
        return error_response(self._refusal(request, shown), error.headers)

    async def upload(self, request: Request) -> Response:
        """Stores a file."""
        async with self._form(request) as form:
            return JSONResponse(file_object(await self._stored(form, request)))

    async def sample(self, request: Request) -> Response:
        """Stores a copy of a sample, as if the client had uploaded it."""
        found = re.fullmatch(r"sample-(\d{1,6})", request.path_params["sample"], re.ASCII)
        samples = self._service.settings.samples
        if found is None or int(found[1]) >= len(samples):
            raise ApiError(404, "no such sample; GET /v1/models lists them", "no_such_sample")
        work = functools.partial(self._store_sample, samples[int(found[1])], request.scope["vilam3.owner"])
        return JSONResponse(file_object(await asyncio.to_thread(work)))

    def _store_sample(self, sample: Sample, owner: str) -> StoredFile:
        try:
            with sample.path.open("rb") as file:
                return self._service.store.add(file, owner)
        except OSError as error:
            raise UnavailableError(
                f"the sample {sample.name} cannot be read; tell who runs the server"
            ) from error

    async def file(self, request: Request) -> Response:
        """Describes or deletes a file."""
        name, owner = request.path_params["file"], request.scope["vilam3.owner"]
        if request.method == "DELETE":
            await asyncio.to_thread(self._service.store.delete, name, owner)
            return JSONResponse({"id": name, "object": "file", "deleted": True})
        return JSONResponse(file_object(self._service.store.get(name, owner)))

    async def view(self, request: Request) -> Response:
        """How a file can be shown."""
        query, stored = slice_query(request.query_params, "modality"), self._file(request)
        work = functools.partial(self._service.viewer.describe, stored, query.modality)
        return JSONResponse(await self._viewed(request, work))

    async def slice(self, request: Request) -> Response:
        """A slice of a volume, or a 2-D image, as PNG."""
        query = slice_query(request.query_params, "axis", "index", "window", "modality")
        work = functools.partial(self._service.viewer.png, self._file(request), query)
        return Response(await self._viewed(request, work), media_type="image/png")

    async def volume(self, request: Request) -> Response:
        """A volume as NIfTI, for a viewer in the browser."""
        slice_query(request.query_params)
        work = functools.partial(self._service.viewer.nifti, self._file(request))
        return _download(await self._viewed(request, work), "volume.nii")

    async def mask(self, request: Request) -> Response:
        """The label map of an expert as NIfTI."""
        slice_query(request.query_params)
        mask = self._mask(request)
        work = functools.partial(self._service.masks.nifti, mask)
        return _download(await self._viewed(request, work), f"{mask.annotation.expert.lower()}.nii.gz")

    async def mask_slice(self, request: Request) -> Response:
        """A slice of a label map as PNG, transparent without a label."""
        query = slice_query(request.query_params, "axis", "index")
        work = functools.partial(self._service.masks.png, self._mask(request), query)
        return Response(await self._viewed(request, work), media_type="image/png")

    def _file(self, request: Request) -> StoredFile:
        return self._service.store.get(request.path_params["file"], request.scope["vilam3.owner"])

    def _mask(self, request: Request) -> Mask:
        return self._service.masks.get(request.path_params["mask"], request.scope["vilam3.owner"])

    async def _viewed(self, request: Request, work: Callable[[], T]) -> T:
        return await http.while_connected(request, self._service.view(work))

    @contextlib.asynccontextmanager
    async def _form(self, request: Request) -> AsyncIterator[FormData]:
        """The form of a request, whose files exist until the block ends."""
        reading = functools.partial(
            request.form, max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
        )
        async with http.place(self._service.uploads, request):
            form = await http.in_time(reading())
            try:
                yield form
            finally:
                await form.close()

    async def _stored(self, form: FormData, request: Request) -> StoredFile:
        """The file of a form, stored."""
        file = form.get("file")
        if isinstance(file, str) and "://" in file:
            raise bad_request("this server fetches no URLs; upload the file itself", "file", "no_urls")
        if not isinstance(file, UploadFile):
            raise bad_request("send the file in the form field `file` (multipart/form-data)", "file")
        return await asyncio.to_thread(self._service.store.add, file.file, request.scope["vilam3.owner"])


def _card(card: Card) -> dict[str, Any]:
    fields = ("name", "args", "modality", "task", "overview", "accuracy", "stand_in", "roles")
    return {name: getattr(card, name) for name in fields}


def _download(data: bytes, name: str) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(data, media_type="application/octet-stream", headers=headers)


class _EventStream(StreamingResponse):
    """Server-sent events; when it ends, for whatever reason, so does the dialogue."""

    def __init__(self, happening: AsyncGenerator[Step | Answer, None], events: AsyncGenerator[str, None]):
        headers = {"X-Accel-Buffering": "no"}  # nginx would hold events back
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._generators = (events, happening)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for generator in self._generators:
                await generator.aclose()


def _route(path: str, endpoint: Endpoint, *methods: str) -> Route:
    @functools.wraps(endpoint)
    async def named(request: Request) -> Response:
        request.scope["vilam3.route"] = path
        return await endpoint(request)

    return Route(path, named, methods=methods)


async def _last(happening: AsyncGenerator[Step | Answer, None]) -> Answer:
    answer = [item async for item in happening][-1]
    assert isinstance(answer, Answer)
    return answer


async def _with_pings(
    first: Step | Answer, happening: AsyncGenerator[Step | Answer, None]
) -> AsyncIterator[Step | Answer | None]:
    """The items of an iterator; None whenever it takes long."""
    yield first
    while True:
        following = asyncio.ensure_future(anext(happening, None))
        try:
            while not (await asyncio.wait((following,), timeout=_PING_SECONDS))[0]:
                yield None
        finally:
            if not following.done():
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
        item = following.result()
        if item is None:
            return
        yield item


def _event(content: Mapping[str, Any]) -> str:
    """A server-sent event; those with a `type` are named after it.

    In ASCII: clients that split text into lines, as Python does, also split at U+0085 and U+2028.
    """
    name = f"event: {content['type']}\n" if "type" in content else ""
    return f"{name}data: {json.dumps(content, allow_nan=False)}\n\n"


def make_server(service: Service) -> uvicorn.Server:
    """The web server of a service; call its `run`."""
    logging.getLogger("uvicorn.access").disabled = True  # its lines hold queries
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(service.settings.drain) + 1,
    )
    return uvicorn.Server(config)


def make_app(service: Service) -> ASGIApp:
    """The application of a service, which it closes when the server stops."""
    api = Api(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(service.sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            await asyncio.to_thread(service.close)

    app: ASGIApp = Starlette(
        routes=api.routes(),
        lifespan=lifespan,
        exception_handlers={
            HTTPException: api.refuse_http,
            http.ClientLeft: api.left,
            UserError: api.refuse,
            Exception: api.refuse,
        },
    )
    settings = service.settings
    app = http.Guard(
        app, settings, service.metrics, uploads=("/v1/files", "/upload/", "/v1/chat/completions/")
    )
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Api-Key"],
        )
    return http.Observer(app, service.metrics)
