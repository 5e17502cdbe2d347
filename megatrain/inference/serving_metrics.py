"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from megatrain.inference.batch_generator import Counts
from megatrain.inference.generation_thread import GenerationThread

PATHS = ("/", "/health", "/metrics", "/ready", "/v1/chat/completions", "/v1/completions", "/v1/models")
"""The paths that are counted by name. Another would be a label that a client chooses."""

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class ServingMetrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self, thread: GenerationThread, num_slots: int) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "megatrain_requests", "Requests by path and HTTP status", ["path", "status"], registry=self.registry
        )
        self.finished = Counter(
            "megatrain_replies", "Replies by why they ended", ["finish_reason"], registry=self.registry
        )
        self.first_token = Histogram(
            "megatrain_time_to_first_token_seconds",
            "Seconds from a request to its first token",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "megatrain_request_seconds", "Seconds from a request to its end", buckets=_SECONDS, registry=self.registry
        )
        generator = thread.generator
        self._gauge("megatrain_slots", "Replies that can be computed at once", lambda: num_slots)
        self._gauge("megatrain_replies_running", "Replies that have a slot", lambda: generator.num_active)
        self._gauge(
            "megatrain_replies_waiting",
            "Replies that wait for a slot",
            lambda: max(0, thread.num_open - generator.num_active),
        )
        self.registry.register(_TokenCounts(generator.counts))

    def count(self, path: str, status: int) -> None:
        """Count an answered request."""
        self.requests.labels(path if path in PATHS else "other", str(status)).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        Gauge(name, help, registry=self.registry).set_function(read)


class _TokenCounts(Collector):
    """The generator's own counts."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the counts as they are now."""
        yield CounterMetricFamily("megatrain_prompt_tokens", "Tokens of prompts computed", self._counts.prompt_tokens)
        yield CounterMetricFamily("megatrain_reused_tokens", "Tokens of prompts reused", self._counts.reused_tokens)
        yield CounterMetricFamily("megatrain_generated_tokens", "Tokens generated", self._counts.generated_tokens)
