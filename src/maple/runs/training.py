"""Train runs: settings in, a run folder out."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from maple import files
from maple.checkpoint import describe_backbone, put_parameters, read_tensors, save_prompts
from maple.clip import Backbone
from maple.config import RunSettings
from maple.data import ImageStore, Item
from maple.data.batches import derive_seed
from maple.data.catalogue import template_of
from maple.data.images.store import STORE_BYTES
from maple.data.records import items_hash
from maple.data.saved_split import SAVED_SPLIT, write_saved_split
from maple.distributed import Processes, this_process
from maple.errors import CheckpointError, ConfigError, MapleError, output_error
from maple.methods import Method, build_method, method_settings
from maple.runs.calibration import calibrate
from maple.runs.folder import lock_folder, read_history, refuse_other_run, write_beginning, write_epoch, write_history
from maple.runs.spec import (
    absolute_backbone,
    complete,
    eval_transform,
    joint_training_key,
    open_backbone,
    open_dataset,
    open_store,
    relevant,
    sample,
    spare_items,
    training_transform,
    warn_if_images_changed,
)
from maple.runs.trained_images import write_trained_images
from maple.runs.training_data import TrainingData
from maple.train import EpochReport, StepReport, Trainer, run_epochs

logger = logging.getLogger(__name__)

# What must be the same for a run to be resumed, and what messages call it.
_IDENTITY = {
    "items": "training images (hash)",
    "features": "features (hash)",
    "validation": "validation images (hash)",
    "backbone": "backbone",
    "settings": "settings",
}


class TrainProgress:
    """Receives the progress of a training run. Override the methods that you need; these do nothing.

    Example:
        >>> class Printing(TrainProgress):
        ...     def epoch(self, report):
        ...         print(report.loss)
    """

    def start(self, epochs: int, steps: int, finished_epochs: int) -> None:
        """Training starts or is resumed: how many epochs, of how many steps each, and how many are finished."""

    def step(self, report: StepReport) -> None:
        """A step was made."""

    def epoch(self, report: EpochReport) -> None:
        """An epoch is finished, and safe on the disk if the run has a folder."""


@dataclass(frozen=True)
class TrainResult:
    """The result of `train_run`: the folder, the epochs, and whether the run had been finished before.

    Example:
        >>> train_run(settings, Path("runs/first")).history[-1].loss
    """

    folder: Path
    history: tuple[EpochReport, ...]
    was_finished: bool = False


def train_run(
    settings: RunSettings,
    folder: Path,
    *,
    device: str | None = None,
    progress: TrainProgress | None = None,
    on_ready: Callable[[Method, list[Item]], None] = lambda _method, _items: None,
    backbone: Backbone | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train into `folder`, resume there, or return the result of a run that has finished.

    The result depends on the settings and the images alone: not on interruptions, nor on `workers`; but for rounding,
    not on the number of processes at the same global batch, nor of threads (`torch.get_num_threads`).

    Args:
        on_ready: called with the method and its training items before the first step.
        backbone: the backbone of the settings, if it is loaded already.
        calibration: with `train.calibrate`, the calibration (see `maple.runs.calibration.calibrate`), if it is known
            already.

    Raises:
        ConfigError: the folder belongs to a run with other settings, or another process is training in it.
        MapleError: the settings, the data or the backbone cannot be used, or training diverged.

    Example:
        >>> settings = resolve([read_preset("maple_few-shot"), {"data": {"dataset": "photos", "shots": 4}}])
        >>> train_run(settings, Path("runs") / content_name(settings)).history[-1].loss
        0.4217
    """
    # Before a device is opened, or a group of processes joined.
    if (finished := _finished_result(complete(settings), folder)) is not None:
        return finished
    progress = progress or TrainProgress()
    (result,) = _train([(settings, folder)], [progress], this_process(device), backbone, on_ready, calibration)
    if isinstance(result, MapleError):
        raise result
    return result


def train_together(
    runs: Sequence[tuple[RunSettings, Path]],
    *,
    device: str | None = None,
    progress: Sequence[TrainProgress] | None = None,
    backbone: Backbone | None = None,
) -> list[TrainResult | MapleError]:
    """Train each run into its folder as `train_run` would, all of them at once; they may be in different epochs.

    Each gets the result that it gets alone, but for rounding, and its folder can be resumed alone or with others. A run
    that cannot start or continue (it diverges, an image is damaged, another process is training it) gives its error in
    place of a result; the others continue.

    Args:
        runs: settings that differ in the seed, the learning rate and the weight decay alone, and their folders.

    Raises:
        ConfigError: the settings differ in more, two runs share a folder, or several processes train one run.

    Example:
        >>> train_together([(settings.changed(seed=seed), Path(f"runs/seed{seed}")) for seed in (1, 2, 3)])
        [TrainResult(...), TrainResult(...), TrainResult(...)]
    """
    if len({joint_training_key(settings) for settings, _ in runs}) > 1:
        raise ConfigError(
            "runs that train together may differ in seed, train.lr and train.weight_decay, and these differ in more; "
            "train them one after the other"
        )
    folders = [folder.resolve() for _, folder in runs]
    if shared := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ConfigError(f"two of the runs share the folder {shared}; give each its own folder")
    processes = this_process(device)
    if processes.count > 1:
        raise ConfigError(
            f"runs train together in one process, and this is one of {processes.count}; train them one after the other"
        )
    return _train(runs, progress or [TrainProgress() for _ in runs], processes, backbone)


def _train(
    runs: Sequence[tuple[RunSettings, Path]],
    progress: Sequence[TrainProgress],
    processes: Processes,
    backbone: Backbone | None,
    on_ready: Callable[[Method, list[Item]], None] = lambda _method, _items: None,
    calibration: Mapping[str, Any] | None = None,
) -> list[TrainResult | MapleError]:
    results: dict[int, TrainResult | MapleError] = {}
    active: dict[int, _TrainingRun] = {}
    stores: dict[tuple[Path, Callable[[str], Image.Image] | None], ImageStore] = {}
    with ExitStack() as locks:
        for number, (settings, folder) in enumerate(runs):
            settings = complete(settings)
            try:
                with processes.failing_together():
                    finished = _finished_result(settings, folder)
                    if finished is None:
                        run = _TrainingRun(settings, folder, processes, backbone, calibration)
                        backbone = run.method.backbone  # the same for the others
                        if processes.is_main:
                            locks.enter_context(lock_folder(folder))
                            finished = _finished_result(settings, folder)  # by the process that held the lock until now
                    if finished is not None:
                        results[number] = finished
                        continue
                    # The runs see the same images: each is decoded once.
                    store = open_store(
                        settings, run.dataset, training_transform(settings, run.method.backbone), STORE_BYTES
                    )
                    run.begin(stores.setdefault((run.dataset.root, run.dataset.read), store))
            except MapleError as error:
                results[number] = error
            else:
                active[number] = run
        for number, run in active.items():
            on_ready(run.method, run.items)
            progress[number].start(run.trainer.epochs, run.data.steps, run.trainer.epoch)
        while active:
            for number, run in list(active.items()):
                if run.trainer.finished:
                    del active[number]
                    try:
                        run.finish()
                        results[number] = TrainResult(run.folder, tuple(run.trainer.history))
                    except MapleError as error:
                        results[number] = error
            parts = [(run.trainer, run.data.batches(run.trainer), progress[n].step) for n, run in active.items()]
            for (number, run), report in zip(list(active.items()), run_epochs(parts), strict=True):
                if isinstance(report, MapleError):
                    results[number] = report
                    del active[number]
                    continue
                try:
                    with processes.failing_together():
                        if processes.is_main:
                            report = run.data.validate(run.trainer)
                except MapleError as error:
                    results[number] = error
                    del active[number]
                    continue
                if processes.is_main:
                    write_epoch(run.trainer, run.folder, run.identity)
                progress[number].epoch(report)
    processes.wait()
    return [results[number] for number in range(len(runs))]


class _TrainingRun:
    """A run on its way from settings to a prompts file: its data, its method, its trainer and its folder.

    Until `begin` nothing is written; from then on its folder must be locked (`lock_folder`).
    """

    trainer: Trainer
    data: TrainingData

    def __init__(
        self,
        settings: RunSettings,
        folder: Path,
        processes: Processes,
        backbone: Backbone | None,
        calibration: Mapping[str, Any] | None,
    ) -> None:
        """Open the data set and build the method; `settings` are complete."""
        self.settings, self.folder, self._processes, self._calibration = settings, folder, processes, calibration
        self.dataset = open_dataset(settings, folder)
        self.items, self._val, class_names = sample(settings, self.dataset)
        keeps_best = settings.train.keep == "best"
        self._spare = spare_items(settings, self.dataset, self.items, self._val) if keeps_best else []
        # After the data set, whose errors need no download.
        stored = (folder / "config.json").exists()
        backbone = backbone or open_backbone(settings, processes.device, is_stored=stored)
        self.method = fresh_method(settings, backbone, class_names)
        self.identity = {
            "items": items_hash(self.items),
            "features": self.dataset.content_hash([*self.items, *self._val, *self._spare]),
            "backbone": describe_backbone(backbone),
            "settings": relevant(settings),
        }
        if keeps_best:
            self.identity["validation"] = items_hash(self._spare)

    def begin(self, store: ImageStore) -> None:
        """Make a trainer, restore the state that the folder has, and make the folder a run."""
        self.data = TrainingData(self.settings, self.items, store, self._val, self._spare)
        self.data.fit_features(self.method)
        self.trainer = Trainer(
            self.method,
            self.data.train,
            self._processes,
            seed=self.settings.seed,
            steps_per_epoch=self.data.steps,
        )
        self.data.require_spare(self.trainer)
        path = self.folder / "resume.safetensors"
        if path.exists():
            self._resume(path)
        if self._processes.is_main:
            chosen_on = self._val if method_settings(self.settings.method)[1].needs_validation else []
            images = {item.path: item for item in (*self.items, *chosen_on, *self._spare)}
            write_trained_images(self.folder, self.dataset, images.values())
            if self.settings.data.listing is None and template_of(self.settings.data.dataset) is None:
                write_saved_split(self.folder / SAVED_SPLIT, self.dataset, self.settings.data.dataset)
            write_beginning(self.folder, self.settings, self.items)

    def finish(self) -> None:
        """Write the prompts: the run has finished."""
        if not self._processes.is_main:
            return
        trainer, settings = self.trainer, self.settings
        trainer.load_best()
        self.data.select_hyperparameters(self.method)
        if trainer.history:
            write_history(trainer, self.folder)  # the last report may be missing after a crash
        info = {
            "dataset": self.dataset.name,
            "data": settings.data.model_dump(mode="json", exclude={"root"}),
            "seed": settings.seed,
            "items": self.identity["items"],
            "train": {"epochs": trainer.epoch, "loss": trainer.history[-1].loss if trainer.history else None},
        }
        if selected := trainer.method.selected_hyperparameters():
            info["chosen"] = selected
        if trainer.best is not None:
            info["kept"] = {**trainer.best.as_json(), "epochs": trainer.epoch}
        if settings.train.calibrate:
            if (calibration := self._calibration) is None:
                # A method that learns nothing has no training images.
                trained = self.items if trainer.method.saved_tensors() else ()
                items = spare_items(settings, self.dataset, trained, self._val)
                store = open_store(settings, self.dataset, eval_transform(trainer.method.backbone))
                calibration = calibrate(trainer.method, items, store, settings)
            trainer.method.temperature = calibration["temperature"]
            info["calibration"] = dict(calibration)
        save_prompts(self.folder / "prompts.safetensors", trainer.method, info)
        (self.folder / "resume.safetensors").unlink(missing_ok=True)

    def _resume(self, path: Path) -> None:
        advice = f"remove {self.folder} to start again"
        try:
            tensors, content = read_tensors(path)
            stored, values = dict(content["identity"]), dict(content["trainer"])
            settings = dict(stored["settings"])
            stored["settings"] = {**settings, "backbone": absolute_backbone(settings["backbone"])}
            stored["backbone"] = absolute_backbone(stored["backbone"])
        except CheckpointError as error:
            raise CheckpointError(f"the run cannot be resumed: {error}; {advice}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            problem = f"the run cannot be resumed: {path} lacks a part of its metadata ({error})"
            raise CheckpointError(f"{problem}; {advice}") from error
        current = json.loads(json.dumps(self.identity))  # as it would be read again: tuples are lists
        if "activation" not in stored["backbone"]:  # of an earlier version
            del current["backbone"]["activation"]
        if differing := [key for key in _IDENTITY if stored.get(key) != current.get(key)]:
            details = "; ".join(
                f"{_IDENTITY[key]}: {stored.get(key)} there, {current.get(key)} now" for key in differing
            )
            raise CheckpointError(
                f"{path} was written by a run with other {details}. Restore what it was trained on, or {advice}"
            )
        threads, before = torch.get_num_threads(), 0
        with suppress(CheckpointError):  # the run can be resumed without it
            before = files.read_json(self.folder / "environment.json").get("threads")
        if self._processes.device.type == "cpu" and isinstance(before, int) and before not in (0, threads):
            logger.warning(
                "%s was trained with %s threads until now, and is resumed with %d: the result is the same but for "
                "rounding; for the same bytes, resume it with OMP_NUM_THREADS=%s",
                *(self.folder, before, threads, before),
            )
        try:
            self.trainer.restore(tensors, values)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the run cannot be resumed: {path} is damaged ({error}); {advice}") from error


def _finished_result(settings: RunSettings, folder: Path) -> TrainResult | None:
    """The result of a run that has finished in `folder`; None if there is something to do."""
    refuse_other_run(settings, folder)
    if not (folder / "prompts.safetensors").exists():
        return None
    # A process that was killed between the last two steps of `finish` left this file; on a read-only disk it stays.
    with suppress(OSError):
        (folder / "resume.safetensors").unlink(missing_ok=True)
    if settings.data.listing is None:  # a run of a fit, which looks at the images of all its runs
        warn_if_images_changed(settings, folder)
    return TrainResult(folder, tuple(read_history(folder)), was_finished=True)


def fresh_method(settings: RunSettings, backbone: Backbone, class_names: Sequence[str]) -> Method:
    """The method of a run before its first step: prompts drawn from the run's seed. Raises as `build_method`."""
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "prompts"))
    return build_method(settings.method, backbone, class_names, generator=generator)


def write_imported(
    settings: RunSettings,
    parameters: Mapping[str, Tensor],
    class_names: Sequence[str],
    folder: Path,
    *,
    info: Mapping[str, Any],
) -> Method:
    """Put `parameters` on the run's backbone and write a finished run, if every parameter fits, for `maple evaluate`.

    Raises:
        ConfigError: the folder exists already, or the settings do not fit the backbone.
        CheckpointError: a parameter is missing, unknown, or of another shape (another backbone's width, say).
    """
    if (folder / "config.json").exists():
        raise output_error(f"{folder} is already a run")
    settings = complete(settings)
    backbone = open_backbone(settings, "cpu")
    method = build_method(settings.method, backbone, class_names)
    put_parameters(method, parameters, source=f"the imported checkpoint on {backbone.name}")
    with lock_folder(folder):
        if (folder / "config.json").exists():  # written by another process since
            raise output_error(f"{folder} is already a run")
        save_prompts(folder / "prompts.safetensors", method, info)
        files.write_json(folder / "config.json", settings.model_dump(mode="json"))
    return method
