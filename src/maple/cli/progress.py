"""Progress on the screen: a live bar on a terminal, one line per epoch elsewhere."""

import sys
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from maple.config import RunSettings
from maple.data import Item
from maple.data.published.prepare import PrepareProgress
from maple.methods import Method
from maple.sweeps import PlannedRun, RunOutcome, SweepProgress
from maple.train import EpochReport, StepReport


class _Live:
    """A block in which bars are on the screen."""

    _bar: Progress

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


class TrainBar(_Live):
    """Loss, accuracy, images per second and time left, over all epochs of a run."""

    def __init__(self, settings: RunSettings, folder: Path, *, quiet: bool = False) -> None:
        self._settings = settings
        self._folder = folder
        self._console = Console(stderr=True, quiet=quiet, markup=False, highlight=False, soft_wrap=True)
        self._live = self._console.is_terminal and not quiet
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  acc {task.fields[accuracy]:.1%}  {task.fields[speed]:.1f} img/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task: TaskID | None = None
        self._epochs = 0
        self._epoch_began = time.monotonic()
        self._images = 0

    def ready(self, method: Method, items: list[Item]) -> None:
        """Say what is about to be trained."""
        backbone = method.backbone
        self._console.print(
            f"{method.title}: {method.parameter_count():,} prompt parameters on {backbone.name} "
            f"({backbone.pretrained or 'own weights'}, {backbone.precision}, {backbone.device}); "
            f"{len(items)} images of {len(method.class_names)} classes, seed {self._settings.seed}"
        )
        words = Counter(name.replace("_", " ") for name in method.class_names)
        if same := [name for name, times in words.items() if times > 1]:
            self._console.print(f"warning: classes with the same words cannot be told apart: {', '.join(same)}")
        self._console.print(f"run folder: {self._folder}")

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        """Open the bar."""
        self._epochs = epochs
        if finished_epochs:
            self._console.print(f"resuming after epoch {finished_epochs} of {epochs}")
        self._task = self._bar.add_task(
            "train",
            total=epochs * steps,
            completed=finished_epochs * steps,
            epoch=f"{finished_epochs + 1}/{epochs}",
            loss=float("nan"),
            accuracy=0.0,
            speed=0.0,
        )
        self._epoch_began, self._images = time.monotonic(), 0

    def step(self, report: StepReport) -> None:
        """Move the bar on."""
        self._images += report.images
        if self._task is not None:
            self._bar.update(
                self._task,
                advance=1,
                epoch=f"{report.epoch + 1}/{self._epochs}",
                loss=report.loss,
                accuracy=report.logs.get("accuracy", 0.0),
                speed=self._speed(),
            )

    def epoch(self, report: EpochReport) -> None:
        """Print the epoch's line."""
        self._console.print(
            f"epoch {report.epoch + 1}/{self._epochs}  lr {report.lr:.3g}  loss {report.loss:.4f}  "
            f"acc {report.logs.get('accuracy', 0.0):.1%}  {self._speed():.1f} img/s"
        )
        self._epoch_began, self._images = time.monotonic(), 0

    def _speed(self) -> float:
        return self._images / max(time.monotonic() - self._epoch_began, 1e-9)


class SweepBar(_Live, SweepProgress):
    """Runs finished and under way: live bars on a terminal, one line per finished run elsewhere."""

    def __init__(self, runs: int) -> None:
        self._runs = runs
        self._ended = 0
        self._console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._whole = self._bar.add_task("all runs", total=runs)
        self._tasks: dict[str, TaskID] = {}

    def advance(self, name: str, activity: str, done: int, total: int) -> None:
        """Move the bar of one run on."""
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total)
        short = " ".join(name.split("_")[:-1])
        self._bar.update(self._tasks[name], description=f"{short}: {activity}", completed=done, total=total)

    def ended(self, run: PlannedRun, outcome: RunOutcome) -> None:
        """Say what came of a run."""
        if run.name in self._tasks:
            self._bar.remove_task(self._tasks.pop(run.name))
        self._ended += 1
        self._bar.update(self._whole, completed=self._ended)
        told = outcome.error or ", ".join(_measured(row) for row in outcome.rows)
        time_taken = f" ({outcome.seconds:.0f} s)" if outcome.seconds else " (kept)"
        state = "" if outcome.status == "finished" else f"{outcome.status}: "
        self._console.print(f"[{self._ended}/{self._runs}] {run.label}: {state}{told}{time_taken}")


def _measured(row: dict[str, Any]) -> str:
    where = row["classes"] if row["classes"] != "all" else row["dataset"]
    return f"{where} {100 * row['top1']:.2f}"


class FileBars(_Live, PrepareProgress):
    """Lines of text, and below them a bar for each thing that is going on, on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # and not into stderr where stdout is a file
            disable=not self._console.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def say(self, text: str) -> None:
        """Print a line on stderr."""
        self._console.print(text)

    def advance(self, what: str, done: int, total: int | None) -> None:
        """Move the bar of `what`, making it if need be."""
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done, total=total)
