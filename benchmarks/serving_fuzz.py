"""Malformed requests to `vilam3 serve`, made by schemathesis from the server's own OpenAPI description.

    pip install schemathesis
    python benchmarks/serving_fuzz.py --checkpoint=RUN [--requests=10000] [--seed=0]

Starts a server with short dialogues and runs rounds of `schemathesis run` until the server has refused so
many requests. Every response must have a status below 500, the declared content type, and the declared
schema; errors are one sentence in OpenAI's form. After that the server must answer a question, its queue must
be empty and /healthz must be ok. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
from pathlib import Path

import httpx2 as httpx
from serving_load import CHAT, running, stopped

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
EXAMPLES = 100  # for each operation in a round


def counted(http: httpx.Client) -> dict[str, int]:
    """Requests by status, as the server counts them."""
    found: dict[str, int] = {}
    for status, count in re.findall(
        r'^vilam3_requests_total{.*status="(\d+)"} (\S+)', http.get("/metrics").text, re.M
    ):
        found[status] = found.get(status, 0) + int(float(count))
    return found


def refused(statuses: dict[str, int]) -> int:
    """Number of requests that the server refused as malformed or unknown."""
    return sum(count for status, count in statuses.items() if status.startswith("4"))


async def campaign(options: argparse.Namespace, folder: Path) -> list[str]:
    """Runs the rounds; returns what went wrong."""
    flags = ("--max_length=512", "--max_new_tokens=4", "--deadline=60", "--file_minutes=2", "--no_warm_up")
    wrong: list[str] = []
    seed = options.seed
    async with running(options.checkpoint, folder, *flags) as server:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            while refused(counted(http)) < options.requests and not wrong:
                process = await asyncio.create_subprocess_exec(
                    *("schemathesis", "run", f"{server.url}/openapi.json", f"--checks={','.join(CHECKS)}"),
                    *("--phases=fuzzing", "--mode=all", f"--max-examples={EXAMPLES}", f"--seed={seed}"),
                    *("--continue-on-failure", "--request-timeout=120", "--suppress-health-check=all"),
                    "--no-color",
                    cwd=folder,
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.STDOUT,
                )
                output, _ = await process.communicate()
                if process.returncode:
                    wrong.append(output.decode())
                seed += 1
            statuses = counted(http)
            answer = http.post(CHAT, json={"messages": [{"role": "user", "content": "Is it?"}]})
            health, gauges = http.get("/healthz"), http.get("/metrics").text
        print(f"requests by status {statuses}, {refused(statuses)} refused, in {seed - options.seed} rounds")
        wrong += [
            f"{count} responses of status {status}" for status, count in statuses.items() if status >= "500"
        ]
        if answer.status_code != 200 or health.json() != {"status": "ok"} or "vilam3_queue 0.0" not in gauges:
            wrong.append(f"afterwards: {answer.status_code}, {health.text}")
        return wrong + await stopped(server, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="a run or an export; a tiny one suffices")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    with tempfile.TemporaryDirectory() as folder:
        wrong = asyncio.run(campaign(parser.parse_args(), Path(folder)))
    for problem in wrong:
        print(f"error: {problem}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
