"""Metrics of predictions. Accuracies are fractions of 1; reports show them as percentages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Integers = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Scores:
    """The scores of one evaluation over n images and C classes.

    Attributes:
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


def score(logits: Floats, labels: Integers, *, temperature: float = 1.0) -> Scores:
    """Score logits [n, C] against labels [n]; probabilities are those of the logits divided by the temperature.

    Raises:
        ValueError: no rows, logits that are not finite, or labels outside 0 .. C - 1.

    Example:
        >>> score(np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), np.array([0, 1, 1])).top1
        0.6666666666666666
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
    # From the confusion matrix, as scikit-learn would take a second to import in every evaluation.
    f1 = 2 * hits / np.maximum(totals + confusion.sum(axis=0), 1)
    return Scores(
        images=count,
        top1=float(hits.sum() / count),
        top5=top_k_accuracy(logits, labels, 5),
        macro_f1=float(f1[totals > 0].mean()),
        calibration_error=calibration_error(softmax(logits / temperature), labels),
        per_class=tuple(float(hit / total) if total else None for hit, total in zip(hits, totals, strict=True)),
        confusion=tuple(tuple(int(cell) for cell in row) for row in confusion),
    )


def top_k_accuracy(logits: Floats, labels: Integers, k: int) -> float:
    """The fraction of rows [n, C] whose label is among the k largest; of equal ones the first counts, as for argmax."""
    true = logits[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(logits.shape[1])[None] < labels[:, None]
    # Not scikit-learn's function, which takes the last of equal ones, and so contradicts argmax.
    better = (logits > true) | ((logits == true) & earlier)
    return float((better.sum(axis=1) < k).mean())


def softmax(logits: Floats) -> Floats:
    """Probabilities [n, C] of logits [n, C], in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    probabilities: Floats = shifted / shifted.sum(axis=1, keepdims=True)
    return probabilities


def calibration_error(probabilities: Floats, labels: Integers, bins: int = 15) -> float:
    """Expected calibration error: the mean distance of confidence from accuracy, over equal-width bins.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.abs(
        np.bincount(index, weights=correct, minlength=bins) - np.bincount(index, weights=confidence, minlength=bins)
    )
    return float(gaps.sum() / len(labels))


LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.05, 20.0


def fit_temperature(logits: Floats, labels: Integers) -> float:
    """The temperature T in 0.05 to 20 for which softmax(logits / T) gives labels [n] the greatest likelihood.

    Logits are [n, C]. It is rounded to six digits. The likelihood of images that are all predicted correctly grows as T
    falls, so that theirs is the lowest.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.

    Example:
        >>> fit_temperature(np.array([[4.0, 0.0]] * 4), np.array([0, 0, 0, 1]))
        3.64096
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    # That of the true class first subtracted: the loss of an image is then the logarithm of a sum of exponentials.
    shifted -= shifted[np.arange(len(labels)), labels][:, None]

    def loss(log_temperature: float) -> float:
        return float(logsumexp(shifted * np.exp(-log_temperature), axis=1).mean())

    # Convex in 1 / T, so that there is one minimum.
    bounds = np.log([LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE])
    minimum = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-7})
    return float(f"{np.exp(minimum.x):.6g}")


class Coverage(NamedTuple):
    """Predictions that are given at a threshold: `kept` of `images`, of which `right` are correct."""

    threshold: float
    images: int
    kept: int
    right: int

    @property
    def fraction(self) -> float:
        """The fraction of the images that is given a prediction."""
        return self.kept / self.images

    @property
    def accuracy(self) -> float | None:
        """The fraction of the given predictions that is correct; None where none is given."""
        return self.right / self.kept if self.kept else None


def coverage_at(confidence: Floats, correct: NDArray[np.bool_], thresholds: Sequence[float]) -> tuple[Coverage, ...]:
    """Coverage at each threshold: images whose greatest probability [n] is below it are given no prediction.

    Example:
        >>> coverage_at(np.array([0.9, 0.4]), np.array([True, False]), [0.5])
        (Coverage(threshold=0.5, images=2, kept=1, right=1),)
    """
    return tuple(
        Coverage(threshold, len(correct), int(kept.sum()), int((kept & correct).sum()))
        for threshold in thresholds
        for kept in [confidence >= threshold]
    )


def harmonic_mean(base: float, novel: float) -> float:
    """2bn / (b + n); 0 when both are 0."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy, as fractions: Wilson's, which is also good for few images."""
    from scipy.stats import binomtest

    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} of {total} is not an accuracy")
    low, high = binomtest(correct, total).proportion_ci(method="wilson")
    return float(low), float(high)


def p_text(p: float) -> str:
    """A p-value as it is printed: "p = 0.013", or "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def sign_test(ups: int, downs: int) -> float:
    """Two-sided p of the exact sign test; for predictions that became right and wrong it is McNemar's exact test."""
    from scipy.stats import binomtest

    return float(binomtest(ups, ups + downs).pvalue) if ups + downs else 1.0


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1); the deviation of one value is 0."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return float(np.mean(values)), deviation
