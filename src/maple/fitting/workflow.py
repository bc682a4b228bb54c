"""`fit`: inspect a user's images, train a run, compare it with zero-shot CLIP, and write a page.

The images are inspected by `maple.data`, trained and evaluated as runs, and reported by `maple.report`. In addition to
the files of a run, the folder contains:

data.json     the findings of the inspection, and how they were handled
images.json   the images that are used, and their split
zero_shot/    the run of zero-shot CLIP
report.html   the page

and, where the method is chosen, selection.json: the plan and the scores of the methods tried
"""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from maple.checkpoint import load_prompts
from maple.clip import Backbone
from maple.config import RunSettings, merge_layers, override_layer, read_preset, resolve
from maple.data import Dataset, Inspection, Item, inspect_dataset, open_source, template_of
from maple.data.checks.findings import Finding
from maple.data.checks.open_source import check_source
from maple.data.folders.class_folders import split_domain
from maple.data.records import SPLIT_NAMES
from maple.data.saved_split import (
    SAVED_SPLIT,
    read_saved_images,
    read_saved_split,
    saved_split_hash,
    write_saved_split,
)
from maple.data.sources.opening import absolute_source
from maple.data.sources.rows import Columns
from maple.descriptions import DEFAULT_METHOD
from maple.distributed import this_process
from maple.errors import BackboneDownloadError, ConfigError
from maple.fitting.python_data import keep_data
from maple.fitting.stored_fit import (
    NO_TEXT,
    SELECTION,
    TRIALS,
    FitResult,
    build_result,
    fit_request,
    is_evaluated,
    is_finished,
    load_previous,
    write_inspection,
)
from maple.methods import ZERO_SHOT, Method
from maple.names import absolute_features, is_features
from maple.report import ThumbnailLoader
from maple.runs import Tracked, TrainProgress, complete, content_name, evaluate_run, finished_prompts, train_run
from maple.runs.cross_calibration import cross_calibrate
from maple.runs.folder import lock_folder, read_settings, refuse_other_run
from maple.runs.selection import AUTO, CANDIDATES, read_selection, select, trial_name
from maple.runs.selection_plan import SelectionSettings, make_fold, require_choice, with_validation
from maple.runs.spec import columns_of, folder_name, open_backbone, warn_if_images_changed
from maple.runs.training import fresh_method
from maple.sweeps.plan import recipe_of

logger = logging.getLogger(__name__)

_LONGEST_NAME = 150


class FitProgress(TrainProgress):
    """Follows a fit and its training. Override what you need; the methods do nothing by default.

    Example::

        class Print(FitProgress):
            def inspected(self, findings):
                print(*findings, sep="\\n")

        fit(settings, folder, progress=Print())
    """

    def inspecting(self, done: int, total: int) -> None:
        """`done` of `total` images have been inspected."""

    def inspected(self, findings: Sequence[str]) -> None:
        """All images have been inspected, with these findings."""

    def trying(self, title: str, done: int, total: int) -> None:
        """A method is about to be trained and scored; `done` of `total` trials have been finished."""

    def ready(self, method: Method, items: list[Item]) -> None:
        """The method is about to be trained on these images."""

    def evaluating(self, method: str, done: int, total: int) -> None:
        """The method, or zero-shot CLIP, has classified `done` of `total` held-out images."""


def fit_settings(
    source: Any,
    method: str = DEFAULT_METHOD,
    *,
    preset: str | None = None,
    layer: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> RunSettings:
    """Return the settings of a fit: the few-shot preset of the method, with all classes of `source`, and calibrated.

    Args:
        source: a folder of class-named folders, FOLDER:DOMAIN, a .csv or .jsonl file, a Parquet file, an archive or
            another source of `maple.data.load_dataset`, the name of a data set, or .safetensors files of features,
            separated by commas. Or a data set in memory: a `datasets.Dataset` or `DatasetDict`, one of torchvision, or
            a frame; its images are kept in the cache (`keep_data`), whose folder is then the source.
        method: one of `maple methods`, or the first part of a preset name.
        preset: another preset, or a TOML file, in place of the method's.
        layer: settings by section that override the preset.
        overrides: `section.key=value` settings that override all others.

    Raises:
        ConfigError: an unknown method or setting, or a value out of range.

    Example:
        >>> fit_settings("flowers", "coop", layer={"data": {"shots": 4}}).data.shots
        4
    """
    source = _name_of(source, layer, overrides)
    path = os.path.expanduser(source)
    if is_features(source):
        source = absolute_features(source)
    # A source that no longer exists is resolved as it was while it existed, so that the fit of its images is found.
    elif (
        template_of(source) is None
        and source.strip()
        and "\0" not in source
        and not os.path.exists(path)
        and absolute_source(source) is None
    ):
        source = os.path.realpath(path)
    data = {"data": {"dataset": source}}
    recipe = preset or recipe_of(method, "few-shot")
    calibrated = {"train": {"calibrate": True}}
    settings = resolve([read_preset(recipe), calibrated, dict(layer or {}), data], overrides)
    return complete(settings).changed(backbone=settings.backbone)  # as it is written, for the name of the folder


def _name_of(source: Any, layer: Mapping[str, Any] | None, overrides: Sequence[str]) -> str:
    """The text that names a source; of a data set in memory, the folder of the cache where its images are kept."""
    if isinstance(source, str | Path):
        return str(source)
    data = merge_layers(layer or {}, override_layer(overrides)).get("data", {})
    return str(keep_data(source, Columns(data.get("image_column"), data.get("label_column"))))


def fit_candidates(
    source: Any,
    recipes: Sequence[str] = CANDIDATES,
    *,
    layer: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, RunSettings]:
    """Return the settings of each recipe, among which `fit` then chooses; arguments as for `fit_settings`.

    Raises:
        ConfigError: also for settings of a method, which the others do not have, and for no or repeated recipes.

    Example:
        >>> fit(fit_candidates("flowers", ["zero_shot", "maple"]), Path("runs/flowers"))
    """
    if not recipes or len(set(recipes)) < len(recipes):
        raise ConfigError(f"the methods to compare are {', '.join(recipes) or 'none'}; name each once")
    source = _name_of(source, layer, overrides)
    given = merge_layers(dict(layer or {}), override_layer(overrides))
    if "method" in given:
        raise ConfigError("settings of a method need one method; name it, as in method=NAME")
    return {recipe: fit_settings(source, recipe, layer=layer, overrides=overrides) for recipe in recipes}


def fit_folder(
    settings: RunSettings | Mapping[str, RunSettings],
    selection: SelectionSettings | None = None,
    *,
    keep_near_copies: bool = False,
) -> Path:
    """Return the default folder of a fit; equal arguments of `fit` have the same folder.

    Example:
        >>> result = fit(settings, fit_folder(settings))
    """
    if isinstance(settings, RunSettings):
        # Fits made before they were calibrated keep their names.
        name = content_name(settings.changed(train=settings.train.changed(calibrate=False)))
        name += "" if settings.train.calibrate else "_uncalibrated"
        name += "_near-copies" if keep_near_copies else ""
    else:
        request = fit_request(settings, selection or SelectionSettings(), keep_near_copies)
        name = folder_name(complete(next(iter(settings.values()))), AUTO, request)
    return Path("runs") / f"fit_{name.encode()[-_LONGEST_NAME:].decode(errors='ignore')}"


def inspect_source(
    source: str,
    root: str | None = None,
    *,
    class_names: Mapping[str, str] | None = None,
    seed: int = 1,
    keep_near_copies: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    on_images: Callable[[int, int], None] = lambda _done, _total: None,
) -> Inspection:
    """Inspect all images of a source; write nothing.

    Raises:
        DataError: there are no such images, or not enough to train on.

    Example:
        >>> print("\\n".join(inspect_source("flowers").lines()))
    """
    folder = None if root is None else Path(root).expanduser()
    columns = {"image_column": image_column, "label_column": label_column}
    dataset, remarks = open_source(source, folder, class_names=class_names, seed=seed, **columns)
    return inspect_dataset(
        dataset,
        remarks=remarks,
        keep_classes=bool(split_domain(source)),
        keep_near_copies=keep_near_copies,
        on_images=on_images,
    )


def fit(
    settings: RunSettings | Mapping[str, RunSettings],
    folder: Path,
    *,
    selection: SelectionSettings | None = None,
    keep_near_copies: bool = False,
    device: str | None = None,
    tracker: str | None = None,
    progress: FitProgress | None = None,
    load_thumbnail: ThumbnailLoader | None = None,
) -> FitResult:
    """Inspect the images, train on some, and compare with zero-shot CLIP on others; or resume an interrupted fit.

    A finished fit is not repeated; an interrupted one is resumed with the images of its first inspection.

    Args:
        settings: of the run; or of several by recipe (`fit_candidates`), of which the best is chosen by
            cross-validation on the training images.
        selection: how the best one is chosen.
        keep_near_copies: as in `maple.data.inspect_dataset`.
        tracker: also log the training, and the evaluation, to an experiment tracker.

    Raises:
        ConfigError: the folder belongs to something else.
        MapleError: an error in the settings, the images or the backbone.

    Example:
        >>> result = fit(fit_candidates("flowers"), Path("runs/flowers"))
        >>> print(result.selection.reason, result.comparison)
    """
    progress = progress or FitProgress()
    if isinstance(settings, RunSettings):
        candidates, selection = {"": complete(settings)}, None
    else:
        candidates = {recipe: complete(candidate) for recipe, candidate in settings.items()}
        selection = selection or SelectionSettings()
    first, *_ = candidates.values()
    request = fit_request(candidates, selection, keep_near_copies)
    previous = load_previous(request, folder)
    if previous is not None and is_finished(folder):
        warn_if_images_changed(first, folder)
        return build_result(folder, previous["lines"], load_thumbnail, was_finished=True)
    if selection is not None and this_process(device).count > 1:
        raise ConfigError("a method is chosen by one process; name one, as in method=NAME, or start one process")
    if previous is not None:
        backbone, findings = _backbone(first, device), previous["lines"]
    else:
        for candidate in candidates.values():
            refuse_other_run(candidate, folder)
        check_source(first.data.dataset)
        backbone, findings = _inspect(candidates, folder, device, progress, request, selection)
    progress.inspected(findings)
    run = first if selection is None else _select(candidates, folder, backbone, selection, device, progress)
    if (folder / "config.json").exists():  # a run that an earlier version began is not calibrated
        run = run.changed(train=run.train.changed(calibrate=read_settings(folder).train.calibrate))
    split = read_saved_split(folder / SAVED_SPLIT, columns=columns_of(first.data))
    run = run.changed(data=run.data.changed(listing=saved_split_hash(split)))
    calibration = None
    if not (folder / "prompts.safetensors").exists():
        # The trials of the choice are used again, if they were trained on the same images: not if some were since
        # held out for validation.
        name, parts = "calibration", 0
        if selection is not None and selection.goal == "trained":
            choice = read_selection(folder / SELECTION)
            trial = folder / TRIALS / trial_name(choice.chosen.recipe, 0)
            first_part = saved_split_hash(make_fold(split, run, "trained", 0).train)
            if (trial / "config.json").exists() and read_settings(trial).data.listing == first_part:
                name, parts = choice.chosen.recipe, choice.folds

        def train_part(number: int, part: Dataset) -> Method:
            return _trial(trial_name(name, number), run, part, folder, backbone, device, TrainProgress())

        with lock_folder(folder) if this_process(device).is_main else nullcontext():
            calibration = cross_calibrate(run, split, train_part, trained_parts=parts)
    with ExitStack() as stack:
        tracked = stack.enter_context(Tracked(tracker, folder, run, progress)) if tracker else None
        options: dict[str, Any] = {"device": device, "backbone": backbone, "calibration": calibration}
        train_run(run, folder, progress=tracked or progress, on_ready=progress.ready, **options)
        shutil.rmtree(folder / TRIALS, ignore_errors=True)
        runs = {folder: run}
        if split.test and run.method["name"] != ZERO_SHOT and backbone.has_text:
            shared = run.model_dump(include={"backbone", "data", "seed", "evaluate"})
            zero_shot = complete(resolve([read_preset(f"{ZERO_SHOT}_base-to-novel"), shared]))
            left_out = read_saved_images(folder / SAVED_SPLIT).left_out
            write_saved_split(folder / ZERO_SHOT / SAVED_SPLIT, split, run.data.dataset, left_out)
            train_run(zero_shot, folder / ZERO_SHOT, device=device, backbone=backbone)
            runs[folder / ZERO_SHOT] = zero_shot
        for place, run_settings in runs.items():
            if split.test and not is_evaluated(place, split.test):
                method, name = load_prompts(finished_prompts(place), backbone), run_settings.method["name"]

                def on_images(done: int, total: int, name: str = name) -> None:
                    progress.evaluating(name, done, total)

                _, row = evaluate_run(place, device=device, method=method, on_images=on_images)
                if tracked and place == folder:
                    tracked.row(row)
    return build_result(folder, findings, load_thumbnail)


def _inspect(
    candidates: Mapping[str, RunSettings],
    folder: Path,
    device: str | None,
    progress: FitProgress,
    request: dict[str, Any],
    selection: SelectionSettings | None,
) -> tuple[Backbone, list[str]]:
    """Inspect the images and keep the findings; the backbone is loaded first, so that errors do not cost an inspection.

    A method that is given gets validation images here, if it selects hyperparameters and the images have none.
    """
    settings, *others = candidates.values()
    data, keep_near_copies = settings.data, "keep_near_copies" in request
    root = None if data.root is None else Path(data.root).expanduser()
    columns = columns_of(data)
    opened, remarks = open_source(data.dataset, root, class_names=data.class_names, seed=settings.seed, **columns)
    backbone = _backbone(settings, device)
    if not others:
        fresh_method(settings, backbone, opened.class_names)
    # Of the processes of a launcher, the first holds the lock; all of them write the same.
    with lock_folder(folder) if this_process(device).is_main else nullcontext():
        # By the process that held the lock until now.
        if (previous := load_previous(request, folder)) is not None:
            return backbone, previous["lines"]
        inspection = inspect_dataset(
            opened,
            remarks=remarks,
            keep_classes=bool(split_domain(data.dataset)),
            keep_near_copies=keep_near_copies,
            on_images=progress.inspecting,
        )
        if selection is not None:
            require_choice(inspection.dataset, settings.seed, selection.goal)
        if not others:
            inspection = replace(inspection, dataset=with_validation(inspection.dataset, settings))
        if not backbone.has_text:
            text = "the files have no text features of the classes: only the linear probe can be trained, and there is "
            lacking = Finding(NO_TEXT, "warning", f"{text}no comparison with zero-shot CLIP")
            inspection = replace(inspection, findings=(*inspection.findings, lacking))
        findings = inspection.lines()
        listed, used = (
            {item.path for split in SPLIT_NAMES for item in getattr(each, split)}
            for each in (opened, inspection.dataset)
        )
        write_saved_split(folder / SAVED_SPLIT, inspection.dataset, data.dataset, listed - used)
        write_inspection(folder, request, inspection.as_json(), findings)
        return backbone, findings


def _select(
    candidates: Mapping[str, RunSettings],
    folder: Path,
    backbone: Backbone,
    selection: SelectionSettings,
    device: str | None,
    progress: FitProgress,
) -> RunSettings:
    """The settings of the best candidate; its validation images, if it needs some, then belong to the saved split."""
    data = next(iter(candidates.values())).data
    if (folder / "config.json").exists():
        return read_settings(folder).changed(data=data)  # chosen by an earlier call

    def train(name: str, settings: RunSettings, part: Dataset) -> Method:
        return _trial(name, settings, part, folder, backbone, device, progress)

    with lock_folder(folder):
        dataset, path = read_saved_split(folder / SAVED_SPLIT, columns=columns_of(data)), folder / SELECTION
        settings, _ = select(candidates, dataset, backbone, train, selection, path=path, on_trial=progress.trying)
        left_out = read_saved_images(folder / SAVED_SPLIT).left_out
        write_saved_split(folder / SAVED_SPLIT, with_validation(dataset, settings), data.dataset, left_out)
        return settings


def _trial(
    name: str,
    settings: RunSettings,
    part: Dataset,
    folder: Path,
    backbone: Backbone,
    device: str | None,
    progress: TrainProgress,
) -> Method:
    """The method of a run on a part of the training images, which is kept in `folder` until the fit is trained."""
    place = folder / TRIALS / name
    if not (place / SAVED_SPLIT).exists():
        write_saved_split(place / SAVED_SPLIT, part, settings.data.dataset)
    data = settings.data.changed(listing=saved_split_hash(part))
    listed = settings.changed(data=data, train=settings.train.changed(calibrate=False))
    train_run(listed, place, device=device, backbone=backbone, progress=progress)
    return load_prompts(finished_prompts(place), backbone)


def _backbone(settings: RunSettings, device: str | None) -> Backbone:
    try:
        return open_backbone(settings, this_process(device).device)
    except BackboneDownloadError as error:
        raise BackboneDownloadError(
            f"{error}. To try it without any download, take the backbone maple-small (included; trained on drawings "
            "only, for small images)"
        ) from error
