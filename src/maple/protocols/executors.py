"""Who carries out the runs: this process, or several on this machine."""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from maple.errors import ConfigError
from maple.protocols.plan import PlannedRun
from maple.protocols.runner import (
    Outcome,
    SweepProgress,
    carry_out,
    chosen_runs,
    failed_outcome,
    finished_outcome,
    record_failure,
    status_of,
)

_ATTEMPTS = 3
"""How often a run is begun whose process dies (out of memory, killed) before it counts as failed."""


def run_sweep(
    runs: Sequence[PlannedRun],
    root: Path,
    *,
    jobs: int = 1,
    device: str | None = None,
    retry_failed: bool = False,
    progress: SweepProgress,
) -> list[Outcome]:
    """Carry out what is left of a plan; return the outcome of every run, in the plan's order.

    Args:
        root: the folder of the runs' folders.
        jobs: processes on this machine. On GPUs they take turns among them; on CPUs they share the cores.
        device: where to compute; without it the GPUs in turn, or the CPU.
        retry_failed: begin runs again that failed in an earlier sweep.

    Raises:
        ConfigError: `jobs` is below 1.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; it must be at least 1")
    outcomes: dict[str, Outcome] = {}
    left = chosen_runs(runs, root, retry_failed=retry_failed)
    names = {run.name for run in left}
    for run in runs:
        if run.name not in names:
            done = status_of(run, root) == "finished"
            outcomes[run.name] = finished_outcome(run, root) if done else failed_outcome(run, root)
            progress.ended(run, outcomes[run.name])
    ends = _in_turn(left, root, device, progress) if jobs == 1 else _in_parallel(left, root, device, jobs, progress)
    for run, outcome in ends:
        outcomes[run.name] = outcome
        progress.ended(run, outcome)
    return [outcomes[run.name] for run in runs]


def _in_turn(
    runs: Sequence[PlannedRun], root: Path, device: str | None, progress: SweepProgress
) -> Iterator[tuple[PlannedRun, Outcome]]:
    for run in runs:
        yield run, carry_out(run, root, device, progress.doing)


def _in_parallel(
    runs: Sequence[PlannedRun], root: Path, device: str | None, jobs: int, progress: SweepProgress
) -> Iterator[tuple[PlannedRun, Outcome]]:
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    listener = threading.Thread(target=_listen, args=(messages, progress), daemon=True)
    listener.start()
    attempts = dict.fromkeys((run.name for run in runs), 0)
    waiting = list(runs)
    try:
        while waiting:
            # A process that dies takes the pool with it; what it had not finished goes into a new one.
            for run, outcome in _one_pool(waiting, root, device, jobs, context, messages):
                if outcome is None:
                    attempts[run.name] += 1
                    if attempts[run.name] < _ATTEMPTS:
                        continue
                    error = f"its process died {_ATTEMPTS} times without a word (killed, or out of memory?)"
                    outcome = record_failure(run, root, error)
                waiting.remove(run)
                yield run, outcome
    finally:
        messages.put(None)
        listener.join(timeout=5)


def _one_pool(
    runs: Sequence[PlannedRun], root: Path, device: str | None, jobs: int, context: Any, messages: Any
) -> Iterator[tuple[PlannedRun, Outcome | None]]:
    """The runs and their outcomes as they end; None for those that were under way when a process died."""
    places = context.Queue()
    for number in range(jobs):
        places.put(number)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, context, _enter, (places, messages, device, threads))
    upcoming = iter(list(runs))
    under_way: dict[Future[Outcome], PlannedRun] = {}
    run: PlannedRun | None = None
    try:
        while True:
            # Only as many as there are processes: those that wait are not hurt by a death.
            while len(under_way) < jobs and (run := next(upcoming, None)) is not None:
                under_way[pool.submit(_work, run, root)] = run
            if not under_way:
                return
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                run = under_way.pop(future)
                yield run, future.result()
    except BrokenProcessPool:
        for begun in [*([run] if run else []), *under_way.values()]:
            yield begun, None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _listen(messages: Any, progress: SweepProgress) -> None:
    while (message := messages.get()) is not None:
        progress.doing(*message)


_worker: dict[str, Any] = {}
"""What a worker process was told when it began."""


def _enter(places: Any, messages: Any, device: str | None, threads: int) -> None:
    number = places.get()
    if device is None and torch.cuda.is_available():
        device = f"cuda:{number % torch.cuda.device_count()}"
    torch.set_num_threads(threads)
    _worker.update(device=device, messages=messages)


def _work(run: PlannedRun, root: Path) -> Outcome:
    return carry_out(run, root, _worker["device"], lambda *message: _worker["messages"].put(message))
