"""What `maple fit` shows while it works: bars for looking and for evaluating, and the training's own between them."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from maple.cli.progress import FileBars, TrainBar
from maple.config import RunSettings
from maple.data import Item
from maple.errors import visible
from maple.methods import Method
from maple.train import EpochReport, StepReport


class FitBars:
    """On stderr; only one block of bars is alive at a time."""

    def __init__(self, settings: RunSettings, folder: Path) -> None:
        self._settings = settings
        self._folder = folder
        self._live: FileBars | TrainBar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def looked(self, done: int, total: int) -> None:
        """Move the bar of images."""
        self._files().advance("images looked at", done, total)

    def inspected(self, lines: Sequence[str]) -> None:
        """Print what was found."""
        bars = self._files()
        for line in lines:
            bars.say(visible(line))
        self._close()

    def ready(self, method: Method, items: list[Item]) -> None:
        """Say what is about to be trained."""
        self._train().ready(method, items)

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        """Open the training's bar, if there is something to train."""
        self._train().start(epochs, steps, finished_epochs)

    def step(self, report: StepReport) -> None:
        """Move it on."""
        self._train().step(report)

    def epoch(self, report: EpochReport) -> None:
        """Print the epoch's line."""
        self._train().epoch(report)

    def evaluated(self, what: str, done: int, total: int) -> None:
        """Move the bar of held-out images."""
        self._files().advance(f"{what}: held-out images", done, total)

    def _files(self) -> FileBars:
        if not isinstance(self._live, FileBars):
            self._close()
            self._live = FileBars().__enter__()
        return self._live

    def _train(self) -> TrainBar:
        if not isinstance(self._live, TrainBar):
            self._close()
            self._live = TrainBar(self._settings, self._folder).__enter__()
        return self._live

    def _close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.__exit__(None, None, None)
