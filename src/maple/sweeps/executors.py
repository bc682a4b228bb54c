"""Execute the runs of a sweep in this process or in several processes (`ray_executor.py`: on many machines).

An executor is a function of (groups of runs, root, work, report) that yields each run with its outcome, in the order in
which they end; its own options are bound beforehand (`functools.partial`). A group stays in one process.
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

from maple import files
from maple.clip.backbone_names import remember
from maple.distributed import launched, this_process
from maple.errors import ConfigError
from maple.machine import usable_cores
from maple.plugins import accept_code, accepted_code
from maple.runs.spec import joint_training_key, warn_if_split_was_drawn
from maple.sweeps.plan import PlannedRun
from maple.sweeps.runner import (
    Report,
    RunOutcome,
    SweepProgress,
    failed_outcome,
    finished_outcome,
    listed_images,
    record_failure,
    run_group,
    status_of,
)

Group = tuple[PlannedRun, ...]
"""Runs that are trained together; often a single one."""
Work = Callable[[Group, Path, str | None, Report], list[RunOutcome]]
"""Executes a group of runs below a root folder on a device; it must be picklable."""
Completed = Iterator[tuple[PlannedRun, RunOutcome]]
Executor = Callable[[Sequence[Group], Path, Work, Report], Completed]

ATTEMPTS = 3
"""How often the process of a run dies (out of memory, killed), with no other next to it, before the run has failed."""


def run_sweep(
    runs: Sequence[PlannedRun],
    root: Path,
    *,
    jobs: int = 1,
    together: int = 1,
    device: str | None = None,
    executor: Executor | None = None,
    work: Work | None = None,
    tracker: str | None = None,
    retry_failed: bool = False,
    progress: SweepProgress | None = None,
) -> list[RunOutcome]:
    """Execute what is left of a plan; return the outcome of every run, in the order of the plan.

    Args:
        jobs: number of processes on this machine. They are distributed over the GPUs, or share the CPU cores.
        together: the largest number of runs that are trained in one pass; such runs differ only in the seed, the
            learning rate and the weight decay.
        device: where to compute; by default the GPUs in turn, or the CPU.
        executor: used instead of `jobs` processes on `device`.
        work: used instead of `maple.sweeps.runner.run_group` with this `tracker`.
        retry_failed: whether to repeat runs that failed, in an earlier sweep or in another one that runs now.

    Raises:
        ConfigError: `jobs` or `together` is below 1, `root` cannot be written to, or the executor cannot work.

    Example:
        >>> runs = plan_sweep(SweepSettings(**read_sweep("demo")))
        >>> outcomes = run_sweep(runs, Path("runs/demo"), jobs=2)
    """
    for name, value in (("jobs", jobs), ("together", together)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if executor is None:
        executor = partial(in_turn, device=device) if jobs == 1 else partial(in_processes, jobs=jobs, device=device)
    progress = progress or SweepProgress()
    listed_images.cache_clear()  # images may have been added since an earlier sweep of this process
    outcomes: dict[str, RunOutcome] = {}
    remaining = []
    for run in runs:
        status = status_of(run, root)
        if status == "finished":
            warn_if_split_was_drawn(run.settings, root / run.name)
            outcomes[run.name] = finished_outcome(run, root)
        elif status == "failed" and not retry_failed:
            outcomes[run.name] = failed_outcome(run, root)
        else:
            remaining.append(run)
            continue
        progress.ended(run, outcomes[run.name])
    if remaining:
        # Checked once: otherwise every run would fail, one after the other.
        launched()
        with files.output_errors(root, "cannot be written to"):
            root.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=root) as file:  # the clock of its file system is that of the failures, too
                began = os.fstat(file.fileno()).st_mtime
        work = work or partial(run_group, tracker=tracker, failures_since=None if retry_failed else began)
        for run in remaining:  # here, too: the processes may be on other machines
            remember(run.settings.backbone.name, run.settings.backbone.pretrained)
        for run, outcome in executor(_groups(remaining, together), root, work, progress.advance):
            outcomes[run.name] = outcome
            progress.ended(run, outcome)
    return [outcomes[run.name] for run in runs]


def _groups(runs: Sequence[PlannedRun], together: int) -> list[Group]:
    """Group up to `together` runs that can be trained in one pass, each group at the place of its first run."""
    if together == 1:
        return [(run,) for run in runs]
    compatible: dict[str, list[PlannedRun]] = {}
    for run in runs:
        compatible.setdefault(joint_training_key(run.settings), []).append(run)
    starts = ((members, start) for members in compatible.values() for start in range(0, len(members), together))
    return [tuple(members[start : start + together]) for members, start in starts]


def in_turn(groups: Sequence[Group], root: Path, work: Work, report: Report, *, device: str | None = None) -> Completed:
    """Execute one group after the other, in this process.

    Example:
        >>> run_sweep(runs, Path("runs"), executor=partial(in_turn, device="cpu"))
    """
    if launched()[1] > 1:
        this_process(device)  # an error here is not one of each run
    for group in groups:
        yield from zip(group, work(group, root, device, report), strict=True)


def in_processes(
    groups: Sequence[Group], root: Path, work: Work, report: Report, *, jobs: int, device: str | None = None
) -> Completed:
    """Execute several groups at once, each in a process of this machine.

    A process that dies ends the others with it. What they were at is then executed alone: a run whose process dies
    there is started again, twice, and a group whose process dies continues run by run.

    Example:
        >>> run_sweep(runs, Path("runs"), executor=partial(in_processes, jobs=4))
    """
    refuse_launcher()
    context = multiprocessing.get_context("spawn")
    messages: Any = context.Queue()

    def forward() -> None:
        while (message := messages.get()) is not None:
            report(*message)

    listener = threading.Thread(target=forward, daemon=True)
    listener.start()
    attempts = dict.fromkeys((run.name for group in groups for run in group), 0)
    waiting, interrupted = list(groups), list[Group]()
    # Of PyTorch's number, which OMP_NUM_THREADS sets, no process takes more.
    threads = max(1, min(torch.get_num_threads(), usable_cores() // jobs))
    code = accepted_code(run.settings.method for group in groups for run in group)
    worker_arguments = (messages, device, threads, work, code)
    try:
        while waiting or interrupted:
            # A process that dies breaks its whole pool. Which group it died of is known only where there is one.
            source, processes = (interrupted, 1) if interrupted else (waiting, jobs)
            started = source[:1] if interrupted else source
            for group, outcomes in _run_pool(started, root, processes, context, worker_arguments):
                source.remove(group)
                if outcomes is None and processes > 1:
                    interrupted.append(group)
                    continue
                if outcomes is None and len(group) > 1:
                    interrupted[:0] = [(run,) for run in group]
                    continue
                if outcomes is None:
                    (run,) = group
                    attempts[run.name] += 1
                    if attempts[run.name] < ATTEMPTS:
                        interrupted.insert(0, group)
                        continue
                    error = f"its process died {ATTEMPTS} times (killed, or out of memory?)"
                    outcomes = [record_failure(run, root, error)]
                yield from zip(group, outcomes, strict=True)
    finally:
        messages.put(None)
        listener.join(timeout=5)


def refuse_launcher() -> None:
    """Raise ConfigError in a process of a launcher: each of them would start the processes of the sweep."""
    if (count := launched()[1]) > 1:
        raise ConfigError(
            f"WORLD_SIZE is {count}, and this sweep starts its processes itself (--jobs, --executor ray): unset "
            "WORLD_SIZE, and start it without torchrun or `accelerate launch`"
        )


def _run_pool(
    groups: Sequence[Group], root: Path, jobs: int, context: Any, worker_arguments: tuple[Any, ...]
) -> Iterator[tuple[Group, list[RunOutcome] | None]]:
    """Yield the groups and their outcomes as they end; None for groups that were running when a process died."""
    numbers = context.Queue()
    for number in range(jobs):
        numbers.put(number)
    # Nothing is ever sent: the workers end when the other side is closed, by this process or by its end.
    alive, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (numbers, alive, *worker_arguments))
    upcoming = iter(list(groups))
    running: dict[Future[list[RunOutcome]], Group] = {}
    try:
        while True:
            # No more groups than processes: a group that only waits in the pool would be lost with it.
            while len(running) < jobs and (group := next(upcoming, None)) is not None:
                running[pool.submit(_run_in_worker, group, root)] = group
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                outcomes = future.result()
                yield running.pop(future), outcomes
    except BrokenProcessPool:
        # A group that could not be submitted is not among them: it has not been started.
        for future, group in running.items():
            yield group, future.result() if future.done() and future.exception() is None else None
    except BaseException:  # Ctrl-C for this process alone, say: the runs that are under way are not waited for
        ours.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        ours.close()
        alive.close()


_worker: dict[str, Any] = {}
"""The arguments of a worker process."""


def _start_worker(
    numbers: Any,
    alive: Any,
    messages: Any,
    device: str | None,
    threads: int,
    work: Work,
    code: tuple[bytes, ...],
) -> None:
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    os.environ.pop("WORLD_SIZE", None)  # a worker trains alone
    number = numbers.get()
    if device is None and torch.cuda.is_available():
        device = f"cuda:{number % torch.cuda.device_count()}"
    torch.set_num_threads(threads)
    for content in code:
        accept_code(content)
    _worker.update(device=device, messages=messages, work=work)


def _end_with_parent(alive: Any) -> None:
    alive.poll(None)
    os._exit(1)  # at once; a run is resumed after its last whole epoch


def _run_in_worker(group: Group, root: Path) -> list[RunOutcome]:
    work: Work = _worker["work"]
    return work(group, root, _worker["device"], lambda *message: _worker["messages"].put(message))
