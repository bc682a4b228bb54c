"""`train_together`: several runs side by side, each in its own folder, their passes through the CLIP made as one."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from PIL import Image

from maple.clip import Backbone
from maple.config import RunSettings
from maple.data import ImageStore
from maple.distributed import Processes, this_process
from maple.errors import ConfigError, MapleError
from maple.runs.folder import only_one
from maple.runs.spec import complete, open_backbone, relevant
from maple.runs.training import Run, Silent, TrainProgress, TrainResult, kept_result
from maple.train import run_epochs
from maple.train.trainer import Batches


def in_common(settings: RunSettings) -> str:
    """What runs must have in common to train together, as text to compare by.

    Raises:
        ConfigError: a setting of the method is wrong.
    """
    values = relevant(complete(settings))
    del values["seed"], values["train"]["lr"], values["train"]["weight_decay"]
    return json.dumps(values, sort_keys=True)


def train_together(
    runs: Sequence[tuple[RunSettings, Path]],
    *,
    device: str | None = None,
    progress: Sequence[TrainProgress] | None = None,
    backbone: Backbone | None = None,
) -> list[TrainResult | MapleError]:
    """Train each run into its folder as `train_run` would, all of them at once; they may differ in how far they are.

    Each comes to what it comes to alone but for rounding, and its folder can be resumed alone or with others. A run
    that cannot begin, or cannot go on (it diverges, an image is damaged, another process is at it), gives its error in
    place of a result; the others go on.

    Args:
        runs: settings that differ in the seed, the learning rate and the weight decay alone, and their folders.
        progress: what watches each run.
        backbone: the backbone of the settings, if it is loaded already.

    Raises:
        ConfigError: the settings differ in more, two runs share a folder, or several processes train one run.
    """
    _check(runs)
    processes = this_process(device)
    if processes.count > 1:
        raise ConfigError(
            f"runs train together in one process, and this is one of {processes.count}; train them one after the other"
        )
    results: dict[int, TrainResult | MapleError] = {}
    watching = progress or [Silent() for _ in runs]
    with ExitStack() as locks:
        under_way = _begin(runs, processes, backbone, locks, results)
        for number, run in under_way.items():
            watching[number].start(run.settings.train.epochs, run.steps, run.trainer.epoch)
        while _finish(under_way, results):
            parts = [(run.trainer, _lazily(run.batches), watching[number].step) for number, run in under_way.items()]
            for (number, run), report in zip(list(under_way.items()), run_epochs(parts), strict=True):
                if isinstance(report, MapleError):
                    results[number] = report
                    del under_way[number]
                    continue
                run.keep()
                watching[number].epoch(report)
    return [results[number] for number in range(len(runs))]


def _check(runs: Sequence[tuple[RunSettings, Path]]) -> None:
    if len({in_common(settings) for settings, _ in runs}) > 1:
        raise ConfigError(
            "runs that train together may differ in seed, train.lr and train.weight_decay, and these differ in more; "
            "train them one after the other"
        )
    folders = [folder.resolve() for _, folder in runs]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise ConfigError(f"two of the runs share the folder {twice}; give each a folder of its own")


def _begin(
    runs: Sequence[tuple[RunSettings, Path]],
    processes: Processes,
    backbone: Backbone | None,
    locks: ExitStack,
    results: dict[int, TrainResult | MapleError],
) -> dict[int, Run]:
    """The runs that have something left to do, begun, their folders locked; what is known of the others is a result."""
    begun: dict[int, Run] = {}
    stores: dict[tuple[Path, Callable[[str], Image.Image] | None], ImageStore] = {}
    for number, (settings, folder) in enumerate(runs):
        settings = complete(settings)
        try:
            kept = kept_result(settings, folder)
            if kept is None:
                backbone = backbone or open_backbone(settings, processes.device)
                run = Run(settings, folder, processes, backbone)
                locks.enter_context(only_one(folder))
                kept = kept_result(settings, folder)  # by a process that was at it until now
            if kept is None:
                # They see the same images, each decoded once.
                run.begin(stores.setdefault((run.dataset.root, run.dataset.read), run.dataset.store()))
                begun[number] = run
            else:
                results[number] = kept
        except MapleError as error:
            results[number] = error
    return begun


def _finish(under_way: dict[int, Run], results: dict[int, TrainResult | MapleError]) -> bool:
    """Finish the runs whose epochs are done; whether any are left."""
    for number, run in list(under_way.items()):
        if run.trainer.finished:
            del under_way[number]
            try:
                run.finish()
                results[number] = TrainResult(run.folder, tuple(run.trainer.history))
            except MapleError as error:
                results[number] = error
    return bool(under_way)


def _lazily(batches: Callable[[], Batches]) -> Batches:
    """The batches, begun when the first is asked for, so that what goes wrong with them goes wrong with their run."""
    yield from batches()
