"""`train_run`: settings in, a run folder out."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from maple.checkpoint import describe_backbone, read_tensors, save_prompts
from maple.clip import Backbone
from maple.config import RunSettings
from maple.data import ImageStore, Item
from maple.data.batches import derive_seed
from maple.data.records import items_hash
from maple.distributed import Processes, this_process
from maple.errors import CheckpointError
from maple.methods import Method, build_method
from maple.runs.folder import only_one, read_history, refuse_other_run, write_beginning, write_epoch, write_history
from maple.runs.spec import complete, open_backbone, open_dataset, relevant, sample
from maple.runs.training_data import TrainingData
from maple.train import EpochReport, StepReport, Trainer
from maple.train.trainer import Batches

# What must be the same for a run to go on, and how to call it.
_IDENTITY = {"items": "training images (hash)", "backbone": "backbone", "settings": "settings"}


class TrainProgress(Protocol):
    """What watches a training run."""

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        """Training is about to begin, or to go on."""

    def step(self, report: StepReport) -> None:
        """A step was made."""

    def epoch(self, report: EpochReport) -> None:
        """An epoch is finished and safe on the disk."""


class Silent:
    """A progress that shows nothing."""

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        """Show nothing."""

    def step(self, report: StepReport) -> None:
        """Show nothing."""

    def epoch(self, report: EpochReport) -> None:
        """Show nothing."""


@dataclass(frozen=True)
class TrainResult:
    """What `train_run` leaves: the folder, the epochs, and whether there was anything left to do."""

    folder: Path
    history: tuple[EpochReport, ...]
    was_finished: bool = False


class Run:
    """A run on its way from settings to a prompts file: what it trains, on what, and where it is kept.

    Until `begin` nothing is written; from then on its folder must be locked (`only_one`).
    """

    trainer: Trainer

    def __init__(
        self, settings: RunSettings, folder: Path, processes: Processes, backbone: Backbone | None = None
    ) -> None:
        """Open the data set and make the method; `settings` are complete.

        Raises:
            MapleError: whatever is wrong with the settings, the data or the backbone.
        """
        self.settings = settings
        self.folder = folder
        self._processes = processes
        self.dataset = open_dataset(settings, folder)
        self.items, self._val, class_names = sample(settings, self.dataset)
        backbone = backbone or open_backbone(settings, processes.device)
        self.method = fresh_method(settings, backbone, class_names)
        self._identity = {
            "items": items_hash(self.items),
            "backbone": describe_backbone(backbone),
            "settings": relevant(settings),
        }

    def begin(self, store: ImageStore | None = None) -> None:
        """Make a trainer, resume where the folder says, and make the folder a run.

        Args:
            store: opens the data set's images; without it they are decoded for this run alone.

        Raises:
            CheckpointError: what is to be resumed is damaged, or another run's.
            MapleError: what the method is fitted to cannot be used.
        """
        self._material = TrainingData(self.settings, self.items, store or self.dataset.store(), self._val)
        self._material.begin(self.method)
        self.trainer = Trainer(self.method, self.settings.train, self._processes)
        _resume(self.trainer, self.folder, self._identity)
        if self._processes.is_main:
            write_beginning(self.folder, self.settings, self.items)
        self._processes.wait()

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return self._material.steps

    def batches(self) -> Batches:
        """The batches of the next epoch. Raises as `TrainingData.batches`."""
        return self._material.batches(self.trainer)

    def keep(self) -> None:
        """Keep the state after a whole epoch."""
        if self._processes.is_main:
            write_epoch(self.trainer, self.folder, self._identity)

    def finish(self) -> None:
        """Write the prompts: the run has finished."""
        if not self._processes.is_main:
            return
        self._material.finish(self.method)
        trainer, settings = self.trainer, self.settings
        if trainer.history:
            write_history(trainer, self.folder)  # the last report may be missing after a crash
        info = {
            "dataset": self.dataset.name,
            "data": settings.data.model_dump(mode="json", exclude={"root"}),
            "seed": settings.seed,
            "items": self._identity["items"],
            "train": {"epochs": trainer.epoch, "loss": trainer.history[-1].loss if trainer.history else None},
        }
        if chosen := trainer.method.selected_hyperparameters():
            info["chosen"] = chosen
        save_prompts(self.folder / "prompts.safetensors", trainer.method, info)
        (self.folder / "resume.safetensors").unlink(missing_ok=True)


def train_run(
    settings: RunSettings,
    folder: Path,
    *,
    device: str | None = None,
    progress: TrainProgress | None = None,
    on_ready: Callable[[Method, list[Item]], None] = lambda _method, _items: None,
    backbone: Backbone | None = None,
) -> TrainResult:
    """Train into `folder`, or go on where it stopped, or find that it has finished.

    The result depends on the settings and the images alone: not on interruptions, on the number of processes at the
    same global batch (but for rounding), nor on `workers`.

    Args:
        on_ready: called with the method and its training items before the first step.
        backbone: the backbone of the settings, if it is loaded already.

    Raises:
        ConfigError: the folder belongs to a run with other settings, or another process is training in it.
        MapleError: whatever is wrong with the settings, the data or the backbone.
    """
    settings = complete(settings)
    if (kept := kept_result(settings, folder)) is not None:
        return kept
    processes, progress = this_process(device), progress or Silent()
    run = Run(settings, folder, processes, backbone)
    with only_one(folder) if processes.is_main else nullcontext():
        # It may have been finished by a process that was at it until now.
        if processes.is_main and (kept := kept_result(settings, folder)) is not None:
            return kept
        run.begin()
        on_ready(run.method, run.items)
        progress.start(settings.train.epochs, run.steps, run.trainer.epoch)
        while not run.trainer.finished:
            report = run.trainer.run_epoch(run.batches(), progress.step)
            run.keep()
            progress.epoch(report)
        run.finish()
    processes.wait()
    return TrainResult(folder, tuple(run.trainer.history))


def kept_result(settings: RunSettings, folder: Path) -> TrainResult | None:
    """What a finished run has left in `folder`; None where there is something to do.

    Raises:
        ConfigError: the folder belongs to a run with other settings.
    """
    refuse_other_run(settings, folder)
    if not (folder / "prompts.safetensors").exists():
        return None
    # A process that was killed between its last two steps left these.
    (folder / "resume.safetensors").unlink(missing_ok=True)
    return TrainResult(folder, tuple(read_history(folder)), was_finished=True)


def fresh_method(settings: RunSettings, backbone: Backbone, class_names: Sequence[str]) -> Method:
    """The method of a run before its first step: prompts drawn from the run's seed.

    Raises:
        ConfigError, ClassNamesError, UnsupportedTowerError: as `build_method`.
    """
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "prompts"))
    return build_method(settings.method, backbone, class_names, generator=generator)


def _resume(trainer: Trainer, folder: Path, identity: dict[str, Any]) -> None:
    path = folder / "resume.safetensors"
    if not path.exists():
        return
    again = f"remove {folder} to start again"
    try:
        tensors, content = read_tensors(path)
        stored, values = dict(content["identity"]), dict(content["trainer"])
    except CheckpointError as error:
        raise CheckpointError(f"the run cannot be resumed: {error}; {again}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the run cannot be resumed: {path} lacks a part of its metadata ({error}); {again}"
        ) from error
    now = json.loads(json.dumps(identity))
    if differing := [what for what in _IDENTITY if stored.get(what) != now[what]]:
        told = "; ".join(f"{_IDENTITY[what]}: {stored.get(what)} there, {now[what]} now" for what in differing)
        raise CheckpointError(
            f"{path} was written by a run with other {told}. Restore what it was trained on, or {again}"
        )
    try:
        trainer.restore(tensors, values)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the run cannot be resumed: {path} is damaged ({error}); {again}") from error
