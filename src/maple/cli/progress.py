"""Progress on standard error: live bars in a terminal, lines of text elsewhere."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from maple.config import RunSettings
from maple.data import Item
from maple.data.published.prepare import PrepareProgress
from maple.errors import visible
from maple.fitting import FitProgress
from maple.methods import Method
from maple.runs import TrainProgress
from maple.sweeps import PlannedRun, RunOutcome, SweepProgress
from maple.train import EpochReport, StepReport


class _Bars:
    """A context with bars on the screen."""

    def __init__(self, *columns: ProgressColumn, quiet: bool = False, **options: Any) -> None:
        self._console = Console(stderr=True, quiet=quiet, markup=False, highlight=False, soft_wrap=True)
        live = self._console.is_terminal and not quiet
        self._bars = Progress(*columns, TimeRemainingColumn(), console=self._console, disable=not live, **options)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()


class TrainBar(_Bars, TrainProgress):
    """Loss, accuracy, images per second and remaining time of a training."""

    def __init__(self, settings: RunSettings, folder: Path, *, quiet: bool = False) -> None:
        super().__init__(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[result]}"),
            quiet=quiet,
        )
        self._settings = settings
        self._folder = folder
        self._epochs = self._steps = 0
        self._epoch_began = time.monotonic()
        self._images = 0

    def ready(self, method: Method, items: list[Item]) -> None:
        backbone = method.backbone
        learns = bool(method.saved_tensors())
        parameters = f"{method.parameter_count():,} prompt parameters on " if learns else "nothing is trained; "
        images = f"{len(items)} images of " if learns else ""
        text = (
            f"{method.title}: {parameters}{backbone.name} "
            f"({backbone.pretrained or 'own weights'}, {backbone.precision}, {backbone.device}); "
            f"{images}{len(method.class_names)} classes, seed {self._settings.seed}"
        )
        self._console.print(visible(text))
        counts = Counter(name.replace("_", " ") for name in method.class_names)
        if repeated := [name for name, count in counts.items() if count > 1]:
            shown = visible(", ".join(repeated))
            self._console.print(f"warning: classes with the same name cannot be distinguished: {shown}")
        self._console.print(visible(f"run folder: {self._folder}"))

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        self._epochs, self._steps = epochs, steps
        if finished_epochs:
            self._console.print(f"resuming after epoch {finished_epochs} of {epochs}")
        self._tasks["train"] = self._bars.add_task(
            "train",
            total=epochs * steps,
            completed=finished_epochs * steps,
            epoch=f"{finished_epochs + 1}/{epochs}",
            result="",
        )
        self._epoch_began, self._images = time.monotonic(), 0

    def step(self, report: StepReport) -> None:
        self._images += report.images
        self._bars.update(
            self._tasks["train"],
            advance=1,
            epoch=f"{report.epoch + 1}/{self._epochs}",
            result=f"loss {report.loss:.4f}  acc {report.logs.get('accuracy', 0.0):.1%}  "
            f"{self._images_per_second():.1f} img/s",
        )

    def epoch(self, report: EpochReport) -> None:
        self._bars.update(self._tasks["train"], completed=(report.epoch + 1) * self._steps)  # a stage may end an epoch
        validation = f"  validation acc {report.validation['accuracy']:.1%}" if report.validation else ""
        self._console.print(
            f"epoch {report.epoch + 1}/{self._epochs}  lr {report.lr:.3g}  loss {report.loss:.4f}  "
            f"acc {report.logs.get('accuracy', 0.0):.1%}{validation}  {self._images_per_second():.1f} img/s"
        )
        self._epoch_began, self._images = time.monotonic(), 0

    def _images_per_second(self) -> float:
        return self._images / max(time.monotonic() - self._epoch_began, 1e-9)


class SweepBar(_Bars, SweepProgress):
    """The runs of a sweep: a bar for all and one for each running one, and a line for each that has ended."""

    def __init__(self, runs: int) -> None:
        super().__init__(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._runs = runs
        self._ended = 0
        self._all_runs = self._bars.add_task("all runs", total=runs)

    def advance(self, name: str, activity: str, done: int, total: int) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total)
        short = " ".join(name.split("_")[:-1])
        self._bars.update(self._tasks[name], description=visible(f"{short}: {activity}"), completed=done, total=total)

    def ended(self, run: PlannedRun, outcome: RunOutcome) -> None:
        if run.name in self._tasks:
            self._bars.remove_task(self._tasks.pop(run.name))
        self._ended += 1
        self._bars.update(self._all_runs, completed=self._ended)
        accuracies = (
            f"{row['classes'] if row['classes'] != 'all' else row['dataset']} {100 * row['top1']:.2f}"
            for row in outcome.rows
        )
        result = outcome.error or ", ".join(accuracies)
        time_taken = f" ({outcome.seconds:.0f} s)" if outcome.seconds else " (kept)"
        status = "" if outcome.status == "finished" else f"{outcome.status}: "
        self._console.print(visible(f"[{self._ended}/{self._runs}] {run.label}: {status}{result}{time_taken}"))


class FileBars(_Bars, PrepareProgress):
    """Lines of text, and a bar for each activity below them."""

    def __init__(self) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}"),
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # a stdout that is a file must not end up in stderr
        )

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print("\n".join(map(visible, text.split("\n"))))

    def advance(self, activity: str, done: int, total: int | None) -> None:
        """Advance the bar of an activity; show it if necessary."""
        if activity not in self._tasks:
            self._tasks[activity] = self._bars.add_task(activity, total=total)
        self._bars.update(self._tasks[activity], completed=done, total=total)


class FitBars(FitProgress):
    """The bars of a fit: of inspecting and evaluating images, and of the training between them; one at a time."""

    def __init__(self, settings: RunSettings, folder: Path) -> None:
        self._inspection, self._training, self._evaluation = FileBars(), TrainBar(settings, folder), FileBars()
        self._selection: FileBars | None = None
        self._trial, self._steps = "", 0
        self._shown: FileBars | TrainBar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown is not None:
            self._shown.__exit__(*error)

    def _show(self, bars: FileBars | TrainBar) -> None:
        """Show these bars instead of the previous ones."""
        if bars is not self._shown:
            self.__exit__()
            self._shown = bars.__enter__()

    def inspecting(self, done: int, total: int) -> None:
        self._show(self._inspection)
        self._inspection.advance("images inspected", done, total)

    def inspected(self, findings: Sequence[str]) -> None:
        self._show(self._inspection)
        for line in findings:
            self._inspection.say(visible(line))

    def trying(self, title: str, done: int, total: int) -> None:
        self._selection = self._selection or FileBars()
        self._show(self._selection)
        if title != self._trial:
            self._trial = title
            self._selection.say(visible(f"trying {title} ({done} of {total} trials done)"))
        self._selection.advance("trials", done, total)

    def ready(self, method: Method, items: list[Item]) -> None:
        self._selection = None
        self._show(self._training)
        self._training.ready(method, items)

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        if self._selection is None:
            self._training.start(epochs, steps, finished_epochs)
        else:
            self._steps = epochs * steps

    def step(self, report: StepReport) -> None:
        if self._selection is None:
            self._training.step(report)
        else:
            self._selection.advance(self._trial, report.step, self._steps)

    def epoch(self, report: EpochReport) -> None:
        if self._selection is None:
            self._training.epoch(report)

    def evaluating(self, method: str, done: int, total: int) -> None:
        self._show(self._evaluation)
        self._evaluation.advance(f"{method}: held-out images", done, total)
