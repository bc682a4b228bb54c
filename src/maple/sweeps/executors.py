"""Who carries out the runs: this process, or several on this machine (ray_executor.py: many machines).

An executor is one function of (groups of runs, root, work, report) that gives back each run with its outcome, in the
order in which they end; its own options are bound beforehand (`functools.partial`). A group stays in one place.
"""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from maple.errors import ConfigError
from maple.runs import in_common
from maple.sweeps.plan import PlannedRun
from maple.sweeps.runner import (
    Outcome,
    Report,
    SweepProgress,
    failed_outcome,
    finished_outcome,
    record_failure,
    run_group,
    status_of,
)

Group = tuple[PlannedRun, ...]
"""Runs that are trained together; often a single one."""
Work = Callable[[Group, Path, str | None, Report], list[Outcome]]
"""Carries out a group of runs below a root folder on a device; it must travel to other processes."""
Ends = Iterator[tuple[PlannedRun, Outcome]]
Executor = Callable[[Sequence[Group], Path, Work, Report], Ends]

ATTEMPTS = 3
"""How often a run is begun whose process dies (out of memory, killed) before it counts as failed."""


def run_sweep(
    runs: Sequence[PlannedRun],
    root: Path,
    *,
    jobs: int = 1,
    together: int = 1,
    device: str | None = None,
    executor: Executor | None = None,
    work: Work = run_group,
    retry_failed: bool = False,
    progress: SweepProgress,
) -> list[Outcome]:
    """Carry out what is left of a plan; return the outcome of every run, in the plan's order.

    Args:
        root: the folder of the runs' folders.
        jobs: processes on this machine. On GPUs they take turns among them; on CPUs they share the cores.
        together: how many runs at most are trained in one pass, of those that differ in the seed, the learning rate and
            the weight decay alone.
        device: where to compute; without it the GPUs in turn, or the CPU.
        executor: who carries out the runs, instead of `jobs` processes on `device`.
        work: what carries out a group of runs.
        retry_failed: begin runs again that failed in an earlier sweep.

    Raises:
        ConfigError: `jobs` or `together` is below 1, `root` cannot be written to, or the executor cannot work.
    """
    for name, value in (("jobs", jobs), ("together", together)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
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
    if left:
        _check_root(root)
    for run, outcome in executor(_grouped(left, together), root, work, progress.doing) if left else ():
        outcomes[run.name] = outcome
        progress.ended(run, outcome)
    return [outcomes[run.name] for run in runs]


def _check_root(root: Path) -> None:
    """Raise ConfigError unless folders can be made in `root`: else every run would fail, one after the other."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise ConfigError(f"{root} cannot be written to ({error.strerror}); choose another --output") from error


def _grouped(runs: Sequence[PlannedRun], together: int) -> list[Group]:
    """The runs in groups of up to `together` that can be trained in one pass, each where its first run was."""
    if together == 1:
        return [(run,) for run in runs]
    alike: dict[str, list[PlannedRun]] = {}
    for run in runs:
        alike.setdefault(in_common(run.settings), []).append(run)
    return [tuple(found[at : at + together]) for found in alike.values() for at in range(0, len(found), together)]


def in_turn(groups: Sequence[Group], root: Path, work: Work, report: Report, *, device: str | None = None) -> Ends:
    """One group after the other, in this process."""
    for group in groups:
        yield from zip(group, work(group, root, device, report), strict=True)


def in_processes(
    groups: Sequence[Group], root: Path, work: Work, report: Report, *, jobs: int, device: str | None = None
) -> Ends:
    """Several at once, each in a process of this machine.

    A run whose process dies is begun again, twice; a group whose process dies goes on run by run.
    """
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()
    listener = threading.Thread(target=_listen, args=(messages, report), daemon=True)
    listener.start()
    attempts = dict.fromkeys((run.name for group in groups for run in group), 0)
    waiting = list(groups)
    start = (device, max(1, (os.cpu_count() or 1) // jobs), work)
    try:
        while waiting:
            # A process that dies takes the pool with it; what it had not finished goes into a new one.
            for group, outcomes in _one_pool(waiting, root, jobs, context, messages, start):
                if outcomes is None and len(group) > 1:
                    at = waiting.index(group)
                    waiting[at : at + 1] = [(run,) for run in group]
                    continue
                if outcomes is None:
                    (run,) = group
                    attempts[run.name] += 1
                    if attempts[run.name] < ATTEMPTS:
                        continue
                    error = f"its process died {ATTEMPTS} times without a word (killed, or out of memory?)"
                    outcomes = [record_failure(run, root, error)]
                waiting.remove(group)
                yield from zip(group, outcomes, strict=True)
    finally:
        messages.put(None)
        listener.join(timeout=5)


def _one_pool(
    groups: Sequence[Group], root: Path, jobs: int, context: Any, messages: Any, start: tuple[Any, ...]
) -> Iterator[tuple[Group, list[Outcome] | None]]:
    """The groups and their outcomes as they end; None for those that were under way when a process died."""
    places = context.Queue()
    for number in range(jobs):
        places.put(number)
    pool = ProcessPoolExecutor(jobs, context, _enter, (places, messages, *start))
    upcoming = iter(list(groups))
    under_way: dict[Future[list[Outcome]], Group] = {}
    group: Group | None = None
    try:
        while True:
            # Only as many as there are processes: those that wait are not hurt by a death.
            while len(under_way) < jobs and (group := next(upcoming, None)) is not None:
                under_way[pool.submit(_work, group, root)] = group
            if not under_way:
                return
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                group = under_way.pop(future)
                yield group, future.result()
    except BrokenProcessPool:
        for begun in [*([group] if group else []), *under_way.values()]:
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


def _work(group: Group, root: Path) -> list[Outcome]:
    work: Work = _worker["work"]
    return work(group, root, _worker["device"], lambda *message: _worker["messages"].put(message))
