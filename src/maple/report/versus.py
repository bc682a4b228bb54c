"""One method against zero-shot CLIP on the same held-out images, in numbers."""

from dataclasses import dataclass

import numpy as np

from maple.metrics import accuracy_interval, sign_test
from maple.report.changes import Change
from maple.report.duels import read_predictions
from maple.report.records import ZERO_SHOT, Collection, Evaluation
from maple.report.variants import TITLES


@dataclass(frozen=True)
class Accuracy:
    """How often a method is right on n images, with the 95 % interval of that; fractions."""

    title: str
    right: int
    images: int

    @property
    def fraction(self) -> float:
        """Right answers over images."""
        return self.right / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, 95 %."""
        return accuracy_interval(self.right, self.images)


@dataclass(frozen=True)
class Versus:
    """Two methods on the same images.

    Attributes:
        ours, theirs: the method, and zero-shot CLIP.
        mended, broken: images that only the one, and only the other, names rightly.
        p: of the exact sign test on these (McNemar's).
        changes: every class that has images, greatest gain first.
    """

    ours: Accuracy
    theirs: Accuracy
    mended: int
    broken: int
    p: float
    changes: tuple[Change, ...]


def accuracy_of(evaluation: Evaluation) -> Accuracy:
    """The accuracy of an evaluation."""
    row = evaluation.row
    return Accuracy(TITLES.get(evaluation.method, evaluation.method), round(row.top1 * row.images), row.images)


def held_out(collection: Collection) -> tuple[Evaluation | None, Evaluation | None]:
    """The evaluations on the test images of the own data set under their own names: the method's, and zero-shot's."""
    found = [
        evaluation
        for evaluation in collection.evaluations
        if evaluation.own and not evaluation.names and (evaluation.row.classes, evaluation.row.part) == ("all", "test")
    ]
    ours = next((one for one in found if one.method != ZERO_SHOT), None)
    theirs = next(
        (one for one in found if one.method == ZERO_SHOT and (ours is None or one.row.items == ours.row.items)), None
    )
    return ours, theirs


def versus(ours: Evaluation, theirs: Evaluation) -> Versus | None:
    """Compare them, image by image; None where they are not about the same images, or no predictions were kept.

    Raises:
        ValueError: a file of predictions is damaged.
    """
    after, before = read_predictions(ours), read_predictions(theirs)
    if after is None or before is None or after.paths != before.paths or ours.row.class_names != theirs.row.class_names:
        return None
    now, then = (found.top[:, 0] == found.labels for found in (after, before))
    mended, broken = int(np.sum(now & ~then)), int(np.sum(then & ~now))
    changes = [
        Change(name, "all", one - other)
        for name, one, other in zip(ours.row.class_names, ours.row.per_class, theirs.row.per_class, strict=True)
        if one is not None and other is not None
    ]
    changes.sort(key=lambda change: -change.difference)
    return Versus(accuracy_of(ours), accuracy_of(theirs), mended, broken, sign_test(mended, broken), tuple(changes))
