"""What the HTTP interfaces share: the model, its engine, uploaded files, and how a request is answered."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from vilam3_jax.data.experts.grammar import Call
from vilam3_jax.data.experts.record import Annotation
from vilam3_jax.data.isolation import DecoderProcess
from vilam3_jax.inference.assistant import Assistant
from vilam3_jax.serving import inputs, warm_up
from vilam3_jax.serving.answers import Answer, Step, answer
from vilam3_jax.serving.audit import AuditLog, Trail
from vilam3_jax.serving.dialogues import dialogue_store
from vilam3_jax.serving.engine import LATE, BusyError, DeadlineError, Engine
from vilam3_jax.serving.errors import ApiError, bad_request
from vilam3_jax.serving.files import FileStore
from vilam3_jax.serving.inputs import NO_EXPERTS, Ask
from vilam3_jax.serving.masks import MaskStore
from vilam3_jax.serving.metrics import Metrics
from vilam3_jax.serving.samples import Sample
from vilam3_jax.serving.viewing import Viewer

_SWEEP_SECONDS = 30.0
_DECODER_BYTES = 4 << 30
_READERS = 4
_VIEWERS = 2
_MAX_VIEWS = 64  # requests for slices that wait

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits of a server.

    Attributes:
      model: its name in the interfaces.
      queue: requests that may wait or run, and bodies that may be received; more are refused with 429.
      deadline: seconds for an answer, the reading of its images included.
      max_new_tokens: tokens of a turn if a request states no limit.
      max_body: bytes of a JSON body.
      max_upload: bytes of an uploaded file.
      upload_space: bytes of all uploaded files, and again of those that are being received.
      file_seconds: uploaded files, and dialogues that are kept, are deleted after this time.
      drain: seconds that answers in progress have when the server stops.
      cors_origins: web origins that may use the server.
      keys: API keys; without any, everybody may ask.
      hosts: names in the Host header that are accepted; empty: all.
      samples: images that the page offers.
    """

    model: str = "vilam3"
    queue: int = 64
    deadline: float = 300.0
    max_new_tokens: int = 512
    max_body: int = 64 << 20
    max_upload: int = 512 << 20
    upload_space: int = 8 << 30
    file_seconds: float = 3600.0
    drain: float = 60.0
    cors_origins: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    samples: tuple[Sample, ...] = ()


class Places:
    """A limited number of things at a time; for one event loop."""

    def __init__(self, limit: int, problem: str):
        """`problem` is told when all places are taken."""
        self._free, self._problem = limit, problem

    def take(self) -> contextlib.AbstractContextManager[None]:
        """Takes a place now, until the block of the result ends; raises `BusyError` without one."""
        if self._free <= 0:
            raise BusyError(f"{self._problem}; try again in a few seconds")
        self._free -= 1
        return self._taken()

    @contextlib.contextmanager
    def _taken(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._free += 1


class Service:
    """A model that is served; close it, or use it in a `with` statement."""

    def __init__(
        self, assistant: Assistant, settings: Settings, *, experts: bool, audit: AuditLog | None = None
    ):
        """Starts the engine.

        Args:
          assistant: the model; the caller closes it.
          settings: see the class.
          experts: whether the model may call experts, unless a request says no.
          audit: where requests are recorded; None for nowhere.

        Raises:
          UserError: experts are on, but there are no cards or no results of experts.
        """
        if experts:
            assistant.start_experts()
        self.assistant, self.settings, self.experts = assistant, settings, experts
        self._audit = audit
        self.started = int(time.time())
        self.engine = Engine(assistant.generator, queue=settings.queue)
        self.store = FileStore(
            seconds=settings.file_seconds, max_bytes=settings.max_upload, space=settings.upload_space
        )
        self.metrics = Metrics(
            lambda: self.load, lambda: len(self.store), [card.name for card in assistant.cards]
        )
        self._decoder = DecoderProcess(memory_bytes=_DECODER_BYTES)
        self.masks = MaskStore(seconds=settings.file_seconds)
        self.dialogues = dialogue_store(seconds=settings.file_seconds)
        self.viewer = Viewer(self.store, self._decoder, assistant.generator.processor.preprocessing)
        self._reading = 0
        self._views = Places(_MAX_VIEWS, "too many slices are being shown")
        # Bodies are in memory, and files on disk, before a request can be counted.
        self.bodies = Places(settings.queue, "too many requests are being sent")
        self.uploads = Places(
            max(1, settings.upload_space // settings.max_upload), "too many files are being uploaded"
        )
        # Of their own, so that slow files do not keep other requests from being checked.
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="vilam3-reader")
        self._viewers = ThreadPoolExecutor(_VIEWERS, thread_name_prefix="vilam3-viewer")

    @property
    def load(self) -> int:
        """Requests that wait, read their images, or are answered."""
        return self._reading + self.engine.load

    @property
    def max_length(self) -> int:
        """Positions of a dialogue."""
        return self.assistant.generator.max_length

    def warm_up(self, tell: Callable[[str], None]) -> None:
        """Compiles what typical questions need; `tell` receives lines about its progress."""
        limit = min(self.settings.max_new_tokens, self.max_length)
        warm_up.run(self.assistant, self.engine, experts=self.experts, max_new_tokens=limit, tell=tell)

    async def answer(
        self, check: Callable[[], Ask], owner: str, name: str, *, stream: bool, request: str = ""
    ) -> AsyncGenerator[Step | Answer, None]:
        """Answers a request under a new `name`; yields steps (only if `stream`), and at last the answer.

        `check` reads the request and is called in a thread; `request` is its id in the audit log. Raises its
        errors, and those of `answers.answer`; `BusyError` and `DeadlineError` also before the model is asked;
        `UnavailableError` if the audit log cannot be written.
        """
        trail = Trail(self._audit, request, owner, self.settings.model)
        try:
            async with contextlib.aclosing(
                self._answer(check, owner, name, trail, stream=stream)
            ) as happening:
                async for item in happening:
                    yield item
        except BaseException as error:
            trail.ended(error)
            raise

    async def _answer(
        self, check: Callable[[], Ask], owner: str, name: str, trail: Trail, *, stream: bool
    ) -> AsyncGenerator[Step | Answer, None]:
        until = time.monotonic() + self.settings.deadline
        with contextlib.ExitStack() as keep:
            with self._admitted():
                try:
                    async with asyncio.timeout(self.settings.deadline):
                        ask = await asyncio.to_thread(check)
                        await trail.asked(ask)
                        earlier = self.dialogues.get(ask.previous, owner) if ask.previous else None
                        dialogue = await self._read(ask, owner, keep)
                except TimeoutError:
                    raise DeadlineError(LATE) from None
            left = max(until - time.monotonic(), 0.0)
            happening = answer(
                ask,
                dialogue,
                earlier,
                self.assistant,
                self.engine,
                seconds=left,
                stream=stream,
                clean=self.store.without_paths,
                keep=functools.partial(self.masks.add, owner=owner) if ask.options.masks else None,
            )
            async with contextlib.aclosing(happening):
                async for item in happening:
                    if isinstance(item, Answer):
                        self.metrics.answer(item)
                        await trail.answered(item)
                        if ask.store:
                            self.dialogues.add(name, item.reply.transcript, owner)
                    yield item

    async def annotate(
        self, check: Callable[[], Ask], call: Call, owner: str, *, request: str = ""
    ) -> Annotation:
        """Calls an expert, without the model, on the images of the last message of a request.

        Raises `ApiError` for an expert or an argument that no card lists, and what `answer` raises.
        """
        trail = Trail(self._audit, request, owner, self.settings.model)
        try:
            with contextlib.ExitStack() as keep, self._admitted():
                async with asyncio.timeout(self.settings.deadline):
                    ask = await asyncio.to_thread(check)
                    if not self.experts or (why := self.assistant.refusal(call)):
                        raise bad_request(why if self.experts else NO_EXPERTS)
                    await trail.called(call)
                    dialogue = await self._read(ask, owner, keep)
                    annotation = await asyncio.get_running_loop().run_in_executor(
                        self._readers, self.assistant.annotate, dialogue.question, call
                    )
            await trail.annotated(annotation)
            return annotation
        except TimeoutError:
            late = DeadlineError(LATE)
            trail.ended(late)
            raise late from None
        except BaseException as error:
            trail.ended(error)
            raise

    async def _read(self, ask: Ask, owner: str, keep: contextlib.ExitStack) -> inputs.Dialogue:
        """Reads the images of a request in a thread."""
        read = functools.partial(
            inputs.read,
            ask.said,
            assistant=self.assistant,
            store=self.store,
            decoder=self._decoder,
            owner=owner,
            keep=keep,
        )
        return await asyncio.get_running_loop().run_in_executor(self._readers, read)

    async def view(self, work: Callable[[], T]) -> T:
        """Runs what the page shows in a thread.

        Raises `BusyError` if too much waits, and what `work` raises.
        """
        with self._views.take():
            return await asyncio.get_running_loop().run_in_executor(self._viewers, work)

    @contextlib.contextmanager
    def _admitted(self) -> Iterator[None]:
        """Counts a request before the engine does; refuses it if the queue is full."""
        if self.load >= self.settings.queue:
            raise BusyError("the server is busy; try again in a few seconds")
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` (404) for another model than this server's."""
        if name is not None and name != self.settings.model:
            raise ApiError(
                404, f"no such model; this server has {self.settings.model}", "model_not_found", param="model"
            )

    async def sweep(self) -> None:
        """Deletes expired files, for ever."""
        while True:
            await asyncio.sleep(min(_SWEEP_SECONDS, self.settings.file_seconds / 2))
            await asyncio.to_thread(self.store.sweep)
            self.masks.sweep()
            self.dialogues.sweep()

    def close(self) -> None:
        """Waits for answers in progress, then stops the engine and deletes the files."""
        self.engine.close(seconds=self.settings.drain)
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._viewers.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()
        self.store.close()

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
