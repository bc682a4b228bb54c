"""Pictures of many requests through the model at once, each answered under its own class names."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from maple.errors import ClassNamesError, MapleError
from maple.inference.predictor import EncodedClasses, Floats, Predictor
from maple.serve.limits import Limits
from maple.serve.problems import Problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answered:
    """Probabilities of the pictures of one request.

    Attributes:
        names: the C class names.
        note: on names that were not trained.
        tuned, frozen: [n, C] of the trained method and of the frozen CLIP.
    """

    names: tuple[str, ...]
    note: str | None
    tuned: Floats
    frozen: Floats | None


@dataclass
class Job:
    """The pictures of one request, [n] views [3, R, R], and the class names to choose from, None for the trained ones.

    `abandoned` says that nobody waits for the answer any more; who says so also cancels `answer`.
    """

    names: tuple[str, ...] | None
    views: list[Floats] = field(default_factory=list)
    abandoned: bool = False
    answer: "Future[Answered]" = field(default_factory=Future)


class Batcher:
    """One thread that owns the model; `put` hands it jobs from any other.

    It waits for nobody but bounds nothing either: whoever puts jobs counts them (see `Capacity`).
    """

    def __init__(self, answerer: Predictor, limits: Limits) -> None:
        self._answerer = answerer
        self._limits = limits
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="maple-model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether a job would be worked on."""
        return self._thread.is_alive() and not self._closing

    def put(self, job: Job) -> None:
        """Take a job on; its `answer` is set or fails with a Problem.

        Raises:
            Problem: the server stops.
        """
        if not self.ready:
            raise Problem("not_ready", "the server is about to stop; send the request to another, or later")
        self._jobs.put(job)

    def close(self, seconds: float) -> bool:
        """Finish what was taken on, in at most so many seconds; return whether the thread has ended."""
        self._closing = True
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while batch := self._next():
            # From here on an answer cannot be cancelled any more.
            waited_for = [job for job in batch if not job.abandoned and job.answer.set_running_or_notify_cancel()]
            try:
                self._answer(waited_for)
            except Exception as error:  # noqa: BLE001 - the thread goes on, whatever happened to one batch
                # One picture must not cost the others their answer.
                if len(waited_for) == 1:
                    _fail(waited_for[0], error)
                    continue
                for job in waited_for:
                    if not job.answer.done():
                        self._answer_alone(job)

    def _answer_alone(self, job: Job) -> None:
        try:
            self._answer([job])
        except Exception as error:  # noqa: BLE001 - as above
            _fail(job, error)

    def _next(self) -> list[Job]:
        """The jobs of the next batch: at least one, then what comes in a moment and fits. Empty at the end."""
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
                self._jobs.put(None)
                break
            batch.append(job)
            count += len(job.views)
        return batch

    def _answer(self, jobs: Sequence[Job]) -> None:
        groups: dict[tuple[str, ...] | None, list[Job]] = defaultdict(list)
        for job in jobs:
            groups[job.names].append(job)
        spoken: dict[tuple[str, ...] | None, EncodedClasses] = {}
        for names, asked in groups.items():
            try:
                spoken[names] = self._answerer.encode_class_names(names)
            except ClassNamesError as error:
                for job in asked:
                    job.answer.set_exception(Problem("class_names", str(error)))
        able = [job for names in spoken for job in groups[names]]
        views = [view for job in able for view in job.views]
        size = self._limits.batch
        seen: list[Any] = []
        for start in range(0, len(views), size):
            seen += self._answerer.encode(np.stack(views[start : start + size]))
        for names, about in spoken.items():
            count = sum(len(job.views) for job in groups[names])
            of_group, seen = seen[:count], seen[count:]
            tuned, frozen = self._answerer.probabilities(of_group, about)
            _share(groups[names], about.names, about.note, tuned, frozen)


def _share(jobs: Sequence[Job], names: Sequence[str], note: str | None, tuned: Floats, frozen: Floats | None) -> None:
    """Give each job its rows of the probabilities [n, C] of all of them."""
    if not np.isfinite(tuned).all() or not (frozen is None or np.isfinite(frozen).all()):
        raise MapleError("the model gave a probability that is not a number")
    start = 0
    for job in jobs:
        rows = slice(start, start := start + len(job.views))
        job.answer.set_result(Answered(tuple(names), note, tuned[rows], None if frozen is None else frozen[rows]))


def _fail(job: Job, error: Exception) -> None:
    if isinstance(error, MapleError):
        problem = Problem("model_failed", f"the model could not answer: {error}")
    else:
        logger.error("the model failed", exc_info=error)
        problem = Problem("model_failed", "the model could not answer; the server's log says why")
    job.answer.set_exception(problem)
