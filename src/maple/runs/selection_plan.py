"""The plan of a selection: on which parts of the training images which methods are tried, and what that takes.

Times are estimated from those of single images and steps, and of a part of a fit, measured on this machine.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from maple.clip import Backbone
from maple.config import RunSettings, Settings
from maple.data import Dataset, Item, eval_batches, hold_out, select_dataset
from maple.data.batches import derive_seed, steps_per_epoch
from maple.data.records import items_hash
from maple.data.sampling import separable_units
from maple.errors import ConfigError, MapleError
from maple.methods import METHODS, ZERO_SHOT, Features, Method, method_settings
from maple.methods.features import seconds_of
from maple.prompts import encode_image
from maple.runs.feature_cache import FeatureCache
from maple.runs.frozen_features import require_features
from maple.runs.spec import eval_transform, sample, spare_items
from maple.runs.training import fresh_method
from maple.train import Trainer

FOLDS = 4
"""Into how many parts the training images of each class are divided."""
VALIDATION_FRACTION = 0.25
"""Of the training images of each class, for runs that need validation images and have none."""

PLAN_FORMAT = 1
NO_MEMORY = "does not fit into the device's memory"
"""Why a candidate is not tried after an error of the allocator."""

_MOST_SCORED = 1000  # images of a part: an accuracy's standard error is then below 1.6 points
_FEWEST_STEPS = 1 / 3  # a shorter training is not tried
_MOST_TIMED = 2000  # features that a method is fitted to, for an estimate
_EXTRACTION_SHARE = 0.1  # of the time, for the features of several views of each image

Goal = Literal["trained", "new"]


class SelectionSettings(Settings):
    """`goal` is to be best on the trained class names, or on these and on names that were not trained.

    `minutes` is the time that trying the candidates, and training the chosen one, may take as estimated before.
    """

    section = "selection."
    goal: Goal = "trained"
    minutes: Annotated[float, Field(gt=0)] = 10.0


class Fold(NamedTuple):
    """What a candidate is trained on, and what it is scored on: images of the trained names, and of others."""

    train: Dataset
    trained: list[Item]
    new: list[Item]
    new_names: tuple[str, ...]


def lacks_validation(dataset: Dataset, settings: RunSettings) -> bool:
    """Whether a run needs validation images, for a hyperparameter or its best state, and its data set has none.

    For its best state, training images that the sample leaves over will do.
    """
    if dataset.val or method_settings(settings.method)[1].needs_validation:
        return not dataset.val
    chooses = settings.train.keep == "best" and (settings.train.epochs or settings.train.steps)
    return bool(chooses) and not spare_items(settings, dataset, sample(settings, dataset)[0], ())


def with_validation(dataset: Dataset, settings: RunSettings) -> Dataset:
    """The data set with validation images held out of the training images, if the run lacks some.

    Raises:
        ConfigError: there are no images to hold out.
    """
    if not lacks_validation(dataset, settings):
        return dataset
    train, val = hold_out(dataset.train, VALIDATION_FRACTION, settings.seed, dataset.near_copies)
    return replace(dataset, train=tuple(train), val=tuple(val))


def with_changes(settings: RunSettings, changes: Mapping[str, Any]) -> RunSettings:
    """The settings with a plan's changes to the recipe's training."""
    return settings.changed(train=settings.train.changed(**changes)) if changes else settings


def _folds(dataset: Dataset, seed: int) -> dict[str, int]:
    """The part of each training image by its path; a class's images are dealt in turn, and an only image is in none.

    Near copies are dealt as one, the largest groups first. Of few images, not all parts have some: the first ones do.
    """
    parts: dict[str, int] = {}
    for label, units in separable_units(dataset.train, dataset.near_copies).items():
        # A generator per class: other classes do not change how this one is divided.
        order = random.Random(f"{derive_seed(seed, 'folds')}/{label}").sample(units, len(units))
        sizes = {(label + position) % FOLDS: 0 for position in range(FOLDS)}
        for unit in sorted(order, key=len, reverse=True):
            part = min(sizes, key=sizes.__getitem__)  # of equal ones the next
            sizes[part] += len(unit)
            parts |= {dataset.train[index].path: part for index in unit}
    filled = sorted(set(parts.values()))
    return {path: filled.index(part) for path, part in parts.items()}


def make_fold(dataset: Dataset, settings: RunSettings, goal: Goal, number: int) -> Fold:
    """The fold in which the part `number` of the training images, at most 1,000 of them, is scored."""
    parts = _folds(dataset, settings.seed)
    train = tuple(item for item in dataset.train if parts.get(item.path) != number)
    scored = [item for item in dataset.train if parts.get(item.path) == number]
    if len(scored) > _MOST_SCORED:
        scored = [scored[index] for index in np.linspace(0, len(scored) - 1, _MOST_SCORED).round().astype(int)]
    remaining = replace(dataset, train=train, test=tuple(scored))
    if goal == "trained":
        return Fold(with_validation(replace(remaining, test=()), settings), scored, [], ())
    trained, new = ("base", "novel") if number % 2 == 0 else ("novel", "base")
    half, other = select_dataset(remaining, trained), select_dataset(remaining, new)  # type: ignore[arg-type]
    data = with_validation(replace(half, test=()), settings)
    return Fold(data, list(half.test), list(other.test), other.class_names)


def require_choice(dataset: Dataset, seed: int, goal: Goal) -> int:
    """The number of parts that have images to score; ConfigError if there are too few classes, or training images."""
    if goal == "new" and dataset.num_classes < 4:
        raise ConfigError(
            f"the goal `new` holds out half of the classes, and there are {dataset.num_classes}; it needs at least 4"
        )
    parts = len(set(_folds(dataset, seed).values()))
    if not parts:
        image = (
            "training image (a quarter of each class, at least one, is the test)" if dataset.drawn_split else "image"
        )
        raise ConfigError(
            f"a method is chosen on images that were held out, and no class has more than one {image}; give more, or "
            "name one method"
        )
    return parts


def make_plan(
    candidates: Mapping[str, RunSettings], dataset: Dataset, backbone: Backbone, options: SelectionSettings
) -> dict[str, Any]:
    """Which candidates are tried, with which changes to their recipes, on how many parts."""
    parts_with_images = require_choice(dataset, next(iter(candidates.values())).seed, options.goal)
    budget, clock = 60 * options.minutes, _Clock(dataset, backbone)
    entries: list[dict[str, Any]] = []
    titles = [METHODS[settings.method["name"]].title for settings in candidates.values()]
    for (recipe, settings), title in zip(candidates.items(), titles, strict=True):
        shown = f"{title} ({recipe})" if titles.count(title) > 1 else title
        entry: dict[str, Any] = {"recipe": recipe, "title": shown, "skipped": "", "remark": "", "changes": {}}
        entries.append({**entry, "seconds": 0.0, "scores": []})
        entry = entries[-1]
        try:
            if options.goal == "new" and not method_settings(settings.method)[1].supports_new_classes:
                raise ConfigError("cannot predict class names that were not trained")
            needs_validation = method_settings(settings.method)[1].needs_validation
            needed = FOLDS if needs_validation else FOLDS // 2 if options.goal == "new" else 1
            parts = [make_fold(dataset, settings, options.goal, number) for number in range(needed)]
            if needs_validation and not all(part.train.val for part in parts):
                raise ConfigError("selects a setting on validation images, and too few classes have three images")
            if options.goal == "new":
                fewest = parts[: FOLDS // 2]
                if not (any(part.trained for part in fewest) and any(part.new for part in fewest)):
                    raise ConfigError("too few classes have more than one image to score both trained and new names")
            fold = parts[0]
            if settings.train.views and clock.extraction(settings, fold) * FOLDS > _EXTRACTION_SHARE * budget:
                entry["changes"]["views"], entry["remark"] = 0, "one view of each image"
            entry |= clock.costs(with_changes(settings, entry["changes"]), fold)
        except (RuntimeError, MemoryError) as error:
            if settings.method["name"] == ZERO_SHOT or not is_out_of_memory(error):
                raise
            entry["skipped"] = NO_MEMORY
        except MapleError as error:
            entry["skipped"] = str(error)
        if entry["skipped"]:
            torch.cuda.empty_cache()  # not earlier: the traceback of an error holds tensors
    require_candidate(entries)
    folds = _fit_into_time(entries, candidates, options, parts_with_images)
    for entry in entries:
        entry["seconds"] *= folds
        for estimate in ("steps", "epoch"):
            entry.pop(estimate, None)
    return {
        "format": PLAN_FORMAT,
        "goal": options.goal,
        "minutes": options.minutes,
        "folds": folds,
        "candidates": entries,
    }


def _fit_into_time(
    entries: Sequence[dict[str, Any]],
    candidates: Mapping[str, RunSettings],
    options: SelectionSettings,
    most: int,
) -> int:
    """How many parts, of `most`, are scored; candidates for which there is too little time are cut short or skipped.

    An entry has the `seconds` and `steps` of a trial, and the steps of an `epoch`.
    """
    budget = 60 * options.minutes
    usable = [entry for entry in entries if not entry["skipped"]]
    # Fewer parts for all before fewer methods; the last training is that of the chosen one.
    longest = max(entry["seconds"] for entry in usable)
    choices = (FOLDS, FOLDS // 2) if options.goal == "new" else (min(FOLDS, most), min(FOLDS // 2, most), 1)
    total = sum(entry["seconds"] for entry in usable)
    folds = next((number for number in choices if number * total + longest <= budget), choices[-1])
    remaining = budget
    for entry in sorted(usable, key=lambda entry: float(entry["seconds"])):
        # The first is tried in any case.
        cost = (folds + 1) * entry["seconds"]
        share = remaining / cost if cost else 1.0
        if share < 1 and entry["seconds"] > 1 and entry is not usable[0]:
            train, epoch = candidates[entry["recipe"]].train, max(entry["epoch"], 1)
            # Whole epochs are trained, and at least one after the warm-up: what is planned is what will be done.
            wanted = max(int(share * entry["steps"]) // epoch, 1) * epoch
            steps = train.changed(steps=wanted).with_epochs_for(epoch).epochs * epoch
            if share < _FEWEST_STEPS or steps > share * entry["steps"]:
                minutes = math.ceil(options.minutes + (cost - remaining) / 60)
                entry["skipped"] = f"not enough time: it needs about {minutes} minutes in all"
                continue
            entry["changes"]["steps"] = steps
            remark = f"trained for {steps} of {entry['steps']} steps, for want of time"
            entry["remark"] = f"{entry['remark']}, {remark}" if entry["remark"] else remark
            entry["seconds"] *= steps / entry["steps"]
        remaining -= folds * entry["seconds"]
    return folds


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device does not suffice; a CPU has no error class of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


def require_candidate(entries: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError if all candidates of a plan are skipped."""
    if all(entry["skipped"] for entry in entries):
        reasons = "; ".join(f"{entry['recipe']}: {entry['skipped']}" for entry in entries)
        raise ConfigError(f"none of the methods can be tried: {reasons}")


class _Clock:
    """Estimates what a trial takes from measured times of this backbone on this machine."""

    def __init__(self, dataset: Dataset, backbone: Backbone) -> None:
        self._backbone = backbone
        cache = FeatureCache.open()
        self._shares_features = cache is not None and cache.is_writable
        self._extracted: set[tuple[int, str]] = set()  # the number of views, and the hash of the list of images
        self._read_seconds = self._image_seconds = 0.0
        self._on_rows = dataset.has_rows
        if self._on_rows:
            return
        transform = eval_transform(backbone)
        items, store = list(dataset.train[:16]), dataset.store(max_bytes=0)

        def read() -> torch.Tensor:
            return next(iter(eval_batches(items, store, transform, batch_size=len(items), num_workers=0))).images

        self._read_seconds = seconds_of(read) / len(items)
        images = read().to(backbone.device)
        with torch.inference_mode():
            encoding = seconds_of(lambda: encode_image(backbone.image, images, ()).float().cpu())
        self._image_seconds = self._read_seconds + encoding / len(items)

    def extraction(self, settings: RunSettings, fold: Fold) -> float:
        """Seconds for the features of all views of the training images of a fold, and of its validation images."""
        train, val, _ = sample(settings, fold.train)
        return (len(train) * max(settings.train.views or 0, 1) + len(val)) * self._image_seconds

    def costs(self, settings: RunSettings, fold: Fold) -> dict[str, Any]:
        """Seconds and steps of one trial, and steps of an epoch of it. Raises what building the method raises."""
        items, val, class_names = sample(settings, fold.train)
        method = fresh_method(settings, self._backbone, class_names)
        if self._on_rows:
            require_features(method, self._backbone.embed_dim)
        train = settings.train
        epoch = steps_per_epoch(len(items), train.batch_size, train.drop_last)
        steps = epoch * train.with_epochs_for(epoch).epochs
        seconds, features_suffice = (
            self._fitting(method, train.views, len(items), len(val)),
            method.accepts_features and (train.views is not None or not steps),
        )
        if method.accepts_features:
            if train.views is not None or method.uses_features:
                seconds += self._first_extraction(items, train.views or 0)
                seconds += self._first_extraction(val) if method.uses_features else 0.0
            seconds += self._first_extraction(fold.trained) + self._first_extraction(fold.new)
        else:
            seconds += (len(fold.trained) + len(fold.new)) * self._image_seconds
        if method.parameter_count() and steps:
            count = min(train.batch_size, len(items))
            size = self._backbone.preprocessing.size
            shape = (count, self._backbone.embed_dim) if features_suffice else (count, 3, size, size)
            batch = torch.rand(shape), torch.arange(count) % len(method.class_names)
            trainer = Trainer(method, train)
            seconds += steps * seconds_of(lambda: trainer.step(*batch))
            seconds += 0.0 if features_suffice else steps * count * self._read_seconds
        return {"seconds": seconds, "steps": steps, "epoch": epoch}

    def _first_extraction(self, items: Sequence[Item], views: int = 0) -> float:
        """Seconds for the features of a list of images; none if an earlier method has left them in the cache."""
        key = views, items_hash(items)
        if self._shares_features and key in self._extracted:
            return 0.0
        self._extracted.add(key)
        return len(items) * max(views, 1) * self._image_seconds

    def _fitting(self, method: Method, views: int | None, images: int, val_images: int) -> float:
        """Seconds in which a method is fitted to the features of its images: a few of them, which are made up."""
        if not method.uses_features:
            return 0.0
        width, classes, views = self._backbone.embed_dim, len(method.class_names), max(views or 0, 1)
        count = min(images, max(_MOST_TIMED // views, classes))
        generator, device = torch.Generator().manual_seed(0), self._backbone.device
        centres = torch.rand(classes, width, generator=generator)
        labels, val_labels = (torch.arange(number) % classes for number in (count, val_images))
        train, val = (
            (centres[each] + torch.rand(len(each), width, generator=generator)).to(device)
            for each in (labels, val_labels)
        )
        features = Features(train.expand(views, -1, -1), labels.to(device), val, val_labels.to(device))
        return method.fit_seconds(features) * images / count
