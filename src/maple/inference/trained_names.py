"""How far new class names are from the trained ones."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maple.names import words_of

Floats = NDArray[np.floating[Any]]

MOST_NAMES = 500
"""Lists longer than this, old and new together, are not measured: it would take longer than the prediction."""

_LOWEST = 0.05
_SAME = 1 - 1e-6
_SHOWN = 3


class TrainedNames:
    """The names that were trained, and how near others are to them.

    Args:
        trained: the names.
        features: the frozen CLIP's unit features [n, D] of "a photo of a {}." for each name; without it nothing is
            measured.
    """

    def __init__(self, trained: Sequence[str], features: Callable[[Sequence[str]], Floats] | None) -> None:
        self._known = sorted({words_of(name) for name in trained})
        self._features = features
        self._trained: Floats | None = None

    def explain(self, names: Sequence[str]) -> str | None:
        """Say in one line that some of `names` were not trained, and whether they are far from those that were.

        A name is far when its cosine to the nearest trained name, of the frozen text features of "a photo of a {}.", is
        below the smallest twentieth of what the trained names have among themselves; this scale is the backbone's own,
        whatever it is. A list is called far when most of its new names are.

        Measured on the small CLIP, trained on half of `emoji-food`: of the other half 34 per cent of the names are far,
        of `emoji-animals` 27; of people and activities 53, objects and places 64, symbols 86, flags 99. It tells how
        far one has gone from the training, not how well the prompts do there: compare with zero-shot for that.

        Returns:
            None where every name was trained.
        """
        known = set(self._known)
        new = [name for name in dict.fromkeys(names) if words_of(name) not in known]
        if not new:
            return None
        told = f"{len(new)} of {len(names)} class names were not trained ({_some(new)})"
        if self._features is None or len(known) + len(new) > MOST_NAMES:
            return told
        features = self._encoded(new)
        same = _same(new, features)
        if len(known) < 2:
            return told + same
        nearest, usual = self._cosines(features)
        bound = float(np.quantile(usual, _LOWEST))
        far = [name for name, cosine in zip(new, nearest.tolist(), strict=True) if cosine < bound]
        if 2 * len(far) <= len(new):
            return told + same
        return (
            f"{told}, and this list is far from the trained one: {_some(far)} less like any trained name than those "
            f"are like each other (cosine {float(nearest.min()):.2f}, usual {bound:.2f} and more); compare with "
            f"--zero-shot{same}"
        )

    def cosines(self, names: Sequence[str]) -> tuple[Floats, Floats]:
        """Cosines to the nearest trained name: of each of `names` [n], and of each trained name to the others [C].

        Raises:
            ClassNamesError: a name is too long for the text tower.
        """
        return self._cosines(self._encoded(names))

    def _encoded(self, names: Sequence[str]) -> Floats:
        if self._features is None:
            raise TypeError("cosines need the features of names")
        return self._features(names)

    def _cosines(self, features: Floats) -> tuple[Floats, Floats]:
        if self._trained is None:
            self._trained = self._encoded(self._known)
        among = self._trained @ self._trained.T
        np.fill_diagonal(among, -np.inf)
        return (features @ self._trained.T).max(axis=1), among.max(axis=1)


def _same(names: Sequence[str], features: Floats) -> str:
    """What is to be told of the first two names that have the same features; nothing where there are none."""
    pairs = np.argwhere(np.triu(features @ features.T > _SAME, 1))
    if not len(pairs):
        return ""
    first, second = (names[index] for index in pairs[0])
    return f"; this CLIP reads {first!r} and {second!r} as the same words, and cannot choose between them"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown}, ..." if len(names) > _SHOWN else shown
