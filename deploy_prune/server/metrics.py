"""What is counted, for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from .versions import Version

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Count requests, runs and queues in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._watched: dict[tuple[str, str], Version] = {}
        prefix = "deploy_prune"
        self.requests = Counter(
            f"{prefix}_requests", "Requests by how they ended.", ("protocol", "model", "code"), registry=self.registry
        )
        self.latency = Histogram(
            f"{prefix}_request_seconds",
            "From the decoded request to its outputs.",
            ("protocol", "model"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.run_seconds = Histogram(
            f"{prefix}_run_seconds",
            "One run of a model.",
            ("model", "version"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.run_rows = Histogram(
            f"{prefix}_run_rows",
            "Rows that went into one run.",
            ("model", "version"),
            buckets=ROWS,
            registry=self.registry,
        )
        self.waiting = Gauge(
            f"{prefix}_waiting_rows", "Rows in the queue.", ("model", "version"), registry=self.registry
        )

    def count(self, protocol: str, model: str, code: str, seconds: float) -> None:
        """Count one request that has ended."""
        self.requests.labels(protocol, model, code).inc()
        self.latency.labels(protocol, model).observe(seconds)

    def watch(self, version: Version) -> None:
        """Count the runs of a version from now on, until it is closed."""
        labels = (version.name, str(version.number))

        def on_run(rows: int, seconds: float) -> None:
            self.run_seconds.labels(*labels).observe(seconds)
            self.run_rows.labels(*labels).observe(rows)

        def on_close() -> None:  # the gauge alone would keep the version for ever
            if self._watched.get(labels) is version:  # it may have been opened again meanwhile
                del self._watched[labels]
                for metric in (self.run_seconds, self.run_rows, self.waiting):
                    metric.remove(*labels)

        version.on_run, version.on_close = on_run, on_close
        self._watched[labels] = version
        self.waiting.labels(*labels).set_function(lambda: version.batcher.rows)

    def text(self) -> bytes:
        """Return all counts in Prometheus' text format."""
        return generate_latest(self.registry)
