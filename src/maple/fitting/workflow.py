"""`fit`: inspect a user's images, train a run, compare it with zero-shot CLIP, and write a page.

The images are inspected by `maple.data`, trained and evaluated as runs, and reported by `maple.report`. In addition to
the files of a run, the folder contains:

data.json     the findings of the inspection, and how they were handled
images.json   the images that are used, and their split
zero_shot/    the run of zero-shot CLIP
report.html   the page
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from maple.checkpoint import load_prompts
from maple.clip import Backbone
from maple.clip.load import sentence_limit
from maple.config import RunSettings, read_preset, resolve
from maple.data import Inspection, Item, hold_out, inspect_dataset, open_source, template_of
from maple.data.checks.open_source import check_source
from maple.data.folders.class_folders import split_domain
from maple.data.records import SPLIT_NAMES
from maple.data.saved_split import SAVED_SPLIT, read_saved_split, saved_split_hash, write_saved_split
from maple.descriptions import DEFAULT_METHOD
from maple.distributed import this_process
from maple.errors import BackboneDownloadError, ClassNamesError, output_error, shortened
from maple.fitting.stored_fit import FitResult, build_result, is_evaluated, is_finished, load_previous, write_inspection
from maple.methods import ZERO_SHOT, Method, method_settings
from maple.names import clean_class_names
from maple.report import ThumbnailLoader
from maple.runs import TrainProgress, complete, content_name, evaluate_run, finished_prompts, train_run
from maple.runs.folder import lock_folder, refuse_other_run
from maple.runs.spec import open_backbone, warn_if_images_changed
from maple.runs.training import fresh_method
from maple.sweeps.plan import recipe_of

logger = logging.getLogger(__name__)

VALIDATION_FRACTION = 0.25
"""Of the training images of each class, for methods that select a hyperparameter on validation images."""

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

    def ready(self, method: Method, items: list[Item]) -> None:
        """The method is about to be trained on these images."""

    def evaluating(self, method: str, done: int, total: int) -> None:
        """The method, or zero-shot CLIP, has classified `done` of `total` held-out images."""


def fit_settings(
    source: str, method: str = DEFAULT_METHOD, *, layer: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> RunSettings:
    """Return the settings of a fit: the few-shot preset of the method, with all classes of `source`.

    Args:
        source: a folder of class-named folders, FOLDER:DOMAIN, a .csv or .jsonl file, or the name of a data set.
        method: one of `maple methods`, or the first part of a preset name.
        layer: settings by section that override the preset.
        overrides: `section.key=value` settings that override all others.

    Raises:
        ConfigError: an unknown method or setting, or a value out of range.

    Example:
        >>> fit_settings("flowers", "coop", layer={"data": {"shots": 4}}).data.shots
        4
    """
    path = os.path.expanduser(source)
    # A source that no longer exists is resolved as it was while it existed, so that the fit of its images is found.
    if template_of(source) is None and source.strip() and "\0" not in source and not os.path.exists(path):
        source = os.path.realpath(path)
    data = {"data": {"dataset": source}}
    settings = resolve([read_preset(recipe_of(method, "few-shot")), dict(layer or {}), data], overrides)
    return complete(settings).changed(backbone=settings.backbone)  # as it is written, for the name of the folder


def fit_folder(settings: RunSettings) -> Path:
    """Return the default folder of a fit; equal settings have the same folder.

    Example:
        >>> result = fit(settings, fit_folder(settings))
    """
    name = content_name(settings).encode()[-_LONGEST_NAME:].decode(errors="ignore")
    return Path("runs") / f"fit_{name}"


def inspect_source(
    source: str,
    root: str | None = None,
    *,
    class_names: Mapping[str, str] | None = None,
    seed: int = 1,
    keep_near_copies: bool = False,
    on_images: Callable[[int, int], None] = lambda _done, _total: None,
) -> Inspection:
    """Inspect all images of a source; write nothing.

    Raises:
        DataError: there are no such images, or not enough to train on.

    Example:
        >>> print("\\n".join(inspect_source("flowers").lines()))
    """
    folder = None if root is None else Path(root).expanduser()
    dataset, remarks = open_source(source, folder, class_names=class_names, seed=seed)
    return inspect_dataset(
        dataset,
        remarks=remarks,
        keep_classes=bool(split_domain(source)),
        keep_near_copies=keep_near_copies,
        on_images=on_images,
    )


def require_readable_names(settings: RunSettings, class_names: Sequence[str]) -> None:
    """Refuse the class names that the CLIP of a fit could not read, without loading it where its size is known.

    Raises:
        ClassNamesError: a sentence is longer than this CLIP reads.
    """
    limit = sentence_limit(settings.backbone.name)
    if limit is None:
        return
    count, most = limit

    def templates(description: Mapping[str, Any]) -> Iterator[str]:
        for value in description.values():
            if isinstance(value, Mapping):
                yield from templates(value)
            texts = [value] if isinstance(value, str) else value if isinstance(value, Sequence) else []
            yield from (text for text in texts if isinstance(text, str) and text.count("{}") == 1)
        length = description.get("prompt_length") or description.get("text_prompt_length")
        if isinstance(length, int):
            # Which of them the sentence begins with depends on the method; no name is refused that it can read.
            words = (description.get("init_text"), " ".join(["X"] * length))
            yield min(filter(None, words), key=count) + " {}."

    name = max(clean_class_names(class_names), key=count)
    for template in (template_of(settings.data.dataset or "") or "a photo of a {}.", *templates(settings.method)):
        sentence = template.replace("{}", name)
        if count(sentence) > most:
            raise ClassNamesError(
                f"{shortened(sentence)!r} needs {count(sentence)} tokens, but this CLIP reads at most {most}; shorten "
                "the class name (--class-names names.json gives other words), the template, or the prompt"
            )


def fit(
    settings: RunSettings,
    folder: Path,
    *,
    keep_near_copies: bool = False,
    device: str | None = None,
    progress: FitProgress | None = None,
    load_thumbnail: ThumbnailLoader | None = None,
) -> FitResult:
    """Inspect the images, train on some, and compare with zero-shot CLIP on others; or resume an interrupted fit.

    A finished fit is not repeated; an interrupted one is resumed with the images of its first inspection.
    `keep_near_copies` is that of `maple.data.inspect_dataset`.

    Raises:
        ConfigError: the folder belongs to something else.
        MapleError: an error in the settings, the images or the backbone.

    Example:
        >>> result = fit(fit_settings("flowers"), Path("runs/flowers"))
        >>> print(result.comparison)
    """
    settings, progress = complete(settings), progress or FitProgress()
    previous = load_previous(settings, folder, keep_near_copies)
    if previous is not None and is_finished(settings, folder):
        warn_if_images_changed(settings, folder)
        return build_result(folder, previous["lines"], load_thumbnail, was_finished=True)
    if previous is not None:
        backbone, findings = _backbone(settings, device), previous["lines"]
    else:
        refuse_other_run(settings, folder)
        if any((folder / name).exists() for name in ("prompts.safetensors", "resume.safetensors")):
            raise output_error(f"{folder} holds a run that `maple fit` did not make")
        check_source(settings.data.dataset)
        backbone, findings = _inspect(settings, folder, device, progress, keep_near_copies)
    split = read_saved_split(folder / SAVED_SPLIT, look=False)
    settings = settings.changed(data=settings.data.changed(listing=saved_split_hash(split)))
    progress.inspected(findings)
    train_run(settings, folder, device=device, progress=progress, on_ready=progress.ready, backbone=backbone)
    runs = {folder: settings}
    if split.test and settings.method["name"] != ZERO_SHOT:
        shared = settings.model_dump(include={"backbone", "data", "seed", "evaluate"})
        zero_shot = complete(resolve([read_preset(f"{ZERO_SHOT}_base-to-novel"), shared]))
        write_saved_split(folder / ZERO_SHOT / SAVED_SPLIT, split, settings.data.dataset)
        train_run(zero_shot, folder / ZERO_SHOT, device=device, backbone=backbone)
        runs[folder / ZERO_SHOT] = zero_shot
    for run, run_settings in runs.items():
        if split.test and not is_evaluated(run, split.test):
            method, name = load_prompts(finished_prompts(run), backbone), run_settings.method["name"]

            def on_images(done: int, total: int, name: str = name) -> None:
                progress.evaluating(name, done, total)

            evaluate_run(run, device=device, method=method, on_images=on_images)
    return build_result(folder, findings, load_thumbnail)


def _inspect(
    settings: RunSettings, folder: Path, device: str | None, progress: FitProgress, keep_near_copies: bool
) -> tuple[Backbone, list[str]]:
    """Inspect the images and keep the findings; the backbone is loaded first, so that errors do not cost an inspection.

    A method that selects hyperparameters gets validation images, if the images have none.
    """
    data = settings.data
    root = None if data.root is None else Path(data.root).expanduser()
    opened, remarks = open_source(data.dataset, root, class_names=data.class_names, seed=settings.seed)
    backbone = _backbone(settings, device)
    fresh_method(settings, backbone, opened.class_names)
    # Of the processes of a launcher, the first holds the lock; all of them write the same.
    with lock_folder(folder) if this_process(device).is_main else nullcontext():
        # By the process that held the lock until now.
        if (previous := load_previous(settings, folder, keep_near_copies)) is not None:
            return backbone, previous["lines"]
        inspection = inspect_dataset(
            opened,
            remarks=remarks,
            keep_classes=bool(split_domain(data.dataset)),
            keep_near_copies=keep_near_copies,
            on_images=progress.inspecting,
        )
        dataset = inspection.dataset
        if not dataset.val and method_settings(settings.method)[1].needs_validation:
            train, val = hold_out(dataset.train, VALIDATION_FRACTION, settings.seed)
            inspection = replace(inspection, dataset=replace(dataset, train=tuple(train), val=tuple(val)))
        findings = inspection.lines()
        listed, used = (
            {item.path for split in SPLIT_NAMES for item in getattr(each, split)}
            for each in (opened, inspection.dataset)
        )
        write_saved_split(folder / SAVED_SPLIT, inspection.dataset, data.dataset, listed - used)
        write_inspection(folder, settings, keep_near_copies, inspection.as_json(), findings)
        return backbone, findings


def _backbone(settings: RunSettings, device: str | None) -> Backbone:
    try:
        return open_backbone(settings, this_process(device).device)
    except BackboneDownloadError as error:
        raise BackboneDownloadError(
            f"{error}. To try the command without any download: --backbone maple-small (included; trained on drawings "
            "only, for small images)"
        ) from error
