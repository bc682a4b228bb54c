"""Which classes are taken for which, by zero-shot CLIP and by a method, on the same images."""

from collections import Counter
from dataclasses import dataclass

from maple.report.duels import Duel

MOST = 12


@dataclass(frozen=True)
class Confusion:
    """Images of one class that are said to be of another: how many by zero-shot CLIP, how many by the method."""

    truth: str
    said: str
    before: int
    after: int
    images: int


def most_confused(duel: Duel, most: int = MOST) -> list[Confusion]:
    """The pairs with most mistakes by the method, then by zero-shot CLIP; in the order of the classes where equal."""
    found: list[Confusion] = []
    for bout in duel.bouts:
        labels = [int(label) for label in bout.after.labels]
        counts = Counter(labels)
        before, after = (
            Counter(
                (label, int(said)) for label, said in zip(labels, side.top[:, 0], strict=True) if int(said) != label
            )
            for side in (bout.before, bout.after)
        )
        names = bout.class_names
        found += [
            Confusion(names[truth], names[said], before[truth, said], after[truth, said], counts[truth])
            for truth, said in sorted(before.keys() | after.keys())
        ]
    return sorted(found, key=lambda pair: (-pair.after, -pair.before))[:most]
