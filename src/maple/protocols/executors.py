"""Who carries out the runs: this process, or several on this machine (ray_executor.py: many machines).

An executor is one function of (runs, root, work, report) that gives back each run with its outcome, in the order in
which they end; its own options are bound beforehand (`functools.partial`).
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

from maple.errors import ConfigError
from maple.protocols.plan import PlannedRun
from maple.protocols.runner import (
    Outcome,
    Report,
    SweepProgress,
    carry_out,
    failed_outcome,
    finished_outcome,
    record_failure,
    status_of,
)

Work = Callable[[PlannedRun, Path, str | None, Report], Outcome]
"""Carries out one run below a root folder on a device; it must travel to other processes."""
Ends = Iterator[tuple[PlannedRun, Outcome]]
Executor = Callable[[Sequence[PlannedRun], Path, Work, Report], Ends]

ATTEMPTS = 3
"""How often a run is begun whose process dies (out of memory, killed) before it counts as failed."""


def run_sweep(
    runs: Sequence[PlannedRun],
    root: Path,
    *,
    jobs: int = 1,
    device: str | None = None,
    executor: Executor | None = None,
    work: Work = carry_out,
    retry_failed: bool = False,
    progress: SweepProgress,
) -> list[Outcome]:
    """Carry out what is left of a plan; return the outcome of every run, in the plan's order.

    Args:
        root: the folder of the runs' folders.
        jobs: processes on this machine. On GPUs they take turns among them; on CPUs they share the cores.
        device: where to compute; without it the GPUs in turn, or the CPU.
        executor: who carries out the runs, instead of `jobs` processes on `device`.
        work: what carries out one run.
        retry_failed: begin runs again that failed in an earlier sweep.

    Raises:
        ConfigError: `jobs` is below 1, or the executor cannot work.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}; it must be at least 1")
    if executor is None:
        executor = partial(in_turn, device=device) if jobs == 1 else partial(in_processes, jobs=jobs, device=device)
    outcomes: dict[str, Outcome] = {}
    left = []
    for run in runs:
        status = status_of(run, root)
        if status == "finished":
            outcomes[run.name] = finished_outcome(run, root)
        elif status == "failed" and not retry_failed:
            outcomes[run.name] = failed_outcome(run, root)
        else:
            left.append(run)
            continue
        progress.ended(run, outcomes[run.name])
    for run, outcome in executor(left, root, work, progress.doing) if left else ():
        outcomes[run.name] = outcome
        progress.ended(run, outcome)
    return [outcomes[run.name] for run in runs]


def in_turn(runs: Sequence[PlannedRun], root: Path, work: Work, report: Report, *, device: str | None = None) -> Ends:
    """One run after the other, in this process."""
    for run in runs:
        yield run, work(run, root, device, report)


def in_processes(
    runs: Sequence[PlannedRun], root: Path, work: Work, report: Report, *, jobs: int, device: str | None = None
) -> Ends:
    """Several at once, each in a process of this machine; a run whose process dies is begun again, twice."""
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    listener = threading.Thread(target=_listen, args=(messages, report), daemon=True)
    listener.start()
    attempts = dict.fromkeys((run.name for run in runs), 0)
    waiting = list(runs)
    start = (device, max(1, (os.cpu_count() or 1) // jobs), work)
    try:
        while waiting:
            # A process that dies takes the pool with it; what it had not finished goes into a new one.
            for run, outcome in _one_pool(waiting, root, jobs, context, messages, start):
                if outcome is None:
                    attempts[run.name] += 1
                    if attempts[run.name] < ATTEMPTS:
                        continue
                    error = f"its process died {ATTEMPTS} times without a word (killed, or out of memory?)"
                    outcome = record_failure(run, root, error)
                waiting.remove(run)
                yield run, outcome
    finally:
        messages.put(None)
        listener.join(timeout=5)


def _one_pool(
    runs: Sequence[PlannedRun], root: Path, jobs: int, context: Any, messages: Any, start: tuple[Any, ...]
) -> Iterator[tuple[PlannedRun, Outcome | None]]:
    """The runs and their outcomes as they end; None for those that were under way when a process died."""
    places = context.Queue()
    for number in range(jobs):
        places.put(number)
    pool = ProcessPoolExecutor(jobs, context, _enter, (places, messages, *start))
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


def _listen(messages: Any, report: Report) -> None:
    while (message := messages.get()) is not None:
        report(*message)


_worker: dict[str, Any] = {}
"""What a worker process was told when it began."""


def _enter(places: Any, messages: Any, device: str | None, threads: int, work: Work) -> None:
    number = places.get()
    if device is None and torch.cuda.is_available():
        device = f"cuda:{number % torch.cuda.device_count()}"
    torch.set_num_threads(threads)
    _worker.update(device=device, messages=messages, work=work)


def _work(run: PlannedRun, root: Path) -> Outcome:
    outcome: Outcome = _worker["work"](run, root, _worker["device"], lambda *message: _worker["messages"].put(message))
    return outcome
