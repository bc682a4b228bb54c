"""Zero-shot CLIP and a method on the same images: example images, confusions and features, from saved predictions."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maple.files import read_arrays
from maple.report.groups import Group, Variant
from maple.report.records import EvaluationRecord, Problem

OUTCOMES = {
    "fixed": "Fixed by the method",
    "regressed": "Regressed with the method",
    "both right": "Right both times",
    "both wrong": "Wrong both times",
}
FEWEST_EXAMPLES = 3
_EXAMPLES = 24
_CONFUSIONS = 12
_EMBEDDED_CLASSES = 12
_EMBEDDED_IMAGES = 600
_FEWEST_FOR_TSNE = 12
_SEED = 0

Array = NDArray[Any]


@dataclass(frozen=True)
class StoredPredictions:
    """The arrays of one predictions file: paths and labels of n images, and their k most probable classes [n, k].

    `opened` is the data set as it was requested, and its root; features [m, D] were kept of the `feature_items` [m].
    """

    paths: tuple[str, ...]
    labels: Array
    top: Array
    probabilities: Array
    opened: tuple[str, str | None]
    feature_items: Array | None = None
    features: Array | None = None


@dataclass(frozen=True)
class PairedPredictions:
    """Predictions of zero-shot CLIP (before) and of a method (after) on the same images of one part of the classes."""

    classes: str
    class_names: tuple[str, ...]
    before: StoredPredictions
    after: StoredPredictions


def read_predictions(evaluation: EvaluationRecord) -> StoredPredictions | None:
    """The predictions behind a row; None where none were kept.

    Raises:
        ValueError: the file is missing, damaged, or belongs to another number of images or classes.
    """
    row = evaluation.row
    if row.predictions is None:
        return None
    try:
        arrays = read_arrays(evaluation.run.folder / row.predictions, "iufU")
        opened = [str(word) for word in arrays["opened"]]
        labels, top, probabilities = (arrays[key] for key in ("labels", "top", "probabilities"))
        items, features = arrays.get("feature_items"), arrays.get("features")
        paths = tuple(str(path) for path in arrays["paths"])
        predictions = StoredPredictions(
            paths, labels, top, probabilities, (opened[0], opened[1] or None), items, features
        )
        for key, kinds in (("paths", "U"), ("labels", "iu"), ("top", "iu"), ("probabilities", "f")):
            if arrays[key].dtype.kind not in kinds or arrays[key].ndim != 1 + (key in ("top", "probabilities")):
                raise ValueError(f"{key} are {arrays[key].dtype} {list(arrays[key].shape)}")
        for optional, kinds in ((items, "iu"), (features, "f")):
            if optional is not None and optional.dtype.kind not in kinds:
                raise ValueError(f"features or their items are {optional.dtype}")
    except KeyError as error:
        raise ValueError(f"unreadable or damaged: it has no array {error}") from error
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"unreadable or damaged: {error}") from error
    if {len(paths), len(labels), len(top), len(probabilities)} != {row.images}:
        raise ValueError(f"it does not hold the {row.images} images of its row")
    if top.shape != probabilities.shape or not top.shape[1]:
        raise ValueError("its predictions and probabilities have different shapes")
    for indices, limit in ((labels, len(row.class_names)), (top, len(row.class_names)), (items, row.images)):
        if indices is not None and indices.size and (indices.min() < 0 or indices.max() >= limit):
            raise ValueError(f"it holds indices outside 0 to {limit - 1}")
    if not np.isfinite(probabilities).all() or (features is not None and not np.isfinite(features).all()):
        raise ValueError("its probabilities or features are not all finite")
    if features is not None and (items is None or features.shape[:1] != items.shape or features.ndim != 2):
        raise ValueError("its features do not fit its images")
    return predictions


def pair_predictions(
    group: Group, method: Variant, dataset: str, problems: list[Problem]
) -> tuple[int, list[PairedPredictions]]:
    """The first seed for which zero-shot CLIP and `method` kept predictions of the same images, and those.

    Damaged files are appended to `problems`.
    """

    def read(evaluation: EvaluationRecord | None) -> StoredPredictions | None:
        try:
            return read_predictions(evaluation) if evaluation else None
        except ValueError as error:
            assert evaluation is not None
            problem = Problem(f"{evaluation.run.name}/{evaluation.row.predictions}", str(error))
            if problem not in problems:
                problems.append(problem)
            return None

    if group.zero_shot is None:
        return 0, []
    for seed in sorted({seed for part in group.parts for seed in group.evaluations(method, dataset, part)}):
        pairs = []
        for part in group.parts:
            evaluation = group.evaluations(method, dataset, part).get(seed)
            baselines = group.evaluations(group.zero_shot, dataset, part)
            after = read(evaluation)
            for other in sorted(baselines, key=lambda other: (other != seed, other)):
                before = read(baselines[other])
                if (
                    (evaluation and before and after)
                    and before.paths == after.paths
                    and np.array_equal(before.labels, after.labels)
                ):
                    pairs.append(PairedPredictions(part, evaluation.row.class_names, before, after))
                    break
        if pairs:
            return seed, pairs
    return 0, []


@dataclass(frozen=True)
class PredictedLabel:
    """The class that a method predicts for an image."""

    name: str
    probability: float
    right: bool


@dataclass(frozen=True)
class ComparedImage:
    """One image with both predictions."""

    path: str
    opened: tuple[str, str | None]
    classes: str
    truth: str
    before: PredictedLabel
    after: PredictedLabel


@dataclass(frozen=True)
class Outcome:
    """The number of images with one of the OUTCOMES, and the images that are shown."""

    name: str
    count: int
    shown: tuple[ComparedImage, ...]

    @property
    def title(self) -> str:
        """Its heading."""
        return OUTCOMES[self.name]


def choose_examples(pairs: list[PairedPredictions], shown: int = _EXAMPLES) -> list[Outcome]:
    """At most `shown` images: outcomes in proportion to their counts, evenly spaced in the list; see `shares`."""
    images: dict[str, list[ComparedImage]] = {name: [] for name in OUTCOMES}
    for pair in pairs:
        for index, path in enumerate(pair.after.paths):
            label = int(pair.before.labels[index])
            before, after = (
                PredictedLabel(pair.class_names[top], float(probability), top == label)
                for top, probability in (
                    (int(side.top[index, 0]), side.probabilities[index, 0]) for side in (pair.before, pair.after)
                )
            )
            changed = "fixed" if after.right else "regressed"
            outcome = changed if before.right != after.right else "both right" if after.right else "both wrong"
            truth = pair.class_names[label]
            images[outcome].append(ComparedImage(path, pair.after.opened, pair.classes, truth, before, after))
    counts = [len(images[name]) for name in OUTCOMES]
    return [
        Outcome(name, count, tuple(images[name][index] for index in evenly(count, places)))
        for name, count, places in zip(OUTCOMES, counts, shares(counts, shown), strict=True)
    ]


def shares(counts: list[int], places: int, fewest: int = FEWEST_EXAMPLES) -> list[int]:
    """Divide places in proportion to counts, with at least `fewest` for each count that large, and at most the count.

    With more places than things, everything gets its place.
    """
    total = sum(counts)
    if total <= places:
        return counts
    given = [min(fewest, count) for count in counts]
    while sum(given) < places:
        # The one furthest below its share is next; of equal ones the first.
        lacking = [
            count * places / total - have if have < count else -1e9 for count, have in zip(counts, given, strict=True)
        ]
        given[lacking.index(max(lacking))] += 1
    return given


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` indices below `count`, evenly spaced: the middle of each of as many equal intervals."""
    return [int((place + 0.5) * count / wanted) for place in range(wanted)]


@dataclass(frozen=True)
class Confusion:
    """How many images of one class are predicted as another by zero-shot CLIP (before) and by the method (after)."""

    truth: str
    predicted: str
    before: int
    after: int
    images: int


def most_confused(pairs: list[PairedPredictions]) -> list[Confusion]:
    """The pairs of classes with most mistakes by the method, then by zero-shot CLIP, then in their own order."""
    confusions: list[Confusion] = []
    for pair in pairs:
        labels = pair.after.labels.tolist()
        images = Counter(labels)
        before, after = (
            Counter((label, top) for label, top in zip(labels, side.top[:, 0].tolist(), strict=True) if top != label)
            for side in (pair.before, pair.after)
        )
        for truth, top in sorted(before.keys() | after.keys()):
            names, mistakes = (pair.class_names[truth], pair.class_names[top]), (before[truth, top], after[truth, top])
            confusions.append(Confusion(*names, *mistakes, images[truth]))
    return sorted(confusions, key=lambda confusion: (-confusion.after, -confusion.before))[:_CONFUSIONS]


@dataclass(frozen=True)
class Embedding:
    """Features of m images in the plane [m, 2], before and after, by t-SNE, or PCA for a few images; labels [m].

    `silhouettes`: how well all D dimensions separate the classes, before and after; None where that is undefined.
    """

    method: str
    class_names: tuple[str, ...]
    labels: Array
    before: Array
    after: Array
    silhouettes: tuple[float, float] | None
    unchanged: bool


def embed(pairs: list[PairedPredictions]) -> Embedding | None:
    """Lay out the images of a dozen classes; None where features were kept of fewer than three of them."""
    from sklearn.metrics import silhouette_score

    befores, afters = list[Array](), list[Array]()
    labels, names = list[int](), list[str]()
    places = _EMBEDDED_CLASSES // len(pairs)
    for pair in pairs:
        before, after = pair.before, pair.after
        if before.features is None or after.features is None:
            return None
        if before.feature_items is None or after.feature_items is None:
            return None
        items, in_before, in_after = np.intersect1d(before.feature_items, after.feature_items, return_indices=True)
        item_labels = before.labels[items]
        present = np.unique(item_labels)
        for label in present[evenly(len(present), min(places, len(present)))]:
            chosen = np.flatnonzero(item_labels == label)
            chosen = chosen[evenly(len(chosen), min(len(chosen), _EMBEDDED_IMAGES // _EMBEDDED_CLASSES))]
            befores.append(before.features[in_before[chosen]])
            afters.append(after.features[in_after[chosen]])
            labels += [len(names)] * len(chosen)
            names.append(pair.class_names[label] + (f" ({pair.classes})" if len(pairs) > 1 else ""))
    if len(labels) < 3 or len({features.shape[1] for features in befores + afters}) > 1:
        return None
    first, second = (np.concatenate(side).astype(np.float64) for side in (befores, afters))
    method = "t-SNE" if len(labels) >= _FEWEST_FOR_TSNE else "PCA"
    silhouettes = None
    if 2 <= len(names) < len(labels):
        before_score, after_score = (
            float(silhouette_score(features, labels, metric="cosine")) for features in (first, second)
        )
        silhouettes = before_score, after_score
    unchanged = bool(np.allclose(first, second, atol=2e-3))
    planes = _plane(first, method), _plane(second, method)
    return Embedding(method, tuple(names), np.array(labels), *planes, silhouettes, unchanged)


def _plane(features: Array, method: str) -> Array:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if np.ptp(features, axis=0).max() == 0:
        return np.zeros((len(features), 2))
    if method == "PCA":
        return np.asarray(PCA(n_components=2, svd_solver="full").fit_transform(features))
    perplexity = min(30.0, (len(features) - 1) / 3)
    layout = TSNE(perplexity=perplexity, init="pca", metric="cosine", random_state=_SEED)
    return np.asarray(layout.fit_transform(features))
