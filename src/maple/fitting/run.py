"""`fit`: somebody's own images in; a trained run, its comparison with zero-shot CLIP, and a page out.

Nothing here is new: the images are looked at by `maple.data`, trained and evaluated as runs, told by `maple.report`.
What it leaves in the run folder beside the files of a run:

data.json     what was found in the images, and what was done about it
images.json   the images that were used, with their division
zero_shot/    the run of the frozen CLIP that it is compared with
report.html   the page
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from maple import files
from maple.checkpoint import load_prompts
from maple.clip import Backbone
from maple.config import RunSettings, read_preset, resolve
from maple.data import (
    SAVED_SPLIT,
    Dataset,
    Inspection,
    Item,
    check_source,
    hold_out,
    inspect_dataset,
    open_source,
    read_saved_split,
    saved_split_hash,
    template_of,
    write_saved_split,
)
from maple.data.folders.class_folders import split_domain
from maple.distributed import this_process
from maple.errors import BackboneDownloadError, ConfigError
from maple.fitting.result import FitResult, result_of
from maple.fitting.state import FORMAT, FOUND, is_evaluated, is_finished, load_previous
from maple.methods import ZERO_SHOT, Method, method_settings
from maple.report import ThumbnailLoader
from maple.runs import (
    Silent,
    TrainProgress,
    complete,
    content_name,
    evaluate_run,
    finished_prompts,
    fresh_method,
    open_backbone,
    refuse_other_run,
    relevant,
    train_run,
)
from maple.sweeps.plan import recipe_of

VALIDATION_FRACTION = 0.25
"""Of the training images of each class, for methods that choose a setting on validation images."""

_LONGEST_NAME = 150


class FitProgress(TrainProgress, Protocol):
    """What watches a fit, beside its training."""

    def looked(self, done: int, total: int) -> None:
        """So many images were looked at."""

    def inspected(self, lines: Sequence[str]) -> None:
        """This was found in them."""

    def ready(self, method: Method, items: list[Item]) -> None:
        """Training is about to begin with this."""

    def evaluated(self, what: str, done: int, total: int) -> None:
        """So many held-out images were answered by the method, or by zero-shot CLIP."""


class SilentFit(Silent):
    """A progress that shows nothing."""

    def looked(self, done: int, total: int) -> None:
        """Show nothing."""

    def inspected(self, lines: Sequence[str]) -> None:
        """Show nothing."""

    def ready(self, method: Method, items: list[Item]) -> None:
        """Show nothing."""

    def evaluated(self, what: str, done: int, total: int) -> None:
        """Show nothing."""


def fit_settings(
    source: str,
    method: str = "maple",
    *,
    layer: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> RunSettings:
    """The settings of a fit: the method's recipe for a few images of all classes, on the images of `source`.

    Args:
        source: a folder of class-named folders, FOLDER:DOMAIN, a .csv or .jsonl file, or a data set's name.
        method: one of `maple methods`, or a preset's first part.
        layer: settings by section, laid over the recipe.
        overrides: `section.key=value`, laid over all.

    Raises:
        ConfigError: unknown method or setting, or a value out of range.
    """
    data = {"data": {"dataset": _where_it_was(source)}}
    return complete(resolve([read_preset(recipe_of(method, "few-shot")), dict(layer or {}), data], overrides))


def _where_it_was(source: str) -> str:
    """A place that is gone, told as it was while it was there, so that the fit of its images is found."""
    place = os.path.expanduser(source)
    if template_of(source) is not None or not source.strip() or "\0" in source or os.path.exists(place):
        return source
    return os.path.realpath(place)


def fit_folder(settings: RunSettings) -> Path:
    """The folder of a fit that names none: the same for the same settings."""
    name = content_name(settings).encode()[-_LONGEST_NAME:].decode(errors="ignore")
    return Path("runs") / f"fit_{name}"


def inspect_source(
    source: str,
    root: str | None = None,
    *,
    class_names: Mapping[str, str] | None = None,
    seed: int = 1,
    on_images: Callable[[int, int], None] = lambda _done, _total: None,
) -> Inspection:
    """Look at somebody's images, all of them; write nothing.

    Raises:
        DataError: no such images, or not enough to train on.
    """
    dataset, remarks = open_source(source, _path(root), class_names=class_names, seed=seed)
    return inspect_dataset(dataset, remarks=remarks, keep_classes=bool(split_domain(source)), on_images=on_images)


def fit(
    settings: RunSettings,
    folder: Path,
    *,
    device: str | None = None,
    progress: FitProgress | None = None,
    load_thumbnail: ThumbnailLoader | None = None,
) -> FitResult:
    """Look at the images, train on some, compare with zero-shot CLIP on others; or go on where it stopped.

    A finished fit is not repeated; an interrupted one goes on, with the images that it found at first.

    Args:
        settings: of `fit_settings`.
        load_thumbnail: gives the images of the page.

    Raises:
        ConfigError: the folder belongs to something else.
        MapleError: whatever is wrong with the settings, the images or the backbone.
    """
    settings, progress = complete(settings), progress or SilentFit()
    found = load_previous(settings, folder)
    if found is not None and is_finished(settings, folder):
        return result_of(folder, tuple(found["lines"]), load_thumbnail, was_finished=True)
    backbone: Backbone | None = None
    if found is None:
        refuse_other_run(settings, folder)
        if any((folder / name).exists() for name in ("prompts.safetensors", "resume.safetensors")):
            raise ConfigError(f"{folder} holds a run that `maple fit` did not make; choose another --output")
        check_source(settings.data.dataset)
        backbone, found = _inspect(settings, folder, device, progress)
    listed = read_saved_split(folder / SAVED_SPLIT, look=False)
    settings = settings.changed(data=settings.data.changed(listing=saved_split_hash(listed)))
    progress.inspected(found["lines"])
    backbone = backbone or _backbone(settings, device)
    train_run(settings, folder, device=device, progress=progress, on_ready=progress.ready, backbone=backbone)
    test = listed.test
    if test:
        _evaluate(folder, settings, backbone, device, test, progress)
    if test and settings.method["name"] != ZERO_SHOT:
        rival = _zero_shot(settings)
        write_saved_split(folder / ZERO_SHOT / SAVED_SPLIT, listed, settings.data.dataset)
        train_run(rival, folder / ZERO_SHOT, device=device, backbone=backbone)
        _evaluate(folder / ZERO_SHOT, rival, backbone, device, test, progress)
    return result_of(folder, tuple(found["lines"]), load_thumbnail)


def _inspect(
    settings: RunSettings, folder: Path, device: str | None, progress: FitProgress
) -> tuple[Backbone, dict[str, Any]]:
    """Look at the images, and keep what was found; what can fail at once does so before that."""
    data = settings.data
    dataset, remarks = open_source(data.dataset, _path(data.root), class_names=data.class_names, seed=settings.seed)
    backbone = _backbone(settings, device)
    fresh_method(settings, backbone, dataset.class_names)
    _make(folder)
    inspection = inspect_dataset(
        dataset, remarks=remarks, keep_classes=bool(split_domain(data.dataset)), on_images=progress.looked
    )
    inspection = replace(inspection, dataset=_with_validation(settings, inspection.dataset))
    found = {
        "format": FORMAT,
        "request": json.loads(json.dumps(relevant(settings))),
        **inspection.as_json(),
        "lines": inspection.lines(),
    }
    write_saved_split(folder / SAVED_SPLIT, inspection.dataset, data.dataset)
    files.write_json(folder / FOUND, found)
    return backbone, found


def _backbone(settings: RunSettings, device: str | None) -> Backbone:
    try:
        return open_backbone(settings, this_process(device).device)
    except BackboneDownloadError as error:
        raise BackboneDownloadError(
            f"{error}. To try the command without any download: --backbone maple-small (packaged; small pictures, has "
            "seen drawings only)"
        ) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made ({error.strerror}); choose another --output") from error


def _with_validation(settings: RunSettings, dataset: Dataset) -> Dataset:
    """With validation images, if the method needs them and there are none."""
    if dataset.val or not method_settings(settings.method)[1].needs_validation:
        return dataset
    train, val = hold_out(dataset.train, VALIDATION_FRACTION, settings.seed)
    return replace(dataset, train=tuple(train), val=tuple(val))


def _zero_shot(settings: RunSettings) -> RunSettings:
    """The same question to the frozen CLIP."""
    rest = settings.model_dump(include={"backbone", "data", "seed", "evaluate"})
    return complete(resolve([read_preset(f"{ZERO_SHOT}_base-to-novel"), rest]))


def _evaluate(
    run: Path,
    settings: RunSettings,
    backbone: Backbone,
    device: str | None,
    test: Sequence[Item],
    progress: FitProgress,
) -> None:
    """Evaluate a run on the held-out images, unless that is done."""
    if is_evaluated(run, test):
        return
    method = load_prompts(finished_prompts(run), backbone)
    name = settings.method["name"]
    evaluate_run(run, device=device, method=method, on_images=lambda done, total: progress.evaluated(name, done, total))


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()
