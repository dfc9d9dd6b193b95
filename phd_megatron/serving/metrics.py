"""What Prometheus is told."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from phd_megatron.serving.engine import Engine
from phd_megatron.serving.watch import Watch

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics(Watch):
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry, name = self._registry, "phd_megatron"
        self._requests = Counter(
            f"{name}_requests", "requests by path and status", ["path", "status"], registry=registry
        )
        self._read = Counter(f"{name}_prompt_tokens", "tokens of prompts computed", registry=registry)
        self._written = Counter(f"{name}_generated_tokens", "tokens of answers computed", registry=registry)
        self._rows = Counter(f"{name}_rows", "rows that left, by how", ["how"], registry=registry)
        self._first = Histogram(
            f"{name}_time_to_first_token_seconds",
            "from the arrival of a row to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self._token = Histogram(
            f"{name}_seconds_per_token", "of each further token of a row", buckets=_SECONDS, registry=registry
        )
        self._steps = Counter(f"{name}_forward_passes", "forward passes of one token a row", registry=registry)

    def follow(self, engine: Engine) -> None:
        """Tell the engine's queue and batch from now on."""
        for name, what, count in (
            ("queue_length", "rows that wait", lambda: engine.waiting),
            ("running_rows", "rows in the batch", lambda: engine.running),
        ):
            Gauge(f"phd_megatron_{name}", what, registry=self._registry).set_function(count)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)

    def answered(self, path: str, status: int) -> None:
        """A request has its answer's first byte."""
        self._requests.labels(path, str(status)).inc()

    def read(self, tokens: int) -> None:
        self._read.inc(tokens)

    def first(self, seconds: float) -> None:
        self._written.inc()
        self._first.observe(seconds)

    def stepped(self, rows: int, seconds: float) -> None:
        self._steps.inc()
        self._written.inc(rows)
        for _ in range(rows):
            self._token.observe(seconds)

    def ended(self, how: str) -> None:
        self._rows.labels(how).inc()
