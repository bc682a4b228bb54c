"""Carrying out planned runs: in this process or in several, each a folder that survives anything.

What is done is read from the folders, so a sweep can be stopped at any moment, by anything, and repeated.
"""

import json
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol

from maple import files
from maple.checkpoint import load_prompts
from maple.clip import Backbone, load_clip
from maple.distributed import this_process
from maple.errors import BusyError, MapleError
from maple.files import FAILURE
from maple.protocols.plan import Evaluation, PlannedRun
from maple.runs import Tracked, evaluate_run, finished_prompts, read_rows, train_run
from maple.train import EpochReport, StepReport

Status = Literal["new", "interrupted", "failed", "finished"]
Report = Callable[[str, str, int, int], None]
"""Called with a run's name, what it is doing, and how much of how much is done."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        status: `finished`, `failed` (recorded in its folder), or `busy`: another process is at it.
        rows: of its evaluations, in the order of the plan.
        seconds: what it took now; 0 for a run that had finished before.
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
    """How far a run is, from its folder below `root`."""
    folder = root / run.name
    if (folder / "prompts.safetensors").exists() and None not in _answers(run, folder):
        return "finished"
    if (folder / FAILURE).exists():
        return "failed"
    return "interrupted" if (folder / "config.json").exists() else "new"


def carry_out(run: PlannedRun, root: Path, device: str | None, report: Report, tracker: str | None = None) -> Outcome:
    """Train and evaluate one run, or what is left of it. A failure is recorded in its folder, not raised.

    Args:
        tracker: what else to tell: one of `maple.runs.TRACKERS`.
    """
    folder, began = root / run.name, time.monotonic()
    try:
        _train_and_evaluate(run, folder, device, partial(report, run.name), tracker)
    except BusyError as error:
        return Outcome(run.name, "busy", error=str(error))
    except MapleError as error:
        return record_failure(run, root, str(error), seconds=time.monotonic() - began)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is recorded and the other runs go on
        told = f"{type(error).__name__}: {error}"
        return record_failure(run, root, told, traceback.format_exc(), seconds=time.monotonic() - began)
    (folder / FAILURE).unlink(missing_ok=True)
    return finished_outcome(run, root, time.monotonic() - began)


def record_failure(
    run: PlannedRun, root: Path, error: str, trace: str | None = None, *, seconds: float = 0.0
) -> Outcome:
    """Write down why a run failed, in its folder."""
    files.write_json(root / run.name / FAILURE, {"error": error, "traceback": trace})
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


def _train_and_evaluate(
    run: PlannedRun, folder: Path, device: str | None, report: Callable[..., None], tracker: str | None
) -> None:
    settings = run.settings
    place = this_process(device).device
    chosen = settings.backbone
    backbone = _backbone(chosen.name, chosen.pretrained, chosen.precision, str(place))
    steps = _Steps(report)
    with nullcontext() if tracker is None else Tracked(tracker, folder, settings, steps) as tracked:
        train_run(settings, folder, device=device, progress=tracked or steps, backbone=backbone)
        method = load_prompts(finished_prompts(folder), backbone)
        for evaluation, answer in zip(run.evaluations, _answers(run, folder), strict=True):
            if answer is not None:
                continue
            where = "" if evaluation.dataset is None else f" {evaluation.dataset}"
            _, row = evaluate_run(
                folder,
                classes=evaluation.classes,
                dataset=evaluation.dataset,
                root=settings.data.root,
                device=device,
                method=method,
                on_images=partial(report, f"evaluating{where} ({evaluation.classes})"),
            )
            if tracked is not None:
                tracked.row(row)


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


@lru_cache(maxsize=1)
def _backbone(name: str, pretrained: str | None, precision: str, device: str) -> Backbone:
    """The CLIP of the last run, kept for the next."""
    return load_clip(name, pretrained, precision=precision, device=device)


def _answers(run: PlannedRun, folder: Path) -> list[dict[str, Any] | None]:
    """The row of each evaluation of the plan; None where it has not been made."""
    rows = read_rows(folder)
    return [next((row for row in rows if _is_answer(row, evaluation, run)), None) for evaluation in run.evaluations]


def _is_answer(row: dict[str, Any], evaluation: Evaluation, run: PlannedRun) -> bool:
    dataset = evaluation.dataset or run.settings.data.dataset
    asked = {"dataset": dataset, "classes": evaluation.classes, "part": None, "names": None, "only": None}
    return row.get("asked") == asked
