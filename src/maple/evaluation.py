"""Evaluation: class embeddings once, then images in batches."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from maple.data import Batch
from maple.errors import BackboneError, DataError
from maple.methods import Method
from maple.metrics import Floats, Integers, Scores, score

_Result = TypeVar("_Result")


def predict(
    method: Method,
    batches: Iterable[Batch],
    on_batch: Callable[[int], None] = lambda _: None,
    on_features: Callable[[Tensor], None] = lambda _: None,
) -> tuple[Floats, Integers]:
    """Logits [n, C] (float32) and labels [n] of all batches, under the method's current class names.

    Class embeddings are encoded once, not once per batch (the reference encodes them for every batch:
    multimodal-prompt-learning@69bce21 trainers/maple.py:189-204).

    Args:
        on_batch: called with the number of images after each batch.
        on_features: called with the unit image features [B, D] of each batch; never where the text features depend on
            the image, as one set of class embeddings does not go with them.

    Raises:
        DataError: there are no images.
        BackboneError: a logit is not finite.
    """
    device = method.backbone.device
    method.eval()
    logits, labels = [], []
    text_features = None if method.classes_depend_on_image else method.class_embeddings()

    def answered(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        images = batch.images.to(device)
        if text_features is None:
            return batch.labels, method.predict_logits(images), None
        image_features = method.encode_images(images)
        return batch.labels, method.logits(image_features, text_features), image_features

    def collected(true: Tensor, found: Tensor, image_features: Tensor | None) -> None:
        logits.append(found.float().cpu().numpy())
        labels.append(true.numpy())
        if image_features is not None:
            on_features(image_features)
        on_batch(len(true))

    with torch.inference_mode():
        for last in _one_behind(map(answered, batches), device):
            collected(*last)
    if not logits:
        raise DataError("there are no images to evaluate; is the list of items, or the part of the classes, empty?")
    found_logits, found_labels = np.concatenate(logits), np.concatenate(labels)
    if not np.isfinite(found_logits).all():
        bad = int((~np.isfinite(found_logits)).any(axis=1).sum())
        raise BackboneError(
            f"{bad} of {len(found_logits)} images have logits that are not finite, in {method.backbone.precision} on "
            f"{method.backbone.device}; load the backbone in fp32"
        )
    return found_logits, found_labels


def _one_behind(results: Iterator[_Result], device: torch.device) -> Iterator[_Result]:
    """The results, on a GPU only when the next one is on its way: so it computes while the last one is fetched."""
    if device.type == "cpu":
        yield from results
        return
    for one, _ in pairwise(chain(results, [None])):
        yield one  # type: ignore[misc]


def evaluate(method: Method, batches: Iterable[Batch], on_batch: Callable[[int], None] = lambda _: None) -> Scores:
    """Score the method on labelled batches. Arguments and errors as `predict`'s."""
    return score(*predict(method, batches, on_batch))
