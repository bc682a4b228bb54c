"""Execute planned runs. All state is read from the run folders, so a sweep can be killed at any time and repeated."""

import logging
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

from maple import files
from maple.checkpoint import load_prompts
from maple.clip import Backbone
from maple.data import load_dataset
from maple.data.catalogue import CATALOGUE, template_of
from maple.data.records import items_hash
from maple.distributed import this_process
from maple.errors import BusyError, CheckpointError, MapleError, first_line
from maple.files import FAILURE, read_json
from maple.methods import METHODS
from maple.runs import Tracked, TrainProgress, evaluate_run, finished_prompts, read_rows, train_run, train_together
from maple.runs.evaluation import evaluation_request
from maple.runs.folder import start_of
from maple.runs.spec import cached_backbone
from maple.sweeps.plan import PlannedRun
from maple.train import StepReport

logger = logging.getLogger(__name__)

Status = Literal["new", "interrupted", "failed", "finished"]
Report = Callable[[str, str, int, int], None]
"""Called with the name of a run, its current activity, and how many of how many steps or images are done."""


@dataclass(frozen=True)
class RunOutcome:
    """The outcome of a run: `busy` where another process is training it; its rows are in the order of the plan.

    `interrupted` is a run that the cluster lost: it is not recorded as failed, and a repeated sweep continues it.
    `seconds` is the time taken now, a share of it where several runs were trained together; 0 if finished before.

    Example:
        >>> RunOutcome("eurosat_maple", "failed", error="out of memory").rows
        ()
    """

    name: str
    status: Literal["finished", "failed", "busy", "interrupted"]
    rows: tuple[dict[str, Any], ...] = ()
    error: str | None = None
    seconds: float = 0.0


class SweepProgress:
    """Follows a sweep. Override what you need; the methods do nothing by default.

    Example:
        >>> class Print(SweepProgress):
        ...     def ended(self, run, outcome):
        ...         print(run.label, outcome.status)
    """

    def advance(self, name: str, activity: str, done: int, total: int) -> None:
        """A run has made progress: `activity` is at step or image `done` of `total`."""

    def ended(self, run: PlannedRun, outcome: RunOutcome) -> None:
        """A run has finished, failed, or was found busy."""


@dataclass
class _Job(TrainProgress):
    """A run, its folder, and the receivers of its progress; it reports its own training steps to `report`."""

    run: PlannedRun
    folder: Path
    report: Callable[[str, int, int], None]
    tracked: Tracked | None = field(default=None, init=False)
    _steps: int = field(default=0, init=False)
    _done: int = field(default=0, init=False)
    _epochs: int = field(default=0, init=False)

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        self._steps, self._done, self._epochs = epochs * steps, finished_epochs * steps, epochs

    def step(self, report: StepReport) -> None:
        self._done += 1
        self.report(f"epoch {report.epoch + 1}/{self._epochs}, loss {report.loss:.3f}", self._done, self._steps)

    @property
    def progress(self) -> TrainProgress:
        return self if self.tracked is None else self.tracked


def status_of(run: PlannedRun, root: Path) -> Status:
    """Return the status of a run, from its folder below `root`. A run whose rows are damaged is not finished."""
    folder = root / run.name
    if (folder / "prompts.safetensors").exists():
        with suppress(CheckpointError):  # raised again when the run is resumed, where it does not affect the other runs
            if None not in _planned_rows(run, folder):
                return "finished"
    if (folder / FAILURE).exists():
        return "failed"
    return "interrupted" if (folder / "config.json").exists() else "new"


def describe_plan(runs: Sequence[PlannedRun], root: Path) -> list[dict[str, Any]]:
    """Describe planned runs below `root` as JSON, with their status and how long they take.

    `seconds` is the time from the start of a finished run to its result, pauses included; for the others
    `estimated_seconds` is the median of finished runs with the same preset, data set and shots, None without one.

    Example:
        >>> [run["status"] for run in describe_plan(runs, Path("runs/demo"))]
        ['finished', 'new']
    """
    described: list[dict[str, Any]] = []
    measured: dict[tuple[Any, ...], list[float]] = {}
    for run in runs:
        folder, data = root / run.name, run.settings.data
        status = status_of(run, root)
        row = {
            "name": run.name,
            "label": run.label,
            "status": status,
            "folder": str(folder),
            "preset": run.recipe,
            "method": run.settings.method["name"],
            "dataset": data.dataset,
            "shots": data.shots,
            "seed": run.settings.seed,
            "evaluations": [
                {"dataset": planned.dataset or data.dataset, "classes": planned.classes} for planned in run.evaluations
            ],
        }
        kind = (run.recipe, data.dataset, data.shots)
        if status == "finished":
            row["seconds"] = _seconds(folder)
            if row["seconds"] is not None:
                measured.setdefault(kind, []).append(row["seconds"])
        described.append(row)
    for row in described:
        if row["status"] != "finished":
            times = measured.get((row["preset"], row["dataset"], row["shots"]))
            row["estimated_seconds"] = None if times is None else median(times)
    return described


def _seconds(folder: Path) -> float | None:
    """The time from the recorded start of a finished run to its result; None where that is not known."""
    if (started := start_of(folder)) is None:
        return None
    return max(0.0, round((folder / "prompts.safetensors").stat().st_mtime - started, 1))


def run_group(
    runs: Sequence[PlannedRun],
    root: Path,
    device: str | None,
    report: Report,
    tracker: str | None = None,
    failures_since: float | None = None,
) -> list[RunOutcome]:
    """Train and evaluate runs, or what is left of them; several runs are trained together (`train_together`).

    A failure is recorded in the folder of its run, not raised, and the other runs continue. If the runs cannot be
    trained together, for lack of memory for instance, each continues alone. `tracker`: as for `maple.runs.Tracked`.
    A run that another sweep has recorded as failed since `failures_since` (seconds since 1970) is not trained again.
    """
    if failed := [run for run in runs if _failed_since(root / run.name, failures_since)]:
        remaining = [run for run in runs if run not in failed]
        outcomes = run_group(remaining, root, device, report, tracker, failures_since) if remaining else []
        by_name = {outcome.name: outcome for outcome in [*outcomes, *(failed_outcome(run, root) for run in failed)]}
        return [by_name[run.name] for run in runs]
    with ExitStack() as trackers:
        jobs = [_Job(run, root / run.name, partial(report, run.name)) for run in runs]
        if tracker is not None:
            for job in jobs:
                job.tracked = trackers.enter_context(Tracked(tracker, job.folder, job.run.settings, job))
        began = time.monotonic()
        errors: list[MapleError | None] = [None] * len(jobs)
        if len(jobs) > 1:
            try:
                results = train_together(
                    [(job.run.settings, job.folder) for job in jobs],
                    device=device,
                    progress=[job.progress for job in jobs],
                    backbone=_backbone_of(runs[0], device),
                )
                errors = [result if isinstance(result, MapleError) else None for result in results]
            except Exception as error:  # noqa: BLE001 - whatever it is, each run fails by itself, or does not
                reason = first_line(error)
                logger.warning("%d runs continue one by one: they cannot be trained together: %s", len(jobs), reason)
        share = (time.monotonic() - began) / len(jobs)
        return [
            _complete(job, root, device, error, share, failures_since) for job, error in zip(jobs, errors, strict=True)
        ]


class _FailedMeanwhile(Exception):  # noqa: N818 - not an error of this sweep
    """Another sweep has recorded the run as failed."""


def _failed_since(folder: Path, moment: float | None) -> bool:
    """Whether a failure of the run was recorded at this moment or later; never without one."""
    with suppress(OSError):
        return moment is not None and (folder / FAILURE).stat().st_mtime >= moment
    return False


def _complete(
    job: _Job,
    root: Path,
    device: str | None,
    known_error: MapleError | None,
    seconds: float,
    failures_since: float | None,
) -> RunOutcome:
    """Train and evaluate a run as far as necessary; `seconds` have been spent on it already."""
    run, folder, began = job.run, job.folder, time.monotonic() - seconds

    def when_locked(*_: object) -> None:
        if _failed_since(folder, failures_since):  # while this process came to hold the lock
            raise _FailedMeanwhile

    try:
        if known_error is not None:
            raise known_error
        backbone = _backbone_of(run, device)
        options: dict[str, Any] = {"device": device, "backbone": backbone, "on_ready": when_locked}
        train_run(run.settings, folder, progress=job.progress, **options)
        method = load_prompts(finished_prompts(folder), backbone)
        for evaluation, stored_row in zip(run.evaluations, _planned_rows(run, folder), strict=True):
            if stored_row is not None:
                continue
            dataset = "" if evaluation.dataset is None else f" {evaluation.dataset}"
            _, row = evaluate_run(
                folder,
                classes=evaluation.classes,
                dataset=evaluation.dataset,
                root=run.settings.data.root,
                device=device,
                method=method,
                on_images=partial(job.report, f"evaluating{dataset} ({evaluation.classes})"),
            )
            if job.tracked is not None:
                job.tracked.row(row)
    except _FailedMeanwhile:
        return failed_outcome(run, root)
    except BusyError as error:
        return RunOutcome(run.name, "busy", error=str(error))
    except MapleError as error:
        return record_failure(run, root, str(error), seconds=time.monotonic() - began)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded and the other runs continue
        text = f"{type(error).__name__}: {error}"
        return record_failure(run, root, text, traceback.format_exc(), seconds=time.monotonic() - began)
    (folder / FAILURE).unlink(missing_ok=True)
    return finished_outcome(run, root, time.monotonic() - began)


def record_failure(
    run: PlannedRun, root: Path, error: str, trace: str | None = None, *, seconds: float = 0.0
) -> RunOutcome:
    """Write the reason of a failure into the folder of the run; if that is impossible, only log it."""
    try:
        files.write_json(root / run.name / FAILURE, {"error": error, "traceback": trace})
    except OSError as reason:
        logger.warning("%s cannot be written: %s", root / run.name / FAILURE, reason.strerror)
    return RunOutcome(run.name, "failed", error=error, seconds=seconds)


def finished_outcome(run: PlannedRun, root: Path, seconds: float = 0.0) -> RunOutcome:
    """Return the outcome of a finished run."""
    rows = tuple(row for row in _planned_rows(run, root / run.name) if row is not None)
    return RunOutcome(run.name, "finished", rows, seconds=seconds)


def failed_outcome(run: PlannedRun, root: Path) -> RunOutcome:
    """Return the outcome of a run that failed in an earlier sweep, or in another one."""
    try:
        error = str(read_json(root / run.name / FAILURE)["error"])
    except (MapleError, LookupError):
        error = f"{root / run.name / FAILURE} is unreadable"
    return RunOutcome(run.name, "failed", error=error)


def _planned_rows(run: PlannedRun, folder: Path) -> list[dict[str, Any] | None]:
    """Return the stored row of each planned evaluation; None where there is none yet, or its images were other ones."""
    rows = read_rows(folder)[::-1]  # of rows that agree, the last one counts
    data = run.settings.data
    planned_rows = []
    for planned in run.evaluations:
        request = evaluation_request(planned.dataset or data.dataset, planned.classes)
        # The images may have moved since the training: then the sweep's own rows name their new root.
        requests = (request, {**request, "root": data.root})
        row = next((row for row in rows if row.get("asked") in requests), None)
        if row is not None and planned.dataset is not None and template_of(planned.dataset) is not None:
            # Earlier versions had no rule of their own for lists of other data sets.
            is_current = row.get("target_rule", "each") == METHODS[run.settings.method["name"]].target_rule
            listed = listed_images(planned.dataset, data.root)
            row = row if is_current and listed in (None, row.get("items")) else None
        planned_rows.append(row)
    return planned_rows


@lru_cache
def listed_images(dataset: str, root: str | None) -> str | None:
    """Hash of the images that a target has now, if it lists whatever its folders hold, as ImageNet's variants do.

    None for data sets whose split is a file, and where the folders cannot be read: their evaluations stay as they are.
    """
    specification = CATALOGUE.get(dataset)
    if specification is None or not specification.evaluation_only:
        return None
    try:
        return items_hash(load_dataset(dataset, None if root is None else Path(root)).test)
    except MapleError:
        return None


def _backbone_of(run: PlannedRun, device: str | None) -> Backbone:
    settings = run.settings.backbone
    return cached_backbone(settings.name, settings.pretrained, settings.precision, this_process(device).device)
