"""How good predictions are. Accuracies are fractions of 1; reports turn them into per cent."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]

_BINS = 15


@dataclass(frozen=True)
class Scores:
    """What one evaluation measured over n images and C classes.

    Attributes:
        images: n.
        top1, top5: the fraction whose class is the first, or among the first five (C when fewer).
        macro_f1: the mean F1 over the classes that have images (a class never predicted counts 0).
        calibration_error: expected calibration error, 15 equal-width bins of the top probability.
        per_class: top-1 accuracy of each class, None where it has no images.
        confusion: [C][C] counts, row = true class, column = predicted.
    """

    images: int
    top1: float
    top5: float
    macro_f1: float
    calibration_error: float
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]


def score(logits: Floats, labels: Integers) -> Scores:
    """Measure logits [n, C] against labels [n].

    Raises:
        ValueError: no rows, logits that are not finite, or labels outside 0 .. C - 1.
    """
    count, classes = logits.shape
    labels = np.asarray(labels).astype(np.int64)  # narrower integers would overflow in the confusion matrix
    if count == 0:
        raise ValueError("there are no images to score")
    if len(labels) != count or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be {count} whole numbers from 0 to {classes - 1}")
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite; a NaN would count as the best of its row")
    predicted = logits.argmax(axis=1)
    confusion = np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    totals, hits = confusion.sum(axis=1), confusion.diagonal()
    return Scores(
        images=count,
        top1=float(hits.sum() / count),
        top5=top_k_accuracy(logits, labels, 5),
        macro_f1=_macro_f1(confusion),
        calibration_error=calibration_error(softmax(logits), labels),
        per_class=tuple(float(hit / total) if total else None for hit, total in zip(hits, totals, strict=True)),
        confusion=tuple(tuple(int(cell) for cell in row) for row in confusion),
    )


def top_k_accuracy(logits: Floats, labels: Integers, k: int) -> float:
    """The fraction of rows [n, C] whose label is among the k largest; ties count for the label that comes first."""
    own = logits[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(logits.shape[1])[None] < labels[:, None]
    better = (logits > own) | ((logits == own) & earlier)
    return float((better.sum(axis=1) < k).mean())


def softmax(logits: Floats) -> Floats:
    """Probabilities [n, C] of logits [n, C], in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities: Floats = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def calibration_error(probabilities: Floats, labels: Integers, bins: int = _BINS) -> float:
    """Expected calibration error: how far confidence is from accuracy, on average over equal-width bins.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.abs(
        np.bincount(index, weights=right, minlength=bins) - np.bincount(index, weights=confidence, minlength=bins)
    )
    return float(gaps.sum() / len(labels))


def harmonic_mean(base: float, novel: float) -> float:
    """2bn / (b + n); 0 when both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def accuracy_interval(right: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy, as fractions: Wilson's, which also serves few images.

    Raises:
        ValueError: `right` is not within 0 and `total`, or `total` is 0.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"{right} of {total} is no accuracy")
    z = 1.959964
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / total + spread / (4 * total)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(ups: int, downs: int) -> float:
    """Two-sided p of the exact sign test: how likely so uneven a division is, were ups and downs equally likely.

    Of answers that changed from wrong to right and from right to wrong this is McNemar's exact test.
    """
    total, fewer = ups + downs, min(ups, downs)
    tail = sum(comb(total, count) for count in range(fewer + 1))
    return min(1.0, tail / 2 ** (total - 1)) if total else 1.0


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the deviation of one value is 0."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), deviation


def _macro_f1(confusion: Integers) -> float:
    hits = confusion.diagonal()
    true, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    present = true > 0
    f1 = 2 * hits[present] / (true[present] + predicted[present])
    return float(f1.mean())
