"""Experiment trackers: TensorBoard, Weights & Biases and MLflow, through accelerate's wrappers of them.

Runs do not depend on them: their own files are complete without, and a resumed run continues in the same place. A
tracker that cannot start is an error; one that fails later is left, with a warning. Of several processes that train one
run, the main one alone logs.
"""

import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from maple import files
from maple.config import RunSettings
from maple.distributed import launched
from maple.errors import ConfigError, first_line, one_of
from maple.runs.folder import flatten, read_history
from maple.runs.training import TrainProgress
from maple.train import EpochReport, StepReport

logger = logging.getLogger(__name__)

PROJECT = "maple"
"""The name of the project of Weights & Biases and of the experiment of MLflow."""
_MEASURES = ("top1", "top5", "macro_f1", "calibration_error")
TRACKERS = ("tensorboard", "wandb", "mlflow")


def require_tracker(name: str) -> None:
    """Raise ConfigError for a tracker that is unknown, or whose package is not installed."""
    if name not in TRACKERS:
        raise ConfigError(one_of("tracker", name, TRACKERS))
    if find_spec(name) is None:
        raise ConfigError(f"the tracker {name} needs its package: pip install 'maple-clip[{name}]'")


class Tracked(TrainProgress):
    """Logs a run to an experiment tracker, and passes its progress on; a context manager that closes the tracker.

    Example:
        >>> with Tracked("tensorboard", folder, settings) as tracked:
        ...     train_run(settings, folder, progress=tracked)
    """

    def __init__(self, name: str, folder: Path, settings: RunSettings, progress: TrainProgress | None = None) -> None:
        """Raises ConfigError as `require_tracker`. The tracker is opened when there is something to log."""
        require_tracker(name)
        self._name, self._folder, self._settings = name, folder, settings
        self._progress = progress or TrainProgress()
        self._tracker: Any = None
        self._logs = launched()[0] == 0  # the main process
        self._step = 0

    def __enter__(self) -> "Tracked":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracker is not None:
            with self._leaving():
                self._tracker.finish()
            self._tracker = None

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        self._step = finished_epochs * steps
        self._open(purge_step=self._step)
        self._progress.start(epochs, steps, finished_epochs)

    def step(self, report: StepReport) -> None:
        self._step = report.step
        self._log("step", {"loss": report.loss, "lr": report.lr, **report.logs})
        self._progress.step(report)

    def epoch(self, report: EpochReport) -> None:
        validation = {f"validation_{name}": value for name, value in (report.validation or {}).items()}
        self._log("epoch", {"epoch": report.epoch + 1, "loss": report.loss, **report.logs, **validation})
        self._progress.epoch(report)

    def row(self, row: Mapping[str, Any]) -> None:
        """The scores of an evaluation; of a run that had finished before, after all of its steps."""
        if self._tracker is None:
            self._step = sum(len(epoch.losses) for epoch in read_history(self._folder))
        self._log(f"{row['dataset']} {row['classes']}", {name: float(row[name]) for name in _MEASURES})

    def _log(self, group: str, values: Mapping[str, float]) -> None:
        self._open()
        if self._logs:
            with self._leaving():
                self._tracker.log({f"{group}/{name}": value for name, value in values.items()}, step=self._step)

    @contextmanager
    def _leaving(self) -> Iterator[None]:
        """Leave a tracker that fails, a server that is gone, say: the run continues without it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the run does not depend on it
            if self._logs:
                problem = f"{type(error).__name__}: {first_line(error)}"
                logger.warning("%s fails (%s); the run continues, and is no longer logged there", self._name, problem)
            self._logs = False

    def _open(self, purge_step: int | None = None) -> None:
        """Open the tracker, if it is not; TensorBoard forgets what was logged from `purge_step` on."""
        if self._tracker is not None or not self._logs:
            return
        from accelerate import PartialState, tracking

        PartialState(cpu=True)  # accelerate's log wants it; within a group of processes it exists already
        name, folder = self._name, self._folder
        id_path = folder / f"{name}.json"  # of W&B and MLflow
        advice = f"remove it to start another run of {name}"
        run_id = files.read_json(id_path, advice=advice)["run_id"] if id_path.exists() else None
        tracker: Any
        if name == "tensorboard":
            # Steps of an unfinished epoch are written again.
            tracker = tracking.TensorBoardTracker(name, folder, purge_step=purge_step)
        elif name == "wandb":
            run_id = run_id or uuid.uuid4().hex  # not the folder's name, which other runs may share
            tracker = tracking.WandBTracker(PROJECT, name=folder.name, id=run_id, resume="allow", dir=str(folder))
        else:
            tracker = tracking.MLflowTracker(PROJECT, run_id=run_id, run_name=folder.name)
        tracker.main_process_only = False  # that is decided here
        settings = self._settings.model_dump(mode="json")
        try:
            if hasattr(tracker, "start"):  # before accelerate 1.8 it started when it was made
                tracker.start()
            if name == "tensorboard":
                # Its own method for settings would write another run for each time that this one is resumed.
                tracker.log({"settings": f"```\n{json.dumps(settings, indent=1)}\n```"}, step=self._step)
            elif name != "mlflow" or run_id is None:  # MLflow refuses settings that differ from those of its run
                items = flatten(settings).items()
                tracker.store_init_configuration(
                    {key: json.dumps(value) if isinstance(value, list | dict) else value for key, value in items}
                )
        except Exception as error:
            raise ConfigError(
                f"{name} cannot start: {type(error).__name__}: {error}; check its settings, or leave the "
                "tracker out: training is resumed"
            ) from error
        if name == "mlflow":
            run_id = tracker.tracker.info.run_id
        if run_id is not None:
            files.write_json(id_path, {"run_id": run_id})
        self._tracker = tracker
