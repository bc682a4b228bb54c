"""Calibrate a trained run: one temperature for its probabilities, from images that it was not trained on."""

from collections.abc import Sequence
from typing import Any

from maple.config import RunSettings
from maple.data import ImageStore, Item
from maple.evaluation import predict
from maple.methods import Method
from maple.metrics import Floats, Integers, fit_temperature
from maple.runs.frozen_features import prediction_batches

FEWEST_IMAGES = 20


def calibrate(method: Method, items: Sequence[Item], store: ImageStore, settings: RunSettings) -> dict[str, Any]:
    """Fit the temperature of a trained method to labelled images: what its prompts file says of it.

    Raises:
        ImageError: an image cannot be read.

    Example:
        >>> calibrate(method, items, dataset.store(), settings)
        {'temperature': 1.42, 'images': 98}
    """
    if len(items) < FEWEST_IMAGES:
        return _without_temperature(len(items), f"at least {FEWEST_IMAGES} are needed")
    return temperature_of(*predict(method, prediction_batches(method, items, store, settings)))


def temperature_of(logits: Floats, labels: Integers) -> dict[str, Any]:
    """The temperature of logits [n, C] and labels [n]; 1 where all are predicted correctly.

    The likeliest temperature is then the lowest one that is allowed, whatever the logits.
    """
    if (logits.argmax(axis=1) == labels).all():
        return _without_temperature(len(labels), "all are predicted correctly")
    return {"temperature": fit_temperature(logits, labels), "images": len(labels)}


def _without_temperature(images: int, reason: str) -> dict[str, Any]:
    return {"temperature": 1.0, "images": images, "reason": reason}
