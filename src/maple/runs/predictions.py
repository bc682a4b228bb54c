"""The predictions of an evaluation, kept next to its row for reports: arrays in an .npz, readable without pickle.

paths            [n] the images, relative to the root of their data set
labels           [n] the true class
top              [n, k] the k <= 5 likeliest classes, best first
probabilities    [n, k] theirs, float32
feature_items    [m] which images have features: at most 2,000, evenly spread
features         [m, D] their unit features, float16; absent where the text features depend on the image
class_features   [C, D] the unit text features, float16; absent likewise
opened           [2] the data set as it was requested, and its root ("" where none was given)
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from maple import files
from maple.metrics import Floats, Integers, softmax
from maple.runs.folder import evaluation_key

TOP = 5
MOST_FEATURES = 2000


class FeatureSample:
    """The features of at most `most` of `total` images, evenly spread, collected batch by batch."""

    def __init__(self, total: int, most: int = MOST_FEATURES) -> None:
        self.items: Integers = np.unique(np.linspace(0, total - 1, min(total, most)).round().astype(np.int64))
        self._seen = 0
        self._kept: list[Floats] = []

    def add(self, image_features: Tensor) -> None:
        """Collect those of the next batch [B, D] that belong to the sample."""
        end = self._seen + len(image_features)
        wanted = self.items[(self.items >= self._seen) & (self.items < end)] - self._seen
        self._kept.append(image_features.float().cpu().numpy()[wanted].astype(np.float16))
        self._seen = end

    @property
    def features(self) -> Floats | None:
        """[m, D] float16; None where no features were given."""
        return np.concatenate(self._kept) if self._kept else None


def predictions_name(row: dict[str, Any]) -> str:
    """The file of a row's predictions, relative to the run: an equal evaluation replaces it."""
    return f"predictions/{sha256(json.dumps(evaluation_key(row)).encode()).hexdigest()[:16]}.npz"


def prediction_arrays(
    images: list[str], logits: Floats, labels: Integers, sample: FeatureSample, class_features: Tensor | None
) -> dict[str, Any]:
    """The arrays named above, without `opened`, of logits [n, C] on n images."""
    top = _best(logits, min(TOP, logits.shape[1]))
    arrays: dict[str, Any] = {
        "paths": np.array(images, dtype=np.str_),
        "labels": labels.astype(np.int32),
        "top": top.astype(np.int32),
        "probabilities": np.take_along_axis(softmax(logits), top, axis=1).astype(np.float32),
    }
    if sample.features is not None and class_features is not None:
        arrays["feature_items"] = sample.items
        arrays["features"] = sample.features
        arrays["class_features"] = class_features.float().cpu().numpy().astype(np.float16)
    return arrays


def write_predictions(path: Path, arrays: dict[str, Any], *, opened: tuple[str, str | None]) -> None:
    """Write the arrays, and how their data set was opened (its name as requested, its root), atomically."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # savez would add .npz to a path
            np.savez_compressed(file, **arrays, opened=np.array([opened[0], opened[1] or ""], dtype=np.str_))

    files.write_with(path, write)


def _best(logits: Floats, k: int) -> Integers:
    """The k largest of each row [n, C], best first; of equal ones the first, as argmax returns it."""
    left = logits.astype(np.float32, copy=True)
    best = np.empty((len(left), k), dtype=np.int64)
    rows = np.arange(len(left))
    for place in range(k):
        best[:, place] = left.argmax(axis=1)
        left[rows, best[:, place]] = -np.inf
    return best
