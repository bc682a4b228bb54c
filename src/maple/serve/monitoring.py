"""Metrics for Prometheus: requests, images, batches, and the length of the queue."""

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response
from starlette.routing import compile_path

METRICS_PATH = "/metrics"
OTHER_ROUTE = "other"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one server, in a registry of their own, so that a program may have several servers.

    Labels take few values: a route is a path of the API's description or of the page, else "other".
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "maple", "registry": self.registry}
        ProcessCollector(registry=self.registry)
        self._requests = Counter("requests", "Answered requests.", ["route", "status"], **common)
        self._seconds = Histogram(
            "request_seconds",
            "Seconds until a request is answered.",
            ["route"],
            buckets=_SECONDS,
            **common,
        )
        self.images = Counter("images", "Classified images.", **common)
        self.rejected = Counter("rejected_images", "Images answered with none of the classes (`reject`).", **common)
        self.batch_images = Histogram("batch_images", "Images in a batch of the model.", buckets=_IMAGES, **common)
        self._queue = Gauge("queue_images", "Images that wait or are being processed.", **common)
        self._queue_limit = Gauge("queue_limit_images", "Images beyond which requests are refused as busy.", **common)
        self._routes: list[tuple[str, Any]] = []

    def watch_queue(self, used: Callable[[], int], total: int) -> None:
        """Report the images in progress, which `used` counts whenever the metrics are read."""
        self._queue.set_function(used)
        self._queue_limit.set(total)

    def name_routes(self, paths: Iterable[str]) -> None:
        """Set the paths that have a label of their own, with parameters in braces as in OpenAPI."""
        self._routes = [(path, compile_path(path)[0]) for path in paths]

    def record(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        route = next((name for name, pattern in self._routes if pattern.match(path)), OTHER_ROUTE)
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def response(self) -> Response:
        """All metrics, in Prometheus' text format."""
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)
