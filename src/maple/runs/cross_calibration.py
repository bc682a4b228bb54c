"""Calibrate a run that has no images to spare: on training images, by models that were not trained on them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from maple.config import RunSettings
from maple.data import Dataset
from maple.errors import ConfigError, TrainingDivergedError
from maple.evaluation import predict
from maple.methods import ZERO_SHOT, Method
from maple.runs.calibration import FEWEST_IMAGES, temperature_of
from maple.runs.frozen_features import prediction_batches
from maple.runs.selection_plan import FOLDS, make_fold
from maple.runs.spec import eval_transform, open_store, sample, spare_items


def cross_calibrate(
    settings: RunSettings, dataset: Dataset, train: Callable[[int, Dataset], Method], *, trained_parts: int = 0
) -> dict[str, Any] | None:
    """Calibrate a run before it is trained, where it would be left with too few images for it; None where it is not.

    As in the choice of a method, the run's settings are trained without one of four parts of the training images, and
    predict that part: without each part that was left out before, and without more until they have 20 images. The
    temperature that fits these predictions is that of a model with fewer training images. A run that cannot be trained
    without a part is not calibrated in this way.

    Args:
        train: trains on the images of this data set, the part of the given number being left out.
        trained_parts: for how many parts that has been done before, so that it takes no time.

    Raises:
        MapleError: an image cannot be read.

    Example:
        >>> cross_calibrate(settings, dataset, train)
        {'temperature': 1.42, 'images': 65, 'cross_validated': True}
    """
    trained, val, _ = sample(settings, dataset)
    spare = spare_items(settings, dataset, trained, val)
    if not settings.train.calibrate or settings.method["name"] == ZERO_SHOT or len(spare) >= FEWEST_IMAGES:
        return None
    folds = [make_fold(dataset, settings, "trained", number) for number in range(FOLDS)]
    if sum(len(fold.trained) for fold in folds) < FEWEST_IMAGES:
        return None
    scored: list[tuple[Any, Any]] = []
    images = 0
    for number, fold in enumerate(folds):
        if not fold.trained or (number >= trained_parts and images >= FEWEST_IMAGES):
            continue
        try:
            method = train(number, fold.train)
        except (ConfigError, TrainingDivergedError):
            return None
        method.set_class_names(fold.train.class_names)
        store = open_store(settings, dataset, eval_transform(method.backbone))
        batches = prediction_batches(method, fold.trained, store, settings)
        scored.append(predict(method, batches))
        images += len(fold.trained)
    logits, labels = (np.concatenate(arrays) for arrays in zip(*scored, strict=True))
    return {**temperature_of(logits, labels), "cross_validated": True}
