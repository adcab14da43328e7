"""Prometheus metrics of a server: counts and seconds, no content."""

from __future__ import annotations

from collections.abc import Callable, Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from vilam3_jax.serving.answers import Answer

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, queue: Callable[[], int], files: Callable[[], int], experts: Collection[str]):
        """`queue` and `files` return current numbers; `experts` are the names that may become labels."""
        self._registry = CollectorRegistry()
        self._experts = frozenset(experts)

        def named(kind: type, name: str, text: str, labels: tuple[str, ...] = (), **options: object):
            return kind(name, text, labels, registry=self._registry, **options)

        self._requests = named(Counter, "vilam3_requests", "HTTP requests", ("route", "status"))
        self._seconds = named(
            Histogram, "vilam3_request_seconds", "Seconds of a request", ("route",), buckets=_SECONDS
        )
        self._errors = named(Counter, "vilam3_errors", "Refused or failed requests", ("code",))
        self._tokens = named(Counter, "vilam3_tokens", "Tokens read and written", ("kind",))
        self._calls = named(Counter, "vilam3_expert_calls", "Results of experts", ("expert", "status"))
        named(Gauge, "vilam3_queue", "Requests that wait or are answered").set_function(queue)
        named(Gauge, "vilam3_files", "Uploaded files").set_function(files)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def error(self, code: str) -> None:
        """Counts an error."""
        self._errors.labels(code).inc()

    def answer(self, answer: Answer) -> None:
        """Counts the tokens and the expert calls of an answer."""
        self._tokens.labels("prompt").inc(answer.usage.prompt)
        self._tokens.labels("completion").inc(answer.usage.completion)
        for annotation in answer.reply.transcript.annotations:
            # A model may invent names without end.
            name = annotation.expert if annotation.expert in self._experts else "unknown"
            self._calls.labels(name, annotation.status).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
