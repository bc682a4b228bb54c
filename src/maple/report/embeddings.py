"""Image features before and after prompting, laid out in the plane."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maple.report.duels import Bout, Duel
from maple.report.examples import evenly

SHOWN_CLASSES = 12
MOST_POINTS = 600
_SEED = 0
_FEWEST_FOR_TSNE = 12

Array = NDArray[Any]


@dataclass(frozen=True)
class Panel:
    """Points [m, 2] of one method's image features; `silhouette` tells how well all D dimensions separate classes."""

    points: Array
    silhouette: float | None


@dataclass(frozen=True)
class Embedding:
    """The same m images before and after; `labels` [m] index `class_names`."""

    how: str
    class_names: tuple[str, ...]
    labels: Array
    before: Panel
    after: Panel
    unchanged: bool


def embed(duel: Duel) -> Embedding | None:
    """Lay out the images of a dozen classes; None where features were not kept of at least three of them."""
    features: list[tuple[Array, Array]] = []
    labels: list[int] = []
    names: list[str] = []
    places = SHOWN_CLASSES // len(duel.bouts)
    for bout in duel.bouts:
        common = _common(bout)
        if common is None:
            return None
        items, before, after = common
        own = bout.before.labels[items]
        present = np.unique(own)
        for label in (present[index] for index in evenly(len(present), min(places, len(present)))):
            chosen = np.flatnonzero(own == label)
            chosen = chosen[evenly(len(chosen), min(len(chosen), MOST_POINTS // SHOWN_CLASSES))]
            features += [(before[index], after[index]) for index in chosen]
            labels += [len(names)] * len(chosen)
            suffix = f" ({bout.classes})" if len(duel.bouts) > 1 else ""
            names.append(f"{bout.class_names[int(label)]}{suffix}")
    if len(labels) < 3:
        return None
    before, after = (np.array([pair[side] for pair in features], dtype=np.float64) for side in (0, 1))
    if before.shape[1] != after.shape[1]:
        return None
    how = "t-SNE" if len(labels) >= _FEWEST_FOR_TSNE else "PCA"
    found = np.array(labels)
    panels = [Panel(_plane(side, how), _silhouette(side, found)) for side in (before, after)]
    unchanged = bool(np.allclose(before, after, atol=2e-3))
    return Embedding(how, tuple(names), found, panels[0], panels[1], unchanged)


def _common(bout: Bout) -> tuple[Array, Array, Array] | None:
    before, after = bout.before, bout.after
    if before.features is None or after.features is None or before.feature_items is None or after.feature_items is None:
        return None
    items, ours, theirs = np.intersect1d(before.feature_items, after.feature_items, return_indices=True)
    return items, before.features[ours], after.features[theirs]


def _plane(features: Array, how: str) -> Array:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if np.ptp(features, axis=0).max() == 0:
        return np.zeros((len(features), 2))
    if how == "PCA":
        found: Array = PCA(n_components=2, svd_solver="full").fit_transform(features)
        return found
    perplexity = min(30.0, (len(features) - 1) / 3)
    layout = TSNE(perplexity=perplexity, init="pca", metric="cosine", random_state=_SEED)
    found = layout.fit_transform(features)
    return np.asarray(found)


def _silhouette(features: Array, labels: Array) -> float | None:
    from sklearn.metrics import silhouette_score

    if not 2 <= len(np.unique(labels)) < len(labels):
        return None
    return float(silhouette_score(features, labels, metric="cosine"))
