"""Many clients of `vilam3 serve` at once: errors, latency, tokens per second, and the server's memory.

    python benchmarks/serving_load.py --checkpoint=RUN [--annotations=DIR] [--clients=50] [--minutes=5]

Starts a server and lets each client ask one question after another: streamed or not, about nothing, an image
as data URL, or an uploaded volume; with experts or without; with follow-ups that the server keeps. Some
clients close the connection in the middle of a stream or of an upload. Half of the uploads are deleted by
their client, the others expire after a minute. The queue is shorter than the number of clients, so some get a
429.

Fails (exit code 1) if there was any other error, if something is left in the queue or on disk, if SIGTERM
does not end the server with 0, or if memory grew: the median of the last quarter of the time must be at most
5 % above that of the second quarter. Memory is the resident set of the server and its child processes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import dataclasses
import gzip
import io
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import nibabel
import numpy as np
import psutil
from PIL import Image

CHAT = "/v1/chat/completions"
QUESTIONS = (
    "Is there a pleural effusion?",
    "Describe this image.",
    "Is the liver visible in this slice? Answer with yes or no.",
    "What imaging modality is this, and which organs can you see?",
)
GROWTH = 1.05
FILE_MINUTES = 1.0
SETTLE_SECONDS = 90


@dataclasses.dataclass
class Counts:
    """What the clients saw; seconds are of answers with status 200."""

    statuses: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: list[float] = dataclasses.field(default_factory=list)
    first: list[float] = dataclasses.field(default_factory=list)  # until the first text of a stream
    tokens: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)


def film(rng: np.random.Generator) -> bytes:
    """A PNG of 256 x 256 pixels that no other client has."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (256, 256), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def volume(rng: np.random.Generator) -> bytes:
    """A NIfTI volume of 64 x 64 x 32 voxels in HU."""
    voxels = rng.integers(-1000, 1000, (64, 64, 32)).astype(np.int16)
    return gzip.compress(nibabel.Nifti1Image(voxels, np.diag([4.0, 4.0, 6.0, 1.0])).to_bytes(), 1)


class Client:
    """One client, which asks until it is stopped."""

    def __init__(self, number: int, url: str, counts: Counts, *, experts: bool):
        self._choice, self._rng = random.Random(number), np.random.default_rng(number)
        self._http = httpx.AsyncClient(base_url=url, timeout=400)
        self._url, self._counts, self._experts = url, counts, experts

    async def run(self, until: float) -> None:
        """Asks until a time of `time.monotonic`."""
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "text": self.text,
            "data URL": self.data_url,
            "upload and follow-up": self.upload,
            "killed stream": self.killed_stream,
            "half upload": self.half_upload,
        }
        async with self._http:
            while time.monotonic() < until:
                kind = self._choice.choices(list(kinds), (3, 4, 3, 1, 1))[0]
                self._counts.kinds[kind] += 1
                try:
                    await kinds[kind]()
                except (httpx.HTTPError, ValueError) as error:
                    self._counts.problems.append(f"{kind}: {error!r}")

    async def text(self) -> None:
        await self._ask(self._choice.choice(QUESTIONS))

    async def data_url(self) -> None:
        url = "data:image/png;base64," + base64.b64encode(film(self._rng)).decode()
        await self._ask([{"type": "text", "text": self._choice.choice(QUESTIONS)}, _image(url)])

    async def upload(self) -> None:
        stored = await self._send("POST", "/v1/files", files={"file": ("scan", volume(self._rng))})
        if stored is None:
            return
        name = stored.json()["id"]
        part = {**_image(name), "vilam3": {"modality": "CT", "slice": self._choice.randrange(32)}}
        await self._send("GET", f"/v1/files/{name}/slice", params={"index": "7", "modality": "CT"})
        question = {"type": "text", "text": self._choice.choice(QUESTIONS)}
        answer = await self._ask([question, part], store=True)
        if answer is not None:
            await self._ask("Are you sure?", previous=answer)
        if self._choice.random() < 0.5:
            await self._send("DELETE", f"/v1/files/{name}")

    async def killed_stream(self) -> None:
        async for _ in self._stream(self._body("Describe the liver.", max_tokens=200)):
            if self._choice.random() < 0.3:
                return  # which closes the connection

    async def half_upload(self) -> None:
        host, port = self._url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/files HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000000\r\n"
        part = '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        writer.write(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n{part}".encode())
        writer.write(b"\x89PNG" + bytes(200_000))
        await writer.drain()
        await asyncio.sleep(self._choice.random())
        writer.close()
        self._counts.statuses["left"] += 1

    def _body(self, content: Any, *, previous: str = "", **more: Any) -> dict[str, Any]:
        extra: dict[str, Any] = {"experts": self._experts and self._choice.random() < 0.5}
        if previous:
            extra["previous"] = previous
        body = {"messages": [{"role": "user", "content": content}], "vilam3": extra}
        return {"max_tokens": self._choice.choice((8, 24, 48)), **body, **more}

    async def _ask(self, content: Any, **more: Any) -> str | None:
        """Asks; returns the id of the answer, or None if the server refused."""
        body, started = self._body(content, **more), time.monotonic()
        if self._choice.random() < 0.5:
            response = await self._send("POST", CHAT, json=body)
            if response is None:
                return None
            found = response.json()
            name, tokens = found["id"], found["usage"]["completion_tokens"]
        else:
            name, tokens = None, 0
            async for event in self._stream({**body, "stream_options": {"include_usage": True}}, started):
                name = event.get("id", name)
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            if name is None:
                return None
        self._counts.seconds.append(time.monotonic() - started)
        self._counts.tokens += tokens
        return name

    async def _send(self, method: str, path: str, **options: Any) -> httpx.Response | None:
        response = await self._http.request(method, path, **options)
        return response if await self._accepted(response) else None

    async def _accepted(self, response: httpx.Response) -> bool:
        """Counts a response; waits after a 429."""
        status = response.status_code
        self._counts.statuses[str(status)] += 1
        if status == 429:
            await asyncio.sleep(float(response.headers["Retry-After"]) * self._choice.random())
        elif status != 200:
            await response.aread()
            self._counts.problems.append(f"{status}: {response.text[:200]}")
        return status == 200

    async def _stream(self, body: dict[str, Any], started: float | None = None) -> AsyncIterator[Any]:
        """The events of an answer; none if the server refused."""
        async with self._http.stream("POST", CHAT, json={**body, "stream": True}) as response:
            if not await self._accepted(response):
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self._counts.problems.append(f"in a stream: {event['error']['message']}")
                delta = (event.get("choices") or [{}])[0].get("delta", {})
                if started is not None and ("draft" in delta or delta.get("content")):
                    self._counts.first.append(time.monotonic() - started)
                    started = None
                yield event


def _image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


class Memory:
    """Resident bytes of a process and its children, twice a second."""

    def __init__(self, pid: int):
        self._process = psutil.Process(pid)
        self.samples: list[tuple[float, int]] = []

    def now(self) -> int:
        total = 0
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    async def watch(self) -> None:
        while True:
            self.samples.append((time.monotonic(), self.now()))
            await asyncio.sleep(0.5)

    def median(self, start: float, end: float) -> float:
        """Of the samples between two times."""
        return statistics.median(size for when, size in self.samples if start <= when <= end)


@dataclasses.dataclass
class Server:
    """A running server."""

    process: asyncio.subprocess.Process
    url: str
    seconds: float  # until it was ready


@contextlib.asynccontextmanager
async def running(checkpoint: str, folder: Path, *flags: str) -> AsyncIterator[Server]:
    """`vilam3 serve` with files in `folder`; raises RuntimeError with its output if it does not start.

    Its log goes to `server.log` in the folder.
    """
    started = time.monotonic()
    flags = (f"--checkpoint={checkpoint}", "--port=0", "--expert_host=off", *flags)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vilam3_jax.cli", "serve", *flags),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    lines: list[str] = []
    assert process.stderr is not None
    try:
        async for line in process.stderr:
            lines.append(line.decode())
            print(lines[-1], end="", file=sys.stderr)
            if found := re.search(r"http://[\d.]+:\d+", lines[-1]):
                break
        else:
            raise RuntimeError("".join(lines))
        log = asyncio.create_task(_keep(process.stderr, folder / "server.log"))
        yield Server(process, found[0], time.monotonic() - started)
        await log
    finally:
        if process.returncode is None:
            process.kill()


async def _keep(stream: asyncio.StreamReader, into: Path) -> None:
    with into.open("wb") as sink:
        async for line in stream:
            sink.write(line)


async def stopped(server: Server, folder: Path) -> list[str]:
    """Ends the server by SIGTERM; returns what is wrong with its end or its log."""
    server.process.send_signal(signal.SIGTERM)
    wrong = [f"SIGTERM ended the server with {code}"] if (code := await server.process.wait()) else []
    if "Traceback" in (text := (folder / "server.log").read_text()):
        wrong.append(f"a traceback in the log:\n{text[-5000:]}")
    return wrong + [f"left behind: {one}" for one in folder.glob("vilam3-files-*")]


async def settled(url: str, folder: Path) -> list[str]:
    """What is left after the clients: nothing, some time after the last upload expired."""
    left: list[str] = []
    until = time.monotonic() + FILE_MINUTES * 60 + SETTLE_SECONDS
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while time.monotonic() < until:
            text = (await http.get("/metrics")).text
            gauges = dict(
                line.split(" ") for line in text.splitlines() if re.match(r"vilam3_(queue|files) ", line)
            )
            left = [f"{name} {value}" for name, value in gauges.items() if float(value)]
            # Folders may disappear meanwhile, which `os.walk` ignores.
            stores = list(folder.glob("vilam3-files-*"))
            left += [name for store in stores for _, _, names in os.walk(store) for name in names]
            if not left:
                break
            await asyncio.sleep(1)
        if (health := (await http.get("/healthz")).json()) != {"status": "ok"}:
            left.append(f"healthz: {health}")
    return left


def report(counts: Counts, memory: Memory, server: Server, began: float, ended: float) -> list[str]:
    """Prints the figures; returns what is wrong."""

    def shown(values: list[float]) -> str:
        if len(values) < 2:
            return "too few"
        parts = statistics.quantiles(values, n=100, method="inclusive")
        return f"p50 {parts[49]:.2f} s, p95 {parts[94]:.2f} s, p99 {parts[98]:.2f} s"

    quarter = (ended - began) / 4
    early = memory.median(began + quarter, began + 2 * quarter)
    late = memory.median(ended - quarter, ended)
    mib = 1 << 20
    print(f"ready after            {server.seconds:.0f} s, warm-up included")
    print(f"tasks of clients       {dict(counts.kinds)}")
    print(f"requests by status     {dict(counts.statuses)}")
    print(f"answers                {len(counts.seconds)}, {shown(counts.seconds)}")
    print(f"time to first text     {shown(counts.first)}")
    print(f"tokens per second      {counts.tokens / (ended - began):.1f}")
    print(f"memory at the start    {memory.samples[0][1] / mib:.0f} MiB")
    minutes = range(int((ended - began) / 60))
    medians = [memory.median(began + 60 * minute, began + 60 * (minute + 1)) / mib for minute in minutes]
    print(f"memory by minute       {', '.join(f'{one:.0f}' for one in medians)} MiB")
    print(f"memory, second quarter {early / mib:.0f} MiB")
    print(f"memory, last quarter   {late / mib:.0f} MiB, {100 * (late / early - 1):+.1f} %")
    wrong = sorted(set(counts.problems))[:20]
    if not counts.seconds:
        wrong.append("nothing was answered")
    if late > GROWTH * early:
        wrong.append(f"memory grew by {100 * (late / early - 1):.1f} %")
    return wrong


async def campaign(options: argparse.Namespace, folder: Path) -> list[str]:
    """Runs the clients; returns what went wrong."""
    flags = [f"--slots={options.slots}", f"--queue={options.queue}", f"--file_minutes={FILE_MINUTES}"]
    flags += [f"--annotations={options.annotations}"] if options.annotations else []
    async with running(options.checkpoint, folder, *flags) as server:
        memory, counts = Memory(server.process.pid), Counts()
        watch = asyncio.create_task(memory.watch())
        began = time.monotonic()
        clients = [
            Client(number, server.url, counts, experts=bool(options.annotations))
            for number in range(options.clients)
        ]
        await asyncio.gather(*(client.run(began + 60 * options.minutes) for client in clients))
        ended = time.monotonic()
        watch.cancel()
        wrong = report(counts, memory, server, began, ended)
        wrong += [f"left behind: {one}" for one in await settled(server.url, folder)]
        print(f"memory, idle           {memory.now() / (1 << 20):.0f} MiB")
        return wrong + await stopped(server, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a run or an export")
    parser.add_argument("--annotations", help="annotation store; without it, experts are off")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--queue", type=int, default=32)
    with tempfile.TemporaryDirectory() as folder:
        wrong = asyncio.run(campaign(parser.parse_args(), Path(folder)))
    for problem in wrong:
        print(f"error: {problem}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
