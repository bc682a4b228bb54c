"""Carrying out planned runs: in this process or in several, each a folder that survives anything.

What is done is read from the folders, so a sweep can be stopped at any moment, by anything, and repeated.
"""

import json
import logging
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from maple import files
from maple.checkpoint import load_prompts
from maple.clip import Backbone
from maple.distributed import this_process
from maple.errors import BusyError, CheckpointError, MapleError, first_line
from maple.files import FAILURE
from maple.runs import (
    Tracked,
    TrainProgress,
    cached_backbone,
    evaluate_run,
    evaluation_request,
    finished_prompts,
    read_rows,
    train_run,
    train_together,
)
from maple.sweeps.plan import Evaluation, PlannedRun
from maple.train import EpochReport, StepReport

logger = logging.getLogger(__name__)

Status = Literal["new", "interrupted", "failed", "finished"]
Report = Callable[[str, str, int, int], None]
"""Called with a run's name, what it is doing, and how much of how much is done."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        status: `finished`, `failed` (recorded in its folder), or `busy`: another process is at it.
        rows: of its evaluations, in the order of the plan.
        seconds: what it took now, its share where it was trained with others; 0 for a run that had finished before.
    """

    name: str
    status: Literal["finished", "failed", "busy"]
    rows: tuple[dict[str, Any], ...] = ()
    error: str | None = None
    seconds: float = 0.0


class SweepProgress(Protocol):
    """What watches a sweep."""

    def doing(self, name: str, what: str, done: int, total: int) -> None:
        """A run goes on: `what` it does, `done` of `total`."""

    def ended(self, run: PlannedRun, outcome: Outcome) -> None:
        """A run has ended, well or not."""


def status_of(run: PlannedRun, root: Path) -> Status:
    """How far a run is, from its folder below `root`. One whose rows are damaged is not finished."""
    folder = root / run.name
    if (folder / "prompts.safetensors").exists() and _is_answered(run, folder):
        return "finished"
    if (folder / FAILURE).exists():
        return "failed"
    return "interrupted" if (folder / "config.json").exists() else "new"


def run_group(
    runs: Sequence[PlannedRun], root: Path, device: str | None, report: Report, tracker: str | None = None
) -> list[Outcome]:
    """Train and evaluate runs, or what is left of them; several are trained together (`train_together`).

    A failure is recorded in its run's folder, not raised, and the others go on. If they cannot share their passes, for
    lack of memory say, each goes on alone.

    Args:
        tracker: what else to tell: one of `maple.runs.TRACKERS`.

    Raises:
        ConfigError: the tracker is unknown or not installed.
    """
    with ExitStack() as trackers:
        watched = [_Watched(run, root, report, tracker, trackers) for run in runs]
        began = time.monotonic()
        errors = _train_together(watched, device) if len(runs) > 1 else [None]
        each = (time.monotonic() - began) / len(runs)
        return [_carry_out(one, device, error, each) for one, error in zip(watched, errors, strict=True)]


class _Watched:
    """A run, its place, and who hears of it."""

    def __init__(self, run: PlannedRun, root: Path, report: Report, tracker: str | None, trackers: ExitStack) -> None:
        self.run = run
        self.root = root
        self.folder = root / run.name
        self.report = partial(report, run.name)
        self.progress: TrainProgress = _Steps(self.report)
        self.tracked: Tracked | None = None
        if tracker is not None:
            self.tracked = Tracked(tracker, self.folder, run.settings, self.progress)
            self.progress = trackers.enter_context(self.tracked)


def _train_together(watched: Sequence[_Watched], device: str | None) -> list[MapleError | None]:
    """What went wrong with each run, if anything; what is left to do of a run is then done alone."""
    try:
        results = train_together(
            [(one.run.settings, one.folder) for one in watched],
            device=device,
            progress=[one.progress for one in watched],
            backbone=_backbone_of(watched[0].run, device),
        )
    except Exception as error:  # noqa: BLE001 - whatever it is, each run meets it alone, or does not
        logger.warning("%d runs go on one by one, since together: %s", len(watched), first_line(error))
        return [None] * len(watched)
    return [result if isinstance(result, MapleError) else None for result in results]


def _carry_out(watched: _Watched, device: str | None, known: MapleError | None, seconds: float) -> Outcome:
    """What becomes of a run, for which `seconds` have been spent, and of which an error may be known."""
    run, root, began = watched.run, watched.root, time.monotonic() - seconds
    try:
        if known is not None:
            raise known
        _train_and_evaluate(watched, device)
    except BusyError as error:
        return Outcome(run.name, "busy", error=str(error))
    except MapleError as error:
        return record_failure(run, root, str(error), seconds=time.monotonic() - began)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded and the other runs go on
        told = f"{type(error).__name__}: {error}"
        return record_failure(run, root, told, traceback.format_exc(), seconds=time.monotonic() - began)
    (watched.folder / FAILURE).unlink(missing_ok=True)
    return finished_outcome(run, root, time.monotonic() - began)


def record_failure(
    run: PlannedRun, root: Path, error: str, trace: str | None = None, *, seconds: float = 0.0
) -> Outcome:
    """Write down why a run failed, in its folder; where that cannot be done either, it is only said."""
    try:
        files.write_json(root / run.name / FAILURE, {"error": error, "traceback": trace})
    except OSError as reason:
        logger.warning("%s cannot be written: %s", root / run.name / FAILURE, reason.strerror)
    return Outcome(run.name, "failed", error=error, seconds=seconds)


def finished_outcome(run: PlannedRun, root: Path, seconds: float = 0.0) -> Outcome:
    """The outcome of a run that has finished."""
    rows = tuple(row for row in _answers(run, root / run.name) if row is not None)
    return Outcome(run.name, "finished", rows, seconds=seconds)


def failed_outcome(run: PlannedRun, root: Path) -> Outcome:
    """The outcome of a run that failed in an earlier sweep."""
    try:
        error = str(json.loads((root / run.name / FAILURE).read_text(encoding="utf-8"))["error"])
    except (OSError, ValueError, LookupError, TypeError):
        error = f"{root / run.name / FAILURE} is unreadable"
    return Outcome(run.name, "failed", error=error)


def _train_and_evaluate(watched: _Watched, device: str | None) -> None:
    run, folder = watched.run, watched.folder
    backbone = _backbone_of(run, device)
    train_run(run.settings, folder, device=device, progress=watched.progress, backbone=backbone)
    method = load_prompts(finished_prompts(folder), backbone)
    for evaluation, answer in zip(run.evaluations, _answers(run, folder), strict=True):
        if answer is not None:
            continue
        where = "" if evaluation.dataset is None else f" {evaluation.dataset}"
        _, row = evaluate_run(
            folder,
            classes=evaluation.classes,
            dataset=evaluation.dataset,
            root=run.settings.data.root,
            device=device,
            method=method,
            on_images=partial(watched.report, f"evaluating{where} ({evaluation.classes})"),
        )
        if watched.tracked is not None:
            watched.tracked.row(row)


class _Steps:
    """A run's training, told as steps."""

    def __init__(self, report: Callable[..., None]) -> None:
        self._report = report
        self._total = 0
        self._done = 0
        self._epochs = 0

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        self._total, self._done, self._epochs = epochs * steps, finished_epochs * steps, epochs

    def step(self, report: StepReport) -> None:
        self._done += 1
        what = f"epoch {report.epoch + 1}/{self._epochs}, loss {report.loss:.3f}"
        self._report(what, self._done, self._total)

    def epoch(self, report: EpochReport) -> None:
        """The steps have told it."""


def _backbone_of(run: PlannedRun, device: str | None) -> Backbone:
    chosen = run.settings.backbone
    return cached_backbone(chosen.name, chosen.pretrained, chosen.precision, this_process(device).device)


def _answers(run: PlannedRun, folder: Path) -> list[dict[str, Any] | None]:
    """The row of each evaluation of the plan; None where it has not been made."""
    rows = read_rows(folder)
    return [next((row for row in rows if _is_answer(row, evaluation, run)), None) for evaluation in run.evaluations]


def _is_answered(run: PlannedRun, folder: Path) -> bool:
    """Whether every evaluation of the plan has its row."""
    try:
        return None not in _answers(run, folder)
    except CheckpointError:  # told by whoever goes on with the run, without harm to the others
        return False


def _is_answer(row: dict[str, Any], evaluation: Evaluation, run: PlannedRun) -> bool:
    dataset = evaluation.dataset or run.settings.data.dataset
    return row.get("asked") == evaluation_request(dataset, evaluation.classes)
