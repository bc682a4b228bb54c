"""Calibrate a trained run: one temperature for its probabilities, from images that it was not trained on."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from maple.config import RunSettings
from maple.data import Dataset, ImageStore, Item, select_dataset
from maple.data.catalogue import require_images, template_of
from maple.evaluation import predict
from maple.methods import Method
from maple.metrics import fit_temperature
from maple.runs.frozen_features import prediction_batches

FEWEST_IMAGES = 20
MOST_IMAGES = 1000  # one number is fitted: more would only take longer


def calibration_items(
    settings: RunSettings, dataset: Dataset, trained: Sequence[Item], val: Sequence[Item]
) -> list[Item]:
    """The images that a run can be calibrated on, at most 1,000, evenly spread: none is trained on or a test image.

    They are the run's validation images `val` and, of a user's own images, those that it leaves over of the training
    and validation parts. Those of a published data set are left alone, as its protocol counts images.

    Raises:
        DataError: an image is missing.
    """
    items = list(val)
    if template_of(settings.data.dataset) is None:
        used = {item.path for item in (*trained, *val)}
        part = select_dataset(dataset, settings.data.classes)
        items += [item for item in (*part.val, *part.train) if item.path not in used]
    chosen = np.unique(np.linspace(0, len(items) - 1, min(len(items), MOST_IMAGES)).round().astype(int))
    items = [items[index] for index in chosen]
    require_images(dataset, items)
    return items


def calibrate(method: Method, items: Sequence[Item], store: ImageStore, settings: RunSettings) -> dict[str, Any]:
    """Set the method's temperature to the likeliest one for labelled images; return what its prompts file says of it.

    It stays 1 where there are fewer than 20 images, or all of them are predicted correctly, since the likeliest
    temperature is then the lowest one that is allowed.

    Raises:
        ImageError: an image cannot be read.

    Example:
        >>> calibrate(method, items, dataset.store(), settings)
        {'temperature': 1.42, 'images': 98}
    """
    found: dict[str, Any] = {"temperature": 1.0, "images": len(items)}
    if len(items) < FEWEST_IMAGES:
        return {**found, "reason": f"at least {FEWEST_IMAGES} images are needed"}
    logits, labels = predict(method, prediction_batches(method, items, store, settings))
    if (logits.argmax(axis=1) == labels).all():
        return {**found, "reason": "all of them are predicted correctly"}
    method.temperature = fit_temperature(logits, labels)
    return {**found, "temperature": method.temperature}
