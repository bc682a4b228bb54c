"""Experiment trackers: TensorBoard, Weights & Biases and MLflow, through accelerate's wrappers of them.

What a run is does not depend on them: its own files are complete without, and a resumed run goes on in the same place.
"""

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from maple import files
from maple.config import RunSettings
from maple.errors import ConfigError, one_of
from maple.runs.training import TrainProgress
from maple.train import EpochReport, StepReport

PROJECT = "maple"
"""What the project of Weights & Biases and the experiment of MLflow are called."""
_MEASURES = ("top1", "top5", "macro_f1", "calibration_error")
_MLFLOW_ID = "mlflow.json"


def _tensorboard(folder: Path, step: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # What was written of an epoch that did not end is written again.
    return TensorBoardTracker("tensorboard", folder, purge_step=step)


def _wandb(folder: Path, step: int) -> Any:
    from accelerate.tracking import WandBTracker

    del step
    return WandBTracker(PROJECT, name=folder.name, id=folder.name[-64:], resume="allow", dir=str(folder))


def _mlflow(folder: Path, step: int) -> Any:
    from accelerate.tracking import MLflowTracker

    del step
    known = folder / _MLFLOW_ID
    run_id = json.loads(known.read_text(encoding="utf-8"))["run_id"] if known.exists() else None
    return MLflowTracker(PROJECT, run_id=run_id, run_name=folder.name)


TRACKERS: dict[str, Callable[[Path, int], Any]] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}


def require_tracker(name: str) -> None:
    """Refuse a tracker that cannot be used.

    Raises:
        ConfigError: unknown, or its package is not installed.
    """
    if name not in TRACKERS:
        raise ConfigError(one_of("tracker", name, TRACKERS))
    if find_spec(name) is None:
        raise ConfigError(f"--tracker {name} needs its package: pip install 'maple-clip[{name}]'")


class Tracked:
    """A progress that also tells a tracker; use it as a context, so that the tracker is closed."""

    def __init__(self, name: str, folder: Path, settings: RunSettings, progress: TrainProgress) -> None:
        """Nothing is begun before there is something to tell.

        Raises:
            ConfigError: the tracker is unknown or not installed.
        """
        require_tracker(name)
        self._name = name
        self._folder = folder
        self._settings = settings
        self._progress = progress
        self._tracker: Any = None
        self._step = 0

    def __enter__(self) -> "Tracked":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracker is not None:
            self._tracker.finish()
            self._tracker = None

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        """Open the tracker, at the first step that is made now."""
        self._step = finished_epochs * steps
        self._begin()
        self._progress.start(epochs, steps, finished_epochs)

    def step(self, report: StepReport) -> None:
        """Loss, its terms and the rate of a step."""
        self._step = report.step
        self._tell("step", {"loss": report.loss, "lr": report.lr, **report.logs})
        self._progress.step(report)

    def epoch(self, report: EpochReport) -> None:
        """Means over an epoch."""
        self._tell("epoch", {"epoch": report.epoch + 1, "loss": report.loss, **report.logs})
        self._progress.epoch(report)

    def row(self, row: Mapping[str, Any]) -> None:
        """The scores of an evaluation."""
        self._tell(f"{row['dataset']} {row['classes']}", {name: float(row[name]) for name in _MEASURES})

    def _tell(self, what: str, values: Mapping[str, float]) -> None:
        self._begin()
        self._tracker.log({f"{what}/{name}": value for name, value in values.items()}, step=self._step)

    def _begin(self) -> None:
        if self._tracker is not None:
            return
        from accelerate import PartialState

        PartialState(cpu=True)  # accelerate's log wants it; within a group of processes it is there already
        tracker = TRACKERS[self._name](self._folder, self._step)
        tracker.main_process_only = False  # only the main process comes here
        try:
            if hasattr(tracker, "start"):  # before accelerate 1.8 it had begun when it was made
                tracker.start()
        except Exception as error:
            raise ConfigError(
                f"{self._name} cannot begin: {type(error).__name__}: {error}; see to its settings, or leave --tracker "
                "out: the same command goes on"
            ) from error
        settings = self._settings.model_dump(mode="json")
        if self._name == "tensorboard":
            # Its own place for settings would be another run for each time that this one is resumed.
            tracker.log({"settings": f"```\n{json.dumps(settings, indent=1)}\n```"}, step=self._step)
        else:
            tracker.store_init_configuration(_flat(settings))
        if self._name == "mlflow":
            files.write_json(self._folder / _MLFLOW_ID, {"run_id": tracker.tracker.info.run_id})
        self._tracker = tracker


def _flat(settings: Mapping[str, Any], start: str = "") -> dict[str, str | float | int | bool | None]:
    flat: dict[str, str | float | int | bool | None] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{start}{key}.")
        else:
            flat[f"{start}{key}"] = value if isinstance(value, str | float | int | bool | None) else json.dumps(value)
    return flat
