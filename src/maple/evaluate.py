"""Evaluation: class embeddings once, then images in batches."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from maple.data import Batch
from maple.errors import BackboneError, DataError
from maple.methods import Method
from maple.metrics import Floats, Integers, Scores, score


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
    with torch.inference_mode():
        for batch in batches:
            images = batch.images.to(device)
            if text_features is None:
                found = method.predict_logits(images)
            else:
                image_features = method.encode_images(images)
                found = method.logits(image_features, text_features)
                on_features(image_features)
            logits.append(found.float().cpu().numpy())
            labels.append(batch.labels.numpy())
            on_batch(len(batch.labels))
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


def evaluate(method: Method, batches: Iterable[Batch], on_batch: Callable[[int], None] = lambda _: None) -> Scores:
    """Score the method on labelled batches. Arguments and errors as `predict`'s."""
    return score(*predict(method, batches, on_batch))
