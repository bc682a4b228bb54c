"""Execute the runs of a sweep on many machines: Ray places them, a fraction of a GPU each, and restarts dead workers.

Results are written to the folder of the sweep, which every machine must see at the same path, or to an object store.
"""

import os
import shutil
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from stat import S_ISDIR
from typing import Any

import torch

from maple import files
from maple.errors import ConfigError, first_line
from maple.files import FAILURE
from maple.plugins import accept_code, accepted_code
from maple.ray_cluster import connection, require_ray, reserved_gpus
from maple.sweeps.executors import ATTEMPTS, Completed, Group, Work, refuse_launcher
from maple.sweeps.plan import PlannedRun
from maple.sweeps.runner import Report, RunOutcome, finished_outcome, record_failure, status_of

_DEFAULT_GPUS = 0.25
_MARKER = ".sweep-"
_REPORT_INTERVAL = 0.5
"""Seconds between two progress reports of a run."""
_NOTICE = 20.0
"""Seconds until a cluster notices that one of its machines is gone."""
_NOT_STORED = ("resume.safetensors", ".lock", ".rows.lock", FAILURE)
_LAST = "prompts.safetensors"
"""Its presence marks a run as finished, so it is written after everything else."""


class Storage:
    """Finished runs at an fsspec URL, such as s3://bucket/sweep, for machines that do not share a folder.

    Only the small files of a run are stored (settings, prompts, history, rows, predictions), never a resume state.
    """

    def __init__(self, url: str) -> None:
        """Raises ConfigError: the protocol is unknown, its package is missing, or the location cannot be reached."""
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._filesystem, base = fsspec.core.url_to_fs(self.url)
            self._base = str(base).rstrip("/")
            self._filesystem.makedirs(self._base, exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            raise ConfigError(
                f"the storage {url!r} cannot be opened ({error}); give an fsspec URL that every machine reaches, such "
                "as s3://bucket/folder, and install the package of its protocol (s3fs, gcsfs, adlfs)"
            ) from error

    def contains(self, name: str) -> bool:
        """Whether the finished run of this name is stored completely."""
        return bool(self._filesystem.exists(f"{self._base}/{name}/{_LAST}"))

    def put(self, folder: Path) -> None:
        """Store a finished run."""
        for path in sorted(folder.rglob("*"), key=lambda path: (path.name == _LAST, path)):
            if not path.is_file() or path.name in _NOT_STORED or path.name.endswith(".tmp"):
                continue
            target = f"{self._base}/{folder.name}/{path.relative_to(folder).as_posix()}"
            self._filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._filesystem.put_file(str(path), target)

    def get(self, name: str, root: Path) -> None:
        """Download a stored run into `root`, its prompts last; ConfigError for a file outside of the run."""
        start = f"{self._base}/{name}/"
        relative_paths = [str(path).partition(start)[2] for path in self._filesystem.find(start)]
        for path in sorted(relative_paths, key=lambda path: path == _LAST):
            source, target = f"{start}{path}", (root / name / path).resolve()
            if not path or not target.is_relative_to((root / name).resolve()):
                raise ConfigError(f"{self.url} lists a file outside of {name}: {path!r}; it is not a maple run")
            with files.replacing(target) as temporary:
                self._filesystem.get_file(source, str(temporary))

    def scratch(self) -> Path:
        """The local folder for runs of this storage; it is kept, so that an interrupted run can be resumed.

        Its name is known to other users of the machine, so it must be this user's and closed to them.

        Raises:
            ConfigError: another user has made it, or can write to it.
        """
        folder = Path(tempfile.gettempdir()) / f"maple-sweep-{sha256(self.url.encode()).hexdigest()[:12]}"
        with files.output_errors(folder, "cannot be made"):
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            status = folder.lstat()
        if hasattr(os, "getuid") and (not S_ISDIR(status.st_mode) or status.st_uid != os.getuid()):
            raise ConfigError(
                f"{folder}, where runs of this storage are trained, belongs to another user: remove it, or set TMPDIR"
            )
        folder.chmod(0o700)  # made by an earlier version, which others could read
        return folder


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker needs in addition to its group of runs."""

    root: Path
    start_folder: Path  # where relative paths start
    marker: Path  # a file in `root`; a machine that cannot see it does not share the folder
    storage: str | None
    device: str | None
    threads: int
    command: tuple[str, ...]  # for the record of the environment
    work: Work
    code: tuple[bytes, ...] = ()  # files of methods, which were accepted where the sweep was started


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
) -> Completed:
    """Execute as many groups of runs at once as a Ray cluster has room for.

    Args:
        address: of the cluster, as for `ray.init`: auto, HOST:6379, ray://HOST:10001. By default RAY_ADDRESS, a cluster
            that is running on this machine, or a new one on this machine alone.
        gpus_per_run: number or fraction of GPUs that a group reserves; 0.25 by default, 0 where there are none.
        cpus_per_run: cores that a group reserves, and its number of threads.
        storage: an fsspec URL for the finished runs, where machines do not share a folder. They are downloaded into
            `root` as they finish; an interrupted run is resumed only on the machine that started it.
        device: where to compute; by default the GPU that Ray assigns, or the CPU.

    Raises:
        ConfigError: Ray is not installed, the cluster cannot be reached, no machine has room for a run, or a machine
            does not see `root`.

    Example:
        >>> run_sweep(runs, Path("/shared/runs"), executor=partial(on_ray, address="auto", gpus_per_run=0.5))
    """
    refuse_launcher()
    require_ray()
    store = None if storage is None else Storage(storage)
    import ray

    with files.output_errors(root, "cannot be written to"):
        # A file by which other machines recognise the folder of the sweep.
        marker = min(root.glob(f"{_MARKER}*"), default=root / f"{_MARKER}{uuid.uuid4().hex}").resolve()
        if not marker.exists():
            files.write_text(marker, "Ray workers that see this file see the folder of the sweep.\n")
    with connection(address):
        gpus = reserved_gpus(gpus_per_run, cpus_per_run, default=_DEFAULT_GPUS, user="run")
        device, threads = device or (None if gpus else "cpu"), max(1, int(cpus_per_run))
        code = accepted_code(run.settings.method for group in groups for run in group)
        command = tuple(sys.argv)
        config = WorkerConfig(root.resolve(), Path.cwd(), marker, storage, device, threads, command, work, code)
        board = _start_progress_board()
        options = {"num_cpus": cpus_per_run, "num_gpus": gpus, "max_retries": ATTEMPTS - 1}
        machines = _machines()
        running: dict[Any, Group] = {}
        for group in groups:
            stored = tuple(run for run in group if store is not None and _restore(store, run, root))
            yield from ((run, finished_outcome(run, root)) for run in stored)
            if remaining := tuple(run for run in group if run not in stored):
                task = ray.remote(_run_on_worker).options(**options, name=", ".join(run.label for run in remaining))
                running[task.remote(remaining, config, board)] = remaining
        try:
            while running:
                done, _ = ray.wait(list(running), num_returns=1, timeout=2 * _REPORT_INTERVAL)
                with suppress(ray.exceptions.RayError):  # lost progress reports must not stop a sweep
                    for name, progress in ray.get(board.take.remote(), timeout=10).items():
                        report(name, *progress)
                for reference in done:
                    group = running.pop(reference)
                    yield from zip(group, _outcomes(reference, group, root, store, machines), strict=True)
        except ray.exceptions.RayError as error:  # of `wait`: there is no cluster any more
            for group in [running.pop(reference) for reference in list(running)]:
                yield from zip(group, _interrupted(group, root, error), strict=True)
        finally:
            for reference in running:
                with suppress(ray.exceptions.RayError):
                    ray.cancel(reference, force=True)


def _restore(store: Storage, run: PlannedRun, root: Path) -> bool:
    """Download a run if it is stored; return whether it is finished."""
    if not store.contains(run.name):
        return False
    store.get(run.name, root)
    return status_of(run, root) == "finished"


def _machines() -> set[str]:
    """Return the ids of the machines of the cluster that are alive; none if it does not answer."""
    import ray

    with suppress(Exception):  # whatever it is, the cluster is gone
        return {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return set()


def _lost(machines: set[str]) -> bool:
    """Whether one of these machines is gone."""
    limit = time.monotonic() + _NOTICE
    while not (lost := machines - _machines()) and time.monotonic() < limit:
        time.sleep(0.5)
    return bool(lost)


def _interrupted(group: Group, root: Path, error: Exception) -> list[RunOutcome]:
    """Return the outcomes of a group that the cluster lost; its runs are resumed when the sweep is repeated."""
    last_line = str(error).strip().splitlines()[-1:] or [type(error).__name__]  # that of the cause, where there is one
    reason = f"the Ray cluster lost a machine or one of its services ({last_line[0]})"
    return [
        finished_outcome(run, root)
        if status_of(run, root) == "finished"
        else RunOutcome(run.name, "interrupted", error=reason)
        for run in group
    ]


def _outcomes(reference: Any, group: Group, root: Path, store: Storage | None, machines: set[str]) -> list[RunOutcome]:
    """Return the outcomes of a group whose task has ended, its folders downloaded if there is a store.

    A worker that dies again and again is an error of its run only if all `machines` are still there.
    """
    import ray

    try:
        outcomes = ray.get(reference)
    except ray.exceptions.RayTaskError as error:  # not an error of a run: those are recorded in its folder
        if _lost(machines):
            return _interrupted(group, root, error)
        raise ConfigError(
            f"a Ray worker cannot execute runs ({str(error).strip().splitlines()[-1]}); every machine needs the same "
            "versions of Python, Ray and maple-clip as this one"
        ) from error
    except ray.exceptions.RayError as error:
        its_own = isinstance(error, ray.exceptions.WorkerCrashedError | ray.exceptions.OutOfMemoryError)
        if not its_own or _lost(machines):
            return _interrupted(group, root, error)
        reason = f"its Ray worker died {ATTEMPTS} times (killed, or out of memory?): {first_line(error)}"
        return [
            finished_outcome(run, root) if status_of(run, root) == "finished" else record_failure(run, root, reason)
            for run in group
        ]
    if isinstance(outcomes, str):
        raise ConfigError(
            f"the machine {outcomes} does not see the folder {root.resolve()}: --output must name a folder "
            "that all machines share, at the same path; or give --ray-storage with an fsspec URL that all of them reach"
        )
    if store is None:
        return list(outcomes)
    local = []
    for run, outcome in zip(group, outcomes, strict=True):
        if outcome.status == "finished":
            store.get(run.name, root)
            outcome = finished_outcome(run, root, outcome.seconds)
        elif outcome.status == "failed":
            outcome = record_failure(run, root, str(outcome.error), seconds=outcome.seconds)
        local.append(outcome)
    return local


def _start_progress_board() -> Any:
    """Start an actor that keeps the latest progress of each run until it is taken."""
    import ray

    # Defined here, so that Ray pickles it by value: the actor need not import this package, and torch with it.
    class ProgressBoard:
        def __init__(self) -> None:
            self._latest: dict[str, tuple[str, int, int]] = {}

        def post(self, name: str, activity: str, done: int, total: int) -> None:
            self._latest[name] = (activity, done, total)

        def take(self) -> dict[str, tuple[str, int, int]]:
            latest, self._latest = self._latest, {}
            return latest

    return ray.remote(ProgressBoard).options(num_cpus=0).remote()


def _run_on_worker(group: Group, config: WorkerConfig, board: Any) -> list[RunOutcome] | str:
    """Execute one group of runs on a worker; return its host name if it does not see the folder of the sweep."""
    with suppress(OSError):  # a machine without this folder can still work with absolute paths
        os.chdir(config.start_folder)
    sys.argv[:] = config.command
    os.environ.pop("WORLD_SIZE", None)  # of the machine; a worker trains alone
    torch.set_num_threads(config.threads)
    for content in config.code:
        accept_code(content)
    store = None if config.storage is None else Storage(config.storage)
    if store is None and not config.marker.is_file():
        return socket.gethostname()
    last_report = 0.0

    def report(name: str, activity: str, done: int, total: int) -> None:
        nonlocal last_report
        if time.monotonic() - last_report > _REPORT_INTERVAL:
            last_report = time.monotonic()
            with suppress(Exception):  # of a cluster that is going down; it is not an error of the run
                board.post.remote(name, activity, done, total)

    root = config.root if store is None else store.scratch()
    outcomes = config.work(group, root, config.device, report)
    if store is not None:
        for outcome in outcomes:
            if outcome.status == "finished":
                store.put(root / outcome.name)
                shutil.rmtree(root / outcome.name, ignore_errors=True)
        with suppress(OSError):  # not empty: other runs are still there
            root.rmdir()
    return outcomes
