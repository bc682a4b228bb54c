"""Many machines: Ray places the runs, a fraction of a GPU each, and begins again those whose worker died.

Results land in the sweep's folder, which every machine must see at the same path, or in an object store.
"""

import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from maple import files
from maple.errors import ConfigError, first_line
from maple.sweeps.executors import ATTEMPTS, Ends, Group, Work
from maple.sweeps.plan import PlannedRun
from maple.sweeps.runner import Outcome, Report, finished_outcome, record_failure, status_of
from maple.sweeps.storage import Storage

_GPUS = 0.25
_MARKER = ".sweep-"
_EVERY = 0.5
"""Seconds between two words of a run about how far it is."""


@dataclass(frozen=True)
class _WorkerConfig:
    """What a worker must know besides its run.

    Attributes:
        here: the folder that relative paths start from.
        marker: a file in `root`: a machine that does not see it sees another folder.
        command: what the sweep was started with, for the record.
    """

    root: Path
    here: Path
    marker: Path
    storage: str | None
    device: str | None
    threads: int
    command: tuple[str, ...]
    work: Work


@dataclass(frozen=True)
class _NotShared:
    """The answer of a machine that does not see the sweep's folder."""

    machine: str


def on_ray(
    groups: Sequence[Group],
    root: Path,
    work: Work,
    report: Report,
    *,
    address: str | None = None,
    gpus_per_run: float | None = None,
    cpus_per_run: float = 1,
    storage: str | None = None,
    device: str | None = None,
) -> Ends:
    """As many groups of runs at once as the cluster has room for.

    Args:
        address: of the cluster, as `ray.init` takes it: auto, HOST:6379, ray://HOST:10001. Without it RAY_ADDRESS, a
            cluster that runs on this machine, or a new one of this machine alone.
        gpus_per_run: GPUs, or a fraction of one, that a group reserves; 0.25 by default, 0 where there are none.
        cpus_per_run: cores that a group reserves, and its threads.
        storage: an fsspec URL for the finished runs, where machines share no folder with this one. They are fetched
            into `root` as they finish; interrupted ones go on only on the machine that they began on.
        device: where to compute; by default the GPU that Ray assigns, or the CPU.

    Raises:
        ConfigError: Ray is not installed, the cluster cannot be reached, no machine has room for a run, or a machine
            does not see `root`.
    """
    if find_spec("ray") is None:
        raise ConfigError("--executor ray needs Ray, on every machine: pip install 'maple-clip[ray]'")
    store = None if storage is None else Storage(storage)
    import ray

    marker = _marker(root)
    with _connected(address):
        gpus = _checked_room(gpus_per_run, cpus_per_run)
        place = device or (None if gpus else "cpu")
        threads, command = max(1, int(cpus_per_run)), tuple(sys.argv)
        errand = _WorkerConfig(root.resolve(), Path.cwd(), marker, storage, place, threads, command, work)
        board = _start_board()
        options = {"num_cpus": cpus_per_run, "num_gpus": gpus, "max_retries": ATTEMPTS - 1}
        under_way: dict[Any, Group] = {}
        for group in groups:
            stored = tuple(run for run in group if store is not None and _fetched(store, run, root))
            yield from ((run, finished_outcome(run, root)) for run in stored)
            if left := tuple(run for run in group if run not in stored):
                task = ray.remote(_work).options(**options, name=", ".join(run.label for run in left))
                under_way[task.remote(left, errand, board)] = left
        try:
            yield from _ends(under_way, root, board, report, store)
        finally:
            for reference in under_way:
                ray.cancel(reference, force=True)


def _fetched(store: Storage, run: PlannedRun, root: Path) -> bool:
    """Whether a run has been left in the store, finished; it is then in `root` too."""
    if not store.holds(run.name):
        return False
    store.get(run.name, root)
    return status_of(run, root) == "finished"


def _ends(under_way: dict[Any, Group], root: Path, board: Any, report: Report, store: Storage | None) -> Ends:
    import ray

    while under_way:
        done, _ = ray.wait(list(under_way), num_returns=1, timeout=2 * _EVERY)
        with suppress(ray.exceptions.RayError):  # what is shown on the way is not worth a sweep
            for name, told in ray.get(board.take.remote(), timeout=10).items():
                report(name, *told)
        for reference in done:
            group = under_way.pop(reference)
            yield from zip(group, _outcomes(reference, group, root, store), strict=True)


def _outcomes(reference: Any, group: Group, root: Path, store: Storage | None) -> list[Outcome]:
    import ray

    try:
        outcomes = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # not of the run, which keeps its errors to itself
        raise ConfigError(
            f"a Ray worker cannot carry out runs ({str(error).strip().splitlines()[-1]}); every machine needs the same "
            "versions of Python, Ray and maple-clip as this one"
        ) from error
    except ray.exceptions.RayError as error:
        told = f"its Ray worker died {ATTEMPTS} times (killed, or out of memory?): {first_line(error)}"
        return [
            finished_outcome(run, root) if status_of(run, root) == "finished" else record_failure(run, root, told)
            for run in group
        ]
    if isinstance(outcomes, _NotShared):
        raise ConfigError(
            f"the machine {outcomes.machine} does not see the folder {root.resolve()}: --output must name a folder "
            "that all machines share, at the same path; or give --ray-storage with an fsspec URL that all of them reach"
        )
    return [_landed(run, outcome, root, store) for run, outcome in zip(group, outcomes, strict=True)]


def _landed(run: PlannedRun, outcome: Outcome, root: Path, store: Storage | None) -> Outcome:
    """The outcome of a run, its folder fetched from the store if there is one."""
    if store is not None and outcome.status == "finished":
        store.get(run.name, root)
        return finished_outcome(run, root, outcome.seconds)
    if store is not None and outcome.status == "failed":
        return record_failure(run, root, str(outcome.error), seconds=outcome.seconds)
    return outcome


def _start_board() -> Any:
    """An actor that keeps the last word of each run until somebody looks."""
    import ray

    # Inside, so that it travels whole: its process need not import this package, and torch with it.
    class Board:
        def __init__(self) -> None:
            self._told: dict[str, tuple[str, int, int]] = {}

        def tell(self, name: str, what: str, done: int, total: int) -> None:
            self._told[name] = (what, done, total)

        def take(self) -> dict[str, tuple[str, int, int]]:
            told, self._told = self._told, {}
            return told

    return ray.remote(Board).options(num_cpus=0).remote()


def _work(group: Group, errand: _WorkerConfig, board: Any) -> list[Outcome] | _NotShared:
    """On a worker: one group of runs."""
    with suppress(OSError):  # a machine that has no such folder can still be given whole paths
        os.chdir(errand.here)
    sys.argv[:] = errand.command
    torch.set_num_threads(errand.threads)
    store = None if errand.storage is None else Storage(errand.storage)
    if store is None and not errand.marker.is_file():
        return _NotShared(socket.gethostname())
    last = 0.0

    def tell(name: str, what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > _EVERY:
            last = time.monotonic()
            board.tell.remote(name, what, done, total)

    root = errand.root if store is None else store.scratch()
    outcomes = errand.work(group, root, errand.device, tell)
    if store is not None:
        for outcome in outcomes:
            if outcome.status == "finished":
                store.put(root / outcome.name)
                shutil.rmtree(root / outcome.name, ignore_errors=True)
        with suppress(OSError):  # other runs are still there
            root.rmdir()
    return outcomes


@contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """In a cluster: the one this process is in already, or else for as long as this lasts."""
    import ray

    if ray.is_initialized():
        yield
        return
    # A cluster of this machine alone is nobody else's business.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = "a Ray cluster cannot be started" if address is None else f"no Ray cluster answers at {address!r}"
        raise ConfigError(
            f"{where}: {first_line(error)}; start one with `ray start --head` and give --ray-address HOST:6379, or "
            "auto on one of its machines"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _marker(root: Path) -> Path:
    """A file in the sweep's folder by which other machines know that it is the same folder; it stays for the next."""
    try:
        known = sorted(root.glob(f"{_MARKER}*"))
        if known:
            return known[0].resolve()
        marker = root.resolve() / f"{_MARKER}{uuid.uuid4().hex}"
        files.write_text(marker, "Ray workers that see this file see the folder of the sweep.\n")
    except OSError as error:
        raise ConfigError(f"{root} cannot be written to ({error.strerror}); choose another --output") from error
    return marker


def _checked_room(gpus: float | None, cpus: float) -> float:
    """GPUs per run, if there is a machine that has room for one."""
    import ray

    rooms = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most_gpus, most_cpus = (max((room.get(kind, 0.0) for room in rooms), default=0.0) for kind in ("GPU", "CPU"))
    if gpus is None:
        gpus = _GPUS if most_gpus else 0.0
    if not 0 < cpus <= most_cpus:
        raise ConfigError(
            f"--cpus-per-run {cpus:g}: a run takes more than 0, and the machine with most cores has {most_cpus:g}"
        )
    whole = gpus <= 1 or gpus == int(gpus)
    if not (0 <= gpus <= most_gpus and whole):
        raise ConfigError(
            f"--gpus-per-run {gpus:g}: a run takes a fraction of a GPU, or whole ones; the machine with most has "
            f"{most_gpus:g}"
        )
    return gpus
