"""Batches images of several requests for the model; each request keeps its own class names."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from maple.errors import ClassNamesError
from maple.inference.predictor import EncodedClasses, Floats, Predictor
from maple.serve.limits import Limits
from maple.serve.responses import ApiError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassProbabilities:
    """The probabilities [n, C] for the n images of one request, by the trained method and by the frozen CLIP."""

    names: tuple[str, ...]
    note: str | None  # on class names that were not trained
    tuned: Floats
    frozen: Floats | None


@dataclass
class Job:
    """The images of one request, n views [3, R, R], and the class names to choose from (None for the trained ones).

    `abandoned` says that the result is no longer needed; whoever sets it also cancels `result`.
    """

    names: tuple[str, ...] | None
    views: list[Floats] = field(default_factory=list)
    abandoned: bool = False
    result: "Future[ClassProbabilities]" = field(default_factory=Future)


class Batcher:
    """A thread that owns the model; `put` hands it jobs from any other thread.

    It does not bound how many jobs wait: the caller does (see `Capacity`).

    Args:
        on_batch: called in the thread with the number of images of each batch.
    """

    def __init__(self, predictor: Predictor, limits: Limits, on_batch: Callable[[int], None] = lambda _: None) -> None:
        self._predictor = predictor
        self._limits = limits
        self._on_batch = on_batch
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._process_batches, name="maple-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def ready(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def put(self, job: Job) -> None:
        """Accept a job; its `result` is set, or fails with an ApiError. Raises ApiError if the server is stopping."""
        if not self.ready:
            raise ApiError("not_ready", "the server is stopping; send the request to another one, or retry later")
        self._jobs.put(job)

    def close(self, seconds: float) -> bool:
        """Finish the accepted jobs, within the given seconds; return whether the thread has ended."""
        self._closing = True
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _process_batches(self) -> None:
        while batch := self._next_batch():
            # From here on, a result can no longer be cancelled.
            jobs = [job for job in batch if not job.abandoned and job.result.set_running_or_notify_cancel()]
            self._attempt(jobs)

    def _attempt(self, jobs: Sequence[Job]) -> None:
        """Set the results of jobs, or their error."""
        try:
            self._predict(jobs)
        except Exception as error:
            if len(jobs) > 1:
                # One bad image must not cost the other requests their result, so each job is repeated alone.
                for job in jobs:
                    if not job.result.done():
                        self._attempt([job])
                return
            if not isinstance(error, ApiError):
                # The messages of other errors are not for clients: they may name folders of this machine.
                logger.error("the model failed", exc_info=error)
                error = ApiError("model_failed", "the model failed: see the server's log")
            jobs[0].result.set_exception(error)

    def _next_batch(self) -> list[Job]:
        """Wait for a job, then add those that arrive within `wait` seconds and fit. Empty when closed."""
        first = self._jobs.get()
        if first is None:
            return []
        batch, count = [first], len(first.views)
        until = time.monotonic() + self._limits.wait
        while count < self._limits.batch:
            try:
                job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                break
            if job is None:
                self._jobs.put(None)  # for the next call
                break
            batch.append(job)
            count += len(job.views)
        return batch

    def _predict(self, jobs: Sequence[Job]) -> None:
        """Set the results of jobs: the images are encoded together, then compared with each list of class names."""
        groups: dict[tuple[str, ...] | None, list[Job]] = defaultdict(list)
        for job in jobs:
            groups[job.names].append(job)
        encoded: dict[tuple[str, ...] | None, EncodedClasses] = {}
        for names, group in groups.items():
            try:
                encoded[names] = self._predictor.encode_class_names(names)
            except ClassNamesError as error:
                for job in group:
                    job.result.set_exception(ApiError("class_names", str(error)))
        views = [view for names in encoded for job in groups[names] for view in job.views]
        features: list[Any] = []
        for start in range(0, len(views), self._limits.batch):
            batch = np.stack(views[start : start + self._limits.batch])
            self._on_batch(len(batch))
            features += self._predictor.encode_images(batch)
        for names, classes in encoded.items():
            count = sum(len(job.views) for job in groups[names])
            of_group, features = features[:count], features[count:]
            tuned, frozen = self._predictor.probabilities(of_group, classes)
            if not np.isfinite(tuned).all() or not (frozen is None or np.isfinite(frozen).all()):
                raise ApiError("model_failed", "the model failed: it returned a probability that is not a number")
            start = 0
            for job in groups[names]:
                rows = slice(start, start := start + len(job.views))
                frozen_rows = None if frozen is None else frozen[rows]
                job.result.set_result(ClassProbabilities(classes.names, classes.note, tuned[rows], frozen_rows))
