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
        on_features: called with the unit image features [B, D] of each batch; not called if the text features depend on
            the image, since no single set of class embeddings belongs to them.

    Raises:
        DataError: there are no images.
        BackboneError: a logit is not finite.

    Example:
        >>> logits, labels = predict(method, batches)
        >>> (logits.argmax(axis=1) == labels).mean()
        0.8125
    """
    device = method.backbone.device
    method.eval()
    logits, labels = [], []
    text_features = None if method.classes_depend_on_image else method.class_embeddings()

    def compute(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        images = batch.images.to(device)
        if text_features is None:
            return batch.labels, method.predict_logits(images), None
        image_features = method.encode_images(images)
        return batch.labels, method.logits(image_features, text_features), image_features

    with torch.inference_mode():
        for batch_labels, batch_logits, image_features in _one_behind(map(compute, batches), device):
            logits.append(batch_logits.float().cpu().numpy())
            labels.append(batch_labels.numpy())
            if image_features is not None:
                on_features(image_features)
            on_batch(len(batch_labels))
    if not logits:
        raise DataError("there are no images to evaluate; is the list of items, or the part of the classes, empty?")
    all_logits, all_labels = np.concatenate(logits), np.concatenate(labels)
    if not np.isfinite(all_logits).all():
        bad = int((~np.isfinite(all_logits)).any(axis=1).sum())
        raise BackboneError(
            f"{bad} of {len(all_logits)} images have logits that are not finite, in {method.backbone.precision} on "
            f"{method.backbone.device}; load the backbone in fp32"
        )
    return all_logits, all_labels


def _one_behind(results: Iterator[_Result], device: torch.device) -> Iterator[_Result]:
    """The results; on a GPU each only after the next has been launched, which is computed while this one is copied."""
    if device.type == "cpu":
        yield from results
        return
    for result, _ in pairwise(chain(results, [None])):
        yield result  # type: ignore[misc]


def evaluate(method: Method, batches: Iterable[Batch], on_batch: Callable[[int], None] = lambda _: None) -> Scores:
    """Score the method on labelled batches. Arguments and errors as for `predict`.

    Example:
        >>> evaluate(method, batches).top1
        0.8125
    """
    return score(*predict(method, batches, on_batch), temperature=method.temperature)
