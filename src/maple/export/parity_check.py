"""Compare the logits of an export with those of PyTorch."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from maple.errors import ExportError
from maple.export.export_source import ExportSource
from maple.inference.predictor import Floats
from maple.methods import Method

MAX_DIFFERENCE = 1e-3
"""The largest allowed difference of logits of an export in float32."""

_BATCH = 32

NEW_NAMES = ("red car", "a_very small  blue car", "Crème brûlée & co.", "x")
"""Class names that were not trained: with signs, of several lengths."""


@torch.no_grad()
def reference_logits(method: Method, images: Floats, names: Sequence[str]) -> Floats:
    """Logits [n, C] of preprocessed images [n, 3, R, R] by PyTorch, divided by the temperature."""
    features = method.encode_images(torch.from_numpy(images))
    logits: Floats = (method.with_class_names(names).logits_of(features) / method.temperature).numpy()
    return logits


def largest_difference(
    source: ExportSource, logits: Callable[[Floats], Floats], method: Method, names: Sequence[str]
) -> float:
    """Return the largest difference of `logits` (of images [n, 3, R, R]: [n, C]) from PyTorch's, over all check images.

    Raises:
        ExportError: logits of another shape, or not finite.
    """
    images = np.concatenate([source.random_images, source.run_images])
    # In batches of one, of three, and of more: a batch size that the export has fixed would fail.
    parts = [images[:1], images[1:4], *(images[start : start + _BATCH] for start in range(4, len(images), _BATCH))]
    actual = np.concatenate([logits(part) for part in parts])
    expected = np.concatenate([reference_logits(method, part, names) for part in parts])
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        raise ExportError(f"the export gives logits {list(actual.shape)} instead of finite {list(expected.shape)}")
    return float(np.abs(actual - expected).max())


def scores(source: ExportSource, logits: Callable[[Floats], Floats]) -> dict[str, float] | None:
    """How `logits` predict the run's images of trained classes, and how PyTorch does; None if there are no such images.

    The keys: `images`, their number; `accuracy`, `accuracy_float32` and `same_class`, fractions of them.
    """
    known = source.labels >= 0
    images, labels = source.run_images[known], source.labels[known]
    if not len(images):
        return None
    parts = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    names = source.method.class_names
    actual = np.concatenate([logits(part).argmax(axis=1) for part in parts])
    expected = np.concatenate([reference_logits(source.method, part, names).argmax(axis=1) for part in parts])
    pairs = {"accuracy": (actual, labels), "accuracy_float32": (expected, labels), "same_class": (actual, expected)}
    fractions = {key: float(np.mean(predicted == right)) for key, (predicted, right) in pairs.items()}
    return {"images": len(images), **fractions}


def require_parity(difference: float, export: str) -> None:
    """Raise an ExportError if the logits of an export differ by more than `MAX_DIFFERENCE`."""
    if not difference <= MAX_DIFFERENCE:
        raise ExportError(
            f"{export} differs from PyTorch by up to {difference:.2g} in logits, more than the allowed "
            f"{MAX_DIFFERENCE:g}; nothing was written. Please report it, with the versions of torch and the run"
        )
