"""Counters of the server, in Prometheus' form."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tinyllava_fast.serve.memory import Memory
from tinyllava_fast.serve.served import Served

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
_GAUGES = {
    "running": "Requests that hold rows of the K/V pool",
    "waiting": "Requests that wait for rows of the K/V pool",
    "pool_rows": "Rows of the K/V pool",
    "pool_used_rows": "Rows of the K/V pool that running requests hold",
    "pool_kept_rows": "Rows of the K/V pool that are kept for prompts that begin alike",
}
_COUNTERS = {
    "prompt_tokens": "Tokens of prompts",
    "reused_tokens": "Tokens of prompts whose K/V were there already",
    "generated_tokens": "Tokens generated",
    "images_encoded": "Images that the tower encoded",
    "images_reused": "Images whose features were there already",
    "aborted": "Requests that were aborted",
    "failed": "Requests that could not be answered",
}
TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters and histograms of a server, and at each look what its engines say of themselves."""

    def __init__(self, models: Mapping[str, Served], memory: Memory) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Engines(models))
        held = Gauge("tlf_request_bytes", "Bytes of bodies and pictures that requests hold", registry=self.registry)
        held.set_function(lambda: memory.held)
        most = Gauge("tlf_request_bytes_limit", "Bytes that they may hold together", registry=self.registry)
        most.set(memory.most)
        self.requests = Counter("tlf_http_requests", "Requests answered", ["route", "status"], registry=self.registry)

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"tlf_{name}_seconds", text, ["model"], registry=self.registry, buckets=tuple(buckets))

        self.first = histogram("time_to_first_token", "From a request to its first piece of text", _LONG)
        self.between = histogram("inter_token", "Between two pieces of text of one answer", _SHORT)
        self.whole = histogram("end_to_end", "From a request to the end of its answer", _LONG)

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self.registry)


class Clock:
    """The times of one answer."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.metrics, self.model = metrics, model
        self.began = self.last = time.perf_counter()
        self.pieces = 0

    def piece(self) -> None:
        """Note a piece of text."""
        now = time.perf_counter()
        (self.metrics.between if self.pieces else self.metrics.first).labels(self.model).observe(now - self.last)
        self.pieces, self.last = self.pieces + 1, now

    def end(self) -> None:
        """Note the end."""
        self.metrics.whole.labels(self.model).observe(time.perf_counter() - self.began)


class _Engines(Collector):
    """Statistics of the engines."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self.models = models

    def collect(self) -> Iterator[Metric]:
        """See the base class."""
        stats = {name: served.live.stats() for name, served in self.models.items() if served.base is None}
        for kind, names in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for field, text in names.items():
                family = kind(f"tlf_{field}", text, labels=["model"])
                for name, found in stats.items():
                    family.add_metric([name], getattr(found, field))
                yield family
