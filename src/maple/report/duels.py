"""Zero-shot CLIP and a tuned method on the same images: their predictions, read from the runs' files."""

import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maple.report.groups import MEASURES, Group
from maple.report.records import ZERO_SHOT, Evaluation, Problem
from maple.report.variants import Variant

Array = NDArray[Any]


@dataclass(frozen=True)
class Predictions:
    """The arrays of one predictions file: n images, k answers, m images with features, C classes, D dimensions."""

    paths: tuple[str, ...]
    labels: Array
    top: Array
    probabilities: Array
    opened: tuple[str, str | None]
    feature_items: Array | None = None
    features: Array | None = None


@dataclass(frozen=True)
class Bout:
    """One part of the classes: both methods' predictions on the same images."""

    classes: str
    class_names: tuple[str, ...]
    before: Predictions
    after: Predictions


@dataclass(frozen=True)
class Duel:
    """Zero-shot CLIP (before) against one method (after) on one data set, with one seed."""

    dataset: str
    method: Variant
    seed: int
    bouts: tuple[Bout, ...]


def read_predictions(evaluation: Evaluation) -> Predictions | None:
    """The predictions behind a row; None where none were kept.

    Raises:
        ValueError: the file is missing, damaged, or belongs to another number of images or classes.
    """
    name, row = evaluation.row.predictions, evaluation.row
    if name is None:
        return None
    try:
        # Opened here, since numpy would leave a file open that turns out to be damaged.
        with (evaluation.run.folder / name).open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {key: content[key] for key in content.files}
        opened = [str(word) for word in arrays["opened"]]
        found = Predictions(
            tuple(str(path) for path in arrays["paths"]),
            arrays["labels"],
            arrays["top"],
            arrays["probabilities"],
            (opened[0], opened[1] or None),
            arrays.get("feature_items"),
            arrays.get("features"),
        )
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"unreadable or damaged: {error}") from error
    _check(found, row.images, len(row.class_names))
    return found


def _check(found: Predictions, images: int, classes: int) -> None:
    if {len(found.paths), *(len(array) for array in (found.labels, found.top, found.probabilities))} != {images}:
        raise ValueError(f"it is not about the {images} images of its row")
    if found.top.ndim != 2 or found.top.shape != found.probabilities.shape or not found.top.shape[1]:
        raise ValueError("its answers and probabilities do not fit together")
    for indices, limit in ((found.labels, classes), (found.top, classes), (found.feature_items, images)):
        if indices is not None and indices.size and (indices.min() < 0 or indices.max() >= limit):
            raise ValueError(f"it speaks of more than {limit} classes or images")
    if found.features is not None and (
        found.feature_items is None or found.features.shape[:1] != found.feature_items.shape or found.features.ndim != 2
    ):
        raise ValueError("its features do not fit its images")


def duel(group: Group, method: Variant, dataset: str) -> tuple[Duel | None, list[Problem]]:
    """The first seed for which both methods kept predictions of the same images, and the files that were no use."""
    problems: list[Problem] = []
    zero = next((variant for variant in group.variants if variant.name == ZERO_SHOT), None)
    if zero is None:
        return None, problems
    parts = MEASURES[:2] if group.key.kind == "base-to-novel" else (group.key.classes,)
    seeds = sorted({seed for part in parts for seed in group.evaluations(method, dataset, part)})
    for seed in seeds:
        bouts = []
        for part in parts:
            ours, theirs = group.evaluations(method, dataset, part), group.evaluations(zero, dataset, part)
            after = _try_read(ours.get(seed), problems)
            for partner in sorted(theirs, key=lambda other: (other != seed, other)):
                before = _try_read(theirs[partner], problems)
                if after and before and _same_images(before, after):
                    bouts.append(Bout(part, ours[seed].row.class_names, before, after))
                    break
        if bouts:
            return Duel(dataset, method, seed, tuple(bouts)), problems
    return None, problems


def _same_images(before: Predictions, after: Predictions) -> bool:
    return before.paths == after.paths and np.array_equal(before.labels, after.labels)


def _try_read(evaluation: Evaluation | None, problems: list[Problem]) -> Predictions | None:
    if evaluation is None:
        return None
    try:
        return read_predictions(evaluation)
    except ValueError as error:
        found = Problem(f"{evaluation.run.name}/{evaluation.row.predictions}", str(error))
        if found not in problems:
            problems.append(found)
        return None
